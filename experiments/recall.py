"""A task that needs mixing between tokens: associative recall, recall.csv and recall.png.

    python experiments/recall.py [--processes 2] [--quick]

A sample is a 12 x 12 "image" of nine 4 x 4 patches, nine tokens of 16 pixels: eight pairs of a key
(one-hot, pixels 0 to 7) and a value (one-hot, pixels 8 to 15), each key once, in random order; then
the query, one key without a value.  Values are keys too, each once.  The label after one hop is the
value that stood with the query, after two hops the value that stood with that value, and so on.
Without mixing the best answer to three hops is the query itself, right where it lies on a cycle of
length 1 or 3, one time in 4.  The rate of each arm and depth is the one of RATES with the best
validation accuracy (seed 100, recall_tuning.csv); then come SEEDS runs.
"""

import os

import common

PAIRS = 8
ARMS = {
    "OSA": {"attention": "osa"},
    "softmax": {"attention": "softmax"},
    "identity mixing": {"attention": "identity"},
    "ViT: softmax, skips, LayerNorm": {"attention": "softmax", "skip": True, "norm": True},
}
HOPS, DEPTHS, STEPS = 3, (1, 2, 4), 1000
RATES, SEEDS = (0.003, 0.01, 0.03, 0.1), 3
COMMON = {"patch": 4, "shift": 0, "epochs": 4, "mlp_ratio": 2, "s_norm": 1.0}
ETA = {1: 0.25, 2: 0.4, 4: 0.4}  # a ReLU reaches no more than 0.32 in one layer


def samples(n, hops, rng):
    """x (n, 12, 12) uint8 and y (n,) uint8."""
    import numpy as np

    keys, values = rng.permuted(np.tile(np.arange(PAIRS), (2, n, 1)), axis=-1)  # (n, 8) each
    asked, I = rng.integers(0, PAIRS, n), np.eye(PAIRS)
    tokens = np.zeros((n, PAIRS + 1, 2 * PAIRS))
    tokens[:, :PAIRS] = np.concatenate([I[keys], I[values]], axis=-1)
    rows, place = np.arange(n), keys.argsort(axis=1)  # place[i, k]: where key k stands
    tokens[:, PAIRS, :PAIRS] = I[asked]
    answer = asked
    for _ in range(hops):
        answer = values[rows, place[rows, answer]]
    patches = tokens.reshape(n, 3, 3, 4, 4).transpose(0, 1, 3, 2, 4)
    return (255 * patches.reshape(n, 12, 12)).astype(np.uint8), answer.astype(np.uint8)


def write_data(path, hops):
    import numpy as np

    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    (x_train, y_train), (x_test, y_test) = samples(45_000, hops, rng), samples(5_000, hops, rng)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def experiment(path, processes, quick=False):
    data = common.ROOT / "runs" / f"recall-{HOPS}.npz"
    write_data(data, HOPS)
    depths, steps = (DEPTHS[:1], 4) if quick else (DEPTHS, STEPS)
    rates = RATES[1:2] if quick else RATES
    jobs = [
        {"arm": arm, **options, "depth": depth, "lr": lr, "steps": steps, "eta": ETA[depth],
         **COMMON, "data": os.path.relpath(data), "seed": 100}
        for depth in depths for arm, options in ARMS.items() for lr in rates
    ]  # fmt: skip
    tuned = common.run_all(path.with_name("recall_tuning.csv"), jobs, processes)
    chosen = [j for j in jobs if str(j["lr"]) == common.best_row(tuned, j, ("arm", "depth"))["lr"]]
    seeds = range(1 if quick else SEEDS)
    return common.run_all(path, [{**j, "seed": s} for s in seeds for j in chosen], processes)


def draw(path):
    """Test accuracy against depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = common.read(path)
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for arm, marker in zip(ARMS, "os^v"):
        depths, mean, sd = common.by_depth(rows, "test", arm)
        mean, sd = ([100 * x for x in values] for values in (mean, sd))
        axes.errorbar(depths, mean, sd, marker=marker, capsize=3, label=arm)
    axes.axhline(25, color="0.5", ls=":", label="without mixing")
    axes.set(xlabel="layers", ylabel=f"test accuracy, {HOPS} hops, %", xticks=DEPTHS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.35))
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__)
    path = args.folder / "recall.csv"
    if not args.draw:
        experiment(path, args.processes, args.quick)
    draw(path)


if __name__ == "__main__":
    main()
