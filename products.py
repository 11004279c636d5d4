"""Theorem 2.1 by matrix products with no look at a number: route "products", made for a GPU.

Choosing a series by ‖S‖, or QR where rounding demands it, the host has to wait for the device.
Here every matrix gets what it needs on the device itself: k squarings of its own for exp, and a
basis by Cholesky factors of r × r matrices.  What cannot be done right is NaN, not a wrong number.
Route "auto" on a CPU uses `double_basis` too.
"""

import functools
import math

import numpy as np

from devices import array_module, product

# Squarings that can be done: ‖S‖₂ may be 1000 for r ≤ 512, and 2 ** SQUARINGS at most.
SQUARINGS = 12
# A GPU sums over tokens in blocks of ROWS to 2 ROWS rows, where N has such a divisor.
ROWS = 1024


def _T(M):
    return M.swapaxes(-1, -2)


def tall_product(A, B):
    """AᵀB (..., r, m) for A (..., N, r) and B (..., N, m).

    On a GPU in blocks of rows that are summed up: cuBLAS gives each matrix of a batch to a few
    multiprocessors, however long the sum, and most of them would idle.
    """
    N = A.shape[-2]
    rows = next((n for n in range(ROWS, 2 * ROWS) if N % n == 0), N)
    if array_module(A, B) is np or rows == N:
        return product(_T(A), B)
    A, B = (M.reshape(*M.shape[:-2], N // rows, rows, M.shape[-1]) for M in (A, B))
    return product(_T(A), B).sum(axis=-3)


def column_size(M):
    """max |M| of each column of M (..., N, r), or 1 for a column of zeros, (..., 1, r)."""
    xp = array_module(M)
    largest = xp.maximum(M.max(axis=-2, keepdims=True), -M.min(axis=-2, keepdims=True))
    return xp.where(largest > 0, largest, 1)


def unit_columns(M):
    """M (..., N, r) with columns of norm 1 or 0: the same span, and no square underflows."""
    M = M / column_size(M)  # columns of norm 1 … √N
    squares = (M * M).sum(axis=-2, keepdims=True)
    return M / array_module(M).sqrt(array_module(M).maximum(squares, 1))


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
    """As `double_basis`, but all in the dtype of P, so that it is about as accurate as QR.

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
    W = _rotations(xp, G.shape[-1], G.dtype, G.ndim) / xp.sqrt(_T(squares + (squares == 0)))
    G = product(_T(W), product(G, W))
    # Equal tokens round alike: their error goes with the largest entry, which rotation may make r.
    T, L = _inverse_factor(G, N, 4 * xp.maximum(_diagonal(G).max(axis=-1, keepdims=True), 1))
    T = product(W, T)  # (2, ..., r, r)
    # P W = B Lᵀ, and column j of B has an error of eps ‖t_j‖: |L| ‖t‖ bounds that of the span.
    norms = xp.sqrt((T * T).sum(axis=-2, keepdims=True))
    growth = product(abs(L), _T(norms)).max(axis=-2, keepdims=True)
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
    return _T(xp.linalg.inv(L)), L


def _refined(T, G):
    """T (3I − TᵀGT)/2, a step of Newton–Schulz: an error e of TᵀGT − I becomes about e²."""
    I = array_module(G).eye(G.shape[-1], dtype=G.dtype)
    return product(T, 1.5 * I - 0.5 * product(_T(T), product(G, T)))


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


class Products:
    """exp(S) W for skew-symmetric S (..., n, n) and W (..., n, m), its gradient, and φ₁(S) W.

    With X = S/2ᵏ, ‖X‖₂ ≤ 1, Taylor's polynomial is enough; then k times, from X to 2X,
        exp(2X) = exp(X)²,   φ₁(2X) = ½ (exp(X) + I) φ₁(X),
        L(2X, E) = ½ (exp(X) L(X, E) + L(X, E) exp(X)),   the derivative of exp in the direction E.
    Each squaring doubles the error, which so grows as eps ‖S‖₂; beyond SQUARINGS of them: NaN.
    """

    def __init__(self, S, W):
        xp, self.W = array_module(S, W), W
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            S2 = product(S, S)
            fourth = (S2 * S2).sum(axis=(-2, -1), keepdims=True) / 2  # Σθ⁴ ≥ ‖S‖₂⁴, spectrum ±iθ
            k = xp.ceil(xp.maximum(0.25 * xp.log2(fourth), 0))
            self.X = S * xp.where(k <= SQUARINGS, xp.exp2(-k), math.nan)
        more = k > xp.arange(SQUARINGS, dtype=S.dtype).reshape(-1, *(1,) * k.ndim)
        E = _polynomial(self.X, 0)
        self.F = xp.empty((SQUARINGS, *S.shape), S.dtype)
        self.F[...] = xp.eye(S.shape[-1], dtype=S.dtype)
        for F, due in zip(self.F, more):  # F_i = exp(2ⁱX), or I where no squaring is due any more
            xp.copyto(F, E, where=due)
            E = product(E, F)
        self.matrix = E
        self.value = product(E, W)

    def phi1(self, W):
        """φ₁(S) W."""
        W = product(_polynomial(self.X, 1), W)
        for F in (self.F + array_module(W).eye(W.shape[-2], dtype=W.dtype)) / 2:
            W = product(F, W)
        return W

    def adjoint(self, G):
        """exp(S)ᵀ G and L(Sᵀ, G Wᵀ), the gradients of ⟨G, exp(S) W⟩."""
        xp, X, n = array_module(G), _T(self.X), G.shape[-2]
        D = xp.zeros((*X.shape[:-2], 2 * n, 2 * n), X.dtype)
        D[..., :n, :n] = D[..., n:, n:] = X
        D[..., :n, n:] = product(G, _T(self.W))
        # L(X, E) is the upper right quarter of exp([[X, E], [0, X]]).
        L = _polynomial(D, 0)[..., :n, n:]
        # From L(X, E) to L(S, E).  [½F, L] [L; ½F] is one product where ½F stands on the diagonal
        # and L in that quarter; where no doubling is due F = I, and ½L + ½L = L.
        D = xp.empty((SQUARINGS + 1, *D.shape), X.dtype)
        D[:-1, ..., :n, :n] = D[:-1, ..., n:, n:] = _T(self.F) / 2
        D[0, ..., :n, n:] = L
        for i in range(SQUARINGS):
            product(D[i, ..., :n, :], D[i, ..., n:], out=D[i + 1, ..., :n, n:])
        return product(_T(self.matrix), G), D[-1, ..., :n, n:]


def _polynomial(X, p):
    """Taylor's polynomial of exp(X), p = 0, or φ₁(X), p = 1, for ‖X‖₂ ≤ 1, by Horner's rule in X⁴
    with cubic coefficients (Paterson and Stockmeyer).  In a block-triangular X the corner may be of
    any size: the result is linear in it."""
    xp = array_module(X)
    powers = xp.empty((4, *X.shape), X.dtype)
    powers[0], powers[1] = xp.eye(X.shape[-1], dtype=X.dtype), X
    for i in (2, 3):
        product(powers[i - 1], powers[1], out=powers[i])
    a = _taylor(xp, X.dtype)[p]
    *terms, E = product(a, powers.reshape(4, X.size)).reshape(len(a), *X.shape)
    X4 = product(powers[2], powers[2])
    for term in reversed(terms):
        E = product(E, X4) + term
    return E


@functools.cache
def _taylor(xp, dtype):
    """1/(4i + j + p)! for p = 0 and 1, moved once: the remainder and its derivative are below eps
    where ‖X‖ ≤ 1."""
    groups = 3 if dtype == np.float32 else 5
    a = [
        [[1 / math.factorial(4 * i + j + p) for j in range(4)] for i in range(groups)]
        for p in (0, 1)
    ]
    return xp.asarray(np.array(a, dtype))
