"""Skipless OSA beside its relatives on MNIST, under one budget: comparison.csv, .json and .png.

    python experiments/comparison.py [--processes 2] [--fashion] [--quick]

Every arm has the network, batches and schedule of the default preset.  The learning rate of each
arm and optimiser is the one of GRID with the best validation accuracy after one epoch of 27,500
images (seed 100); then come SEEDS runs of EPOCHS epochs, and only their test set counts.
--fashion: the skipless arms and the ViT, on Fashion-MNIST, whose four files Debian's
package dataset-fashion-mnist puts into the folder FASHION: fashion.csv, .json and .png.
"""

import json
import statistics
import sys
from pathlib import Path

import common

ARMS = {
    "ViT: softmax, skips, LayerNorm": {"attention": "softmax", "skip": True, "norm": True},
    "OSA, skips, LayerNorm": {"attention": "osa", "skip": True, "norm": True},
    "XSA, skips, LayerNorm": {"attention": "xsa", "skip": True, "norm": True},
    "OSA": {"attention": "osa"},
    "softmax": {"attention": "softmax"},
    "XSA": {"attention": "xsa"},
    "identity mixing": {"attention": "identity"},
    "fixed orthogonal mixing": {"attention": "fixed-orthogonal"},
}
GRID = {"muon": (0.003, 0.01, 0.03, 0.1), "adamw": (0.0003, 0.001, 0.003, 0.01, 0.03)}
MNIST_ALONE = "OSA, skips, LayerNorm", "XSA, skips, LayerNorm"
EPOCHS, SEEDS = 5, 3
FASHION = "/usr/share/datasets/fashion-mnist"
PAPER = {"OSA, skipless, in the paper": 97.2, "softmax, skipless, in the paper": 94.6}


def experiment(path, processes, quick=False, **data):
    """Rows of the tuning and of the final runs; data: the option, if it is not MNIST."""
    arms = {name: arm for name, arm in ARMS.items() if not data or name not in MNIST_ALONE}
    arms = dict(list(ARMS.items())[2:4]) if quick else arms
    size = data | ({"limit_data": 500, "steps": 4, "every": 20} if quick else {})
    grid = {k: v[1:3] for k, v in GRID.items()} if quick else GRID
    pairs = [(arm, optimizer) for arm in arms for optimizer in grid]
    tuning = [
        {**arms[arm], "optimizer": optimizer, "lr": lr, "seed": 100, "epochs": 1,
         "limit_data": 27500, **size}
        for arm, optimizer in pairs for lr in grid[optimizer]
    ]  # fmt: skip
    tuned = common.run_all(path.with_name(path.stem + "_tuning.csv"), tuning, processes)
    final = []
    for arm, optimizer in pairs:
        job = {**arms[arm], "optimizer": optimizer}
        lr = common.best_row(tuned, job, ("attention", "skip", "optimizer"))["lr"]
        final += [
            {"arm": arm, **job, "lr": lr, "seed": seed, "epochs": EPOCHS, **size}
            for seed in range(1 if quick else SEEDS)
        ]
    final.sort(key=lambda job: job["seed"])  # a stopped experiment has all arms
    return common.run_all(path, final, processes)


def summarise(rows):
    """{optimiser: {arm: numbers}}."""
    table = {}
    for row in rows:
        table.setdefault(row["optimizer"], {}).setdefault(row["arm"], []).append(row)
    return {k: {arm: numbers(runs) for arm, runs in arms.items()} for k, arms in table.items()}


def numbers(runs):
    test = [float(run["test"]) for run in runs]
    return {
        "lr": float(runs[0]["lr"]),
        "parameters": int(runs[0]["parameters"]),
        "test": test,
        "test_mean": statistics.mean(test),
        "test_sd": statistics.stdev(test) if len(test) > 1 else 0.0,
        "seconds": statistics.median(float(run["seconds"]) for run in runs),
        "max_s": max(float(run["max_s"]) for run in runs),
    }


def draw(summary, path):
    """Test accuracy, mean and standard deviation, of every arm and optimiser of `path`'s runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, (optimizer, marker) in enumerate((("muon", "o"), ("adamw", "s"))):
        arms = summary[optimizer]
        y = [len(arms) - j + 0.15 - 0.3 * i for j in range(len(arms))]
        mean = [100 * arm["test_mean"] for arm in arms.values()]
        sd = [100 * arm["test_sd"] for arm in arms.values()]
        label = {"muon": "Muon", "adamw": "AdamW"}[optimizer]
        axes.errorbar(mean, y, xerr=sd, fmt=marker, capsize=3, color=f"C{i}", label=label)
    axes.set_yticks([len(arms) - j for j in range(len(arms))], list(arms))
    for i, (label, value) in enumerate(PAPER.items() if path.stem == "comparison" else ()):
        axes.axvline(value, ls=(":", "--")[i], color="0.5", lw=1, label=label)
    axes.set(xlabel="test accuracy, %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__, fashion="on Fashion-MNIST")
    path = args.folder / ("fashion.json" if args.fashion else "comparison.json")
    if not args.draw:
        from training.report import machine

        if args.fashion and not Path(FASHION).exists():
            print(f"{FASHION}: not there; Debian's dataset-fashion-mnist has it", file=sys.stderr)
            sys.exit(2)
        data = {"data": FASHION} if args.fashion else {}
        rows = experiment(path.with_suffix(".csv"), args.processes, args.quick, **data)
        text = json.dumps(summarise(rows) | {"about": machine()}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    draw(json.loads(path.read_text(encoding="utf-8")), path)


if __name__ == "__main__":
    main()
