"""Softmax attention, what everything here is compared with.

    O = softmax(Q Kᵀ/√d) V, each row over all keys, or over those up to the token itself

Source: Vaswani et al., arXiv 1706.03762.  Shapes: Q, K (..., N, d), V (..., N, m) -> (..., N, m).
Cost: N² (d + m).  Causal: both.  Assumes a skip and norm: each row is an average, and averages of
averages lose what distinguishes the tokens.
Beside OSA: rows that sum to one (1 is a right eigenvector) against rows that are orthonormal.
"""

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped


def softmax(Q, K, V, *, causal=False):
    """(..., N, m) by the formulas above."""
    Q, K, V = shaped(Q=(Q, "... N d"), K=(K, "... N d"), V=(V, "... N m"))
    S = (Q * Q.shape[-1] ** -0.5) @ T(K)  # (..., N, N)
    if causal:
        xp, N = array_module(S), Q.shape[-2]
        S = S + xp.triu(xp.full((N, N), -xp.inf, S.dtype), 1)
    return ag.softmax(S) @ V
