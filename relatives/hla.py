"""Higher-order linear attention: powers of the unnormalised score matrix, by d × d matrices.

With W = Q Kᵀ, and for causal=True W = L ∘ Q Kᵀ, L lower triangular with its diagonal of ones:

    hla2 = (W Wᵀ)V,     ahla = (W W)V,     hla3 = (W Wᵀ)(W V)
    causal: ((W Wᵀ) ∘ L)V,   ((W W) ∘ L)V,   ((W Wᵀ) ∘ L)(W V)
    normalise = ε: divided by the same with V replaced by ones, plus ε

Source: arXiv 2510.27258, no code; scores without 1/√d.  Here each is a linear attention of linear
attentions, lin(Q, K, V) = W V.  Its Algorithm 3 is another operator than hla3: it keeps the index
triples whose largest index occurs twice.  Its decay γ, in two forms that disagree, is left out.
Cost: N d (d + m).  Causal: both, here with all N states in memory.
Assumes skip and norm: degree 5 (hla3: 7) in X.
Beside OSA: the same d × d Gram matrices, but a polynomial of the scores needs its scale from
outside, while the exponential of the antisymmetric part brings its own.
"""

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped

cumsum = ag.operator(  # over the tokens, (..., N, m)
    lambda a: (a.cumsum(axis=-2), None),
    lambda g, _: [g[..., ::-1, :].cumsum(axis=-2)[..., ::-1, :]],
)


def linear_attention(Q, K, V, causal=False):
    """Q (Kᵀ V), or o_t = q_tᵀ S_t with the states S_t = Σ_{s≤t} k_s v_sᵀ (..., N, d, m)."""
    if not causal:
        return Q @ (T(K) @ V)
    kv = K[..., None] * V[..., None, :]  # (..., N, d, 1) ∘ (..., N, 1, m)
    S = cumsum(kv.reshape(*K.shape[:-1], -1)).reshape(*kv.shape)
    return (Q[..., None, :] @ S)[..., 0, :]


def _order(name, f):
    @shaped(Q="... N d", K="... N d", V="... N m")
    def order(Q, K, V, *, causal=False, normalise=None):
        """(..., N, m) by the formulas above."""
        if normalise is not None:  # both in one pass
            V = ag.concatenate([V, array_module(V).ones((*V.shape[:-1], 1), V.dtype)])
        O = f(lambda *QKV: linear_attention(*QKV, causal), Q, K, V)
        return O if normalise is None else O[..., :-1] / (O[..., -1:] + float(normalise))

    order.__name__ = order.__qualname__ = name
    return order


hla2 = _order("hla2", lambda lin, Q, K, V: lin(Q, lin(Q, K, K), V))
ahla = _order("ahla", lambda lin, Q, K, V: lin(Q, K, lin(Q, K, V)))
hla3 = _order("hla3", lambda lin, Q, K, V: lin(Q, lin(Q, K, K), lin(Q, K, V)))
