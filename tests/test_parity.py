"""The GPU door: the same training on both devices, no waiting, and the promises of "products"."""

import functools
import importlib
import itertools
import types
import warnings

import numpy as np
import pytest
import refusing
from cases import close
from conftest import GPU, WHY

import autograd as ag
import fast
import osa_minimal
import relatives
import train
from fast import basis, gpu
from fast.basis import cholesky_basis, double_basis
from training import data, resume
from training.optimizers import AdamW, Muon, assign, clip, flatten

EPS = {np.float32: np.finfo(np.float32).eps, np.float64: np.finfo(np.float64).eps, np.int64: 0}


@pytest.fixture(params=["refusing", "cupy"])
def device(request):
    """A module whose arrays live elsewhere; see `xp` in conftest.py."""
    if request.param == "cupy" and GPU is np:
        pytest.skip(WHY)
    return {"refusing": refusing, "cupy": GPU}[request.param]


# ------------------------------------------------------------------------------------ both devices


@functools.cache
def training_losses(xp, patch, steps):
    """Losses of a small model trained in float64 with Muon and AdamW, from one seed."""
    rng = np.random.default_rng(3)
    images, labels = rng.standard_normal((2, 8, 12, 12)), rng.integers(0, 4, (2, 8))
    model = relatives.Transformer(
        d=12, heads=3, depth=2, patch=patch, image=(12, 12), classes=4, mlp_ratio=2, eta=0.4,
        rng=np.random.default_rng(0), xp=xp, dtype=np.float64,
        attention=relatives.ATTENTION["osa"],
    )  # fmt: skip
    osa_minimal.calibrate(model, xp.asarray(images[0]), 0.5)
    config = train.Config()
    parameters, updates = assign(config, model.parameters)
    weights, grads = flatten(parameters)
    losses = []
    for t in range(steps):
        grads[...] = 0
        loss, _ = train.gradients(model, *(xp.asarray(a[t % 2]) for a in (images, labels)))
        for optimizer, part, rate in updates:
            clip(grads[part], config.clip)
            optimizer.step(weights[part], grads[part], rate, t + 1)
        losses.append(float(loss))
    return np.array(losses)


# 9 tokens of width 4: "gram" on a CPU; 4 tokens: S itself.  On a GPU both are route "products".
@pytest.mark.parametrize("patch", [4, 6], ids=["N > 2 d_v", "N < 2 d_v"])
def test_training_takes_the_same_course_on_every_device(patch, device):
    steps = 50
    expected = training_losses(np, patch, steps)
    assert expected[-1] < 0.9 * expected[0]  # something was learnt
    # Rounding, 1e-16 at first, is amplified by training itself: two CPU routes differ as much.
    np.testing.assert_allclose(training_losses(device, patch, steps), expected, rtol=1e-9)


ARMS = {
    "osa": [],
    "long sequences": "--patch 2 --width 16".split(),
    "adamw": ["--optimizer", "adamw"],
    "softmax with skips": "--attention softmax --skip --norm".split(),
    "xsa": ["--attention", "xsa"],
    "identity": ["--attention", "identity"],
    "fixed-orthogonal": ["--attention", "fixed-orthogonal"],
}


@pytest.fixture(scope="module")
def small():
    """A data set of random images."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (160, 14, 14), np.uint8), rng.integers(0, 10, 160, np.uint8)
    return data.Dataset(x[:120], y[:120], x[120:], y[120:])


def small_config(options=()):
    options = ["--preset", "tiny", "--limit-data", "100", "--batch-size", "10", *options]
    return train.parse(train.Config, train.PRESETS, options)[0]


@pytest.fixture(params=ARMS)
def run(request, device, small):
    """A run on a device, in the middle of an epoch: its order is moved at the start of each."""
    run = train.Run(small_config(ARMS[request.param]), small, device)
    run.step(0)
    return run


def test_a_training_step_moves_nothing_and_never_waits(run):
    if run.xp is refusing:
        before, kernels = dict(refusing.counts), refusing.operations["count"]
        for t in (1, 2, 3):
            run.step(t)
        assert refusing.counts == before
        # 855 are counted for two layers of OSA with N > 2 d_v, 607 for N ≤ 2 d_v, 682 for the ViT.
        most = 860 if run.config.patch == 2 else 685 if run.config.norm else 610
        assert refusing.operations["count"] - kernels <= 3 * most
        return
    cupyx = importlib.import_module("cupyx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy calls this deprecated, and has nothing in its place
        with cupyx.allow_synchronize(False):
            for t in (1, 2, 3):
                run.step(t)  # else DeviceSynchronized


@pytest.fixture
def recordable(device, monkeypatch):
    """The device, whose products can be recorded."""
    if device is refusing:  # there is no libcublas to be found
        monkeypatch.setattr(gpu, "RecordableBlas", lambda xp, stream: xp.recordable_cublas)
    return device


def test_a_graph_of_the_step_trains_as_its_kernels_do(run, small, recordable):
    graph = train.Run(run.config, small, run.xp, graph=True)
    graph.step(0)  # of `run`, the fixture has made the first step
    if run.config.patch == 2:  # CuPy cannot record the Cholesky factors of tokens N > 2 d_v
        with pytest.raises(NotImplementedError, match="--graph: .* N > 2 d_v"):
            graph.step(1)
        return
    kept = []
    for t in range(1, run.batches.per_epoch + 3):  # into the next epoch: other images, other rates
        if t in (1, 7):  # weights from elsewhere, before the recording and after
            for trained in (run, graph):
                trained.parameters["W_C"].data[...] *= 0.9
        graph.weights[...] = run.weights  # else a leaky ReLU's kink may make 1e-4 of 1e-7
        wanted, before = run.step(t), refusing.operations["count"]
        results = graph.step(t)
        if run.xp is refusing and t in (4, 5, 6):
            assert refusing.operations["count"] - before < 12  # launches
        # The same kernels; t and the rate are rounded to float32 in the graph alone.
        for a, b in zip(results, wanted):
            assert float(a) == pytest.approx(float(b), rel=2e-6)
        for name, p in run.parameters.items():
            most = 1e-6 * max(1, float(abs(p.data).max()))
            close(graph.parameters[name].data, p.data.get(), most)
        kept.append((results, [float(a) for a in results]))
    for results, numbers in kept:  # not overwritten by the next replay
        assert [float(a) for a in results] == numbers


def test_a_graph_goes_on_after_an_error_as_if_nothing_had_been(recordable):
    total, calls = recordable.asarray(np.zeros(2)), []

    def add(a):
        calls.append(a)
        if len(calls) in (1, 3):
            raise KeyError("the first call, and the first recording")
        total.__iadd__(a)
        return [2 * total]

    graph, one = gpu.Graph(recordable, add), recordable.asarray(np.ones(2))
    for wanted in (None, 2, None, 4, 6, 8):
        if wanted is None:
            with pytest.raises(KeyError):
                graph(one)
        else:
            assert graph(one)[0].get().tolist() == [wanted, wanted]
    assert len(calls) == 4 and gpu._cublas.get() is None
    with pytest.raises(ValueError, match="first call"):
        graph(recordable.asarray(np.ones(1)))


@pytest.mark.parametrize("dtype, most", [(np.float32, 44), (np.float64, 60)])
def test_on_a_device_long_sequences_need_little_more_arithmetic_than_the_gram_route(
    dtype, most, rng
):
    N, d_v = 8192, 16
    Q, K, V, dO = (refusing.asarray(a) for a in rng.standard_normal((4, 1, N, d_v)).astype(dtype))
    alpha = refusing.asarray(np.full((1, 1), 0.001, dtype))
    before = dict(refusing.operations)
    O, saved = fast.osa_forward(Q, K, V, alpha)
    fast.osa_backward(dO, saved)
    # The gram route's products with N in them take 23 · 2 N d_v², see benchmarks/gpu.py.
    assert refusing.operations["flops"] - before["flops"] < most * 2 * N * d_v**2
    assert refusing.operations["count"] - before["count"] < 300  # kernels


def test_the_optimizers_take_no_more_operations_for_more_parameters(rng):
    counts = []
    for copies in (1, 20):
        parameters = {}
        for i in range(copies):
            for shape in ((4, 4), (2, 4, 4), (3, 8)):
                W = np.linalg.qr(rng.standard_normal(shape).swapaxes(-1, -2))[0].swapaxes(-1, -2)
                parameters[f"{i}, {shape}"] = ag.Tensor(refusing.asarray(W), requires_grad=True)
        weights, grads = flatten(parameters)
        both = AdamW(parameters), Muon(parameters)
        before = refusing.operations["count"]
        clip(grads, 1.0)
        for optimizer in both:
            optimizer.step(weights, grads, 0.1, 1)
        counts.append(refusing.operations["count"] - before)
    assert counts[1] == counts[0] < 160


def test_numbers_beside_tensors_are_no_transfers(xp):
    x = ag.Tensor(xp.asarray(np.ones(3)), requires_grad=True)
    before = dict(refusing.counts)
    y = 2 - 3 * (x + 1) / 2
    assert refusing.counts == before and y.dtype == np.float64
    assert ag.to_cpu(y.data).tolist() == [-1, -1, -1]


# -------------------------------------------------------------------------------- route "products"


LAYOUTS = {
    "contiguous": lambda M: M,
    "transposed": lambda M: M.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "columns of a wider one": lambda M: np.concatenate([M, M, M], axis=-1)[..., : M.shape[-1]],
    "rows of a longer one": lambda M: np.concatenate([M, M], axis=-2)[..., -M.shape[-2] :, :],
    "every second column": lambda M: np.repeat(M, 2, axis=-1)[..., ::2],
    "heads last": lambda M: M.swapaxes(-3, -2).copy().swapaxes(-3, -2),
    "one for the whole batch": lambda M: M[:1],
    "backwards": lambda M: M[..., ::-1, :].copy()[..., ::-1, :],
    "matrices backwards": lambda M: M[:, ::-1].copy()[:, ::-1],
}


@pytest.mark.parametrize("n, k, m", [(5, 4, 3), (1, 4, 3), (5, 1, 3), (5, 4, 1), (1, 1, 1)])
def test_product_is_matmul_for_every_layout_in_memory(n, k, m, dtype, rng, device):
    A, B = rng.standard_normal((2, 3, n, k)), rng.standard_normal((2, 3, k, m))
    wide = A.astype(dtype).astype(float), B.astype(dtype).astype(float)
    for a, b, c in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS):
        left, right = (
            keep_layout(device, LAYOUTS[i](M.astype(dtype))) for i, M in ((a, A), (b, B))
        )
        want = LAYOUTS[a](wide[0]) @ LAYOUTS[b](wide[1])
        tol = 16 * k * EPS[dtype]  # sums of k products of numbers up to 4
        close(gpu.product(left, right), want, tol)
        if c != "one for the whole batch":
            out = keep_layout(device, LAYOUTS[c](np.full(want.shape, np.nan, dtype)))
            assert gpu.product(left, right, out=out) is out
            close(out, want, tol)


def test_products_of_transposes_and_slices_are_one_kernel_each(rng):
    for a, b, c in itertools.product(list(LAYOUTS)[:4], repeat=3):
        A, B, C = (rng.standard_normal((2, 3, *s)) for s in ((5, 4), (4, 3), (5, 3)))
        A, B = keep_layout(refusing, LAYOUTS[a](A)), keep_layout(refusing, LAYOUTS[b](B))
        before = refusing.operations["count"]
        gpu.product(A, B)
        if c != "transposed":  # cuBLAS writes by columns: of the transposes, by rows
            gpu.product(A, B, out=keep_layout(refusing, LAYOUTS[c](C)))
        assert refusing.operations["count"] - before == 1 + (c != "transposed"), (a, b, c)


def test_products_of_other_dtypes_are_those_of_the_wider_or_of_out(rng, device):
    A, B = 4 * rng.standard_normal((2, 3, 5, 5))
    for dtypes in itertools.product((np.float32, np.float64, np.int64), repeat=2):
        a, b = (M.astype(dtype) for M, dtype in zip((A, B), dtypes))
        left, right, out = (device.asarray(M) for M in (a, b, np.zeros((3, 5, 5))))
        got = gpu.product(left, right)
        assert got.dtype == (a @ b).dtype and gpu.product(left, right, out=out) is out
        for result in (got, out):
            close(result, a @ b, 16 * 5 * 16 * EPS[got.dtype.type])
    with pytest.raises(ValueError, match="out must have shape"):
        gpu.product(device.asarray(A), device.asarray(B), out=device.asarray(np.zeros((3, 5, 4))))


def test_one_row_is_described_by_its_length_whatever_its_stride():
    row = gpu._layout((2, 1, 3), (12, 2**40, 4), 4)
    column = gpu._layout((2, 3, 1), (12, 4, 2**40), 4)
    assert row == (0, 3, 3) and column[1] < 2**31


@pytest.mark.parametrize("N", [7, 12, 24, 37, 48])
def test_a_tall_product_in_blocks_is_the_product(N, rng, device, monkeypatch):
    monkeypatch.setattr(basis, "ROWS", 4)
    A, B = rng.standard_normal((2, 3, N, 5)), rng.standard_normal((2, 3, N, 2))
    a, b = (keep_layout(device, LAYOUTS["columns of a wider one"](M)) for M in (A, B))
    # Sums of N products of numbers up to 4.
    close(basis.tall_product(a, b), A.mT @ B, 16 * N * EPS[np.float64])


def keep_layout(device, M):
    """M on the device with the strides it has."""
    base = M if M.base is None else M.base
    while base.base is not None:
        base = base.base
    offset = M.ctypes.data - base.ctypes.data
    moved = device.asarray(base.reshape(-1))
    if device is refusing:
        view = np.lib.stride_tricks.as_strided(
            np.frombuffer(moved._a, np.uint8)[offset:].view(M.dtype), M.shape, M.strides
        )
        return refusing.Array(view)
    return device.ndarray(M.shape, M.dtype, moved.data + offset, M.strides)


@pytest.mark.parametrize("N", [5, 20])
def test_beyond_its_norm_products_gives_nan_and_below_the_right_numbers(N, dtype, rng, xp):
    Q, K, V = rng.standard_normal((3, 6, N, 3)).astype(dtype)
    norms = np.array([0, 1, 1000, 5000, 1e6, 1e30])
    largest = np.linalg.norm(osa_minimal.skew_scores(Q, K, 1.0).astype(float), 2, axis=(-2, -1))
    alpha = (norms / largest).astype(dtype)[:, None, None]
    arrays = [xp.asarray(a) for a in (Q, K, V, alpha)]
    O, saved = fast.osa_forward(*arrays, "products")
    gradients = [ag.to_cpu(g) for g in fast.osa_backward(arrays[2], saved)]
    for result in (ag.to_cpu(O), *gradients):
        whole = np.isnan(result).all(axis=(-2, -1))
        assert whole.tolist() == [False, False, False, True, True, True]
        assert np.isfinite(result[:3]).all()  # the others of the batch are not touched
    for i in range(3):
        exact = osa_minimal.osa_dense(*(a[i].astype(float) for a in (Q, K, V, alpha)))
        close(O[i], exact, 3 * (N + 10) * EPS[dtype] * max(1, norms[i]))  # as in cases.py


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_spoilt_entry_spoils_its_own_matrix_only(value, rng):
    Q, K, V = rng.standard_normal((3, 2, 20, 3))
    Q[1, 4, 2] = value
    arrays = [refusing.asarray(a) for a in (Q, K, V)]  # a device: nobody looks at the entries
    with np.errstate(invalid="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "cholesky", silent_cholesky)
        O = fast.osa_forward(*arrays, 0.1)[0].get()
    assert np.isfinite(O[0]).all() and np.isnan(O[1]).all()


CHOLESKY = np.linalg.cholesky


def silent_cholesky(A):
    """As CuPy's: where the factorisation fails, what was there comes back, and no error."""
    flat = A.reshape(-1, *A.shape[-2:]).copy()
    for M in flat:
        try:
            M[...] = CHOLESKY(M)
        except np.linalg.LinAlgError:
            M[...] = np.tril(M)
    return flat.reshape(A.shape)


each_basis = pytest.mark.parametrize(
    "basis_of, dtype",
    [(cholesky_basis, np.float32), (cholesky_basis, np.float64), (double_basis, np.float32)],
)


@each_basis
def test_a_failed_factorisation_gives_nan(basis_of, dtype, rng, monkeypatch):
    P = rng.standard_normal((2, 20, 4)).astype(dtype)

    def fails_for_the_second(A):
        L = CHOLESKY(A)
        L[..., 1, :, :] = np.tril(A[..., 1, :, :])
        return L

    monkeypatch.setattr(np.linalg, "cholesky", fails_for_the_second)
    R = basis_of(P)[1]
    assert np.isfinite(R[0]).all() and np.isnan(R[1]).all()


@each_basis
@pytest.mark.parametrize("smallest", [1, 1e-2, 1e-5])
def test_the_cholesky_basis_is_orthonormal_and_spans_the_columns(
    smallest, basis_of, dtype, rng, xp
):
    U, _, Wt = np.linalg.svd(rng.standard_normal((3, 40, 6)), full_matrices=False)
    P = (U * np.geomspace(1, smallest, 6) @ Wt * [1, 1e4, 1e-4, 1, 1, 1]).astype(dtype)
    B, R = (ag.to_cpu(a) for a in basis_of(xp.asarray(P)))
    assert B.dtype == dtype and R.dtype == (np.float64 if basis_of is double_basis else dtype)
    B, tol = B.astype(float), 8 * 50 * EPS[dtype]
    size = np.linalg.norm(P, axis=-2, keepdims=True)  # column by column: their scales differ
    for error in (B.mT @ B - np.eye(6), (B @ R - P) / size, (B.mT @ P - R) / size):
        assert abs(error).max() <= tol


@each_basis
@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_columns_that_nearly_coincide_do_not_spoil_the_basis(apart, basis_of, dtype, rng, xp):
    P = rng.standard_normal((50, 40, 6))
    P[..., 1] = P[..., 0] + apart * P[..., 1]
    P[..., 4] = P[..., 2] - apart * P[..., 3]
    P = P.astype(dtype)
    B = ag.to_cpu(basis_of(xp.asarray(P))[0]).astype(float)
    # Without the rotation 1e7 eps in float64; the other columns take up the error of the small one.
    close(B @ (B.mT @ P), P, 64 * 4 * EPS[dtype])


def test_whichever_two_columns_nearly_coincide_one_of_two_rotations_serves(rng, xp):
    r = 17
    pairs = list(itertools.combinations(range(r), 2))
    P = rng.standard_normal((len(pairs), 60, r))
    for M, (i, j) in zip(P, pairs):
        M[:, j] = M[:, i] + 1e-7 * M[:, j]
    B = ag.to_cpu(cholesky_basis(xp.asarray(P))[0])
    # 84 eps were seen; each rotation alone is off by 3000 or more for some pair.
    close(B @ (B.mT @ P), P, 200 * EPS[np.float64])


def test_float64_is_used_where_it_is_fast():
    def card(ratio):
        xp = types.ModuleType("a card")
        runtime = types.SimpleNamespace(
            cudaDevAttrSingleToDoublePrecisionPerfRatio=87,
            deviceGetAttribute=lambda attribute, device: {(87, 0): ratio}[attribute, device],
        )
        xp.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: types.SimpleNamespace(id=0))
        return xp

    assert basis.double_is_fast(np)
    assert [basis.double_is_fast(card(ratio)) for ratio in (2, 64)] == [True, False]


@pytest.mark.parametrize("apart", [1, 1e-3, 1e-7])
def test_products_needs_no_float64_for_float32(apart, rng, xp, monkeypatch):
    monkeypatch.setattr(fast.operator, "double_is_fast", lambda xp: False)
    Q, K, V, dO = rng.standard_normal((4, 3, 20, 3)).astype(np.float32)
    K[..., 0] = Q[..., 1] + np.float32(apart) * K[..., 0]
    arrays = [xp.asarray(a) for a in (Q, K, V)]
    O, saved = fast.osa_forward(*arrays, 0.3, "products")
    got = O, *fast.osa_backward(xp.asarray(dO), saved)
    want, saved = fast.osa_forward(*(a.astype(float) for a in (Q, K, V)), 0.3, "dense")
    want = want, *fast.osa_backward(dO.astype(float), saved)
    for a, b in zip(got, want):
        assert a.dtype == np.float32
        # c n eps, n = N + r, relative to the largest entry; ‖S‖ is below 10.
        close(a, b, 10 * 26 * EPS[np.float32] * abs(b).max())


def test_a_norm_out_of_reach_ends_training_with_a_message_at_the_next_row(small, tmp_path):
    run = train.Run(small_config(), small, refusing)
    for name, p in run.parameters.items():
        if name.endswith(".alpha"):
            p.data[...] *= 1e6
    progress = resume.Progress(log_every=2)
    with pytest.raises(FloatingPointError, match="NaN.* at step 2"):
        train.train(run, tmp_path, progress, run.steps, resume.Stop(run.ranks))
    assert np.isfinite(progress.seconds) and not list(tmp_path.glob("checkpoint*"))


# ------------------------------------------------------------------------------------ the stand-in


@pytest.mark.parametrize("part", ["functions", "linalg", "arrays"])
def test_what_the_stand_in_offers_cupy_has(part):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")  # no GPU is needed
    numpy, stand_in, real = {
        "functions": (np, refusing, cupy),
        "linalg": (np.linalg, refusing.linalg, cupy.linalg),
        "arrays": (np.ndarray, refusing.asarray(np.ones((1, 1))), cupy.ndarray),
    }[part]
    names = {n for n in dir(numpy) if part == "arrays" or callable(getattr(numpy, n))}
    assert {n for n in names if n[0] != "_" and hasattr(stand_in, n)} <= set(dir(real))
