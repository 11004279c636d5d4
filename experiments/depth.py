"""Training against depth, and the network of 128 layers: depth.csv, depth_long.csv and depth.png.

    python experiments/depth.py [--processes 2] [--long] [--quick]

Skipless OSA, skipless softmax and the ViT with skips and LayerNorm; width 64, MLP ratio 1, Muon,
STEPS steps of 64 images; each depth and arm with every learning rate of RATES, AdamW's the same, of
which the best on the validation images counts.  --long trains 128 layers on all images, in patches
of 7 x 7 (16 tokens, 3 epochs) and of 14 x 14 pixels (4 tokens, 6 epochs).
"""

import argparse
import csv
import json
import subprocess
import sys

import common

DEPTHS = (2, 4, 8, 16, 32, 64, 128)
STEPS = 80
RATES = (0.001, 0.003, 0.01)
COMMON = {
    "optimizer": "muon", "mlp_ratio": 1, "eta": 0.4, "batch_size": 64, "warmup": 20, "shift": 0,
    "alpha_lr": 0.0001, "s_norm": 0.05,
}  # fmt: skip
COLUMNS = ("step", "epoch", "train_loss", "validation_accuracy", "max_S_norm")
SUMMARY = ("test_accuracy", "validation_accuracy", "train_loss", "steps", "seconds",
           "orthogonality_error", "max_S_norm", "parameters")  # fmt: skip
ARMS = {
    "OSA": {"attention": "osa"},
    "softmax": {"attention": "softmax"},
    "ViT: softmax, skips, LayerNorm": {"attention": "softmax", "skip": True, "norm": True},
}
LONG = {
    "7 x 7": "--epochs 3 --eta 0.5 --lr 0.0008 --log-every 25",
    "14 x 14": "--patch 14 --epochs 6 --eta 0.6 --lr 0.001 --log-every 50",
}
ALL_LONG = (
    "--depth 128 --mlp-ratio 1 --batch-size 128 --adam-lr 0.003 --alpha-lr 0.0001 --s-norm 0.05 "
    "--shift 0 --warmup 50 --threads 1"
)


def experiment(path, processes, quick=False):
    depths, steps, rates = ((2, 4), 4, RATES[:1]) if quick else (DEPTHS, STEPS, RATES)
    jobs = [
        {"arm": arm, **COMMON, **options, "depth": depth, "lr": lr, "adam_lr": lr, "steps": steps}
        for depth in depths for lr in rates for arm, options in ARMS.items()
    ]  # fmt: skip
    return common.run_all(path, jobs, processes)


def best(rows):
    """{arm: [(depth, row with the best validation accuracy)]}"""
    chosen = {}
    for row in rows:
        place = chosen.setdefault(row["arm"], {})
        before = place.get(int(row["depth"]))
        if before is None or float(row["validation"]) > float(before["validation"]):
            place[int(row["depth"])] = row
    return {arm: sorted(chosen[arm].items()) for arm in ARMS if arm in chosen}


def long_runs(folder):
    """Trains the networks of LONG, unless that was done: depth_long.csv and depth_long.json."""
    rows, summaries = [], {}
    for name, options in LONG.items():
        out = common.ROOT / "runs" / ("depth-128-patch-" + name.partition(" ")[0])
        if not (out / "summary.json").exists():
            command = [sys.executable, "train.py", *ALL_LONG.split(), *options.split()]
            subprocess.run([*command, "--out", str(out)], cwd=common.ROOT, check=True)
        with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
            rows += [{"patch": name} | row for row in csv.DictReader(file)]
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        options = f"python train.py {ALL_LONG} {options}"
        summaries[name] = {"options": options} | {key: summary[key] for key in SUMMARY}
    common.write(folder / "depth_long.csv", rows, ["patch", *COLUMNS])
    text = json.dumps(summaries, indent=1, ensure_ascii=False)
    (folder / "depth_long.json").write_text(text + "\n", encoding="utf-8")


def draw(path):
    """Test accuracy, best rate and largest ‖S‖₂ against depth; the long runs against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["validation"] != "nan"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    left, middle, right, last = axes
    for i, (arm, chosen) in enumerate(best(rows).items()):
        depths = [depth for depth, _ in chosen]
        style = {"marker": "os^"[i], "color": f"C{i}", "label": arm}
        left.plot(depths, [100 * float(row["test"]) for _, row in chosen], **style)
        middle.plot(depths, [float(row["lr"]) for _, row in chosen], **style)
    for i, lr in enumerate(sorted({row["lr"] for row in rows}, key=float)):
        some = [row for row in rows if row["arm"] == "OSA" and row["lr"] == lr]
        right.plot([int(r["depth"]) for r in some], [float(r["max_s"]) for r in some],
                   marker="o", color=plt.cm.viridis(i / 3), label=f"rate {lr}")  # fmt: skip
    left.set(ylabel=f"test accuracy after {rows[0]['steps']} steps, %")
    middle.set(ylabel="best learning rate", yscale="log")
    right.set(ylabel="largest ‖S‖₂ of OSA in training", yscale="log")
    for axis in (left, middle, right):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="layers")
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    with open(common.RESULTS / "depth_long.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for patch in LONG:
        some = [row for row in rows if row["patch"] == patch]
        y = [100 * float(row["validation_accuracy"]) for row in some]
        last.plot([int(row["step"]) for row in some], y, label=f"patches of {patch}")
    last.set(xlabel="step", ylabel="validation accuracy of 128 layers, %", ylim=(80, 100))
    last.grid(alpha=0.3)
    last.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--long", action="store_true", help="the network of 128 layers alone")
    parser.add_argument("--quick", action="store_true", help="half a minute, into runs/quick")
    parser.add_argument("--draw", action="store_true", help="the figure from committed results")
    args = parser.parse_args()
    folder = common.ROOT / "runs" / "quick" if args.quick else common.RESULTS
    path = folder / "depth.csv"
    if args.long:
        long_runs(folder)
    elif not args.draw:
        experiment(path, args.processes, args.quick)
    if path.exists():
        draw(path)


if __name__ == "__main__":
    main()
