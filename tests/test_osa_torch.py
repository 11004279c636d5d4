"""examples/osa_torch.py: the operator, its gradient and what PyTorch users do with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import osa_minimal

torch = pytest.importorskip("torch")
EXAMPLES = Path(osa_minimal.__file__).parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from osa_torch import exp_phi1, osa  # noqa: E402
from torch_model import SkiplessTransformer  # noqa: E402

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
each_dtype = pytest.mark.parametrize("dtype", EPS, ids=["float32", "float64"])


def normal(rng, *shape, dtype=torch.float64):
    """Gaussian numbers, with strides as those of heads that were split off."""
    a = torch.tensor(rng.standard_normal((*shape[:-2], shape[-1], shape[-2])), dtype=dtype).mT
    return a.detach().requires_grad_()


def generic(rng, N=9, d_v=2, m=2, alpha=0.7):
    return [*(normal(rng, 2, N, n) for n in (d_v, d_v, m)), alpha]


def rank_deficient(rng):  # P has rank 1 of 6
    Q, K, V, alpha = generic(rng, d_v=3)
    with torch.no_grad():
        direction = Q[..., :1].clone()
        Q[:], K[:] = direction * Q[:, :1], direction * K[:, :1]
    return Q, K, V, alpha


def duplicated_tokens(rng):
    Q, K, V, alpha = generic(rng)
    with torch.no_grad():
        for M in (Q, K):
            M[:, 3:] = M[:, :1]
    return Q, K, V, alpha


def equal_Q_and_K(rng):  # S = 0
    Q, _, V, alpha = generic(rng)
    return Q, Q.detach().clone().requires_grad_(), V, alpha


def zero_Q_and_K(rng):
    Q, K, V, alpha = generic(rng)
    with torch.no_grad():
        Q *= 0
        K *= 0
    return Q, K, V, alpha


CASES = {
    "generic": generic,
    "wide values": lambda rng: generic(rng, m=5),
    "rank-deficient": rank_deficient,
    "duplicated tokens": duplicated_tokens,
    "K = Q": equal_Q_and_K,
    "Q = K = 0": zero_Q_and_K,
    "N < 2 d_v": lambda rng: generic(rng, N=5, d_v=3),
    "N = 2 d_v": lambda rng: generic(rng, N=6, d_v=3),
    "one token": lambda rng: generic(rng, N=1),
    "alpha = 0": lambda rng: generic(rng, alpha=0.0),
    "large angles": lambda rng: generic(rng, alpha=20.0),
    "two batch dimensions": lambda rng: [*(normal(rng, 2, 2, 5, 2) for _ in range(3)), 0.7],
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def definition(Q, K, V, alpha):
    """exp of the N × N matrix S, applied to V, under PyTorch's own autograd."""
    QKt = alpha / Q.shape[-1] ** 0.5 * (Q @ K.mT)
    return torch.linalg.matrix_exp(QKt - QKt.mT) @ V


def tensors(case, rng, dtype=torch.float64):
    """Leaves Q, K, V, alpha of one case."""
    *QKV, alpha = case(rng)
    alpha = torch.tensor(alpha, dtype=dtype, requires_grad=True)
    return [*(M.detach().to(dtype).requires_grad_() for M in QKV), alpha]


def results(f, leaves, dO):
    """f(*leaves) and the gradients of ⟨dO, f(*leaves)⟩."""
    O = f(*leaves)
    return [O, *torch.autograd.grad(O, leaves, dO.to(O.dtype))]


def assert_close(got, wanted, eps, c):
    """|got − wanted| ≤ c eps times the size of what is wanted, or of 1 if that is more."""
    for name, a, b in zip(("O", "dQ", "dK", "dV", "dalpha"), got, wanted):
        b = torch.as_tensor(b).detach().double()
        assert a.shape == b.shape, name
        error = float((a.detach().double() - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert error <= c * eps, f"{name}: {error / eps:.0f} eps"


def size_of(leaves):
    """max(1, ‖S‖), to which rounding errors of exp(S) are proportional."""
    Q, K, _, alpha = (a.detach().double() for a in leaves)
    QKt = alpha / Q.shape[-1] ** 0.5 * (Q @ K.mT)
    return max(1.0, float(torch.linalg.matrix_norm(QKt - QKt.mT, 2).max()))


# ------------------------------------------------------------------------------ values and gradient


@each_case
def test_the_gradient_passes_gradcheck(case, rng):
    assert torch.autograd.gradcheck(osa, tensors(case, rng))


@each_dtype
@each_case
def test_values_and_gradients_are_those_of_the_definition(case, dtype, rng):
    leaves = tensors(case, rng, dtype)
    exact = [a.detach().double().requires_grad_() for a in leaves]
    dO = normal(rng, *leaves[2].shape).detach()
    got, wanted = results(osa, leaves, dO.to(dtype)), results(definition, exact, dO.to(dtype))
    # Some ten products of matrices with n ≤ 16, each rounding to n eps at worst, and the factor
    # ‖S‖; what autograd differentiates of the definition has its own, in float64.
    assert_close(got, wanted, EPS[dtype] * size_of(leaves), 100)


@each_dtype
@each_case
def test_it_is_osa_minimal_to_rounding(case, dtype, rng):
    leaves = tensors(case, rng, dtype)
    dO = normal(rng, *leaves[2].shape, dtype=dtype).detach()
    O, saved = osa_minimal.osa_forward(*(a.detach().numpy() for a in leaves))
    wanted = [O, *osa_minimal.osa_backward(dO.numpy(), saved)]
    assert_close(results(osa, leaves, dO), wanted, EPS[dtype] * size_of(leaves), 100)


@each_dtype
@pytest.mark.parametrize("theta", [0.0, 1e-30, 0.499, 0.501, 1.0, 30.0])
def test_the_exponential_of_a_plane_is_its_rotation(theta, dtype):
    """Z = θJ, J² = −I: exp = cos θ I + sin θ J, φ₁ = (sin θ I + (1 − cos θ) J)/θ; d/dθ of both."""
    theta = np.float64(torch.tensor(theta, dtype=dtype))  # 0.499: the largest ‖X‖ of the series
    I, J = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64)
    Z = torch.stack([theta * J, J]).to(dtype)[:, None]
    E1, F = exp_phi1(Z)
    cosm1, sin = -2 * np.sin(theta / 2) ** 2, np.sin(theta)  # cos θ − 1, without cancellation
    a, b = (1.0, 0.0) if theta == 0 else (sin / theta, -cosm1 / theta)
    da, db = (0.0, 0.5) if theta < 1e-9 else ((1 + cosm1 - a) / theta, (sin - b) / theta)
    for got, wanted in (
        (E1, [cosm1 * I + sin * J, (1 + cosm1) * J - sin * I]),
        (F, [a * I + b * J, da * I + db * J]),
    ):
        # Each doubling doubles the error of the series, an eps or so; θ = 30 takes 6.
        error = (got[:, 0] - torch.stack(wanted)).abs().amax((-2, -1))
        assert (error <= 3 * max(1, 2 * theta) * EPS[dtype]).all(), error / EPS[dtype]


def test_values_are_those_of_scipy(rng):
    expm = pytest.importorskip("scipy.linalg").expm
    Q, K, V, alpha = (a.detach() for a in tensors(generic, rng))
    QKt = (alpha / Q.shape[-1] ** 0.5 * (Q @ K.mT)).numpy()
    wanted = [expm(S - S.T) @ v for S, v in zip(QKt, V.numpy())]
    assert_close([osa(Q, K, V, alpha)], [np.stack(wanted)], EPS[torch.float64], 100)


def test_a_large_matrix_of_the_batch_costs_the_small_ones_no_digits(rng):
    Q, K, V, _ = tensors(lambda rng: generic(rng, N=40), rng, torch.float32)
    alpha = torch.tensor([1e-3, 1e2])[:, None, None]
    with torch.no_grad():
        O, alone = osa(Q, K, V, alpha)[:1], osa(Q[:1], K[:1], V[:1], alpha[:1])
        wanted = definition(*(a[:1].double() for a in (Q, K, V, alpha)))
    # O is rounded to eps |V|, |V| ≤ 4; what turns it, 0.02 V, is right to a few eps of its own.
    for got in (O, alone):
        assert (got - wanted).abs().max() <= 4 * EPS[torch.float32]
    assert 0.01 < (wanted - V[:1]).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1)], ids=str)
def test_alpha_broadcasts_and_its_gradient_has_its_shape(shape, rng):
    Q, K, V = (normal(rng, 2, 3, 8, 2) for _ in range(3))
    alpha = torch.tensor(0.5 + rng.random(shape), requires_grad=True)
    leaves, dO = [Q, K, V, alpha], normal(rng, 2, 3, 8, 2).detach()
    got, wanted = results(osa, leaves, dO), results(definition, leaves, dO)
    assert got[4].shape == shape
    assert_close(got, wanted, EPS[torch.float64] * size_of(leaves), 100)


def test_alpha_is_a_number_and_batch_dimensions_may_be_missing_or_empty(rng):
    Q, K, V = (normal(rng, 8, 2) for _ in range(3))
    assert torch.equal(osa(Q, K, V, 0.5), osa(Q[None], K[None], V[None], torch.tensor(0.5))[0])
    Q, K, V = (normal(rng, 0, 8, 2) for _ in range(3))
    O = osa(Q, K, V, 0.5)
    O.sum().backward()
    assert O.shape == Q.grad.shape == (0, 8, 2)


def test_padding_by_zeroed_rows_of_Q_and_K(rng):
    Q, K, V, alpha = tensors(lambda rng: generic(rng, N=12), rng)
    kept = torch.arange(12)[:, None] < torch.tensor([7, 10])[:, None, None]  # (2, 12, 1)
    dO = normal(rng, *V.shape).detach()
    O, dQ, dK, dV, _ = results(
        lambda Q, K, V, a: osa(Q * kept, K * kept, V, a), [Q, K, V, alpha], dO
    )
    for i, n in enumerate((7, 10)):
        short = [a[i, :n].detach().requires_grad_() for a in (Q, K, V)]
        wanted = results(osa, [*short, alpha], dO[i, :n])
        assert_close([a[i, :n] for a in (O, dQ, dK, dV)], wanted, EPS[torch.float64], 100)
        assert torch.equal(O[i, n:], V[i, n:]) and torch.equal(dV[i, n:], dO[i, n:])


def test_nan_stays_in_its_matrix(rng):
    Q, K, V, alpha = (a.detach() for a in tensors(lambda rng: generic(rng, alpha=9.0), rng))
    wanted = osa(Q, K, V, alpha)
    for bad in (float("nan"), float("inf")):
        Q[1, 2, 0] = bad
        O = osa(Q, K, V, alpha)
        assert O[1].isnan().any() and torch.equal(O[0], wanted[0])


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_halves_are_computed_in_float32(half, rng):
    leaves = [a.detach().to(half).requires_grad_() for a in tensors(CASES["N = 2 d_v"], rng)]
    dO = normal(rng, *leaves[2].shape, dtype=half).detach()
    single = [a.detach().float().requires_grad_() for a in leaves]
    got = results(osa, leaves, dO)
    for a, b in zip(got, results(osa, single, dO.float())):
        assert a.dtype == half and torch.equal(a, b.to(half))


@pytest.mark.parametrize("N", [4, 40])
def test_autocast_does_not_reach_inside(N, rng):
    """Also where backward() is called under autocast, which PyTorch advises against."""
    leaves = tensors(lambda rng: generic(rng, N=N, d_v=3), rng, torch.float32)
    dO = normal(rng, *leaves[2].shape, dtype=torch.float32).detach()
    wanted = results(osa, leaves, dO)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (leaves[0].mT @ leaves[1]).dtype == torch.bfloat16
        got = results(osa, leaves, dO)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@each_dtype
def test_two_runs_give_the_same_bits(dtype, rng):
    leaves = [*(normal(rng, 3, 300, 8, dtype=dtype) for _ in range(3))]
    leaves += [torch.tensor(0.1, dtype=dtype, requires_grad=True)]
    dO = normal(rng, 3, 300, 8, dtype=dtype).detach()
    first = results(osa, leaves, dO)
    assert all(torch.equal(a, b) for a, b in zip(first, results(osa, leaves, dO)))


def test_65536_tokens_are_rotated_in_memory_linear_in_their_number(rng):
    def kept(N):
        """Numbers that wait for the backward pass; the results."""
        Q, K, V, dO = (normal(rng, N, 16, dtype=torch.float32) for _ in range(4))
        count, leaves = 0, [Q, K, V, torch.tensor(2e-3, requires_grad=True)]

        def count_in(a):
            nonlocal count
            count += a.numel()
            return a

        with torch.autograd.graph.saved_tensors_hooks(count_in, lambda a: a):
            O = osa(*leaves)
        gradients = torch.autograd.grad(O, leaves, dO.detach())
        return count, leaves, dO, O, gradients

    few, many = kept(2**15)[0], kept(2**16)
    count, (Q, K, V, alpha), dO, O, (dQ, dK, dV, dalpha) = many
    assert count < 2 * few and count < 2**16 * 200  # S would have 2³² elements
    eps = EPS[torch.float32]
    with torch.no_grad():
        turned = float((O - V).norm() / V.norm())
        assert 0.01 < turned  # of 65,536 directions 32 are turned
        # A is orthogonal: exp(−S) exp(S) = I, dV = Aᵀ dO.  Sums of 65,536 products in 32 × 32.
        assert (osa(Q, K, O, -alpha) - V).abs().max() < 100 * eps
        assert (osa(Q, K, dV, alpha) - dO).abs().max() < 100 * eps
        # S is linear in Q, in K and in alpha, so ⟨dQ, Q⟩ = ⟨dK, K⟩ = alpha dalpha.
        inner = [float((a.double() * b.double()).sum()) for a, b in ((dQ, Q), (dK, K))]
        wanted = float(alpha * dalpha)
        assert abs(wanted) > 1 and inner == pytest.approx([wanted] * 2, rel=1e-3)


# ---------------------------------------------------------------------------------- PyTorch's tools


CXX = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl")))
compiled_in_full = pytest.param(
    "inductor", 40, marks=pytest.mark.skipif(not CXX, reason="torch.compile needs a C++ compiler")
)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about its own
@pytest.mark.parametrize("backend, N", [compiled_in_full, ("aot_eager", 40), ("aot_eager", 5)])
def test_compiled_in_one_graph_it_agrees(backend, N, rng):
    def f(Q, K, V, alpha):
        return osa(Q.sin(), K, V, alpha).cos()

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for alpha in (0.5, 50.0):  # other numbers of doublings, the same graph
        leaves = tensors(lambda rng, a=alpha: generic(rng, N=N, d_v=4, alpha=a), rng)
        dO = normal(rng, *leaves[2].shape).detach()
        eps = EPS[torch.float64] * size_of(leaves)
        assert_close(results(compiled, leaves, dO), results(f, leaves, dO), eps, 100)


def test_the_operator_is_described_rightly_to_the_compiler(rng):
    for p, dtype in ((1, torch.float32), (2, torch.float64)):
        Z = normal(rng, p, 3, 4, 4, dtype=dtype).detach()
        torch.library.opcheck(torch.ops.osa.exp_phi1.default, (Z,))


def test_what_is_not_implemented_is_refused(rng):
    Q, K, V, alpha = tensors(generic, rng)
    (dQ,) = torch.autograd.grad(osa(Q, K, V, alpha).sin().sum(), Q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice .* @once_differentiable"):
        dQ.sum().backward()
    for transform in (torch.func.vmap(osa, (0, 0, 0, None)), torch.func.jacrev(osa)):
        with pytest.raises(RuntimeError, match="functorch transforms .* setup_context"):
            transform(Q, K, V, alpha)


def test_misfits_are_named(rng):
    Q, K, V, alpha = tensors(generic, rng)
    for args, got in (
        ((Q, K[:, :5], V, alpha), "(2, 5, 2)"),
        ((Q, K, V[:1], alpha), "(1, 9, 2)"),
        ((Q, K, V.float(), alpha), "torch.float32 (2, 9, 2)"),
        ((*(M.detach().long() for M in (Q, K, V)), alpha), "torch.int64"),
        ((Q[0, 0], K[0, 0], V[0, 0], alpha), "(2,)"),
    ):
        with pytest.raises(ValueError, match=r"Q, K \(..., N, d_v\) and V .* one float dtype") as e:
            osa(*args)
        assert got in str(e.value)
    for shape in ((2,), (3, 1, 1), (1, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"alpha must broadcast to \(2, 1, 1\), got ") as e:
            osa(Q, K, V, torch.ones(shape))
        assert str(shape) in str(e.value)


# -------------------------------------------------------------------------- examples/train_torch.py


def trained(model, data, out, processes):
    """The weights after two steps in one process, or in several."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, EXAMPLES / "train_torch.py", model, "--out", out, "--data", data]
    command += ["--max-steps", "2", "--batch-size", "31", "--lr", "0.01"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy before") == done.stdout.count("after") == 1
    return load_file(out)


def test_one_process_and_two_give_the_same_weights(rng, tmp_path):
    sizes = dict(d=8, heads=2, depth=2, patch=3, image=(12, 9, 3), classes=5, mlp_ratio=2)
    ours = osa_minimal.SkiplessTransformer(**sizes, eta=0.3, rng=rng, dtype=np.float64)
    about = {**sizes, "attention": "osa", "skip": "none", "norm": False, "mean": 0.5, "std": 0.3,
             "slope": ours.slope}  # fmt: skip
    model, data = tmp_path / "m.safetensors", tmp_path / "d.npz"
    before = {k: p.data for k, p in ours.parameters.items()}
    rows = {k: np.ascontiguousarray(a) for k, a in before.items()}
    save_file(rows, model, {k: str(v) for k, v in about.items()})
    images = rng.integers(0, 256, (150, *sizes["image"]), dtype=np.uint8)
    labels = rng.integers(0, 5, 150)
    np.savez(data, x_train=images[:100], y_train=labels[:100], x_test=images, y_test=labels)

    one, two = (trained(model, data, tmp_path / f"{k}.safetensors", k) for k in (1, 2))
    assert set(one) == set(two) == set(before)
    for k, w in one.items():
        # float64: gradients of 1e-16, which AdamW divides by their size, and steps of 0.01.
        np.testing.assert_allclose(two[k], w, rtol=0, atol=1e-12, err_msg=k)
        assert 0.005 < abs(w - before[k]).max() < 0.03, k
    # What was written is read again, with the same record.
    assert SkiplessTransformer(tmp_path / "2.safetensors").slope == ours.slope


def test_a_damaged_model_is_refused_in_one_line(tmp_path):
    model = tmp_path / "m.safetensors"
    save_file({"W": np.ones(9)}, model)
    model.write_bytes(model.read_bytes()[:-8])
    command = [sys.executable, EXAMPLES / "train_torch.py", model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
