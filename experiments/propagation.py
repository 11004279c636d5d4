"""Signals and gradients at initialisation against depth: propagation.csv and propagation.png.

    python experiments/propagation.py [--quick]

64 MNIST images through networks of up to 128 layers, width 64, 2 heads, 16 tokens, weights as they
are drawn and α calibrated to ‖S‖₂ = 0.05, for every attention with and without skip connections and
LayerNorm, and for OSA with an MLP of ratio 4 instead of 1.  Measured after each of DEPTHS layers,
the last four at JACOBIANS:
    cosine     mean cosine between two tokens of an image; 1: all tokens are equal
    rank       effective rank exp(entropy of σ²/Σσ²) of the (N, d) tokens, at most 16
    largest_s  ‖S‖₂ of that layer, over 16 images
    grad       ‖gradient with respect to the layer's input‖ / ‖the same of the last output‖
    grad_W_QK  ‖gradient with respect to W_Q and W_K‖ of that layer
    kappa, sigma_min, sigma_median, sigma_max   singular values of ∂X_depth/∂X_0 of one image
"""

import csv
import math

import common

ATTENTIONS = ("identity", "softmax", "xsa", "osa")
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
JACOBIANS = (1, 4, 16, 64, 128)
FIELDS = ("arm", "depth", "cosine", "rank", "largest_s", "grad", "grad_W_QK", "kappa", "sigma_min",
          "sigma_median", "sigma_max")  # fmt: skip


def arms():
    """{name: (attention, skips and LayerNorm, MLP ratio)}"""
    named = {}
    for attention in ATTENTIONS:
        named[attention] = attention, False, 1
        named[attention + ", skips, LayerNorm"] = attention, True, 1
    return named | {"osa, MLP ratio 4": ("osa", False, 4)}


def build(attention, usual, ratio, depth):
    """The network, calibrated for ‖S‖₂ = 0.05, and its images."""
    import numpy as np

    from osa_minimal import calibrate
    from relatives import ATTENTION, Transformer
    from training import data

    x = data.load().x_train[:64]
    images = data.standardise(x, *data.statistics(x))
    model = Transformer(
        attention=ATTENTION[attention], skip="add" if usual else "none", norm=usual, depth=depth,
        d=64, heads=2, patch=7, image=(28, 28), classes=10, mlp_ratio=ratio, eta=0.5,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    calibrate(model, images[:16], 0.05)
    return model, images


def token_statistics(X):
    """(mean cosine between two tokens of an image, effective rank), means over the images."""
    import numpy as np

    unit = X / np.maximum(np.linalg.norm(X, axis=-1, keepdims=True), 1e-30)
    N = X.shape[1]
    cosine = ((unit @ unit.swapaxes(-1, -2)).sum(axis=(-2, -1)) - N) / (N * (N - 1))
    energy = np.linalg.svd(X.astype(np.float64), compute_uv=False) ** 2
    p = energy / np.maximum(energy.sum(axis=-1, keepdims=True), 1e-300)
    rank = np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1))
    return float(cosine.mean()), float(rank.mean())


def largest_s(attention, X):
    """‖S‖₂ of a layer on the tokens X; NaN for an attention that has none."""
    import numpy as np

    from osa_minimal import rotation_angles

    if "alpha" not in attention.parameters:
        return math.nan
    Q, K, _ = np.split(attention.project(X).data, 3, axis=-1)
    return float(rotation_angles(Q, K, attention.parameters["alpha"].data).max())


def signals(model, images):
    """Per layer: token statistics, ‖S‖₂, and gradients of ⟨G, last tokens⟩ for one random G."""
    import numpy as np

    from autograd import Tensor, no_grad

    with no_grad():
        tokens = [model.embed(images).data]  # the input of each layer, and the last output
        for attention, mlp in model.layers:
            tokens.append(mlp(attention(Tensor(tokens[-1]))).data)
    # Backwards one layer at a time, so that the gradient of every layer's input is at hand.
    G = np.random.default_rng(1).standard_normal(tokens[-1].shape).astype(np.float32)
    first, rows = np.linalg.norm(G), []
    for i, (attention, mlp) in reversed(list(enumerate(model.layers))):
        X = Tensor(tokens[i], requires_grad=True)
        mlp(attention(X)).backward(G)
        G, W = X.grad, attention.parameters.get("W_QK")
        rows.append((*token_statistics(tokens[i + 1]), largest_s(attention, Tensor(tokens[i][:16])),
                     float(np.linalg.norm(G) / first),
                     float(np.linalg.norm(W.grad)) if W is not None else math.nan))  # fmt: skip
        for part in (attention, mlp):
            for p in part.parameters.values():
                p.grad = None
    return rows[::-1]


def singular_values(model, image, depth, chunk=64):
    """Of ∂X_depth/∂X_0 (N d, N d) for one image: reverse mode, `chunk` rows at a time."""
    import numpy as np

    from autograd import Tensor

    start = model.embed(image).data
    n, rows = start.size, []
    for i in range(0, n, chunk):
        leaf = X = Tensor(np.repeat(start, chunk, axis=0), requires_grad=True)
        for attention, mlp in model.layers[:depth]:
            X = mlp(attention(X))
        G = np.zeros((chunk, n), np.float32)
        G[np.arange(chunk), i + np.arange(chunk)] = 1
        X.backward(G.reshape(X.shape))
        rows.append(leaf.grad.reshape(chunk, n))
    return np.linalg.svd(np.concatenate(rows).astype(np.float64), compute_uv=False)


def measure(name, depths, jacobians):
    """The rows of one arm."""
    import numpy as np

    model, images = build(*arms()[name], max(depths))
    table, rows = signals(model, images), []
    for depth in depths:
        row = dict(zip(FIELDS, (name, depth, *table[depth - 1])))
        if depth in jacobians:
            sigma = singular_values(model, images[:1], depth)
            values = sigma[0] / max(sigma[-1], 1e-300), sigma[-1], np.median(sigma), sigma[0]
            row |= dict(zip(FIELDS[-4:], map(float, values)))
        rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    print(name, "done", flush=True)
    return rows


def draw(path):
    """Six panels against depth, one line per arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    panels = {
        "cosine": "cosine between tokens", "rank": "effective rank of the tokens",
        "grad": "‖gradient of the input‖ / of the output", "grad_W_QK": "‖gradient of W_Q, W_K‖",
        "sigma_median": "median singular value of ∂X_L/∂X_0",
        "kappa": "condition number of ∂X_L/∂X_0",
    }  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    colours = {"osa": "C0", "softmax": "C1", "xsa": "C2", "identity": "0.75"}
    for axis, (field, label) in zip(axes.flat, panels.items()):
        for name in arms():
            rows = [r for r in table if r["arm"] == name and r.get(field) not in ("", "nan", None)]
            style = ":" if "ratio" in name else "--" if "skips" in name else "-"
            x, y = ([float(row[key]) for row in rows] for key in ("depth", field))
            width, colour = 4 if "identity" in name else 1.5, colours[name.split(",")[0]]
            axis.plot(x, y, style, marker="o", ms=3, lw=width, color=colour, label=name)
        axis.set(xscale="log", xlabel="layers", ylabel=label)
        if field not in ("cosine", "rank"):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[1, 2].set_ylim(1, 1e18)
    axes[1, 1].set_ylim(1e-16, 1e3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__)
    path = args.folder / "propagation.csv"
    if not args.draw:
        names = list(arms())[:3:2] if args.quick else list(arms())
        depths, jacobians = (DEPTHS[:4], JACOBIANS[:1]) if args.quick else (DEPTHS, JACOBIANS)
        rows = [row for name in names for row in measure(name, depths, jacobians)]
        common.write(path, rows, FIELDS)
        common.note(path)
    draw(path)


if __name__ == "__main__":
    main()
