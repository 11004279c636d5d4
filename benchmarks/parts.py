"""What each part of fast/ gains: parts.json, for the table of fast/README.md.

    python benchmarks/parts.py [--repeats 5]

The operator, forward + backward, float32, Gaussian tokens with ‖S‖₂ = 1, at the shapes of speed.py;
then a training step of two presets.  All ways of a row take turns in one process on one thread;
medians.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ((512, 49, 16), (64, 784, 16), (16, 4096, 32), (4, 16384, 64))
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OSA_THREADS": "1"}
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import fast  # noqa: E402
import osa_minimal  # noqa: E402
import train  # noqa: E402
from fast.threads import keep_freed_memory  # noqa: E402
from training import data  # noqa: E402
from training.options import parse  # noqa: E402
from training.report import machine  # noqa: E402


def medians(ways, repeats):
    """{name: median milliseconds}, taking turns."""
    times = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if i:  # the first is a rehearsal
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(float(np.median(t)), 1) for name, t in times.items()}


def operator(shape, repeats):
    """Milliseconds of the paper's operator and of the routes of fast."""
    rng = np.random.default_rng(0)
    Q, K, V, dO = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    alpha = 1 / float(osa_minimal.rotation_angles(Q[:4], K[:4], 1.0).max())

    def way(module, *kind):
        def run():
            module.osa_backward(dO, module.osa_forward(Q, K, V, alpha, *kind)[1])

        return run

    routes = {f"fast, {route}": way(fast, route) for route in ("auto", "gram", "products", "qr")}
    return medians({"paper": way(osa_minimal), **routes}, repeats)


def step(arguments, repeats):
    """Milliseconds of a training step with both operators."""
    ways = {}
    for name in ("paper", "fast"):
        config, _, _ = parse(train.Config, train.PRESETS, [*arguments, "--operator", name])
        run, t = train.Run(config, data.load()), iter(range(10**6))
        ways[name] = lambda run=run, t=t: run.step(next(t))
    return medians(ways, 4 * repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    results = {f"operator {shape}": operator(shape, args.repeats) for shape in SHAPES}
    for name, arguments in (("mnist", []), ("pixels", ["--preset", "pixels", "--heads", "2"])):
        results[f"step, {name}"] = step(arguments, args.repeats)
    results["about"] = machine()
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (RESULTS / "parts.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
