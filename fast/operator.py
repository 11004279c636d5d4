"""Orthogonal Self-Attention for any input at full speed: five routes to O = exp(S) V, and a choice.

The equations are those of `osa_minimal`; here it is decided in which way each input is computed.
[Q, K, V] is one packed array, QKV; the batch goes in parts to several threads, and what a route
could not do right is found out before and given to another.
"""

import contextlib
import math

import numpy as np

import autograd as ag
import osa_minimal
from autograd import array_module
from fast.basis import cholesky_basis, double_basis, double_is_fast, tall_product
from fast.gpu import product
from fast.small import Chebyshev, ChebyshevMatrix, Products, Spectral, inner, phi1, sharper_bound
from fast.threads import batch_parts, parallel
from osa_minimal import T, orthonormal_basis

ROUTES = ("auto", "gram", "qr", "newton_schulz", "dense", "products")
# Limits of `auto`.  Estimated error of the gram route / (eps max(1, ‖S‖)); see `_gram_norms`.
GRAM_LIMIT = 8.0
# The same for float32 tokens and G in float64: up to here nothing of eps = 1.2e-7 is lost.
GRAM_LIMIT_64 = 1e7
# ‖S‖: above it the small exponential is spectral, with cost and accuracy independent of ‖S‖.
RHO_MAX = 64.0
# Rows of [P, V, dO] taken at a time on a CPU, where they have to be copied.
CACHE_ROWS = 1024


def osa_forward(Q, K, V, alpha, route="auto"):
    """O = exp(S) V in time and memory linear in N, and what `osa_backward` needs.

    Q, K: (..., N, d_v); V: (..., N, m), m = d_v in the layer; alpha: a number or an array that
    broadcasts to (..., 1, 1).  All float32 or all float64, NumPy or CuPy; never modified.
    route: "dense"          exp of the N × N matrix S, the definition
           "qr"             Theorem 2.1: O = V + B (exp(BᵀSB) − I) BᵀV, B by QR of [Q, K]
           "newton_schulz"  the same, with the basis by Newton–Schulz
           "gram"           no basis: O = V + P Φ (PᵀV), Φ = sJ φ₁(sGJ), G = PᵀP
           "products"       as "qr", B by Cholesky, exp by squaring: the host decides nothing, so it
                            never waits for a GPU; beyond ‖S‖₂ = 1000 right or NaN, never wrong
           "auto"           "gram" where its rounding error is harmless, with G in float64 or else a
                            basis in float64 if need be, for float64 "qr"; B = I for N ≤ 2 d_v;
                            "products" on a GPU
    To pad, zero rows of Q and K: those rows of A are the identity's, on every route.
    Returns (O, saved).  Raises ValueError or TypeError naming the argument at fault, ValueError for
    NaN or Inf, FloatingPointError where S overflows; on a GPU "auto" answers these with NaN.
    Source: Theorem 2.1 for "qr" and "newton_schulz"; the rest is ours.
    """
    Q, K, V, s = _checked(Q, K, V, alpha)
    # One array for [Q, K, V], so that PᵀP and PᵀV are one matrix product.
    QKV = array_module(Q).empty((*Q.shape[:-1], 2 * Q.shape[-1] + V.shape[-1]), Q.dtype)

    def pack(part):
        array_module(QKV).concatenate([Q[part], K[part], V[part]], axis=-1, out=QKV[part])

    parallel(pack, batch_parts(QKV))
    O, saved = forward_packed(QKV, s, Q.shape[-1], route)
    return O, (alpha, V, saved)


def osa_backward(dO, saved):
    """dQ, dK, dV, dalpha for the gradient dO (..., N, m) of O = osa_forward(...)[0].

    dalpha has the shape of alpha.  Raises ValueError for a dO of the wrong shape or dtype,
    FloatingPointError where a product overflows.
    """
    alpha, V, packed = saved
    array_module(dO, V)  # TypeError for what is no array, or one of another device
    if dO.shape != V.shape or dO.dtype != V.dtype:
        raise ValueError(f"dO must be {V.dtype} {V.shape} like O, got {dO.dtype} {dO.shape}")
    _check_finite("dO", dO)
    dQKV, ds = backward_packed(dO, packed)
    d_v = (dQKV.shape[-1] - V.shape[-1]) // 2
    dalpha = ag.unbroadcast(ds / math.sqrt(d_v), getattr(alpha, "shape", ()))
    return dQKV[..., :d_v], dQKV[..., d_v : 2 * d_v], dQKV[..., 2 * d_v :], dalpha


def attention_matrix(Q, K, alpha, route="auto"):
    """A = exp(S) (..., N, N) ∈ SO(N), by applying it to the identity: for pictures and checks."""
    _checked(Q, K, Q, alpha)
    xp = array_module(Q, K)
    I = xp.broadcast_to(xp.eye(Q.shape[-2], dtype=Q.dtype), (*Q.shape[:-1], Q.shape[-2]))
    return osa_forward(Q, K, I, alpha, route)[0]


class MultiHeadOSA(osa_minimal.MultiHeadOSA):
    """The paper's layer with this operator."""

    def attend(self, QKV):
        return osa_packed(QKV, self.parameters["alpha"])


def _osa_packed(QKV, alpha):
    if QKV.ndim < 2 or QKV.shape[-1] % 3 or not QKV.size or alpha.shape[-2:] not in ((), (1, 1)):
        wanted = "QKV = [Q, K, V] must be (..., N, 3 d_v), not empty, and alpha (..., 1, 1)"
        raise ValueError(f"{wanted}, got {QKV.shape} and {alpha.shape}")
    d_v = QKV.shape[-1] // 3
    s = (alpha if alpha.ndim else alpha.reshape(1, 1)) / math.sqrt(d_v)
    O, saved = forward_packed(QKV, s, d_v)
    return O, (alpha.shape, d_v, saved)


def _osa_packed_backward(dO, saved):
    alpha_shape, d_v, packed = saved
    dQKV, ds = backward_packed(dO, packed)
    return dQKV, ag.unbroadcast(ds / math.sqrt(d_v), alpha_shape)


# QKV = [Q, K, V] (B, h, N, 3 d_v) and alpha (h, 1, 1) -> O (B, h, N, d_v) in the autograd graph.
osa_packed = ag.operator(_osa_packed, _osa_packed_backward)


# ------------------------------------------------------------------------------ the packed operator


def forward_packed(QKV, s, d_v, route="auto"):
    """`osa_forward` on [Q, K, V] (..., N, 2 d_v + m) and s = α/√d_v (..., 1, 1), unchecked."""
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
    xp = array_module(QKV)
    if xp is not np:
        QKV = xp.ascontiguousarray(QKV)  # cuBLAS wants one stride from matrix to matrix
    O = xp.empty_like(QKV[..., 2 * d_v :])

    def forward_part(part):
        s_part = s[part] if s.ndim == QKV.ndim and len(s) > 1 else s
        with _overflow_or_nan(QKV[part], s):
            O[part], backward = _forward(QKV[part], s_part, d_v, route)
        return backward

    parts = batch_parts(QKV)
    return O, (QKV, parts, parallel(forward_part, parts))


def backward_packed(dO, saved):
    """dQKV (..., N, 2 d_v + m) and ds (..., 1, 1) for the gradient dO (..., N, m), unchecked."""
    QKV, parts, backwards = saved
    xp = array_module(QKV)
    if xp is not np:
        dO = xp.ascontiguousarray(dO)
    dQKV, ds = xp.empty_like(QKV), xp.empty((*QKV.shape[:-2], 1, 1), QKV.dtype)

    def backward_part(part, backward):
        with _overflow_or_nan(QKV[part], dO[part]):
            backward(dO[part], dQKV[part], ds[part])

    parallel(backward_part, parts, backwards)
    return dQKV, ds


def _forward(QKV, s, d_v, route):
    """O of one part of the batch, and its backward(dO, dQKV, ds), which fills dQKV and ds.

    The gram route if it is asked for or harmless, else Theorem 2.1 with a basis B, or B = I.
    """
    xp, N, P = array_module(QKV), QKV.shape[-2], QKV[..., : 2 * d_v]
    if route == "auto" and xp is not np:
        route = "products"
    tall = N > 2 * d_v
    if route == "gram" or (route == "auto" and tall):
        result = _try_gram(QKV, s, d_v, route)
        if result:
            return result
    B = R = None  # B = I
    if route in ("auto", "products") and QKV.dtype == np.float32 and double_is_fast(xp):
        if not tall:
            R = P.astype(np.float64)
        else:
            with contextlib.suppress(np.linalg.LinAlgError):  # CuPy gives NaN instead
                B, R = double_basis(P)
            if xp is np and (B is None or not np.isfinite(R).all()):
                B, R = orthonormal_basis(P), None
    elif tall and route == "products":
        B, R = cholesky_basis(P)
    elif tall and route == "newton_schulz":
        B = orthonormal_basis(P, "newton_schulz")
    elif tall and route in ("auto", "qr"):
        B = orthonormal_basis(P)
    return _by_basis(QKV, B, R, s, d_v, route)


# ---------------------------------------------------------------------------------- without a basis


def _try_gram(QKV, s, d_v, route):
    """`_by_gram` if it was asked for or is accurate enough, else None; for float32 tokens a second
    try has all that comes of G in float64, where the squares of float32 are exact."""
    xp, r = array_module(QKV), 2 * d_v
    for dtype, limit in ((QKV.dtype, GRAM_LIMIT), (np.float64, GRAM_LIMIT_64)):
        X = QKV.astype(dtype, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is given to a basis
            M = tall_product(X[..., :r], X)  # (r, N) x (N, r + m) -> [G, PᵀV]
            error, rho = _gram_norms(QKV[..., :r], M[..., :r], s, d_v)
            safe = (error <= limit * xp.maximum(rho, 1)).all() & xp.isfinite(M).all()
        if route == "gram" or safe:
            break
        if M.dtype == np.float64:
            return None
    rho = float(rho.max())
    if route == "gram" and not rho <= 2e3:
        raise ValueError(f"route 'gram' needs ‖S‖ ≤ 2e3, got {rho:.1e}; 'auto' has no limit")
    if route == "auto" and rho > RHO_MAX:
        return None
    try:
        return _by_gram(QKV, M, s, d_v, rho)
    except FloatingPointError:  # Q and K of sizes whose squares overflow
        if route == "gram":
            raise
        return None


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
    s = abs(s[..., 0, 0]).astype(G.dtype)

    def size(M, MtM):
        row_sums = abs(MtM).sum(axis=-1).max(axis=-1)
        row_sums += M.shape[-2] * float(np.finfo(MtM.dtype).tiny)  # what may have underflowed
        if M.dtype != MtM.dtype:  # G in float64: nothing is lost
            return s * row_sums
        rows = xp.einsum("...ij,...ij->...i", M, M)  # ‖q_i‖² (..., N)
        mean = xp.maximum(rows.mean(axis=-1), float(np.finfo(M.dtype).tiny))
        return s * row_sums * xp.maximum(rows.max(axis=-1) / (4 * mean), 1)

    rho2 = s * s * (inner(QQ, KK) - inner(QK, T(QK)))[..., 0, 0]
    error = size(P[..., :d_v], QQ) * size(P[..., d_v:], KK)
    return error, xp.sqrt(xp.maximum(rho2, 0))


def _by_gram(QKV, M, s, d_v, rho):
    """O = V + P sJ y with y = φ₁(Z) W, Z = sGJ, G = PᵀP, W = PᵀV, and its backward.

    For g = PᵀdO and h = sJᵀg the series gives W̄ = φ₁(Zᵀ)h and Z̄; then Ḡ = s Z̄Jᵀ and
        dP = P (Ḡ + Ḡᵀ) + V W̄ᵀ + dO (sJy)ᵀ,   dV = P W̄ + dO,   ds = ⟨g, Jy⟩ + ⟨Z̄Jᵀ, G⟩.
    """
    r, xp = 2 * d_v, array_module(QKV)
    G, W, width, m = M[..., :r], M[..., r:], QKV.shape[-1], QKV.shape[-1] - r
    with np.errstate(over="ignore", invalid="ignore"):
        Z = s * _times_J(G)
        small = Chebyshev(Z, W, sharper_bound(Z, rho), phi1)
        Jy = _J_times(small.value)
        sJy = s * Jy
    # One product, [P, V] [sJy; I]: adding V is a pass over memory otherwise.
    X = xp.empty((*QKV.shape[:-2], width, m), M.dtype)
    X[..., :r, :], X[..., r:, :] = sJy, xp.eye(m, dtype=M.dtype)
    _refuse_overflow("Q, K and V", Jy, sJy)

    def backward(dO, dQKV, ds):
        X = xp.zeros((*QKV.shape[:-2], width + m, width), M.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            g = tall_product(QKV[..., :r], dO.astype(M.dtype, copy=False))  # (r, N) x (N, m)
            Wbar, Zbar = small.adjoint(-s * _J_times(g))
            E = -_times_J(Zbar)  # Ḡ/s
            ds[...] = inner(g, Jy) + inner(E, G)
            X[..., :r, :r], X[..., :r, r:] = s * (E + T(E)), Wbar
            X[..., r:width, :r] = T(Wbar)
            X[..., width:, :r], X[..., width:, r:] = T(s * Jy), xp.eye(m, dtype=M.dtype)
            _rows_times((QKV, dO), X, dQKV)  # [dP, dV] = [P, V, dO] X
        _refuse_overflow("Q, K, V and dO", X, ds, *([dQKV] if M.dtype != QKV.dtype else []))

    return product(QKV, X), backward


def _J_times(M):
    """J M for M (..., r, n), J = [[0, I], [−I, 0]]."""
    h = M.shape[-2] // 2
    return array_module(M).concatenate([M[..., h:, :], -M[..., :h, :]], axis=-2)


def _times_J(M):
    """M J for M (..., n, r)."""
    h = M.shape[-1] // 2
    return array_module(M).concatenate([-M[..., h:], M[..., :h]], axis=-1)


def _rows_times(parts, X, out):
    """out = [parts side by side] X; on a CPU in blocks of rows that stay in the cache."""
    xp, N = array_module(X), out.shape[-2]
    size = CACHE_ROWS if xp is np else N
    for i in range(0, N, size):
        rows = (..., slice(i, i + size), slice(None))
        product(xp.concatenate([p[rows] for p in parts], axis=-1), X, out=out[rows])


# ------------------------------------------------------------------------------------- with a basis


def _by_basis(QKV, B, R, s, d_v, route):
    """O = V + B (exp(S_B) − I) b with S_B = BᵀSB = s R J Rᵀ, R = BᵀP, b = BᵀV, and its backward.

    B = None stands for I; R = None is computed here, in one product with b.  Backward as in
    `osa_minimal`: g = BᵀdO, L_B = frechet(S_Bᵀ, g bᵀ), u = φ₁(S_B)b, w = φ₁(S_B)ᵀg, P = B R:
        H = B (L_B − L_Bᵀ) + (dO − B g) uᵀ − (V − B b) wᵀ,
        dP = −s H R J,   dV = dO + B (exp(S_B)ᵀ − I) g,   ds = ⟨L_B, R J Rᵀ⟩.
    """
    r, xp, V = 2 * d_v, array_module(QKV), QKV[..., 2 * d_v :]
    if R is not None:
        b = V if B is None else tall_product(B, V)
    else:
        BtQKV = QKV if B is None else tall_product(B, QKV)  # (k, N) x (N, r + m) -> [R, b]
        R, b = BtQKV[..., :r], BtQKV[..., r:]
    with np.errstate(over="ignore", invalid="ignore"):
        RJRt = _RJRt(R)
        S = (s * RJRt).astype(QKV.dtype)  # S_B = BᵀSB; R in float64 keeps what cancels in it
        R, RJRt = R.astype(QKV.dtype, copy=False), RJRt.astype(QKV.dtype, copy=False)
        small = Products(S, b) if route == "products" else _small_exponential(S, b, route)
    O = small.value if B is None else V + product(B, small.value - b)

    def backward(dO, dQKV, ds):
        k, m, width = S.shape[-1], dO.shape[-1], QKV.shape[-1]
        minus_sRJ = -s * _times_J(R)  # s first: it may keep the rest from overflowing
        with np.errstate(over="ignore", invalid="ignore"):
            g = dO if B is None else tall_product(B, dO)
            expSt_g, L_B = small.adjoint(g)
            ds[...] = inner(L_B, RJRt)
            if B is None:
                dQKV[..., :r], dQKV[..., r:] = product(L_B - T(L_B), minus_sRJ), expSt_g
            else:
                # φ₁(−S_B) = φ₁(S_B) exp(−S_B) makes u and w one product.
                uw = small.phi1(xp.concatenate([b, expSt_g], axis=-1))
                ut, wt = T(uw[..., :m]), T(uw[..., m:])
                # [dP, dV] = [B, V, dO] X
                X = xp.zeros((*QKV.shape[:-2], k + 2 * m, width), QKV.dtype)
                X[..., :k, :r] = product(L_B - T(L_B) - product(g, ut) + product(b, wt), minus_sRJ)
                X[..., :k, r:] = expSt_g - g
                X[..., k : k + m, :r] = -product(wt, minus_sRJ)
                X[..., k + m :, :r] = product(ut, minus_sRJ)
                X[..., k + m :, r:] = xp.eye(m, dtype=QKV.dtype)
                _rows_times((B, V, dO), X, dQKV)
        if route != "products":  # which goes on with NaN
            _refuse_overflow("Q, K, V and dO", ds, dQKV)

    return O, backward


def _small_exponential(S, b, route):
    """exp(S_B) b in the way that suits ‖S_B‖ and the shape of b."""
    S64 = S.astype(np.float64)  # squares of float32 could overflow
    rho = math.sqrt(float(inner(S64, S64).max()) / 2)  # ‖S‖_F/√2 ≥ ‖S‖₂
    if not rho < float(np.finfo(S.dtype).max) / 8:  # room for eigh
        raise FloatingPointError(f"S = (α/√d_v)(QKᵀ − KQᵀ) overflows {S.dtype}")
    if route == "dense" or rho > RHO_MAX:
        return Spectral(S, b)
    kind = Chebyshev if b.shape[-1] <= b.shape[-2] else ChebyshevMatrix
    return kind(S, b, sharper_bound(S, rho))


def _RJRt(R):
    """R J Rᵀ = R_Q R_Kᵀ − R_K R_Qᵀ, exactly skew-symmetric."""
    h, right = R.shape[-1] // 2, T(R[..., R.shape[-1] // 2 :])
    if array_module(R) is np:
        right = np.ascontiguousarray(right)  # BLAS on a CPU is slow with many small transposes
    QKt = product(R[..., :h], right)
    return QKt - T(QKt)


# ---------------------------------------------------------------------------------- checks of input


def _refuse_overflow(names, *arrays):
    """FloatingPointError unless these arrays, products of `names`, are finite; a GPU is not waited
    for, and goes on with NaN."""
    if array_module(*arrays) is np and not all(np.isfinite(a).all() for a in arrays):
        raise FloatingPointError(f"a product of {names} overflows {arrays[0].dtype}")


@contextlib.contextmanager
def _overflow_or_nan(*inputs):
    """What is said to overflow in this context may have been NaN or Inf from the start."""
    try:
        yield
    except FloatingPointError:
        if all(np.isfinite(a).all() for a in inputs):
            raise
        raise FloatingPointError("Q, K, V, alpha or the gradient holds NaN or Inf") from None


def _check_float(name, a, min_ndim=0):
    if isinstance(a, ag.Tensor) or not hasattr(a, "dtype") or not hasattr(a, "shape"):
        raise TypeError(f"{name} must be a NumPy or CuPy array, got {type(a).__name__}")
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {a.dtype}")
    if a.ndim < min_ndim:
        raise ValueError(f"{name} needs at least {min_ndim} dimensions, got shape {a.shape}")


def _check_finite(name, a):
    """Raises ValueError for NaN or Inf; a GPU is not waited for."""
    if array_module(a) is not np:
        return

    def finite(part):
        # NaN and Inf survive a sum; a sum that overflows is looked at again, entry by entry.
        with np.errstate(over="ignore", invalid="ignore"):
            return np.isfinite(a[part].sum()) or np.isfinite(a[part]).all()

    if not all(parallel(finite, batch_parts(a))):
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
    if not isinstance(alpha, ag.NUMBERS):
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
