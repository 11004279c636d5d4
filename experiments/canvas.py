"""A task of real digits that needs mixing between tokens: canvas.csv and canvas.png.

    python experiments/canvas.py [--processes 2] [--quick]

A canvas is a square of 2 x 2 MNIST digits, 56 x 56 pixels, 16 tokens of 14 x 14.  The top left
digit d points to one of the other three, number d mod 3 in reading order; the label is the digit
there.  All digits are equally frequent.  Canvases for training and validation are made of MNIST's
training images, those for the test of its test images.

Without mixing the score of a label is a sum over tokens, f(top left) + g(others).  Put digits in
pairs that point to different places i and j (01, 34, 62, 95, 78): p and q; let v be the others u
with the images at i and j exchanged, digits a and b.  For a ≠ b (p, u) and (q, v) have label a,
(p, v) and (q, u) label b; but the score of a minus that of b has the same sum over the first two as
over the last two, so one of the four is wrong, and no more than 1 − 0.9/4 = 77.5 % can be right.
Training seeks least cross-entropy, and with it less: the digits' roles being equal, the scores then
count votes of the three others, and the first, to which 0, 3, 6 and 9 point, wins unless the two
behind it agree against it: 0.4 + 0.6·0.1 + 0.09·(0.6 − 0.4) = 47.8 %, were every digit recognised.

The rate of each arm is the one of RATES with the best validation accuracy after TUNING steps (seed
100, canvas_tuning.csv); then come SEEDS runs of STEPS steps, and as many
at the next smaller rate, since a short run favours large ones.
"""

import os

import common

ARMS = {
    "OSA": {"attention": "osa"},
    "softmax": {"attention": "softmax"},
    "identity mixing": {"attention": "identity"},
    "ViT: softmax, skips, LayerNorm": {"attention": "softmax", "skip": "add", "norm": True},
}
RATES, TUNING, STEPS, SEEDS = (0.003, 0.01, 0.03, 0.1), 800, 5000, 3
COMMON = {"patch": 14, "batch_size": 64, "s_norm": 0.3, "adam_lr": 0.003}
BOUND, REGRESSION = 77.5, 47.8  # without mixing, %: at most; and with the least cross-entropy


def samples(n, images, digits, rng):
    """x (n, 56, 56) uint8 and y (n,) uint8."""
    import numpy as np

    order, count = digits.argsort(kind="stable"), np.bincount(digits)  # images by digit
    d = rng.integers(0, 10, (n, 4))
    chosen = order[(count.cumsum() - count)[d] + rng.integers(0, count[d])]
    x = images[chosen].reshape(n, 2, 2, 28, 28).transpose(0, 1, 3, 2, 4).reshape(n, 56, 56)
    return x, d[np.arange(n), 1 + d[:, 0] % 3].astype(np.uint8)


def write_data(path, train, test):
    import numpy as np

    mnist, rng = common.dataset(None), np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    x_train, y_train = samples(train, mnist.x_train, mnist.y_train, rng)
    x_test, y_test = samples(test, mnist.x_test, mnist.y_test, rng)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def experiment(path, processes, quick=False):
    data = common.ROOT / "runs" / ("quick/canvas.npz" if quick else "canvas.npz")
    write_data(data, *((1_200, 200) if quick else (100_000, 10_000)))
    same = {"skip": "none", "norm": False, **COMMON, "data": os.path.relpath(data)}
    short, long = (2, 4) if quick else (TUNING, STEPS)
    jobs = [
        {"arm": arm, **same, **options, "lr": lr}
        for arm, options in ARMS.items() for lr in (RATES[1:2] if quick else RATES)
    ]  # fmt: skip
    tuning = [{**job, "steps": short, "seed": 100, "tuning": True} for job in jobs]
    tuned = common.run_all(path.with_name("canvas_tuning.csv"), tuning, processes)
    chosen = [j for j in jobs if str(j["lr"]) == common.best_row(tuned, j, ("arm",))["lr"]]
    for job in [job for job in chosen if job["lr"] > RATES[0]]:
        lr = RATES[RATES.index(job["lr"]) - 1]
        chosen.append(job | {"arm": job["arm"] + ", smaller", "lr": lr})
    seeds = range(1 if quick else SEEDS)
    return common.run_all(
        path, [{**j, "steps": long, "seed": s} for s in seeds for j in chosen], processes
    )


def draw(path):
    """Test accuracy of every seed; validation accuracy of the short runs against the rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    final, tuned = common.read(path), common.read(path.with_name("canvas_tuning.csv"))
    for i, (arm, marker) in enumerate(zip(ARMS, "os^v")):
        test = [100 * float(row["test"]) for row in final if row["arm"] == arm]
        axes[0].plot([i] * len(test), test, marker, color=f"C{i}", mfc="none")
        test = [100 * float(row["test"]) for row in final if row["arm"] == arm + ", smaller"]
        axes[0].plot([i] * len(test), test, marker, color=f"C{i}")  # at the smaller rate
        some = [row for row in tuned if row["arm"] == arm]
        rates, right = ([float(row[name]) for row in some] for name in ("lr", "validation"))
        axes[1].plot(rates, [100 * x for x in right], marker + "-", label=arm)
    for axis, rows, name in zip(axes, (final, tuned), ("test", "validation")):
        axis.axhline(BOUND, color="0.5", ls="--", label="without mixing: at most")
        axis.axhline(REGRESSION, color="0.5", ls=":", label="without mixing: least cross-entropy")
        axis.set(ylabel=f"{name} accuracy, %", ylim=(38, 101), title=f"{rows[0]['steps']} steps")
        axis.grid(alpha=0.3)
    names = [arm.partition(":")[0].replace(" ", "\n") for arm in ARMS]
    axes[0].set_xticks(range(len(ARMS)), names)
    axes[0].set_xlim(-0.5, len(ARMS) - 0.5)
    axes[1].set(xlabel="rate of the matrices", xscale="log")
    axes[1].set_xticks(RATES, RATES)
    axes[1].minorticks_off()
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, loc="outside right")
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__)
    path = args.folder / "canvas.csv"
    if not args.draw:
        experiment(path, args.processes, args.quick)
    draw(path)


if __name__ == "__main__":
    main()
