"""Orthogonal Self-Attention (Zhang & Martens, arXiv 2602.05996) in one file, over NumPy or CuPy.

Notation of the paper.  X (N, d) are the tokens, Q = X W_Q, K = X W_K, V = X W_V (N, d_v) per head.

    S = s (Q Kᵀ − K Qᵀ),  s = α / √d_v                 skew-symmetric, rank ≤ r = 2 d_v
    A = exp(S) ∈ SO(N),   O = A V                      orthogonal attention

With P = [Q, K] (N, r) and J = [[0, I], [−I, 0]] (r, r) the scores are S = s P J Pᵀ.

The file reads as the paper does: definition, small exponential, low rank, backward,
initialisation, layer, network.  `...` are any batch dimensions, for instance (batch, heads).
All functions above "Layer" take and return plain arrays and use no automatic differentiation.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import numpy as np

import autograd as ag
from autograd import Tensor, array_module
from products import (
    Products,
    cholesky_basis,
    double_basis,
    double_is_fast,
    product,
    tall_product,
    unit_columns,
)

ROUTES = ("auto", "gram", "qr", "newton_schulz", "dense", "products")

# ----------------------------------------------------------------------------------- definition


def skew_scores(Q, K, alpha):
    """S = (α/√d_v)(Q Kᵀ − K Qᵀ).

    Q, K: (..., N, d_v), float32 or float64.  alpha: a number, or an array that broadcasts to
    (..., 1, 1), one α per head for instance.  Returns (..., N, N), exactly skew-symmetric.
    """
    Q, K, _, s = _checked(Q, K, Q, alpha)
    QKt = Q @ K.swapaxes(-1, -2)  # (..., N, d_v) x (..., d_v, N) -> (..., N, N)
    return s * (QKt - QKt.swapaxes(-1, -2))


def osa_dense(Q, K, V, alpha):
    """O = exp(S) V by the definition, with the N × N matrix: slow, obvious, the oracle.

    Shapes as in `osa_forward`.  Time O(N³), memory O(N²) for each matrix.
    """
    _checked(Q, K, V, alpha)
    return exp_skew(skew_scores(Q, K, alpha)) @ V


# ---------------------------------------------------------------------------- small exponential


def exp_skew(S):
    """exp(S) of skew-symmetric S (..., n, n), by its spectrum.

    iS is Hermitian, iS = U diag(λ) Uᴴ with real λ, so exp(S) = U diag(e^{−iλ}) Uᴴ: a rotation by
    the angle |λ| in each plane.  Orthogonal to rounding whatever ‖S‖ is.
    """
    lam, U = skew_eigh(S)
    return ((U * _exp(-1j * lam)[..., None, :]) @ _H(U)).real.astype(S.dtype)


def frechet_skew(S, E):
    """L(S, E), the derivative of exp at skew-symmetric S in the direction E; both (..., n, n).

    In the eigenbasis the (j, k) entry is multiplied by the divided difference of e^{−iλ},
    e^{−i(λ_j+λ_k)/2} sinc((λ_j−λ_k)/2): no small denominators, exact at repeated angles and at 0.
    """
    lam, U = skew_eigh(S)
    mean = (lam[..., :, None] + lam[..., None, :]) / 2
    difference = lam[..., :, None] - lam[..., None, :]
    D = _exp(-1j * mean) * array_module(S, E).sinc(difference / (2 * math.pi))  # sin(πx)/(πx)
    return (U @ ((_H(U) @ E @ U) * D) @ _H(U)).real.astype(S.dtype)


def skew_eigh(S):
    """λ (..., n) ascending and U (..., n, n) with iS = U diag(λ) Uᴴ."""
    _check_float("S", S, min_ndim=2)
    if S.shape[-1] != S.shape[-2]:
        raise ValueError(f"S must be square, got shape {S.shape}")
    _check_finite("S", S)
    rounding = S.shape[-1] * float(np.finfo(S.dtype).eps)
    if array_module(S) is np and S.size and abs(S + _T(S)).max() > 8 * rounding * abs(S).max():
        raise ValueError("S is not skew-symmetric")
    xp = array_module(S)
    lam, U = xp.linalg.eigh(1j * S)
    lam = (lam - lam[..., ::-1]) / 2  # ±θ exactly in pairs
    # Vectors of λ = 0 come in no pairs; where rounding makes it ±eps ‖S‖ exp(S) would not be real.
    return xp.where(abs(lam) <= rounding * abs(lam[..., -1:]), 0, lam), U


def _H(U):
    return U.conj().swapaxes(-1, -2)


def _T(M):
    return M.swapaxes(-1, -2)


def _exp(z):
    return array_module(z).exp(z)


def _phi1(z):
    """φ₁(z) = (e^z − 1)/z on the imaginary axis, as e^{z/2} sinc(z/2i): nothing cancels near 0."""
    return _exp(z / 2) * array_module(z).sinc(z.imag / (2 * math.pi))


# An application never needs the matrix exp(S), only its action on thin W and G (n, m): f(S) W for
# f = exp or φ₁, f(S)ᵀ G, and the gradient of ⟨G, f(S) W⟩ with respect to S, which for exp is
# L(Sᵀ, G Wᵀ).  First the formula, then the fast way, matrix products only; a test holds them equal.


class Spectral:
    """exp(S) W for skew-symmetric S (..., n, n) and W (..., n, m) by the spectrum; φ₁(S) W."""

    def __init__(self, S, W, rho=None):
        self.S, self.W = S, W
        self.lam, self.U = skew_eigh(S)
        self.value = self._function(_exp, W)

    def _function(self, f, W):
        scaled = self.U * f(-1j * self.lam)[..., None, :]
        return (scaled @ (_H(self.U) @ W)).real.astype(W.dtype)

    def phi1(self, W):
        """φ₁(S) W."""
        return self._function(_phi1, W)

    def adjoint(self, G):
        """exp(S)ᵀ G and L(Sᵀ, G Wᵀ), the gradients of ⟨G, exp(S) W⟩."""
        return exp_skew(-self.S) @ G, frechet_skew(-self.S, G @ _T(self.W))


@functools.cache
def chebyshev_coefficients(f, rho, tolerance):
    """Real a_k with f(iρt) = Σ_k a_k iᵏ T_k(t) for t in [−1, 1], to an error of `tolerance`; that
    of the derivative by iρt is at most 8 times as large.

    f = exp, ρ > 0: a_k = 2 J_k(ρ) (a_0 = J_0), Bessel functions, at most 2 (ρ/2)ᵏ/k!.  For φ₁(z) =
    ∫₀¹ e^{uz} du: a_k = (2/ρ) ∫₀^ρ J_k = (4/ρ) Σ_m J_{k+1+2m}(ρ).  Some ρ + 10 terms for small ρ,
    1.4 ρ for large, and no cancellation, where the terms of Taylor's series grow to e^ρ first.
    By Miller's algorithm, J_{k−1} = (2k/ρ) J_k − J_{k+1} downwards from where J_k has vanished,
    then J_0 + 2 Σ J_{2k} = 1, each is right relative to its own size: the derivative needs that,
    as it multiplies a_k by k²/ρ.
    """
    n, log_bound = 1, 0.0
    while n < rho or log_bound > math.log(1e-40):
        log_bound += math.log(rho / 2 / n)  # of (ρ/2)ⁿ/n!
        n += 1
    J, sums = np.zeros(n + 2), np.zeros(n + 2)
    J[n] = 1.0
    for k in range(n, 0, -1):
        J[k - 1] = 2 * k / rho * J[k] - J[k + 1]
    J /= J[0] + 2 * J[2::2].sum()
    for k in range(n - 1, -1, -1):
        sums[k] = J[k + 1] + sums[k + 2]
    a = (4 / rho) * sums if f is _phi1 else 2 * J
    a[0] /= 2
    weight = np.maximum(1, np.arange(n + 2) ** 2 / (8 * rho))
    dropped = np.cumsum((weight * abs(a))[::-1])[::-1]  # from k on
    return tuple(a[: max(int((dropped > tolerance).sum()), 2)].tolist())


class Chebyshev:
    """f(Z) W = Σ_k a_k c_k for Z (..., n, n) with imaginary spectrum in ±iρ, and its adjoint.

    c_k = p_k(Z/ρ) W (..., n, m), where p_k(x) = iᵏ T_k(x/i) are Chebyshev's polynomials turned to
    the imaginary axis: p_0 = 1, p_1 = x, p_{k+1} = 2x p_k + p_{k−1}.
    """

    # The code keeps the transposes c_kᵀ (..., m, n), for the sake of c_kᵀ (2X)ᵀ and c̄_kᵀ (2X):
    # products with a transposed right factor are 3 times slower in OpenBLAS at n = 16.

    def __init__(self, Z, W, rho, f=_exp):
        xp, self.Z = array_module(Z, W), Z
        # Any large enough ρ will do, at Z = 0 too; a grid keeps the coefficients in a cache.
        self.rho = 2.0 ** (math.ceil(4 * math.log2(max(rho, 1e-2))) / 4)
        self.a = chebyshev_coefficients(f, self.rho, float(np.finfo(Z.dtype).eps) / 2)
        self.X2 = Z * (2 / self.rho)  # 2Z/ρ
        X2t = xp.ascontiguousarray(_T(self.X2))
        c = self.C = xp.empty((len(self.a), *W.shape[:-2], W.shape[-1], W.shape[-2]), W.dtype)
        c[0] = _T(W)
        xp.matmul(c[0], X2t, out=c[1])
        c[1] *= 0.5
        for k in range(2, len(c)):
            xp.matmul(c[k - 1], X2t, out=c[k])
            c[k] += c[k - 2]
        self.value = _T(xp.tensordot(xp.asarray(self.a, dtype=W.dtype), c, axes=1))

    def phi1(self, W):
        """φ₁(Z) W."""
        return Chebyshev(self.Z, W, self.rho, _phi1).value

    def adjoint(self, G):
        """f(Z)ᵀ G and the gradient Z̄ of ⟨G, f(Z) W⟩ with respect to Z.

        The recurrence run backwards, which is Clenshaw's with Zᵀ (c̄ = 0 beyond the last):
            c̄_k = a_k G + 2Xᵀ c̄_{k+1} + c̄_{k+2},  c̄_0 = a_0 G + Xᵀ c̄_1 + c̄_2,  X = Z/ρ,
            Z̄ = (1/ρ) (c̄_1 c_0ᵀ + Σ_{k≥1} 2 c̄_{k+1} c_kᵀ).
        """
        xp, c, last = array_module(G), self.C, len(self.a) - 1
        Gt = xp.ascontiguousarray(_T(G))
        after, cbar = xp.zeros_like(Gt), self.a[last] * Gt  # c̄_{k+2}, c̄_{k+1}
        Zbar = xp.zeros_like(self.X2)
        for k in range(last - 1, -1, -1):
            if k == 0:
                cbar *= 0.5  # ½ c̄_1 serves both formulas
            Zbar += _T(cbar) @ c[k]
            after += self.a[k] * Gt
            after += cbar @ self.X2
            after, cbar = cbar, after
        Zbar *= 2 / self.rho
        return _T(cbar), Zbar


def _sharper_bound(Z, rho):
    """A bound of the spectrum ±iθ of Z (..., n, n), given that rho = (Σθ²)^½ is one.

    (Σθ⁴)^¼ = (tr(Z⁴)/2)^¼ ≤ rho costs one product and saves the series a quarter of its terms at
    n = 32, two fifths at n = 128.  Below 1 there is nothing to save.
    """
    if rho <= 1:
        return rho
    Z2 = Z @ Z
    fourth = float(_inner(Z2, _T(Z2)).max()) / 2
    return min(rho, 1.01 * max(fourth, 1.0) ** 0.25)  # 1.01: rounding of the trace


class ChebyshevMatrix:
    """exp(Z) W for W wider than Z: exp(Z) itself is then the smaller thing to compute."""

    def __init__(self, Z, W, rho):
        I = array_module(Z).broadcast_to(array_module(Z).eye(Z.shape[-1], dtype=Z.dtype), Z.shape)
        self.W, self.matrix = W, Chebyshev(Z, I, rho)
        self.phi1 = self.matrix.phi1
        self.value = self.matrix.value @ W

    def adjoint(self, G):
        """As `Chebyshev.adjoint`; ⟨G, f(Z) W⟩ = ⟨G Wᵀ, f(Z)⟩."""
        Zbar = self.matrix.adjoint(G @ _T(self.W))[1]
        return _T(self.matrix.value) @ G, Zbar


# ------------------------------------------------------------------------------------- low rank


def orthonormal_basis(M, method="qr", steps=None):
    """B (..., N, k) with orthonormal columns whose span contains that of M (..., N, r).

    method: "qr" (reduced, k = min(N, r)), or "newton_schulz": `steps` of B ← ½ B (3I − BᵀB) from
    M/‖M‖_F, matrix products only.  Each step multiplies a small singular value by 1.5, so a nearly
    rank-deficient M needs many: σ = 1e-3 is at 0.06 after 10 steps and at 1 after 22.  By default
    as many as bring up the smallest σ that rounding can tell from 0 (about 50, float64 100).
    Along what rounding cannot tell from 0 its columns stay short of 1, which Theorem 2.1 forgives,
    as S vanishes there.  For N ≤ r there is no tall matrix to work on: the answer is the identity.
    """
    _check_float("M", M, min_ndim=2)
    xp = array_module(M)
    if method == "qr":
        return xp.linalg.qr(M)[0]
    if method != "newton_schulz":
        raise ValueError(f"method must be 'qr' or 'newton_schulz', got {method!r}")
    *batch, N, r = M.shape
    if N <= r:
        return xp.broadcast_to(xp.eye(N, dtype=M.dtype), (*batch, N, N))
    largest = abs(M).max(axis=(-2, -1), keepdims=True)  # first, so that no square underflows
    B = M / xp.where(largest == 0, M.dtype.type(1), largest)
    B = B / xp.sqrt(xp.maximum((B * B).sum(axis=(-2, -1), keepdims=True), 1))
    if steps is None:  # σ ≥ eps ‖M‖/√r; six more from 1/1.5 to 1
        steps = 6 + math.ceil(math.log(math.sqrt(r) / np.finfo(M.dtype).eps, 1.5))
    for _ in range(steps):
        B = 1.5 * B - 0.5 * B @ (_T(B) @ B)
    return B


# Limits of `auto`.  Estimated error of the gram route / (eps max(1, ‖S‖)); see `_gram_norms`.
GRAM_LIMIT = 8.0
# ‖S‖: above it the small exponential is spectral, with cost and accuracy independent of ‖S‖.
RHO_MAX = 64.0
# Rows of [P, V, dO] taken at a time on a CPU, where they have to be copied.
CACHE_ROWS = 1024


class Saved(NamedTuple):
    """What the backward pass of one part of the batch needs; unused fields are None."""

    F: object  # [Q, K, V] (..., N, 2 d_v + m)
    s: object  # α/√d_v (..., 1, 1)
    d_v: int
    small: object  # the small exponential: `Chebyshev`, `ChebyshevMatrix`, `Spectral`, `Products`
    B: object = None  # basis routes: orthonormal basis (..., N, k), or None for B = I
    R: object = None  # basis routes: BᵀP (..., k, r)
    U: object = None  # basis routes: R J Rᵀ = S̃/s (..., k, k)
    b: object = None  # basis routes: BᵀV (..., k, m)
    rho: float = None  # basis routes but "products": a bound of ‖S‖₂, the same for all of the batch
    G: object = None  # gram route: PᵀP (..., r, r)
    Jy: object = None  # gram route: J φ₁(sGJ) PᵀV (..., r, m)


def osa_forward(Q, K, V, alpha, route="auto"):
    """O = exp(S) V in time and memory linear in N, and what `osa_backward` needs.

    Q, K: (..., N, d_v); V: (..., N, m), m = d_v in the layer; alpha: a number or an array that
    broadcasts to (..., 1, 1).  All float32 or all float64, NumPy or CuPy; never modified.
    route: "dense"          exp of the N × N matrix S, the definition
           "qr"             Theorem 2.1: O = V + B (exp(BᵀSB) − I) BᵀV, B by QR of [Q, K]
           "newton_schulz"  the same, with the basis by Newton–Schulz
           "gram"           no basis: O = V + P Φ (PᵀV), Φ = sJ φ₁(sGJ), G = PᵀP
           "products"       as "qr", B by Cholesky, exp by squaring: nothing is decided by looking
                            at numbers; beyond ‖S‖₂ = 1000 right or NaN, never a wrong number
           "auto"           N ≤ 2 d_v: B = I, since S itself is the small matrix; otherwise "gram"
                            where its rounding error, about eps s² ‖QᵀQ‖ ‖KᵀK‖, is harmless;
                            where not (nearly parallel tokens, one dominant token, large ‖S‖), for
                            float32 the basis of `products.double_basis`, which loses no digit even
                            where QKᵀ and KQᵀ cancel; for float64 "qr", right to eps s ‖Q‖₂ ‖K‖₂.
                            On a GPU, where looking means waiting for the device: "products".
    To pad, zero rows of Q and K: those rows of A are the identity's, on every route.
    Returns (O, saved).  Raises ValueError or TypeError naming the argument at fault, ValueError for
    NaN or Inf, FloatingPointError where S overflows; on a GPU "auto" answers these with NaN.
    Source: Theorem 2.1 for "qr" and "newton_schulz"; the rest is ours.
    """
    Q, K, V, s = _checked(Q, K, V, alpha)
    # One array for [Q, K, V], so that PᵀP and PᵀV are one matrix product.
    F = array_module(Q).empty((*Q.shape[:-1], 2 * Q.shape[-1] + V.shape[-1]), Q.dtype)

    def join(part):
        array_module(F).concatenate([Q[part], K[part], V[part]], axis=-1, out=F[part])

    ag.parallel(join, ag.batch_parts(F))
    O, saved = forward_joint(F, s, Q.shape[-1], route)
    return O, (alpha, V, saved)


def osa_backward(dO, saved):
    """dQ, dK, dV, dalpha for the gradient dO (..., N, m) of O = osa_forward(...)[0].

    dalpha has the shape of alpha.  No step differentiates a QR or a Newton–Schulz iteration:
    exp(S) depends on Q and K through S alone, so the choice of basis has no gradient.
    Raises ValueError for a dO of the wrong shape or dtype, FloatingPointError where a product
    overflows.
    """
    alpha, V, joint = saved
    array_module(dO, V)  # TypeError for what is no array, or one of another device
    if dO.shape != V.shape or dO.dtype != V.dtype:
        raise ValueError(f"dO must be {V.dtype} {V.shape} like O, got {dO.dtype} {dO.shape}")
    _check_finite("dO", dO)
    dF, ds = backward_joint(dO, joint)
    d_v = (dF.shape[-1] - V.shape[-1]) // 2
    dalpha = ag.unbroadcast(ds / math.sqrt(d_v), getattr(alpha, "shape", ()))
    return dF[..., :d_v], dF[..., d_v : 2 * d_v], dF[..., 2 * d_v :], dalpha


def forward_joint(F, s, d_v, route="auto"):
    """`osa_forward` on F = [Q, K, V] (..., N, 2 d_v + m) and s = α/√d_v (..., 1, 1), unchecked."""
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
    xp = array_module(F)
    if xp is not np:
        F = xp.ascontiguousarray(F)  # cuBLAS wants one distance from matrix to matrix
    O = xp.empty_like(F[..., 2 * d_v :])

    def forward_part(part):
        s_part = s[part] if s.ndim == F.ndim and len(s) > 1 else s
        O[part], saved = _forward(F[part], s_part, d_v, route)
        return saved

    parts = ag.batch_parts(F)
    return O, (parts, F, s, ag.parallel(forward_part, parts))


def backward_joint(dO, saved):
    """dF (..., N, 2 d_v + m) and ds (..., 1, 1) for the gradient dO (..., N, m), unchecked."""
    parts, F, s, saves = saved
    xp = array_module(F)
    if xp is not np:
        dO = xp.ascontiguousarray(dO)
    dF, ds = xp.empty_like(F), xp.empty((*F.shape[:-2], 1, 1), F.dtype)

    def backward_part(part, save):
        backward = _basis_backward if save.G is None else _gram_backward
        backward(dO[part], save, dF[part], ds[part])

    ag.parallel(backward_part, parts, saves)
    return dF, ds


def _forward(F, s, d_v, route):
    """One part of the batch: gram if asked for or harmless, else a basis (B, R), or B = I."""
    xp, N, r = array_module(F), F.shape[-2], 2 * d_v
    if route == "auto" and xp is not np:
        route = "products"
    if route == "gram" or (route == "auto" and N > r):
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is left to "qr"
            M = tall_product(F[..., :r], F)  # (r, N) x (N, r + m) -> [G, PᵀV]
            error, rho = _gram_norms(F[..., :r], M[..., :r], s, d_v)
            safe = (error <= GRAM_LIMIT * xp.maximum(rho, 1)).all() & xp.isfinite(M).all()
        if route == "gram" or bool(safe):
            rho = float(rho.max())
            if route == "gram" and not rho <= 2e3:
                raise ValueError(
                    f"route 'gram' needs ‖S‖ ≤ 2e3, got {rho:.1e}; 'auto' has no limit"
                )
            if rho <= RHO_MAX or route == "gram":
                try:
                    return _gram_forward(F, M, s, d_v, rho)
                except FloatingPointError:  # Q and K of sizes whose squares overflow
                    if route == "gram":
                        raise
    B = R = None  # B = I
    tall = route in ("auto", "products") and N > r
    if route in ("auto", "products") and F.dtype == np.float32 and double_is_fast(xp):
        if not tall:
            R = F[..., :r].astype(np.float64)
        else:
            with contextlib.suppress(np.linalg.LinAlgError):  # CuPy gives NaN instead
                B, R = double_basis(F[..., :r])
            if xp is np and (B is None or not np.isfinite(R).all()):
                B, R = orthonormal_basis(F[..., :r], "qr"), None
    elif tall and route == "products":
        B, R = cholesky_basis(F[..., :r])
    elif route == "newton_schulz":  # a K that is small beside Q takes no more steps
        B = orthonormal_basis(unit_columns(F[..., :r]), "newton_schulz")
    elif tall or route == "qr":
        B = orthonormal_basis(F[..., :r], "qr")
    return _basis_forward(F, B, R, s, d_v, route)


def _refuse_overflow(names, *arrays):
    """FloatingPointError unless these arrays, products of `names`, are finite; on a GPU, where
    looking means waiting, NaN goes on."""
    if array_module(*arrays) is np and not all(np.isfinite(a).all() for a in arrays):
        raise FloatingPointError(f"a product of {names} overflows {arrays[0].dtype}")


def _gram_norms(P, G, s, d_v):
    """Error of the gram route in units of eps, and ‖S‖_F/√2 ≥ ‖S‖₂, each (...), from G = PᵀP.

    The error of QᵀQ meets KᵀK in S² and is s² ‖QᵀQ‖ ‖KᵀK‖ eps (row-sum norms: nothing is squared
    that could underflow).  Where one token outweighs all others, the sums over N lose the others'
    last digits; the factor peak/4 > 1, peak = max_i ‖q_i‖²/mean_i ‖q_i‖², stands for that.
    ‖S‖_F² = s² ‖QKᵀ − KQᵀ‖_F² = 2 s² (⟨QᵀQ, KᵀK⟩ − ⟨QᵀK, (QᵀK)ᵀ⟩), and the eigenvalues of S come
    in pairs ±iθ.
    """
    xp = array_module(G)
    QQ, QK, KK = G[..., :d_v, :d_v], G[..., :d_v, d_v:], G[..., d_v:, d_v:]
    s = abs(s[..., 0, 0])

    def size(A, AtA):
        rows = xp.einsum("...ij,...ij->...i", A, A)  # ‖q_i‖² (..., N)
        mean = xp.maximum(rows.mean(axis=-1), float(np.finfo(A.dtype).tiny))
        row_sums = abs(AtA).sum(axis=-1).max(axis=-1)
        row_sums += A.shape[-2] * float(np.finfo(A.dtype).tiny)  # what may have underflowed
        return s * row_sums * xp.maximum(rows.max(axis=-1) / (4 * mean), 1)

    rho2 = s * s * (_inner(QQ, KK) - _inner(QK, _T(QK)))[..., 0, 0]
    error = size(P[..., :d_v], QQ) * size(P[..., d_v:], KK)
    return error, xp.sqrt(xp.maximum(rho2, 0))


def _J_times(M):
    """J M for M (..., r, n), J = [[0, I], [−I, 0]]."""
    h = M.shape[-2] // 2
    return array_module(M).concatenate([M[..., h:, :], -M[..., :h, :]], axis=-2)


def _times_J(M):
    """M J for M (..., n, r)."""
    h = M.shape[-1] // 2
    return array_module(M).concatenate([-M[..., h:], M[..., :h]], axis=-1)


def _gram_forward(F, M, s, d_v, rho):
    r, xp = 2 * d_v, array_module(F)
    G, W = M[..., :r], M[..., r:]
    with np.errstate(over="ignore", invalid="ignore"):
        Z = s * _times_J(G)
        small = Chebyshev(Z, W, _sharper_bound(Z, rho), _phi1)  # y = φ₁(sGJ) W
        Jy = _J_times(small.value)
        sJy = s * Jy
    _refuse_overflow("Q, K and V", Jy, sJy)
    # O = V + P sJy as one product, [P, V] [sJy; I]: adding V is a pass over memory otherwise.
    X = xp.empty((*F.shape[:-2], F.shape[-1], F.shape[-1] - r), F.dtype)
    X[..., :r, :] = sJy
    X[..., r:, :] = xp.eye(X.shape[-1], dtype=F.dtype)
    return product(F, X), Saved(F, s, d_v, small, G=G, Jy=Jy)


def _gram_backward(dO, saved, dF, ds):
    """With W = PᵀV, Z = sGJ, y = φ₁(Z)W the output is O = V + P sJy.  For g = PᵀdO and h = sJᵀg the
    series gives W̄ = φ₁(Zᵀ)h and Z̄; then Ḡ = s Z̄Jᵀ and
        dP = P (Ḡ + Ḡᵀ) + V W̄ᵀ + dO (sJy)ᵀ,   dV = P W̄ + dO,   ds = ⟨g, Jy⟩ + ⟨Z̄Jᵀ, G⟩."""
    F, s, small, Jy = saved.F, saved.s, saved.small, saved.Jy
    r, xp = 2 * saved.d_v, array_module(F)
    w, m = F.shape[-1], dO.shape[-1]
    X = xp.zeros((*F.shape[:-2], w + m, w), F.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        g = tall_product(F[..., :r], dO)  # (r, N) x (N, m)
        Wbar, Zbar = small.adjoint(-s * _J_times(g))
        E = -_times_J(Zbar)  # Ḡ/s
        ds[...] = _inner(g, Jy) + _inner(E, saved.G)
        X[..., :r, :r], X[..., :r, r:] = s * (E + _T(E)), Wbar
        X[..., r:w, :r] = _T(Wbar)
        X[..., w:, :r], X[..., w:, r:] = _T(s * Jy), xp.eye(m, dtype=F.dtype)
    _refuse_overflow("Q, K, V and dO", X, ds)
    _rows_times((F, dO), X, dF)  # [dP, dV] = [P, V, dO] X


def _inner(A, B):
    """⟨A, B⟩ over the last two axes, (..., 1, 1)."""
    if array_module(A, B) is np:  # einsum stores no products; CuPy's is a batch of tiny matmuls
        return np.einsum("...ij,...ij->...", A, B)[..., None, None]
    return (A * B).sum(axis=(-2, -1), keepdims=True)


def _basis_forward(F, B, R, s, d_v, route):
    """O = V + B (exp(S̃) − I) b with S̃ = BᵀSB = s R J Rᵀ, R = BᵀP, b = BᵀV.

    B = None stands for I; R = None is computed here, in one product with b.
    """
    r, V = 2 * d_v, F[..., 2 * d_v :]
    if R is not None:
        b = V if B is None else tall_product(B, V)
    else:
        BtF = F if B is None else tall_product(B, F)  # (k, N) x (N, r + m) -> [R, b]
        R, b = BtF[..., :r], BtF[..., r:]
    with np.errstate(over="ignore", invalid="ignore"):
        U = _unscaled_scores(R)
        S = (s * U).astype(F.dtype)  # S̃ = BᵀSB; R in float64 keeps what cancels in it
        R, U = R.astype(F.dtype, copy=False), U.astype(F.dtype, copy=False)
        if route == "products":
            small = Products(S, b)
            O = small.value if B is None else V + product(B, small.value - b)
            return O, Saved(F, s, d_v, small, B, R, U, b)
        S64 = S.astype(np.float64)  # squares of float32 could overflow
        rho = math.sqrt(float(_inner(S64, S64).max()) / 2)  # ‖S‖_F/√2 ≥ ‖S‖₂
    if not rho < float(np.finfo(S.dtype).max) / 8:  # room for eigh
        raise FloatingPointError(f"S = (α/√d_v)(QKᵀ − KQᵀ) overflows {S.dtype}")
    if route == "dense" or rho > RHO_MAX:
        small = Spectral(S, b)
    else:
        rho = _sharper_bound(S, rho)
        small = (Chebyshev if b.shape[-1] <= b.shape[-2] else ChebyshevMatrix)(S, b, rho)
    O = small.value if B is None else V + product(B, small.value - b)
    return O, Saved(F, s, d_v, small, B, R, U, b, rho)


def _unscaled_scores(R):
    """R J Rᵀ = R_Q R_Kᵀ − R_K R_Qᵀ, exactly skew-symmetric."""
    h, right = R.shape[-1] // 2, _T(R[..., R.shape[-1] // 2 :])
    if array_module(R) is np:
        right = np.ascontiguousarray(right)  # BLAS on a CPU is slow with many small transposes
    QKt = product(R[..., :h], right)
    return QKt - _T(QKt)


def _basis_backward(dO, saved, dF, ds):
    """With S̃ = BᵀSB, b = BᵀV, g = BᵀdO, L = L(S̃ᵀ, g bᵀ), u = φ₁(S̃)b, w = φ₁(S̃)ᵀg, the gradient
    Ŝ (N × N, never formed) of S enters only through H = (Ŝ − Ŝᵀ)B, and P through R = BᵀP (P = B R):
        H = B (L − Lᵀ) + (dO − B g) uᵀ − (V − B b) wᵀ,
        dP = −s H R J,   dV = dO + B (exp(S̃)ᵀ − I) g,   ds = ⟨L, R J Rᵀ⟩."""
    F, s, d_v, B, small, b = saved.F, saved.s, saved.d_v, saved.B, saved.small, saved.b
    xp, r, w, k, m = array_module(F), 2 * d_v, F.shape[-1], saved.U.shape[-1], dO.shape[-1]
    minus_sRJ = -s * _times_J(saved.R)  # s first: it may keep the rest from overflowing
    with np.errstate(over="ignore", invalid="ignore"):
        g = dO if B is None else tall_product(B, dO)
        expSt_g, L = small.adjoint(g)
        ds[...] = _inner(L, saved.U)
        if B is None:
            dF[..., :r], dF[..., r:] = product(L - _T(L), minus_sRJ), expSt_g
        else:
            # φ₁(−S̃) = φ₁(S̃) exp(−S̃) makes u and w one product.
            uw = small.phi1(xp.concatenate([b, expSt_g], axis=-1))
            ut, wt = _T(uw[..., :m]), _T(uw[..., m:])
            # [dP, dV] = [B, V, dO] X
            X = xp.zeros((*F.shape[:-2], k + 2 * m, w), F.dtype)
            X[..., :k, :r] = product(L - _T(L) - product(g, ut) + product(b, wt), minus_sRJ)
            X[..., :k, r:] = expSt_g - g
            X[..., k : k + m, :r] = -product(wt, minus_sRJ)
            X[..., k + m :, :r] = product(ut, minus_sRJ)
            X[..., k + m :, r:] = xp.eye(m, dtype=F.dtype)
            _rows_times((B, F[..., r:], dO), X, dF)
    if saved.rho is not None:  # route "products" goes on with NaN
        _refuse_overflow("Q, K, V and dO", ds, dF)


def _rows_times(parts, X, out):
    """out = [parts side by side] X; on a CPU in blocks of rows that stay in the cache."""
    xp, N = array_module(X), out.shape[-2]
    size = CACHE_ROWS if xp is np else N
    for i in range(0, N, size):
        rows = (..., slice(i, i + size), slice(None))
        product(xp.concatenate([p[rows] for p in parts], axis=-1), X, out=out[rows])


def attention_matrix(Q, K, alpha, route="auto"):
    """A = exp(S) (..., N, N) ∈ SO(N), by applying it to the identity: for pictures and checks."""
    _checked(Q, K, Q, alpha)
    xp = array_module(Q, K)
    I = xp.broadcast_to(xp.eye(Q.shape[-2], dtype=Q.dtype), (*Q.shape[:-1], Q.shape[-2]))
    return osa_forward(Q, K, I, alpha, route)[0]


def rotation_angles(Q, K, alpha):
    """θ (..., d_v), descending: A rotates d_v planes by the angles θ, and ‖S‖₂ = θ[..., 0].

    The eigenvalues of S are ±iθ and 0.  Q, K: (..., N, d_v); zeros are appended where N < 2 d_v.
    """
    Q, K, _, s = _checked(Q, K, Q, alpha)
    xp, d_v = array_module(Q), Q.shape[-1]
    R = xp.linalg.qr(xp.concatenate([Q, K], axis=-1), mode="r")  # Theorem 2.1: S̃ = s R J Rᵀ
    lam = skew_eigh(s * _unscaled_scores(R))[0]  # ascending, in pairs ±θ
    theta = xp.zeros(Q.shape[:-2] + (d_v,), Q.dtype)
    planes = lam.shape[-1] // 2
    theta[..., :planes] = xp.maximum(lam[..., ::-1][..., :planes], 0)
    return theta


def _check_float(name, a, min_ndim=0):
    if not hasattr(a, "dtype") or not hasattr(a, "shape"):
        raise TypeError(f"{name} must be a NumPy or CuPy array, got {type(a).__name__}")
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {a.dtype}")
    if a.ndim < min_ndim:
        raise ValueError(f"{name} needs at least {min_ndim} dimensions, got shape {a.shape}")


def _check_finite(name, a):
    """Raises ValueError for NaN or Inf; on a GPU, where it would have to wait, it does not look."""
    if array_module(a) is not np:
        return

    def finite(part):
        # NaN and Inf survive a sum; a sum that overflows is looked at again, entry by entry.
        with np.errstate(over="ignore", invalid="ignore"):
            return np.isfinite(a[part].sum()) or np.isfinite(a[part]).all()

    if not all(ag.parallel(finite, ag.batch_parts(a))):
        raise ValueError(f"{name} contains NaN or Inf")


def _checked(Q, K, V, alpha):
    """Q, K, V as they are and s = α/√d_v (..., 1, 1) of their dtype; raises on bad input."""
    for name, a in (("Q", Q), ("K", K), ("V", V)):
        _check_float(name, a, min_ndim=2)
        if a.dtype != Q.dtype:
            raise TypeError(f"Q, K and V must have one dtype, got {Q.dtype}, {K.dtype}, {V.dtype}")
        if a.shape[:-1] != Q.shape[:-1]:
            raise ValueError(f"{name} has shape {a.shape}; Q has {Q.shape}: only widths may differ")
        if a.size == 0:
            raise ValueError(f"{name} is empty: shape {a.shape}")
        _check_finite(name, a)
    if K.shape != Q.shape:
        raise ValueError(f"Q and K must have one shape, got {Q.shape} and {K.shape}")
    if not isinstance(alpha, (int, float)):
        _check_float("alpha", alpha)
    xp = array_module(Q, K, V, alpha)
    alpha = xp.asarray(alpha, dtype=Q.dtype)
    stretched = alpha.shape[-2:] == (1, 1) and alpha.ndim <= Q.ndim and all(
        n in (1, m) for n, m in zip(alpha.shape[::-1], Q.shape[::-1])
    )  # fmt: skip
    if alpha.ndim and not stretched:
        raise ValueError(
            f"alpha must be a number or broadcast to {(*Q.shape[:-2], 1, 1)}, got {alpha.shape}"
        )
    _check_finite("alpha", alpha)
    return Q, K, V, xp.atleast_2d(alpha) / math.sqrt(Q.shape[-1])


# ------------------------------------------------------------------------------- initialisation


def random_orthogonal(n, m, rng, dtype=np.float32):
    """A Haar-random n × m matrix with orthonormal columns (n ≥ m) or rows (n < m), NumPy."""
    if n < 1 or m < 1 or np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"n and m must be positive, dtype float32 or float64: {n}, {m}, {dtype}")
    if n < m:
        return np.ascontiguousarray(random_orthogonal(m, n, rng, dtype).T)
    B, R = np.linalg.qr(rng.standard_normal((n, m)))
    return (B * np.where(np.diag(R) < 0, -1.0, 1.0)).astype(dtype)  # signs: Haar, not LAPACK's


def init_mosa(d, heads, rng, alpha=0.1, dtype=np.float32):
    """The initialisation of one multi-head OSA layer of width d, a dict of NumPy arrays.

    W_QK (heads, d, 2 d_v): [W_Q, W_K] per head, orthonormal columns;  W_V, W_O (d, d): orthogonal;
    alpha (heads, 1, 1).  Then ‖M-OSA(X)‖_F = ‖X‖_F for every α.  d_v = d / heads.
    Raises ValueError unless heads divides d and 2 d_v ≤ d, that is, heads ≥ 2.
    """
    if heads < 1 or d % heads:
        raise ValueError(f"heads must divide the width: {heads} heads, width {d}")
    d_v = d // heads
    if 2 * d_v > d:
        raise ValueError(
            f"[W_Q, W_K] cannot have orthonormal columns: 2 d_v = {2 * d_v} > d = {d}; "
            "use at least 2 heads"
        )
    return {
        "W_QK": np.stack([random_orthogonal(d, 2 * d_v, rng, dtype) for _ in range(heads)]),
        "W_V": random_orthogonal(d, d, rng, dtype),
        "W_O": random_orthogonal(d, d, rng, dtype),
        "alpha": np.full((heads, 1, 1), alpha, dtype),
    }


def calibrate_alpha(Q, K, target):
    """α (heads, 1, 1) for which the largest ‖S‖₂ over a batch is `target` in every head.

    Q, K: (batch, heads, N, d_v).  ‖S‖₂ is proportional to α.  A head with S = 0 to rounding gets
    α = target.
    """
    xp = array_module(Q, K)
    norm = rotation_angles(Q, K, 1.0)[..., 0].max(axis=0)[:, None, None]  # (heads, 1, 1)
    size = xp.sqrt(_inner(Q, Q) * _inner(K, K) / Q.shape[-1]).max(axis=0)  # ‖Q‖_F ‖K‖_F/√d_v
    nothing = norm <= 8 * float(np.finfo(Q.dtype).eps) * size
    return target / xp.where(nothing, 1, norm).astype(Q.dtype)


def jacobian_bound(X, W_QK, W_V, alpha):
    """ε (...) with |σ − 1| ≤ ε for the singular values σ of M-OSA's Jacobian at initialisation.

    X: (..., N, d); W_QK (h, d, 2 d_v) with orthonormal columns; W_V (d, d), W_O orthogonal; alpha
    (h, 1, 1).  With P_i = X W_QK^i, V_i = X W_V^i, s_i = α_i/√d_v, and [·] for heads side by side,
        ε = ‖[s_i W_QK^i J P_iᵀ V_i]‖₂ + ‖[s_i ‖P_i‖₂ V_i]‖₂ + (Σ_i (s_i ‖P_i‖₂ ‖S_i‖₂ ‖V_i‖₂)²)^½.
    Proof.  The Jacobian is T + D.  T(E) = [e^{S_i} E W_V^i] W_O keeps the norm.  With
    M_i = W_QK^i J W_QK^iᵀ, dS_i = s_i (E M_i Xᵀ + X M_i Eᵀ), so that
        D(E) = [∫₀¹ e^{uS_i} s_i (E M_i Xᵀ + X M_i Eᵀ) e^{(1−u)S_i} V_i du] W_O.
    Were e^{(1−u)S_i} = I, its two terms would have at most the first two norms of ε, as
    M_i Xᵀ = W_QK^i J P_iᵀ; ‖e^{vS} − I‖ ≤ v‖S‖ adds the third, one half for each.  Then
    |σ − 1| ≤ ‖D‖ ≤ ε.  Ours; two to five times the deviation measured.
    """
    xp, (h, d, r) = array_module(X, W_QK, W_V, alpha), W_QK.shape
    d_v, X = r // 2, X[..., None, :, :]
    P = X @ W_QK  # (..., h, N, r)
    V = X @ W_V.reshape(d, h, d_v).transpose(1, 0, 2)  # (..., h, N, d_v)

    def norm(M):
        return xp.linalg.norm(M, 2, axis=(-2, -1))[..., None, None]

    def side_by_side(M):  # (..., h, n, m) -> (..., n, h m)
        M = M.swapaxes(-3, -2)
        return M.reshape(*M.shape[:-2], -1)

    S = rotation_angles(P[..., :d_v], P[..., d_v:], alpha)[..., :1, None]  # ‖S_i‖₂ (..., h, 1, 1)
    s = abs(alpha) / math.sqrt(d_v)
    first = norm(side_by_side(s * (W_QK @ _J_times(_T(P) @ V))))
    second = norm(side_by_side(s * norm(P) * V))
    third = s * norm(P) * S * norm(V)
    return (first + second)[..., 0, 0] + xp.sqrt((third * third).sum(axis=(-3, -2, -1)))


def tailored_slope(depth, eta):
    """Slope a of the leaky ReLU for which `depth` of them take correlation 0 to eta.

    For unit-variance pairs of correlation c, φ_a(x) = √(2/(1+a²)) LReLU_a(x) gives
        C_a(c) = c + (1−a)²/(π(1+a²)) (√(1−c²) − c arccos c)      (TAT, arXiv 2203.08120).
    Bisection: the composition falls from its value at a = 0 (ReLU) to 0 at a = 1 (linear).
    Raises ValueError for an eta that even ReLU does not reach.
    """

    def composed(a):
        c = 0.0
        for _ in range(depth):
            c += (1 - a) ** 2 / (math.pi * (1 + a * a)) * (math.sqrt(1 - c * c) - c * math.acos(c))
            c = min(c, 1.0)
        return c

    if not 0 < eta <= composed(0.0):
        raise ValueError(
            f"eta must be in (0, {composed(0.0):.4f}] for depth {depth}: "
            f"beyond it lies not even the ReLU; got {eta}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if composed(middle) > eta else (low, middle)
    return low


# ---------------------------------------------------------------------------------------- layer


def _osa_joint(F, alpha):
    d_v = F.shape[-1] // 3
    O, saved = forward_joint(F, alpha / math.sqrt(d_v), d_v)
    return O, (alpha.shape, d_v, saved)


def _osa_joint_backward(dO, saved):
    alpha_shape, d_v, joint = saved
    dF, ds = backward_joint(dO, joint)
    return dF, ag.unbroadcast(ds / math.sqrt(d_v), alpha_shape)


# Orthogonal attention as one node of the autograd graph: F = [Q, K, V] (B, h, N, 3 d_v) and
# alpha (h, 1, 1) -> O (B, h, N, d_v), with the manual backward pass above.
osa = ag.operator(_osa_joint, _osa_joint_backward)


class MultiHeadOSA:
    """M-OSA(X) = [O_1, …, O_h] W_O, X (B, N, d) -> (B, N, d).  Parameters: see `init_mosa`."""

    def __init__(self, d, heads, rng, xp=np, dtype=np.float32):
        self.heads = heads
        init = init_mosa(d, heads, rng, dtype=dtype)
        self.parameters = {k: Tensor(xp.asarray(v), requires_grad=True) for k, v in init.items()}

    def project(self, X):
        """F = [Q, K, V] (B, h, N, 3 d_v) of the tokens X (B, N, d), in one matrix product."""
        (B, N, d), h = X.shape, self.heads
        W_V = self.parameters["W_V"].reshape(d, h, d // h).transpose(1, 0, 2)  # (h, d, d_v)
        W = ag.concatenate([self.parameters["W_QK"], W_V], axis=-1)  # (h, d, 3 d_v)
        F = X @ W.transpose(1, 0, 2).reshape(d, 3 * d)  # (B, N, d) x (d, h · 3 d_v)
        return F.reshape(B, N, h, 3 * d // h).transpose(0, 2, 1, 3)

    def attend(self, F):
        """O (B, h, N, d_v) from F = [Q, K, V] (B, h, N, 3 d_v)."""
        return osa(F, self.parameters["alpha"])

    def __call__(self, X):
        O = self.attend(self.project(X)).transpose(0, 2, 1, 3)  # (B, N, h, d_v)
        return O.reshape(X.shape) @ self.parameters["W_O"]


class MLP:
    """φ(X W_1 + b_1) W_2 + b_2 with a tailored leaky ReLU φ and semi-orthogonal W_1, W_2.

    W_1 (d, m d) has orthonormal rows, W_2 (m d, d) orthonormal columns.  φ is positively
    homogeneous, so the gain √m that restores the variance of X W_1 is taken into φ.
    """

    def __init__(self, d, ratio, slope, rng, xp=np, dtype=np.float32):
        self.slope = slope
        self.gain = math.sqrt(2 / (1 + slope * slope)) * math.sqrt(ratio)
        init = {
            "W_1": random_orthogonal(d, ratio * d, rng, dtype),
            "b_1": np.zeros(ratio * d, dtype),
            "W_2": random_orthogonal(ratio * d, d, rng, dtype),
            "b_2": np.zeros(d, dtype),
        }
        self.parameters = {k: Tensor(xp.asarray(v), requires_grad=True) for k, v in init.items()}

    def __call__(self, X):
        p = self.parameters
        H = ag.leaky_relu(ag.linear(X, p["W_1"], p["b_1"]), self.slope, self.gain)
        return ag.linear(H, p["W_2"], p["b_2"])


# -------------------------------------------------------------------------------------- network


def patchify(images, patch):
    """(B, H, W) images -> (B, N, patch²) tokens, row by row; N = H W / patch²."""
    if images.ndim != 3 or not images.size:
        raise ValueError(f"images must be (B, H, W), not empty, got shape {images.shape}")
    B, H, W = images.shape
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"patch must divide the image: patch {patch}, image {H} x {W}")
    tiles = images.reshape(B, H // patch, patch, W // patch, patch).transpose(0, 1, 3, 2, 4)
    return tiles.reshape(B, -1, patch * patch)


class SkiplessTransformer:
    """patches -> linear + position -> depth × [X ← MLP(M-OSA(X))] -> mean over tokens -> linear.

    No skip connection and no normalisation layer.  images: (B, H, W) -> logits (B, classes).
    The weights are drawn on the CPU from `rng`, then moved to the module `xp`.
    """

    Attention = MultiHeadOSA

    def __init__(
        self, *, d, heads, depth, patch, image, classes, mlp_ratio, eta, rng, xp=np,
        dtype=np.float32,
    ):  # fmt: skip
        if patch < 1 or image < 1 or image % patch:
            raise ValueError(f"patch must divide the image: patch {patch}, image {image} x {image}")
        self.patch, N = patch, (image // patch) ** 2
        slope = tailored_slope(depth, eta)
        init = {
            "W_E": random_orthogonal(patch * patch, d, rng, dtype),
            "b_E": rng.standard_normal((N, d)).astype(dtype) * dtype(0.1),  # position embedding
            "W_C": random_orthogonal(d, classes, rng, dtype),
            "b_C": np.zeros(classes, dtype),
        }
        self.ends = {k: Tensor(xp.asarray(v), requires_grad=True) for k, v in init.items()}
        self.layers = [
            (self.Attention(d, heads, rng, xp, dtype), MLP(d, mlp_ratio, slope, rng, xp, dtype))
            for _ in range(depth)
        ]

    @property
    def parameters(self):
        """All parameters by name: "W_E", …, "layers.0.W_QK", …"""
        named = dict(self.ends)
        for i, layer in enumerate(self.layers):
            for part in layer:
                named |= {f"layers.{i}.{k}": t for k, t in part.parameters.items()}
        return named

    def embed(self, images):
        """X (B, N, d), the input of the first layer."""
        patches = patchify(images, self.patch)
        return Tensor(patches) @ self.ends["W_E"] + self.ends["b_E"]

    def layer(self, X, attention, mlp):
        """X ← MLP(M-OSA(X))"""
        return mlp(attention(X))

    def read_out(self, X):
        """logits (B, classes) from the last tokens X (B, N, d): their mean, then a linear map."""
        return ag.linear(X.mean(axis=1), self.ends["W_C"], self.ends["b_C"])

    def __call__(self, images):
        X = self.embed(images)
        for parts in self.layers:
            X = self.layer(X, *parts)
        return self.read_out(X)
