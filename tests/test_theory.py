"""The theorem on the Jacobian at initialisation, held against full Jacobians."""

import math

import numpy as np
import pytest

import osa_minimal as osa
from autograd import Tensor
from training import data

N, d = 16, 32


def tokens(kind, rng):
    """X (N, d), float64, of variance about 1."""
    if kind == "gaussian":
        return rng.standard_normal((N, d))
    if kind == "correlated":  # a component that all tokens share, three times the rest
        return rng.standard_normal((N, d)) + 3 * rng.standard_normal(d)
    if kind == "nearly equal":
        return 0.1 * rng.standard_normal((N, d)) + rng.standard_normal(d)
    images = data.load().x_train[:1].astype(np.float64)
    images = (images - images.mean()) / images.std()
    return osa.patchify(images, 7)[0] @ osa.random_orthogonal(49, d, rng, np.float64)


def jacobian(f, X):
    """∂f/∂X (N d, N d) by reverse mode: one row for each entry of the output."""
    n = X.size
    copies = Tensor(np.repeat(X[None], n, axis=0), requires_grad=True)
    f(copies).backward(np.eye(n).reshape(n, *X.shape))
    return copies.grad.reshape(n, n)


def layer(kind, heads, s_norm, seed=0):
    """A layer of `heads` heads whose largest ‖S‖₂ on X is s_norm in every head, and X."""
    rng = np.random.default_rng(seed)
    X = tokens(kind, rng)
    attention = osa.MultiHeadOSA(d, heads, rng, dtype=np.float64)
    QKV = attention.project(Tensor(X[None])).data
    d_v = d // heads
    Q, K = QKV[..., :d_v], QKV[..., d_v : 2 * d_v]
    attention.parameters["alpha"].data = osa.calibrate_alpha(Q, K, s_norm)
    return attention, X


def bound(attention, X):
    return osa.jacobian_bound(X, *(attention.parameters[k].data for k in ("W_QK", "W_V", "alpha")))


@pytest.mark.parametrize("kind", ["gaussian", "correlated", "nearly equal", "MNIST"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("s_norm", [0.01, 0.3])
def test_singular_values_of_the_jacobian_are_within_the_bound_and_a_fifth_of_it_is_reached(
    kind, heads, s_norm
):
    attention, X = layer(kind, heads, s_norm)
    sigma = np.linalg.svd(jacobian(attention, X), compute_uv=False)
    deviation = max(sigma[0] - 1, 1 - sigma[-1])
    epsilon = bound(attention, X)
    # A relative margin for rounding: both come from float64 sums of N d terms.
    assert deviation <= epsilon * (1 + 100 * N * d * np.finfo(float).eps)
    assert epsilon <= 5 * deviation


@pytest.mark.parametrize("patch", [14, 7, 4, 2, 1])
def test_epsilon_at_the_start_is_below_35_times_the_norm_of_S_for_4_to_784_tokens(patch):
    """At ‖S‖₂ = 0.1, the largest of eight images, in four layers of three networks."""
    images = data.load().x_train[:8].astype(np.float64)
    images, epsilon = (images - images.mean()) / images.std(), []
    for seed in range(3):
        model = osa.SkiplessTransformer(
            d=64, heads=2, depth=4, patch=patch, image=(28, 28), classes=10, mlp_ratio=4, eta=None,
            rng=np.random.default_rng(seed), dtype=np.float64,
        )  # fmt: skip
        osa.calibrate(model, images, 0.1)
        tokens = model.embed(images)
        for attention, mlp in model.layers:
            epsilon.append(max(bound(attention, X) for X in tokens.data))
            tokens = mlp(attention(tokens))
    assert max(epsilon[::4]) < 15 * 0.1 and max(epsilon) < 35 * 0.1  # the first layers; all


def test_the_bound_holds_for_few_tokens_which_need_both_of_its_first_terms():
    """Among these layers some deviate by 1.3 times what either term and the third would allow."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        X, attention = rng.standard_normal((4, 8)), osa.MultiHeadOSA(8, 2, rng, dtype=np.float64)
        attention.parameters["alpha"].data[...] = 1e-3
        sigma = np.linalg.svd(jacobian(attention, X), compute_uv=False)
        assert max(sigma[0] - 1, 1 - sigma[-1]) <= bound(attention, X) * (1 + 1e-9)


@pytest.mark.parametrize("ratio, bounded", [(1, True), (4, False)])
def test_an_mlp_of_ratio_1_is_within_the_slopes_and_a_wider_one_is_not(ratio, bounded):
    """σ of φ(X W_1) W_2 with square orthogonal weights lie in gain · [a, 1]: W_1 D W_2, D diagonal.

    W_1 W_2 of a wider MLP is a corner of a larger orthogonal matrix, with singular values near 0.
    """
    rng = np.random.default_rng(2)
    slope = osa.tailored_slope(16, 0.5)
    mlp = osa.MLP(d, ratio, slope, rng, dtype=np.float64)
    J = jacobian(mlp, rng.standard_normal((4, d)))
    sigma = np.linalg.svd(J, compute_uv=False) / math.sqrt(2 / (1 + slope**2))
    rounding = 100 * d * np.finfo(float).eps
    within = slope * (1 - rounding) <= sigma.min() and sigma.max() <= 1 + rounding
    assert within == bounded
    if not bounded:
        assert sigma.min() < slope / 4


def test_a_network_of_ratio_1_is_within_the_product_of_its_layers_bounds():
    """L layers: σ in Π gain·a·(1 − ε_l) … Π gain·(1 + ε_l)."""
    rng = np.random.default_rng(3)
    depth, slope = 4, osa.tailored_slope(4, 0.5)
    gain, low, high = math.sqrt(2 / (1 + slope**2)), 1.0, 1.0
    X = tokens("gaussian", rng)
    Y, layers = X, []
    for seed in range(depth):
        attention, _ = layer("gaussian", 4, 0.02, seed)
        mlp = osa.MLP(d, 1, slope, rng, dtype=np.float64)
        epsilon = bound(attention, Y)
        low, high = low * gain * slope * (1 - epsilon), high * gain * (1 + epsilon)
        layers.append((attention, mlp))
        Y = mlp(attention(Tensor(Y[None]))).data[0]

    def network(X):
        for attention, mlp in layers:
            X = mlp(attention(X))
        return X

    sigma = np.linalg.svd(jacobian(network, X), compute_uv=False)
    assert 0 < low <= sigma[-1] and sigma[0] <= high
