"""The relatives as layers of a network, X (B, N, d) -> (B, N, d), built as `MultiHeadOSA` is.

`LAYERS[name](d, heads, rng, xp, dtype, tokens=N)`; only "monarch" and "chela" have weights for a
number of tokens.  Each starts as near to orthogonal as its formula allows.
"""

import functools
import math

import numpy as np

from osa_minimal import MultiHeadOSA, random_orthogonal, tensors
from relatives import cayley, chela, circulant, delta, hla, monarch, pdssm, prism, reduced, tost
from relatives.softmax import Softmax

# name: O from Q, K, V (B, h, N, d_v) and α (h, 1, 1), the same α as in OSA's S.  The powers of N
# keep the first layer's output about the size of V.
HEADS = {
    "cayley": lambda Q, K, V, a: cayley.cayley(Q, K, V, a * (2 * math.sqrt(Q.shape[-2]))),
    "hla2": lambda Q, K, V, a: hla.hla2(Q, K, V * Q.shape[-2] ** -2.0),
    "ahla": lambda Q, K, V, a: hla.ahla(Q, K, V * Q.shape[-2] ** -2.0),
    "hla3": lambda Q, K, V, a: hla.hla3(Q, K, V * Q.shape[-2] ** -3.0),
}
# name: the output from X (B, N, d), the number of heads and the weights of `initial`.
FORMULAS = {
    "tost": lambda X, h, w: tost.tssa(X, heads=h, **w),
    "circulant": lambda X, h, w: circulant.circulant(X, grid=grid(X.shape[1]), **w),
    "prism": lambda X, h, w: prism.prism(X, **w),
    "pdssm": lambda X, h, w: pdssm.pdssm(X, **w),
    "monarch": lambda X, h, w: monarch.monarch(X, **w),
    "chela": lambda X, h, w: chela.chela(X, **w),
    "symmetric": lambda X, h, w: reduced.reduced(X, f"sym{h}", **w),
    "merged": lambda X, h, w: reduced.reduced(X, "qk_novo", **w),
}


def grid(N):
    """The squarest (rows, columns) of N tokens, rows ≤ columns."""
    rows = max(n for n in range(1, math.isqrt(N) + 1) if N % n == 0)
    return rows, N // rows


def initial(name, d, h, N, rng):
    """The weights of a layer by the names of its function's arguments, float64."""
    zero, one, none = np.zeros(d), np.ones(d), np.zeros((d, d))
    gate = {"Wg": none, "bg": one * 1.27846454}  # SiLU of which is 1: open

    def U(n=d, m=d):
        return random_orthogonal(n, m, rng, np.float64)

    def normal(*shape):
        return rng.standard_normal(shape) / math.sqrt(d)

    if name == "tost":
        return {"W": U(), "temp": np.ones((h, 1)), "Wo": U(), "bo": zero}
    if name == "circulant":
        return gate | {"Wqkv": np.hstack([U(), U(), U()]), "Wo": U(), "bo": zero}
    if name == "ddl":  # β = 1
        return {"wb": none[:, :1], "bb": zero[:1], "wv": normal(d, 1) / 2, "bv": zero[:1]}
    if name == "prism":  # three taps, the last one open; α = ½; two writes; |k| ≈ 1 if |u|² ≈ d
        w = {"cw": one[:, None] * (0, 0, 1), "cb": zero, "wa": none[:, :1], "Wq": U(), "Wv": U()}
        w |= {"Wk": [U() / math.sqrt(d), U() / math.sqrt(d)], "Wp": [U(), U()], "Wo": U()}
        return w | {"Wb": [U(d, 1), U(d, 1)]}
    if name == "pdssm":  # d states, six matrices; C = Bᴴ, so that a token reads itself unchanged
        re, im = U() / math.sqrt(2), U() / math.sqrt(2)
        w = {"Sel": normal(d, 6), "Pd": normal(6, d, d), "W1m": U(), "b1m": zero, "W1p": U()}
        return w | {"b1p": zero, "Bre": re, "Bim": im, "Cre": re.T, "Cim": -im.T, "Dsk": zero}
    if name == "monarch":  # orthogonal blocks
        k, p = grid(N)
        return {"W1": [U(p, p) for _ in range(k)], "W2": [U(k, k) for _ in range(p)]}
    if name == "chela":  # each token convolved to itself
        w = {"kl": np.zeros((d, 2 * N - 1)), "ks": one[:, None] * (0, 1, 0), "gq": one, "bq": zero}
        return w | gate | {"gk": one, "bk": zero, "Wv": U(), "bv": zero, "Wo": U(), "bo": zero}
    return {k: U() for k in (("Wqk",) if name == "merged" else ("Wq", "Wv", "Wo"))}


class Heads(MultiHeadOSA):
    """HEADS[name] between W_QK, W_V and W_O."""

    def __init__(self, name, *args, tokens=None, **kw):
        super().__init__(*args, **kw)
        self.formula, self.alpha = HEADS[name], self.parameters["alpha"]
        if name != "cayley":
            del self.parameters["alpha"]

    def attend(self, F):
        d_v = F.shape[-1] // 3
        return self.formula(F[..., :d_v], F[..., d_v : 2 * d_v], F[..., 2 * d_v :], self.alpha)


class Layer:
    """FORMULAS[name] with the weights of `initial`; "ddl": the delta rule around softmax."""

    def __init__(self, name, d, heads, rng, xp=np, dtype=np.float32, tokens=None):
        init = initial(name, d, heads, tokens, rng)
        self.own = tensors({k: np.array(a, dtype) for k, a in init.items()}, xp)
        self.parameters, self.name, self.heads = dict(self.own), name, heads
        if name == "ddl":
            self.branch = Softmax(d, heads, rng, xp, dtype)
            self.parameters |= self.branch.parameters

    def __call__(self, X):
        if self.name == "ddl":
            return delta.delta(X, self.branch(X), X, **self.own, k_eps=1e-5, v_scale=4.0)
        return FORMULAS[self.name](X, self.heads, self.own)


LAYERS = {k: functools.partial(Heads, k) for k in HEADS}
LAYERS |= {k: functools.partial(Layer, k) for k in (*FORMULAS, "ddl")}
