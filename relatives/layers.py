"""The relatives as layers of a network, X (B, N, d) -> (B, N, d), built as `MultiHeadOSA` is.

`LAYERS[name](d, heads, rng, xp, dtype, tokens=N)`; each starts as near to orthogonal as its formula
allows.  "prism" and "pdssm" read the tokens in order; the others, causal form or not, see them all.
"""

import functools
import math

import numpy as np

from osa_minimal import MultiHeadOSA, random_orthogonal, tensors
from relatives import cayley, chela, circulant, hla, monarch, pdssm, prism, reduced, tost

HEADS = {  # O from Q, K, V (B, h, N, d_v) and the α (h, 1, 1) of OSA's S; 1/N² for the size of V
    "cayley": lambda Q, K, V, a: cayley.cayley(Q, K, V, a * (2 * math.sqrt(Q.shape[-2]))),
    "hla2": lambda Q, K, V, a: hla.hla2(Q, K, V * Q.shape[-2] ** -2.0),
    "ahla": lambda Q, K, V, a: hla.ahla(Q, K, V * Q.shape[-2] ** -2.0),
}


def recipes(d, h, N, U):
    """{name: (function, sizes of its weights beside d and h, arguments)}: matrices are orthogonal,
    vectors 0, where no argument says otherwise; None leaves a weight out."""
    rows = max(n for n in range(1, math.isqrt(N) + 1) if N % n == 0)
    grid, n = (rows, N // rows), d // 2  # the squarest grid of the tokens; states of PD-SSM
    blocks = dict(zip("ksrqpl", (rows, rows, rows, N // rows, N // rows, N // rows)))
    gate = {"Wg": 0, "bg": 1.27846454}  # SiLU(bg) = 1: open
    Wqkv, Wk = np.hstack([U(d, d), U(d, d), U(d, d)]), [U(d, d), U(d, d)] / np.sqrt(d)  # |k| = 1
    re, im = np.split(U(d, 2 * n), 2, axis=1)  # with C = Bᴴ a token reads itself unchanged
    states = {"Bre": re, "Bim": im, "Cre": re.T, "Cim": -im.T}
    alone = gate | {"kl": 0, "ks": (0, 1, 0), "gq": 1, "gk": 1}  # each token convolved to itself
    return {
        "tost": (tost.tssa, {}, {"temp": 1}),
        "circulant": (circulant.circulant, {"3d": 3 * d}, gate | {"Wqkv": Wqkv, "grid": grid}),
        "prism": (prism.prism, {"taps": 3, "L": 2}, {"cw": (0, 0, 1), "wa": 0, "Wk": Wk}),
        "pdssm": (pdssm.pdssm, {"H": d, "K": 6, "n": n}, states),
        "monarch": (monarch.monarch, blocks, {}),
        "chela": (chela.chela, {"lags": 2 * N - 1, "taps": 3}, alone),
        "symmetric": (reduced.reduced, {}, {"Wk": None, "Wqk": None, "T_": None, "heads": h}),
    }


class Heads(MultiHeadOSA):
    """HEADS[name] between W_QK, W_V and W_O."""

    def __init__(self, name, *args, tokens=None, **kw):
        super().__init__(*args, **kw)
        self.formula, self.alpha = HEADS[name], self.parameters["alpha"]
        if name != "cayley":
            del self.parameters["alpha"]

    def attend(self, QKV):
        d_v = QKV.shape[-1] // 3
        return self.formula(*(QKV[..., i : i + d_v] for i in (0, d_v, 2 * d_v)), self.alpha)


class Layer:
    """The function of a recipe with its weights."""

    def __init__(self, name, d, heads, rng, xp=np, dtype=np.float32, *, tokens):
        U = functools.partial(random_orthogonal, rng=rng, dtype=np.float64)
        self.function, sizes, given = recipes(d, heads, tokens, U)[name]
        sizes, weights, self.keywords = {"1": 1, "d": d, "h": heads} | sizes, {}, dict(given)
        for key, letters in list(self.function.shapes.items())[1:]:  # all but X
            shape = [sizes.get(x) for x in letters.split()]
            w = self.keywords.pop(key, 0)
            if key not in given and len(shape) > 1:
                w = np.reshape([U(*shape[-2:]) for _ in range(math.prod(shape[:-2]))], shape)
            if w is not None:
                weights[key] = np.array(np.broadcast_to(w, shape), dtype)
        self.parameters = tensors(weights, xp)

    def __call__(self, X):
        return self.function(X, **self.parameters, **self.keywords)


LAYERS = {k: functools.partial(Heads, k) for k in HEADS}
for _name in ("tost", "circulant", "prism", "pdssm", "monarch", "chela", "symmetric"):
    LAYERS[_name] = functools.partial(Layer, _name)
