"""Time and memory of the operator and of a training step, beside PyTorch on the same CPU threads.

    python benchmarks/speed.py [--threads 2] [--only operator,scaling,million,step]

Forward + backward, float32, the same inputs; all competitors take turns in one process and the
median counts.  Writes results/speed.json and speed.png.
"""

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ((512, 49, 16), (64, 784, 16), (16, 4096, 32), (4, 16384, 64))
NORM = 1.0  # ‖S‖₂ of the inputs, the size met in training


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="operator,scaling,million,step")
    parser.add_argument("--million", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


args = arguments()
# NumPy gets its threads from the batch, with one BLAS thread each; PyTorch is told in `main`.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OSA_THREADS": str(args.threads)}
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from baselines import softmax_backward, softmax_forward  # noqa: E402
from osa_minimal import osa_backward, osa_forward, rotation_angles  # noqa: E402


def median_times(competitors, repeats, budget=20.0):
    """{name: median seconds}: the competitors take turns; a slow one has fewer of them."""
    times = {name: [] for name in competitors}
    for _ in range(repeats + 1):  # the first turn warms up
        for name, f in competitors.items():
            if len(times[name]) > 1 and sum(times[name]) > budget:
                continue
            gc.collect()
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t[1:] or t)) for name, t in times.items()}


def inputs(b, N, d_v, seed=0):
    """Q, K, V, dO (b, N, d_v) float32 and the α for which ‖S‖₂ = NORM."""
    rng = np.random.default_rng(seed)
    Q, K, V, dO = (rng.standard_normal((b, N, d_v)).astype(np.float32) for _ in range(4))
    return Q, K, V, dO, NORM / float(rotation_angles(Q[:4], K[:4], 1.0).max())


def ours(Q, K, V, dO, alpha, route):
    def f():
        osa_backward(dO, osa_forward(Q, K, V, alpha, route)[1])

    return f


def floor(Q, K, V, dO):
    """The products with N in them that the gram route cannot do without, and nothing else."""
    F, r = np.concatenate([Q, K, V], axis=-1), 2 * Q.shape[-1]
    P, m = F[..., :r], V.shape[-1]
    b, N, w = F.shape
    small = np.ones((b, w + m, w), np.float32)
    out = {n: np.empty((b, N, n), np.float32) for n in {r, m}}
    square = np.empty((b, r, w), np.float32)

    def f():
        np.matmul(P.swapaxes(-1, -2), F, out=square)  # [G, PᵀV]
        np.matmul(P, small[:, :r, :m], out=out[m])  # P Φ
        np.matmul(P.swapaxes(-1, -2), dO, out=square[..., :m])  # PᵀdO
        np.matmul(P, small[:, :r, :m], out=out[m])  # P W̄
        np.matmul(F, small[:, :w, :r], out=out[r])  # [P, V] [Ḡ + Ḡᵀ; W̄ᵀ]
        np.matmul(dO, small[:, :m, :r], out=out[r])  # dO Φᵀ

    return f


def torch_peer(f, Q, K, V, dO, alpha):
    import torch

    leaves = [torch.tensor(a, requires_grad=True) for a in (Q, K, V)]
    leaves.append(torch.tensor(alpha, dtype=torch.float32, requires_grad=True))
    gradient = torch.tensor(dO)

    def run():
        torch.autograd.grad(f(*leaves), leaves, gradient, allow_unused=True)

    return run


def operator():
    """Milliseconds of every route and peer at the four shapes."""
    import peers
    import torch

    torch.set_num_threads(args.threads)
    table = []
    for b, N, d_v in SHAPES:
        Q, K, V, dO, alpha = inputs(b, N, d_v)
        F = np.concatenate([Q, K, V], axis=-1)
        competitors = {
            f"ours, {route}": ours(Q, K, V, dO, alpha, route) for route in ("auto", "qr")
        }
        competitors["floor"] = floor(Q, K, V, dO)
        if N <= 784:
            competitors["our softmax"] = lambda F=F, dO=dO: softmax_backward(
                dO, softmax_forward(F)[1]
            )
        for name, f in peers.PEERS.items():
            if f is not peers.naive or N < 784:
                competitors[name] = torch_peer(f, Q, K, V, dO, alpha)
        competitors["fused softmax"] = torch_peer(peers.fused_softmax, Q, K, V, dO, alpha)
        times = {k: 1e3 * t for k, t in median_times(competitors, args.repeats).items()}
        best = min(times[k] for k in times if k in peers.PEERS)
        row = {
            "shape": [b, N, d_v], "milliseconds": {k: round(t, 2) for k, t in times.items()},
            "best_peer_over_ours": round(best / times["ours, auto"], 2),
            "ours_over_floor": round(times["ours, auto"] / times["floor"], 2),
            "fused_softmax_over_ours": round(times["fused softmax"] / times["ours, auto"], 2),
        }  # fmt: skip
        print(json.dumps(row, indent=1), flush=True)
        table.append(row)
    return table


def exponent(x, y):
    """Slope of log y against log x by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scaling():
    """Time and peak memory against N, one head of d_v = 32, and fused softmax beside it."""
    import peers
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    for k in range(12, 19):
        N = 2**k
        Q, K, V, dO, alpha = inputs(1, N, 32)
        competitors = {"ours": ours(Q, K, V, dO, alpha, "auto")}
        if N <= 2**14:
            competitors["softmax"] = torch_peer(peers.fused_softmax, Q, K, V, dO, alpha)
        times = median_times(competitors, args.repeats)
        tracemalloc.start()
        competitors["ours"]()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append({"N": N, "peak_bytes": peak, **{f"{n}_seconds": t for n, t in times.items()}})
        print(rows[-1], flush=True)
    N = [row["N"] for row in rows]
    both = [row for row in rows if "softmax_seconds" in row]
    ratio = [math.log(row["softmax_seconds"] / row["ours_seconds"]) for row in both]
    slope, offset = np.polyfit(np.log([row["N"] for row in both]), ratio, 1)
    return {
        "rows": rows,
        "time_exponent": exponent(N, [row["ours_seconds"] for row in rows]),
        "memory_exponent": exponent(N, [row["peak_bytes"] for row in rows]),
        "overtakes_fused_softmax_at_N": int(np.exp(-offset / slope)),
    }


def million():
    """One head of 1,048,576 tokens, d_v = 32, in a process of its own: seconds and peak memory."""
    command = [sys.executable, __file__, "--million", "--threads", str(args.threads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def million_alone():
    Q, K, V, dO, alpha = inputs(1, 2**20, 32)
    start = time.perf_counter()
    ours(Q, K, V, dO, alpha, "auto")()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_gb": round(peak, 2)}))


def draw(result, path):
    """Left: the four shapes; right: time against N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    rows = result["operator"]
    names = list(dict.fromkeys(n for row in rows for n in row["milliseconds"]))
    for i, name in enumerate(names):
        x = [j + 0.8 * i / len(names) for j, row in enumerate(rows) if name in row["milliseconds"]]
        y = [row["milliseconds"][name] for row in rows if name in row["milliseconds"]]
        left.bar(x, y, width=0.75 / len(names), label=name, color=plt.cm.tab10(i))
    left.set_xticks([j + 0.35 for j in range(len(rows))], [str(tuple(r["shape"])) for r in rows])
    left.set(yscale="log", ylabel="forward + backward, ms", xlabel="(batch · heads, N, d_v)")
    left.legend(fontsize=7)
    rows = result["scaling"]["rows"]
    for name, style in (("ours", "o-"), ("softmax", "s--")):
        chosen = [r for r in rows if f"{name}_seconds" in r]
        label = {"ours": "orthogonal (ours)", "softmax": "fused softmax (PyTorch)"}[name]
        y = [1e3 * r[f"{name}_seconds"] for r in chosen]
        right.loglog([r["N"] for r in chosen], y, style, label=label)
    right.set(xlabel="tokens N (one head, d_v = 32)", ylabel="forward + backward, ms")
    right.grid(alpha=0.3, which="both")
    right.legend()
    figure.savefig(path, dpi=110)


def main():
    from machine import about

    path = RESULTS / "speed.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = {"operator": operator, "scaling": scaling, "million": million}
    if "step" in args.only.split(","):
        from step import step

        parts["step"] = lambda: step(args.threads, args.repeats)
    for name in args.only.split(","):
        result[name] = parts[name]()
        print(name, json.dumps(result[name], indent=1), flush=True)
    result |= {"threads": args.threads, **about()}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if {"operator", "scaling"} <= set(result):
        draw(result, RESULTS / "speed.png")


if __name__ == "__main__":
    million_alone() if args.million else main()
