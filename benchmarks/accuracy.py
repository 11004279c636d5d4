"""Rounding errors of every route, over inputs that are easy and inputs that are not.

    python benchmarks/accuracy.py            writes results/accuracy.csv, .json and .png

Against exp(S) V and its gradients by the dense definition in float64, on the same (already
rounded) inputs; the reference itself is held against a Taylor series in extended precision.
Errors are relative, in the Frobenius norm, and divided by max(1, ‖S‖₂); that of dα, a sum in which
nearly everything may cancel, is relative to ‖S/α‖ ‖V‖ ‖dO‖.  Orthogonality is max |AᵀA − I|.
"""

import argparse
import csv
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # many small matrices

import numpy as np  # noqa: E402

from fast import ROUTES, attention_matrix, osa_backward, osa_forward  # noqa: E402
from osa_minimal import rotation_angles, skew_scores  # noqa: E402
from training.report import machine  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
CANCELS = "K = Q + 1e-6 noise, norm of S = 1"


def input_classes(rng, N=96, d_v=8, batch=4):
    """(name, Q, K, V, alpha) in float64."""

    def normal(*shape):
        return rng.standard_normal(shape)

    def tokens(n=N):
        return normal(batch, n, d_v), normal(batch, n, d_v), normal(batch, n, d_v)

    Q, K, V = tokens()
    yield "Gaussian", Q, K, V, 0.1
    norm = float(rotation_angles(Q, K, 1.0).max())
    for size in (0, 1e-6, 0.1, 1, 3, 10, 30, 100):
        yield f"norm of S = {size:g}", Q, K, V, size / norm
    few = np.concatenate([Q[..., :3]] * 3, axis=-1)[..., :d_v]
    yield "rank-deficient [Q, K]", few, K, V, 0.1
    yield "all of K in the span of Q", Q, Q @ normal(d_v, d_v), V, 0.03
    copies = rng.integers(0, 10, N)
    yield "duplicated tokens", Q[:, copies], K[:, copies], V[:, copies], 0.05
    for sigma in (1e-3, 1e-6):
        U, _, Wt = np.linalg.svd(np.concatenate([Q, K], axis=-1), full_matrices=False)
        P = U * np.geomspace(1, sigma, 2 * d_v) @ Wt * 10
        yield (
            f"smallest/largest singular value {sigma:g}",
            P[..., :d_v],
            P[..., d_v:],
            V,
            0.3,
        )
    for size in (10, 1000):
        far_Q, far_K = Q + size * normal(batch, 1, d_v), K + size * normal(batch, 1, d_v)
        yield f"common component {size} times the rest", far_Q, far_K, V, 0.01
        alpha = 1 / float(rotation_angles(far_Q, far_K, 1.0).max())
        yield f"the same, norm of S = 1 ({size})", far_Q, far_K, V, alpha
    yield "K = Q + 1e-3 noise", Q, Q + 1e-3 * K, V, 1.0
    yield "K = Q + 1e-6 noise", Q, Q + 1e-6 * K, V, 1.0
    near = Q + 0.1 * K
    norm = float(rotation_angles(Q, near, 1.0).max())
    for size in (3, 30):
        yield f"K = Q + 0.1 noise, norm of S = {size}", Q, near, V, size / norm
    U = np.linalg.qr(normal(batch, N, 2 * d_v))[0]
    yield "repeated angles", U[..., :d_v], U[..., d_v:], V, 2.0
    yield "N < 2 d_v", *tokens(2 * d_v - 5), 0.3
    few_Q, few_K, few_V = (a[:, : 2 * d_v - 5] for a in (Q, K, V))
    yield "N < 2 d_v, K = Q + 1e-3 noise", few_Q, few_Q + 1e-3 * few_K, few_V, 20.0
    far = (few_Q + 1000 * normal(batch, 1, d_v), few_K + 1000 * normal(batch, 1, d_v))
    yield "N < 2 d_v, common component 1000 times", *far, few_V, 1e-3
    yield "N = 1", *tokens(1), 0.3
    for scale in (1e-10, 1e10):
        yield f"Q, K, V times {scale:g}", Q * scale, K * scale, V * scale, 0.1
    yield "Q times 1e5, K times 1e-5", Q * 1e5, K * 1e-5, V, 0.1
    padded = Q.copy(), K.copy()
    for a in padded:
        a[:, -N // 3 :] = 0
    yield "padded rows", *padded, V, 0.1
    yield "all tokens equal", Q[:, :1] + 0 * Q, K[:, :1] + 0 * K, V, 0.1
    giant = Q.copy(), K.copy()
    for a in giant:
        a[:, 5] *= 1e6
    yield "one token 1e6 times the rest", *giant, V, 0.3
    near = Q.astype(np.float32) + 1e-6 * K
    alpha = 1 / float(rotation_angles(Q, near, 1.0).max())
    yield CANCELS, Q, near, V, alpha
    smooth = np.vander(np.linspace(-1, 1, N), 2 * d_v)[None] * np.ones((batch, 1, 1))
    yield "columns 1, x, x², …", smooth[..., :d_v], smooth[..., d_v:], V, 1.0
    for apart in (1e-3, 1e-7):
        near = Q.copy()
        near[..., 1] = Q[..., 0] + apart * Q[..., 1]
        yield f"two columns {apart:g} apart", near, K, V, 0.1


def all_results(Q, K, V, alpha, dO, route):
    O, saved = osa_forward(Q, K, V, alpha, route)
    return dict(zip(("O", "dQ", "dK", "dV", "dalpha"), (O, *osa_backward(dO, saved))))


def extended_exp(S):
    """exp(S) of one matrix by scaling, Taylor and squaring in numpy.longdouble."""
    S = S.astype(np.longdouble)
    k = max(0, int(np.ceil(np.log2(max(np.abs(S).sum(axis=1).max(), 1e-30)))) + 3)
    X, term, total = (
        S / 2**k,
        np.eye(len(S), dtype=np.longdouble),
        np.eye(len(S), dtype=np.longdouble),
    )
    for j in range(1, 30):
        term = term @ X / j
        total = total + term
    for _ in range(k):
        total = total @ total
    return total


def relative(got, want, natural):
    """‖got − want‖/‖want‖, or against the natural size of the quantity where it vanishes."""
    size = np.linalg.norm(want)
    return float(
        np.linalg.norm(got - want) / max(size if size > 1e-9 * natural else natural, 1e-300)
    )


def measure(seed=0):
    rng, rows = np.random.default_rng(seed), []
    for name, Q, K, V, alpha in input_classes(rng):
        dO = rng.standard_normal(V.shape)
        for dtype in (np.float64, np.float32):
            q, k, v, g = (a.astype(dtype) for a in (Q, K, V, dO))
            exact = [a.astype(np.float64) for a in (q, k, v)]
            exact_alpha = float(dtype(alpha))
            want = all_results(*exact, exact_alpha, g.astype(np.float64), "dense")
            S = skew_scores(*exact[:2], exact_alpha)
            norm = float(rotation_angles(*exact[:2], exact_alpha).max())
            size = [np.linalg.norm(a) for a in (*exact, g.astype(np.float64))]
            s = exact_alpha / np.sqrt(q.shape[-1])
            natural = {
                "O": size[2],
                "dV": size[3],
                "dQ": s * size[1] * size[2] * size[3],
                "dK": s * size[0] * size[2] * size[3],
                "dalpha": np.linalg.norm(skew_scores(*exact[:2], 1.0)) * size[2] * size[3],
            }
            if natural["dalpha"] < 1e-9 * np.prod(size):  # S = 0 to rounding
                natural["dalpha"] = np.prod(size)
            row = {"class": name, "dtype": dtype.__name__, "norm_S": norm}
            if dtype is np.float64 and norm < 1e3:
                truth = extended_exp(S[0]) @ exact[2][0]
                check = np.linalg.norm(want["O"][0] - truth) / np.linalg.norm(truth)
                rows.append({**row, "route": "reference", "O": float(check) / max(1, norm)})
            for route in ROUTES:
                if route == "gram" and not norm < 1e3:
                    continue  # refused above 2e3, and slow before
                try:
                    got = all_results(q, k, v, dtype(alpha), g, route)
                    A = attention_matrix(q, k, dtype(alpha), route)
                except FloatingPointError:  # a refusal, by gram where its series diverges
                    assert route == "gram", (name, route)
                    continue
                I = np.eye(A.shape[-1], dtype=dtype)
                errors = {x: relative(got[x], want[x], natural[x]) for x in got}
                errors["dalpha"] = float(abs(got["dalpha"] - want["dalpha"]))
                errors["dalpha"] /= max(natural["dalpha"], 1e-300)
                errors = {x: error / max(1, norm) for x, error in errors.items()}
                orthogonality = float(abs(A.swapaxes(-1, -2) @ A - I).max())
                rows.append({**row, "route": route, **errors, "orthogonality": orthogonality})
    return rows


QUANTITIES = ("O", "dQ", "dK", "dV", "dalpha", "orthogonality")
# For route "auto", in every class.
LIMITS = {
    "float64": dict(zip(QUANTITIES, (1e-13, 1e-12, 1e-12, 1e-13, 1e-11, 1e-14))),
    "float32": dict(zip(QUANTITIES, (2e-7, 1e-6, 1e-6, 2e-7, 5e-6, 2e-6))),
}


def report(rows):
    """Prints the table and says which targets hold for route "auto"."""
    print(
        f"{'class':42s}{'dtype':9s}{'route':15s}{'‖S‖₂':>9s}"
        + "".join(f"{q:>10s}" for q in QUANTITIES)
    )
    for row in rows:
        values = "".join(f"{row[q]:10.1e}" if q in row else " " * 10 for q in QUANTITIES)
        print(f"{row['class']:42s}{row['dtype']:9s}{row['route']:15s}{row['norm_S']:9.1e}{values}")
    failed = []
    for row in (r for r in rows if r["route"] == "auto"):
        # In float64 what cancels in S is lost, here six digits.
        lost = 1e3 if (row["class"], row["dtype"]) == (CANCELS, "float64") else 1
        for q, limit in LIMITS[row["dtype"]].items():
            limit *= lost
            if not row[q] <= limit:
                failed.append(f"{row['class']}, {row['dtype']}: {q} {row[q]:.1e} > {limit:.0e}")
    print("\n".join(["auto misses:", *failed]) if failed else "auto meets every target")
    return failed


def draw():
    """Error of O per class for every route, from the csv; left float32, right float64."""
    with open(RESULTS / "accuracy.csv", newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["route"] != "reference"]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["class"] for r in rows))
    figure, axes = plt.subplots(1, 2, figsize=(12, 8), sharey=True, layout="constrained")
    style = {"auto": ("o", 90, "none"), "gram": ("x", 40, None), "qr": ("+", 50, None),
             "newton_schulz": ("s", 22, None), "dense": (".", 30, None),
             "products": ("^", 22, None)}  # fmt: skip
    for axis, dtype in zip(axes, ("float32", "float64")):
        for i, (route, (marker, size, face)) in enumerate(style.items()):
            chosen = [r for r in rows if r["route"] == route and r["dtype"] == dtype]
            colour = f"C{i}"
            if (route, dtype) == ("dense", "float64"):
                continue  # the reference
            x = [max(float(r["O"]), 1e-18) for r in chosen]
            y = [names.index(r["class"]) for r in chosen]
            axis.scatter(x, y, s=size, marker=marker, label=route, color=colour,
                         facecolors=face or colour)  # fmt: skip
        axis.axvline(np.finfo(dtype).eps, color="0.6", lw=1, zorder=0)
        axis.set(
            xscale="log",
            title=dtype,
            xlabel="relative error of O / max(1, ‖S‖₂); line: eps",
        )
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(RESULTS / "accuracy.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", action="store_true", help="the figure from committed results")
    args = parser.parse_args()
    if args.draw:
        draw()
        return 0
    warnings.simplefilter("error")  # a warning is a failure
    rows = measure(args.seed)
    failed = report(rows)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "accuracy.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("class", "dtype", "norm_S", "route", *QUANTITIES))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows
        )
    text = json.dumps(
        {"seed": args.seed, "missed": failed, **machine()}, indent=2, ensure_ascii=False
    )
    (RESULTS / "accuracy.json").write_text(text + "\n", encoding="utf-8")
    draw()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
