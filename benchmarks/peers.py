"""Orthogonal self-attention as one would write it in PyTorch, for comparison: under autograd.

Each function takes Q, K, V (b, N, d_v) and α and returns exp(S) V, S = (α/√d_v)(Q Kᵀ − K Qᵀ).
`osa`, which is examples/osa_torch.py, has its own backward pass.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from osa_torch import osa  # noqa: E402


def _orthonormal_route(B, Q, K, V, s):
    BQ, BK = B.mT @ Q, B.mT @ K
    small = BQ @ BK.mT
    E = torch.linalg.matrix_exp(s * (small - small.mT)) - torch.eye(B.shape[-1], dtype=B.dtype)
    return V + B @ (E @ (B.mT @ V))


def naive(Q, K, V, alpha):
    """exp of the N × N matrix."""
    S = Q @ K.mT
    return torch.linalg.matrix_exp(alpha / math.sqrt(Q.shape[-1]) * (S - S.mT)) @ V


def qr(Q, K, V, alpha):
    """Theorem 2.1 with the basis by QR; autograd goes through the QR."""
    B = torch.linalg.qr(torch.cat([Q, K], dim=-1)).Q
    return _orthonormal_route(B, Q, K, V, alpha / math.sqrt(Q.shape[-1]))


def newton_schulz(Q, K, V, alpha, steps=10):
    """Theorem 2.1 with the basis by Newton–Schulz; autograd goes through the iteration."""
    B = torch.cat([Q, K], dim=-1)
    B = B / torch.linalg.matrix_norm(B, keepdim=True)
    for _ in range(steps):
        B = 1.5 * B - 0.5 * B @ (B.mT @ B)
    return _orthonormal_route(B, Q, K, V, alpha / math.sqrt(Q.shape[-1]))


def basis_free(Q, K, V, alpha):
    """V + P sJ φ₁(sGJ) PᵀV, with φ₁(Z) W from the corner of exp([[Z, W], [0, 0]])."""
    s, d = alpha / math.sqrt(Q.shape[-1]), Q.shape[-1]
    P = torch.cat([Q, K], dim=-1)
    G, W = P.mT @ P, P.mT @ V
    Z = s * torch.cat([-G[..., d:], G[..., :d]], dim=-1)  # sGJ
    top = torch.cat([Z, W], dim=-1)
    bottom = torch.zeros(*Z.shape[:-2], W.shape[-1], top.shape[-1], dtype=Z.dtype)
    y = torch.linalg.matrix_exp(torch.cat([top, bottom], dim=-2))[..., : 2 * d, 2 * d :]
    return V + P @ (s * torch.cat([y[..., d:, :], -y[..., :d, :]], dim=-2))  # sJy


def fused_softmax(Q, K, V, alpha=None):
    """PyTorch's own kernel."""
    return torch.nn.functional.scaled_dot_product_attention(Q, K, V)


PEERS = {
    "naive N x N matrix_exp": naive,
    "QR + matrix_exp": qr,
    "Newton-Schulz (10) + matrix_exp": newton_schulz,
    "basis-free, augmented matrix_exp": basis_free,
    "osa_torch (gauge-free backward)": osa,
}
