"""Exclusive self-attention (Zhai, arXiv 2603.09078): softmax's output without its part along v.

z = y − (y·v̂) v̂,  v̂ = v / max(‖v‖, 1e-12), per token and head.  It leaves to a skip connection
what a token has to say of itself; where there is none and A ≈ I, y ≈ v and nearly nothing is left.
"""

import autograd as ag
from relatives.softmax import Softmax, softmax_attention


class XSA(Softmax):
    """The paper's layer with exclusive self-attention."""

    def attend(self, F):
        y, v = softmax_attention(F), F[..., 2 * (F.shape[-1] // 3) :]
        norm2 = ag.maximum((v * v).sum(axis=-1, keepdims=True), 1e-24)
        return y - v * ((y * v).sum(axis=-1, keepdims=True) / norm2)
