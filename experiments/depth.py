"""Training against depth, the network of 128 layers, and what makes it train.

    python experiments/depth.py [--processes 2] [--long] [--quick]

depth.csv: skipless OSA, skipless softmax and the ViT with skips and LayerNorm; width 64, MLP
ratio 1, Muon, STEPS steps of 64 images.  The rate of each depth and arm, AdamW's the same, is the
one of RATES with the best validation accuracy (seed 0, depth_tuning.csv); then come the SEEDS, and
only their test set counts.  depth_factors.csv: 128 layers of OSA on 4 tokens, with one setting
changed at a time.  "ViT, η = 0.9": the ViT with a smaller slope, where it is behind.
--long: all images.  128 layers of each arm, ALL, at the pair of ALL_RATES (of the matrices; of
biases, embedding and read-out) with the best validation accuracy after ALL_TUNING steps (seed 100,
depth_all_tuning.csv), then the SEEDS: depth_all.csv; MORE of OSA at the same rates, one seed,
three of the last: depth_more.csv.  And 1,000 layers: depth_long.csv.
"""

import csv
import json
import subprocess
import sys
from unittest.mock import patch

import common

DEPTHS = (2, 4, 8, 16, 32, 64, 128)
STEPS = 80
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = (1, 2, 3)
COMMON = {
    "optimizer": "muon", "mlp_ratio": 1, "eta": 0.4, "batch_size": 64, "warmup": 20, "shift": 0,
    "s_norm": 0.05,
}  # fmt: skip
# Enough to train 128 layers; FACTORS takes each away.
FACTOR_BASE = {
    "optimizer": "muon", "depth": 128, "patch": 14, "mlp_ratio": 1, "eta": 0.5, "batch_size": 64,
    "warmup": 20, "shift": 0, "lr": 0.001, "adam_lr": 0.003, "s_norm": 0.05, "clip": 1.0,
    "attention": "osa", "steps": 200,
}  # fmt: skip
FACTORS = {
    "none": {},
    "MLP ratio 4": {"mlp_ratio": 4},
    "MLP ratio 4, W_2 = W_1ᵀR": {"mlp_ratio": 4, "tied": True},
    "slope 0.61, η = 0.9": {"eta": 0.9},
    "Muon 0.003": {"lr": 0.003},
    "AdamW 0.0003, no Muon": {"optimizer": "adamw", "lr": 0.0003},
    "AdamW 0.003 beside Muon → 0.03": {"adam_lr": 0.03},
    "rate of α 0.01 → 0.3": {"alpha_lr": 0.3},
    "‖S‖₂ = 0.05 at the start → 1": {"s_norm": 1.0},
    "no warm-up": {"warmup": 0},
    "no clipping": {"clip": 1e9},
    "softmax for OSA": {"attention": "softmax"},
}
COLUMNS = ("step", "epoch", "train_loss", "validation_accuracy", "max_S_norm")
SUMMARY = ("test_accuracy", "validation_accuracy", "train_loss", "steps", "seconds",
           "orthogonality_error", "max_S_norm", "parameters")  # fmt: skip
ARMS = {
    "OSA": {"attention": "osa"},
    "softmax": {"attention": "softmax"},
    "ViT: softmax, skips, LayerNorm": {"attention": "softmax", "skip": True, "norm": True},
}
ALL = {
    "optimizer": "muon", "depth": 128, "patch": 14, "mlp_ratio": 1, "eta": 0.6, "batch_size": 128,
    "warmup": 50, "s_norm": 0.05, "epochs": 3,
}  # fmt: skip
ALL_RATES = (
    (0.0003, 0.001), (0.001, 0.001), (0.001, 0.003), (0.003, 0.003), (0.01, 0.01), (0.03, 0.01),
)  # fmt: skip
ALL_TUNING = 100
MORE = {
    "OSA, MLP ratio 4, W_2 = W_1ᵀR": {"mlp_ratio": 4, "tied": True},
    "OSA, six epochs": {"epochs": 6},
    "OSA, twelve epochs": {"epochs": 12},
}
LONG = (
    "--depth 1000 --patch 14 --epochs 1 --eta 0.6 --lr 0.0002 --batch-size 64 --adam-lr 0.0005 "
    "--s-norm 0.01 --warmup 20 --mlp-ratio 1 --shift 0 --log-every 25 --threads 1"
)


def train_tied(options):
    """`common.train_once`; with "tied", each W_2 begins as W_1ᵀR, R a random orthogonal matrix."""
    import osa_minimal

    untied, options = osa_minimal.MLP.__init__, dict(options)

    def tied(self, d, ratio, slope, rng, *kind):
        untied(self, d, ratio, slope, rng, *kind)
        W_1, W_2 = (self.parameters[k] for k in ("W_1", "W_2"))
        W_2.data = W_1.data.T @ osa_minimal.random_orthogonal(d, d, rng)
        # ψ(u) = (1+a)/2 u + (1−a)/2 |u|: the former comes back whole, of the latter 1/ratio
        self.gain = (((1 + slope) / 2) ** 2 + ((1 - slope) / 2) ** 2 / ratio) ** -0.5

    with patch.object(osa_minimal.MLP, "__init__", tied if options.pop("tied", 0) else untied):
        return common.train_once(options)


def experiment(path, processes, quick=False):
    """The rates, then the seeds, then the factors; a CSV file of each."""
    depths, rates = ((2, 4), RATES[1:2]) if quick else (DEPTHS, RATES)
    size = {"limit_data": 500, "every": 20, "steps": 4} if quick else {"steps": STEPS}
    arms = [(arm, options, depth) for depth in depths for arm, options in ARMS.items()]
    curved = {**ARMS["ViT: softmax, skips, LayerNorm"], "eta": 0.9}
    arms += [] if quick else [("ViT, η = 0.9", curved, depth) for depth in depths[-2:]]
    jobs = [
        {"arm": arm, **COMMON, **options, "depth": depth, "lr": lr, "adam_lr": lr, **size}
        for arm, options, depth in arms for lr in rates
    ]  # fmt: skip
    tuning = [{**job, "tuning": True} for job in jobs]
    tuned = common.run_all(path.with_name("depth_tuning.csv"), tuning, processes)
    chosen = [j for j in jobs if str(j["lr"]) == common.best_row(tuned, j, ("arm", "depth"))["lr"]]
    seeds = SEEDS[:1] if quick else SEEDS
    common.run_all(path, [{**job, "seed": seed} for seed in seeds for job in chosen], processes)
    base = FACTOR_BASE | ({"depth": 8, **size} if quick else {})
    factors = dict(list(FACTORS.items())[:2]) if quick else FACTORS
    jobs = [{"arm": arm, **base, **change, "seed": seeds[0]} for arm, change in factors.items()]
    common.run_all(path.with_name("depth_factors.csv"), jobs, processes, train_tied)


def all_images(path, processes, quick=False):
    """128 layers of each arm: the rates, then the seeds; then MORE of OSA."""
    size = {"depth": 4, "limit_data": 500, "every": 20, "steps": 4} if quick else {}
    jobs = [
        {"arm": arm, **ALL, **options, "lr": lr, "adam_lr": adam_lr, "seed": 100,
         "steps": ALL_TUNING, "tuning": True, **size}
        for lr, adam_lr in ALL_RATES[:1 if quick else None] for arm, options in ARMS.items()
    ]  # fmt: skip
    tuned = common.run_all(path.with_name("depth_all_tuning.csv"), jobs, processes)
    final = []
    for arm, options in ARMS.items():
        best = common.best_row(tuned, {"arm": arm}, ("arm",))
        rates = {name: best[name] for name in ("lr", "adam_lr")}
        final += [{"arm": arm, **ALL, **options, **rates, **size, "seed": seed} for seed in SEEDS]
    final.sort(key=lambda job: job["seed"])
    common.run_all(path, final[: 2 if quick else None], processes)
    more = [{**final[0], "arm": arm, **change} for arm, change in MORE.items()]
    more += [] if quick else [{**more[-1], "seed": seed} for seed in SEEDS[1:]]
    common.run_all(path.with_name("depth_more.csv"), more, processes, train_tied)


def thousand(folder):
    """Trains 1,000 layers, unless that was done: depth_long.csv and depth_long.json."""
    out = common.ROOT / "runs" / "1000-layers"
    if not (out / "summary.json").exists():
        command = [sys.executable, "train.py", *LONG.split(), "--out", str(out)]
        subprocess.run(command, cwd=common.ROOT, check=True)
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        common.write(folder / "depth_long.csv", csv.DictReader(file), COLUMNS)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    summary = {"options": f"python train.py {LONG}"} | {key: summary[key] for key in SUMMARY}
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (folder / "depth_long.json").write_text(text + "\n", encoding="utf-8")
    common.note(folder / "depth_long.json")


def draw(path):
    """Test accuracy, best rate and largest ‖S‖₂ against depth; the long runs against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, tuned, long = (
        common.read(file)
        for file in (path, path.with_name("depth_tuning.csv"), common.RESULTS / "depth_long.csv")
    )
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    left, middle, right, last = axes
    for i, arm in enumerate(ARMS):
        style = {"marker": "os^"[i], "color": f"C{i}", "label": arm}
        depths, mean, sd = common.by_depth(rows, "test", arm)
        mean, sd = ([100 * x for x in values] for values in (mean, sd))
        left.errorbar(depths, mean, sd, capsize=3, **style)
        depths, rate, _ = common.by_depth(rows, "lr", arm)
        middle.plot(depths, rate, **style)
    for i, lr in enumerate(RATES):
        some = [row for row in tuned if row["lr"] == str(lr)]
        depths, largest, _ = common.by_depth(some, "max_s", "OSA")
        right.plot(depths, largest, marker="o", color=plt.cm.viridis(i / 5), label=f"rate {lr}")
    left.set(ylabel=f"test accuracy after {rows[0]['steps']} steps, %")
    middle.set(ylabel="best learning rate", yscale="log")
    right.set(ylabel="largest ‖S‖₂ of OSA in training", yscale="log")
    for axis in (left, middle, right):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="layers")
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    y = [100 * float(row["validation_accuracy"]) for row in long]
    last.plot([int(row["step"]) for row in long], y)
    last.set(xlabel="step", ylabel="validation accuracy of 1,000 layers, %")
    last.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__, long="128 layers on all images, and 1,000")
    path = args.folder / "depth.csv"
    if args.long:
        all_images(args.folder / "depth_all.csv", args.processes, args.quick)
        if not args.quick:
            thousand(args.folder)
    elif not args.draw:
        experiment(path, args.processes, args.quick)
    if path.exists():
        draw(path)


if __name__ == "__main__":
    main()
