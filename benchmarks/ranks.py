"""A training step on one rank and on several, and the model of SCALE.md against it.

    python benchmarks/ranks.py [--ranks 2]

Starts itself under mpiexec, one thread per rank, with 1 and with K ranks in turns.  Each run times,
step by step, the gradients, their sum over the ranks (after a barrier, so without waiting for the
slower one) and the update, then whole steps without logging; medians over 55 steps, then over 3
turns.  Writes results/ranks.json, with the speed-up by the model T(K) = c/K + f + sum; the sum is
the measured one for the K measured, and SCALE.md's formula for machines over Ethernet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEPS, TURNS = 60, 3
# Bytes per second and seconds of one message.
NETWORKS = {"10 gigabit": (1.25e9, 30e-6), "1 gigabit": (1.25e8, 60e-6)}


def child():
    """One rank: prints, from the first, the median milliseconds of the parts of a step."""
    import train
    from fast.threads import keep_freed_memory
    from training import data
    from training.optimizers import clip
    from training.ranks import Ranks

    keep_freed_memory()
    ranks = Ranks()
    run = train.Run(train.Config(), data.load(), ranks=ranks)
    parts = {"gradients": [], "sum": [], "update": [], "step": []}

    def gradients(t):
        images, labels = run.batches.images(*run.batches.choose(t))
        run.grads[...] = 0
        loss, right = train.gradients(run.model, run.standardise(images), labels)
        share = len(labels) / run.batches.size
        run.grads[...] *= share
        return loss * share, right

    def update(t):
        for optimizer, part, rate in run.updates:
            clip(run.grads[part], run.config.clip)
            optimizer.step(run.weights[part], run.grads[part], rate, t + 1)

    def timed(name, f, *arguments):
        start = time.perf_counter()
        result = f(*arguments)
        parts[name].append(time.perf_counter() - start)
        return result

    for t in range(STEPS):
        values = timed("gradients", gradients, t)
        if ranks.size == 1:
            parts["sum"].append(0.0)
        else:
            ranks.comm.Barrier()
            timed("sum", ranks.sum_up, run.grads, *values)
        timed("update", update, t)
    for t in range(STEPS, 2 * STEPS):
        timed("step", run.step, t)
    print(json.dumps({k: 1e3 * statistics.median(v[5:]) for k, v in parts.items()}), flush=True)


def measure(ranks):
    mpiexec = Path(sys.executable).parent / "mpiexec"
    command = [str(mpiexec), "-n", str(ranks), sys.executable, __file__, "--child"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def model(one, parameters, ranks, network):
    """Milliseconds of a step on `ranks` machines, by the formula of SCALE.md."""
    bandwidth, latency = network
    rounds = (ranks - 1).bit_length()
    exchange = 2 * (ranks - 1) / ranks * 4 * parameters / bandwidth + 2 * rounds * latency
    return one["gradients"] / ranks + one["update"] + 1e3 * exchange


def main():
    from training.report import machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child()
    runs = [(measure(1), measure(args.ranks)) for _ in range(TURNS)]
    one, many = (
        {k: round(statistics.median(run[i][k] for run in runs), 2) for k in runs[0][0]}
        for i in (0, 1)
    )
    alone = one["gradients"] + one["update"]
    predicted = one["gradients"] / args.ranks + one["update"] + many["sum"]
    result = {
        "milliseconds": {"1 rank": one, f"{args.ranks} ranks": many},
        "speed_up": round(one["step"] / many["step"], 2),
        "speed_up_of_the_model": round(alone / predicted, 2),
        "speed_up_of_the_model_over_ethernet": {
            name: {k: round(alone / model(one, 202_706, k, network), 2) for k in (2, 4, 8)}
            for name, network in NETWORKS.items()
        },
        **machine(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    (ROOT / "benchmarks" / "results" / "ranks.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
