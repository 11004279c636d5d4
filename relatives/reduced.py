"""The transformer reduced to a minimum: softmax attention with merged, shared or omitted matrices.

    variant          weights        scores, times √(h/d)              values, output
    full, full2 …    Wq Wk Wv Wo    (X W_q)(X W_k)ᵀ                   X W_v, W_o
    sym, sym2 …      Wq Wv Wo       (X W_q)(X W_q)ᵀ, W_k = W_q        X W_v, W_o
    qk               Wqk Wv Wo      (X W_qk) Xᵀ                       X W_v, W_o
    cholesky         T_ Wv Wo       X T Tᵀ Xᵀ, T lower triangular     X W_v, W_o
    qk_novo, cholesky_novo          as above                          X, no W_o

A number behind "full" and "sym" is that of the heads h, 1 by default; the others have one.
Source: arXiv 2410.13732v2, text.  Shapes: X (..., N, d), all weights (d, d); above its diagonal T_
is not read.  Cost: N² d.  Causal: as softmax, not here.  Assumes a skip and norm, as softmax.
Beside OSA: the scores split into a symmetric and an antisymmetric half; this keeps the first and
finds it enough for softmax, OSA keeps the second, for which W_k = W_q is the identity.
"""

import re

from autograd import array_module
from relatives.ops import join_heads, shaped, split_heads
from relatives.softmax import softmax

WEIGHTS = {"full": "Wq Wk Wv Wo", "sym": "Wq Wv Wo", "qk": "Wqk Wv Wo", "qk_novo": "Wqk"}
WEIGHTS |= {"cholesky": "T_ Wv Wo", "cholesky_novo": "T_"}


def reduced(X, variant, **weights):
    """(..., N, d) by the formulas above; weights as named in the table."""
    name, heads = re.fullmatch(r"(.*?)(\d*)", variant).groups()
    if name not in WEIGHTS or heads and name not in ("full", "sym"):
        raise ValueError(f"variant must be one of {', '.join(WEIGHTS)}, got {variant!r}")
    if set(weights) != set(WEIGHTS[name].split()):
        raise ValueError(f"weights of {variant!r} are {WEIGHTS[name]}, got {' '.join(weights)}")
    X, *W = shaped(X=(X, "... N d"), **{k: (w, "d d") for k, w in weights.items()})
    w, xp, d = dict(zip(weights, W)), array_module(X), X.shape[-1]
    if "T_" in w:
        w["Wq"] = w["T_"] * xp.tril(xp.ones((d, d), X.dtype))
    Q = X @ (w["Wqk"] if "Wqk" in w else w["Wq"])
    K = X if "Wqk" in w else X @ w["Wk"] if "Wk" in w else Q
    V = X @ w["Wv"] if "Wv" in w else X
    O = join_heads(softmax(*(split_heads(M, int(heads or 1)) for M in (Q, K, V))))
    return O @ w["Wo"] if "Wo" in w else O
