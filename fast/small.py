"""exp(S) W for small skew-symmetric S (..., n, n) and thin W (..., n, m), in four ways.

An application needs not the matrix exp(S) but its action: f(S) W for f = exp or φ₁, f(S)ᵀ G, and
the gradient of ⟨G, f(S) W⟩ with respect to S, for exp L(Sᵀ, G Wᵀ), L for `osa_minimal.frechet`.
`Spectral` is the formula, the others are matrix products only; a test holds them equal.
"""

import functools
import math

import numpy as np

from autograd import array_module
from fast.gpu import product
from osa_minimal import T, skew_eigh

# Squarings of `Products`: ‖S‖₂ may be 1000 for r ≤ 512, and 2 ** SQUARINGS at most.
SQUARINGS = 12


def frechet_skew(S, E):
    """L(S, E), the derivative of exp at skew-symmetric S in the direction E; both (..., n, n).

    In the eigenbasis the (j, k) entry is multiplied by the divided difference of e^{−iλ},
    e^{−i(λ_j+λ_k)/2} sinc((λ_j−λ_k)/2): no small denominators, exact at repeated angles and at 0.
    """
    return _frechet(*skew_eigh(S), E)


def _frechet(lam, U, E):
    mean = (lam[..., :, None] + lam[..., None, :]) / 2
    difference = lam[..., :, None] - lam[..., None, :]
    D = _exp(-1j * mean) * array_module(E).sinc(difference / (2 * math.pi))  # sin(πx)/(πx)
    return (U @ ((T(U.conj()) @ E @ U) * D) @ T(U.conj())).real.astype(E.dtype)


def _exp(z):
    return array_module(z).exp(z)


def phi1(z):
    """φ₁(z) = (e^z − 1)/z on the imaginary axis, as e^{z/2} sinc(z/2i): nothing cancels near 0."""
    return _exp(z / 2) * array_module(z).sinc(z.imag / (2 * math.pi))


class Spectral:
    """exp(S) W for skew-symmetric S (..., n, n) and W (..., n, m) by the spectrum; φ₁(S) W."""

    def __init__(self, S, W):
        self.W = W
        self.lam, self.U = skew_eigh(S)
        self.value = self._function(_exp, W)

    def _function(self, f, W):
        scaled = self.U * f(-1j * self.lam)[..., None, :]
        return (scaled @ (T(self.U.conj()) @ W)).real.astype(W.dtype)

    def phi1(self, W):
        """φ₁(S) W."""
        return self._function(phi1, W)

    def adjoint(self, G):
        """exp(S)ᵀ G and L(Sᵀ, G Wᵀ), the gradients of ⟨G, exp(S) W⟩."""
        back = self.U * _exp(1j * self.lam)[..., None, :]  # iSᵀ = U diag(−λ) Uᴴ
        expSt_G = (back @ (T(self.U.conj()) @ G)).real.astype(G.dtype)
        return expSt_G, _frechet(-self.lam, self.U, G @ T(self.W))


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
    a = (4 / rho) * sums if f is phi1 else 2 * J
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
        X2t = xp.ascontiguousarray(T(self.X2))
        c = self.C = xp.empty((len(self.a), *W.shape[:-2], W.shape[-1], W.shape[-2]), W.dtype)
        c[0] = T(W)
        xp.matmul(c[0], X2t, out=c[1])
        c[1] *= 0.5
        for k in range(2, len(c)):
            xp.matmul(c[k - 1], X2t, out=c[k])
            c[k] += c[k - 2]
        self.value = T(xp.tensordot(xp.asarray(self.a, dtype=W.dtype), c, axes=1))

    def phi1(self, W):
        """φ₁(Z) W."""
        return Chebyshev(self.Z, W, self.rho, phi1).value

    def adjoint(self, G):
        """f(Z)ᵀ G and the gradient Z̄ of ⟨G, f(Z) W⟩ with respect to Z.

        The recurrence run backwards, which is Clenshaw's with Zᵀ (c̄ = 0 beyond the last):
            c̄_k = a_k G + 2Xᵀ c̄_{k+1} + c̄_{k+2},  c̄_0 = a_0 G + Xᵀ c̄_1 + c̄_2,  X = Z/ρ,
            Z̄ = (1/ρ) (c̄_1 c_0ᵀ + Σ_{k≥1} 2 c̄_{k+1} c_kᵀ).
        """
        xp, c, last = array_module(G), self.C, len(self.a) - 1
        Gt = xp.ascontiguousarray(T(G))
        after, cbar = xp.zeros_like(Gt), self.a[last] * Gt  # c̄_{k+2}, c̄_{k+1}
        Zbar = xp.zeros_like(self.X2)
        for k in range(last - 1, -1, -1):
            if k == 0:
                cbar *= 0.5  # ½ c̄_1 serves both formulas
            Zbar += T(cbar) @ c[k]
            after += self.a[k] * Gt
            after += cbar @ self.X2
            after, cbar = cbar, after
        Zbar *= 2 / self.rho
        return T(cbar), Zbar


def inner(A, B):
    """⟨A, B⟩ over the last two axes, (..., 1, 1)."""
    if array_module(A, B) is np:  # einsum stores no products; CuPy's is a batch of tiny matmuls
        return np.einsum("...ij,...ij->...", A, B)[..., None, None]
    return (A * B).sum(axis=(-2, -1), keepdims=True)


def sharper_bound(Z, rho):
    """A bound of the spectrum ±iθ of Z (..., n, n), given that rho = (Σθ²)^½ is one.

    (Σθ⁴)^¼ = (tr(Z⁴)/2)^¼ ≤ rho costs one product and saves the series a quarter of its terms at
    n = 32, two fifths at n = 128.  Below 1 there is nothing to save.
    """
    if rho <= 1:
        return rho
    Z2 = Z @ Z
    fourth = float(inner(Z2, T(Z2)).max()) / 2
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
        Zbar = self.matrix.adjoint(G @ T(self.W))[1]
        return T(self.matrix.value) @ G, Zbar


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
        self.exps = xp.empty((SQUARINGS, *S.shape), S.dtype)
        self.exps[...] = xp.eye(S.shape[-1], dtype=S.dtype)
        for exp, due in zip(self.exps, more):  # exp(2ⁱX), or I where no squaring is due any more
            xp.copyto(exp, E, where=due)
            E = product(E, exp)
        self.matrix = E
        self.value = product(E, W)

    def phi1(self, W):
        """φ₁(S) W."""
        W = product(_polynomial(self.X, 1), W)
        for mean in (self.exps + array_module(W).eye(W.shape[-2], dtype=W.dtype)) / 2:
            W = product(mean, W)
        return W

    def adjoint(self, G):
        """exp(S)ᵀ G and L(Sᵀ, G Wᵀ), the gradients of ⟨G, exp(S) W⟩."""
        xp, X, n = array_module(G), T(self.X), G.shape[-2]
        D = xp.zeros((*X.shape[:-2], 2 * n, 2 * n), X.dtype)
        D[..., :n, :n] = D[..., n:, n:] = X
        D[..., :n, n:] = product(G, T(self.W))
        # L(X, E) is the upper right quarter of exp([[X, E], [0, X]]).
        L = _polynomial(D, 0)[..., :n, n:]
        # From L(X, E) to L(S, E).  With half of e = exp(2ⁱX)ᵀ on the diagonal and L in the quarter
        # [½e, L] [L; ½e] is one product; where no doubling is due e = I, and ½L + ½L = L.
        D = xp.empty((SQUARINGS + 1, *D.shape), X.dtype)
        D[:-1, ..., :n, :n] = D[:-1, ..., n:, n:] = T(self.exps) / 2
        D[0, ..., :n, n:] = L
        for i in range(SQUARINGS):
            product(D[i, ..., :n, :], D[i, ..., n:], out=D[i + 1, ..., :n, n:])
        return product(T(self.matrix), G), D[-1, ..., :n, n:]


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
