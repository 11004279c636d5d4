"""Every operation of autograd.py, on inputs that nobody would think of.

Value and gradients are those of the formula in float64, or an error says what was wrong; never
another number, another warning or a changed input.  NumPy's errors count: "overflow encountered in
exp" is raised here, and is a warning, with Inf, where `np.errstate` does not ask for the error.
"""

import math
import re

import numpy as np
import pytest
from test_properties import LAYOUTS, REFUSALS, SHAPES, laid_out

import autograd as ag
from autograd import Tensor

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

NAMED = (
    r"shape|needs|dimension|axis|axes|type|array|tensor|empty|zero-size|unsized|overflow|divide by|"
    r"invalid value|slope|labels|largest|images|offsets|NaN|integral|negative|powers"
)
seeds = st.integers(0, 2**32).map(np.random.default_rng)
sizes = st.integers(0, 4)
batches = st.lists(sizes, max_size=2).map(tuple)
dtypes = st.sampled_from([np.float32, np.float64])


def attempt(f, *arrays):
    """f(*arrays), or the refusal, which must say what was wrong; the arrays stay as they are."""
    before = [a.tobytes() for a in arrays]
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            result = f(*arrays)
    except (*REFUSALS, IndexError) as error:
        assert re.search(NAMED, str(error)), error
        result = error
    assert [a.tobytes() for a in arrays] == before
    return result


def with_gradients(operation):
    """(g, *arrays) -> the value of `operation` and the gradients for the cotangent g."""

    def run(g, *arrays):
        inputs = [Tensor(a, requires_grad=True) for a in arrays]
        out = operation(*inputs)
        out.backward(g)
        return out.data, *(t.grad for t in inputs)

    return run


def numbers(rng, dtype, *shapes, odd=(0, -0.0, np.inf, np.nan)):
    """Arrays of these shapes, each of a scale, a layout and perhaps oddities of its own."""
    out = []
    for shape in shapes:
        a = rng.standard_normal(shape) * 10.0 ** rng.choice([0, rng.integers(-30, 31)])
        kind = rng.integers(4)
        if kind == 0:
            a = abs(a)
        elif kind == 1 and odd:
            a = np.where(rng.random(shape) < 0.8, a, rng.choice(odd, shape))
        a = np.asarray(a, dtype)
        out.append(laid_out(a, rng.choice(LAYOUTS)) if a.ndim > 1 else a)
    return out


def fits(dtype, *arrays):
    """Whether all these numbers, with room for sums, exist in `dtype`."""
    limit = 1e-3 * float(np.finfo(dtype).max)
    return all((abs(np.asarray(a)) < limit).all() for a in arrays)


def assert_close(got, want, tolerance):
    """Equal to `tolerance`; Inf and NaN in the same places."""
    assert np.shape(got) == np.shape(want)
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        assert np.all(same | (abs(got - want) <= np.nan_to_num(tolerance))), (got, want, tolerance)


def assert_held(result, wanted, terms, dtype, count, lost=0, steps=()):
    """Each result within `count` roundings of `terms`, the sizes of what is summed, and of what
    underflows times `lost`; a refusal only where such a number, or one on the way, does not fit."""
    if isinstance(result, Exception):
        assert not fits(dtype, *terms, *steps), result
        return
    limits = np.finfo(dtype)
    lost = 1 + np.max(lost, initial=0, where=np.isfinite(lost))
    for got, want, size in zip(result, wanted, terms):
        assert got.dtype == dtype
        slack = count * lost * float(limits.smallest_subnormal)
        assert_close(got, want, count * float(limits.eps) * size + slack)


def bend(a):
    return np.where(a > 0, 1.5, 0.3)


# name: (operation, value, derivative)
UNARY = {
    "exp": (ag.exp, np.exp, np.exp),
    "log": (ag.log, np.log, lambda a: 1 / a),
    "sqrt": (ag.sqrt, np.sqrt, lambda a: 0.5 / np.sqrt(a)),
    "negation": (lambda a: -a, lambda a: -a, lambda a: -np.ones_like(a)),
    "maximum": (lambda a: ag.maximum(a, 0.5), lambda a: np.maximum(a, 0.5), lambda a: a > 0.5),
    "leaky_relu": (lambda a: ag.leaky_relu(a, 0.2, 1.5), lambda a: bend(a) * a, bend),
} | {
    f"power {p}": (lambda a, p=p: a**p, lambda a, p=p: a**p, lambda a, p=p: p and p * a ** (p - 1))
    for p in (0, 1, 2, 3, -1, 0.5, -1.5)
}


@given(seeds, batches, dtypes)
def test_functions_of_each_entry_and_their_gradients_are_the_formulas(rng, shape, dtype):
    a, g = numbers(rng, dtype, shape, shape)
    x, G = a.astype(float), g.astype(float)
    for operation, value, derivative in UNARY.values():
        result = attempt(with_gradients(operation), g, a)
        with np.errstate(all="ignore"):
            slope = derivative(x)
            wanted = value(x), G * slope
        # A few roundings each; a slope that underflows is multiplied by g.
        terms = [abs(w) for w in wanted]
        assert_held(result, wanted, terms, dtype, 8, lost=abs(G), steps=(slope, a, g))


def back_in_place(g, a):
    full = np.zeros(a.shape)
    full[::-2, ..., 1:] = g[:, 0]
    return full


# operation and value in one, gradient for the cotangent g
MOVED = {
    "sum": (lambda a: a.sum(), lambda g, a: np.broadcast_to(g, a.shape)),
    "sum, axis": (lambda a: a.sum(axis=-2), lambda g, a: np.expand_dims(g, -2) + np.zeros(a.shape)),
    "mean": (
        lambda a: a.mean(axis=(0, -1)),
        lambda g, a: np.expand_dims(g / (len(a) * a.shape[-1]), (0, -1)) + np.zeros(a.shape),
    ),
    "reshape": (lambda a: a.reshape(1, a.size), lambda g, a: g.reshape(a.shape)),
    "transpose": (
        lambda a: a.transpose(-1, *range(a.ndim - 1)),
        lambda g, _: np.moveaxis(g, 0, -1),
    ),
    "getitem": (lambda a: a[::-2, None, ..., 1:], back_in_place),
}


@given(seeds, batches, sizes, sizes, dtypes)
def test_sums_and_moved_entries_and_their_gradients_are_the_formulas(rng, batch, n, k, dtype):
    (a,) = numbers(rng, dtype, (*batch, n, k))
    x = a.astype(float)
    for name, (operation, gradient) in MOVED.items():
        if name == "mean" and not a.size:
            assert isinstance(attempt(lambda a: ag.mean(a, (0, -1)), a), ValueError)
            continue
        with np.errstate(all="ignore"):
            out = operation(x)
            (g,) = numbers(rng, dtype, out.shape)
            wanted = out, gradient(g.astype(float), a)
            # A mean is a sum, which may overflow, times 1/n.
            terms = np.asarray(operation(abs(x))), abs(wanted[1])
        result = attempt(with_gradients(operation), g, a)
        assert_held(result, wanted, terms, dtype, 4 + a.size, steps=(np.sum(abs(x)), g))


# name: (operation, value, gradients for the cotangent g before stretched axes are summed)
BINARY = {
    "add": (ag.add, lambda a, b: a + b, lambda g, a, b: (g, g)),
    "subtract": (ag.subtract, lambda a, b: a - b, lambda g, a, b: (g, -g)),
    "multiply": (ag.multiply, lambda a, b: a * b, lambda g, a, b: (g * b, g * a)),
    "divide": (ag.divide, lambda a, b: a / b, lambda g, a, b: (g / b, -g * (a / b) / b)),
}
PRODUCTS = {
    "matmul": (ag.matmul, lambda a, b: a @ b, lambda g, a, b: (g @ b.mT, a.mT @ g)),
    "linear": (
        ag.linear,
        lambda X, W, b: X @ W + b,
        lambda g, X, W, b: (g @ W.T, X[..., None] * g[..., None, :], g),
    ),
    "concatenate": (
        lambda *t: ag.concatenate(t),
        lambda *t: np.concatenate(t, -1),
        lambda g, *t: np.split(g, np.cumsum([a.shape[-1] for a in t])[:-1], -1),
    ),
}


def thinned(rng, shape):
    """A shape that broadcasts to this one: some lengths 1, some leading axes gone."""
    shape = tuple(int(rng.choice([n, n, 1])) for n in shape)
    return shape[rng.integers(len(shape) + 1) :]


def summed_to(g, shape):
    """g with those axes summed that broadcasting `shape` to g.shape adds or stretches."""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


@given(seeds, batches, sizes, sizes, sizes, dtypes)
def test_operations_of_several_arrays_are_their_formulas(rng, batch, n, k, m, dtype):
    cases = dict.fromkeys(BINARY, [thinned(rng, (*batch, n)) for _ in range(2)]) | {
        "matmul": ((*thinned(rng, batch), n, k), (*thinned(rng, batch), k, m)),
        "linear": ((*batch, k), (k, m), (m,)),
        "concatenate": ((*batch, n), (*batch, k), (*batch, m)),
    }
    for name, (operation, value, gradients) in (BINARY | PRODUCTS).items():
        arrays = numbers(rng, dtype, *cases[name])
        x = [a.astype(float) for a in arrays]
        with np.errstate(all="ignore"):
            out = value(*x)
            (g,) = numbers(rng, dtype, out.shape)
            wanted = [out, *gradients(g.astype(float), *x)]
            # The formulas of absolute values are the sizes of the terms that are summed.
            G, *big = (abs(a.astype(float)) for a in (g, *arrays))
            terms = [value(*big[:-1], -big[-1] if name == "subtract" else big[-1])]
            terms += [abs(t) for t in gradients(G, *big)]
            for i, a in enumerate(arrays, start=1):
                wanted[i], terms[i] = summed_to(wanted[i], a.shape), summed_to(terms[i], a.shape)
            # The second gradient of a quotient is a product of three.
            lost, step = ((1 + G) / big[1], G * terms[0]) if name == "divide" else (0, 0)
        result = attempt(with_gradients(operation), g, *arrays)
        count = 4 + g.size + sum(a.size for a in arrays)  # at most so many terms in a sum
        assert_held(result, wanted, terms, dtype, count, lost, (step, *arrays, g))


@given(seeds, batches, batches)
def test_unbroadcast_sums_what_was_stretched_or_refuses(rng, shape, wide):
    (g,) = numbers(rng, np.float64, wide, odd=())
    result = attempt(lambda g: ag.unbroadcast(g, shape), g)
    fit = len(shape) <= len(wide) and all(n in (1, m) for n, m in zip(shape[::-1], wide[::-1]))
    assert fit != isinstance(result, ValueError)
    if fit:
        assert_close(result, summed_to(g, shape), 2e-16 * (4 + g.size) * abs(g).sum())


@given(seeds, batches, st.integers(1, 6), dtypes)
def test_softmax_and_cross_entropy_are_their_formulas(rng, batch, n, dtype):
    (a,) = numbers(rng, dtype, (*batch, n), odd=(0, np.nan, -np.inf))  # −∞: a class masked out
    g, share = numbers(rng, dtype, a.shape, (), odd=())
    with np.errstate(all="ignore"):
        x, G = a.astype(float), g.astype(float)
        z = x - x.max(axis=-1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        p = np.exp(log_p)
        wanted = p, p * (G - (G * p).sum(axis=-1, keepdims=True))
        result = attempt(with_gradients(ag.softmax), g, a)
        # p is right to eps max(1, |log p|), and exp vanishes faster than |log p| grows.
        terms = np.ones_like(p), p * 0 + abs(G).sum(axis=-1, keepdims=True)
        fine = (*(np.where((x == -np.inf) & (z == x), 0, abs(t)) for t in (x, z)), G)
        assert_held(result, wanted, terms, dtype, 8 * (n + 4), abs(G), fine)
        if not a.size:
            return
        a, log_p, p = (t.reshape(-1, n) for t in (a, log_p, p))
        B = len(a)
        labels = rng.integers(0, n, B).astype(rng.choice([np.uint8, np.int8, np.int64]))
        at_labels = log_p[np.arange(B), labels]
        wanted = -at_labels.mean(), (p - np.eye(n)[labels]) * (float(share) / B)
        terms = abs(at_labels).mean() + 1, wanted[1] * 0 + abs(float(share)) / B
        result = attempt(with_gradients(lambda a: ag.cross_entropy(a, labels)), share, a)
        assert_held(result, wanted, terms, dtype, 8 * (n + B), abs(share), (*fine, terms[0] * B))


FOREIGN = [np.float32, np.float64, np.float16, np.int64, complex, object, ">f8"]
ALL = {name: case[:2] for name, case in (UNARY | BINARY | PRODUCTS).items()} | {
    name: (f, f) for name, (f, _) in MOVED.items()
}
KINDS = st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(FOREIGN)), min_size=3)


@given(KINDS)
def test_foreign_shapes_and_dtypes_give_the_formula_or_an_error(kinds):
    arrays = [np.arange(1, 1 + math.prod(shape)).reshape(shape) for shape, _ in kinds]
    for name, (operation, value) in ALL.items():
        n = 1 if name in UNARY or name in MOVED else 3 if name == "linear" else 2
        mine = [a.astype(dtype) for a, (_, dtype) in zip(arrays[:n], kinds)]
        result = attempt(lambda *a, f=operation: f(*map(Tensor, a)).data, *mine)
        if not isinstance(result, Exception):
            want = value(*(a.astype(complex) for a in arrays[:n]))
            assert_close(result.astype(complex), want, 1e-2 * abs(want))  # float16


@pytest.mark.parametrize("bad", [None, "x", [[1.0]], (), {}], ids=repr)
def test_what_is_no_array_is_refused(bad):
    good, kind = np.ones((2, 2)), type(bad).__name__
    for operation in (ag.exp, ag.sum, ag.mean, ag.softmax, lambda a: ag.gradient_check(ag.exp, a)):
        with pytest.raises(TypeError, match=f"array.*{kind}"):
            operation(bad)
    for operation in (ag.add, ag.matmul, ag.cross_entropy, lambda *a: ag.linear(*a, good[0])):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(TypeError, match=f"array.*{kind}"):
                operation(*pair)
