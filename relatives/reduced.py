"""The transformer reduced to a minimum: softmax attention with merged, shared or omitted matrices.

    full        Wq Wk Wv Wo    scores (X W_q)(X W_k)ᵀ √(h/d),      output [softmax X W_v, …] W_o
    symmetric   Wq Wv Wo       (X W_q)(X W_q)ᵀ √(h/d), W_k = W_q
    merged      Wqk Wv Wo      (X W_qk) Xᵀ/√d, one head
    Cholesky    T_ Wv Wo       X T Tᵀ Xᵀ/√d, T lower triangular, one head
    without Wv and Wo, each    values X, no W_o

Source: arXiv 2410.13732v2, text.  Above its diagonal T_ is not read.
Cost: N² d.  Causal: as softmax, not here.  Assumes a skip and norm, as softmax.
Beside OSA: the scores split into a symmetric and an antisymmetric half; this keeps the first and
finds it enough for softmax, OSA keeps the second, for which W_k = W_q is the identity.
"""

from autograd import array_module
from relatives.ops import join_heads, shaped, split_heads
from relatives.softmax import softmax


@shaped(X="... N d", **dict.fromkeys("Wq Wk Wqk T_ Wv Wo".split(), "d d"))
def reduced(X, *, Wq=None, Wk=None, Wqk=None, T_=None, Wv=None, Wo=None, heads=1):
    """(..., N, d) by the formulas above; the weights that are given choose among them."""
    if sum(W is not None for W in (Wq, Wqk, T_)) != 1 or (Wk and not Wq) or (heads > 1 and not Wq):
        raise ValueError("reduced takes Wq, Wq and Wk, Wqk or T_, and several heads with Wq alone")
    if T_:
        Wq = T_ * array_module(X).tril(array_module(X).ones(T_.shape, X.dtype))
    Q = X @ (Wqk or Wq)
    K = X if Wqk else X @ Wk if Wk else Q
    V = X @ Wv if Wv else X
    O = join_heads(softmax(*(split_heads(M, heads) for M in (Q, K, V))))
    return O @ Wo if Wo else O
