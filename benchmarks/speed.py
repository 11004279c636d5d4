"""Time and memory of the operator and of a training step, beside PyTorch on the same CPU threads.

    python benchmarks/speed.py [--threads 2] [--only operator,crossing,scaling,million,step]

Forward + backward, float32, the same inputs; all competitors take turns in one process and the
median counts.  Writes results/speed.json and speed.png.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ((512, 49, 16), (64, 784, 16), (16, 4096, 32), (4, 16384, 64))
PARTS = ("operator", "crossing", "scaling", "million", "step")
NORM = 1.0  # ‖S‖₂ of the inputs, the size met in training


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--draw", action="store_true", help="the figure from committed results")
    parser.add_argument("--million", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


args = arguments()
# NumPy gets its threads from the batch, with one BLAS thread each; PyTorch is told in `main`.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OSA_THREADS": str(args.threads)}
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import fast  # noqa: E402
import osa_minimal  # noqa: E402
from fast.threads import batch_parts, keep_freed_memory, parallel  # noqa: E402
from relatives.softmax import softmax_backward, softmax_forward  # noqa: E402


def median_times(competitors, repeats, budget=20.0):
    """{name: median seconds}: the competitors take turns; a slow one has fewer of them."""
    times = {name: [] for name in competitors}
    for _ in range(repeats):
        for name, f in competitors.items():
            if sum(times[name]) > budget:
                continue
            gc.collect()
            # OpenMP's threads go on spinning for some 60 ms after the competitor before this one.
            start = time.perf_counter()
            while time.perf_counter() - start < 0.15:
                f()
            for _ in range(3):
                start = time.perf_counter()
                f()
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def inputs(b, N, d_v, seed=0):
    """Q, K, V, dO (b, N, d_v) float32 and the α for which ‖S‖₂ = NORM."""
    rng = np.random.default_rng(seed)
    Q, K, V, dO = (rng.standard_normal((b, N, d_v)).astype(np.float32) for _ in range(4))
    some = slice(4), slice(2**18)  # ‖S‖₂ grows with N
    norm = osa_minimal.rotation_angles(Q[some], K[some], 1.0).max() * max(1, N / 2**18)
    return Q, K, V, dO, NORM / float(norm)


def ours(Q, K, V, dO, alpha, route):
    return lambda: fast.osa_backward(dO, fast.osa_forward(Q, K, V, alpha, route)[1])


def paper(Q, K, V, dO, alpha):
    """The operator of osa_minimal.py; its batch is not divided among threads."""
    return lambda: osa_minimal.osa_backward(dO, osa_minimal.osa_forward(Q, K, V, alpha)[1])


def floor(Q, K, V, dO):
    """The gram route's products with N in them and nothing else: at the rate of this BLAS for these
    shapes, operands and results in place, shared among the threads as `osa_forward` does."""
    QKV, r = np.concatenate([Q, K, V], axis=-1), 2 * Q.shape[-1]
    P, m = QKV[..., :r], V.shape[-1]
    b, N, w = QKV.shape
    QKVdO, small = np.concatenate([QKV, dO], axis=-1), np.ones((b, w + m, w), np.float32)
    M, g = np.empty((b, r, w), np.float32), np.empty((b, r, m), np.float32)
    O, dQKV = np.empty_like(dO), np.empty_like(QKV)

    def products(p):
        np.matmul(P[p].swapaxes(-1, -2), QKV[p], out=M[p])  # [PᵀP, PᵀV]
        np.matmul(QKV[p], small[p, :w, :m], out=O[p])  # [P, V] [sJy; I]
        np.matmul(P[p].swapaxes(-1, -2), dO[p], out=g[p])  # PᵀdO
        np.matmul(QKVdO[p], small[p], out=dQKV[p])  # [P, V, dO] X

    return lambda: parallel(products, batch_parts(QKV))


def operations(b, N, d_v):
    """Multiplications and additions in the products of `floor`."""
    return 2 * b * N * d_v * d_v * (2 * 3 + 3 + 2 + 4 * 3)


def torch_peer(f, Q, K, V, dO, alpha):
    import torch

    leaves = [torch.tensor(a, requires_grad=True) for a in (Q, K, V)]
    leaves.append(torch.tensor(alpha, dtype=torch.float32, requires_grad=True))
    gradient = torch.tensor(dO)

    def run():
        torch.autograd.grad(f(*leaves), leaves, gradient, allow_unused=True)

    return run


def operator():
    """Milliseconds of our routes, of the paper's lines and of every peer at the four shapes."""
    import peers
    import torch

    torch.set_num_threads(args.threads)
    table = []
    for b, N, d_v in SHAPES:
        Q, K, V, dO, alpha = inputs(b, N, d_v)
        competitors = {
            f"ours, {route}": ours(Q, K, V, dO, alpha, route) for route in ("auto", "qr")
        }
        competitors["paper"] = paper(Q, K, V, dO, alpha)
        competitors["floor"] = floor(Q, K, V, dO)
        if N <= 784:
            competitors["our softmax"] = lambda QKV=(Q, K, V), dO=dO: softmax_backward(
                dO, softmax_forward(*QKV)[1]
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
            "paper_over_ours": round(times["paper"] / times["ours, auto"], 2),
            "floor_gflops": round(operations(b, N, d_v) / times["floor"] / 1e6, 1),
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
    return {
        "rows": rows,
        "time_exponent": exponent(N, [row["ours_seconds"] for row in rows]),
        "memory_exponent": exponent(N, [row["peak_bytes"] for row in rows]),
    }


def crossing():
    """The length from which on OSA is faster than fused softmax: 65,536 tokens, d_v = 32."""
    import peers
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    for k in range(5, 12):
        N = 2**k
        Q, K, V, dO, alpha = inputs(2 ** (16 - k), N, 32)
        competitors = {
            "ours": ours(Q, K, V, dO, alpha, "auto"),
            "softmax": torch_peer(peers.fused_softmax, Q, K, V, dO, alpha),
        }
        times = median_times(competitors, args.repeats)
        rows.append({"N": N, **{f"{n}_seconds": t for n, t in times.items()}})
        print(rows[-1], flush=True)
    ratio = [math.log(row["softmax_seconds"] / row["ours_seconds"]) for row in rows]
    last = max(i for i, x in enumerate(ratio) if x < 0)  # then the next one is above 0
    part = -ratio[last] / (ratio[last + 1] - ratio[last])
    return {"rows": rows, "overtakes_fused_softmax_at_N": round(rows[last]["N"] * 2**part)}


def million():
    """One head of 1,048,576 tokens, d_v = 32, in a process of its own: seconds and peak memory."""
    command = [sys.executable, __file__, "--million", "--threads", str(args.threads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def million_alone():
    Q, K, V, dO, alpha = inputs(1, 2**20, 32)
    start = time.perf_counter()
    ours(Q, K, V, dO, alpha, "auto")()
    seconds = time.perf_counter() - start
    # Linux: of this program alone, where getrusage still counts the process that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20  # kB -> GB
    print(json.dumps({"seconds": round(seconds, 2), "peak_gb": round(peak, 2)}))


def draw(result, path):
    """Left: the four shapes; right: time against N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(3, 2, 2)
    )
    rows = result["operator"]
    names = list(dict.fromkeys(n for row in rows for n in row["milliseconds"]))
    for i, name in enumerate(names):
        x = [j + 0.8 * i / len(names) for j, row in enumerate(rows) if name in row["milliseconds"]]
        y = [row["milliseconds"][name] for row in rows if name in row["milliseconds"]]
        colour = plt.cm.tab20(2 * i % 20 + i // 10)
        left.bar(x, y, width=0.75 / len(names), label=name, color=colour)
    left.set_xticks([j + 0.35 for j in range(len(rows))], [str(tuple(r["shape"])) for r in rows])
    left.set(yscale="log", ylabel="forward + backward, ms", xlabel="(batch · heads, N, d_v)")
    left.set_ylim(top=30 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=7, ncols=2, loc="upper left")
    for axes, part, xlabel in (
        (middle, "crossing", "tokens N (65,536 in all, d_v = 32)"),
        (right, "scaling", "tokens N (one head, d_v = 32)"),
    ):
        for name, style in (("ours", "o-"), ("softmax", "s--")):
            chosen = [r for r in result[part]["rows"] if f"{name}_seconds" in r]
            label = {"ours": "orthogonal (ours)", "softmax": "fused softmax (PyTorch)"}[name]
            y = [1e3 * r[f"{name}_seconds"] for r in chosen]
            axes.loglog([r["N"] for r in chosen], y, style, label=label)
        axes.set(xlabel=xlabel, ylabel="forward + backward, ms")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=110)


def main():
    from training.report import machine

    keep_freed_memory()
    path = RESULTS / "speed.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.draw:
        return draw(result, RESULTS / "speed.png")
    parts = {"operator": operator, "crossing": crossing, "scaling": scaling, "million": million}
    if "step" in args.only.split(","):
        from step import step

        parts["step"] = lambda: step(args.threads, args.repeats)
    for name in args.only.split(","):
        result[name] = parts[name]()
        print(name, json.dumps(result[name], indent=1), flush=True)
    result |= {"threads": args.threads, **machine()}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if {"operator", "crossing", "scaling"} <= set(result):
        draw(result, RESULTS / "speed.png")


if __name__ == "__main__":
    million_alone() if args.million else main()
