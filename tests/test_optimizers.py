"""optimizers.py: AdamW against a scalar loop, Muon's orthogonality, schedule, clipping."""

import math

import numpy as np
import optimizers
import pytest

import autograd as ag
from osa_minimal import random_orthogonal

SHAPES = [(6, 6), (4, 9), (9, 4), (3, 8, 4), (5, 1)]


def tensors(xp, arrays):
    """{name: parameter} with zero gradients, copies of the arrays on the module `xp`."""
    out = {k: ag.Tensor(xp.asarray(a.copy()), requires_grad=True) for k, a in arrays.items()}
    for p in out.values():
        p.grad = xp.zeros_like(p.data)
    return out


def off_orthogonal(W):
    """max |WᵀW − I| over the shorter side of W (..., n, m), in float64."""
    W = ag.to_cpu(W).astype(np.float64)
    gram = W.swapaxes(-1, -2) @ W if W.shape[-2] >= W.shape[-1] else W @ W.swapaxes(-1, -2)
    return abs(gram - np.eye(gram.shape[-1])).max()


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
    parameters = tensors(xp, start)
    grads = {k: rng.standard_normal((5, *w.shape)) for k, w in start.items()}
    grads["b"][:, 0] = 0  # a weight without a gradient
    rates = [0.1, 0.2, 0.05, 0.0, 0.3]
    optimizer = optimizers.AdamW(parameters, betas=(0.8, 0.9), eps=1e-6, weight_decay=decay)
    for t, lr in enumerate(rates, start=1):
        for k, p in parameters.items():
            p.grad = xp.asarray(grads[k][t - 1])
        optimizer.step(lr, t)
    for k, w in start.items():
        got = ag.to_cpu(parameters[k].data)
        for i in np.ndindex(w.shape):
            wanted = adamw_by_hand(w[i], grads[k][(slice(None), *i)], rates, 0.8, 0.9, 1e-6, decay)
            assert got[i] == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_the_first_adamw_step_is_the_sign_of_the_gradient_times_the_rate(xp):
    parameters = tensors(xp, {"w": np.array([1.0, -2.0, 3.0])})
    parameters["w"].grad = xp.asarray(np.array([1e-3, -50.0, 0.2]))
    optimizers.AdamW(parameters).step(0.01, 1)
    np.testing.assert_allclose(ag.to_cpu(parameters["w"].data), [0.99, -1.99, 2.99], rtol=1e-5)


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


def test_orthogonalise_of_zero_is_zero(xp):
    U = ag.to_cpu(optimizers.orthogonalise(xp.asarray(np.zeros((3, 5), np.float32))))
    assert (U == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retract_is_the_nearest_orthogonal_matrix_for_small_departures(xp, rng, shape):
    W = conditioned(rng, shape, 1.0) + 0.003 * rng.standard_normal(shape)
    U, _, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(
        ag.to_cpu(optimizers.retract(xp.asarray(W))), U @ Vt, atol=1e-7, rtol=0
    )


def muon_run(xp, rng, dtype, lr=0.01, steps=40, **kw):
    """Parameters after `steps` of Muon on random gradients from orthogonal weights."""
    start = {}
    for shape in SHAPES:
        matrices = [
            random_orthogonal(*shape[-2:], rng, dtype) for _ in range(math.prod(shape[:-2]))
        ]
        start[str(shape)] = np.stack(matrices).reshape(shape)
    parameters = tensors(xp, start)
    optimizer = optimizers.Muon(parameters, **kw)
    for t in range(1, steps + 1):
        for p in parameters.values():
            p.grad = xp.asarray(rng.standard_normal(p.shape).astype(dtype))
        optimizer.step(lr, t)
    return start, parameters


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_muon_keeps_every_weight_orthogonal_to_rounding(xp, rng, dtype):
    """The last retraction leaves 0.75 e² of an error e = O(lr²): below eps for lr = 1e-4.

    What remains is rounding: n products per entry of WᵀW, a few eps each.
    """
    _, parameters = muon_run(xp, rng, dtype, lr=1e-4)
    for p in parameters.values():
        assert p.data.dtype == dtype
        n = max(p.shape[-2:])
        assert off_orthogonal(p.data) <= 4 * n * np.finfo(dtype).eps


def test_muon_keeps_float32_weights_orthogonal_at_a_rate_used_in_training(xp, rng):
    start, parameters = muon_run(xp, rng, np.float32, lr=0.02)
    for name, p in parameters.items():
        assert off_orthogonal(p.data) <= 4 * max(p.shape[-2:]) * np.finfo(np.float32).eps
        assert abs(ag.to_cpu(p.data) - start[name]).max() > 0.05  # and they moved


def test_muon_without_retraction_drifts_away(xp, rng):
    """The check above can fail."""
    _, parameters = muon_run(xp, rng, np.float32, lr=0.02, retraction=False)
    assert max(off_orthogonal(p.data) for p in parameters.values()) > 0.01


def test_a_batch_of_muon_is_every_matrix_by_itself(rng):
    """Parameters of one shape are updated together, and heads within a parameter."""
    start = {k: random_orthogonal(6, 4, rng, np.float64) for k in "abc"}
    grads = {k: rng.standard_normal((3, 6, 4)) for k in "abc"}
    stacked = {"ab": np.stack([start["a"], start["b"]]), "c": start["c"]}
    together, alone = tensors(np, stacked), tensors(np, start)
    one = optimizers.Muon(together)
    each = [optimizers.Muon({k: alone[k]}) for k in "abc"]
    for t in range(3):
        together["ab"].grad = np.stack([grads["a"][t], grads["b"][t]])
        together["c"].grad = grads["c"][t]
        for k in "abc":
            alone[k].grad = grads[k][t]
        for optimizer in (one, *each):
            optimizer.step(0.05, t + 1)
    got = [*together["ab"].data, together["c"].data]
    for a, k in zip(got, "abc"):
        np.testing.assert_allclose(a, alone[k].data, atol=1e-13, rtol=0)


def test_muon_is_nesterov_momentum_then_a_polar_step(rng):
    W, g = random_orthogonal(5, 5, rng, np.float64), rng.standard_normal((3, 5, 5))
    parameters, buffer = tensors(np, {"w": W}), 0
    optimizer = optimizers.Muon(parameters, momentum=0.8)
    for t in range(3):
        parameters["w"].grad = g[t]
        optimizer.step(0.1, t + 1)
        buffer = 0.8 * buffer + g[t]
        W = optimizers.retract(W - 0.1 * optimizers.orthogonalise(g[t] + 0.8 * buffer))
    np.testing.assert_allclose(parameters["w"].data, W, atol=1e-13, rtol=0)


@pytest.mark.parametrize("Optimizer", [optimizers.AdamW, optimizers.Muon])
def test_state_is_of_the_parameters_dtype_and_changes_in_place(Optimizer, xp, rng):
    parameters = tensors(xp, {"w": rng.standard_normal((4, 4)).astype(np.float32)})
    optimizer = Optimizer(parameters)
    state = dict(optimizer.state)
    parameters["w"].grad = xp.asarray(rng.standard_normal((4, 4)).astype(np.float32))
    optimizer.step(0.1, 1)
    assert state.keys() == optimizer.state.keys() and len(state) > 0
    for k, a in state.items():
        assert optimizer.state[k] is a and a.dtype == np.float32 and ag.to_cpu(a).any(), k
    assert parameters["w"].data.dtype == np.float32


# ---------------------------------------------------------------------- schedule and clipping


def test_the_schedule_warms_up_linearly_and_ends_at_zero():
    rate = [optimizers.schedule(step, steps=100, warmup=10) for step in range(101)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10)
    assert rate[9] == rate[10] == 1
    assert rate[55] == pytest.approx(0.5)  # the middle of the cosine
    assert rate[100] == pytest.approx(0, abs=1e-15) and 0 < rate[99] < 1e-3
    assert all(a > b for a, b in zip(rate[10:], rate[11:]))


def test_the_schedule_without_warmup_starts_at_1():
    assert optimizers.schedule(0, steps=5, warmup=0) == 1
    assert optimizers.schedule(0, steps=1, warmup=0) == 1  # a run of one step makes that step


def test_clipping_scales_all_gradients_together(xp, rng):
    grads = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)}
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    parameters = tensors(xp, grads)
    for k, p in parameters.items():
        p.grad = xp.asarray(grads[k].astype(np.float32))
    assert float(optimizers.clip_gradients(parameters, norm / 4)) == pytest.approx(norm, rel=1e-6)
    for k, p in parameters.items():
        assert p.grad.dtype == np.float32
        np.testing.assert_allclose(ag.to_cpu(p.grad), grads[k] / 4, rtol=1e-5)
    assert float(optimizers.gradient_norm(parameters)) == pytest.approx(norm / 4, rel=1e-6)


def test_small_and_zero_gradients_are_not_changed_by_clipping(xp):
    parameters = tensors(xp, {"a": np.zeros((2, 2)), "b": np.zeros(3)})
    assert float(optimizers.clip_gradients(parameters, 1.0)) == 0
    parameters["b"].grad = xp.asarray(np.array([0.3, 0.0, -0.4]))
    before = ag.to_cpu(parameters["b"].grad).copy()
    assert float(optimizers.clip_gradients(parameters, 1.0)) == pytest.approx(0.5)
    assert (ag.to_cpu(parameters["b"].grad) == before).all()
    assert (ag.to_cpu(parameters["a"].grad) == 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_gradients_whose_norm_is_not_finite_are_never_turned_to_zero(xp, value):
    parameters = tensors(xp, {"a": np.ones(2, np.float32)})
    parameters["a"].grad = xp.asarray(np.array([value, 1], np.float32))  # 1e30² overflows
    if xp is np:
        with pytest.raises(FloatingPointError, match="norm of the gradients"):
            optimizers.clip_gradients(parameters, 1.0)
    else:
        with np.errstate(all="ignore"):
            optimizers.clip_gradients(parameters, 1.0)
        assert np.isnan(ag.to_cpu(parameters["a"].grad)).all()


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 0)])
def test_muon_takes_matrices_only(shape):
    with pytest.raises(ValueError, match="Muon takes matrices .* b has shape"):
        optimizers.Muon(tensors(np, {"b": np.ones(shape)}))


@pytest.mark.parametrize("kind", [optimizers.AdamW, optimizers.Muon])
def test_a_step_0_and_gradients_of_another_shape_are_refused_by_name(xp, kind):
    parameters = tensors(xp, {"W": np.eye(3)})
    before = ag.to_cpu(parameters["W"].data).copy()
    optimizer = kind(parameters)
    parameters["W"].grad = xp.asarray(np.ones((3, 3)))
    for t in (0, -1, math.nan):
        with pytest.raises(ValueError, match="t counts the updates from 1"):
            optimizer.step(0.1, t)
    for bad in (None, xp.asarray(np.ones(3)), xp.asarray(np.ones((1, 3)))):
        parameters["W"].grad = bad
        with pytest.raises(ValueError, match="the gradient of W has shape"):
            optimizer.step(0.1, 1)
    assert (ag.to_cpu(parameters["W"].data) == before).all()
    assert all((ag.to_cpu(a) == 0).all() for a in optimizer.state.values())
