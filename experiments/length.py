"""Accuracy and time against the number of tokens: MNIST in patches of 14, 7, 4, 2 and 1 pixels.

    python experiments/length.py [--processes 2] [--long] [--quick]

N = 4 to 784 tokens of one image; four layers of width 32, batches of 32, one epoch, for every arm.
The rate of each arm and length is the one of RATES with the best validation accuracy after half an
epoch, TUNING steps (seed 100, length_tuning.csv); then come SEEDS runs: length.csv.  At N = 784 the
rates are those of N = 196, and softmax, quadratic in N, has one seed.  AdamW's rate and the ‖S‖₂
at the start are COMMON's; N = 4, 16 and 49 have OSA from a smaller one, too.
--long: OSA in preset "pixels" with the options LONG, for 16, 49 and 196 tokens, and with 16
for twelve epochs: length_long.csv.
"""

import common

ARMS = {
    "OSA": {"attention": "osa"},
    "identity mixing": {"attention": "identity"},
    "softmax": {"attention": "softmax"},
    "ViT: softmax, skips, LayerNorm": {"attention": "softmax", "skip": "add", "norm": True},
}
PATCHES = (14, 7, 4, 2, 1)
RATES, TUNING, SEEDS = (0.001, 0.003, 0.01, 0.03, 0.1), 860, 3
OTHER = {7: 0.01, 4: 0.01, 2: 0.03}  # rates that half an epoch hardly tells from the ViT's best
COMMON = {"width": 32, "batch_size": 32, "s_norm": 1.0, "adam_lr": 0.003, "epochs": 1}
LONG = {"preset": "pixels", "width": 64, "heads": 4, "epochs": 8, "seed": 0}


def best_rate(path, job, processes):
    """The rate with the best validation accuracy: of the middle three of RATES, and, as long as the
    best is the smallest or the largest of those tried, of the next one beyond it."""
    low, high = 1, 3
    while True:
        jobs = [job | {"lr": lr} for lr in RATES[low : high + 1]]
        rows = common.run_all(path, jobs, processes)
        best = RATES.index(float(common.best_row(rows, job, ("arm", "patch"))["lr"]))
        if low < best < high or best in (0, len(RATES) - 1):
            return RATES[best]
        low, high = min(low, best - 1), max(high, best + 1)


def experiment(path, processes, quick=False):
    """Rates, then seeds, from short sequences to long ones; a stopped one goes on where it was."""
    size = {"steps": 3, "every": 20} if quick else {}
    for patch in PATCHES[:2] if quick else PATCHES:
        final = []
        small = {"OSA from ‖S‖₂ = 0.1": {"attention": "osa", "s_norm": 0.1}}
        for arm, options in (ARMS if quick or patch < 4 else ARMS | small).items():
            slow = patch == 1 and options["attention"] == "softmax"
            job = {"arm": arm, "skip": "none", "norm": False, **COMMON, **size, **options}
            tuning = {"steps": TUNING} | size
            tuning |= {"seed": 100, "tuning": True, "patch": max(patch, 2)}
            lr = best_rate(path.with_name("length_tuning.csv"), job | tuning, processes)
            final += [
                job | {"patch": patch, "seed": seed, "lr": lr}
                for seed in range(1 if slow or quick else SEEDS)
            ]
        if (other := OTHER.get(patch)) and not quick:
            final += [job | {"arm": f"ViT at {other}", "lr": other} for job in final if job["norm"]]
        final.sort(key=lambda j: (patch == 1 and j["attention"] == "softmax", j["seed"]))
        common.run_all(path, final, processes)  # the slow ones last


def draw(path):
    """Test accuracy, and milliseconds of a training step's share of one image, against N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = common.read(path)
    images = 32 * (int(rows[0]["steps"]) if rows[0].get("steps") else 55_000 // 32)
    for row in rows:  # `by_depth` groups by that name; seconds are rounded to 0.1
        row |= {
            "depth": (28 // int(row["patch"])) ** 2,
            "ms": 1e3 * max(0.1, float(row["seconds"])) / images,
        }
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    for (arm, marker), colour in zip(zip(ARMS, "os^v"), ("C0", "C2", "C1", "C3")):
        for axis, column, scale in zip(axes, ("test", "ms"), (100, 1)):
            N, mean, sd = common.by_depth(rows, column, arm)
            mean, sd = ([scale * x for x in values] for values in (mean, sd))
            axis.errorbar(N, mean, sd, marker=marker, color=colour, capsize=3, label=arm)
    axes[0].set(ylabel="test accuracy after one epoch, %", ylim=(85, 100))
    axes[1].set(ylabel="training time of an image, ms on one thread", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set(xlabel="tokens N of an image")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__, long="OSA for eight epochs and twelve")
    path = args.folder / "length.csv"
    if args.long:
        size = {"limit_data": 500, "every": 20, "steps": 3} if args.quick else {}
        jobs = [LONG | {"patch": patch} | size for patch in (2, 4, 7)]  # the slowest first
        jobs.append(jobs[-1] | {"epochs": 12})
        common.run_all(path.with_name("length_long.csv"), jobs, args.processes)
        return
    if not args.draw:
        experiment(path, args.processes, args.quick)
    draw(path)


if __name__ == "__main__":
    main()
