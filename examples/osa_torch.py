"""Orthogonal self-attention (Zhang & Martens, arXiv 2602.05996) for PyTorch: copy this file alone.

Linear in N: exp(S) V, S = s (Q Kᵀ − K Qᵀ), s = α/√d_v, with no N × N matrix and no gradient of QR.
"""

import math

import torch


def times(A, B):
    """(A₀ + tA₁)(B₀ + tB₁) to first order in t, for A, B (1 or 2, batch, n, n): A₀, perhaps A₁."""
    AB = A[:1] @ B
    AB[1:] += A[1:] @ B[:1]
    return AB


@torch.library.custom_op("osa::exp_phi1", mutates_args=())  # for torch.compile: k is data
def exp_phi1(Z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E1 = exp(Z) − I and F = φ₁(Z) = ∫₀¹ e^{tZ} dt for [Z]; for [Z, D] also their derivatives.

    Taylor's series at X = Z/2ʲ, ‖X‖ ≤ ½; then j times e^{2X} − I = E1² + 2E1, φ₁(2X) = F + E1 F/2.
    """
    rows = Z[0].abs().sum(dim=-1).nan_to_num(0, 0)  # a bound of ‖Z‖; what is NaN stays NaN
    j = max(0, math.frexp(rows.max() if rows.numel() else 0)[1] + 1)
    I = (torch.eye(len(Z), 1)[..., None, None] * torch.eye(Z.shape[-1])).to(Z)  # [I] or [I, 0]
    X, terms = Z * 0.5**j, 9 if Z.dtype == torch.float32 else 15  # ½ⁿ/n! below eps
    F = I + X / terms
    for n in range(terms - 1, 1, -1):  # Horner: φ₁(X) = I + X/2 (I + X/3 (I + …))
        F = I + times(X, F) / n
    E1 = times(X, F)
    for _ in range(j):
        E1, F = times(E1, E1) + 2 * E1, F + times(E1, F) / 2
    return E1, F


exp_phi1.register_fake(lambda Z: (Z.new_empty(Z.shape), Z.new_empty(Z.shape)))


class OSA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, P, V, s):
        """Theorem 2.1: P = [Q, K] = B R (b, N, r), S = B S_B Bᵀ; O = V + B (exp(S_B) − I) BᵀV."""
        I = torch.eye(min(P.shape[1:]), dtype=P.dtype, device=P.device).expand(len(P), -1, -1)
        B, R = torch.linalg.qr(P) if P.shape[1] > P.shape[2] else (I, P)  # N ≤ r: S is small
        (BtQ, BtK), BtV = R.chunk(2, dim=-1), B.mT @ V
        U = BtQ @ BtK.mT - BtK @ BtQ.mT  # S_B = s U
        ctx.save_for_backward(V, s, B, BtV, U, s * torch.cat([BtK, -BtQ], dim=-1))
        return torch.baddbmm(V, B, exp_phi1((s * U)[None])[0][0] @ BtV)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dO):
        """[dQ, dK] = H W, H = B(L−Lᵀ) + (dO − B BᵀdO)(F BᵀV)ᵀ − (V − B BᵀV)(Fᵀ BᵀdO)ᵀ."""
        V, s, B, BtV, U, W = ctx.saved_tensors
        with torch.autocast(dO.device.type, enabled=False):
            BtdO = B.mT @ dO
            (E1t, L), (Ft, _) = exp_phi1(torch.stack([-s * U, BtdO @ BtV.mT]))  # at S_Bᵀ
            y, z = (Ft.mT @ BtV).mT @ W, (Ft @ BtdO).mT @ W  # H (N, r) itself is not formed
            dP = torch.baddbmm(dO @ y, B, (L - L.mT) @ W - BtdO @ y + BtV @ z)
            dP.baddbmm_(V, z, alpha=-1)
            return dP, torch.baddbmm(dO, B, E1t @ BtdO), (L * U).sum(dim=(-2, -1), keepdim=True)


def osa(Q, K, V, alpha):
    """A V (..., N, m) for Q, K (..., N, d_v) and V (..., N, m) of one dtype, halves by float32.

    alpha: a number, or a tensor that broadcasts to (..., 1, 1).  Padding: zero rows of Q and K.
    """
    fits = Q.ndim > 1 and Q.shape == K.shape and Q.shape[:-1] == V.shape[:-1]
    if not (fits and Q.is_floating_point() and Q.dtype == K.dtype == V.dtype):
        got = "; ".join(f"{M.dtype} {tuple(M.shape)}" for M in (Q, K, V))
        raise ValueError(f"Q, K (..., N, d_v) and V (..., N, m) need one float dtype, got {got}")
    batch, dtype = Q.shape[:-2], torch.promote_types(Q.dtype, torch.float32)
    s = torch.as_tensor(alpha, dtype=dtype, device=Q.device) / math.sqrt(Q.shape[-1])
    if s.ndim > Q.ndim or any(a not in (1, n) for a, n in zip(s.shape[::-1], (1, 1, *batch[::-1]))):
        raise ValueError(f"alpha must broadcast to {(*batch, 1, 1)}, got {tuple(s.shape)}")
    with torch.autocast(Q.device.type, enabled=False):
        P, V_ = (M.to(dtype).reshape(-1, *M.shape[-2:]) for M in (torch.cat([Q, K], dim=-1), V))
        return OSA.apply(P, V_, s.expand(*batch, 1, 1).reshape(-1, 1, 1)).to(V).view_as(V)
