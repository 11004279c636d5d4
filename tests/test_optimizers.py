"""training/optimizers.py: AdamW against a scalar loop, Muon's orthogonality, schedule, clipping."""

import math

import numpy as np
import pytest

import autograd as ag
from osa_minimal import random_orthogonal
from training import optimizers

SHAPES = [(6, 6), (4, 9), (9, 4), (3, 8, 4), (5, 1)]


def tensors(xp, arrays):
    """{name: parameter}, copies of the arrays on the module `xp`."""
    return {k: ag.Tensor(xp.asarray(a.copy()), requires_grad=True) for k, a in arrays.items()}


class Flat:
    """Parameters whose weights lie in one array, as a run has them, and one optimiser's steps."""

    def __init__(self, kind, xp, arrays, **kw):
        self.xp, self.optimizer = xp, kind(tensors(xp, arrays), **kw)
        self.parameters = self.optimizer.parameters
        self.weights, self.grads = optimizers.flatten(self.parameters)

    def step(self, grads, lr, t):
        for k, p in self.parameters.items():
            p.grad[...] = self.xp.asarray(grads[k])
        self.optimizer.step(self.weights, self.grads, lr, t)

    def __getitem__(self, name):
        return ag.to_cpu(self.parameters[name].data)


def off_orthogonal(W):
    """max |WᵀW − I| over the shorter side of W (..., n, m), in float64."""
    W = ag.to_cpu(W).astype(np.float64)
    gram = W.swapaxes(-1, -2) @ W if W.shape[-2] >= W.shape[-1] else W @ W.swapaxes(-1, -2)
    return abs(gram - np.eye(gram.shape[-1])).max()


def orthogonal(rng, shape, dtype):
    """Orthogonal matrices (..., n, m)."""
    count = math.prod(shape[:-2])
    matrices = [random_orthogonal(*shape[-2:], rng, dtype) for _ in range(count)]
    return np.stack(matrices).reshape(shape)


def conditioned(rng, shape, largest):
    """A random matrix (..., n, m) with singular values between 1 and `largest`."""
    U, s, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    s[...] = np.linspace(largest, 1, s.shape[-1])
    return (U * s[..., None, :]) @ Vt


# --------------------------------------------------------------------------------------- AdamW


def adamw_by_hand(w, grads, lr, b1, b2, eps, decay):
    """AdamW on one number, as the paper has it."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        w = w - lr[t - 1] * (m_hat / (math.sqrt(v_hat) + eps) + decay * w)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_scalar_loop(xp, rng, decay):
    start = {"a": rng.standard_normal((2, 3)), "b": rng.standard_normal(4)}
    grads = {k: rng.standard_normal((5, *w.shape)) for k, w in start.items()}
    grads["b"][:, 0] = 0  # a weight without a gradient
    rates = [0.1, 0.2, 0.05, 0.0, 0.3]
    run = Flat(optimizers.AdamW, xp, start, betas=(0.8, 0.9), eps=1e-6, weight_decay=decay)
    for t, lr in enumerate(rates, start=1):
        run.step({k: g[t - 1] for k, g in grads.items()}, lr, t)
    for k, w in start.items():
        got = run[k]
        for i in np.ndindex(w.shape):
            wanted = adamw_by_hand(w[i], grads[k][(slice(None), *i)], rates, 0.8, 0.9, 1e-6, decay)
            assert got[i] == pytest.approx(wanted, rel=1e-12, abs=1e-14)


# ---------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalise_brings_all_singular_values_near_1(xp, rng, shape):
    for largest in (1.0, 10.0):
        for scale in (1e-6, 1.0, 1e6):
            M = xp.asarray((scale * conditioned(rng, shape, largest)).astype(np.float32))
            U = optimizers.orthogonalise(M)
            assert U.dtype == np.float32 and U.shape == shape
            values = np.linalg.svd(ag.to_cpu(U).astype(np.float64), compute_uv=False)
            assert 0.6 <= values.min() and values.max() <= 1.3


def test_orthogonalise_keeps_the_singular_vectors(xp, rng):
    M = conditioned(rng, (6, 4), 5.0)
    U, _, Vt = np.linalg.svd(M, full_matrices=False)
    inner = U.T @ ag.to_cpu(optimizers.orthogonalise(xp.asarray(M))) @ Vt.T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-12)
    assert np.diag(inner).min() > 0.6
    assert not ag.to_cpu(optimizers.orthogonalise(xp.asarray(np.zeros((3, 5))))).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retract_is_the_nearest_orthogonal_matrix_for_small_departures(xp, rng, shape):
    W = conditioned(rng, shape, 1.0) + 0.003 * rng.standard_normal(shape)
    U, _, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(
        ag.to_cpu(optimizers.retract(xp.asarray(W))), U @ Vt, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("dtype, lr", [(np.float32, 1e-4), (np.float64, 1e-4), (np.float32, 0.02)])
def test_muon_keeps_every_weight_orthogonal_to_rounding(xp, rng, dtype, lr):
    """The last retraction leaves 0.75 e² of an error e = O(lr²): below eps for these rates.

    What remains is rounding: n products per entry of WᵀW, a few eps each.
    """
    start = {str(shape): orthogonal(rng, shape, dtype) for shape in SHAPES}
    run = Flat(optimizers.Muon, xp, start)
    for t in range(1, 41):
        run.step({k: rng.standard_normal(w.shape).astype(dtype) for k, w in start.items()}, lr, t)
    for name, p in run.parameters.items():
        assert p.data.dtype == dtype
        assert off_orthogonal(p.data) <= 4 * max(p.shape[-2:]) * np.finfo(dtype).eps
        assert abs(ag.to_cpu(p.data) - start[name]).max() > 2.5 * lr  # and they moved


def test_a_batch_of_muon_is_every_matrix_by_itself_under_its_name(rng):
    """Parameters of one shape are updated together, and heads within a parameter."""
    shapes = {"a": (6, 4), "b": (5, 5), "c": (3, 6, 4), "d": (5, 5)}
    start = {k: orthogonal(rng, shape, np.float64) for k, shape in shapes.items()}
    grads = {k: rng.standard_normal((3, *shape)) for k, shape in shapes.items()}
    together = Flat(optimizers.Muon, np, start)
    assert list(together.parameters) == ["a", "c", "b", "d"]  # sorted by shape
    for t in range(3):
        together.step({k: g[t] for k, g in grads.items()}, 0.05, t + 1)
    for k, shape in shapes.items():
        for i in np.ndindex(shape[:-2]):
            alone = Flat(optimizers.Muon, np, {k: start[k][i]})
            for t in range(3):
                alone.step({k: grads[k][(t, *i)]}, 0.05, t + 1)
            np.testing.assert_allclose(together[k][i], alone[k], atol=1e-13, rtol=0)
            state = (one.optimizer.state[f"{k}.m"] for one in (together, alone))
            np.testing.assert_allclose(next(state)[i], next(state), atol=1e-13, rtol=0)


def test_muon_is_nesterov_momentum_then_a_polar_step(rng):
    W, g = random_orthogonal(5, 5, rng, np.float64), rng.standard_normal((3, 5, 5))
    run, buffer = Flat(optimizers.Muon, np, {"w": W}, momentum=0.8), 0
    for t in range(3):
        run.step({"w": g[t]}, 0.1, t + 1)
        buffer = 0.8 * buffer + g[t]
        W = optimizers.retract(W - 0.1 * optimizers.orthogonalise(g[t] + 0.8 * buffer))
    np.testing.assert_allclose(run["w"], W, atol=1e-13, rtol=0)


@pytest.mark.parametrize("Optimizer", [optimizers.AdamW, optimizers.Muon])
def test_state_is_of_the_parameters_dtype_and_changes_in_place(Optimizer, xp, rng):
    run = Flat(Optimizer, xp, {"w": random_orthogonal(4, 4, rng)})
    state = dict(run.optimizer.state)
    run.step({"w": rng.standard_normal((4, 4)).astype(np.float32)}, 0.1, 1)
    assert state.keys() == run.optimizer.state.keys() and len(state) > 0
    for k, a in state.items():
        assert run.optimizer.state[k] is a and a.dtype == np.float32 and ag.to_cpu(a).any(), k
    assert run["w"].dtype == np.float32


def test_flattened_parameters_are_views_in_order(xp, rng):
    start = {"a": rng.standard_normal((2, 3)), "b": np.array(0.5), "c": rng.standard_normal(4)}
    parameters = tensors(xp, start)
    weights, grads = optimizers.flatten(parameters)
    wanted = np.concatenate([a.ravel() for a in start.values()])
    assert (ag.to_cpu(weights) == wanted).all() and not ag.to_cpu(grads).any()
    weights += 1
    for i, (k, p) in enumerate(parameters.items()):
        p.grad += i + 1
        assert p.shape == p.grad.shape == start[k].shape
        assert (ag.to_cpu(p.data) == start[k] + 1).all()
    assert ag.to_cpu(grads).tolist() == 6 * [1] + [2] + 4 * [3]


def test_muon_refuses_what_does_not_begin_orthogonal():
    W = np.random.default_rng(0).standard_normal((8, 8))
    with pytest.raises(ValueError, match="and W does not begin so"):
        optimizers.Muon(tensors(np, {"W": W}))


def test_parameters_of_two_dtypes_are_refused():
    with pytest.raises(ValueError, match="got none"):
        optimizers.AdamW({})
    with pytest.raises(ValueError, match="float32.*float64"):
        optimizers.flatten(tensors(np, {"a": np.ones(2, np.float32), "b": np.ones(2)}))


# ------------------------------------------------------------------------------------ clipping


CLIPPED = [([3, 4], 5, 2.5, [1.5, 2]), ([0, 0.3, 0, -0.4], 0.5, 1, [0, 0.3, 0, -0.4])]
CLIPPED += [([0, 0], 0, 1, [0, 0]), ([3, 4], 5, math.inf, [3, 4])]
CLIPPED += [([3e30, 4e30], 5e30, 1, [0.6, 0.8])]  # whose squares overflow,
CLIPPED += [([3e-30, 4e-30], 5e-30, 1, [3e-30, 4e-30])]  # or underflow


@pytest.mark.parametrize("values, norm, largest, clipped", CLIPPED)
def test_clipping_scales_all_gradients_together(xp, values, norm, largest, clipped):
    grads = xp.asarray(np.array(values, np.float32))
    assert float(optimizers.clip(grads, largest)) == pytest.approx(norm, rel=1e-6)
    assert grads.dtype == np.float32
    np.testing.assert_allclose(ag.to_cpu(grads), np.array(clipped, np.float32), rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [(3e38, 3e38), (math.inf, 1), (math.nan, 1), (-math.inf, 0)], ids=str
)
def test_gradients_whose_norm_is_not_finite_are_never_turned_to_zero(xp, values):
    grads = xp.asarray(np.array(values, np.float32))
    if xp is np:
        with pytest.raises(FloatingPointError, match="norm of the gradients"):
            optimizers.clip(grads, 1.0)
    else:
        with np.errstate(all="ignore"):
            optimizers.clip(grads, 1.0)
        assert np.isnan(ag.to_cpu(grads)).all()
