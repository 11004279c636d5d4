"""Initialisation, layer and network: what is orthogonal, what is absent, and the gradients."""

import math

import numpy as np
import pytest

import autograd as ag
import fast
import osa_minimal as osa
from autograd import Tensor

EPS = {np.float32: np.finfo(np.float32).eps, np.float64: np.finfo(np.float64).eps}
each_dtype = pytest.mark.parametrize("dtype", EPS, ids=["float32", "float64"])
LAYERS = [osa.MultiHeadOSA, fast.MultiHeadOSA]
each_layer = pytest.mark.parametrize("attention", LAYERS, ids=["paper", "fast"])

TINY = dict(d=6, heads=3, depth=2, patch=2, image=(6, 6), classes=3, mlp_ratio=2, eta=0.4)
SMALL = dict(d=12, heads=3, depth=3, patch=4, image=(16, 16), classes=5, mlp_ratio=2, eta=0.5)


def network(shape, xp=np, dtype=np.float32, seed=0, attention=osa.MultiHeadOSA):
    rng = np.random.default_rng(seed)
    return osa.SkiplessTransformer(**shape, rng=rng, xp=xp, dtype=dtype, attention=attention)


def images(rng, n, size, xp=np, dtype=np.float32):
    return xp.asarray(rng.standard_normal((n, size, size)).astype(dtype))


def fill(tensor, value):
    tensor.data[...] = value


# ------------------------------------------------------------------------------- initialisation


def test_random_orthogonal_is_haar_and_not_lapacks_signs(rng):
    """The diagonal of a Haar matrix takes both signs alike; that of LAPACK's Q does not."""
    signs = [np.sign(np.diag(osa.random_orthogonal(4, 4, rng))) for _ in range(200)]
    assert np.all(np.abs(np.mean(signs, axis=0)) < 5 / math.sqrt(200))  # five standard deviations


@pytest.mark.parametrize("d, heads", [(8, 2), (12, 3), (12, 12), (64, 4)])
@each_dtype
def test_initialisation_is_orthogonal_with_orthonormal_queries_and_keys(d, heads, dtype, rng):
    init = osa.init_mosa(d, heads, rng, alpha=0.2, dtype=dtype)
    d_v = d // heads
    assert {k: v.shape for k, v in init.items()} == {
        "W_QK": (heads, d, 2 * d_v),
        "W_V": (d, d),
        "W_O": (d, d),
        "alpha": (heads, 1, 1),
    }
    assert {v.dtype for v in init.values()} == {np.dtype(dtype)}
    W_QK, W_V, W_O = (init[k].astype(float) for k in ("W_QK", "W_V", "W_O"))
    atol = 4 * d * EPS[dtype]
    for W in W_QK:
        np.testing.assert_allclose(W.T @ W, np.eye(2 * d_v), rtol=0, atol=atol)
    for W in (W_V, W_O):
        np.testing.assert_allclose(W.T @ W, np.eye(d), rtol=0, atol=atol)
    assert np.all(init["alpha"] == dtype(0.2))
    assert abs(W_QK[0] - W_QK[1]).max() > 0.1 and abs(W_V - W_O).max() > 0.1  # drawn separately


@pytest.mark.parametrize("heads", [0, 3, 16, -2, 1])
def test_heads_must_divide_the_width_and_be_two_for_queries_orthonormal_to_keys(heads, rng):
    for refused in (osa.init_mosa, *LAYERS):
        with pytest.raises(ValueError, match="heads must divide the width and be at least 2"):
            refused(8, heads, rng)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.1, 1.0, -3.0, 30.0])
@pytest.mark.parametrize("N", [3, 11])
@each_dtype
@each_layer
def test_the_layer_keeps_the_norm_for_every_alpha_at_initialisation(
    attention, alpha, N, dtype, rng, xp
):
    layer = attention(12, 3, rng, xp, dtype)
    fill(layer.parameters["alpha"], alpha)
    X = rng.standard_normal((4, N, 12)).astype(dtype)
    out = ag.to_cpu(layer(Tensor(xp.asarray(X))).data)
    assert out.dtype == dtype and out.shape == X.shape
    before, after = (np.linalg.norm(a.astype(float), axis=(1, 2)) for a in (X, out))
    # Each factor (W_V, A, W_O) is orthogonal to c n eps.  A basis keeps that of A at any ‖S‖; the
    # gram route loses up to 30 eps before "auto" turns to QR, and the paper's squarings eps ‖S‖.
    Q, K, _ = np.split(ag.to_cpu(layer.project(Tensor(xp.asarray(X))).data), 3, axis=-1)
    growth = max(1, osa.rotation_angles(Q, K, alpha).max()) if attention is LAYERS[0] else 1
    np.testing.assert_allclose(after, before, rtol=10 * 12 * growth * EPS[dtype])
    assert alpha == 0 or abs(out - X).max() > 0.1  # and yet it is not the identity


@each_layer
def test_the_layer_is_heads_of_the_definition_side_by_side(attention, rng):
    d, h, d_v = 12, 3, 4
    layer = attention(d, h, rng, dtype=np.float64)
    fill(layer.parameters["alpha"], rng.uniform(-0.5, 0.5, (h, 1, 1)))
    p = {k: t.data for k, t in layer.parameters.items()}
    X = rng.standard_normal((2, 9, d))
    slow = np.zeros_like(X)
    for b in range(2):
        heads = []
        for i in range(h):
            Q, K = X[b] @ p["W_QK"][i, :, :d_v], X[b] @ p["W_QK"][i, :, d_v:]
            V = X[b] @ p["W_V"][:, i * d_v : (i + 1) * d_v]
            heads.append(osa.osa_dense(Q, K, V, p["alpha"][i]))
        slow[b] = np.concatenate(heads, axis=-1) @ p["W_O"]
    atol = 8 * d * EPS[np.float64] * 10  # ‖S‖ is below 10 here
    for index in ((), 0, None):  # any batch dimensions, or none
        np.testing.assert_allclose(layer(Tensor(X[index])).data, slow[index], rtol=0, atol=atol)
    for bad in (X[0, 0], X[..., 1:]):
        with pytest.raises(ValueError, match=r"needs .*, got \(.*\) and \(12, 36\)"):
            layer(Tensor(bad))


@pytest.mark.parametrize("size", [1e-8, 1, 1e8])
@pytest.mark.parametrize("target", [1e-3, 0.1, 10.0])
@each_dtype
def test_calibration_reaches_its_target_in_every_head(target, size, dtype, rng, xp):
    Q, K = (size * rng.standard_normal((2, 5, 3, 10, 4))).astype(dtype)
    K[:, 1] *= 7  # heads of different size
    alpha = osa.calibrate_alpha(xp.asarray(Q), xp.asarray(K), target)
    assert alpha.shape == (3, 1, 1) and alpha.dtype == dtype
    S = osa.skew_scores(Q.astype(float), K.astype(float), ag.to_cpu(alpha).astype(float))
    largest = np.linalg.norm(S, 2, axis=(-2, -1)).max(axis=0)
    np.testing.assert_allclose(largest, target, rtol=8 * 10 * EPS[dtype])


@pytest.mark.parametrize("size", [1e9, 1e15, 1e-15, 1e19])
def test_calibration_is_its_closed_form_at_any_size(size, xp):
    q, k = size * np.array([[1, 1, 1, 1], [1, -1, 1, -1]], np.float32)  # ‖qkᵀ − kqᵀ‖₂ = 4 size²
    alpha = osa.calibrate_alpha(*(xp.asarray(a.reshape(1, 1, 4, 1)) for a in (q, k)), 0.1)
    # Beyond 1e19 α has no more than these digits in float32.
    np.testing.assert_allclose(float(ag.to_cpu(alpha).item()), 0.1 / (4 * size**2), rtol=1e-5)


def test_calibration_sees_images_of_opposite_scales(rng):
    Q, K = rng.standard_normal((2, 4, 2, 9, 3)).astype(np.float32)
    scale = np.array([1e3, 1e-3, 1e-3, 1e-3], np.float32)[:, None, None, None]
    alpha = osa.calibrate_alpha(Q * scale, K / scale, 0.1)
    largest = osa.rotation_angles(Q, K, alpha)[..., 0].max(axis=0)
    np.testing.assert_allclose(largest, 0.1, rtol=1e-5)


@each_dtype
def test_calibration_without_scores_is_the_target_and_not_that_of_rounding(dtype, rng, xp):
    Q = rng.standard_normal((2, 3, 9, 4)).astype(dtype)
    K = Q.copy()
    Q[:, 1] = 0
    alpha = ag.to_cpu(osa.calibrate_alpha(xp.asarray(Q), xp.asarray(K), 0.1))
    assert alpha.ravel().tolist() == 3 * [dtype(0.1)]
    rows = rng.standard_normal((2, 1, 2, 1, 128)).astype(dtype)
    Q, K = rows.repeat(784, axis=-2)
    alpha = osa.calibrate_alpha(xp.asarray(Q), xp.asarray(K), 0.1)  # equal rows: q·k − k·q = 0
    assert ag.to_cpu(alpha).ravel().tolist() == 2 * [dtype(0.1)]


@each_dtype
def test_calibration_sees_the_scores_of_ordinary_tokens_beside_a_giant_one(dtype, rng, xp):
    Q, K = rng.standard_normal((2, 1, 2, 784, 16)).astype(dtype)
    Q[..., 0, :] *= 300
    K[..., 0, :] *= 300
    alpha = ag.to_cpu(osa.calibrate_alpha(xp.asarray(Q), xp.asarray(K), 0.1))
    np.testing.assert_allclose(osa.rotation_angles(Q, K, alpha)[..., 0], 0.1, rtol=1e-4)


def correlation_map(c, a, points=20_000):
    """C_a(c) by integration over the angle of a pair of correlated unit normals.

    (u, v) = r (cos t, cos(t − γ)) with cos γ = c, r² of mean 2 and t uniform; φ_a is positively
    homogeneous, so E φ_a(u) φ_a(v) = (1/π) ∫ φ_a(cos t) φ_a(cos(t − γ)) dt.
    """
    t = (np.arange(points) + 0.5) * (2 * math.pi / points)
    u, v = np.cos(t), np.cos(t - math.acos(c))
    phi_u, phi_v = (np.where(x > 0, x, a * x) for x in (u, v))
    return float(2 / (1 + a * a) * 2 * (phi_u * phi_v).mean())


def correlation(depth, a):
    c = 0.0
    for _ in range(depth):
        c = correlation_map(c, a)
    return c


@pytest.mark.parametrize(
    "depth, eta", [(1, 0.2), (6, 0.5), (6, 0.7), (16, 0.5), (64, 0.5), (1, None), (6, None)]
)
def test_the_tailored_slope_takes_correlation_zero_to_eta_over_the_depth(depth, eta):
    a = osa.tailored_slope(depth, eta)
    assert 0 < a < 1
    eta = eta or min(0.65, 0.96 * correlation(depth, 0.0))  # a little less than a ReLU reaches
    # The midpoint rule errs by (2π/points)² at each kink, and each layer adds its own error.
    assert abs(correlation(depth, a) - eta) < depth * (2 * math.pi / 20_000) ** 2


@pytest.mark.parametrize("depth, eta", [(2, 0.9), (12, 0.9), (6, 0.0), (6, -1), (6, math.nan)])
def test_an_eta_out_of_reach_is_refused_by_name(depth, eta):
    with pytest.raises(ValueError, match="eta"):
        osa.tailored_slope(depth, eta)


def test_the_mlp_has_semi_orthogonal_weights_and_keeps_the_variance(rng):
    mlp = osa.MLP(16, 2, 0.3, rng, dtype=np.float64)
    p = {k: t.data for k, t in mlp.parameters.items()}
    atol = 4 * 32 * EPS[np.float64]
    np.testing.assert_allclose(p["W_1"] @ p["W_1"].T, np.eye(16), rtol=0, atol=atol)
    np.testing.assert_allclose(p["W_2"].T @ p["W_2"], np.eye(16), rtol=0, atol=atol)
    X = rng.standard_normal((1, 4000, 16))
    H = X @ p["W_1"]
    phi = math.sqrt(2 / (1 + 0.3**2)) * math.sqrt(2) * np.where(H > 0, H, 0.3 * H)
    np.testing.assert_allclose(mlp(Tensor(X)).data, phi @ p["W_2"], rtol=0, atol=10 * atol)
    # E φ² = 1 for unit variance; 4,000 × 32 draws know their mean square to about 1 %.
    assert abs((phi**2).mean() - 1) < 0.03


# --------------------------------------------------------------- what the network does not have


def test_the_parameters_are_those_of_the_paper_and_no_others():
    model = network(SMALL)
    layer = {"W_QK", "W_V", "W_O", "alpha", "W_1", "b_1", "W_2", "b_2"}
    expected = {"W_E", "b_E", "W_C", "b_C"}
    expected |= {f"layers.{i}.{name}" for i in range(3) for name in layer}
    assert set(model.parameters) == expected
    assert len({id(t) for t in model.parameters.values()}) == len(expected)
    assert all(t.requires_grad and t._backward is None for t in model.parameters.values())
    assert [tuple(type(part) for part in parts) for parts in model.layers] == 3 * [
        (osa.MultiHeadOSA, osa.MLP)
    ]


@pytest.mark.parametrize("part", ["W_2", "W_1", "W_O", "W_V"])
def test_a_layer_with_a_zero_weight_gives_exactly_zero_so_that_no_skip_leads_around_it(part, rng):
    model = network(SMALL)
    attention, mlp = model.layers[1]
    fill((attention if part in attention.parameters else mlp).parameters[part], 0)
    X = Tensor(rng.standard_normal((2, 16, 12)).astype(np.float32))
    before, after = model.layers[0]
    assert abs(after(before(X)).data).max() > 0.1
    assert not mlp(attention(X)).data.any()
    # The network's answer is then the bias of the classifier, whatever the image.
    fill(model.outer["b_C"], np.arange(5))
    np.testing.assert_array_equal(model(images(rng, 2, 16)).data, [np.arange(5)] * 2)


def test_nothing_normalises_the_network_scales_with_the_image(rng):
    model = network(SMALL, dtype=np.float64)
    for name, t in model.parameters.items():
        if name == "b_E" or name.endswith("alpha"):
            fill(t, 0)
    x = images(rng, 2, 16, dtype=np.float64)
    small, large = model(x).data, model(50 * x).data
    assert abs(small).max() > 1e-3
    np.testing.assert_allclose(large, 50 * small, rtol=0, atol=50 * 1000 * EPS[np.float64])


@pytest.mark.parametrize("rows, columns, d", [(4, 4, 20), (6, 4, 8), (1, 5, 3), (28, 28, 32)])
def test_positions_are_low_modes_of_the_grid(rows, columns, d):
    b_E = osa.position_embedding(rows, columns, d, np.float64)
    N, k = len(b_E), min(rows * columns - 1, d)
    tol = (
        8 * N * d * EPS[np.float64]
    )  # of inner products of N terms, each column of square N d / 4 k
    assert abs(b_E.sum(axis=0)).max() < tol
    assert abs(b_E.T @ b_E - np.diag([N * d / 4 / k] * k + [0] * (d - k))).max() < tol
    # A mode is an eigenvector of the grid's Laplacian, which repeats the edge.
    grid = np.pad(b_E.reshape(rows, columns, d), ((1, 1), (1, 1), (0, 0)), "edge")
    x = grid[1:-1, 1:-1]
    bent = 4 * x - grid[:-2, 1:-1] - grid[2:, 1:-1] - grid[1:-1, :-2] - grid[1:-1, 2:]
    values = (bent * x).sum(axis=(0, 1))[:k] / (x * x).sum(axis=(0, 1))[:k]
    assert abs(bent[..., :k] - values * x[..., :k]).max() < tol
    lowest = np.add.outer(*(2 - 2 * np.cos(np.pi * np.arange(n) / n) for n in (rows, columns)))
    if rows == columns:
        assert abs(np.sort(values)[0] - np.sort(lowest.ravel())[1]) < tol


def test_a_grid_of_one_patch_has_no_position():
    assert not osa.position_embedding(1, 1, 4).any()


def test_tokens_meet_in_attention_only(rng):
    model = network(SMALL, dtype=np.float64)
    X = rng.standard_normal((1, 16, 12))
    Y = X.copy()
    Y[0, 5] += 1.0
    attention, mlp = model.layers[0]
    changed = abs(mlp(attention(Tensor(X))).data - mlp(attention(Tensor(Y))).data)
    assert (changed[0].max(axis=-1) > 1e-6).all()
    fill(attention.parameters["alpha"], 0)
    changed = abs(mlp(attention(Tensor(X))).data - mlp(attention(Tensor(Y))).data)
    assert (changed[0].max(axis=-1) > 1e-6).tolist() == [i == 5 for i in range(16)]


# ------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("channels", [(), (3,)])
def test_patchify_cuts_images_row_by_row(channels, rng, xp):
    x = rng.standard_normal((2, 6, 4, *channels))
    patches = ag.to_cpu(osa.patchify(xp.asarray(x), 2))
    assert patches.shape == (2, 6, 4 * math.prod(channels))
    for b in range(2):
        slow = [x[b, i : i + 2, j : j + 2].ravel() for i in (0, 2, 4) for j in (0, 2)]
        np.testing.assert_array_equal(patches[b], slow)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 2, 2), (2, 12, 3), (6, 6), (2, 6, 6, 3)], ids=str)
def test_images_of_another_size_are_refused_by_both_sizes(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(6, 6, 1\), got \("):
        network(TINY)(np.zeros(shape, np.float32))


def test_a_patch_that_does_not_divide_the_image_is_refused_by_name():
    for images in (np.ones((1, 6, 8)), np.ones((1, 8, 6)), np.ones((0, 8, 8))):
        with pytest.raises(ValueError, match="patch"):
            osa.patchify(images, 4)
    for patch in (0, -1):
        with pytest.raises(ValueError, match="patch"):
            osa.patchify(np.ones((1, 8, 8)), patch)
    with pytest.raises(ValueError, match="patch"):
        network(SMALL | {"patch": 5})


def test_the_network_is_its_formula(rng):
    model = network(SMALL, dtype=np.float64)
    fill(model.outer["b_C"], rng.standard_normal(5))
    x = images(rng, 3, 16, dtype=np.float64)
    p = {k: t.data for k, t in model.parameters.items()}
    X = osa.patchify(x, 4) @ p["W_E"] + p["b_E"]
    np.testing.assert_array_equal(model.embed(x).data, X)
    for attention, mlp in model.layers:
        X = mlp(attention(Tensor(X))).data
    expected = X.mean(axis=1) @ p["W_C"] + p["b_C"]
    np.testing.assert_allclose(model(x).data, expected, rtol=0, atol=1000 * EPS[np.float64])


@pytest.mark.parametrize("shape", [TINY, SMALL], ids=["N > 2 d_v", "N = 16"])
@each_layer
def test_every_parameter_activation_and_gradient_stays_float32(attention, shape, rng, xp):
    model = network(shape, xp, attention=attention)
    assert {t.dtype for t in model.parameters.values()} == {np.dtype(np.float32)}
    logits = model(images(rng, 4, shape["image"][0], xp))
    loss = ag.cross_entropy(logits, xp.asarray(np.arange(4) % shape["classes"]))
    nodes = ag.topological_order(loss)
    assert len(nodes) > 20 * shape["depth"]
    assert {t.dtype for t in nodes} == {np.dtype(np.float32)}
    loss.backward()
    for name, t in model.parameters.items():
        assert t.grad is not None and t.grad.dtype == np.float32, name
        assert t.grad.shape == t.shape and bool(abs(t.grad).max() > 0), name


def set_parameters(model, tensors):
    """Puts `tensors`, in the order of `model.parameters`, in place of the parameters."""
    remaining = iter(tensors)
    for owner in (model.outer, *(part.parameters for layer in model.layers for part in layer)):
        for name in owner:
            owner[name] = next(remaining)


@pytest.mark.parametrize("image", [4, 6], ids=["N <= 2 d_v", "N > 2 d_v"])
@each_layer
def test_gradients_of_all_parameters_of_the_network_agree_with_central_differences(
    attention, image, rng, xp
):
    model = network(TINY | {"image": (image, image)}, xp, np.float64, attention=attention)
    x = images(rng, 2, image, xp, np.float64)
    labels = xp.asarray(np.array([2, 0]))
    arrays = [t.data for t in model.parameters.values()]
    for a in arrays:  # no parameter at a special value, as the biases at 0 are
        a += 0.05 * xp.asarray(rng.standard_normal(a.shape))

    def logits(*tensors):
        set_parameters(model, tensors)
        return model(x)

    def loss(*tensors):
        return ag.cross_entropy(logits(*tensors), labels)

    # 4e-11 times the third derivatives of a network of two layers in about 300 parameters; a kink
    # of the leaky ReLU within the step would show as 1e-5 or more, and there is none for this seed.
    assert ag.gradient_check(logits, *arrays, directions=1) < 1e-8
    assert ag.gradient_check(loss, *arrays, directions=1) < 1e-8
