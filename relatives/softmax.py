"""Softmax attention, what everything here is compared with.

    O = softmax(Q Kᵀ/√d) V, each row over all keys, or over those up to the token itself

Source: Vaswani et al., arXiv 1706.03762.  Cost: N² (d + m).  Causal: both.
Assumes a skip and norm: an average, without skips it turns all tokens into one, layer by layer.
Beside OSA: rows that sum to one (1 is a right eigenvector) against rows that are orthonormal.
"""

import numpy as np

import autograd as ag
from autograd import array_module
from fast.gpu import product
from osa_minimal import MultiHeadOSA, random_orthogonal, tensors
from relatives.ops import T, shaped


def softmax_forward(Q, K, V, causal=False):
    """O (..., N, m) of arrays, and what its backward needs."""
    xp, (N, d) = array_module(Q, K, V), Q.shape[-2:]
    A = product(Q * d**-0.5, T(K))  # (..., N, N)
    if causal:
        A += xp.triu(xp.full((N, N), -xp.inf, A.dtype), 1)
    A -= A.max(axis=-1, keepdims=True)
    xp.exp(A, out=A)
    A /= A.sum(axis=-1, keepdims=True)
    return product(A, V), (Q, K, V, A)


def softmax_backward(dO, saved):
    """dQ, dK, dV:  dV = Aᵀ dO,  dS = A ∘ (dO Vᵀ − ⟨dO, O⟩ per row),  O = A V."""
    Q, K, V, A = saved
    dS = product(dO, T(V))
    dS -= (dS * A).sum(axis=-1, keepdims=True)
    dS *= A
    dS *= Q.shape[-1] ** -0.5
    return product(dS, K), product(T(dS), Q), product(T(A), dO)


@shaped(Q="... N d", K="... N d", V="... N m")
def softmax(Q, K, V, *, causal=False):
    """O (..., N, m) by the formula above."""
    return ag.operator(lambda *QKV: softmax_forward(*QKV, causal), softmax_backward)(Q, K, V)


# The same for a layer, of [Q, K, V] (B, h, N, 3 d_v) in one array.
softmax_attention = ag.operator(
    lambda QKV: softmax_forward(*array_module(QKV).split(QKV, 3, axis=-1)),
    lambda dO, saved: [array_module(dO).concatenate(softmax_backward(dO, saved), axis=-1)],
)


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

    def attend(self, QKV):
        return softmax_attention(QKV)
