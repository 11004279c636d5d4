"""Softmax attention, what everything here is compared with.

    O = softmax(Q Kᵀ/√d) V, each row over all keys, or over those up to the token itself

Source: Vaswani et al., arXiv 1706.03762.  Shapes: Q, K (..., N, d), V (..., N, m) -> (..., N, m).
Cost: N² (d + m).  Causal: both.  Assumes a skip and norm: A is positive with rows of sum 1, it
averages, and without skips it turns all tokens into one, layer by layer.
Beside OSA: rows that sum to one (1 is a right eigenvector) against rows that are orthonormal.
"""

import numpy as np

import autograd as ag
from autograd import array_module
from fast.gpu import product
from osa_minimal import MultiHeadOSA, random_orthogonal, tensors
from relatives.ops import T, shaped


def softmax(Q, K, V, *, causal=False):
    """(..., N, m) by the formula above."""
    Q, K, V = shaped(Q=(Q, "... N d"), K=(K, "... N d"), V=(V, "... N m"))
    S = (Q * Q.shape[-1] ** -0.5) @ T(K)  # (..., N, N)
    if causal:
        xp, N = array_module(S), Q.shape[-2]
        S = S + xp.triu(xp.full((N, N), -xp.inf, S.dtype), 1)
    return ag.softmax(S) @ V


# The same for the layer, not causal, on one array, with its backward pass by hand.
def softmax_forward(F):
    """softmax(Q Kᵀ/√d_v) V from F = [Q, K, V] (..., N, 3 d_v), and what its backward needs."""
    xp = array_module(F)
    if F.ndim < 2 or F.shape[-1] % 3 or not F.size:
        raise ValueError(f"F must be (..., N, 3 d_v), not empty, got shape {F.shape}")
    d_v = F.shape[-1] // 3
    Q, K, V = (F[..., i : i + d_v] for i in (0, d_v, 2 * d_v))
    A = product(Q * d_v**-0.5, T(K))  # (..., N, N)
    A -= A.max(axis=-1, keepdims=True)
    xp.exp(A, out=A)
    A /= A.sum(axis=-1, keepdims=True)
    return product(A, V), (F, A)


def softmax_backward(dO, saved):
    """dF for dO (..., N, d_v):  dV = Aᵀ dO,  dS = A ∘ (dO Vᵀ − ⟨dO, O⟩ per row),  O = A V."""
    F, A = saved
    d_v, xp = F.shape[-1] // 3, array_module(F)
    Q, K, V = (F[..., i : i + d_v] for i in (0, d_v, 2 * d_v))
    dS = product(dO, T(V))
    dS -= (dS * A).sum(axis=-1, keepdims=True)
    dS *= A
    dS *= d_v**-0.5
    parts = (dS, K), (T(dS), Q), (T(A), dO)  # dQ, dK, dV
    return [xp.concatenate([product(*part) for part in parts], axis=-1)]


softmax_attention = ag.operator(softmax_forward, softmax_backward)


class Softmax(MultiHeadOSA):
    """The paper's layer with softmax attention in place of the rotation."""

    def __init__(self, d, heads, rng, xp=np, dtype=np.float32):
        if heads == 1:  # OSA alone needs two: W_Q and W_K are orthogonal each, not [W_Q, W_K]
            W_Q, W_K, W_V, W_O = (random_orthogonal(d, d, rng, dtype) for _ in range(4))
            init = {"W_QK": np.concatenate([W_Q, W_K], axis=1)[None], "W_V": W_V, "W_O": W_O}
            self.heads, self.parameters = heads, tensors(init, xp)
        else:
            super().__init__(d, heads, rng, xp, dtype)
            del self.parameters["alpha"]

    def attend(self, F):
        return softmax_attention(F)
