"""The main job for several seeds, one after the other: results/mnist.json and mnist.png.

    python experiments/mnist.py --seeds 5 [options of train.py]
    python experiments/mnist.py --seeds 5 --short

Each run is `python train.py --seed N --out runs/mnist-seed-N`; runs that exist are not repeated.
--short: the main job of 3 and of 4 epochs in place of 5, mnist_short.csv.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys

from common import RESULTS, ROOT, run_all, write

KEYS = ("test_accuracy", "validation_accuracy", "train_loss", "steps", "seconds",
        "orthogonality_error", "max_S_norm", "parameters")  # fmt: skip
PANELS = {"validation_accuracy": "validation accuracy", "max_S_norm": "max ‖S‖₂ over layers",
          "orthogonality_error": "max |AᵀA − I|"}  # fmt: skip
ENVIRONMENT = ("date", "device", "threads", "processor", "system", "python", "numpy", "commit")


def run(seed, options):
    """Trains with one seed, unless that was done; returns the run's folder."""
    folder = ROOT / "runs" / f"mnist-seed-{seed}"
    if not (folder / "summary.json").exists():
        command = [sys.executable, "train.py", "--seed", str(seed), "--out", str(folder), *options]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def curves(folders):
    """Rows {seed, step, validation_accuracy, max_S_norm, orthogonality_error} of all runs."""
    rows = []
    for seed, folder in enumerate(folders):
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows += [{"seed": seed} | row for row in csv.DictReader(file)]
    return rows


def draw(rows, path):
    """Validation accuracy, ‖S‖₂ and orthogonality error of every seed against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for seed in dict.fromkeys(row["seed"] for row in rows):
        run = [row for row in rows if row["seed"] == seed]
        for axis, (key, label) in zip(axes, PANELS.items()):
            steps = [float(row["step"]) for row in run]
            axis.plot(steps, [float(row[key]) for row in run], lw=1, label=f"seed {seed}")
            axis.set(xlabel="step", ylabel=label)
            axis.grid(alpha=0.3)
    axes[0].set_ylim(0.9, 1)
    axes[2].set(yscale="log", ylim=(1e-8, 1e-4))  # around float32's eps = 1.2e-7
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="the figure from committed results")
    parser.add_argument("--short", action="store_true", help="fewer epochs")
    args, options = parser.parse_known_args()
    if args.draw:
        with open(RESULTS / "mnist.csv", newline="", encoding="utf-8") as file:
            return draw(list(csv.DictReader(file)), RESULTS / "mnist.png")
    if args.short:
        options and parser.error(f"--short takes no {options[0]}")
        jobs = [{"epochs": n, "seed": seed} for seed in range(args.seeds) for n in (3, 4)]
        return run_all(RESULTS / "mnist_short.csv", jobs, processes=2)
    folders = [run(seed, options) for seed in range(args.seeds)]
    rows = [json.loads((f / "summary.json").read_text(encoding="utf-8")) for f in folders]
    about = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    accuracy = [row["test_accuracy"] for row in rows]
    result = {
        "command": " ".join(["python experiments/mnist.py", *sys.argv[1:]]),
        **{key: about[key] for key in ENVIRONMENT},
        "test_accuracy_mean": statistics.mean(accuracy),
        "test_accuracy_standard_deviation": statistics.stdev(accuracy)
        if len(accuracy) > 1
        else None,
        "runs": [{"seed": i} | {key: row[key] for key in KEYS} for i, row in enumerate(rows)],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (RESULTS / "mnist.json").write_text(text + "\n", encoding="utf-8")
    rows = curves(folders)
    write(RESULTS / "mnist.csv", rows, ["seed", "step", *PANELS])
    draw(rows, RESULTS / "mnist.png")
    print(text)


if __name__ == "__main__":
    main()
