"""Theorem 2.1 by matrix products with no look at a number: route "products", made for a GPU.

Choosing a series by ‖S‖, or QR where rounding demands it, the host has to wait for the device.
Here every matrix gets what it needs on the device itself: k squarings of its own for exp, and a
basis by Cholesky factors of r × r matrices.  What cannot be done right is NaN, not a wrong number.
"""

import functools
import math

import numpy as np

from autograd import array_module

# Squarings that are always done: ‖S‖₂ may be 1000 for r ≤ 512, and 2 ** SQUARINGS at most.
SQUARINGS = 12


def _T(M):
    return M.swapaxes(-1, -2)


def unit_columns(M):
    """M (..., N, r) with columns of norm 1 or 0: the same span, and no square underflows."""
    xp = array_module(M)
    largest = abs(M).max(axis=-2, keepdims=True)
    M = M / xp.where(largest > 0, largest, 1)  # columns of norm 1 … √N
    return M / xp.sqrt(xp.maximum(_squares(M), 1))


def cholesky_basis(P):
    """B (..., N, r) that serves as orthonormal basis of P (..., N, r), r ≤ N, in Theorem 2.1.

    B ← B L⁻ᵀ with L Lᵀ = BᵀB + δI makes those singular values 1 that are well above √δ, and three
    times those of P down to its rounding (shifted Cholesky QR, arXiv 1809.11085).  Along what is
    smaller still S vanishes to rounding, so there B need not be orthonormal.
    """
    B = P = unit_columns(P)
    xp, (N, r), eps = array_module(P), P.shape[-2:], float(np.finfo(P.dtype).eps)
    shift = eps * (4 * r + math.sqrt(N)) * xp.eye(r, dtype=P.dtype)
    for _ in range(3):
        B = B @ _T(xp.linalg.inv(xp.linalg.cholesky(_T(B) @ B + shift)))
    B = 1.5 * B - 0.5 * B @ (_T(B) @ B)  # a step of Newton–Schulz squares what δ left
    # A factorisation fails without a word in CuPy; then ‖Bᵀp‖ = ‖p‖ does not hold for all columns.
    lost = abs(_squares(_T(B) @ P) - _squares(P)).max(axis=-1, keepdims=True)
    return xp.where(lost <= eps * (100 + 4 * math.sqrt(N)), B, math.nan)


def _squares(M):
    """‖·‖² of each column of M (..., N, r), (..., 1, r)."""
    return (M * M).sum(axis=-2, keepdims=True)


class Products:
    """f(S) W for skew-symmetric S (..., n, n), f = exp or φ₁; exp(S) = exp(S/2ᵏ)^(2ᵏ).

    f: None for exp, anything else for φ₁; `adjoint` is that of exp.  Used like
    `osa_minimal.Chebyshev`.
    """

    def __init__(self, S, W, rho=None, f=None):
        self.S, self.W = S, W
        with np.errstate(over="ignore", invalid="ignore"):
            S2 = S @ S
            # (Σθ⁴)^¼ ≥ ‖S‖₂ for the eigenvalues ±iθ of S; 1.01 for its rounding
            self.rho = 1.01 * ((S2 * S2).sum(axis=(-2, -1), keepdims=True) / 2) ** 0.25
        if f is None:
            self.matrix = self.exp(S)
        else:  # φ₁(S) is a corner of exp([[S, I], [0, 0]])
            self.matrix = self.corner(S, array_module(S).eye(S.shape[-1], dtype=S.dtype), 0)
        self.value = self.matrix @ W

    def adjoint(self, G):
        """exp(S)ᵀ G and L(Sᵀ, G Wᵀ), the gradients of ⟨G, exp(S) W⟩.

        L(S, E) is a corner of exp([[S, E], [0, S]]).
        """
        return _T(self.matrix) @ G, self.corner(_T(self.S), G @ _T(self.W), _T(self.S))

    def corner(self, A, E, D):
        """The upper right quarter of exp([[A, E], [0, D]]), which is linear in E."""
        n = A.shape[-1]
        X = array_module(A, E).zeros((*A.shape[:-2], 2 * n, 2 * n), A.dtype)
        X[..., :n, :n], X[..., :n, n:], X[..., n:, n:] = A, E, D
        return self.exp(X)[..., :n, n:]

    def exp(self, X):
        """Taylor's polynomial of X/2ᵏ, ‖S‖₂ ≤ 2ᵏ, as one in its fourth power; then k squarings."""
        xp = array_module(X)
        k = xp.ceil(xp.log2(xp.maximum(self.rho, 1)))
        X = X * xp.where(self.rho <= 2.0**SQUARINGS, 0.5**k, math.nan)
        powers = xp.empty((4, *X.shape), X.dtype)
        powers[0], powers[1] = xp.eye(X.shape[-1], dtype=X.dtype), X
        for i in (2, 3):
            xp.matmul(powers[i - 1], X, out=powers[i])
        *terms, E = xp.tensordot(_taylor(xp, X.dtype), powers, axes=1)
        X4 = powers[2] @ powers[2]
        for term in reversed(terms):
            E = E @ X4 + term
        more = k > xp.arange(SQUARINGS, dtype=X.dtype).reshape(-1, *(1,) * k.ndim)
        for i in range(SQUARINGS):
            E = xp.where(more[i], E @ E, E)
        return E


@functools.cache
def _taylor(xp, dtype):
    """1/(4i + j)!, moved once: the remainder and its derivative are below eps where ‖X‖ ≤ 1."""
    groups = 3 if dtype == np.float32 else 5
    a = [[1 / math.factorial(4 * i + j) for j in range(4)] for i in range(groups)]
    return xp.asarray(np.array(a, dtype))
