"""Exclusive self-attention, XSA: softmax attention without its part along the token's own value.

    Y = softmax(Q Kᵀ/√d) V,    v̂ = v/max(‖v‖, 1e-12),    z = y − (y·v̂) v̂    per token and head

Source: Zhai, arXiv 2603.09078, Algorithm 1.  Cost: softmax's and N m.  Causal:
both; the first token then gets 0.  Assumes a skip, which carries what is removed: where attention
is near the identity, y ≈ v and nearly all is removed.
Beside OSA: the opposite start, A far from the identity where a skip brings it back, against A ≈ I
where there is no skip.
"""

import autograd as ag
from relatives.ops import shaped
from relatives.softmax import Softmax, softmax, softmax_attention


def exclude(Y, V):
    """Y without its part along V, token by token."""
    norm2 = ag.maximum((V * V).sum(axis=-1, keepdims=True), 1e-24)
    return Y - V * ((Y * V).sum(axis=-1, keepdims=True) / norm2)


@shaped(Q="... N d", K="... N d", V="... N m")
def xsa(Q, K, V, *, causal=False):
    """(..., N, m) by the formulas above."""
    return exclude(softmax(Q, K, V, causal=causal), V)


class XSA(Softmax):
    """The paper's layer with exclusive self-attention."""

    def attend(self, QKV):
        return exclude(softmax_attention(QKV), QKV[..., 2 * (QKV.shape[-1] // 3) :])
