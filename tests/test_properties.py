"""The operator of fast/ and the functions of osa_minimal.py, on inputs that nobody would think of.

Whatever the shape, dtype, memory layout or scale: either the right answer, held against the dense
definition in float64, or, of fast/, an error that names the argument; never a wrong number, a
warning (errors here) or a changed input.  The same inputs every time: the search is derandomised.
"""

import math
import re

import numpy as np
import pytest
from cases import cast

import fast
import osa_minimal as osa
from fast import small

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

settings.register_profile(
    "here", derandomize=True, deadline=None, max_examples=200, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
settings.load_profile("here")
REFUSALS = (ValueError, TypeError, FloatingPointError)
NAMES = r"\b(Q|K|V|S|dO|alpha|α)\b"


def laid_out(a, layout):
    """The same numbers in another memory layout."""
    if layout == "column-major":
        return np.asfortranarray(a)
    out = a.copy()
    if layout == "every other row":
        out = np.full((*a.shape[:-2], 2 * a.shape[-2], a.shape[-1]), np.nan, a.dtype)[..., ::2, :]
    elif layout == "backwards":
        out = out[..., ::-1, ::-1]
    out[...] = a
    out.flags.writeable = layout != "read-only"
    return out


LAYOUTS = ("plain", "column-major", "every other row", "backwards", "read-only")


@st.composite
def inputs(draw):
    """Q, K, V, alpha, dO of one dtype, each at a scale of its own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    N, d_v, m = (draw(st.integers(1, n)) for n in (12, 5, 6))
    special = draw(st.sampled_from(["none", "none", "K = Q", "a zero token", "rank one", "K = 0"]))
    arrays = {}
    for name, width in {"Q": d_v, "K": d_v, "V": m, "dO": m}.items():
        arrays[name] = rng.standard_normal((*batch, N, width))
    if special == "K = Q":
        arrays["K"] = arrays["Q"]
    elif special == "a zero token":
        arrays["Q"][..., 0, :] = arrays["K"][..., 0, :] = 0
    elif special == "rank one":
        arrays["K"] = arrays["K"][..., :1] * np.ones(d_v)
    elif special == "K = 0":
        arrays["K"] = 0 * arrays["K"]
    for name, a in arrays.items():
        scaled = (a * 10.0 ** draw(st.integers(-30, 30))).astype(dtype)
        arrays[name] = laid_out(scaled, draw(st.sampled_from(LAYOUTS)))
    alpha = draw(st.sampled_from([0.0, 0.1, -1.0, 3.0]))
    if draw(st.booleans()):
        alpha = np.full((*batch[-1:], 1, 1), alpha, dtype)
    return *(arrays[k] for k in ("Q", "K", "V")), alpha, arrays["dO"]


def unchanged(f, *arguments):
    """f(*arguments), or the refusal; neither may touch the arguments."""
    before = [np.array(a, copy=True) for a in arguments]
    try:
        result = f(*arguments)
    except REFUSALS as error:
        assert re.search(NAMES, str(error)), error
        result = error
    for a, b in zip(arguments, before):
        assert np.asarray(a).tobytes() == b.tobytes()
    return result


def size(*arrays):
    """The product of the Frobenius norms over the last two axes, the largest of the batch."""
    norms = [np.sqrt((a.astype(float) ** 2).sum(axis=(-2, -1))) for a in arrays]
    return float(np.prod(norms, axis=0).max())


def finite_in(dtype, *sizes):
    """Whether numbers of these sizes, with room for sums, exist in `dtype`."""
    return max(sizes) < 1e-3 * float(np.finfo(dtype).max)


def tolerance(Q, sigma):
    """eps for each of some n = N + r operations on each number; angles as large as ‖S‖ lose ‖S‖ of
    them, and K ≈ Q cancels in S, which costs ‖Q‖ ‖K‖ s = sigma instead.  16 for the rest."""
    return 16 * (Q.shape[-2] + 2 * Q.shape[-1]) * float(np.finfo(Q.dtype).eps) * max(1, sigma)


# --------------------------------------------------------------------------- forward and backward


@given(inputs(), st.sampled_from(fast.ROUTES))
def test_the_output_is_the_dense_definition_or_a_refusal(arrays, route):
    Q, K, V, alpha, _ = arrays
    sigma = abs(float(np.max(alpha))) / math.sqrt(Q.shape[-1]) * size(Q, K)
    result = unchanged(lambda *a: fast.osa_forward(*a, route)[0], Q, K, V, alpha)
    if isinstance(result, Exception):
        allowed = not finite_in(Q.dtype, sigma, size(Q, K))
        if route == "gram":  # its limit on ‖S‖, which it finds from squares
            allowed |= sigma > 1e3 or not finite_in(
                Q.dtype, *(size(P, P) * max(1, size(V)) for P in (Q, K)), size(Q, K) ** 2
            )
        assert allowed, result
        return
    assert result.dtype == V.dtype and result.shape == V.shape
    if route == "products" and np.isnan(result).any():
        assert not finite_in(Q.dtype, sigma, size(Q, K)) or sigma > 1e2  # its way to refuse
        return
    if route == "gram" and sigma > 1:
        return  # `auto` takes it only where it is accurate; it is not held to this when asked for
    tol, wide = tolerance(Q, sigma), cast(np.float64, Q, K, V, alpha)
    norm = np.linalg.norm(wide[2], axis=-2)
    assert (abs(np.linalg.norm(result.astype(float), axis=-2) - norm) <= tol * size(V)).all()
    if tol < 0.1:
        assert abs(result - osa.osa_dense(*wide)).max() <= tol * size(V)


@given(inputs(), st.sampled_from(["auto", "qr", "newton_schulz", "dense"]))
def test_gradients_are_those_of_the_dense_definition_or_a_refusal(arrays, route):
    Q, K, V, alpha, dO = arrays
    s = abs(float(np.max(alpha))) / math.sqrt(Q.shape[-1])
    sigma, flow = s * size(Q, K), size(V, dO)
    sizes = s * size(K) * flow, s * size(Q) * flow, size(dO), size(Q, K) * flow
    if not finite_in(Q.dtype, flow, sigma, size(Q, K), *sizes):
        return
    O, saved = fast.osa_forward(Q, K, V, alpha, route)
    grads = unchanged(lambda dO: fast.osa_backward(dO, saved), dO)
    P = max(size(Q), size(K))
    if isinstance(grads, FloatingPointError):  # products that are not the result, but on its way
        largest = max(1, size(V), size(dO), flow)
        assert not finite_in(Q.dtype, max(s * P, 1) * P * max(P, 1) * largest), grads
        return
    tol = tolerance(Q, sigma)
    wide, wide_dO = cast(np.float64, Q, K, V, alpha), dO.astype(float)
    wanted = fast.osa_backward(wide_dO, fast.osa_forward(*wide, "dense")[1])
    # What underflows on the way may be multiplied by s, P twice, V and dO, and is summed.
    tiny = float(np.finfo(Q.dtype).tiny) * Q.size * max(1, s) * max(1, P) ** 2
    tiny *= max(1, size(V)) * max(1, size(dO))
    for got, want, scale, a in zip(grads, wanted, sizes, (Q, K, V, alpha)):
        assert np.shape(got) == np.shape(a) and got.dtype == Q.dtype
        assert np.isfinite(got).all()
        if tol < 0.1:
            assert np.max(abs(got - want)) <= tol * scale + tiny


@given(inputs())
def test_scores_matrix_and_angles_are_those_of_the_definition(arrays):
    Q, K, _, alpha, _ = arrays
    s = abs(float(np.max(alpha))) / math.sqrt(Q.shape[-1])
    sigma = s * size(Q, K)
    if not finite_in(Q.dtype, sigma, size(Q, K), size(Q), size(K)):
        return
    tol, wide = tolerance(Q, sigma), cast(np.float64, Q, K, alpha)
    S = unchanged(osa.skew_scores, Q, K, alpha)
    A, B = (unchanged(f, Q, K, alpha) for f in (fast.attention_matrix, osa.attention_matrix))
    theta = unchanged(osa.rotation_angles, Q, K, alpha)
    exact_S = osa.skew_scores(*wide)
    tiny = float(np.finfo(Q.dtype).tiny) * Q.size
    assert S.dtype == A.dtype == B.dtype == theta.dtype == Q.dtype
    assert abs(S - exact_S).max() <= tol * sigma / max(1, sigma) + tiny and (S == -S.mT).all()
    N = Q.shape[-2]
    for matrix in (A, B):
        assert abs(matrix.mT @ matrix - np.eye(N)).max() <= tol
        if tol < 0.1:
            assert abs(matrix - osa.exp_skew(exact_S)).max() <= tol
    lam = np.linalg.eigvalsh(1j * exact_S)[..., ::-1][..., : min(N // 2, Q.shape[-1])]
    assert (np.diff(theta, axis=-1) <= 0).all() and (theta >= 0).all()
    assert abs(theta[..., : lam.shape[-1]] - lam).max(initial=0) <= tol * sigma / max(1, sigma) + (
        tiny
    )


SHAPES = [(), (0,), (3,), (0, 2), (3, 0), (3, 2), (4, 2), (3, 1), (1, 3, 2), (0, 3, 2), (2, 3, 2)]
DTYPES = [np.float32, np.float64, np.float16, np.int64, bool, complex, object, ">f8", "U1"]
KIND = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))


@given(st.tuples(KIND, KIND, KIND, KIND))
def test_foreign_shapes_and_dtypes_are_refused_by_name(kinds):
    arrays = [np.ones(shape).astype(dtype) for shape, dtype in kinds]
    Q, K, V, alpha = arrays
    for f, arguments in [(fast.osa_forward, arrays), (fast.attention_matrix, [Q, K, alpha])]:
        result = unchanged(f, *arguments)
        fits = all(a.dtype in (np.float32, np.float64) for a in arguments)
        fits = fits and Q.dtype == K.dtype and Q.shape == K.shape and Q.ndim > 1 and Q.size
        assert fits or isinstance(result, Exception)


# ------------------------------------------------------------------------------------ the others


@st.composite
def skew(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    n, batch = draw(st.integers(1, 8)), draw(st.sampled_from([(), (2,), (2, 1)]))
    M = rng.standard_normal((*batch, n, n)) * 10.0 ** draw(st.integers(-30, 6))
    S = (M - M.mT).astype(dtype)
    return laid_out(S, draw(st.sampled_from(LAYOUTS))), rng


@given(skew())
def test_the_exponential_is_orthogonal_and_its_spectrum_exact(case):
    S, _ = case
    n, eps, norm = S.shape[-1], np.finfo(S.dtype).eps, size(S)
    E = unchanged(osa.exp_skew, S)
    assert E.dtype == S.dtype and abs(E.mT @ E - np.eye(n)).max() <= 8 * n * eps
    back = osa.exp_skew(np.ascontiguousarray(S.mT))
    assert abs(E @ back - np.eye(n)).max() <= 8 * n * eps * max(1, norm)
    if n * eps * norm < 1:  # beyond that the paper's way refuses, as no digit of an angle is left
        assert abs(unchanged(osa.exp_phi1, S)[0] - E).max() <= 16 * n * eps * max(1, norm)
    lam, U = unchanged(osa.skew_eigh, S)
    assert (lam == -lam[..., ::-1]).all() and (np.diff(lam, axis=-1) >= 0).all()
    assert abs((U * lam[..., None, :]) @ U.conj().mT - 1j * S).max() <= 8 * n * eps * norm


@given(skew(), st.integers(1, 12), st.sampled_from(["qr", "newton_schulz"]))
def test_a_basis_is_orthonormal_and_spans_its_matrix(case, N, method):
    S, rng = case
    scale = max(float(abs(S).max()), 1e-30)
    if method == "newton_schulz":  # it is for tall matrices whose squares exist
        N += S.shape[-1]
        scale = max(scale, 1e3 * float(np.finfo(S.dtype).tiny) ** 0.5)
    M = (rng.standard_normal((*S.shape[:-2], N, S.shape[-1])) * scale).astype(S.dtype)
    B = unchanged(lambda M: osa.orthonormal_basis(M, method), M)
    if isinstance(B, Exception):
        raise B
    k, eps = B.shape[-1], np.finfo(M.dtype).eps
    assert B.dtype == M.dtype
    assert abs(B.mT @ B - np.eye(k)).max() <= 16 * (N + k) * eps
    assert abs(B @ (B.mT @ M) - M).max() <= 16 * (N + k) * eps * size(M)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([np.float32, np.float64]))
def test_random_orthogonal_matrices_are_orthogonal(n, m, dtype):
    W = osa.random_orthogonal(n, m, np.random.default_rng(0), dtype)
    assert W.shape == (n, m) and W.dtype == dtype and W.flags.c_contiguous
    gram = W.T @ W if n >= m else W @ W.T
    assert abs(gram - np.eye(min(n, m))).max() <= 16 * max(n, m) * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(st.one_of(st.floats(1e-3, 64), st.sampled_from([1e-3, 0.3, 1.0, 7.7, 63.0, 200.0])))
def test_chebyshev_coefficients_reproduce_the_function_and_its_derivative(dtype, rho):
    eps = float(np.finfo(dtype).eps)
    ends = np.linspace(-1, 1, 41)
    angle = np.linspace(0.3, math.pi - 0.3, 40)  # where θ/sin θ < 10
    t = np.cos(angle)
    for f in (small._exp, small.phi1):
        a = small.chebyshev_coefficients(f, rho, eps / 2)
        k = np.arange(len(a))[:, None]
        turned = np.array(a)[:, None] * 1j**k
        series = (turned * np.cos(k * np.arccos(ends))).sum(axis=0)
        # What was dropped, and rounding of the angles kθ and ρt, each up to π len(a).
        assert abs(series - f(1j * rho * ends)).max() <= eps / 2 + 8e-16 * len(a)
        if f is small._exp:  # its own derivative; T_k' = k sin(kθ)/sin θ
            slope = (turned * k * np.sin(k * angle) / np.sin(angle)).sum(axis=0) / (1j * rho)
            size = 10 * float((abs(turned) * k * k).sum()) / rho
            assert abs(slope - np.exp(1j * rho * t)).max() <= 4 * eps + 2e-16 * (size + len(a))
