"""The arrays, the graph, every operation with its VJP, and the gradient check itself."""

import contextlib
import gc
import math
import sys
import threading
import weakref
from unittest import mock

import numpy as np
import pytest
import refusing

import autograd as ag
from autograd import Tensor
from fast.gpu import find_device

# Central differences with h = eps^(1/3) are right to about eps^(2/3) = 4e-11 of the terms summed;
# the third derivatives of the functions below are at most a few hundred times as large.
CHECK = 1e-8


def normal(rng, shape):
    return rng.standard_normal(shape)


def positive(rng, shape):
    return rng.uniform(0.5, 2.0, shape)


def off_kink(rng, shape):
    """Both signs, and no entry within 0.1 of 0, so that differences do not step over a kink."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.1, 1.0, shape)


def labelled(z):
    return ag.cross_entropy(z, ag.array_module(z).asarray(np.array([2, 0, 3])))


product_by_hand = ag.operator(lambda a, b: (a * b, (a, b)), lambda g, ab: (g * ab[1], g * ab[0]))

# name: (operation on tensors, how to draw the arguments, their shapes)
OPERATIONS = {
    "add": (ag.add, normal, [(3, 4), (3, 4)]),
    "add, both stretched": (ag.add, normal, [(2, 1, 4), (3, 1)]),
    "add, 0-d": (ag.add, normal, [(), (2, 3)]),
    "subtract": (ag.subtract, normal, [(3, 4), (3, 4)]),
    "subtract, both stretched": (ag.subtract, normal, [(3, 1), (2, 1, 4)]),
    "multiply": (ag.multiply, normal, [(3, 4), (3, 4)]),
    "multiply, both stretched": (ag.multiply, normal, [(2, 1, 4), (3, 1)]),
    "multiply, 0-d": (ag.multiply, normal, [(2, 3), ()]),
    "divide": (ag.divide, positive, [(3, 4), (3, 4)]),
    "divide, both stretched": (ag.divide, positive, [(3, 1), (2, 1, 4)]),
    "power 3": (lambda a: ag.power(a, 3), normal, [(3, 4)]),
    "power -1.5": (lambda a: a**-1.5, positive, [(3, 4)]),
    "exp": (ag.exp, normal, [(3, 4)]),
    "log": (ag.log, positive, [(3, 4)]),
    "sqrt": (ag.sqrt, positive, [(3, 4)]),
    "maximum": (lambda a: ag.maximum(a, 0.0), off_kink, [(5, 4)]),
    "maximum of a constant": (lambda a: ag.maximum(a + 0.3, 0.3), off_kink, [(5, 4)]),
    "maximum of two": (ag.maximum, normal, [(5, 4), (4,)]),
    "leaky_relu": (lambda a: ag.leaky_relu(a, 0.2, 1.3), off_kink, [(5, 4)]),
    "leaky_relu, slope 0": (lambda a: ag.leaky_relu(a, 0.0), off_kink, [(5, 4)]),
    "leaky_relu, slope 1": (lambda a: ag.leaky_relu(a, 1.0), off_kink, [(5, 4)]),
    "sum": (ag.sum, normal, [(2, 3, 4)]),
    "sum, axis": (lambda a: ag.sum(a, axis=1), normal, [(2, 3, 4)]),
    "sum, axes": (lambda a: ag.sum(a, axis=(0, -1)), normal, [(2, 3, 4)]),
    "sum, keepdims": (lambda a: a.sum(axis=-2, keepdims=True), normal, [(2, 3, 4)]),
    "sum of one number, axis": (lambda a: a.sum(axis=0), normal, [()]),
    "mean": (ag.mean, normal, [(2, 3, 4)]),
    "mean, axis": (lambda a: a.mean(axis=1), normal, [(2, 3, 4)]),
    "reshape": (lambda a: ag.reshape(a, (4, 6)), normal, [(2, 3, 4)]),
    "reshape, -1": (lambda a: a.reshape(-1, 4), normal, [(2, 3, 4)]),
    "transpose": (lambda a: ag.transpose(a), normal, [(2, 3, 4)]),
    "transpose, axes": (lambda a: a.transpose(2, 0, 1), normal, [(2, 3, 4)]),
    "getitem": (lambda a: a[1:, ..., 2], normal, [(3, 4, 5)]),
    "getitem, strides": (lambda a: a[::2, None, ::-1], normal, [(3, 4)]),
    "concatenate": (lambda *t: ag.concatenate(list(t)), normal, [(2, 3), (2, 1), (2, 4)]),
    "concatenate, axis 0": (lambda *t: ag.concatenate(list(t), axis=0), normal, [(2, 3), (1, 3)]),
    "matmul": (ag.matmul, normal, [(3, 4), (4, 2)]),
    "matmul, batches": (lambda a, b: a @ b, normal, [(2, 3, 4), (2, 4, 5)]),
    "matmul, (..., n, k) by (k, m)": (ag.matmul, normal, [(2, 5, 3, 4), (4, 2)]),
    "matmul, stretched batches": (ag.matmul, normal, [(2, 1, 3, 4), (5, 4, 2)]),
    "matmul, (n, k) by (..., k, m)": (ag.matmul, normal, [(3, 4), (2, 4, 2)]),
    "linear": (ag.linear, normal, [(2, 5, 3), (3, 4), (4,)]),
    "softmax": (ag.softmax, normal, [(2, 3, 4)]),
    "cross_entropy": (labelled, normal, [(3, 4)]),
    "negation": (lambda a: -a, normal, [(3, 4)]),
    "b = a + a; c = b + b": (lambda a: (a + a) + (a + a), normal, [(3,)]),
    "diamond": (lambda a: (lambda b: b * b + ag.exp(b))(a + a), normal, [(3, 4)]),
    "operator": (product_by_hand, normal, [(3, 4), (3, 4)]),
    "operator beside a constant": (lambda a: product_by_hand(a, 2.5), normal, [(3, 4)]),
    "one argument twice": (lambda a, b: a * b + a / (1 + b * b) - a * a, normal, [(3, 4), (3, 4)]),
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def arguments(name, xp, dtype=np.float64, seed=0):
    f, draw, shapes = OPERATIONS[name]
    rng = np.random.default_rng(seed)
    return f, [xp.asarray(np.asarray(draw(rng, s), dtype)) for s in shapes]


@each_operation
def test_vjp_agrees_with_central_differences(name, xp):
    f, arrays = arguments(name, xp)
    assert ag.gradient_check(f, *arrays) < CHECK


@each_operation
def test_float32_stays_float32_forward_and_backward(name, xp):
    f, arrays = arguments(name, xp, np.float32)
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    out = f(*inputs)
    assert all(t.dtype == np.float32 for t in ag.topological_order(out))
    out.backward(xp.ones_like(out.data))
    assert [t.grad.dtype for t in inputs] == [np.float32] * len(inputs)


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize(
    "f",
    [ag.add, ag.divide, ag.matmul, lambda *t: ag.concatenate(t),
     lambda a, b: ag.leaky_relu(a, 0.1) * ag.leaky_relu(b, 0.1)],
)  # fmt: skip
def test_a_gradient_has_the_dtype_of_its_tensor_beside_a_wider_one(f, narrow, xp, rng):
    arrays = [xp.asarray(positive(rng, (3, 3))) for _ in range(2)]
    arrays[narrow] = arrays[narrow].astype(np.float32)
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    for _ in range(2):  # also where gradients accumulate
        out = f(*inputs)
        out.backward(xp.ones_like(out.data))
    assert out.dtype == np.float64
    assert all(t.grad.dtype == t.dtype for t in inputs)


@each_operation
def test_gradients_are_taken_at_the_values_of_the_forward_pass(name, xp):
    """An optimiser may change the weights before another loss is walked."""
    results = []
    for change in (1, -3):
        f, arrays = arguments(name, xp)
        inputs = [Tensor(a, requires_grad=True) for a in arrays]
        out = f(*inputs)
        for t in inputs:
            t.data *= change
        out.backward(xp.asarray(np.random.default_rng(1).standard_normal(out.shape)))
        results.append([ag.to_cpu(a) for a in (out.data, *(t.grad for t in inputs))])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


# Python's and NumPy's numbers on either side.
SCALARS = {
    text: eval(f"lambda x: {text}") for text in (
        "x + 1", "1.5 + x", "x - 1", "1 - x", "x * 2.5", "2.5 * x", "x / 3", "3 / x", "x ** 2",
        "x ** 0.5", "x * True", "x * math.sqrt(2)", "ag.maximum(x, 1)", "x.sum() / 7 + 1.0",
        "np.float64(2.5) * x", "x - np.float64(1)", "np.int64(3) / x", "x ** np.float64(1.5)",
        "np.array(2.5) * x", "x / np.array(3.0)", "ag.maximum(np.array(1.0), x)",
        "ag.maximum(x, np.float64(1))", "ag.leaky_relu(x, np.float64(0.2), np.float64(2))",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", SCALARS)
def test_numbers_take_the_dtype_of_the_tensor(name, xp, rng):
    f = SCALARS[name]
    a = positive(rng, (3, 4))
    x = Tensor(xp.asarray(a.astype(np.float32)), requires_grad=True)
    out = f(x)
    out.backward(xp.ones_like(out.data))
    assert {t.dtype for t in ag.topological_order(out)} == {np.dtype(np.float32)}
    assert x.grad.dtype == np.float32
    assert ag.gradient_check(f, xp.asarray(a)) < CHECK


def test_an_array_on_the_left_is_a_constant(xp, rng):
    a, b = (xp.asarray(rng.standard_normal((3, 4))) for _ in range(2))
    for f in (lambda c, x: c + x, lambda c, x: c - x, lambda c, x: c * x, lambda c, x: c / x,
              lambda c, x: c @ x.transpose()):  # fmt: skip
        x = Tensor(b, requires_grad=True)
        out = f(a, x)
        assert isinstance(out, Tensor)
        np.testing.assert_array_equal(ag.to_cpu(out.data), ag.to_cpu(f(a, b)))
        assert ag.gradient_check(lambda t, f=f: f(a, t), b) < CHECK


def test_sums_over_many_rows_of_float32_are_right_to_the_last_digit(rng):
    a, W, b = (rng.random(shape).astype(np.float32) for shape in ((300_000, 2), (2, 2), (2,)))
    G, exact = rng.random(a.shape).astype(np.float32), a.astype(float).sum(axis=0)
    biases = [Tensor(b, requires_grad=True) for _ in range(2)]
    ag.linear(a, W, biases[0]).backward(G)
    (a + biases[1]).backward(G)
    results = [(t.grad, G.astype(float).sum(axis=0)) for t in biases]
    results += [(ag.sum(a, axis=0).data, exact), (ag.mean(a, axis=0).data, exact / len(a))]
    for got, want in results:  # one rounding, half an eps; row by row the error would be 300 eps
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=np.finfo(np.float32).eps)


# ---------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_and_softmax_survive_large_logits(xp):
    z = Tensor(xp.asarray(np.array([[1e4, 0.0, -1e4], [-1e4, 0.0, 5.0]])), requires_grad=True)
    loss = ag.cross_entropy(z, xp.asarray(np.array([1, 2])))
    loss.backward()
    assert abs(float(loss.data) - (1e4 + math.log1p(math.exp(-5))) / 2) < 1e4 * 1e-15
    assert np.isfinite(ag.to_cpu(z.grad)).all()
    p = ag.to_cpu(ag.softmax(z).data)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-15)


# ---------------------------------------------------------------------------------- the graph


def test_a_chain_of_5000_operations_is_walked_without_recursion(xp):
    x = Tensor(xp.asarray(np.array([1.0, -2.0])), requires_grad=True)
    y = x
    for i in range(5000):
        y = y * 1.001 if i % 2 else y + x
    y.backward(xp.asarray(np.array([1.0, 3.0])))
    slope = 1.0  # dy/dx by the same recurrence
    for i in range(5000):
        slope = slope * 1.001 if i % 2 else slope + 1
    # 5,000 roundings, each of relative size eps
    np.testing.assert_allclose(ag.to_cpu(x.grad), [slope, 3 * slope], rtol=5000 * 2.3e-16)


@pytest.mark.parametrize("views", [False, True])
def test_gradients_accumulate_over_graphs_in_place_also_in_views_of_one_array(views, xp, rng):
    a, b, G = rng.standard_normal((3, 2, 3))
    x, y = (Tensor(xp.asarray(v), requires_grad=True) for v in (a, b))
    if views:
        joined = xp.zeros(12)
        x.grad, y.grad = joined[:6].reshape(2, 3), joined[6:].reshape(2, 3)
    (x * y).backward(xp.asarray(G))
    first = x.grad
    (x * 3.0).backward(xp.asarray(G))
    wanted = np.array([b * G + 3.0 * G, a * G])
    if views:
        np.testing.assert_array_equal(ag.to_cpu(joined), wanted.ravel())
    np.testing.assert_array_equal([ag.to_cpu(t.grad) for t in (x, y)], wanted)
    assert x.grad is first


def test_gradients_share_no_memory_with_each_other_or_with_the_one_passed_in(rng):
    x, y = (Tensor(rng.standard_normal((3, 4)), requires_grad=True) for _ in range(2))
    G = rng.standard_normal((3, 4))
    (x + y).backward(G)
    z = Tensor(rng.standard_normal((3, 4)), requires_grad=True)
    z.backward(G)
    w = Tensor(rng.standard_normal(12), requires_grad=True)
    w.reshape(3, 4).transpose().backward(G.T)
    s = Tensor(rng.standard_normal((3, 4)), requires_grad=True)
    s.sum(axis=0).backward(G[0])
    arrays = [G, x.grad, y.grad, z.grad, w.grad, s.grad]
    for i, a in enumerate(arrays):
        for b in arrays[:i]:
            assert not np.shares_memory(a, b)
    assert s.grad.flags.writeable


@pytest.mark.parametrize("first", [True, False])
def test_a_sum_of_gradients_is_not_made_in_the_other_parents_array(first, rng):
    # `add` hands one array to both parents; p gets a second contribution before or after it.
    x, y = (Tensor(rng.standard_normal(3), requires_grad=True) for _ in range(2))
    G = rng.standard_normal(3)
    p, q = x * 1.0, y * 1.0
    ((p + q) + p * 2.0 if first else p * 2.0 + (p + q)).backward(G)
    np.testing.assert_array_equal(y.grad, G)
    np.testing.assert_allclose(x.grad, 3 * G, rtol=1e-15)


def test_the_graph_is_freed_by_backward():
    x = Tensor(np.ones(3), requires_grad=True)
    middle = ag.exp(x)
    saved = weakref.ref(middle.data)
    out = (middle * middle).sum()
    del middle
    gc.collect()
    assert saved() is not None
    out.backward()
    assert saved() is None


def test_a_second_backward_through_a_graph_is_refused():
    x = Tensor(np.ones(3), requires_grad=True)
    middle = x * x
    out = middle.sum()
    out.backward()
    with pytest.raises(RuntimeError, match="freed"):
        out.backward()
    with pytest.raises(RuntimeError, match="freed"):  # through a part that is shared
        (middle + x).sum().backward()


def test_backward_refuses_what_it_cannot_do():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(ValueError, match=r"gradient for a tensor of shape \(2, 3\)"):
        (x + 1).backward()
    for grad in (np.ones((3, 2)), np.ones((2, 3), np.float32)):
        with pytest.raises(ValueError, match="grad must be float64 .2, 3."):
            (x + 1).backward(grad)
    with pytest.raises(ValueError, match="needs a gradient"):
        (x + 1).backward(2.0)
    with pytest.raises(RuntimeError, match="requires no gradient"):
        (Tensor(np.ones(3)) * 2).backward(np.ones(3))


MISLED = {  # what is said: a backward pass that is wrong
    r"\(3,\) for an argument \(2, 3\)": lambda g, _: [g[0]],
    "None for an argument": lambda g, _: [None],
    "2 gradients for 1 arguments": lambda g, _: [g, g],
    "gradient None for an": lambda g, _: print("no return"),
    "gradient int64 ": lambda g, _: [g.astype(int)],
}


@pytest.mark.parametrize("what", MISLED)
def test_a_wrong_number_or_shape_of_gradients_is_refused_by_the_operators_name(what):
    def misled(a):
        return a * 1, None

    x = Tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(ValueError, match=f"misled gave.*{what}"):
        ag.operator(misled, MISLED[what])(x).backward(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"negative must give back .output, saved., got ndarray"):
        ag.operator(np.negative, MISLED[what])(x)  # whose two rows are no pair


def test_what_backward_passes_read_cannot_be_written():
    x = Tensor(np.ones(3), requires_grad=True)
    h = x * 2
    y = ag.exp(h)
    doubled = ag.operator(lambda a: (a * 1, None), lambda g, _: np.multiply(g, 2, out=g))(x)
    written = [lambda a=a: np.negative(a, out=a) for a in (h.data, y.data)]
    for write in (*written, lambda: (doubled + x).backward(np.ones(3))):
        with pytest.raises(ValueError, match="read-only"):
            write()


def test_a_number_is_gradient_enough_for_one_entry_and_a_constant_gets_none(xp):
    x, c = (Tensor(xp.asarray(np.arange(3.0)), requires_grad=r) for r in (True, False))
    for number in (0.25, np.float16(0.25)):
        (x * c).sum().backward(number)
    assert x.grad.tolist() == [0, 0.5, 1] and c.grad is None


def test_nothing_is_recorded_without_need(xp):
    x = Tensor(xp.asarray(np.ones(3)), requires_grad=True)
    with ag.no_grad():
        assert not (x * x).requires_grad
        with ag.no_grad():
            pass
        assert not (x * x).requires_grad  # the inner exit restores the outer state
    assert (x * x).requires_grad
    assert not (Tensor(xp.asarray(np.ones(3))) * 2).requires_grad
    with pytest.raises(KeyError), ag.no_grad():
        raise KeyError
    assert (x * x).requires_grad


def test_no_grad_holds_for_its_own_thread_only():
    x, seen = Tensor(np.ones(3), requires_grad=True), []
    with ag.no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * x).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


@contextlib.contextmanager
def no_grad_within():
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(ag.no_grad())


@pytest.mark.parametrize("context", [ag.no_grad, no_grad_within])
def test_no_grad_in_a_generator_is_refused_as_it_would_hold_outside(context):
    def values():
        with context():
            yield 1

    async def async_values():
        with context():
            yield 1

    for start in (lambda: next(values()), lambda: async_values().asend(None).send(None)):
        with pytest.raises(RuntimeError, match="generator"):
            start()
    x = Tensor(np.ones(3), requires_grad=True)
    assert (x * 2).requires_grad
    with context():
        assert not (x * 2).requires_grad


def test_tensor_refuses_what_has_no_gradient():
    with pytest.raises(TypeError, match="floating-point"):
        Tensor(np.arange(3), requires_grad=True)
    with pytest.raises(TypeError, match="cannot wrap"):
        Tensor(Tensor(np.ones(3)))
    a = np.ones((3, 3))
    for thing in (np.ma.ones(3), a.view(np.matrix), a.view(np.recarray), [None], ["x"]):
        with pytest.raises(TypeError, match="array"):
            Tensor(thing)
    with pytest.raises(TypeError, match="take its .data"):
        np.asarray(Tensor(np.ones(3)))
    assert Tensor(a.view(np.memmap)).shape == (3, 3)
    assert Tensor([1.0, 2.0]).dtype == np.float64 and Tensor([1.0, 2.0]).shape == (2,)


BAD_ARGUMENTS = [
    (lambda x: x ** np.array(2.0), TypeError, "exponent"),
    (lambda x: x[np.array([0, 2])], TypeError, "index"),
    (lambda x: x @ x, ValueError, "matmul"),
    (lambda x: x @ np.ones(4), ValueError, "matmul"),
    (lambda x: ag.gradient_check(ag.exp, np.ones(3, np.float32)), TypeError, "float64"),
    (lambda x: ag.cross_entropy(x, np.ones((3, 4), int)), ValueError, "labels"),
    (lambda x: ag.cross_entropy(x, np.ones(2, int)), ValueError, "labels"),
    (lambda x: ag.cross_entropy(x, np.ones(3)), ValueError, "labels"),
    (lambda x: ag.cross_entropy(x[0], np.ones(4, int)), ValueError, "labels"),
    (lambda x: ag.cross_entropy(x, np.array([0, 1, 4])), ValueError, "labels from 0 to 4"),
]


@pytest.mark.parametrize("f, error, message", BAD_ARGUMENTS)
def test_operations_refuse_bad_arguments(f, error, message):
    with pytest.raises(error, match=message):
        f(Tensor(np.ones((3, 4))))


# ------------------------------------------------------------------------- the gradient check


def scaled_vjp(f, df, scale):
    """The elementwise f with its derivative df multiplied by `scale`."""
    return ag.operator(lambda a: (f(a), a), lambda g, a: [g * (scale * df(a))])


def test_gradient_check_sees_a_gradient_off_by_one_thousandth(xp, rng):
    a = xp.asarray(rng.standard_normal((3, 4)))
    assert ag.gradient_check(scaled_vjp(xp.sin, xp.cos, 1.0), a) < CHECK
    # ⟨vjp(G), D⟩ is off by 1e-3 of its value, which is about 1/√12 of the sum of its 12 terms.
    assert ag.gradient_check(scaled_vjp(xp.sin, xp.cos, 1.001), a) > 1e-4


def softmax_alone(a):
    p = np.exp(a) / np.exp(a).sum()
    return p, p


# name: (operator with a wrong VJP, sizes of its arguments, how large the error is at least)
WRONG_VJPS = {
    # b counts for a thousandth of a: checked together with a, its error would be lost.
    "one argument of two": (
        lambda a, b: (a + 1e-3 * b, None), lambda g, _: (g * 1.0, g * 1e-3 * 1.001), (5, 5), 1e-4),
    "a missing term": (lambda a: (a + a.sum(), None), lambda g, _: [g], (5,), 1e-2),
    # ⟨1, softmax⟩ = 1 is constant, so with a cotangent of ones any scale of this VJP passes.
    "what a cotangent of ones would hide": (
        softmax_alone, lambda g, p: [1.001 * p * (g - (g * p).sum())], (5,), 1e-4),
    # An error of mean zero, which a tangent of ones does not feel.
    "what a tangent of ones would hide": (
        lambda a: (a.sum(keepdims=True), None),
        lambda g, _: [g * np.array([1.1, 0.9, 1.2, 0.8])], (4,), 1e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_VJPS)
def test_gradient_check_sees(name, rng):
    forward, backward, sizes, least = WRONG_VJPS[name]
    arrays = [rng.standard_normal(n) for n in sizes]
    assert ag.gradient_check(ag.operator(forward, backward), *arrays) > least


# ------------------------------------------------------------------------- arrays and devices


def test_array_module_finds_the_module_of_arrays_and_tensors(xp):
    a = xp.asarray(np.ones(3))
    assert ag.array_module(a) is xp
    assert ag.array_module(Tensor(a), a, 2, 1.5, True) is xp
    assert ag.array_module(a.sum()) is xp
    assert ag.array_module() is np and ag.array_module(1.0) is np


def test_arrays_of_two_modules_are_refused():
    a, b = np.ones(3), refusing.asarray(np.ones(3))
    with pytest.raises(TypeError, match="numpy and refusing cannot be mixed"):
        ag.array_module(a, b)
    for f in (ag.add, ag.multiply, ag.matmul):
        with pytest.raises(TypeError, match="cannot be mixed"):
            f(Tensor(a), Tensor(b))


def fake_cupy(product):
    """A CuPy that imports; its kernels raise, or give a matrix product of our choice."""
    fake = mock.MagicMock(__name__="cupy")
    fake.arange.side_effect = product if isinstance(product, Exception) else None
    a = fake.arange.return_value.reshape.return_value.__add__.return_value
    a.__matmul__.return_value.get.return_value = np.array(product)
    fake.cuda.runtime.getDeviceCount.return_value = 3
    fake.cuda.runtime.getDeviceProperties.return_value = {"name": b"a fake GPU"}
    return fake


RIGHT, WRONG = [[7.0, 10.0], [15.0, 22.0]], [[0.0, 0.0], [0.0, 0.0]]


class CUDARuntimeError(RuntimeError):
    """Like CuPy's, whose message goes over several lines."""


BROKEN = {
    "not installed": (None, "CuPy is not installed"),
    "no driver": (
        fake_cupy(CUDARuntimeError("cudaErrorInsufficientDriver: too old\nsecond line")),
        "cudaErrorInsufficientDriver",
    ),
    "wrong results": (fake_cupy(WRONG), "wrong 2 x 2 matrix product"),
}


@pytest.mark.parametrize("state", BROKEN)
def test_without_a_working_gpu_auto_takes_the_cpu_and_cuda_names_the_remedy(state, monkeypatch):
    fake, why = BROKEN[state]
    monkeypatch.setitem(sys.modules, "cupy", fake)
    module, reason = find_device("auto")
    assert module is np and why in reason and "\n" not in reason
    with pytest.raises(RuntimeError, match=r"requirements-cuda1\d\.txt") as error:
        find_device("cuda")
    assert why in str(error.value)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_computes_is_found_and_named(name, monkeypatch):
    fake = fake_cupy(RIGHT)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    module, reason = find_device(name)
    assert module is fake and "a fake GPU" in reason


def test_cpu_is_numpy_and_does_not_import_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(RIGHT))
    assert find_device("cpu")[0] is np


@pytest.mark.parametrize("name", ["gpu", "", None, "cuda:0"])
def test_an_unknown_device_is_refused_by_name(name):
    with pytest.raises(ValueError, match="device must be"):
        find_device(name)


# ------------------------------------------------------------------ the stand-in for CuPy itself


REFUSALS = {
    "np.asarray": lambda x: np.asarray(x),
    "np.array": lambda x: np.array([x, x]),
    "a NumPy function": lambda x: np.sum(x),
    "a NumPy ufunc": lambda x: np.exp(x),
    "NumPy on the left": lambda x: np.ones(3) + x,
    "NumPy on the right": lambda x: x * np.ones(3),
    "NumPy in place": lambda x: x.__iadd__(np.ones(3)),
    "NumPy in comparison": lambda x: x < np.ones(3),
    "NumPy as an argument": lambda x: refusing.concatenate([x, np.ones(3)]),
    "NumPy as a keyword": lambda x: refusing.sum(x, out=np.ones(())),
    "NumPy as an index": lambda x: x[np.array([0])],
    "NumPy assigned": lambda x: x.__setitem__(slice(1), np.ones(1)),
    "filling NumPy": lambda x: np.ones(3).__setitem__(slice(None), x),
    "float of three": lambda x: float(x),
    "bool of three": lambda x: bool(x),
    "a 0-d range": lambda x: range(x.sum()),
    "a 0-d index": lambda x: x[x.argmax()],
    "a 0-d bound": lambda x: x[: x.argmax()],
    "a 0-d iterable": lambda x: list(x.sum()),
    "a 0-d list index": lambda x: [1, 2, 3][x.argmax()],
    "solving two batches": lambda x: refusing.linalg.solve(x[2:, None, None], x[:, None, None]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_stand_in_refuses_what_cupy_refuses(name):
    with pytest.raises((TypeError, ValueError)):
        REFUSALS[name](refusing.asarray(np.arange(3.0)))


def test_the_stand_in_lacks_the_names_that_cupy_lacks():
    for name in ("errstate", "vecdot", "spacing", "random", "no_such_function"):
        assert not hasattr(refusing, name)
    assert not hasattr(refusing.linalg, "matrix_norm") and hasattr(refusing.linalg, "qr")
    assert not hasattr(refusing.asarray(np.ones(3)), "ctypes")


def test_the_stand_in_counts_transfers_and_waits():
    before = dict(refusing.counts)
    x = refusing.asarray(np.arange(3.0))
    assert float(x.sum()) == 3.0 and bool((x >= 0).all()) and x.get().tolist() == [0, 1, 2]
    assert isinstance(x.sum(), refusing.ndarray) and x.sum().shape == x[1].shape == ()
    change = {k: refusing.counts[k] - before[k] for k in before}
    assert change == {"to_device": 1, "to_host": 1, "waits": 2}
