"""The operator: orthogonality, routes against the definition, gradients, hard inputs, bad input."""

import math

import numpy as np
import pytest
import refusing

import autograd as ag
import osa_minimal as osa
import products

DTYPES = [np.float32, np.float64]
ROUTES = ["auto", "gram", "qr", "newton_schulz", "dense", "products"]
DTYPE_IDS = ["float32", "float64"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
each_route = pytest.mark.parametrize("route", ROUTES)


def columns(rng, n, m):
    """A random n × m matrix with orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((n, m)))[0]


def make(name):
    """Q, K, V, alpha in float64 for a named situation; asymmetric random data."""
    rng = np.random.default_rng(len(name))
    n = rng.standard_normal
    Q, K, V, alpha = n((13, 3)), n((13, 3)), n((13, 5)), 0.3
    if name == "batch, alpha per head":
        Q, K, V = n((2, 3, 13, 2)), n((2, 3, 13, 2)), n((2, 3, 13, 4))
        alpha = np.array([0.5, -0.2, 0.05]).reshape(3, 1, 1)
    elif name == "batch, one head has alpha 0":
        Q, K, V = n((2, 3, 13, 2)), n((2, 3, 13, 2)), n((2, 3, 13, 2))
        alpha = np.array([0.5, 0.0, 0.1]).reshape(3, 1, 1)
    elif name == "repeated columns":
        Q[:, 2], K[:, 0] = Q[:, 0], Q[:, 1]  # rank of [Q, K]: 4 of 6
    elif name in ("columns 1e-3 apart", "columns 1e-7 apart"):
        apart = float(name.split()[1])
        Q[:, 2], K[:, 0] = Q[:, 0] + apart * Q[:, 2], Q[:, 1] + apart * K[:, 0]
    elif name == "repeated tokens":
        Q, K = (np.repeat(a[:3], [6, 4, 3], axis=0) for a in (Q, K))  # rank 3 of 6
    elif name == "repeated angles":
        P = columns(rng, 13, 6)
        Q, K, alpha = P[:, :3], P[:, 3:], 2.0  # the six eigenvalues are ± i alpha/√3
    elif name == "K = Q":
        K = Q.copy()  # S = 0 though s and P are not
    elif name == "alpha = 0":
        alpha = 0.0
    elif name == "Q = K = V = 0":
        Q, K, V = 0 * Q, 0 * K, 0 * V
    elif name == "Q = 0":
        Q = 0 * Q
    elif name == "N < 2 d_v":
        Q, K, V = Q[:4], K[:4], V[:4]
    elif name == "N = 2 d_v + 1":
        Q, K, V = Q[:7], K[:7], V[:7]
    elif name == "N = 1":
        Q, K, V = Q[:1], K[:1], V[:1]
    elif name == "d_v = 1":
        Q, K, V = Q[:, :1], K[:, :1], V[:, :1]
    elif name == "padded rows":
        Q[9:], K[9:] = 0, 0
    elif name == "large angles":
        alpha = 1.5  # ‖S‖ ≈ 20
    else:
        assert name == "generic"
    return Q, K, V, alpha


CASES = """generic|batch, alpha per head|batch, one head has alpha 0|repeated columns|
columns 1e-3 apart|columns 1e-7 apart|repeated tokens|repeated angles|K = Q|alpha = 0|
Q = K = V = 0|Q = 0|N < 2 d_v|N = 2 d_v + 1|N = 1|d_v = 1|padded rows|
large angles""".replace("\n", "").split("|")
each_case = pytest.mark.parametrize("case", CASES)


def cast(dtype, *arrays):
    return [np.asarray(a, dtype) for a in arrays]


def norm_S(Q, K, alpha):
    """The largest ‖S‖₂ of the batch, by SVD of the N × N matrices, in float64."""
    Q, K, alpha = cast(np.float64, Q, K, alpha)
    return float(np.linalg.norm(osa.skew_scores(Q, K, alpha), 2, axis=(-2, -1)).max())


def tolerance(Q, K, alpha, c=3):
    """c (n + 10) eps max(1, ‖S‖): the error of a backward stable exp of S, entry by entry.

    Rounding S (relative error eps in each of sums of n or r terms) moves exp(S) by up to
    n eps ‖S‖, as the derivative of exp has norm 1 at a skew-symmetric matrix; the products around
    it add n eps ‖V‖, and a series of ‖S‖ + 10 terms as many eps.  The observed factor is below 1;
    c = 3 covers entries of V and dO of size 3, and other linear algebra libraries.
    """
    return c * (Q.shape[-2] + 10) * np.finfo(Q.dtype).eps * max(1.0, norm_S(Q, K, alpha))


def close(actual, expected, atol):
    actual = ag.to_cpu(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# ----------------------------------------------------------------------------------- definition


def test_scores_are_the_definition_entry_by_entry():
    Q, K, _, alpha = make("generic")
    S = osa.skew_scores(Q, K, alpha)
    for i in range(13):
        for j in range(13):
            slow = alpha / math.sqrt(3) * (Q[i] @ K[j] - K[i] @ Q[j])
            assert abs(S[i, j] - slow) < 20 * np.finfo(float).eps


@each_case
@each_dtype
def test_scores_are_exactly_skew_symmetric(case, dtype, xp):
    Q, K, _, alpha = cast(dtype, *make(case))
    S = osa.skew_scores(xp.asarray(Q), xp.asarray(K), xp.asarray(alpha))
    assert S.dtype == dtype and S.shape == (*Q.shape[:-1], Q.shape[-2])
    S = ag.to_cpu(S)
    np.testing.assert_array_equal(S, -S.swapaxes(-1, -2))


def expm_one_by_one(S):
    """SciPy's exp of each matrix by itself (Padé with scaling and squaring, no spectrum)."""
    expm = pytest.importorskip("scipy.linalg", reason="the oracle is SciPy's expm").expm
    flat = S.reshape(-1, *S.shape[-2:])
    return np.stack([expm(M) for M in flat]).reshape(S.shape)


@each_case
def test_the_dense_definition_is_scipys_expm(case):
    Q, K, V, alpha = make(case)
    A = expm_one_by_one(osa.skew_scores(Q, K, alpha))
    close(osa.exp_skew(osa.skew_scores(Q, K, alpha)), A, tolerance(Q, K, alpha))
    close(osa.osa_dense(Q, K, V, alpha), A @ V, tolerance(Q, K, alpha))


@each_route
@each_case
def test_attention_matrix_is_scipys_expm_on_every_route(case, route):
    Q, K, _, alpha = make(case)
    A = expm_one_by_one(osa.skew_scores(Q, K, alpha))
    close(osa.attention_matrix(Q, K, alpha, route), A, tolerance(Q, K, alpha))


@each_route
@each_case
@each_dtype
def test_every_route_gives_the_dense_definition(case, route, dtype, xp):
    Q, K, V, alpha = cast(dtype, *make(case))
    expected = osa.osa_dense(*cast(np.float64, Q, K, V, alpha))  # of the same rounded inputs
    O = osa.osa_forward(*(xp.asarray(a) for a in (Q, K, V, alpha)), route)[0]
    assert O.dtype == dtype
    close(O, expected, tolerance(Q, K, alpha))


# ------------------------------------------------------------------------------- orthogonality


@each_route
@each_case
@each_dtype
def test_attention_matrix_is_orthogonal_with_determinant_one_on_every_route(case, route, dtype):
    Q, K, _, alpha = cast(dtype, *make(case))
    A = osa.attention_matrix(Q, K, alpha, route)
    assert A.dtype == dtype
    A = A.astype(np.float64)
    I, tol = np.eye(A.shape[-1]), tolerance(Q, K, alpha)
    close(A @ A.swapaxes(-1, -2), np.broadcast_to(I, A.shape), tol)
    close(A.swapaxes(-1, -2) @ A, np.broadcast_to(I, A.shape), tol)
    # A relative change of tol in each entry changes the determinant by at most n tol.
    close(np.linalg.det(A), np.ones(A.shape[:-2]), A.shape[-1] * tol)


@each_route
@each_case
@each_dtype
def test_exp_of_minus_S_is_the_inverse_on_every_route(case, route, dtype):
    Q, K, _, alpha = cast(dtype, *make(case))
    A, back = (osa.attention_matrix(Q, K, a, route).astype(float) for a in (alpha, -alpha))
    close(A @ back, np.broadcast_to(np.eye(A.shape[-1]), A.shape), tolerance(Q, K, alpha))
    swapped = osa.attention_matrix(K, Q, alpha, route)  # S changes sign with Q and K swapped
    close(swapped, back, tolerance(Q, K, alpha))


@each_route
@each_dtype
def test_alpha_zero_is_the_identity(route, dtype):
    Q, K, V, alpha = cast(dtype, *make("alpha = 0"))
    O = osa.osa_forward(Q, K, V, alpha, route)[0]
    close(O, V, tolerance(Q, K, alpha))


@each_route
@each_dtype
def test_norms_of_values_are_kept(route, dtype, rng):
    Q, K, V, alpha = cast(dtype, *make("batch, alpha per head"))
    O = osa.osa_forward(Q, K, V, alpha, route)[0].astype(float)
    before = np.linalg.norm(V.astype(float), axis=-2)
    np.testing.assert_allclose(
        np.linalg.norm(O, axis=-2), before, rtol=0, atol=tolerance(Q, K, alpha)
    )


@each_route
@each_dtype
def test_padded_rows_are_the_identitys_and_change_no_other_row(route, dtype):
    Q, K, V, alpha = cast(dtype, *make("padded rows"))
    tol = tolerance(Q, K, alpha)
    A = osa.attention_matrix(Q, K, alpha, route)
    I = np.eye(13)
    close(A[9:], I[9:], tol)
    close(A[:, 9:], I[:, 9:], tol)
    O = osa.osa_forward(Q, K, V, alpha, route)[0]
    close(O[9:], V[9:].astype(float), tol)
    alone = osa.osa_forward(Q[:9], K[:9], V[:9], alpha, route)[0]
    close(O[:9], alone.astype(float), tol)


@each_route
@each_dtype
def test_a_permutation_of_tokens_permutes_the_output(route, dtype, rng):
    Q, K, V, alpha = cast(dtype, *make("generic"))
    p = rng.permutation(13)
    O = osa.osa_forward(Q, K, V, alpha, route)[0]
    permuted = osa.osa_forward(Q[p], K[p], V[p], alpha, route)[0]
    close(permuted, O[p].astype(float), tolerance(Q, K, alpha))


# ------------------------------------------------------------------------------------- gradients


def as_operator(route):
    return ag.operator(lambda Q, K, V, a: osa.osa_forward(Q, K, V, a, route), osa.osa_backward)


def gradients(Q, K, V, alpha, dO, route):
    return osa.osa_backward(dO, osa.osa_forward(Q, K, V, alpha, route)[1])


# In these cases O does not depend on some of the arguments, to first order: differences are then
# rounding noise alone, and an error relative to it says nothing.
FLAT = {"K = Q", "alpha = 0", "Q = K = V = 0", "Q = 0", "N = 1"}


@pytest.mark.parametrize("case, route", [(c, r) for c in CASES for r in ROUTES])
def test_backward_agrees_with_central_differences(case, route):
    Q, K, V, alpha = (np.asarray(a, np.float64) for a in make(case))
    f = checked = as_operator(route)
    if case in FLAT:  # add known linear terms, so that no gradient that is checked vanishes
        M, N = np.random.default_rng(1).standard_normal((2, Q.shape[-1], V.shape[-1]))

        def checked(q, k, v, a):
            return f(q, k, v, a) + q @ M + k @ N + a * (V + 1)

    error = ag.gradient_check(checked, Q, K, V, alpha, directions=2)
    # Differences are right to eps^(2/3) = 4e-11 times the third derivative of the output along a
    # random direction, at most (‖dS‖/‖S‖)³ ‖S‖³ ~ 100 here, 1e4 at large angles.
    assert error < (1e-6 if case == "large angles" else 1e-8)


def gradient_sizes(Q, K, V, alpha, dO):
    """By how much the error of each gradient can exceed that of exp(S): dQ, dK, dV, dα."""
    d_v = Q.shape[-1]
    dS = np.linalg.norm(dO) * np.linalg.norm(V)  # bounds the gradient of S
    s = np.abs(alpha).max() / math.sqrt(d_v)
    norm_Q, norm_K = np.linalg.norm(Q), np.linalg.norm(K)
    # dQ = s (dS − dSᵀ) K,  dK = −s (dS − dSᵀ) Q,  dV = exp(S)ᵀ dO,  dα = ⟨dS, S/α⟩
    return s * norm_K * dS, s * norm_Q * dS, 1.0, norm_Q * norm_K / math.sqrt(d_v) * dS


def gradients_close(actual, expected, sizes, tol):
    for a, e, size in zip(actual, expected, sizes, strict=True):
        close(np.asarray(ag.to_cpu(a)), e, tol * size)


@each_route
@each_case
@each_dtype
def test_backward_gives_the_gradient_of_the_dense_route(case, route, dtype, xp):
    Q, K, V, alpha = cast(dtype, *make(case))
    dO = cast(dtype, np.random.default_rng(1).standard_normal(V.shape))[0]
    exact = gradients(*cast(np.float64, Q, K, V, alpha, dO), "dense")
    assert all(np.isfinite(g).all() for g in exact)
    mine = gradients(*(xp.asarray(a) for a in (Q, K, V, alpha, dO)), route)
    assert {g.dtype for g in mine} == {np.dtype(dtype)}
    gradients_close(mine, exact, gradient_sizes(Q, K, V, alpha, dO), tolerance(Q, K, alpha))


@each_route
@pytest.mark.parametrize("case", ["generic", "N < 2 d_v", "batch, alpha per head"])
def test_the_gradient_of_alpha_at_zero_is_that_of_its_linear_term(case, route):
    """exp(S) = I + S + …, so dα = ⟨dO, S V⟩/α there, which the formula must reach without 0/0."""
    Q, K, V, alpha = make(case)
    alpha = np.zeros_like(np.asarray(alpha))
    dO = np.random.default_rng(1).standard_normal(V.shape)
    dalpha = gradients(Q, K, V, alpha, dO, route)[3]
    unit = osa.skew_scores(Q, K, 1.0)
    expected = (dO * (unit @ V)).sum(axis=(-2, -1), keepdims=True)
    expected = ag.unbroadcast(expected, alpha.shape)
    size = np.linalg.norm(dO) * np.linalg.norm(unit @ V)
    close(np.asarray(dalpha), expected, 8 * Q.shape[-2] * np.finfo(float).eps * size)


@each_route
@pytest.mark.parametrize(
    "shape", [(), (1, 1), (3, 1, 1), (1, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1)], ids=str
)
def test_the_gradient_of_alpha_has_alphas_shape(shape, route, rng, xp):
    Q, K, V, _ = make("batch, alpha per head")
    alpha = rng.uniform(0.1, 0.3, shape)
    arrays = [xp.asarray(a) for a in (Q, K, V, alpha)]
    dalpha = gradients(*arrays, arrays[2], route)[3]
    assert dalpha.shape == shape
    if xp is np:
        assert ag.gradient_check(as_operator(route), *arrays, directions=1) < 1e-8


def test_a_python_number_is_a_fine_alpha(xp):
    Q, K, V, _ = make("generic")
    Q, K, V = (xp.asarray(a) for a in (Q, K, V))
    dO = xp.asarray(np.random.default_rng(1).standard_normal(V.shape))
    by_number = gradients(Q, K, V, 0.3, dO, "auto")
    by_array = gradients(Q, K, V, xp.asarray(np.array(0.3)), dO, "auto")
    for a, b in zip(by_number, by_array):
        np.testing.assert_array_equal(ag.to_cpu(a), ag.to_cpu(b))
    assert by_number[3].shape == ()


@pytest.mark.parametrize("route", ["auto", "gram"])
def test_backward_agrees_with_central_differences_on_each_kind_of_array(route, xp):
    arrays = [xp.asarray(np.asarray(a)) for a in make("batch, alpha per head")]
    assert ag.gradient_check(as_operator(route), *arrays, directions=1) < 1e-8


@pytest.mark.parametrize("case", ["repeated columns", "repeated tokens", "K = Q", "padded rows"])
def test_the_gradient_does_not_depend_on_the_basis(case):
    """exp(S) V depends on Q, K through S only: no basis at all and QR's arbitrary completion of a
    rank-deficient [Q, K] give one gradient, and so does any other basis of that span."""
    Q, K, V, alpha = make(case)
    dO = np.random.default_rng(1).standard_normal(V.shape)
    gram = gradients(Q, K, V, alpha, dO, "gram")
    sizes, tol = gradient_sizes(Q, K, V, alpha, dO), tolerance(Q, K, alpha)
    for route in ("qr", "newton_schulz"):
        gradients_close(gradients(Q, K, V, alpha, dO, route), gram, sizes, tol)
    # Q → Q cosh t + K sinh t, K → Q sinh t + K cosh t is a symplectic change of P: S is the same.
    c, s = math.cosh(0.3), math.sinh(0.3)
    other = gradients(c * Q + s * K, s * Q + c * K, V, alpha, dO, "qr")
    dQ, dK = c * other[0] + s * other[1], s * other[0] + c * other[1]  # by the chain rule
    gradients_close((dQ, dK, *other[2:]), gram, sizes, 2 * tol)  # (cosh + sinh)² < 2


def test_operator_and_gradients_agree_with_pytorchs_autograd_of_matrix_exp(xp):
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    for case in CASES:
        Q, K, V, alpha = (np.asarray(a, np.float64) for a in make(case))
        dO = np.random.default_rng(1).standard_normal(V.shape)
        tq, tk, tv, ta = (torch.tensor(a, requires_grad=True) for a in (Q, K, V, alpha))
        S = ta / math.sqrt(Q.shape[-1]) * (tq @ tk.mT - tk @ tq.mT)
        O = torch.matrix_exp(S) @ tv
        O.backward(torch.tensor(dO))
        expected = [t.grad.numpy() for t in (tq, tk, tv, ta)]
        arrays = [xp.asarray(a) for a in (Q, K, V, alpha)]
        mine, saved = osa.osa_forward(*arrays)
        close(mine, O.detach().numpy(), tolerance(Q, K, alpha))
        sizes = gradient_sizes(Q, K, V, alpha, dO)
        gradients_close(
            osa.osa_backward(xp.asarray(dO), saved), expected, sizes, tolerance(Q, K, alpha)
        )


# -------------------------------------------------------------- small exponential, its derivative


def skew(rng, *shape):
    M = rng.standard_normal((*shape, shape[-1]))
    return M - M.swapaxes(-1, -2)


SPECTRA = {
    "generic": lambda rng: skew(rng, 6),
    "odd": lambda rng: skew(rng, 7),
    "batch": lambda rng: skew(rng, 2, 3, 4),
    "zero": lambda rng: np.zeros((5, 5)),
    "repeated": lambda rng: (lambda U: 1.3 * U @ np.kron(np.eye(3), [[0, 1], [-1, 0]]) @ U.T)(
        columns(rng, 6, 6)
    ),
    "nearly repeated": lambda rng: (
        lambda U: U @ np.kron(np.diag([1, 1 + 1e-9, 1e-9]), [[0, 1], [-1, 0]]) @ U.T
    )(columns(rng, 6, 6)),
    "large": lambda rng: 5 * skew(rng, 6),
    "one by one": lambda rng: np.zeros((1, 1)),
}
each_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def spectral_norm(S):
    return float(np.linalg.norm(S, 2, axis=(-2, -1)).max())


@each_spectrum
def test_frechet_derivative_is_the_corner_of_a_block_triangular_exp(spectrum, rng):
    """exp of [[S, E], [0, S]] is [[exp S, L(S, E)], [0, exp S]], for any E."""
    S = SPECTRA[spectrum](rng)
    S = (S - S.swapaxes(-1, -2)) / 2
    E = rng.standard_normal(S.shape)
    n = S.shape[-1]
    corner = expm_one_by_one(np.block([[S, E], [np.zeros_like(S), S]]))[..., :n, n:]
    # SciPy squares about log2(‖S‖ + ‖E‖) times, and its errors add up
    tol = 4 * n * np.finfo(float).eps * max(1, spectral_norm(S)) * np.linalg.norm(E)
    close(osa.frechet_skew(S, E), corner, tol)


@each_spectrum
@each_dtype
def test_exp_of_skew_matrices_is_orthogonal(spectrum, dtype, rng, xp):
    S = SPECTRA[spectrum](rng)
    S = ((S - S.swapaxes(-1, -2)) / 2).astype(dtype)
    A = osa.exp_skew(xp.asarray(S))
    assert A.dtype == dtype
    A, n = ag.to_cpu(A).astype(float), S.shape[-1]
    tol = 8 * n * np.finfo(dtype).eps  # orthogonal whatever ‖S‖ is
    close(A @ A.swapaxes(-1, -2), np.broadcast_to(np.eye(n), A.shape), tol)


def phi1(S):
    """φ₁(S) from [[S, I], [0, 0]], whose exp has it in the corner."""
    n = S.shape[-1]
    I = np.broadcast_to(np.eye(n), S.shape)
    return expm_one_by_one(np.block([[S, I], [0 * S, 0 * S]]))[..., :n, n:]


@each_dtype
@pytest.mark.parametrize("size", [1, 1e6, 1e12, 1e15])
def test_the_dense_definition_is_orthogonal_at_any_norm(size, dtype, rng, xp):
    """Most eigenvalues of S are 0, and rounding moves them by eps ‖S‖."""
    Q, K = rng.standard_normal((2, 40, 2)).astype(dtype)
    alpha = float(size / norm_S(Q, K, 1.0))
    A = osa.exp_skew(osa.skew_scores(xp.asarray(Q), xp.asarray(K), alpha))
    A = ag.to_cpu(A).astype(float)
    close(A.T @ A, np.eye(40), 8 * 40 * np.finfo(dtype).eps)


SMALL = {
    "Chebyshev": osa.Chebyshev,
    "ChebyshevMatrix": osa.ChebyshevMatrix,
    "products": lambda S, W, rho: products.Products(S, W),
}


@each_spectrum
@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("slack", [1.0, 1.7])
def test_every_small_exponential_is_the_spectral_formula(spectrum, small, slack, rng, xp):
    S = SPECTRA[spectrum](rng)
    S = (S - S.swapaxes(-1, -2)) / 2
    W, G = (rng.standard_normal((*S.shape[:-1], 3)) for _ in range(2))
    rho = slack * spectral_norm(S)  # any bound on the spectrum will do
    n = S.shape[-1]
    tol = 16 * n * np.finfo(float).eps * max(1, rho)
    fast, slow = SMALL[small](xp.asarray(S), xp.asarray(W), rho), osa.Spectral(S, W)
    close(slow.value, expm_one_by_one(S) @ W, tol * 3)  # entries of W reach 3
    close(fast.value, slow.value, tol * 3)
    for a, b in zip(fast.adjoint(xp.asarray(G)), slow.adjoint(G)):
        close(a, b, tol * np.linalg.norm(G) * max(1, np.linalg.norm(W)))
    close(slow.phi1(G), phi1(S) @ G, tol * 3)
    close(fast.phi1(xp.asarray(G)), phi1(S) @ G, tol * 3)


@pytest.mark.parametrize("f", [osa._exp, osa._phi1], ids=["exp", "phi1"])
def test_chebyshevs_adjoint_holds_for_matrices_that_are_not_skew(f, rng, xp):
    """The gram route applies φ₁ to sGJ, whose spectrum is imaginary but which is not normal."""
    P = rng.standard_normal((9, 6))
    J = np.kron([[0, 1], [-1, 0]], np.eye(3))
    Z = 0.2 * P.T @ P @ J
    rho = float(abs(np.linalg.eigvals(Z)).max())
    W, G = rng.standard_normal((2, 6, 4))

    def value(Z, W):
        return ag.operator(
            lambda Z, W: (lambda c: (c.value, c))(osa.Chebyshev(Z, W, 1.2 * rho, f)),
            lambda g, c: c.adjoint(g)[::-1],  # gradients of Z and of W
        )(Z, W)

    assert ag.gradient_check(value, xp.asarray(Z), xp.asarray(W)) < 1e-8
    exact = expm_one_by_one(Z) if f is osa._exp else phi1(Z)
    got = ag.to_cpu(osa.Chebyshev(xp.asarray(Z), xp.asarray(W), 1.2 * rho, f).value)
    # Powers of a non-normal matrix grow by the condition number of its eigenvectors.
    growth = np.linalg.cond(np.linalg.eig(Z)[1])
    close(got, exact @ W, 16 * 6 * np.finfo(float).eps * rho * growth * 3)


# --------------------------------------------------------------------------- large norms, hard data


# For Gaussian tokens s‖Q‖‖K‖ is about ‖S‖, so the gram route too is within c n eps ‖S‖ of the
# definition while its loss, eps (s‖Q‖‖K‖)², is harmless.  Beyond ‖S‖ = 30 it is not, in single
# precision, which is why "auto" turns to QR there.
LARGE = [
    (norm, dtype, route)
    for norm in (30, 100, 1000)
    for dtype in DTYPES
    for route in ROUTES
    if (route, dtype) != ("gram", np.float32) or norm == 30
]


@pytest.mark.parametrize("norm, dtype, route", LARGE)
def test_routes_agree_at_large_norms(norm, dtype, route, rng, xp):
    Q, K, V = cast(dtype, *rng.standard_normal((3, 20, 3)))
    alpha = dtype(norm / norm_S(Q, K, 1.0))
    dO = rng.standard_normal(V.shape).astype(dtype)
    exact_in = cast(np.float64, Q, K, V, alpha)
    O, saved = osa.osa_forward(*(xp.asarray(a) for a in (Q, K, V, alpha)), route)
    close(O, osa.osa_dense(*exact_in), tolerance(Q, K, alpha))
    exact = gradients(*exact_in, dO.astype(float), "dense")
    sizes = [np.linalg.norm(e) for e in exact]
    gradients_close(osa.osa_backward(xp.asarray(dO), saved), exact, sizes, tolerance(Q, K, alpha))


def parallel_tokens(rng, N, d):
    """Tokens with a common component a thousand times as large as what tells them apart."""
    X = rng.standard_normal((N, 2 * d)) + 1000 * rng.standard_normal(2 * d)
    W = columns(rng, 2 * d, 2 * d)
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
@each_dtype
def test_auto_stays_accurate_for_parallel_tokens_and_for_K_near_Q(tokens, N, d, dtype, rng, xp):
    Q, K = cast(dtype, *tokens(rng, N, d))
    V, dO = cast(dtype, *rng.standard_normal((2, N, d)))
    alpha = dtype(2 / norm_S(Q, K, 1.0))
    exact_in = cast(np.float64, Q, K, V, alpha)
    arrays = [xp.asarray(a) for a in (Q, K, V, alpha)]
    O, saved = osa.osa_forward(*arrays)
    # A rounding of Q and K by eps moves S by s‖Q‖‖K‖ eps, 1e3 to 1e5 times ‖S‖ eps here; the gram
    # route would lose the square of that factor.  In float32 S comes from products in float64, but
    # on a GPU that is slow at them.
    s = float(alpha) / math.sqrt(d)
    size = s * np.linalg.norm(Q.astype(float), 2) * np.linalg.norm(K.astype(float), 2)
    fast = products.double_is_fast(xp)
    tol = N * np.finfo(dtype).eps * (2 if dtype is np.float32 and fast else size)
    close(O, osa.osa_dense(*exact_in), tol)
    A = ag.to_cpu(osa.attention_matrix(arrays[0], arrays[1], arrays[3])).astype(float)
    # Orthogonality does not suffer: the small matrix is skew-symmetric whatever the rounding.
    close(A.T @ A, np.eye(N), 8 * N * np.finfo(dtype).eps)
    exact = gradients(*exact_in, dO.astype(float), "dense")
    sizes = [np.linalg.norm(e) for e in exact]
    gradients_close(osa.osa_backward(xp.asarray(dO), saved), exact, sizes, tol)


@each_dtype
@pytest.mark.parametrize("N, d", [(128, 16), (200, 4), (784, 16)])
@pytest.mark.parametrize("different", [1, 2])
def test_equal_tokens_are_no_trouble(different, N, d, dtype, rng, xp):
    """Sums of equal terms round alike, so that PᵀP has eigenvalues well below 0."""
    which = rng.integers(0, different, N)
    Q, K = rng.standard_normal((2, different, d)).astype(dtype)[:, which]
    V = rng.standard_normal((N, d)).astype(dtype)
    for route in ("auto", "products"):
        O, saved = osa.osa_forward(*(xp.asarray(a) for a in (Q, K, V)), 0.1, route)
        close(O, osa.osa_dense(*cast(np.float64, Q, K, V), 0.1), tolerance(Q, K, 0.1))
        for g in osa.osa_backward(O, saved):
            assert np.isfinite(ag.to_cpu(g)).all()


def test_auto_takes_qr_where_the_factorisation_is_refused(rng, monkeypatch):
    Q, K, V = rng.standard_normal((3, 20, 3)).astype(np.float32)
    Q, K = Q + 1000, K + 1000
    want = osa.osa_forward(Q, K, V, 0.01, "qr")[0]

    def refuse(G):
        raise np.linalg.LinAlgError("Matrix is not positive definite")

    monkeypatch.setattr(np.linalg, "cholesky", refuse)
    np.testing.assert_array_equal(osa.osa_forward(Q, K, V, 0.01)[0], want)


def test_the_gram_route_is_not_taken_where_its_products_leave_the_dtype(rng):
    n = rng.standard_normal
    Q, K = (1e-23 * n((12, 3))).astype(np.float32), (1e12 * n((12, 3))).astype(np.float32)
    A = osa.attention_matrix(Q, K, 1e10)  # QᵀQ underflows
    close(A.T @ A, np.eye(12), 8 * 12 * np.finfo(np.float32).eps)
    Q, K, V = ((scale * n((12, 3))).astype(np.float32) for scale in (1e-10, 1e-10, 1e36))
    O = osa.osa_forward(Q, K, V, 1e19)[0]  # s J y overflows
    exact = osa.osa_dense(*cast(np.float64, Q, K, V), 1e19)
    close(O / 1e36, exact / 1e36, tolerance(Q, K, 1e19))


@each_dtype
@pytest.mark.parametrize("route", sorted(set(ROUTES) - {"gram"}))  # it loses eps (s ‖Q‖ ‖K‖)²
def test_in_one_plane_the_gradient_is_right_to_the_last_digits(route, dtype, rng):
    """Two tokens of width 1: A = [[cos θ, sin θ], [−sin θ, cos θ]] with θ = α (q₁k₂ − k₁q₂)."""
    Q, K, V, dO = rng.standard_normal((4, 60, 2, 1)).astype(dtype)
    (q, p), (k, l), (v, w), (g, h) = (a.astype(float)[..., 0].T for a in (Q, K, V, dO))
    area = q * l - k * p
    alpha = (np.geomspace(1e-3, 60, 60) / abs(area)).astype(dtype)
    O, saved = osa.osa_forward(Q, K, V, alpha[:, None, None], route)
    dQ, _, dV, dalpha = osa.osa_backward(dO, saved)
    alpha = alpha.astype(float)
    sin, cos = np.sin(alpha * area), np.cos(alpha * area)
    dtheta = g * (w * cos - v * sin) - h * (v * cos + w * sin)
    # Rounding of θ, whose two terms may cancel, moves the angle by some eps times their size.
    terms = 1 + alpha * (abs(q * l) + abs(k * p))
    flow = np.hypot(v, w) * np.hypot(g, h)
    tol = (32 if route == "products" else 8) * np.finfo(dtype).eps * terms * flow
    assert (abs(dalpha[:, 0, 0] - dtheta * area) <= tol * (abs(q * l) + abs(k * p))).all()
    assert (abs(dQ[:, 0, 0] - dtheta * alpha * l) <= tol * alpha * np.hypot(k, l)).all()
    assert (abs(dV[:, 0, 0] - (g * cos - h * sin)) <= tol / np.hypot(v, w)).all()


# --------------------------------------------------------------------------------- bases, angles


@pytest.mark.parametrize("method", ["qr", "newton_schulz"])
@each_dtype
def test_a_basis_is_orthonormal_and_spans_the_columns(method, dtype, rng, xp):
    M = rng.standard_normal((2, 11, 4)).astype(dtype)
    B = osa.orthonormal_basis(xp.asarray(M), method)
    assert B.dtype == dtype
    B, tol = ag.to_cpu(B).astype(float), 8 * 11 * np.finfo(dtype).eps
    Bt = B.swapaxes(-1, -2)
    close(Bt @ B, np.broadcast_to(np.eye(4), (2, 4, 4)), tol)
    close(B @ (Bt @ M), M.astype(float), tol * 3)  # entries of M reach 3


@pytest.mark.parametrize("method", ["qr", "newton_schulz"])
@pytest.mark.parametrize("N", [1, 3, 4])
def test_a_basis_of_few_tokens_is_square(method, N, rng, xp):
    M = rng.standard_normal((N, 4))
    B = ag.to_cpu(osa.orthonormal_basis(xp.asarray(M), method))
    close(B.T @ B, np.eye(N), 8 * 11 * np.finfo(float).eps)


@pytest.mark.parametrize("method", ["qr", "newton_schulz"])
def test_a_basis_of_zeros_is_finite(method):
    assert np.isfinite(osa.orthonormal_basis(np.zeros((5, 2)), method)).all()


@each_case
def test_rotation_angles_are_the_eigenvalues_of_S(case, xp):
    Q, K, _, alpha = make(case)
    S = osa.skew_scores(Q, K, alpha)
    N, d_v = Q.shape[-2:]
    lam = np.sort(np.linalg.eigvals(S).imag, axis=-1)[..., ::-1]  # descending, in pairs ±θ
    expected = np.zeros((*Q.shape[:-2], d_v))
    planes = min(d_v, N // 2)
    expected[..., :planes] = lam[..., :planes]
    theta = osa.rotation_angles(xp.asarray(Q), xp.asarray(K), xp.asarray(np.asarray(alpha)))
    # eigvals is backward stable, and perturbs eigenvalues of a normal matrix by c n eps ‖S‖ only
    close(theta, expected, tolerance(Q, K, alpha))
    close(theta[..., 0], np.linalg.norm(S, 2, axis=(-2, -1)), tolerance(Q, K, alpha))
    close(
        np.sqrt(2 * (ag.to_cpu(theta) ** 2).sum(axis=-1)),  # ‖S‖_F² = 2 Σ θ²
        np.linalg.norm(S, axis=(-2, -1)),
        tolerance(Q, K, alpha),
    )


@each_dtype
def test_rotation_angles_keep_the_dtype(dtype, xp):
    Q, K, _, _ = cast(dtype, *make("generic"))
    assert osa.rotation_angles(xp.asarray(Q), xp.asarray(K), 0.3).dtype == dtype


# ------------------------------------------------------------------------------- device behaviour


@pytest.mark.parametrize("route, waits", [("auto", 0), ("products", 0), ("gram", 2), ("qr", 2)])
def test_transfers_and_waits_do_not_grow_with_the_data(route, waits, rng):
    """Nothing is fetched from the device, and a longer or larger batch waits no more often."""
    used = []
    for shape in ((2, 3, 16, 2), (4, 3, 160, 2)):
        Q, K, V = (refusing.asarray(rng.standard_normal(shape)) for _ in range(3))
        alpha = refusing.asarray(np.full((3, 1, 1), 0.005))
        osa.osa_forward(Q, K, V, alpha, route)  # "products" moves its coefficients once
        before = dict(refusing.counts)
        O, saved = osa.osa_forward(Q, K, V, alpha, route)
        osa.osa_backward(O, saved)
        used.append({k: refusing.counts[k] - before[k] for k in before})
    assert used[0] == used[1]
    assert used[0]["to_host"] == 0
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
        O, saved = osa.osa_forward(Q, K, V, alpha)
        results.append((O, *osa.osa_backward(dO, saved)))
    for one, three in zip(*results):
        np.testing.assert_array_equal(one, three)
    O, dQ, dK, dV, dalpha = results[0]
    total = np.zeros((600, 2, 1, 1))
    for i in range(0, 600, 100):
        few = slice(i, i + 100)
        a = np.broadcast_to(alpha, (600, 2, 1, 1))[few]
        parts = Q[few], K[few], V[few]
        tol = 2 * tolerance(*parts[:2], a)  # no sample's norms are twice the first one's
        few_O, saved = osa.osa_forward(*parts, a)
        few_dQ, few_dK, few_dV, total[few] = osa.osa_backward(dO[few], saved)
        sizes = gradient_sizes(*(p[0, 0] for p in parts), a, dO[0, 0])
        close(O[few], few_O, tol)
        gradients_close((dQ[few], dK[few], dV[few]), (few_dQ, few_dK, few_dV), sizes[:3], tol)
    size = gradient_sizes(Q[0, 0], K[0, 0], V[0, 0], 1.0, dO[0, 0])[3]
    close(dalpha, ag.unbroadcast(total, alpha_shape), 1200 * tol * size)


def test_arrays_of_two_modules_are_refused():
    Q, K, V, alpha = make("generic")
    with pytest.raises(TypeError, match="cannot be mixed"):
        osa.osa_forward(refusing.asarray(Q), K, V, alpha)
    with pytest.raises(TypeError, match="cannot be mixed"):
        osa.skew_scores(Q, refusing.asarray(K), alpha)


# -------------------------------------------------------------------------------------- bad input


def replace(name, value):
    Q, K, V, alpha = make("batch, alpha per head")
    arguments = {"Q": Q, "K": K, "V": V, "alpha": alpha}
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
}


@pytest.mark.parametrize("name", ["Q", "K", "V"])
@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_a_bad_array_is_refused_by_name(fault, name):
    value, error = BAD_ARRAYS[fault]
    for f in (osa.osa_forward, osa.osa_dense):
        with pytest.raises(error, match=rf"\b{name}\b"):
            f(**replace(name, value))
    if name != "V":
        arguments = replace(name, value)
        del arguments["V"]
        for f in (osa.skew_scores, osa.rotation_angles):
            with pytest.raises(error, match=rf"\b{name}\b"):
                f(**arguments)


@pytest.mark.parametrize("fault", ["empty", "zero width"])
def test_empty_input_is_refused(fault):
    Q, K, V, alpha = make("generic")
    cut = BAD_ARRAYS[fault][0]
    with pytest.raises(ValueError, match="Q is empty"):
        osa.osa_forward(cut(Q), cut(K), cut(V), alpha)


def test_Q_and_K_of_different_width_are_refused_by_name():
    with pytest.raises(ValueError, match="Q and K"):
        osa.osa_forward(**replace("K", lambda a: a[..., :1]))


BAD_ALPHAS = {
    "NaN": (math.nan, ValueError),
    "Inf": (math.inf, ValueError),
    "NaN in one head": (spoilt(np.nan), ValueError),
    "Inf in one head": (spoilt(-np.inf), ValueError),
    "per token": (np.ones((13, 1)), ValueError),
    "a vector": (np.ones(3), ValueError),
    "too many dimensions": (np.ones((1, 2, 3, 1, 1)), ValueError),
    "other number of heads": (np.ones((4, 1, 1)), ValueError),
    "empty": (np.ones((0, 1, 1)), ValueError),
}


@pytest.mark.parametrize("fault", BAD_ALPHAS)
def test_a_bad_alpha_is_refused_by_name(fault):
    value, error = BAD_ALPHAS[fault]
    arguments = replace("alpha", value)
    for f in (osa.osa_forward, osa.osa_dense):
        with pytest.raises(error, match="alpha"):
            f(**arguments)
    del arguments["V"]
    for f in (osa.skew_scores, osa.rotation_angles):
        with pytest.raises(error, match="alpha"):
            f(**arguments)


def test_an_alpha_that_would_enlarge_the_batch_is_refused_by_name():
    Q, K, V, _ = make("generic")
    with pytest.raises(ValueError, match="alpha"):
        osa.osa_forward(Q[None], K[None], V[None], np.ones((2, 1, 1)))


@pytest.mark.parametrize("route", ["flash", "", None, 1])
def test_an_unknown_route_is_refused_by_name(route):
    Q, K, V, alpha = make("generic")
    with pytest.raises(ValueError, match="route"):
        osa.osa_forward(Q, K, V, alpha, route)
    with pytest.raises(ValueError, match="route"):
        osa.attention_matrix(Q, K, alpha, route)


BAD_GRADIENTS = {
    "too short": (lambda a: a[:-1], ValueError),
    "too narrow": (lambda a: a[:, :-1], ValueError),
    "transposed": (lambda a: a.T, ValueError),
    "batched": (lambda a: a[None], ValueError),
    "empty": (lambda a: a[:0], ValueError),
    "single precision": (lambda a: a.astype(np.float32), ValueError),
    "integers": (lambda a: a.astype(int), ValueError),
    "NaN": (spoilt(np.nan), ValueError),
    "Inf": (spoilt(np.inf), ValueError),
}


@each_route
@pytest.mark.parametrize("fault", BAD_GRADIENTS)
def test_a_bad_output_gradient_is_refused_by_name(fault, route):
    value, error = BAD_GRADIENTS[fault]
    O, saved = osa.osa_forward(*make("generic"), route)
    with pytest.raises(error, match="dO"):
        osa.osa_backward(value(O), saved)


def test_a_bad_basis_request_is_refused_by_name(rng):
    M = rng.standard_normal((5, 2))
    with pytest.raises(ValueError, match="method"):
        osa.orthonormal_basis(M, "svd")
    with pytest.raises(ValueError, match="M needs"):
        osa.orthonormal_basis(M[0])
    with pytest.raises(TypeError, match="M must be"):
        osa.orthonormal_basis(M.astype(int))


@each_route
@each_case
@each_dtype
def test_inputs_are_not_modified(case, route, dtype):
    arrays = [np.array(a, dtype) for a in make(case)]
    dO = np.random.default_rng(1).standard_normal(arrays[2].shape).astype(dtype)
    for a in (*arrays, dO):
        a.flags.writeable = False  # a write would raise
    O, saved = osa.osa_forward(*arrays, route)
    first = osa.osa_backward(dO, saved)
    kept = [np.array(g) for g in first]
    again = osa.osa_backward(dO, saved)  # what was saved is not used up
    for a, b in zip(kept, again):
        np.testing.assert_array_equal(a, b)
    for result in (O, *first[:3]):
        assert not any(np.shares_memory(result, a) for a in (*arrays, dO))


@each_route
def test_other_memory_layouts_give_the_same_result(route):
    Q, K, V, alpha = make("batch, alpha per head")
    dO = np.random.default_rng(1).standard_normal(V.shape)

    def strided(a):
        return np.repeat(np.flip(a)[..., None], 2, axis=-1)[..., 0][(np.s_[::-1],) * a.ndim]

    tight = [osa.osa_forward(Q, K, V, alpha, route)[0], *gradients(Q, K, V, alpha, dO, route)]
    arrays = [strided(a) for a in (Q, K, V, alpha, dO)]
    loose = [osa.osa_forward(*arrays[:4], route)[0], *gradients(*arrays, route)]
    tol = tolerance(Q, K, alpha)
    close(loose[0], tight[0], tol)
    gradients_close(loose[1:], tight[1:], gradient_sizes(Q, K, V, alpha, dO), tol)


@pytest.mark.parametrize("N, alpha", [(50, 5.0), (200, 1.0), (1000, 3.0)])
def test_auto_stays_orthogonal_where_one_token_outweighs_all_others(N, alpha):
    # Sums over N in float32 lose the small tokens behind the large one: G is wrong by N eps.
    q = np.full((N, 1), 3e-4, np.float32)
    k = q.copy()
    q[0] = k[0] = 1
    k[1::2] *= -1
    A = osa.attention_matrix(q, k, alpha).astype(np.float64)
    assert abs(A.T @ A - np.eye(N)).max() < 20 * np.finfo(np.float32).eps


@pytest.mark.parametrize("alpha", [1e13, 1e15])
def test_auto_is_not_fooled_by_norms_whose_squares_underflow(alpha, rng):
    q = (1 + 1e-3 * rng.standard_normal((9, 3))).astype(np.float32)
    k = (1e-12 * (1 + 1e-3 * rng.standard_normal((9, 3)))).astype(np.float32)
    A = osa.attention_matrix(q, k, alpha).astype(np.float64)
    assert abs(A.T @ A - np.eye(9)).max() < 20 * np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calibration_of_equal_queries_and_keys_is_not_that_of_rounding_noise(dtype, rng):
    q = rng.standard_normal((2, 3, 9, 4)).astype(dtype)
    assert np.allclose(osa.calibrate_alpha(q, q.copy(), 0.1), 0.1)
