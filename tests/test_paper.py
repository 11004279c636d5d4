"""osa_minimal.py: the definition, and one answer of the paper's operator and of fast's routes.

A claim about exp(S) V is tested once, on `operator`: the paper's by both of its bases, and all six
routes of fast/.  What only fast/ promises is in test_fast.py.
"""

import ast
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import refusing
from cases import OPERATORS, cast, close, gradient_sizes, gradients_close, make, norm_S, tolerance

import autograd as ag
import fast
import osa_minimal as osa

ROOT = Path(__file__).parent.parent


def cotangent(V):
    return np.random.default_rng(1).standard_normal(V.shape).astype(V.dtype)


def agrees(operator, xp, inputs, O, gradients):
    """Holds what an operator makes of Q, K, V, alpha, on the module xp, to O and dQ, dK, dV, dα."""
    mine, saved = operator.forward(*(xp.asarray(a) for a in inputs))
    mine_back = operator.backward(xp.asarray(cotangent(inputs[2])), saved)
    assert {g.dtype for g in (mine, *mine_back)} == {inputs[0].dtype}
    tol = tolerance(*inputs[:2], inputs[3])
    close(mine, O, tol)
    gradients_close(mine_back, gradients, gradient_sizes(*inputs, cotangent(inputs[2])), tol)


# ----------------------------------------------------------------------------------- definition


def test_scores_are_the_definition_entry_by_entry():
    Q, K, _, alpha = make("generic")
    S = osa.skew_scores(Q, K, alpha)
    for i in range(13):
        for j in range(13):
            slow = alpha / math.sqrt(3) * (Q[i] @ K[j] - K[i] @ Q[j])
            assert abs(S[i, j] - slow) < 20 * np.finfo(float).eps


def test_the_dense_definition_is_scipys_expm(case):
    Q, K, V, alpha = make(case)
    A = cases.expm_one_by_one(osa.skew_scores(Q, K, alpha))
    tol = tolerance(Q, K, alpha)
    close(osa.exp_skew(osa.skew_scores(Q, K, alpha)), A, tol)
    close(osa.attention_matrix(Q, K, alpha), A, tol)
    close(osa.osa_dense(Q, K, V, alpha), A @ V, tol)


@pytest.mark.parametrize("size", [1, 1e6, 1e12, 1e15])
def test_the_dense_definition_is_orthogonal_at_any_norm(size, dtype, rng, xp):
    """Most eigenvalues of S are 0, and rounding moves them by eps ‖S‖."""
    Q, K = rng.standard_normal((2, 40, 2)).astype(dtype)
    alpha = float(size / norm_S(Q, K, 1.0))
    A = osa.attention_matrix(xp.asarray(Q), xp.asarray(K), alpha)
    A = ag.to_cpu(A).astype(float)
    close(A.T @ A, np.eye(40), 8 * 40 * np.finfo(dtype).eps)


def test_rotation_angles_are_the_eigenvalues_of_S(case, dtype, xp):
    Q, K, _, alpha = cast(dtype, *make(case))
    S = osa.skew_scores(*cast(np.float64, Q, K, alpha))
    N, d_v = Q.shape[-2:]
    lam = np.sort(np.linalg.eigvals(S).imag, axis=-1)[..., ::-1]  # descending, in pairs ±θ
    expected = np.zeros((*Q.shape[:-2], d_v))
    planes = min(d_v, N // 2)
    expected[..., :planes] = lam[..., :planes]
    theta = osa.rotation_angles(*(xp.asarray(a) for a in (Q, K, alpha)))
    tol = tolerance(Q, K, alpha)
    assert theta.dtype == dtype
    # eigvals is backward stable, and perturbs eigenvalues of a normal matrix by c n eps ‖S‖ only
    close(theta, expected, tol)
    close(theta[..., 0], np.linalg.norm(S, 2, axis=(-2, -1)), tol)
    norm = np.sqrt(2 * (ag.to_cpu(theta) ** 2).sum(axis=-1))  # ‖S‖_F² = 2 Σ θ²
    close(norm, np.linalg.norm(S, axis=(-2, -1)), tol)


# -------------------------------------------------------------------------- exponential, bases


@pytest.mark.parametrize("skew", [True, False], ids=["skew", "not skew"])
def test_exp_phi1_is_scipys_expm_and_the_integral_of_it(spectrum, skew, dtype, rng, xp):
    Z = spectrum(rng)
    Z = (Z if skew else Z / 5 + rng.standard_normal(Z.shape) / 2).astype(dtype)
    E, F = osa.exp_phi1(xp.asarray(Z))
    assert E.dtype == F.dtype == dtype
    exact, Z = cases.expm_one_by_one(Z.astype(float)), Z.astype(float)
    # Rounding moves Z by n eps ‖Z‖, which the derivative of exp, at most e^{μ(Z)}, passes on; μ = 0
    # for skew Z, and the squarings of another lose no more.
    growth = np.exp(max(0, np.linalg.eigvalsh((Z + Z.mT) / 2).max()))
    tol = 16 * Z.shape[-1] * np.finfo(dtype).eps * max(1, cases.spectral_norm(Z)) * growth
    close(E, exact, tol)
    close(F, cases.phi1(Z), tol)


def test_a_small_matrix_keeps_its_digits_beside_a_large_one(dtype):
    """One number of doublings serves a batch; E − I is doubled, not E, whose 1 would hide it."""
    J = np.array([[0, 1], [-1, 0]])
    E, F = osa.exp_phi1(np.array([1e-3 * J, 1e3 * J]).astype(dtype))
    close(E[0], np.array([[math.cos(1e-3), math.sin(1e-3)], [-math.sin(1e-3), math.cos(1e-3)]]),
          4 * np.finfo(dtype).eps)  # fmt: skip
    close(F[0], cases.phi1(1e-3 * J), 4 * np.finfo(dtype).eps)


def test_angles_without_a_digit_are_refused(dtype):
    J = np.array([[0, 1], [-1, 0]], dtype)
    with pytest.raises(FloatingPointError, match="beyond 1/eps"):
        osa.exp_phi1(2 / np.finfo(dtype).eps * J)


@pytest.mark.parametrize("N", [3, 9])
def test_whole_numbers_are_refused(N):
    Q, K, V = np.random.default_rng(0).integers(-3, 4, (3, N, 2))
    for operator in osa.osa_forward, osa.osa_dense:
        with pytest.raises(ValueError, match="float"):
            operator(Q, K, V, 0.5)


@pytest.mark.parametrize("power", [0.1, 0.75, -0.75])
def test_newton_schulz_does_not_lose_a_small_K_beside_a_large_Q(power, dtype):
    Q, K, V, alpha = cast(dtype, *make("generic"))
    # S stays as it is; beyond 0.5 squares vanish and overflow.
    scale = np.finfo(dtype).tiny ** dtype(power)
    O = osa.osa_forward(scale * Q, K / scale, V, alpha, "newton_schulz")[0]
    close(O, osa.osa_dense(*cast(np.float64, Q, K, V, alpha)), 4 * tolerance(Q, K, alpha))


@pytest.mark.parametrize("theta", [1e-30, 0.25, 0.5])
def test_exp_phi1_in_one_plane_is_cosine_and_sine_to_the_last_digits(theta, dtype):
    """Up to ‖Z‖ = ½ nothing is doubled, and the series alone must be right."""
    I, J = np.eye(2), np.array([[0, 1], [-1, 0]])
    E, F = osa.exp_phi1((theta * J).astype(dtype))
    eps = np.finfo(dtype).eps
    close(E, math.cos(theta) * I + math.sin(theta) * J, 2 * eps)
    close(F, (math.sin(theta) * I + 2 * math.sin(theta / 2) ** 2 * J) / theta, 2 * eps)


@pytest.mark.parametrize("size", [0, 1e-30, 1, 1e30])
@pytest.mark.parametrize("frechet", [osa.frechet, fast.small.frechet_skew])
def test_frechet_derivative_is_the_corner_of_a_block_triangular_exp(
    frechet, size, spectrum, dtype, rng, xp
):
    """exp of [[S, D], [0, S]] is [[exp S, L(S, D)], [0, exp S]], for any D, and linear in it."""
    S = spectrum(rng).astype(dtype)
    D, n = rng.standard_normal(S.shape).astype(dtype), S.shape[-1]
    L = frechet(xp.asarray(S), xp.asarray(dtype(size) * D))
    assert L.dtype == dtype
    S, D = S.astype(float), D.astype(float)
    corner = cases.expm_one_by_one(np.block([[S, D], [np.zeros_like(S), S]]))[..., :n, n:]
    # SciPy squares about log2(‖S‖ + ‖D‖) times, and its errors add up
    tol = 4 * n * np.finfo(dtype).eps * max(1, cases.spectral_norm(S)) * np.linalg.norm(D)
    close(ag.to_cpu(L).astype(float) / (size or 1), corner if size else 0 * corner, tol)


@pytest.mark.parametrize("frechet", [osa.frechet, fast.small.frechet_skew])
def test_a_small_derivative_keeps_its_digits_beside_a_large_one(frechet, dtype):
    D = np.array([[[1e-25]], [[1e25]]], dtype)
    close(frechet(np.zeros_like(D), D) / D, np.ones_like(D), 4 * np.finfo(dtype).eps)


# ------------------------------------------------------------------------------------ one answer


def test_every_operator_is_scipys_exponential_and_its_derivative(case, operator):
    Q, K, V, alpha = cast(np.float64, *make(case))
    A, O, *gradients = cases.definition(Q, K, V, alpha, cotangent(V))
    close(operator.matrix(Q, K, alpha), A, tolerance(Q, K, alpha))
    agrees(operator, np, (Q, K, V, alpha), O, gradients)


def test_every_operator_gives_the_dense_definition_and_its_gradient(case, operator, dtype, xp):
    inputs = cast(dtype, *make(case))
    exact_in = cast(np.float64, *inputs, cotangent(inputs[2]))  # the same rounded inputs
    exact = OPERATORS["dense"].gradients(*exact_in)
    assert all(np.isfinite(g).all() for g in exact)
    agrees(operator, xp, inputs, osa.osa_dense(*exact_in[:4]), exact)


# ------------------------------------------------------------------------------- orthogonality


def test_attention_matrix_is_orthogonal_with_determinant_one(case, operator, dtype):
    Q, K, _, alpha = cast(dtype, *make(case))
    A = operator.matrix(Q, K, alpha)
    assert A.dtype == dtype
    A = A.astype(np.float64)
    I, tol = np.eye(A.shape[-1]), tolerance(Q, K, alpha)
    close(A @ A.mT, np.broadcast_to(I, A.shape), tol)
    close(A.mT @ A, np.broadcast_to(I, A.shape), tol)
    # A relative change of tol in each entry changes the determinant by at most n tol.
    close(np.linalg.det(A), np.ones(A.shape[:-2]), A.shape[-1] * tol)


def test_padded_rows_keep_their_values_and_change_no_other_row(operator, dtype):
    Q, K, V, alpha = cast(dtype, *make("padded rows"))
    O, alone = (operator.forward(Q[:n], K[:n], V[:n], alpha)[0] for n in (13, 9))
    close(O, np.concatenate([alone, V[9:]]), tolerance(Q, K, alpha))


# ------------------------------------------------------------------------------------- gradients


# In these cases O does not depend on some of the arguments, to first order: differences are then
# rounding noise alone, and an error relative to it says nothing.
# The only oracle of the gradient without SciPy and PyTorch.
@pytest.mark.parametrize("name", ["auto", "dense", "paper qr"])
def test_backward_agrees_with_central_differences(name, xp):
    arrays = [xp.asarray(np.asarray(a)) for a in make("batch, alpha per head")]
    f = osa.osa if name == "paper qr" else OPERATORS[name].on_tensors()
    assert ag.gradient_check(f, *arrays, directions=1) < 1e-8


@pytest.mark.parametrize(
    "shape", [(), (1, 1), (3, 1, 1), (1, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1)], ids=str
)
def test_the_gradient_of_alpha_has_alphas_shape(shape, operator, rng, xp):
    Q, K, V, _ = make("batch, alpha per head")
    arrays = [xp.asarray(a) for a in (Q, K, V, rng.uniform(0.1, 0.3, shape))]
    assert operator.gradients(*arrays, arrays[2])[3].shape == shape
    if xp is np:
        assert ag.gradient_check(operator.on_tensors(), *arrays, directions=1) < 1e-8


@pytest.mark.parametrize("alpha", [np.float64(0.3), np.int64(1), np.full((1, 1), 0.3)], ids=str)
def test_alpha_takes_the_dtype_of_the_queries(alpha):
    Q, K, V = (M.astype(np.float32) for M in make("generic")[:3])
    for f in (osa.skew_scores, osa.attention_matrix, osa.rotation_angles, fast.attention_matrix):
        assert f(Q, K, alpha).dtype == np.float32
    assert osa.osa_dense(Q, K, V, alpha).dtype == np.float32


@pytest.mark.parametrize("name", ["auto", "paper qr"])
def test_a_python_number_is_a_fine_alpha(name, xp):
    Q, K, V, _ = make("generic")
    arrays, dO = [xp.asarray(a) for a in (Q, K, V)], xp.asarray(cotangent(V))
    by_number = OPERATORS[name].gradients(*arrays, 0.3, dO)
    by_array = OPERATORS[name].gradients(*arrays, xp.asarray(np.array(0.3)), dO)
    for a, b in zip(by_number, by_array):
        np.testing.assert_array_equal(ag.to_cpu(a), ag.to_cpu(b))
    assert by_number[3].shape == ()


@pytest.mark.parametrize("name", ["auto", "paper qr"])
def test_operator_and_gradients_agree_with_pytorchs_autograd_of_matrix_exp(name, xp):
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    for case in cases.CASES:
        Q, K, V, alpha = cast(np.float64, *make(case))
        tq, tk, tv, ta = (torch.tensor(a, requires_grad=True) for a in (Q, K, V, alpha))
        S = ta / math.sqrt(Q.shape[-1]) * (tq @ tk.mT - tk @ tq.mT)
        O = torch.matrix_exp(S) @ tv
        O.backward(torch.tensor(cotangent(V)))
        expected = [t.grad.numpy() for t in (tq, tk, tv, ta)]
        agrees(OPERATORS[name], xp, (Q, K, V, alpha), O.detach().numpy(), expected)


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"gram"}))  # it loses eps (s ‖Q‖ ‖K‖)²
def test_in_one_plane_the_gradient_is_right_to_the_last_digits(name, dtype, rng):
    """Two tokens of width 1: A = [[cos θ, sin θ], [−sin θ, cos θ]] with θ = α (q₁k₂ − k₁q₂)."""
    Q, K, V, dO = rng.standard_normal((4, 60, 2, 1)).astype(dtype)
    (q, p), (k, l), (v, w), (g, h) = (a.astype(float)[..., 0].T for a in (Q, K, V, dO))
    area = q * l - k * p
    alpha = (np.geomspace(1e-3, 60, 60) / abs(area)).astype(dtype)
    dQ, _, dV, dalpha = OPERATORS[name].gradients(Q, K, V, alpha[:, None, None], dO)
    alpha = alpha.astype(float)
    sin, cos = np.sin(alpha * area), np.cos(alpha * area)
    dtheta = g * (w * cos - v * sin) - h * (v * cos + w * sin)
    # Rounding of θ, whose two terms may cancel, moves the angle by some eps times their size; each
    # squaring adds as much.
    terms = 1 + alpha * (abs(q * l) + abs(k * p))
    flow = np.hypot(v, w) * np.hypot(g, h)
    squares = name == "products" or name.startswith("paper")
    tol = (32 if squares else 8) * np.finfo(dtype).eps * terms * flow
    assert (abs(dalpha[:, 0, 0] - dtheta * area) <= tol * (abs(q * l) + abs(k * p))).all()
    assert (abs(dQ[:, 0, 0] - dtheta * alpha * l) <= tol * alpha * np.hypot(k, l)).all()
    assert (abs(dV[:, 0, 0] - (g * cos - h * sin)) <= tol / np.hypot(v, w)).all()


@pytest.mark.parametrize("norm", [30, 100, 1000])
def test_operators_agree_at_large_norms(norm, dtype, operator, rng, xp):
    # For Gaussian tokens s‖Q‖‖K‖ is about ‖S‖, so the gram route too is within c n eps ‖S‖ of the
    # definition while its loss, eps (s‖Q‖‖K‖)², is harmless.  Beyond ‖S‖ = 30 it is not, in single
    # precision, which is why "auto" turns to QR there.
    if operator is OPERATORS["gram"] and dtype is np.float32 and norm > 30:
        return
    Q, K, V, dO = cast(dtype, *rng.standard_normal((4, 20, 3)))
    alpha = np.asarray(norm / norm_S(Q, K, 1.0), dtype)
    exact_in = cast(np.float64, Q, K, V, alpha)
    O, saved = operator.forward(*(xp.asarray(a) for a in (Q, K, V, alpha)))
    close(O, osa.osa_dense(*exact_in), tolerance(Q, K, alpha))
    exact = OPERATORS["dense"].gradients(*exact_in, dO.astype(float))
    sizes = [np.linalg.norm(e) for e in exact]
    gradients_close(operator.backward(xp.asarray(dO), saved), exact, sizes, tolerance(Q, K, alpha))


def test_inputs_are_not_modified(case, operator, dtype):
    arrays = [np.array(a, dtype) for a in make(case)]
    dO = cotangent(arrays[2])
    for a in (*arrays, dO):
        a.flags.writeable = False  # a write would raise
    O, saved = operator.forward(*arrays)
    first = operator.backward(dO, saved)
    kept = [np.array(g) for g in first]
    again = operator.backward(dO, saved)  # what was saved is not used up
    for a, b in zip(kept, again):
        np.testing.assert_array_equal(a, b)
    for result in (O, *first[:3]):
        assert not any(np.shares_memory(result, a) for a in (*arrays, dO))


# -------------------------------------------------------------------------------------- bad input

REFUSED = {
    "K shorter": ("K", lambda a: a[:-1]),
    "K narrower": ("K", lambda a: a[:, :-1]),
    "K of a batch": ("K", lambda a: a[None]),
    "V shorter": ("V", lambda a: a[:-1]),
    "V of a batch": ("V", lambda a: a[None]),
    "Q in single precision": ("Q", lambda a: a.astype(np.float32)),
    "K in single precision": ("K", lambda a: a.astype(np.float32)),
    "V of integers": ("V", lambda a: a.astype(int)),
    "alpha per token": ("alpha", lambda a: np.ones((13, 1))),
    "alpha a vector": ("alpha", lambda a: np.ones(3)),
    "alpha of a batch that Q has not": ("alpha", lambda a: np.ones((2, 1, 1))),
    "dO shorter": ("dO", lambda a: a[:-1]),
    "dO narrower": ("dO", lambda a: a[:, :-1]),
    "dO transposed": ("dO", lambda a: a.T),
    "dO in single precision": ("dO", lambda a: a.astype(np.float32)),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_the_paper_refuses_a_wrong_shape_or_dtype_by_name_in_one_line(fault, method):
    name, spoil = REFUSED[fault]
    arrays = dict(zip(("Q", "K", "V", "alpha"), make("generic")))
    arrays["dO"] = arrays["V"]
    arrays[name] = spoil(arrays[name])
    with pytest.raises(ValueError, match=rf"^[^\n]*\b{name}\b[^\n]*, got [^\n]*$"):
        OPERATORS[f"paper {method}"].gradients(**arrays)


@pytest.mark.parametrize("name", ["auto", "paper qr"])
def test_arrays_of_two_modules_are_refused(name):
    Q, K, V, alpha = make("generic")
    with pytest.raises(TypeError, match="cannot be mixed"):
        OPERATORS[name].forward(refusing.asarray(Q), K, V, alpha)
    with pytest.raises(TypeError):
        osa.skew_scores(Q, refusing.asarray(K), alpha)


@pytest.mark.parametrize("name", ["Q", "K", "alpha"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", ["batch, alpha per head", "N < 2 d_v"])
def test_scores_that_are_nan_or_inf_are_refused(case, value, name, method, xp):
    arrays = dict(zip(("Q", "K", "V", "alpha"), make(case)))
    arrays[name] = np.array(arrays[name])
    arrays[name][(-1,) * arrays[name].ndim] = value
    with np.errstate(invalid="ignore", over="ignore"):
        with pytest.raises(FloatingPointError, match="the scores S hold NaN or Inf"):
            osa.osa_forward(*(xp.asarray(np.asarray(a)) for a in arrays.values()), method)


@pytest.mark.parametrize("method", ["svd", "", None, 1])
def test_an_unknown_method_is_refused_by_name(method):
    with pytest.raises(ValueError, match="method"):
        osa.osa_forward(*make("generic"), method)


# ------------------------------------------------------------------------------------ the house


def test_what_is_read_first_is_short():
    most = {"osa_minimal.py": 420, "autograd.py": 540, "train.py": 230, "README.md": 200}
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in most}
    assert all(lines[name] <= most[name] for name in most), lines


HOUSE = ["autograd", "osa_minimal", "fast", "relatives", "training", "train"]
LIBRARIES = {"training": {"numpy", "tqdm", "safetensors", "matplotlib", "mpi4py"}}


@pytest.mark.parametrize("part", HOUSE)
def test_imports_run_one_way_and_need_no_more_than_they_say(part):
    files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else (ROOT / part).glob("*.py")
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(node.module.partition(".")[0])
    ours = set(HOUSE[: HOUSE.index(part) + (ROOT / part).is_dir()])
    assert imported <= ours | sys.stdlib_module_names | LIBRARIES.get(part, {"numpy"})


def test_another_package_named_autograd_is_named(tmp_path):
    (tmp_path / "autograd.py").touch()
    code = f"import sys; sys.path.append({str(ROOT)!r}); import osa_minimal"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "another autograd must not come first in sys.path" in ran.stderr


def test_two_files_in_an_empty_folder_check_themselves_and_train(tmp_path):
    for name in ("osa_minimal.py", "autograd.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-I", "-c", "import sys, runpy; sys.path.insert(0, '.'); "
               "runpy.run_path('osa_minimal.py', run_name='__main__')"]  # fmt: skip
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    errors = [float(x) for x in re.findall(r"(?:I\||V\||error) +(\S+)$", ran.stdout, re.M)]
    assert len(errors) == 3 and max(errors[:2]) < 1e-13 and errors[2] < 1e-8
    assert float(re.findall(r"accuracy (\d+)%", ran.stdout)[-1]) >= 95
    # One of eight values, drawn 1000 times: 12.5 % with a deviation of 1 %.
    assert 8 <= float(re.search(r"with α = 0.* (\d+)%", ran.stdout)[1]) <= 17
