"""What fast/ alone promises: hard data, devices, threads, large norms; its checks of input.

What holds of exp(S) V by whatever way, and so for all six routes, is in test_paper.py.
"""

import math

import cases
import numpy as np
import pytest
import refusing
from cases import OPERATORS, cast, close, gradient_sizes, gradients_close, make, norm_S, tolerance

import autograd as ag
import fast
import osa_minimal
from fast.basis import double_is_fast
from fast.small import Chebyshev, ChebyshevMatrix, Products, Spectral

# -------------------------------------------------------------- small exponential, its derivative


SMALL = {
    "Chebyshev": Chebyshev,
    "ChebyshevMatrix": ChebyshevMatrix,
    "products": lambda S, W, rho: Products(S, W),
}


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("slack", [1.0, 1.7])
def test_every_small_exponential_is_the_spectral_formula(spectrum, small, slack, rng, xp):
    S = spectrum(rng)
    W, G = (rng.standard_normal((*S.shape[:-1], 3)) for _ in range(2))
    rho = slack * cases.spectral_norm(S)  # any bound on the spectrum will do
    n = S.shape[-1]
    tol = 16 * n * np.finfo(float).eps * max(1, rho)
    quick, slow = SMALL[small](xp.asarray(S), xp.asarray(W), rho), Spectral(S, W)
    close(slow.value, cases.expm_one_by_one(S) @ W, tol * 3)  # entries of W reach 3
    close(quick.value, slow.value, tol * 3)
    for a, b in zip(quick.adjoint(xp.asarray(G)), slow.adjoint(G)):
        close(a, b, tol * np.linalg.norm(G) * max(1, np.linalg.norm(W)))
    close(slow.phi1(G), cases.phi1(S) @ G, tol * 3)
    close(quick.phi1(xp.asarray(G)), cases.phi1(S) @ G, tol * 3)


# --------------------------------------------------------------------------- large norms, hard data


def parallel_tokens(rng, N, d):
    """Tokens with a common component a thousand times as large as what tells them apart."""
    X = rng.standard_normal((N, 2 * d)) + 1000 * rng.standard_normal(2 * d)
    W = cases.columns(rng, 2 * d, 2 * d)
    return X @ W[:, :d], X @ W[:, d:]


def nearly_equal(rng, N, d):
    """K ≈ Q: S is what is left of a cancellation."""
    Q = 30 * rng.standard_normal((N, d))
    return Q, Q + 1e-3 * rng.standard_normal((N, d))


def hardly_apart(rng, N, d):
    """K ≈ Q to all but one digit of float32."""
    Q = rng.standard_normal((N, d)).astype(np.float32).astype(float)
    return Q, Q + 1e-7 * rng.standard_normal((N, d))


def powers(rng, N, d):
    """Columns whose singular values fade into rounding: 1, x, x², …"""
    P = np.vander(np.linspace(-1, 1, N), 2 * d)
    return P[:, :d], P[:, d:]


@pytest.mark.parametrize("tokens", [parallel_tokens, nearly_equal, hardly_apart, powers])
@pytest.mark.parametrize("N, d", [(24, 4), (60, 8), (12, 8)])
def test_auto_stays_accurate_for_parallel_tokens_and_for_K_near_Q(tokens, N, d, dtype, rng, xp):
    Q, K = cast(dtype, *tokens(rng, N, d))
    V, dO = cast(dtype, *rng.standard_normal((2, N, d)))
    alpha = dtype(2 / norm_S(Q, K, 1.0))
    exact_in = cast(np.float64, Q, K, V, alpha)
    arrays = [xp.asarray(a) for a in (Q, K, V, alpha)]
    O, saved = fast.osa_forward(*arrays)
    # A rounding of Q and K by eps moves S by s‖Q‖‖K‖ eps, 1e3 to 1e5 times ‖S‖ eps here; the gram
    # route would lose the square of that factor.  In float32 S comes from products in float64, but
    # on a GPU that is slow at them.
    s = float(alpha) / math.sqrt(d)
    size = s * np.linalg.norm(Q.astype(float), 2) * np.linalg.norm(K.astype(float), 2)
    exact_S = dtype is np.float32 and double_is_fast(xp)
    tol = N * np.finfo(dtype).eps * (2 if exact_S else size)
    close(O, osa_minimal.osa_dense(*exact_in), tol)
    A = ag.to_cpu(fast.attention_matrix(arrays[0], arrays[1], arrays[3])).astype(float)
    # Orthogonality does not suffer: the small matrix is skew-symmetric whatever the rounding.
    close(A.T @ A, np.eye(N), 8 * N * np.finfo(dtype).eps)
    exact = OPERATORS["dense"].gradients(*exact_in, dO.astype(float))
    sizes = [np.linalg.norm(e) for e in exact]
    gradients_close(fast.osa_backward(xp.asarray(dO), saved), exact, sizes, tol)


@pytest.mark.parametrize("N, d", [(128, 16), (200, 4), (784, 16)])
@pytest.mark.parametrize("different", [1, 2])
def test_equal_tokens_are_no_trouble(different, N, d, dtype, rng, xp):
    """Sums of equal terms round alike, so that PᵀP has eigenvalues well below 0."""
    which = rng.integers(0, different, N)
    Q, K = rng.standard_normal((2, different, d)).astype(dtype)[:, which]
    V = rng.standard_normal((N, d)).astype(dtype)
    exact, tol = osa_minimal.osa_forward(*cast(np.float64, Q, K, V), 0.1)[0], tolerance(Q, K, 0.1)
    for route in ("auto", "products"):
        O, saved = fast.osa_forward(*(xp.asarray(a) for a in (Q, K, V)), 0.1, route)
        close(O, exact, tol)
        for g in fast.osa_backward(O, saved):
            assert np.isfinite(ag.to_cpu(g)).all()


def test_auto_takes_qr_where_the_factorisation_is_refused(rng, monkeypatch):
    Q, K, V = rng.standard_normal((3, 20, 3)).astype(np.float32)
    Q, K = Q + 1000, K + 1000
    want = fast.osa_forward(Q, K, V, 0.01, "qr")[0]

    def refuse(G):
        raise np.linalg.LinAlgError("Matrix is not positive definite")

    monkeypatch.setattr(np.linalg, "cholesky", refuse)
    np.testing.assert_array_equal(fast.osa_forward(Q, K, V, 0.01)[0], want)


def test_the_gram_route_is_not_taken_where_its_products_leave_the_dtype(rng):
    n = rng.standard_normal
    Q, K = (1e-23 * n((12, 3))).astype(np.float32), (1e12 * n((12, 3))).astype(np.float32)
    A = fast.attention_matrix(Q, K, 1e10)  # QᵀQ underflows
    close(A.T @ A, np.eye(12), 8 * 12 * np.finfo(np.float32).eps)
    Q, K, V = ((scale * n((12, 3))).astype(np.float32) for scale in (1e-10, 1e-10, 1e36))
    O = fast.osa_forward(Q, K, V, 1e19)[0]  # s J y overflows
    exact = osa_minimal.osa_dense(*cast(np.float64, Q, K, V), 1e19)
    close(O / 1e36, exact / 1e36, tolerance(Q, K, 1e19))
    Q, K = (1e14 * n((2, 7, 1))).astype(np.float32)
    A = fast.attention_matrix(Q, K, np.float32(1e-28))  # QᵀQ overflows, s² underflows
    close(A.T @ A, np.eye(7), 8 * 7 * np.finfo(np.float32).eps)
    Q, K, V, dO = (size * n((60, 8)) for size in (1e20, 1e-20, 1e-15, 1))  # QᵀQ is 1e80 KᵀK
    arrays = cast(np.float32, Q, K, V, dO)
    got = fast.osa_backward(arrays[3], fast.osa_forward(*arrays[:3], 0.1)[1])
    Q, K, V, dO = cast(np.float64, *arrays)
    exact = OPERATORS["dense"].gradients(Q, K, V, 0.1, dO)
    for g, e in zip(got, exact):
        close(g / abs(e).max(), e / abs(e).max(), 60 * np.finfo(np.float32).eps)


def test_a_common_component_needs_no_basis_but_a_gram_matrix_in_float64(rng, monkeypatch):
    monkeypatch.setattr(fast.operator, "double_basis", None)
    Q, K = (1.5 + rng.standard_normal((2, 49, 16))).astype(np.float32)
    V, dO = rng.standard_normal((2, 49, 16)).astype(np.float32)
    alpha = np.float32(3 / norm_S(Q, K, 1.0))
    exact = OPERATORS["dense"].gradients(*cast(np.float64, Q, K, V, alpha, dO))
    errors = {}
    for route in ("auto", "gram"):
        gradients = fast.osa_backward(dO, fast.osa_forward(Q, K, V, alpha, route)[1])
        errors[route] = [
            np.linalg.norm(g - e) / np.linalg.norm(e) for g, e in zip(gradients, exact)
        ]
    assert max(errors["auto"]) < np.finfo(np.float32).eps  # the rounding of the results themselves
    assert min(np.divide(errors["gram"], errors["auto"])[:3]) > 4, errors


@pytest.mark.parametrize("N, alpha", [(50, 5.0), (200, 1.0), (1000, 3.0)])
def test_auto_stays_orthogonal_where_one_token_outweighs_all_others(N, alpha):
    # Sums over N in float32 lose the small tokens behind the large one: G is wrong by N eps.
    q = np.full((N, 1), 3e-4, np.float32)
    k = q.copy()
    q[0] = k[0] = 1
    k[1::2] *= -1
    A = fast.attention_matrix(q, k, alpha).astype(np.float64)
    assert abs(A.T @ A - np.eye(N)).max() < 20 * np.finfo(np.float32).eps


@pytest.mark.parametrize("alpha", [1e13, 1e15])
def test_auto_is_not_fooled_by_norms_whose_squares_underflow(alpha, rng):
    q = (1 + 1e-3 * rng.standard_normal((9, 3))).astype(np.float32)
    k = (1e-12 * (1 + 1e-3 * rng.standard_normal((9, 3)))).astype(np.float32)
    A = fast.attention_matrix(q, k, alpha).astype(np.float64)
    assert abs(A.T @ A - np.eye(9)).max() < 20 * np.finfo(np.float32).eps


# ------------------------------------------------------------------------------- device behaviour


def test_the_matrix_is_the_operator_on_the_identity(route, case):
    Q, K, _, alpha = make(case)
    A = fast.attention_matrix(Q, K, alpha, route)
    np.testing.assert_array_equal(A, OPERATORS[route].matrix(Q, K, alpha))


@pytest.mark.parametrize("route, waits", [("auto", 0), ("products", 0), ("gram", 2), ("qr", 2)])
def test_transfers_and_waits_do_not_grow_with_the_data(route, waits, rng):
    """Nothing is fetched from the device, a longer or larger batch waits no more often, and "auto",
    which is "products" there, moves nothing and never waits."""
    used = []
    for shape in ((2, 3, 16, 2), (4, 3, 160, 2)):
        Q, K, V = (refusing.asarray(rng.standard_normal(shape)) for _ in range(3))
        alpha = refusing.asarray(np.full((3, 1, 1), 0.005 if waits else 0.3))
        want = fast.osa_forward(Q, K, V, alpha, "products")[0]  # moves its coefficients once
        before = dict(refusing.counts)
        O, saved = fast.osa_forward(Q, K, V, alpha, route)
        fast.osa_backward(O, saved)
        if not waits:
            fast.attention_matrix(Q, K, alpha, route)
        used.append({k: refusing.counts[k] - before[k] for k in before})
        assert waits or (O.get() == want.get()).all()
    assert used[0] == used[1]
    assert used[0]["to_host"] == 0 and (waits or used[0]["to_device"] == 0)
    assert used[0]["waits"] <= waits  # ‖S‖, and a sharper bound of it


@pytest.mark.parametrize(
    "N, alpha_shape", [(10, (2, 1, 1)), (40, (2, 1, 1)), (40, (600, 1, 1, 1)), (10, (600, 2, 1, 1))]
)
def test_a_large_batch_is_its_samples_one_by_one_for_any_number_of_threads(
    N, alpha_shape, rng, monkeypatch
):
    Q, K, V, dO = rng.standard_normal((4, 600, 2, N, 8))
    alpha = rng.uniform(0.01, 0.05, alpha_shape)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        O, saved = fast.osa_forward(Q, K, V, alpha)
        results.append((O, *fast.osa_backward(dO, saved)))
    for one, three in zip(*results):
        np.testing.assert_array_equal(one, three)
    *results, dalpha = results[0]
    total = np.zeros((600, 2, 1, 1))
    for i in range(0, 600, 100):
        few = np.s_[i : i + 100]
        a = np.broadcast_to(alpha, (600, 2, 1, 1))[few]
        tol = 2 * tolerance(Q[few], K[few], a)  # no sample's norms are twice the first one's
        O, saved = fast.osa_forward(Q[few], K[few], V[few], a)
        *gradients, total[few] = fast.osa_backward(dO[few], saved)
        sizes = 1.0, *gradient_sizes(*(M[i, 0] for M in (Q, K, V)), a, dO[0, 0])
        gradients_close([M[few] for M in results], [O, *gradients], sizes[:4], tol)
    close(dalpha, ag.unbroadcast(total, alpha_shape), 1200 * tol * sizes[4])


# -------------------------------------------------------------------------------------- bad input


def replace(name, value):
    arguments = dict(zip(("Q", "K", "V", "alpha"), make("batch, alpha per head")))
    arguments[name] = value(arguments[name]) if callable(value) else value
    return arguments


def spoilt(value):
    def spoil(a):
        a = np.array(a)
        a[(-1,) * a.ndim] = value
        return a

    return spoil


BAD_ARRAYS = {
    "too short": (lambda a: a[..., :-1, :], ValueError),
    "other batch": (lambda a: a[:, :2], ValueError),
    "no batch": (lambda a: a[0], ValueError),
    "one dimension": (lambda a: a[0, 0, 0], ValueError),
    "integers": (lambda a: a.astype(int), TypeError),
    "half precision": (lambda a: a.astype(np.float16), TypeError),
    "complex": (lambda a: a + 0j, TypeError),
    "another precision": (lambda a: a.astype(np.float32), TypeError),
    "NaN": (spoilt(np.nan), ValueError),
    "Inf": (spoilt(np.inf), ValueError),
    "minus Inf": (spoilt(-np.inf), ValueError),
    "Inf and minus Inf": (lambda a: spoilt(np.inf)(-spoilt(np.inf)(a)), ValueError),
    "empty": (lambda a: a[..., :0, :], ValueError),
    "zero width": (lambda a: a[..., :0], ValueError),
    "None": (lambda a: None, TypeError),
    "a number": (lambda a: 3.0, TypeError),
    "a list": (lambda a: a.tolist(), TypeError),
}


@pytest.mark.parametrize("name", ["Q", "K", "V"])
@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_a_bad_array_is_refused_by_name(fault, name):
    value, error = BAD_ARRAYS[fault]
    arguments = replace(name, value)
    with pytest.raises(error, match=rf"\b{name}\b"):
        fast.osa_forward(**arguments)
    del arguments["V"]
    if name != "V":
        with pytest.raises(error, match=rf"\b{name}\b"):
            fast.attention_matrix(**arguments)


@pytest.mark.parametrize("fault", ["empty", "zero width"])
def test_empty_input_is_refused(fault):
    Q, K, V, alpha = make("generic")
    cut = BAD_ARRAYS[fault][0]
    with pytest.raises(ValueError, match="Q is empty"):
        fast.osa_forward(cut(Q), cut(K), cut(V), alpha)


def test_Q_and_K_of_different_width_are_refused_by_name():
    with pytest.raises(ValueError, match="Q and K"):
        fast.osa_forward(**replace("K", lambda a: a[..., :1]))


@pytest.mark.parametrize("N", [5, 40])
def test_a_packed_layer_takes_numbers_and_names_nan_and_wrong_shapes(N, rng):
    QKV = rng.standard_normal((2, 3, N, 12)) / 4
    Q, K, V = np.split(QKV, 3, axis=-1)
    O = fast.osa_forward(Q, K, V, np.int64(1))[0]
    close(fast.operator.osa_packed(QKV, 1).data, O, 100 * np.finfo(float).eps)
    for bad, alpha in ((QKV[..., 1:], 1), (QKV[0, 0, 0], 1), (QKV, np.ones(3))):
        with pytest.raises(ValueError, match=r"be \(..., N, 3 d_v\), .* \(..., 1, 1\), got \("):
            fast.operator.osa_packed(bad, alpha)
    QKV[0, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="holds NaN or Inf"):
        fast.operator.osa_packed(QKV, 1)
    with pytest.raises(TypeError, match="K must be a NumPy or CuPy array, got Tensor"):
        fast.osa_forward(O, ag.Tensor(O), O, 1)


BAD_ALPHAS = {
    "NaN": math.nan,
    "Inf": math.inf,
    "NaN in one head": spoilt(np.nan),
    "Inf in one head": spoilt(-np.inf),
    "per token": np.ones((13, 1)),
    "a vector": np.ones(3),
    "too many dimensions": np.ones((1, 2, 3, 1, 1)),
    "other number of heads": np.ones((4, 1, 1)),
    "empty": np.ones((0, 1, 1)),
    "None": None,
    "a list": [0.1],
}


@pytest.mark.parametrize("fault", BAD_ALPHAS)
def test_a_bad_alpha_is_refused_by_name(fault):
    arguments = replace("alpha", BAD_ALPHAS[fault])
    with pytest.raises((ValueError, TypeError), match="alpha"):
        fast.osa_forward(**arguments)
    del arguments["V"]
    with pytest.raises((ValueError, TypeError), match="alpha"):
        fast.attention_matrix(**arguments)


def test_an_alpha_that_would_enlarge_the_batch_is_refused_by_name():
    Q, K, V, _ = make("generic")
    with pytest.raises(ValueError, match="alpha"):
        fast.osa_forward(Q[None], K[None], V[None], np.ones((2, 1, 1)))


@pytest.mark.parametrize("route", ["flash", "", None, 1, [[1.0]]])
def test_an_unknown_route_is_refused_by_name(route):
    Q, K, V, alpha = make("generic")
    with pytest.raises(ValueError, match="route"):
        fast.osa_forward(Q, K, V, alpha, route)
    with pytest.raises(ValueError, match="route"):
        fast.attention_matrix(Q, K, alpha, route)


BAD_GRADIENTS = {
    "too short": lambda a: a[:-1],
    "too narrow": lambda a: a[:, :-1],
    "transposed": lambda a: a.T,
    "batched": lambda a: a[None],
    "empty": lambda a: a[:0],
    "single precision": lambda a: a.astype(np.float32),
    "integers": lambda a: a.astype(int),
    "NaN": spoilt(np.nan),
    "Inf": spoilt(np.inf),
}


@pytest.mark.parametrize("fault", BAD_GRADIENTS)
def test_a_bad_output_gradient_is_refused_by_name(fault, route):
    O, saved = fast.osa_forward(*make("generic"), route)
    with pytest.raises(ValueError, match="dO"):
        fast.osa_backward(BAD_GRADIENTS[fault](O), saved)
