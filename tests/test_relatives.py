"""The relatives against right values made elsewhere, slow oracles, differences, and each other.

tests/relatives/README.md says where the right values come from.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import autograd as ag
from autograd import Tensor
from relatives import ops, pdssm, prism
from relatives.cayley import cayley
from relatives.chela import chela
from relatives.circulant import circulant
from relatives.delta import delta
from relatives.hla import ahla, hla2, hla3
from relatives.layers import LAYERS
from relatives.monarch import monarch
from relatives.reduced import reduced
from relatives.rrae import truncate
from relatives.softmax import Softmax, softmax
from relatives.tost import tssa
from relatives.transformer import Transformer, layer_norm
from relatives.xsa import xsa

FOLDER = Path(__file__).parent / "relatives"
EPS = np.finfo(np.float64).eps
RIGHT = 1e-12  # relative to the largest entry: sums of some hundred terms, degree 7 at most, of EPS
CHECK = 1e-8  # differences are right to eps^(2/3) = 4e-11, times the curvature of degree 7


def variant(names, heads=1):
    """`reduced` with the weights of these names one after the other, "X …"."""
    return lambda X, *W: reduced(X, heads=heads, **dict(zip(names.split()[1:], W))), names, {}


# name: function, its arguments, its keywords.  The file is that of the name, or `FILE`'s with the
# name for a suffix.
CASES = {
    "cayley": (cayley, "Q K V eps", {}),
    "tost": (tssa, "X W temp Wo bo", {}),
    "circulant_even": (circulant, "X Wqkv Wg bg Wo bo", {"grid": 4}),
    "ddl": (delta, "X Kin C wb bb wv bv", {"k_eps": 1e-5, "v_scale": 4.0}),
    "prism": (prism.prism, "X cw cb Wq Wv wa Wk Wp Wb Wo", {}),
    "pdssm": (pdssm.pdssm, "x Sel Pd W1m b1m W1p b1p Bre Bim Cre Cim Dsk", {}),
    "monarch_square9": (monarch, "X W1 W2", {}),
    "monarch_ortho12": (monarch, "X W1 W2", {}),
    "chela": (chela, "X kl ks gq bq gk bk Wv bv Wg bg Wo bo", {}),
    "rrae_tall": (truncate, "Y", {"k": 3}),
    "xsa": (xsa, "Q K V", {}),
    "full1": variant("X Wq Wk Wv Wo"),
    "full2": variant("X Wq Wk Wv Wo", 2),
    "sym1": variant("X Wq Wv Wo"),
    "sym2": variant("X Wq Wv Wo", 2),
    "qk": variant("X Wqk Wv Wo"),
    "qk_novo": variant("X Wqk"),
    "cholesky": variant("X T_ Wv Wo"),
    "cholesky_novo": variant("X T_"),
    "hla2": (hla2, "Q K V", {}),
    "ahla": (ahla, "Q K V", {}),
    "hla3": (hla3, "Q K V", {}),
    "hla2_causal": (hla2, "Q K V", {"causal": True}),
    "ahla_causal": (ahla, "Q K V", {"causal": True}),
    "hla3_causal": (hla3, "Q K V", {"causal": True}),
    "hla2_norm": (hla2, "Q K V", {"normalise": 1e-6}),
    "ahla_norm": (ahla, "Q K V", {"normalise": 1e-6}),
    "hla2_causal_norm": (hla2, "Q K V", {"causal": True, "normalise": 1e-6}),
    "ahla_causal_norm": (ahla, "Q K V", {"causal": True, "normalise": 1e-6}),
}


def load(name):
    """Arguments, G, output and gradients of a case."""
    file = "hla" if "hla" in name else name if (FOLDER / f"{name}.npz").exists() else "minimal"
    out, d = ("out", "d_{}") if file == name else (f"out_{name}", f"d{{}}_{name}")
    if name in ("hla2", "hla3", "ahla"):
        out, d = f"out_{name}", f"d{{}}_{name}"
    with np.load(FOLDER / f"{file}.npz") as z:
        names = CASES[name][1].split()
        return [z[n] for n in names], z["G"], z[out], [z[d.format(n)] for n in names]


def run(f, arrays, G, xp=np, dtype=np.float64, **kw):
    """The output of f and its gradients for the cotangent G, as NumPy arrays."""
    inputs = [Tensor(xp.asarray(a.astype(dtype)), True) for a in arrays]
    out = f(*inputs, **kw)
    out.backward(xp.asarray(G.astype(dtype)))
    assert {out.dtype, *(t.grad.dtype for t in inputs)} == {np.dtype(dtype)}
    return ag.to_cpu(out.data), [ag.to_cpu(t.grad) for t in inputs]


def error(a, b):
    return float(abs(a - b).max() / abs(b).max())


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_right_values(xp, name):
    f, _, kw = CASES[name]
    arrays, G, right, right_grads = load(name)
    out, grads = run(f, arrays, G, xp, **kw)
    assert error(out, right) < RIGHT
    for g, right_g in zip(grads, right_grads):
        assert g.shape == right_g.shape and error(g, right_g) < RIGHT


@pytest.mark.parametrize("name", CASES)
def test_float32_stays_float32_and_agrees_with_float64(xp, name):
    f, _, kw = CASES[name]
    arrays, G, right, right_grads = load(name)
    out, grads = run(f, arrays, G, xp, np.float32, **kw)
    # The normalised orders divide by sums that nearly cancel; the others lose a few digits.
    limit = 0.05 if "norm" in name else 1e-4
    assert error(out, right) < limit
    for g, right_g in zip(grads, right_grads):
        assert error(g, right_g) < limit


@pytest.mark.parametrize("name", CASES)
def test_arrays_are_constants_and_each_argument_may_be_the_only_tensor(name):
    f, _, kw = CASES[name]
    arrays, G, right, right_grads = load(name)
    assert not f(*arrays, **kw).requires_grad
    for i, right_g in enumerate(right_grads):
        t = Tensor(arrays[i], True)
        f(*arrays[:i], t, *arrays[i + 1 :], **kw).backward(G)
        assert error(t.grad, right_g) < RIGHT


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_shape_or_dtype_gets_one_line_that_names_the_argument(name):
    f, names, kw = CASES[name]
    arrays = load(name)[0]
    for i, n in enumerate(names.split()):
        wrong = [arrays[i][None]] if "N" not in n and arrays[i].ndim and i else []
        wrong += [arrays[i][..., :0]] if arrays[i].ndim else [np.zeros(3)]
        for a in wrong:
            with pytest.raises(ValueError, match=rf"\A{n} must [^\n]*\Z"):
                f(*arrays[:i], a, *arrays[i + 1 :], **kw)
        if arrays[i].ndim:
            with pytest.raises(TypeError, match=rf"\A({n}|{names.split()[1 % len(arrays)]}) must"):
                f(*arrays[:i], arrays[i].astype(np.float16), *arrays[i + 1 :], **kw)


# ------------------------------------------------------------- other shapes and switches, by loops


def softmax_loops(Q, K, V, causal):
    O = np.zeros((len(Q), V.shape[1]))
    for t, q in enumerate(Q):
        keys = range(t + 1 if causal else len(K))
        weights = np.array([math.exp(q @ K[s] / math.sqrt(len(q))) for s in keys])
        O[t] = sum(w * V[s] for w, s in zip(weights / weights.sum(), keys))
    return O


def xsa_loops(Q, K, V, causal):
    units = V / np.linalg.norm(V, axis=1, keepdims=True)
    return np.array([y - (y @ v) * v for y, v in zip(softmax_loops(Q, K, V, causal), units)])


def cayley_dense(Q, K, V, eps):
    S, N = Q @ K.T / math.sqrt(Q.shape[1]), len(Q)
    Z, I = float(eps) / (2 * math.sqrt(N)) * (S - S.T), np.eye(N)
    return np.linalg.inv(I - Z / 2) @ (I + Z / 2) @ V


def tssa_causal_loops(X, W, temp, Wo):
    h, N = len(temp), len(X)
    w = np.stack(np.split(X @ W, h, axis=1))  # (h, N, p)
    m = np.zeros((h, N))
    for t in range(N):
        for i in range(h):
            norm = (w[i, : t + 1] ** 2).sum(axis=0)
            m[i, t] = temp[i, 0] * sum(w[i, t] ** 2 / norm)
    Pi = np.exp(m) / np.exp(m).sum(axis=0)
    O = np.zeros((N, 0))
    for i in range(h):
        dots = [
            Pi[i, : t + 1] @ w[i, : t + 1] ** 2 / (Pi[i, : t + 1].sum() + 1e-8) for t in range(N)
        ]
        O = np.hstack([O, -w[i] * Pi[i, :, None] / (1 + np.array(dots))])
    return O @ Wo


def silu(x):
    return x / (1 + np.exp(-x))


def circulant_loops(X, Wqkv, Wg, bg, Wo, bo, grid, scale=0.5):
    """scale: the power of N that divides; 0.5 is the code's, 1 the paper's."""
    N, d = X.shape
    q, k, v = (M.reshape(*grid, d) for M in np.split(X @ Wqkv, 3, axis=1))
    places = list(itertools.product(*map(range, grid)))

    def at(M, p, delta):
        return M[(p[0] + delta[0]) % grid[0], (p[1] + delta[1]) % grid[1]]

    a = np.array([sum(q[p] * at(k, p, delta) for p in places) for delta in places]) / N**scale
    w = np.exp(a) / np.exp(a).sum(axis=0)
    y = np.array([sum(w[i] * at(v, p, delta) for i, delta in enumerate(places)) for p in places])
    return y * silu(X @ Wg + bg) @ Wo + bo


def delta_matrix(X, Kin, C, wb, bb, wv, bv, k_eps):
    """(I − β k kᵀ) x + β k v, token by token."""
    out = []
    for x, k, c in zip(X, Kin, C):
        k = k / math.sqrt(k @ k + k_eps**2)
        beta = 2 / (1 + math.exp(-(c @ wb + bb).item()))
        out.append((np.eye(len(k)) - beta * np.outer(k, k)) @ x + beta * k * (x @ wv + bv))
    return np.array(out)


def prism_loops(X, cw, cb, Wq, Wv, wa, Wk, Wp, Wb, Wo):
    (N, d), taps, S, out = X.shape, cw.shape[1], 0, []
    past = np.vstack([np.zeros((taps - 1, d)), X])
    for t in range(N):
        u = silu((past[t : t + taps] * cw.T).sum(axis=0) + cb)
        r, B = u @ Wv - u, 0
        for Wk_l, Wp_l, Wb_l in zip(Wk, Wp, Wb):
            p = u @ Wp_l * r
            write = p * np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in p])
            B, r = B + u @ Wb_l * np.outer(write, u @ Wk_l), r - write
        k = u @ Wk[0]
        S = 1 / (1 + np.exp(-u @ wa)) * (S - u @ Wb[0] * np.outer(S @ k, k) if t else 0) + B
        out.append(S @ (u @ Wq) @ Wo)
    return np.array(out)


def pdssm_loops(x, Sel, Pd, W1m, b1m, W1p, b1p, Bre, Bim, Cre, Cim, Dsk):
    def sigma(z):
        return 1 / (1 + np.exp(-z))

    h, out = np.zeros(len(b1m), complex), []
    for u in x:
        M = np.einsum("k,kij->ij", np.exp(u @ Sel) / np.exp(u @ Sel).sum(), Pd)
        D = sigma(u @ W1m + b1m) * np.exp(2j * math.pi * sigma(u @ W1p + b1p))
        old, h = D * h, u @ (Bre + 1j * Bim)
        for c in range(len(h)):
            h[M[:, c].argmax()] += old[c]
        out.append((h @ (Cre + 1j * Cim)).real + u * Dsk)
    return np.array(out)


def monarch_dense(X, W1, W2):
    def diagonal(W):
        n, rows, columns = W.shape
        D = np.zeros((n, rows, n, columns))
        D[range(n), :, range(n)] = W
        return D.reshape(n * rows, n * columns)

    def perm(a, b):
        return np.eye(a * b)[np.arange(a * b).reshape(a, b).T.ravel()]

    l, s, r = W2.shape
    return perm(l, s) @ diagonal(W2) @ perm(r, l) @ diagonal(W1) @ X


def chela_loops(X, kl, ks, gq, bq, gk, bk, Wv, bv, Wg, bg, Wo, bo, causal):
    N = len(X)
    first = 0 if causal else N - 1  # index of lag 0
    kernel, start = kl.copy(), first - (0 if causal else ks.shape[1] // 2)
    kernel[:, start : start + ks.shape[1]] += ks
    Z = np.array(
        [
            sum(kernel[:, first + t - s] * X[s] for s in range(t + 1 if causal else N))
            for t in range(N)
        ]
    )
    Z, V = silu(Z), silu(X @ Wv + bv)
    A = (Z * gq + bq) @ (Z * gk + bk).T
    A = np.tril(A) / np.arange(1, N + 1)[:, None] if causal else A / N
    return A @ V * silu(Z @ Wg + bg) @ Wo + bo


def hla_dense(order, Q, K, V, causal, normalise):
    W, L = Q @ K.T, np.tril(np.ones((len(Q), len(Q)))) if causal else 1
    W = W * L
    T = {2: (W @ W.T) * L, 1: (W @ W) * L, 3: (W @ W.T) * L @ W}[order]
    return T @ V if normalise is None else T @ V / (T.sum(axis=1, keepdims=True) + normalise)


def truncate_svd(Y, k):
    U, s, Vt = np.linalg.svd(Y)
    return sum(s[i] * np.outer(U[:, i], Vt[i]) for i in range(k))


def gaussian(*shapes):
    """Arrays of these shapes, a little smaller than normal."""
    rng = np.random.default_rng(len(shapes))
    return [0.7 * rng.standard_normal(s) for s in shapes]


QKV = (7, 3), (7, 3), (7, 4)
SHORT = (3, 5), (3, 5), (3, 2)  # N < 2d
ONE = (1, 3), (1, 3), (1, 2)
LONG = (150, 2), (150, 2), (150, 3)  # several blocks of 64 tokens
PRISM = (4,), (4, 4), (4, 4), (4, 1)
PD = (3, 2), (2, 5, 5), (3, 5), (5,), (3, 5), (5,), (3, 5), (3, 5), (5, 3), (5, 3), (3,)
CHELA = (3,), (3,), (3,), (3,), (3, 3), (3,), (3, 3), (3,), (3, 3), (3,)
# function, oracle for one sequence, arrays, how many of them are of each sequence, keywords
OTHERS = {
    "softmax": (softmax, softmax_loops, gaussian(*QKV), 3, {"causal": False}),
    "softmax causal": (softmax, softmax_loops, gaussian(*QKV), 3, {"causal": True}),
    "xsa causal": (xsa, xsa_loops, gaussian(*QKV), 3, {"causal": True}),
    "xsa short": (xsa, xsa_loops, gaussian(*SHORT), 3, {"causal": False}),
    "cayley": (cayley, cayley_dense, gaussian(*QKV, ()), 3, {}),
    "cayley short": (cayley, cayley_dense, gaussian(*SHORT, ()), 3, {}),
    "cayley one token": (cayley, cayley_dense, gaussian(*ONE, ()), 3, {}),
    "tssa causal": (
        lambda *a: tssa(*a, causal=True),
        tssa_causal_loops,
        gaussian((5, 6), (6, 6), (3, 1), (6, 6)),
        1,
        {},
    ),
    "circulant odd": (
        circulant,
        circulant_loops,
        gaussian((9, 2), (2, 6), (2, 2), (2,), (2, 2), (2,)),
        1,
        {"grid": (3, 3)},
    ),
    "circulant rectangular": (
        circulant,
        circulant_loops,
        gaussian((10, 3), (3, 9), (3, 3), (3,), (3, 3), (3,)),
        1,
        {"grid": (2, 5)},
    ),
    "ddl linear": (
        delta,
        delta_matrix,
        gaussian((5, 4), (5, 4), (5, 4), (4, 1), (1,), (4, 1), (1,)),
        3,
        {"k_eps": 1e-5},
    ),
    "prism": (
        prism.prism,
        prism_loops,
        gaussian((3, 4), (4, 6), *PRISM, (2, 4, 4), (2, 4, 4), (2, 4, 1), (4, 4)),
        1,
        {},
    ),
    "prism one write": (
        prism.prism,
        prism_loops,
        gaussian((6, 4), (4, 1), *PRISM, (1, 4, 4), (1, 4, 4), (1, 4, 1), (4, 4)),
        1,
        {},
    ),
    "pdssm": (pdssm.pdssm, pdssm_loops, gaussian((9, 3), *PD), 1, {}),
    "monarch": (monarch, monarch_dense, gaussian((6, 2), (2, 4, 3), (4, 5, 2)), 1, {}),
    "monarch one block": (monarch, monarch_dense, gaussian((5, 2), (1, 5, 5), (5, 1, 1)), 1, {}),
    "chela": (chela, chela_loops, gaussian((5, 3), (3, 9), (3, 5), *CHELA), 1, {"causal": False}),
    "chela causal": (
        chela,
        chela_loops,
        gaussian((6, 3), (3, 6), (3, 4), *CHELA),
        1,
        {"causal": True},
    ),
    "rrae wide": (truncate, truncate_svd, gaussian((5, 8)), 1, {"k": 2}),
    "rrae all": (truncate, truncate_svd, gaussian((6, 4)), 1, {"k": 4}),
}
for order, f in ((1, ahla), (2, hla2), (3, hla3)):
    for causal, shapes in ((False, QKV), (True, QKV), (True, LONG), (True, ONE)):
        for normalise in (None, 0.1):
            name = f"{f.__name__} {causal} {shapes[0][0]} {normalise}"
            oracle = lambda *a, order=order, **kw: hla_dense(order, *a, **kw)  # noqa: E731
            kw = {"causal": causal, "normalise": normalise}
            # Positive scores where divided: the differences would see the poles of the others.
            arrays = [abs(a) if normalise else a for a in gaussian(*shapes)]
            OTHERS[name] = f, oracle, arrays, 3, kw


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_agree_with_loops_in_a_batch_and_alone(xp, name):
    f, oracle, arrays, own, kw = OTHERS[name]
    scale = np.array([1.0, -0.8, 0.6, 0.9, 0.7, -0.5]).reshape(2, 3)
    own = range(own)
    if kw.get("normalise"):
        scale = abs(scale)
    batch = [
        np.multiply.outer(scale, a) if i in own else a for i, a in enumerate(arrays)
    ]  # (2, 3, ...)
    out = ag.to_cpu(f(*map(xp.asarray, batch), **kw).data)
    for i in np.ndindex(2, 3):
        one = [a[i] if j in own else a for j, a in enumerate(batch)]
        right = oracle(*one, **kw)
        assert error(out[i], right) < RIGHT
        assert error(ag.to_cpu(f(*map(xp.asarray, one), **kw).data), right) < RIGHT


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_agree_with_differences(xp, name):
    f, _, arrays, _, kw = OTHERS[name]
    Q, K = arrays[:2] if len(arrays) > 1 else (None, None)
    if name == "cayley one token":  # R = I whatever Q and K are: differences of exactly 0
        grads = run(f, arrays, arrays[2])[1]
        assert all(abs(g).max() < 8 * EPS for i, g in enumerate(grads) if i != 2)
        f, arrays = lambda V: cayley(*map(xp.asarray, (Q, K)), V, 1.0), arrays[2:3]
    if name == "pdssm":  # the hardened matrix has no derivative; the straight-through one: above
        Sel, Pd = map(xp.asarray, arrays[1:3])
        smooth = [arrays[0][:1], *arrays[3:]]
        assert ag.gradient_check(
            lambda x, *w: pdssm.pdssm(x, Sel, Pd, *w), *map(xp.asarray, smooth)
        ) < CHECK  # fmt: skip
        x = xp.asarray(arrays[0])
        f, arrays = lambda *w: pdssm.pdssm(x, Sel, Pd, *w), arrays[3:]
    assert ag.gradient_check(lambda *a: f(*a, **kw), *map(xp.asarray, arrays)) < CHECK


@pytest.mark.parametrize("case", ["zero", "equal", "deficient", "duplicated"])
def test_the_cayley_gradient_holds_where_queries_and_keys_are_degenerate(case, rng):
    Q, K, V = rng.standard_normal((3, 9, 3))
    if case == "zero":
        Q *= 0
    elif case == "equal":
        K = Q.copy()
    elif case == "deficient":
        K[:, 1:] = Q[:, 1:] = 0
    else:
        Q[1::2], K[1::2] = Q[:-1:2], K[:-1:2]
    assert ag.gradient_check(cayley, Q, K, V, np.array(1.3)) < CHECK
    assert error(cayley(Q, K, V, 1.3).data, cayley_dense(Q, K, V, 1.3)) < RIGHT


@pytest.mark.parametrize("k, s", [(2, (3, 3, 1, 0.5)), (2, (3, 2, 1, 1)), (2, (3, 2, 0, 0))])
def test_the_rank_truncation_has_its_gradient_at_equal_and_at_zero_singular_values(k, s, rng):
    U, V = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in (7, 5))
    assert ag.gradient_check(lambda Y: truncate(Y, k), (U * np.array(s, float)) @ V.T) < CHECK


def test_without_a_gap_the_rank_truncation_returns_a_projection_and_no_infinity(rng):
    for Y in (np.eye(4), np.zeros((3, 5)), np.diag([2.0, 0, 0])):
        G = rng.standard_normal(Y.shape)
        d = run(truncate, [Y], G, k=2)[1][0]
        assert np.linalg.norm(d) <= np.linalg.norm(G)


@pytest.mark.parametrize("f", [ops.sigmoid, ops.silu, prism.gelu, pdssm.sin])
def test_activations_have_their_gradients(xp, rng, f):
    assert ag.gradient_check(f, xp.asarray(3 * rng.standard_normal((4, 5)))) < CHECK
    far = f(xp.asarray(np.array([-1e3, 1e3], np.float32)))  # nothing overflows
    assert far.dtype == np.float32 and np.isfinite(ag.to_cpu(far.data)).all()


def test_erf_is_that_of_the_standard_library(xp):
    x = np.concatenate([np.linspace(-9, 9, 1801), [-1e3, 1e-9, 1e3]])
    got = ag.to_cpu(prism.erf(xp.asarray(x)))
    right = np.array([math.erf(v) for v in x])
    assert abs(got - right).max() < 4 * EPS  # 24 terms, of which the first four matter


@pytest.mark.parametrize("d", [3, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layer_norm_and_its_gradient_hold_at_any_size_and_offset(dtype, d, xp, rng):
    rows = rng.standard_normal((4, 2, d))
    rows[0] *= [[1e20], [1e-20]]  # neither square is a float32
    rows[1] = [[3e37], [1e4 / 3]]  # equal entries: 0, however the mean is rounded
    rows[2] += 1e4
    X, dY = rows.reshape(8, d).astype(dtype), rng.standard_normal((8, d)).astype(dtype)
    leaves = [Tensor(xp.asarray(a), True) for a in (X, np.ones(d, dtype), np.zeros(d, dtype))]
    Y = layer_norm(*leaves)
    Y.backward(xp.asarray(dY))
    x, g = (X - X[:, :1]).astype(np.longdouble), dY.astype(np.longdouble)
    centred = x - x.mean(axis=1, keepdims=True)
    std = np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.longdouble(1e-5))
    hat = centred / std
    dX = g - g.mean(axis=1, keepdims=True) - hat * (g * hat).mean(axis=1, keepdims=True)
    tol = 4 * d * np.finfo(dtype).eps  # sums of d entries of size 1, also on a device in float32
    assert abs(ag.to_cpu(Y.data) - hat).max() < tol * abs(hat).max()
    assert (abs(ag.to_cpu(leaves[0].grad) - dX / std) < tol * abs(g).max() / std).all()


# --------------------------------------------------------------------------- what they are, shown


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_cayley_matrix_is_a_rotation_at_any_scale(xp, rng, dtype):
    for eps, near in itertools.product((0.1, 10.0, 1000.0), (1.0, 1e-3)):
        Q, K = rng.standard_normal((2, 40, 4))
        K = near * K + (1 - near) * Q  # nearly parallel as well: Q Kᵀ and K Qᵀ cancel
        Q, K, I = (xp.asarray(a.astype(dtype)) for a in (Q, K, np.eye(40)))
        R = ag.to_cpu(cayley(Q, K, I, eps).data).astype(np.float64)
        assert abs(R.T @ R - np.eye(40)).max() < 10 * np.finfo(dtype).eps
        assert np.linalg.det(R) > 0


def test_cayley_and_exponential_part_at_the_third_order(rng):
    S = rng.standard_normal((2, 6, 2))
    S = S[0] @ S[1].T - S[1] @ S[0].T
    S /= np.linalg.norm(S, 2)
    theta, U = np.linalg.eigh(1j * S)
    for t in (0.1, 0.05):
        exp = (U * np.exp(-1j * t * theta)) @ U.conj().T
        cay = np.linalg.solve(np.eye(6) - t * S / 2, np.eye(6) + t * S / 2)
        assert np.linalg.norm(exp - cay, 2) == pytest.approx(t**3 / 12, rel=0.01)


def test_the_published_recurrence_of_the_third_order_is_another_operator():
    with np.load(FOLDER / "hla.npz") as z:
        Q, K, V, published = (z[k] for k in ("Q", "K", "V", "out_hla3_alg3"))
    ours, twice = hla3(Q, K, V, causal=True).data, np.zeros_like(published)
    W = Q @ K.swapaxes(-1, -2)
    for t in range(Q.shape[-2]):
        for i, j, l in itertools.product(range(t + 1), repeat=3):
            if sorted((i, j, l))[1] == max(i, j, l):  # the largest index occurs at least twice
                twice[:, t] += (W[:, t, i] * W[:, j, i] * W[:, j, l])[:, None] * V[:, l]
    assert error(twice, published) < RIGHT
    assert np.linalg.norm(ours - published) > 0.5 * np.linalg.norm(ours)


def test_the_two_published_decays_of_the_second_order_differ_unless_there_is_none(rng):
    Q, K, V = rng.standard_normal((3, 7, 4))

    def stream(decay, inside):
        S, C, G, out = np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4)), []
        for q, k, v in zip(Q, K, V):
            G = decay * G + inside * np.outer(k, k @ C)
            S, C = decay * S + np.outer(k, k), decay * C + np.outer(q, v)
            out.append(q @ (S @ C - G))
        return np.array(out)

    assert error(stream(1, 1), hla2(Q, K, V, causal=True).data) < RIGHT
    assert error(stream(0.9, 1), stream(0.9, 0.9)) > 0.01


def test_circulant_attention_has_the_scale_of_its_code_not_of_its_paper():
    arrays, grid = OTHERS["circulant rectangular"][2], (2, 5)
    out = circulant(*arrays, grid).data
    assert error(out, circulant_loops(*arrays, grid, scale=0.5)) < RIGHT
    assert error(out, circulant_loops(*arrays, grid, scale=1)) > 1e-3


def test_every_parameter_of_prism_receives_a_gradient():
    arrays, G, _, _ = load("prism")
    assert all(abs(g).max() > 1e-3 for g in run(prism.prism, arrays, G)[1])


def test_monarch_with_orthogonal_blocks_is_orthogonal():
    X, W1, W2 = load("monarch_ortho12")[0]
    M = monarch(np.eye(12), W1, W2).data
    assert abs(M @ M.T - np.eye(12)).max() < 8 * EPS and (abs(M) > 1e-6).all()


def test_a_delta_layer_shrinks_the_error_along_k_by_one_minus_beta(rng):
    X, K, C = rng.standard_normal((3, 5, 4))
    for beta, bias in ((1.0, 0.0), (2.0, 40.0)):
        zero, bb = np.zeros((4, 1)), np.array([bias])
        Y = delta(X, K, C, zero, bb, zero, np.array([0.3]), k_eps=0.0).data
        k = K / np.linalg.norm(K, axis=1, keepdims=True)
        before, after = ((k * A).sum(axis=1) - 0.3 for A in (X, Y))
        assert abs(after - (1 - beta) * before).max() < 16 * EPS
        assert abs((Y - X) - k * ((Y - X) * k).sum(axis=1)[:, None]).max() < 16 * EPS


def test_the_first_causal_token_of_xsa_gets_nothing_and_near_the_identity_nobody_does(rng):
    Q, K, V = rng.standard_normal((3, 6, 4))
    assert abs(xsa(Q, K, V, causal=True).data[0]).max() < 8 * EPS
    Q = 12 * np.linalg.qr(rng.standard_normal((6, 6)))[0]  # K = Q orthogonal: attention to itself
    assert np.linalg.norm(xsa(Q, Q, V).data) < 1e-6 * np.linalg.norm(V)


def test_a_state_of_pd_ssm_without_input_never_grows(rng):
    _, *w = OTHERS["pdssm"][2]
    x = np.zeros((9, 3))
    x[0] = 1
    w[-1] = w[-1] * 0  # no direct path
    C = np.eye(5)[:, :3]  # three states, real parts
    y = pdssm.pdssm(x, *w[:8], C, 0 * C, w[-1]).data
    assert abs(y).sum() > 0
    start = abs(x[0] @ (w[6] + 1j * w[7])).sum()
    assert (abs(y).sum(axis=1) <= start).all()


def test_wrong_calls_are_told_what_is_allowed(rng):
    X, W = rng.standard_normal((6, 4)), rng.standard_normal((4, 4))
    b = np.zeros(4)
    calls = {
        "heads must divide": lambda: tssa(X, W, np.ones((3, 1)), W),
        "grid must hold the 6": lambda: circulant(X, np.ones((4, 12)), W, b, W, b, (2, 2)),
        "W1 must be .* k p = 6": lambda: monarch(X, np.ones((2, 2, 2)), np.ones((2, 2, 2))),
        "W2 must be .* k q = 6": lambda: monarch(X, np.ones((2, 3, 3)), np.ones((2, 2, 2))),
        "k must be in 1 … 4": lambda: truncate(X, 5),
        "reduced takes Wq, Wq and Wk, Wqk or T_": lambda: reduced(X, Wqk=W, Wq=W),
        "reduced takes .* several heads with Wq": lambda: reduced(X, Wqk=W, heads=2),
        "kl must have 11 lags": lambda: chela(X, np.ones((4, 6)), np.ones((4, 1)), *[b] * 4,
                                              *[W, b] * 3),
        "ks must have an odd": lambda: chela(X, np.ones((4, 11)), np.ones((4, 2)), *[b] * 4,
                                             *[W, b] * 3),
        "eps must be a number": lambda: cayley(X, X, X, np.ones(6)),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(ValueError, match=rf"\A{message}[^\n]*\Z"):
            call()


# ----------------------------------------------------------------------------------- as layers


@pytest.mark.parametrize("norm", [False, True])
def test_the_delta_skip_is_the_rule_around_every_branch(norm, rng):
    model = Transformer(
        d=8, heads=2, depth=2, patch=2, image=(6, 4), classes=3, mlp_ratio=2, eta=0.3, rng=rng,
        dtype=np.float64, attention=Softmax, skip="delta", norm=norm,
    )  # fmt: skip
    for p in model.parameters.values():
        p.data = p.data + 0.3 * rng.standard_normal(p.shape)
    images, W = rng.standard_normal((5, 6, 4)), {k: p.data for k, p in model.parameters.items()}

    def normed(X, name):
        out = (X - X.mean(axis=-1, keepdims=True)) / np.sqrt(X.var(axis=-1, keepdims=True) + 1e-5)
        return out * W[name + ".gain"] + W[name + ".bias"] if norm else X

    X = model.embed(images).data
    for i, layer in enumerate(model.layers):
        for j, block in enumerate(layer, 1):
            C = normed(X, f"layers.{i}.norm_{j}")
            w = [W[f"layers.{i}.skip_{j}.{k}"] for k in ("wb", "bb", "wv", "bv")]
            X = delta(X, block.f(Tensor(C)), C, *w, v_scale=4.0).data
    wanted = normed(X, "norm").mean(axis=1) @ W["W_C"] + W["b_C"]
    assert error(model(images).data, wanted) < RIGHT


@pytest.mark.parametrize("name", ["cayley", "monarch"])
def test_the_isometries_start_as_such(name, rng):
    layer = LAYERS[name](8, 2, rng, np, np.float64, tokens=12)
    X = rng.standard_normal((3, 12, 8))
    right = np.linalg.norm(X, axis=(1, 2))
    assert abs(np.linalg.norm(layer(Tensor(X)).data, axis=(1, 2)) / right - 1).max() < 32 * EPS


def test_a_lone_token_reads_itself_in_pd_ssm(rng):
    X = rng.standard_normal((5, 1, 8))
    assert abs(LAYERS["pdssm"](8, 2, rng, np, np.float64, tokens=1)(X).data - X).max() < 32 * EPS


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_takes_a_step_in_float32_and_all_its_weights_have_gradients(xp, rng, name):
    layer = LAYERS[name](8, 2, rng, xp, tokens=12)
    X = Tensor(xp.asarray(rng.standard_normal((3, 12, 8)).astype(np.float32)), True)
    Y = layer(X)
    assert Y.shape == X.shape and Y.dtype == np.float32
    Y.backward(xp.asarray(rng.standard_normal(X.shape).astype(np.float32)))
    for key, p in layer.parameters.items():
        assert p.grad.dtype == np.float32 and np.isfinite(ag.to_cpu(p.grad)).all(), key
        assert abs(ag.to_cpu(p.grad)).max() > 0, key
