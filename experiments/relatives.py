"""OSA beside its relatives: at their start, trained under one budget, and their time.

    python experiments/relatives.py [--quick]

relatives_start.csv: attention layers alone, one on the other (width 32, 2 heads, ‖S‖₂ = 1 where
there is an α), on 16 MNIST images of 16 tokens: after each of DEPTHS layers the norm as a share of
the first, the mean cosine between two tokens of an image and, at JACOBIANS, the singular values of
that layer's Jacobian for one image.
relatives.csv: every arm of ARMS on every task of TASKS, skipless and with skips and LayerNorm; the
rate of each is the one of RATES with the best validation accuracy (seed 100, relatives_tuning.csv);
then come SEEDS runs, and only their test set counts.  Muon for what starts as an orthogonal matrix,
AdamW for the rest; batches of 64.  Arm "ddl": softmax with the delta rule for a skip.
relatives_time.csv: milliseconds forward and backward of one layer, one sequence of N tokens.
relatives_rrae.csv: autoencoders of MNIST digits whose latent batch is truncated to rank k; mean
squared error of test images as a share of their variance, beside PCA's of the same rank.
"""

import functools
import itertools
import os
import statistics
import time

import common
import recall

FAST = ("osa", "cayley", "fixed-orthogonal", "monarch", "identity", "softmax", "symmetric", "xsa",
        "ddl", "tost", "hla2", "ahla")  # fmt: skip
SLOW = "circulant", "chela", "prism", "pdssm"
ARMS = {name: {"attention": name} for name in FAST + SLOW}
ARMS["ddl"] = {"attention": "softmax", "skip": "delta"}
SETTINGS = {"skipless": {}, "skips, norm": {"skip": "add", "norm": True}}
DATA = f"recall-{recall.HOPS}.npz"
MNIST = {"data": "", "steps": 250, "limit_data": 16000, "shift": 1, "eta": "", "s_norm": 0.1}
TASKS = {
    "MNIST, 16 tokens": MNIST | {"patch": 7, "depth": 4},
    "recall": {"data": DATA, "steps": 800, "limit_data": "", "shift": 0, "eta": 0.25, "s_norm": 1.0,
               "patch": 4, "depth": 1},
    "MNIST, 49 tokens": MNIST | {"patch": 4, "depth": 2, "steps": 150, "s_norm": 1.0},
}  # fmt: skip
COMMON = {"width": 32, "heads": 2, "mlp_ratio": 2, "batch_size": 64, "warmup": 30, "epochs": 4}
RATES, SEEDS = (0.003, 0.01, 0.03), 3
DEPTHS, JACOBIANS = (1, 2, 4, 8, 16, 32), (1, 8)
START = ("arm", "depth", "norm", "cosine", "sigma_min", "sigma_median", "sigma_max")
LENGTHS, SLOWEST = (64, 256, 1024, 4096), 1.0  # seconds; beyond that no longer sequences
RANKS = (2, 4, 8, 16)


def training(folder, processes, quick=False):
    """Rates, then seeds, the fast arms first; a stopped experiment goes on where it was."""
    data = common.ROOT / "runs" / DATA
    recall.write_data(data, recall.HOPS)
    groups = [(FAST[:2], "MNIST, 16 tokens")] if quick else itertools.product((FAST, SLOW), TASKS)
    for arms, task in groups:
        options = TASKS[task] | {"data": TASKS[task]["data"] and os.path.relpath(data)}
        jobs = []
        for arm, (setting, how) in itertools.product(arms, SETTINGS.items()):
            job = {"task": task, "arm": arm, "setting": setting, "skip": "none", "norm": False}
            job |= COMMON | options | how | ARMS[arm] | ({"steps": 3} if quick else {})
            rates = RATES[: 1 if quick else None]
            jobs += [job | {"lr": lr, "seed": 100, "tuning": True} for lr in rates]
        tuned = common.run_all(folder / "relatives_tuning.csv", jobs, processes)
        best = functools.partial(common.best_row, tuned, names=("arm", "setting"))
        chosen = [job for job in jobs if str(job["lr"]) == best(job)["lr"]]
        seeds = range(1 if quick else SEEDS)
        final = [job | {"seed": i, "tuning": False} for i in seeds for job in chosen]
        common.run_all(folder / "relatives.csv", final, processes)


def start():
    """Rows START of every arm."""
    import numpy as np
    import propagation

    import train
    from autograd import Tensor, no_grad
    from osa_minimal import calibrate_alpha
    from training import data

    x, rows = data.load().x_train[:16], []
    for arm, options in ARMS.items():
        config = train.Config(**options, width=32, mlp_ratio=2, depth=max(DEPTHS))
        model = train.build(config, x.shape[1:], 10)
        X = model.embed(data.standardise(x, *data.statistics(x))).data
        first = np.linalg.norm(X)
        for depth, (attention, _) in enumerate(model.layers, 1):
            with no_grad(), np.errstate(all="ignore"):
                if "alpha" in attention.parameters:
                    Q, K, _ = np.split(attention.project(Tensor(X)).data, 3, axis=-1)
                    attention.parameters["alpha"].data = calibrate_alpha(Q, K, 1.0)
                Y = attention(Tensor(X)).data
            norm = float(np.linalg.norm(Y.astype(float)) / first)
            if not 1e-12 < norm < 1e12:
                break
            if depth in DEPTHS:
                row = dict.fromkeys(START, "") | {"arm": arm, "depth": depth, "norm": norm}
                row["cosine"] = propagation.token_statistics(Y)[0]
                if depth in JACOBIANS:
                    sigma = jacobian(attention, X[:1])
                    row |= dict(zip(START[4:], (sigma[-1], float(np.median(sigma)), sigma[0])))
                rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            X = Y
        print(arm, "started", flush=True)
    return rows


def jacobian(layer, X, chunk=64):
    """The singular values, descending, of ∂ layer(X)/∂X for X (1, N, d)."""
    import numpy as np

    from autograd import Tensor

    rows = []
    for G in np.eye(X.size, dtype=X.dtype).reshape(-1, chunk, *X.shape[1:]):
        leaf = Tensor(np.repeat(X, chunk, axis=0), requires_grad=True)
        layer(leaf).backward(G)
        rows.append(leaf.grad.reshape(chunk, X.size))
    return np.linalg.svd(np.concatenate(rows).astype(float), compute_uv=False).tolist()


def times(lengths):
    """Rows {arm, tokens, milliseconds}, the median of five."""
    import numpy as np

    import relatives
    from autograd import Tensor

    rng, rows = np.random.default_rng(0), []
    for arm in [arm for arm in ARMS if arm != "ddl"]:
        for N in lengths:
            kind, more = relatives.ATTENTION.get(arm), {}
            if kind is None:
                kind, more = relatives.LAYERS[arm], {"tokens": N}
            layer, seconds = kind(32, 2, rng, **more), []
            X, G = rng.standard_normal((2, 1, N, 32)).astype(np.float32)
            for _ in range(6):
                begin = time.process_time()
                layer(Tensor(X, requires_grad=True)).backward(G)
                seconds.append(time.process_time() - begin)
            middle = statistics.median(seconds[1:])  # the first one draws a fixed matrix
            rows.append({"arm": arm, "tokens": N, "milliseconds": f"{1e3 * middle:.3g}"})
            if middle > SLOWEST or arm == "fixed-orthogonal" and N >= 1024:  # whose QR takes N³
                break
        print(arm, "timed", flush=True)
    return rows


def autoencoders(ranks, steps):
    """Rows {hidden, k, error, pca}: linear (hidden 0) or with a hidden layer on either side."""
    import numpy as np

    import autograd as ag
    from osa_minimal import random_orthogonal, tensors
    from relatives.rrae import truncate
    from training import data, optimizers

    digits = data.load()
    x, test = (a.reshape(len(a), -1) / np.float32(255) for a in (digits.x_train, digits.x_test))
    mean = x.mean(axis=0)
    x, test, rows = x[:10000] - mean, test[:2000] - mean, []
    axes = np.linalg.svd(x, full_matrices=False)[2]
    for hidden, k in [(hidden, k) for hidden in (0, 128) for k in ranks]:
        rng, sizes = np.random.default_rng(0), [784, hidden, 32] if hidden else [784, 32]
        sizes = [*zip(sizes, sizes[1:]), *zip(sizes[::-1], sizes[-2::-1])]
        p = {str(i): random_orthogonal(n, m, rng) for i, (n, m) in enumerate(sizes)}
        p |= {f"b{i}": np.zeros(m, np.float32) for i, (n, m) in enumerate(sizes)}
        p, half = tensors(p, np), len(sizes) // 2

        def part(X, which, p=p, half=half):  # linear, leaky ReLU, linear, or linear alone
            for i in range(which * half, which * half + half):
                X = ag.linear(X, p[str(i)], p[f"b{i}"])
                X = X if i % half == half - 1 else ag.leaky_relu(X, 0.1)
            return X

        w, g = optimizers.flatten(p)
        adam = optimizers.AdamW(p)
        for t in range(steps):
            X = x[rng.integers(0, len(x), 256)]
            g[...] = 0
            error = part(truncate(part(X, 0).transpose(), k).transpose(), 1) - X
            (error * error).mean().backward()
            adam.step(w, g, 0.003 * optimizers.schedule(t, steps, 20), t + 1)
        with ag.no_grad():  # at test time: on the basis of the training images
            basis = np.linalg.svd(part(x, 0).data, full_matrices=False)[2][:k]
            error = part(part(test, 0).data @ basis.T @ basis, 1).data - test
        pca = test - test @ axes[:k].T @ axes[:k]
        share = [f"{(e**2).sum() / (test**2).sum():.4f}" for e in (error, pca)]
        rows.append({"hidden": hidden, "k": k, "error": share[0], "pca": share[1]})
        print("autoencoder", rows[-1], flush=True)
    return rows


def accuracies(folder):
    """{(task, setting, arm): (test accuracies in %, the rate)} of what has run."""
    found = {}
    for row in common.read(folder / "relatives.csv"):
        key = row["task"], row["setting"], row["arm"]
        found.setdefault(key, ([], row["lr"]))[0].append(100 * float(row["test"]))
    return found


def table(folder):
    """Prints the rows of the measured table of relatives/README.md."""
    start, found = common.read(folder / "relatives_start.csv"), accuracies(folder)
    for arm in ARMS:
        rows = {row["depth"]: row for row in start if row["arm"] == arm}
        deep = [rows["8"]["norm"], rows["8"]["cosine"]] if "8" in rows else ["overflow", "–"]
        numbers = deep + [rows["1"][name] for name in START[4:]]
        cells = [x if x in ("overflow", "–") else f"{float(f'{float(x):.2g}'):g}" for x in numbers]
        for task, setting in itertools.product(TASKS, SETTINGS):
            test, _ = found.get((task, setting, arm), ([], ""))
            right = [x for x in test if x == x]  # not NaN
            spread = f" ± {statistics.stdev(right):.1f}" if len(right) > 1 else ""
            lost = f", {len(test) - len(right)} diverged" if len(right) < len(test) else ""
            text = f"{statistics.mean(right):.1f}{spread}{lost}" if right else "diverges"
            cells.append(text if test else "not run")
        print("|", " | ".join([arm, *cells]), "|")


def draw(folder):
    """relatives_start.png: what a layer does at its start; relatives.png: accuracy and time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {arm: {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}
             for i, arm in enumerate(ARMS)}  # fmt: skip
    start = common.read(folder / "relatives_start.csv")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    for i, arm in enumerate(ARMS):
        rows = [row for row in start if row["arm"] == arm]
        depths = [int(row["depth"]) for row in rows]
        for axis, name in zip(axes, ("norm", "cosine")):
            y = [float(row[name]) for row in rows]
            axis.plot(depths, y, marker=".", label=arm, **looks[arm])
        low, middle, high = (max(1e-6, float(rows[0][name])) for name in START[4:])
        axes[2].plot([low, high], [-i, -i], color=looks[arm]["color"], lw=3)
        axes[2].plot(middle, -i, "ko", ms=4)
    axes[0].set(yscale="log", ylim=(1e-11, 1e9), ylabel="norm of the tokens, share of the first")
    axes[1].set(ylabel="mean cosine between two tokens")
    for axis in axes[:2]:
        axis.set(xscale="log", xlabel="attention layers", xticks=DEPTHS, xticklabels=DEPTHS)
    axes[2].set_yticks([-i for i in range(len(ARMS))], list(ARMS))
    axes[2].set(xscale="log", xlabel="σ of the first layer: least (cut at 1e-6), median, largest")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(folder / "relatives_start.png", dpi=110)

    found = accuracies(folder)
    figure, axes = plt.subplots(1, 4, figsize=(15, 5.2), layout="constrained")
    for axis, task in zip(axes, TASKS):
        for setting, marker, colour in zip(SETTINGS, "os", ("black", "0.6")):
            for i, arm in enumerate(ARMS):
                test = found.get((task, setting, arm), ([], ""))[0]
                label = setting if i == 0 else None
                height = -i + (0.15 if setting == "skipless" else -0.15)
                axis.plot(test, [height] * len(test), marker, color=colour, ms=5, label=label)
                if test and not any(x == x for x in test):
                    axis.text(0.02, height - 0.25, "diverges", transform=axis.get_yaxis_transform())
        axis.set_yticks([-i for i in range(len(ARMS))], list(ARMS) if axis is axes[0] else [])
        axis.set(xlabel="test accuracy, %", title=task, ylim=(-len(ARMS) + 0.5, 0.5))
    axes[0].legend()
    for arm in [arm for arm in ARMS if arm != "ddl"]:
        rows = [row for row in common.read(folder / "relatives_time.csv") if row["arm"] == arm]
        x, y = ([float(row[name]) for row in rows] for name in ("tokens", "milliseconds"))
        axes[3].loglog(x, y, marker=".", label=arm, **looks[arm])
    axes[3].set(xlabel="tokens N", ylabel="ms, forward and backward", title="time of a layer")
    axes[3].set_xticks(LENGTHS, LENGTHS)
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(folder / "relatives.png", dpi=110)


def main():
    args = common.arguments(__doc__)
    folder = args.folder
    measured = {
        "start": start,
        "time": lambda: times(LENGTHS[:2] if args.quick else LENGTHS),
        "rrae": lambda: autoencoders(RANKS[:2] if args.quick else RANKS, 20 if args.quick else 600),
    }
    if not args.draw:
        for name, measure in measured.items():
            if not (path := folder / f"relatives_{name}.csv").exists():
                rows = measure()
                common.write(path, rows, list(rows[0]))
                common.note(path)
        training(folder, args.processes, args.quick)
    draw(folder)
    table(folder)


if __name__ == "__main__":
    main()
