"""The operator, a training step and the MNIST run on one NVIDIA card, beside PyTorch and the floor.

    python benchmarks/gpu.py [--only products,operator,scaling,step,mnist,mnist_graph]

float32, forward + backward, TF32 off on both sides; every time is a median over repetitions, each
between two synchronisations of the device.  The floor is the time in which the card can do what the
gram route's products must: bytes over the measured rate of a copy, or operations over that of a
matrix product, whichever is longer.  Kernel launches are counted by PyTorch's profiler, which sees
CuPy's as well.  Writes results/gpu.json; without a card one line and exit status 2.
"""

import argparse
import csv
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from fast import osa_backward, osa_forward  # noqa: E402
from fast.basis import tall_product  # noqa: E402
from fast.gpu import find_device, product  # noqa: E402
from osa_minimal import rotation_angles  # noqa: E402

SHAPES = ((512, 49, 16), (4096, 49, 16), (64, 4096, 64), (16, 65536, 64))
LENGTHS = tuple(2**k for k in range(12, 21))
MODES = {"eager": None, "compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}
PARTS = ("products", "operator", "scaling", "step", "mnist", "mnist_graph")
WIDE = "--width 512 --depth 12 --heads 8 --batch-size 1024".split()
NORM = 1.0  # ‖S‖₂ of the inputs, the size met in training
SECONDS = 5.0  # spent on each competitor


class Card:
    """The array module, and what the two libraries call waiting and giving memory back."""

    def __init__(self, xp):
        import torch

        self.xp, self.torch, self.on_gpu = xp, torch, xp is not np
        if self.on_gpu:
            torch.set_default_device("cuda")  # the peers' own `torch.eye` too

    def wait(self):
        if self.on_gpu:
            self.xp.cuda.runtime.deviceSynchronize()  # of all streams, PyTorch's too

    def free(self):
        gc.collect()
        if self.on_gpu:
            self.xp.get_default_memory_pool().free_all_blocks()
            self.torch.cuda.empty_cache()

    def seconds(self, f):
        """The median time of f; a string saying why where it has none."""
        try:
            self.free()
            for _ in range(3):  # compiles, tunes, fills the memory pools
                f()
            times, end = [], time.perf_counter() + SECONDS
            while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
                self.wait()
                start = time.perf_counter()
                f()
                self.wait()
                times.append(time.perf_counter() - start)
            return float(np.median(times))
        except Exception as error:  # out of memory, or a peer that does not compile
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def launches(self, f):
        """Kernels that one call of f starts; None where nothing can count them."""
        if not self.on_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                f()
                self.wait()
            kernels = [e.name for e in profiler.events() if e.device_type.name == "CUDA"]
        except Exception:  # a profiler without permission to count
            return None
        return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels) or None

    def rates(self):
        """Bytes per second of a copy (read and written) and operations per second of a product."""
        xp, n = self.xp, 4096
        a, A = xp.zeros(2**26, np.float32), xp.ones((n, n), np.float32)
        b, B = xp.empty_like(a), xp.empty_like(A)
        copy = self.seconds(lambda: xp.add(a, 0, out=b))
        return 2 * a.nbytes / copy, 2 * n**3 / self.seconds(lambda: xp.matmul(A, A, out=B))

    def about(self):
        if not self.on_gpu:
            return {}
        runtime = self.xp.cuda.runtime
        properties = runtime.getDeviceProperties(self.xp.cuda.Device().id)

        def version(n):
            return f"{n // 1000}.{n % 1000 // 10}"

        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError):
            driver = [None]
        return {
            "card": properties["name"].decode(),
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "memory_gb": round(properties["totalGlobalMem"] / 2**30, 1),
            "driver": driver[0],
            "driver_cuda": version(runtime.driverGetVersion()),
            "cuda": version(runtime.runtimeGetVersion()),
            "cupy": self.xp.__version__,
            "torch_cuda": self.torch.version.cuda,
        }


def inputs(card, b, N, d_v):
    """Q, K, V, dO (b, N, d_v) float32, and the α for which ‖S‖₂ = NORM."""
    rng, few = np.random.default_rng(0), (slice(4), slice(2**16))  # ‖S‖₂ grows with N
    arrays = [rng.standard_normal((b, N, d_v), np.float32) for _ in range(4)]
    norm = float(rotation_angles(arrays[0][few], arrays[1][few], 1.0).max()) * max(1, N / 2**16)
    # α as an array of the device: a Python number would be moved there at each call.
    alpha = card.xp.full((1, 1), NORM / norm, np.float32)
    return *(card.xp.asarray(a) for a in arrays), alpha


def ours(Q, K, V, dO, alpha, route):
    return lambda: osa_backward(dO, osa_forward(Q, K, V, alpha, route)[1])


def torch_peer(card, f, Q, K, V, dO, alpha):
    from autograd import to_cpu

    *leaves, gradient = [card.torch.tensor(to_cpu(a)) for a in (Q, K, V, alpha, dO)]
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: card.torch.autograd.grad(f(*leaves), leaves, gradient, allow_unused=True)


def fused_softmax(Q, K, V, alpha):
    """PyTorch's own kernel, which wants four dimensions."""
    import torch

    heads = [a[None] for a in (Q, K, V)]
    return torch.nn.functional.scaled_dot_product_attention(*heads)[0]


def floor(rates, b, N, d_v):
    """Seconds: forward reads [Q, K, V] twice and writes O; backward reads [Q, K] and dO, then
    [Q, K, V] and dO, and writes the gradients.  Products as listed in benchmarks/speed.py."""
    numbers = b * N * d_v * (3 + 3 + 1 + 2 + 1 + 3 + 1 + 3)
    operations = 2 * b * N * d_v * d_v * (2 * 3 + 3 + 2 + 4 * 3)
    return max(4 * numbers / rates[0], operations / rates[1])


def milliseconds(times):
    return {k: round(1e3 * t, 3) if isinstance(t, float) else t for k, t in times.items()}


def best(times, names):
    return min((times[k] for k in names if isinstance(times.get(k), float)), default=math.nan)


def tall_products(card, rates, shapes=SHAPES):
    """PᵀP, which decides at long shapes: by CuPy, by cuBLAS without copies, in blocks of rows."""
    rows = []
    for b, N, d_v in shapes:
        card.free()
        F = card.xp.ones((b, N, 3 * d_v), np.float32)
        P = F[..., : 2 * d_v]
        ways = {
            "CuPy": lambda P=P: P.swapaxes(-1, -2) @ P,
            "cuBLAS": lambda P=P: product(P.swapaxes(-1, -2), P),
            "cuBLAS in blocks": lambda P=P: tall_product(P, P),
        }
        times = {name: card.seconds(f) for name, f in ways.items()}
        times["floor"] = 2 * b * N * (2 * d_v) ** 2 / rates[1]
        rows.append({"shape": (b, N, d_v), "milliseconds": milliseconds(times)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def operator(card, rates, shapes=SHAPES):
    """Every route and peer at four shapes."""
    import peers

    rows = []
    for shape in shapes:
        card.free()
        data = inputs(card, *shape)
        times = {f"ours, {r}": card.seconds(ours(*data, r)) for r in ("auto", "gram")}
        rivals = []
        for name, f in peers.PEERS.items():
            if f is peers.naive and shape[1] > 784:
                continue
            for how, mode in MODES.items():
                rivals.append(f"{name}, {how}")
                peer = card.torch.compile(f, mode=mode) if mode else f
                times[rivals[-1]] = card.seconds(torch_peer(card, peer, *data))
        times["fused softmax"] = card.seconds(torch_peer(card, fused_softmax, *data))
        times["floor"] = floor(rates, *shape)
        mine = times["ours, auto"]
        row = {"shape": shape, "milliseconds": milliseconds(times)}
        if isinstance(mine, float):
            row["best_peer_over_ours"] = round(best(times, rivals) / mine, 2)
            row["ours_over_floor"] = round(mine / times["floor"], 2)
            row["fused_softmax_over_ours"] = round(best(times, ["fused softmax"]) / mine, 2)
        row["kernel_launches"] = card.launches(ours(*data, "auto"))
        print(json.dumps(row, indent=1), flush=True)
        rows.append(row)
    return rows


def scaling(card, lengths=LENGTHS):
    """Time and memory against N, one head of d_v = 32; the slope from 65,536 tokens on."""
    rows = []
    for N in lengths:
        card.free()
        f = ours(*inputs(card, 1, N, 32), "auto")
        seconds = card.seconds(f)
        pool = card.xp.get_default_memory_pool().total_bytes() if card.on_gpu else None
        rows.append({"N": N, "seconds": seconds, "memory_bytes": pool})
        print(rows[-1], flush=True)
    long = [r for r in rows if r["N"] >= min(2**16, lengths[-2])]
    if any(isinstance(r["seconds"], str) for r in long):
        return {"rows": rows, "time_exponent": None}
    x, y = np.log([r["N"] for r in long]), np.log([r["seconds"] for r in long])
    return {"rows": rows, "time_exponent": round(float(np.polyfit(x, y, 1)[0]), 3)}


def step(card, presets=(("mnist", []), ("wide", WIDE))):
    """A whole training step: forward, backward, clipping, Muon and AdamW."""
    import peers
    from step import first_batch, stepping, torch_step

    import train
    from training import data
    from training.options import parse

    results, dataset = {}, data.load()
    for preset, options in presets:
        for attention in ("osa", "softmax"):
            card.free()
            arguments = ["--attention", attention, *options]
            config, _, _ = parse(train.Config, train.PRESETS, arguments)
            run = train.Run(config, dataset, card.xp)
            images, labels = first_batch(run)
            advance = stepping(run)
            times = {"ours": card.seconds(advance)}
            row = {"kernel_launches": {"ours": card.launches(advance)}}
            own = float(run.gradients(images, labels)[0])
            if card.on_gpu:
                recorded = stepping(train.Run(config, dataset, card.xp, graph=True))
                times["ours, CUDA graph"] = card.seconds(recorded)
                del recorded
            choices = peers.PEERS if attention == "osa" else {"fused softmax": peers.fused_softmax}
            for name, f in choices.items():
                for how, mode in MODES.items():
                    label = f"PyTorch, {name}, {how}"
                    rival = torch_step(run, f, images, labels, mode)
                    try:  # the same mathematics: the same first loss
                        first = float(rival())
                        same = abs(first - own) < 1e-3 * own
                        times[label] = card.seconds(rival) if same else f"loss {first}, not {own}"
                        row["kernel_launches"][label] = card.launches(rival)
                    except Exception as error:
                        times[label] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rivals = [k for k in times if not k.startswith("ours")]
            row |= {"options": options, "milliseconds": milliseconds(times)}
            mine = best(times, ("ours", "ours, CUDA graph"))
            eager = [k for k in rivals if k.endswith("eager")]
            row["ours_over_best_pytorch"] = round(mine / best(times, rivals), 2)
            row["ours_over_best_eager"] = round(mine / best(times, eager), 2)
            if math.isfinite(mine):
                row["images_per_second"] = round(run.batches.size / mine)
            results[f"{preset}, {attention}"] = row
            print(preset, attention, json.dumps(row, indent=1), flush=True)
    return results


def mnist(device="cuda", options=()):
    """The main job in a process of its own: seconds of training to 98 % in validation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", "--device", device, "--out", folder, *options]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - start
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    reached = (r for r in rows if float(r["validation_accuracy"]) >= 0.98)
    first = next(reached, {"seconds": "nan", "step": "-1"})
    return {
        "seconds_to_98_percent_validation": float(first["seconds"]),
        "step": int(first["step"]),
        "training_seconds": summary["seconds"],
        "wall_seconds": round(wall, 1),
        "test_accuracy": summary["test_accuracy"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--check", action="store_true", help="only say which card there is")
    args = parser.parse_args()
    try:
        xp, device = find_device("cuda")
    except RuntimeError as error:
        print(f"benchmarks/gpu.py: {error}".replace(", or use --device cpu", ""), file=sys.stderr)
        return 2
    print(device, flush=True)
    if args.check:
        return 0
    from training.report import machine

    card = Card(xp)
    path = RESULTS / "gpu.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rates = card.rates()
    result |= {"copy_gb_per_s": round(rates[0] / 1e9), "gemm_tflops": round(rates[1] / 1e12, 1)}
    parts = {
        "products": lambda: tall_products(card, rates),
        "operator": lambda: operator(card, rates),
        "scaling": lambda: scaling(card),
        "step": lambda: step(card),
        "mnist": mnist,
        "mnist_graph": lambda: mnist(options=["--graph"]),
    }
    for name in args.only.split(","):
        result[name] = parts[name]()
        print(name, json.dumps(result[name], indent=1), flush=True)
        # Written after each part: a card may be lost in the middle.
        text = json.dumps({**result, **machine(), **card.about()}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
