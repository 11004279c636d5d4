"""Bases for Theorem 2.1 by matrix products and small Cholesky factors, which never wait for a GPU.

What cannot be done right is NaN, not a wrong number.  On a CPU "auto" uses `double_basis` too.
"""

import functools
import math

import numpy as np

from autograd import array_module
from fast.gpu import product
from osa_minimal import T as transpose

# A GPU sums over tokens in blocks of ROWS to 2 ROWS rows, where N has such a divisor.
ROWS = 1024


def tall_product(A, B):
    """AᵀB (..., r, m) for A (..., N, r) and B (..., N, m).

    On a GPU in blocks of rows that are summed up: cuBLAS gives each matrix of a batch to a few
    multiprocessors, however long the sum, and most of them would idle.
    """
    N = A.shape[-2]
    rows = next((n for n in range(ROWS, 2 * ROWS) if N % n == 0), N)
    if array_module(A, B) is np or rows == N:
        return product(transpose(A), B)
    A, B = (M.reshape(*M.shape[:-2], N // rows, rows, M.shape[-1]) for M in (A, B))
    return product(transpose(A), B).sum(axis=-3)


def column_size(M):
    """max |M| of each column of M (..., N, r), or 1 for a column of zeros, (..., 1, r)."""
    xp = array_module(M)
    largest = xp.maximum(M.max(axis=-2, keepdims=True), -M.min(axis=-2, keepdims=True))
    return xp.where(largest > 0, largest, 1)


def double_basis(P):
    """B (..., N, r) that serves as orthonormal basis of P (..., N, r), r ≤ N, in Theorem 2.1, both
    in float32, and R = BᵀP (..., r, r) in float64.

    B = P T with TᵀPᵀP T = I, T by Cholesky factors in float64: there the squares of float32 neither
    overflow nor underflow, and s R J Rᵀ is right also where nearly all of it cancels, as for K ≈ Q.
    R is taken before B is rounded to float32, which keeps those digits.  One factor reaches the
    singular values of P down to about 1e-6 of the largest, the second all that float32 can tell
    from 0; along the rest columns of B may be shorter than 1, and S vanishes.
    """
    array_module(P)  # TypeError for what is no array
    if P.dtype != np.float32 or P.ndim < 2:
        raise TypeError(f"P must be an array (..., N, r) of float32, got {P.dtype} {P.shape}")
    N, P = P.shape[-2], P.astype(np.float64)
    first = tall_product(P, P)
    B = product(P, _whitening(first, N))
    G = tall_product(B, B)
    B = product(B, _refined(_inverse_factor(G, N)[0], G))
    return B.astype(np.float32), _or_nan(tall_product(B, P), first, N, np.float32)


def cholesky_basis(P):
    """As `double_basis`, but all in the dtype of P: about as accurate as QR, but for a P of lost
    rank with entries over 20 decades, where it may lose four digits.

    One pass, B ← B L⁻ᵀ with L Lᵀ = BᵀB + δI, brings to 1 the singular values well above √δ and
    enlarges the others by about 1/√δ.  Three passes reach all that are above rounding (shifted
    Cholesky QR, arXiv 1809.11085), a fourth helps where they fade into it gradually.
    """
    size = column_size(P)
    N, P = P.shape[-2], P / size  # columns of norm 1 … √N, or 0
    first = tall_product(P, P)
    B = product(P, _whitening(first, N))
    for _ in range(2):
        B = product(B, _inverse_factor(tall_product(B, B), N)[0])
    G = tall_product(B, B)
    B = product(B, _refined(_inverse_factor(G, N)[0], G))
    return B, size * _or_nan(tall_product(B, P), first, N, B.dtype)


def _whitening(G, N):
    """T with TᵀGT = I for G = PᵀP (..., r, r), P (..., N, r); where singular values of P are below
    √δ, columns of P T stay shorter than 1.  For G in float64 and P in float32 that is below P's
    own rounding; `cholesky_basis` mends it by two more passes.

    The columns of P are scaled to norm 1 and mixed by a random rotation, so that a direction in
    which P is small comes last in L.  Otherwise the columns after it would take up its rounding
    error, eps/√δ, and with them the span of P T.  Of two rotations each matrix takes the better.
    """
    xp = array_module(G)
    squares = _diagonal(G)
    W = _rotations(xp, G.shape[-1], G.dtype, G.ndim) / xp.sqrt(transpose(squares + (squares == 0)))
    G = product(transpose(W), product(G, W))
    # Equal tokens round alike: their error goes with the largest entry, which rotation may make r.
    T, L = _inverse_factor(G, N, 4 * xp.maximum(_diagonal(G).max(axis=-1, keepdims=True), 1))
    T = product(W, T)  # (2, ..., r, r)
    # P W = B Lᵀ, and column j of B has an error of eps ‖t_j‖: |L| ‖t‖ bounds that of the span.
    norms = xp.sqrt((T * T).sum(axis=-2, keepdims=True))
    growth = product(abs(L), transpose(norms)).max(axis=-2, keepdims=True)
    return xp.where(growth[0] < growth[1], T[0], T[1])


def _diagonal(G):
    """The diagonal of G (..., r, r) as a row (..., 1, r)."""
    return G.diagonal(0, -2, -1)[..., None, :]


def _inverse_factor(G, N, safety=1):
    """L⁻ᵀ and L with L Lᵀ = G + δI; δ is above the rounding error of G = BᵀB, B (..., N, r) with
    columns of norm 1."""
    xp, r = array_module(G), G.shape[-1]
    delta = safety * float(np.finfo(G.dtype).eps) * (4 * r + math.sqrt(N))
    L = xp.linalg.cholesky(G + delta * xp.eye(r, dtype=G.dtype))
    return transpose(xp.linalg.inv(L)), L


def _refined(T, G):
    """T (3I − TᵀGT)/2, a step of Newton–Schulz: an error e of TᵀGT − I becomes about e²."""
    I = array_module(G).eye(G.shape[-1], dtype=G.dtype)
    return product(T, 1.5 * I - 0.5 * product(transpose(T), product(G, T)))


def _or_nan(R, G, N, dtype):
    """R = BᵀP, or NaN where a factorisation failed, which CuPy does not report: B must keep the
    norm of every column p of P, ‖Bᵀp‖² = ‖p‖² (the diagonal of G = PᵀP), to rounding in B's dtype.
    """
    squares = _diagonal(G)
    wrong = abs((R * R).sum(axis=-2, keepdims=True) - squares) / (squares + (squares == 0))
    right = wrong.max(axis=-1, keepdims=True) <= np.finfo(dtype).eps * (100 + N)
    return array_module(R).where(right, R, math.nan)


@functools.cache
def double_is_fast(xp):
    """Whether float64 is worth using beside float32: on a CPU, and on GPUs made for computing."""
    runtime = getattr(getattr(xp, "cuda", None), "runtime", None)
    if runtime is None:
        return True
    ratio = runtime.cudaDevAttrSingleToDoublePrecisionPerfRatio
    return runtime.deviceGetAttribute(ratio, xp.cuda.Device().id) <= 4


@functools.cache
def _rotations(xp, r, dtype, ndim):
    """Two orthogonal matrices (2, 1, …, 1, r, r), drawn at random, always the same; moved once."""
    M = np.linalg.qr(np.random.default_rng(0).standard_normal((2, r, r)))[0]
    return xp.asarray(M.astype(dtype)).reshape(2, *(1,) * (ndim - 2), r, r)
