"""Token statistics self-attention, TSSA: linear in N because no content moves between tokens.

    w = X W, split into h heads of width p:  w (..., h, N, p);  all sums over tokens n:
    m = τ_h Σ_c w²/Σ_n w²,    Π = softmax of m over the heads (..., h, N)
    D = Σ_n Π w²/(Σ_n Π + 1e-8) (..., h, 1, p),    O = −Π w/(1 + D),    heads joined, W_o + b_o

Source: ToST, arXiv 2412.17810 and its code; temp is τ, one for each head, Σ_n w² at least 1e-24, in
the causal form 1e-12.  Cost: N d beside X W and W_o.
Causal: both sums run over n' ≤ n; left out is the bias that the code then learns for each w²/Σ w².
Assumes pre-LayerNorm, a skip and LayerScale: it multiplies each entry of w by a number in (−1, 0).
Beside OSA: two opposite ways to be linear in N, only to rescale what each token holds (TSSA), or
only to move it (OSA).
"""

import autograd as ag
from relatives.hla import cumsum
from relatives.ops import T, join_heads, shaped, split_heads


@shaped(X="... N d", W="d d", temp="h 1", Wo="d d", bo="d")
def tssa(X, W, temp, Wo, bo=None, *, causal=False):
    """(..., N, d) by the formulas above."""
    total = cumsum if causal else lambda a: a.sum(axis=-2, keepdims=True)
    w = split_heads(X @ W, len(temp.data))  # (..., h, N, p)
    w2 = w * w
    m = (w2 / ag.maximum(total(w2), 1e-12 if causal else 1e-24)).sum(axis=-1) * temp  # (..., h, N)
    Pi = T(ag.softmax(T(m)))[..., None]  # over the heads
    dots = total(Pi * w2) / (total(Pi) + 1e-8)
    O = join_heads(w * Pi / (dots + 1) * -1.0) @ Wo
    return O if bo is None else O + bo
