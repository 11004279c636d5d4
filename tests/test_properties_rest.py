"""relatives/, training/ and the bases of fast/, on inputs that nobody would think of.

The promise of test_properties_autograd.py: the formula in float64, or an error that says why not.
"""

import math
import types

import numpy as np
import pytest
from test_properties import LAYOUTS, SHAPES, laid_out
from test_properties_autograd import (
    assert_close,
    assert_held,
    attempt,
    batches,
    dtypes,
    fits,
    numbers,
    seeds,
    sizes,
    with_gradients,
)

import osa_minimal as osa
from autograd import Tensor
from fast import basis
from relatives.softmax import softmax_attention
from relatives.transformer import layer_norm
from training import data, optimizers
from training.options import UserError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

lengths = st.integers(1, 5)


@given(seeds, batches, lengths, lengths, dtypes)
def test_softmax_attention_and_its_gradient_are_the_formula(rng, batch, N, d, dtype):
    Q, K, V, dO = numbers(rng, dtype, *[(*batch, N, d)] * 4, odd=())
    QKV = laid_out(np.concatenate([Q, K, V], axis=-1), rng.choice(LAYOUTS))
    result = attempt(with_gradients(softmax_attention), dO, QKV)
    if not QKV.size:
        assert isinstance(result, ValueError) or not result[0].size
        return
    Q, K, V, dO = (a.astype(float) for a in (Q, K, V, dO))
    scores = Q @ K.mT / math.sqrt(d)
    A = np.exp(scores - scores.max(axis=-1, keepdims=True))
    A /= A.sum(axis=-1, keepdims=True)
    dA = dO @ V.mT
    dS = A * (dA - (dA * A).sum(axis=-1, keepdims=True)) / math.sqrt(d)
    wanted = A @ V, np.concatenate([dS @ K, dS.mT @ Q, A.mT @ dO], axis=-1)
    # A is right to `wrong`, since a score is right to that; on the way are these basis.
    wrong = max(1.0, (abs(Q) @ abs(K).mT).max())
    flow, over_tokens = (abs(dO) @ abs(V).mT).max(), lambda a: abs(a).max() * N
    parts = [flow * over_tokens(K), flow * over_tokens(Q), over_tokens(dO)]
    terms = over_tokens(V), np.repeat(parts, d)
    if isinstance(result, Exception) or 16 * (N + d) * float(np.finfo(dtype).eps) * wrong < 0.1:
        count, lost = 16 * (N + d) * wrong, [over_tokens(a) for a in (Q, K, V, dO)]
        assert_held(result, wanted, terms, dtype, count, lost, (wrong, flow))
    else:
        assert abs(result[0]).max() <= terms[0]  # a mean of values nevertheless


@given(seeds, batches, lengths, dtypes)
def test_layer_norm_and_its_gradients_are_the_formula(rng, batch, d, dtype):
    X, gain, bias, dY = numbers(rng, dtype, (*batch, d), (d,), (d,), (*batch, d), odd=())
    result = attempt(with_gradients(layer_norm), dY, X, gain, bias)
    if not X.size:
        assert isinstance(result, ValueError)
        return
    x, a, b, g = (t.astype(float) for t in (X, gain, bias, dY))
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    hat, D, over = centred * scale, g * a, tuple(range(len(batch)))
    dX = D - D.mean(axis=-1, keepdims=True) - hat * (D * hat).mean(axis=-1, keepdims=True)
    wanted = hat * a + b, scale * dX, (g * hat).sum(axis=over), g.sum(axis=over)
    # The mean is subtracted from entries that are larger than their differences by `wrong`.
    wrong = max(1.0, (abs(x).max(axis=-1, keepdims=True) * scale).max(initial=0))
    most = [abs(t).max(initial=0) for t in (a, b, g, scale)]
    terms = most[0] + most[1], most[3] * most[0] * most[2], abs(g).sum(), abs(g).sum()
    count = 16 * (d + 4 + math.prod(batch)) * d * wrong
    if isinstance(result, Exception) or count * float(np.finfo(dtype).eps) < 0.1:
        steps = (x**2 * d, D * d, *most)
        assert_held(result, wanted, terms, dtype, count, (most[2], most[3]), steps)


@given(st.integers(0, 40), st.integers(0, 30), st.integers(0, 30))
def test_the_schedule_is_a_ramp_and_half_a_cosine(t, steps, warmup):
    warmup_made = min(warmup, steps // 2)
    part = min(1.0, (t - warmup_made) / max(1, steps - warmup_made))
    ramp = t < warmup_made
    want = (t + 1) / warmup_made if ramp else (1 + math.cos(math.pi * part)) / 2
    assert 0 <= optimizers.schedule(t, steps, warmup) <= 1
    assert math.isclose(optimizers.schedule(t, steps, warmup), want, rel_tol=1e-15)


@given(seeds, batches, dtypes, st.sampled_from([0, 1e-3, 1, -1, math.nan]))
def test_clipping_gives_a_norm_of_at_most_that_or_refuses(rng, shape, dtype, largest):
    (g,) = numbers(rng, dtype, (math.prod(shape),))
    clipped = g.copy()
    norm = attempt(lambda _: optimizers.clip(clipped, largest), g)
    want = np.linalg.norm(g.astype(np.longdouble))
    if isinstance(norm, Exception):
        assert not largest >= 0 or not fits(dtype, want) or not g.size
        return
    assert largest >= 0 and clipped.dtype == dtype
    n, limits = g.size, np.finfo(dtype)
    # Squares of what is 1e-23 of the largest may underflow; the norm itself may.
    slack = (n + 1) * float(limits.smallest_subnormal)
    assert abs(norm - want) <= (n + 4) * float(limits.eps) * want + slack
    scaled = g.astype(float) * min(1, largest / (float(want) + 1e-12))
    assert_close(clipped, scaled, (n + 8) * float(limits.eps) * abs(scaled) + slack)


def flat_step(kind, arrays, grads, lr, t, state=None, **kw):
    """The parameters after one step, whose weights lie in one array."""
    parameters = {str(i): Tensor(a, requires_grad=True) for i, a in enumerate(arrays)}
    optimizer = kind(parameters, **kw)
    weights, flat = optimizers.flatten(optimizer.parameters)
    for k, p in parameters.items():
        p.grad[...] = grads[int(k)]
    for k, a in (state or {}).items():
        optimizer.state[k][...] = a
    optimizer.step(weights, flat, lr, t)
    return parameters


@given(seeds, batches, dtypes, st.integers(1, 9), st.sampled_from([0.0, 0.1]))
def test_an_adamw_step_is_the_formula(rng, shape, dtype, t, decay):
    w, g, m, v = numbers(rng, dtype, *[shape] * 4, odd=())
    v, state = abs(v), {"0.mean": m, "0.rms": abs(v)}
    result = attempt(
        lambda w, g: flat_step(optimizers.AdamW, [w], [g], 0.1, t, state, weight_decay=decay), w, g
    )
    W, G, M, R = (a.astype(float) for a in (w, g, m, v))
    M, R = 0.9 * M + 0.1 * G, np.hypot(math.sqrt(0.95) * R, math.sqrt(0.05) * G)
    root = R / math.sqrt(1 - 0.95**t) + 1e-8
    want = W - 0.1 * (M / (1 - 0.9**t) / root + decay * W)
    terms = abs(W) + (abs(m.astype(float)) + abs(G)) / (1 - 0.9**t) / root
    got = result if isinstance(result, Exception) else [result["0"].data]
    assert_held(got, [want], [terms], dtype, 64, 1 / root, (10 * M, 5 * R, terms))


def polar_by_hand(M):
    X = M / (np.sqrt((M**2).sum(axis=(-2, -1), keepdims=True)) + 1e-12)
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * X @ X.mT @ X + 2.0315 * X @ X.mT @ X @ X.mT @ X
    return X


@given(seeds, st.lists(batches, min_size=1, max_size=3), sizes, sizes, dtypes)
def test_a_muon_step_is_the_formula_and_ends_orthogonal(rng, shapes, n, m, dtype):
    shapes = [(*batch, n, m) for batch in shapes]
    grads = numbers(rng, dtype, *shapes, odd=())
    starts = [np.zeros(shape) for shape in shapes]
    for W in starts:
        for i in np.ndindex(W.shape[:-2] if W.size else (0,)):
            W[i] = osa.random_orthogonal(n, m, rng, np.float64)
    weights = [W.astype(dtype) for W in starts]
    result = attempt(lambda *g: flat_step(optimizers.Muon, weights, g, 0.01, 1), *grads)
    if not all(g.size for g in grads):
        return
    if isinstance(result, Exception):
        assert not fits(dtype, *(g.astype(float) ** 2 for g in grads)), result
        return
    eps = float(np.finfo(dtype).eps)
    for p, W, g in zip(result.values(), starts, grads):
        assert p.data.dtype == dtype and p.data.shape == W.shape
        got, orthogonal = p.data.astype(float), min(n, m) * eps
        gram = got.mT @ got if n >= m else got @ got.mT
        # ‖WᵀW − I‖ = e ≤ 2 lr ‖update‖ + …, 0.027 as ‖update‖ ≤ 1.3, is ¾ e² after a retraction.
        assert abs(gram - np.eye(min(n, m))).max() <= 8 * orthogonal + 2.5e-7
        if np.sqrt((g.astype(float) ** 2).sum(axis=(-2, -1))).min() > 1e-15:  # squares are there
            W = W - 0.01 * polar_by_hand(1.95 * g.astype(float))
            for _ in range(2):
                W = 1.5 * W - 0.5 * W @ W.mT @ W
            # Five quintic steps multiply a small error by up to 3.4445⁵ = 485.
            assert abs(got - W).max() <= 0.01 * 485 * 8 * orthogonal + 16 * orthogonal


SPECIAL = st.sampled_from(["", "rank one", "zeros", "twins", "near twins"])


@given(seeds, batches, lengths, sizes, dtypes, SPECIAL)
def test_the_cholesky_basis_spans_its_matrix(rng, batch, r, more, dtype, special):
    (P,) = numbers(rng, dtype, (*batch, r + more, r), odd=())
    P = P * 10.0 ** rng.integers(-3, 4, r).astype(dtype)  # columns of their own scales
    if special == "rank one":
        P = P[..., :1] * np.ones(r, dtype)
    elif special == "zeros":
        P[..., rng.integers(r) :] = 0
    elif special == "twins":
        P[..., -1] = P[..., 0]
    elif special == "near twins":
        apart = dtype(10.0 ** rng.uniform(-16, 0)) * rng.standard_normal(P.shape[:-1], dtype)
        P[..., -1] = P[..., 0] * (1 + apart)
    P = P[..., rng.permutation(r)]
    P = laid_out(P, rng.choice(LAYOUTS))
    eps, wide = float(np.finfo(dtype).eps), P.astype(float)
    norms = np.sqrt((wide**2).sum(axis=-2, keepdims=True))
    unit = wide / np.where(norms > 0, norms, 1)
    # At most 54 eps in 12,000 tries with up to 40 columns, 2 in the median; in float64 below 1.
    bases = [(basis.cholesky_basis, 100)]
    bases += [(basis.double_basis, 4)] if dtype is np.float32 else []
    for find, tolerance in bases:
        B, R = attempt(find, P)
        assert B.dtype == dtype and B.shape == P.shape
        B = B.astype(float)
        assert np.linalg.norm(B, 2, axis=(-2, -1)).max(initial=0) <= 1 + 1e-5
        assert abs(B @ (B.mT @ unit) - unit).max(initial=0) <= tolerance * eps
        assert_close(R, B.mT @ wide, 8 * (r + more) * eps * norms)


@given(seeds, lengths, lengths, st.integers(0, 3))
def test_images_are_scaled_padded_and_cut_as_the_formulas_say(rng, n, H, width):
    W, colours = rng.integers(1, 5), [(), (3,)][rng.integers(2)]
    x = rng.integers(0, rng.choice([2, 256]), (n, H, W, *colours), dtype=np.uint8)
    x = x[:, :: rng.choice([-1, 1])]
    if rng.integers(2):
        x, (H, W) = x.swapaxes(1, 2), (W, H)
    found = attempt(data.statistics, x)
    if isinstance(found, Exception):
        assert (x == x.flat[0]).all()
    else:
        assert_close(np.array(found), np.array([(x / 255).mean(), (x / 255).std()]), 1e-14)
    mean, std = rng.standard_normal(), 10.0 ** rng.integers(-30, 31)
    scaled = attempt(lambda x: data.standardise(x, mean, std), x)
    assert scaled.dtype == np.float32
    assert_close(
        scaled, (x / 255 - mean) / std, 8 * float(np.finfo(np.float32).eps) * (1 + abs(mean)) / std
    )
    width = min(width, H - 1, W - 1)  # all of an image cannot be moved away
    about = types.SimpleNamespace(shift=width, seed=0, batch_size=n)
    batches = data.Batches(x, np.arange(n), about)
    chosen, offsets = batches.choose(int(rng.integers(3)))
    cut, labels = batches.images(chosen, offsets)
    assert cut.dtype == np.uint8 and cut.shape == x.shape and (labels == chosen).all()
    for image, i, (row, column) in zip(cut, chosen, offsets - width):
        for r, c in np.ndindex(H, W):
            inside = 0 <= r + row < H and 0 <= c + column < W
            assert (image[r, c] == (x[i, r + row, c + column] if inside else 0)).all()


@given(seeds, lengths, st.integers(0, 7))
def test_a_split_shares_out_each_image_at_most_once(rng, n, limit):
    x, y = np.arange(n, dtype=np.uint8)[:, None, None], np.arange(n, dtype=np.uint8)
    held_out = max(1, min(n // 6, (limit or n) // 5))
    try:
        parts = data.split(data.Dataset(x, y, x, y), limit, rng)
    except UserError:
        assert held_out + (limit or 1) > n
        return
    drawn = np.concatenate([parts[1], parts[3]])
    assert len(set(drawn)) == len(drawn) and len(parts[1]) == (limit or n - len(parts[3]))
    assert len(parts[3]) == held_out
    assert (parts[0][:, 0, 0] == parts[1]).all() and (parts[2][:, 0, 0] == parts[3]).all()


CALLS = {
    "cholesky_basis": basis.cholesky_basis,
    "double_basis": basis.double_basis,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_array_or_of_another_shape_is_refused(name):
    for bad in (None, "x", [[1.0]], (), {}):
        with pytest.raises(TypeError, match=f"array.*{type(bad).__name__}"):
            CALLS[name](bad)
    for shape in SHAPES:
        for dtype in (np.float32, np.float64, np.int64, np.uint8):
            attempt(CALLS[name], np.ones(shape, dtype))
