"""CHELA, a reconstruction: short and long convolution, linear attention, a gate.

The authors' formulas and code could not be had; this is the published description, with details in
the manner of Mega that are ours, and no evidence about the authors' model:

    U = depthwise convolution of X with k_long + k_short;   Z = SiLU(U)
    Q = Z ∘ g_q + b_q,  K = Z ∘ g_k + b_k,  V = SiLU(X W_v + b_v),   O = Q (Kᵀ V)/N
    out = (O ∘ SiLU(Z W_g + b_g)) W_o + b_o           causal: o_t = q_tᵀ Σ_{s≤t} k_s v_sᵀ/t

Source of the idea: arXiv 2406.08128.  kl is for the lags −(N−1) … N−1, causal 0 … N−1; ks, of odd
length, for those around 0, causal 0 … taps − 1.
Cost: N log N · d + N d².  Causal: both.  Assumes a gated residual around it.
Beside OSA: position by a convolution, content by a rank-d product, and nothing controls the norm.
"""

import autograd as ag
from autograd import array_module
from relatives.circulant import correlate
from relatives.hla import linear_attention
from relatives.ops import shaped, silu


@shaped(X="... N d", kl="d lags", ks="d taps", gq="d", bq="d", gk="d", bk="d", Wv="d d", bv="d",
        Wg="d d", bg="d", Wo="d d", bo="d")  # fmt: skip
def chela(X, kl, ks, gq, bq, gk, bk, Wv, bv, Wg, bg, Wo, bo, *, causal=False):
    """(..., N, d) by the formulas above."""
    xp, N, d, taps = array_module(X), *X.shape[-2:], ks.shape[1]
    lags = N if causal else 2 * N - 1
    if kl.shape[1] != lags:
        raise ValueError(f"kl must have {lags} lags, got shape {kl.shape}")
    if taps > lags or not (causal or taps % 2):
        raise ValueError(f"ks must have an odd number of taps up to {lags}, got shape {ks.shape}")
    kernel = kl + ks @ xp.eye(taps, lags, 0 if causal else N - 1 - taps // 2, dtype=X.dtype)
    # As a correlation on a circle of 2N − 1: the kernel from its last lag, N − 1, to its first, and
    # as many zeros before X.
    none = xp.zeros((d, 2 * N - 1 - lags), X.dtype)
    kernel = ag.concatenate([kernel[:, ::-1], none]).transpose()
    past = xp.zeros((*X.shape[:-2], N - 1, d), X.dtype)
    U = correlate(kernel, ag.concatenate([past, X], axis=-2), (1, 2 * N - 1))[..., :N, :]
    Z, V = silu(U), silu(X @ Wv + bv)
    O = linear_attention(Z * gq + bq, Z * gk + bk, V, causal)
    O = O / (xp.arange(1, N + 1, dtype=X.dtype)[:, None] if causal else N)
    return (O * silu(Z @ Wg + bg)) @ Wo + bo
