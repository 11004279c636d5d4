"""RRAE: an autoencoder whose latent batch is truncated to rank k; not a mixer.

    Y = U diag(s) Vᵀ (L, B), the latent vectors of a batch as columns;   Ỹ = U_k diag(s_k) V_kᵀ

Source: arXiv 2405.13980 and its code.  Cost: one SVD.
Gradient, ours: U₁, V₁ the kept singular vectors, U₂, V₂ the dropped ones, ρ_ij = s_j/s_i ≤ 1,

    dY = U₁U₁ᵀG + G V₁V₁ᵀ − U₁U₁ᵀ G V₁V₁ᵀ + U₁ E V₂ᵀ + U₂ Fᵀ V₁ᵀ,   a = U₁ᵀGV₂,  b = (U₂ᵀGV₁)ᵀ
    E = (ρ² ∘ a + ρ ∘ b)/(1 − ρ²),   F = (ρ² ∘ b + ρ ∘ a)/(1 − ρ²)

the projection to the tangent space of the matrices of rank k, and their curvature, in which only
the gap s_k > s_{k+1} divides.  Without a gap there is no derivative; the projection is returned.
Beside OSA: a spectral function has a gradient made of divided differences, so, as for exp, never
differentiate the eigenvectors: it stays exact where singular values are equal.
"""

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped


@shaped(Y="... L B")
def truncate(Y, k):
    """The best approximation of Y (..., L, B) of rank k, 1 ≤ k ≤ min(L, B)."""
    if not 1 <= k <= min(Y.shape[-2:]):
        raise ValueError(f"k must be in 1 … {min(Y.shape[-2:])} for Y of {Y.shape}, got {k}")
    k = int(k)

    def forward(Y):
        U, s, Vt = array_module(Y).linalg.svd(Y, full_matrices=False)
        return (U[..., :k] * s[..., None, :k]) @ Vt[..., :k, :], (U, s, Vt)

    return ag.operator(forward, lambda G, saved: [_backward(G, k, *saved)])(Y)


def _backward(G, k, U, s, Vt):
    U1, U2, V1t, V2t = U[..., :k], U[..., k:], Vt[..., :k, :], Vt[..., k:, :]
    U1tG, GV1 = T(U1) @ G, G @ T(V1t)
    a, b = U1tG @ T(V2t), T(GV1) @ U2  # (..., k, dropped)
    kept, dropped = s[..., :k, None], s[..., None, k:]
    size, tied = kept + (kept == 0), (kept == dropped).astype(s.dtype)
    rho, gap = dropped / size, (kept - dropped) / size  # 1 − ρ² = gap (1 + ρ)
    curve = (1 - tied) * rho / ((gap + tied) * (1 + rho))
    E, F = curve * (rho * a + b), curve * (rho * b + a)
    return U1 @ (U1tG - U1tG @ T(V1t) @ V1t + E @ V2t) + (GV1 + U2 @ T(F)) @ V1t
