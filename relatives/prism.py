"""PRISM: a recurrent state with a forgetting gate, one erasure and L writes a token.

    U = SiLU(causal depthwise convolution of X),   Q = U W_q,   V = U W_v,   α = σ(U w_a)
    k_l = u W_k[l],   p_l = u W_p[l],   b_l = u W_b[l]            for l = 1 … L
    r = v − u;   for each l:  δ_l = GELU(p_l ∘ r),  r ← r − δ_l   (the writes, by refinement)
    S ← α S (I − b_1 k_1 k_1ᵀ) + Σ_l b_l δ_l k_lᵀ,   y = S q,   out = y W_o

Source: arXiv 2602.10796v2, Algorithm 1 and Eq. 9–18; none of its authors' programs computes this
recurrence, and in one of them the writes never reach the output.  GELU is the exact one, with erf.
The last tap of cw is for the token itself.  Cost: N L d², here N d³, as the d × d transitions are
formed.  Causal: only.  Assumes LayerNorm, a skip and a gate: k is not normalised, S grows.
Beside OSA: a recurrence buys an order of time and pays with sequential code and no isometry; OSA
buys the isometry and pays with causality.
"""

import math

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped, sigmoid, silu
from relatives.pdssm import scan


def erf(x):
    """erf(x) to a few eps, which NumPy has not: the Fourier series of a square wave of half period
    12 smoothed by a Gaussian, which equals erf between −6 and 6 up to erfc(6) = 2e-17."""
    xp, waves = array_module(x), [n * math.pi / 12 for n in range(1, 49, 2)]
    return sum(math.exp(-w * w / 4) / (3 * w) * xp.sin(w * xp.clip(x, -6, 6)) for w in waves)


Phi = ag.operator(  # distribution function of the normal law
    lambda x: (0.5 * (1 + erf(x * 0.5**0.5)), x),
    lambda g, x: [g * array_module(x).exp(-0.5 * x * x) * (2 * math.pi) ** -0.5],
)


def gelu(x):
    """x Φ(x)"""
    return x * Phi(x)


@shaped(X="... N d", cw="d taps", cb="d", Wq="d d", Wv="d d", wa="d 1", Wk="L d d", Wp="L d d",
        Wb="L d 1", Wo="d d")  # fmt: skip
def prism(X, cw, cb, Wq, Wv, wa, Wk, Wp, Wb, Wo):
    """(..., N, d) by the formulas above."""
    xp, (*batch, N, d), taps = array_module(X), X.shape, cw.shape[1]
    X = ag.concatenate([xp.zeros((*batch, taps - 1, d), X.dtype), X], axis=-2)
    U = silu(sum(X[..., i : i + N, :] * cw[:, i] for i in range(taps)) + cb)  # (..., N, d)
    u = U[..., None, :, :]
    K, P, b = (T(u @ W, -3, -2) for W in (Wk, Wp, Wb))  # (..., N, L, d), the same, (..., N, L, 1)
    r, writes = (U @ Wv - U)[..., None, :], []
    for i in range(Wk.shape[0]):
        writes.append(gelu(P[..., i : i + 1, :] * r))
        r = r - writes[-1]
    J = T(b * ag.concatenate(writes, axis=-2)) @ K  # Σ_l b_l δ_l k_lᵀ (..., N, d, d)
    k = K[..., :1, :]
    A = sigmoid(U @ wa)[..., None] * (xp.eye(d, dtype=X.dtype) - b[..., :1, :] * (T(k) @ k))
    return (scan(A, J) @ (U @ Wq)[..., None])[..., 0] @ Wo
