"""Reverse-mode automatic differentiation over NumPy or CuPy arrays, from nothing.

A `Tensor` wraps an array and remembers the operation that made it: its parents and, for each
parent, a vector-Jacobian product (VJP), the map from the gradient of the output to the gradient
of that argument.  `Tensor.backward` walks the graph once, from the output to the leaves, and
applies the VJPs.  Each operation below stands beside its VJPs, in the order of its arguments.

An operator whose backward pass was derived by hand enters the graph through `operator`; that is
how Orthogonal Self-Attention is plugged in.  The gradients are checked by `gradient_check`.
"""

import contextlib
import contextvars
import functools
import math
import sys

import numpy as np

# ------------------------------------------------------------------------------------------ arrays


def array_module(*arrays):
    """The module (`numpy` or `cupy`) that the arrays, or the tensors' arrays, belong to.

    Python's numbers are ignored; with no array at all the answer is `numpy`.
    Raises TypeError for something that is not an array, and for arrays of two modules.
    """
    found = None
    for a in arrays:
        module = _module_of(type(a.data if isinstance(a, Tensor) else a))
        if found is not None and module not in (None, found):
            raise TypeError(
                f"arrays of {found.__name__} and {module.__name__} cannot be mixed; "
                "move them to one device first"
            )
        found = found or module
    return found or np


@functools.cache
def _module_of(kind):
    """The array module that a class belongs to; None for Python's numbers."""
    if issubclass(kind, (bool, int, float)):
        return None
    module = sys.modules[kind.__module__.partition(".")[0]]
    if not (hasattr(kind, "dtype") and hasattr(kind, "shape") and hasattr(module, "ndarray")):
        raise TypeError(f"expected a NumPy or CuPy array, got {kind.__name__}")
    return module


def to_cpu(a):
    """A NumPy copy of a CuPy array (the device is waited for); a NumPy array as it is."""
    return a.get() if hasattr(a, "get") else np.asarray(a)


def product(A, B):
    """A @ B for arrays (..., n, k) and (..., k, m).

    Every matrix product of a tensor comes by here, so that a device may have it done in another
    way: `fast` puts one in this place that spares CuPy's copies.
    """
    return A @ B


# ------------------------------------------------------------------------------------ the graph

_recording = contextvars.ContextVar("recording", default=True)  # one value per thread


@contextlib.contextmanager
def no_grad():
    """Inside this context no graph is recorded."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Tensor:
    """An array, its gradient, and the operation that made it.

    data: a NumPy or CuPy array (anything else is converted by NumPy).
    requires_grad: whether `backward` should add to `.grad` (an array of the same shape and dtype).
    """

    __slots__ = ("data", "grad", "requires_grad", "_parents", "_backward")
    __array_ufunc__ = None  # let `array * Tensor` reach Tensor.__rmul__

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("a Tensor cannot wrap a Tensor")
        self.data = data if hasattr(data, "dtype") and hasattr(data, "ndim") else np.asarray(data)
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(f"only floating-point tensors have gradients, got {self.data.dtype}")
        self.grad = None
        self.requires_grad = requires_grad
        self._parents = ()
        self._backward = None  # gradient of this tensor -> one gradient (or None) per parent

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    dtype = property(lambda self: self.data.dtype)
    size = property(lambda self: self.data.size)

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        return f"Tensor({self.data!r}, requires_grad={self.requires_grad})"

    def backward(self, grad=None):
        """Adds the gradient of ⟨grad, self⟩ to `.grad` of every leaf that requires one.

        grad: array of this tensor's shape; may be left out for a tensor of size 1.
        The graph is freed on the way, so each graph can be walked once.
        Raises RuntimeError if there is nothing to differentiate or the graph was used already,
        ValueError for a `grad` of the wrong shape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() on a tensor that requires no gradient")
        if self._backward is _USED:
            raise RuntimeError("this graph was freed by an earlier backward(); build it again")
        xp = array_module(self.data)
        if grad is None:
            if self.size != 1:
                raise ValueError(f"backward() needs a gradient for a tensor of shape {self.shape}")
            grad = xp.ones_like(self.data)
        if isinstance(grad, Tensor):
            raise TypeError("grad must be an array, not a Tensor")
        array_module(self.data, grad)  # TypeError for what is no array
        if grad.shape != self.shape or grad.dtype != self.dtype:
            raise ValueError(
                f"grad has shape {grad.shape} and dtype {grad.dtype}, "
                f"the tensor {self.shape} and {self.dtype}"
            )

        grads = {id(self): grad}
        for node in reversed(topological_order(self)):
            g = grads.pop(id(node))
            if node._backward is None:  # a leaf: accumulate, in memory of its own
                if node.grad is None:
                    node.grad = xp.array(g, dtype=node.dtype)
                else:
                    node.grad += g
                continue
            if node._backward is _USED:
                raise RuntimeError("part of this graph was freed by an earlier backward()")
            parent_grads = node._backward(g)
            for parent, gp in zip(node._parents, parent_grads):
                if not parent.requires_grad:
                    continue
                if gp.shape != parent.shape:
                    raise ValueError(f"a VJP gave shape {gp.shape} for an argument {parent.shape}")
                # Sum into a new array, never in place: `add` hands the same array to both
                # parents, and an in-place sum would change the other one's gradient.
                k = id(parent)
                grads[k] = grads[k] + gp if k in grads else gp
            node._parents, node._backward = (), _USED  # free what the operation saved


def _USED(grad):
    """Marks a node whose saved arrays have been freed."""


def topological_order(output):
    """The tensors that `output` depends on and that need a gradient, parents before children.

    Why an order at all: in `b = a + a; c = b + b` the node b is reached twice from c.  Passing
    its gradient on at each visit would send the first half twice; b must wait until both halves
    have arrived.  In a topological order every child comes after its parents, so, walked
    backwards, a node's gradient is complete when its turn comes.
    The depth-first search keeps its own stack: recursion would overflow on long chains.
    """
    order, seen, stack = [], {id(output)}, [(output, iter(output._parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if parent.requires_grad and id(parent) not in seen:
                seen.add(id(parent))
                stack.append((parent, iter(parent._parents)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def unbroadcast(g, shape):
    """The adjoint of broadcasting `shape` to g.shape: sums g over the axes that were stretched."""
    if g.shape == tuple(shape):
        return g
    new = g.ndim - len(shape)
    if new < 0 or any(n not in (1, m) for n, m in zip(shape, g.shape[new:])):
        raise ValueError(f"shape {tuple(shape)} does not broadcast to {g.shape}")
    g = g.sum(axis=tuple(range(new)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True) if stretched else g


def record(data, parents, backward):
    """A Tensor for `data`, made from the tensors `parents`.

    backward: takes the gradient of `data`, returns a sequence of one gradient per parent;
    entries for parents that need none may be None.  It is kept only if a graph is recorded.
    """
    out = Tensor(data)
    if _recording.get() and any(p.requires_grad for p in parents):
        out.requires_grad, out._parents, out._backward = True, tuple(parents), backward
    return out


def operator(forward, backward):
    """Turns a pair of plain-array functions into an operation on tensors.

    forward(*arrays) -> (output, saved);  backward(grad, saved) -> one gradient per argument.
    This is the door for operators with a manual backward pass.
    """

    def apply(*args):
        parents = _tensors(*args)
        out, saved = forward(*(p.data for p in parents))
        return record(out, parents, lambda g: backward(g, saved))

    return apply


def _tensors(*args):
    """Tensors of one module; Python scalars take the dtype of the arrays beside them."""
    arrays = [a.data if isinstance(a, Tensor) else a for a in args]
    xp = array_module(*arrays)
    dtype = next((a.dtype for a in arrays if hasattr(a, "dtype") and a.dtype.kind == "f"), None)
    return [
        a
        if isinstance(a, Tensor)
        # A number is written by the device itself, where `asarray` would be a transfer.
        else Tensor(xp.full((), a, dtype) if isinstance(a, (bool, int, float)) else xp.asarray(a))
        for a in args
    ]


def _elementwise(out, parents, *vjps):
    """Records an operation with broadcasting: one VJP per parent, in argument order."""

    def backward(g):
        return [
            unbroadcast(vjp(g), p.shape) if p.requires_grad else None
            for p, vjp in zip(parents, vjps)
        ]

    return record(out, parents, backward)


# ------------------------------------------------------------------------------- the operations


def add(a, b):
    """a + b, with broadcasting."""
    a, b = _tensors(a, b)
    return _elementwise(a.data + b.data, (a, b), lambda g: g, lambda g: g)


def subtract(a, b):
    """a − b, with broadcasting."""
    a, b = _tensors(a, b)
    return _elementwise(a.data - b.data, (a, b), lambda g: g, lambda g: -g)


def multiply(a, b):
    """a · b elementwise, with broadcasting."""
    a, b = _tensors(a, b)
    return _elementwise(a.data * b.data, (a, b), lambda g: g * b.data, lambda g: g * a.data)


def divide(a, b):
    """a / b elementwise, with broadcasting."""
    a, b = _tensors(a, b)
    out = a.data / b.data
    return _elementwise(out, (a, b), lambda g: g / b.data, lambda g: -g * out / b.data)


def power(a, exponent):
    """a ** exponent for a constant Python number."""
    if not isinstance(exponent, (int, float)):
        raise TypeError(f"exponent must be a Python number, got {type(exponent).__name__}")
    (a,) = _tensors(a)
    lower = exponent - 1 if exponent else 0  # a⁰ is constant, also at 0
    return _elementwise(a.data**exponent, (a,), lambda g: g * (exponent * a.data**lower))


def exp(a):
    """e ** a elementwise."""
    (a,) = _tensors(a)
    out = array_module(a).exp(a.data)
    return _elementwise(out, (a,), lambda g: g * out)


def log(a):
    """The natural logarithm elementwise."""
    (a,) = _tensors(a)
    return _elementwise(array_module(a).log(a.data), (a,), lambda g: g / a.data)


def sqrt(a):
    """The square root elementwise."""
    (a,) = _tensors(a)
    out = array_module(a).sqrt(a.data)
    return _elementwise(out, (a,), lambda g: g * (0.5 / out))


def maximum(a, constant):
    """max(a, constant) elementwise for a Python number; gradient 0 where the constant wins."""
    (a,) = _tensors(a)
    out = array_module(a).maximum(a.data, constant)
    return _elementwise(out, (a,), lambda g: g * (a.data > constant))


def leaky_relu(a, slope, gain=1.0):
    """gain · (a if a > 0 else slope · a), for 0 ≤ slope ≤ 1 and gain > 0."""
    if not (0 <= slope <= 1 and gain > 0):
        raise ValueError(f"slope must be in 0 … 1 and gain positive, got {slope} and {gain}")
    (a,) = _tensors(a)
    out = array_module(a).maximum(gain * a.data, (gain * slope) * a.data)

    def vjp(g):  # g · (low or gain); arithmetic on the mask is 6 times faster than `where`
        derivative = (out > 0).astype(g.dtype)
        derivative *= gain * (1 - slope)
        derivative += gain * slope
        derivative *= g
        return derivative

    return _elementwise(out, (a,), vjp)


def sum(a, axis=None, keepdims=False):
    """The sum over `axis` (an int, a tuple of ints, or None for all)."""
    (a,) = _tensors(a)
    xp = array_module(a)
    out = a.data.sum(axis=axis, keepdims=keepdims)

    def backward(g):
        if axis is not None and not keepdims:
            g = xp.expand_dims(g, axis)
        return [xp.broadcast_to(g, a.shape)]

    return record(out, (a,), backward)


def mean(a, axis=None, keepdims=False):
    """The mean over `axis`."""
    (a,) = _tensors(a)
    if not a.size:
        raise ValueError(f"no mean of an empty tensor, shape {a.shape}")
    out = sum(a, axis, keepdims)
    return out * (out.size / a.size)


def reshape(a, shape):
    """The same entries in another shape."""
    (a,) = _tensors(a)
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
    return record(a.data.reshape(shape), (a,), lambda g: [g.reshape(a.shape)])


def transpose(a, axes=()):
    """The axes in another order; reversed when none is given."""
    (a,) = _tensors(a)
    axes = tuple(axes) or tuple(reversed(range(a.ndim)))
    out = a.data.transpose(axes)
    inverse = sorted(range(a.ndim), key=lambda i: axes[i] % a.ndim)
    return record(out, (a,), lambda g: [g.transpose(inverse)])


def getitem(a, index):
    """a[index] for ints, slices, `...` and None (not for integer arrays)."""
    (a,) = _tensors(a)
    for i in index if isinstance(index, tuple) else (index,):
        if not (i is None or i is Ellipsis or isinstance(i, (int, slice))):
            raise TypeError(
                f"index must be made of ints, slices, ... and None, got {type(i).__name__}"
            )

    def backward(g):
        full = array_module(g).zeros(a.shape, g.dtype)
        full[index] = g
        return [full]

    return record(a.data[index], (a,), backward)


def concatenate(tensors, axis=-1):
    """Tensors joined along `axis`."""
    tensors = _tensors(*tensors)
    xp = array_module(*tensors)
    out = xp.concatenate([t.data for t in tensors], axis=axis)
    ends = np.cumsum([t.shape[axis] for t in tensors])[:-1].tolist()
    return record(out, tensors, lambda g: xp.split(g, ends, axis=axis))


def matmul(a, b):
    """a @ b for arrays of two or more dimensions, with broadcasting over the leading ones.

    ∂/∂a: g bᵀ,  ∂/∂b: aᵀ g.
    """
    a, b = _tensors(a, b)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul needs (..., n, k) and (..., k, m), got {a.shape} and {b.shape}")
    if b.ndim == 2 and a.ndim > 2:  # (..., N, k) x (k, m): one large product, not many small ones
        rows = reshape(a, (math.prod(a.shape[:-1]), a.shape[-1]))
        return reshape(matmul(rows, b), (*a.shape[:-1], b.shape[-1]))
    return _elementwise(
        product(a.data, b.data),
        (a, b),
        lambda g: product(g, b.data.swapaxes(-1, -2)),
        lambda g: product(a.data.swapaxes(-1, -2), g),
    )


def linear(X, W, b):
    """X W + b for X (..., k), W (k, m), b (m,): one large product whatever the batch dimensions.

    ∂/∂X: g Wᵀ,  ∂/∂W: Xᵀ g,  ∂/∂b: the sum of g over all rows.
    """
    X, W, b = _tensors(X, W, b)
    if W.ndim != 2 or X.shape[-1:] != W.shape[:1] or b.shape != W.shape[1:]:
        raise ValueError(
            f"linear needs (..., k), (k, m), (m,), got {X.shape}, {W.shape}, {b.shape}"
        )
    rows = X.data.reshape(math.prod(X.shape[:-1]), W.shape[0])
    out = product(rows, W.data)
    out += b.data

    def backward(g):
        g = g.reshape(len(rows), W.shape[1])
        dX = product(g, W.data.T).reshape(X.shape) if X.requires_grad else None
        return dX, product(rows.T, g), g.sum(axis=0)

    return record(out.reshape(*X.shape[:-1], W.shape[1]), (X, W, b), backward)


def softmax(a):
    """Softmax over the last axis; VJP: p ∘ (g − ⟨g, p⟩)."""
    (a,) = _tensors(a)
    xp = array_module(a)
    p = xp.exp(a.data - a.data.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return record(p, (a,), lambda g: [p * (g - (g * p).sum(axis=-1, keepdims=True))])


def cross_entropy(logits, labels):
    """Mean cross-entropy of (B, C) logits against (B,) integer labels; VJP: (p − onehot) / B."""
    (logits,) = _tensors(logits)
    xp = array_module(logits, labels)
    if isinstance(labels, (Tensor, int, float)):
        raise TypeError(f"labels must be an array, not a {type(labels).__name__}")
    if (
        logits.size == 0
        or logits.ndim != 2
        or labels.shape != logits.shape[:1]
        or labels.dtype.kind not in "iu"
    ):
        raise ValueError(
            "cross_entropy needs (B, C) logits and (B,) integer labels, "
            f"got {logits.shape} and {labels.dtype} {labels.shape}"
        )
    if xp is np and not 0 <= labels.min() <= labels.max() < logits.shape[1]:  # no wait on a GPU
        raise ValueError(
            f"labels must be in 0 … {logits.shape[1] - 1}, got {labels.min()} … {labels.max()}"
        )
    onehot = labels[:, None] == xp.arange(logits.shape[1])
    z = logits.data - logits.data.max(axis=-1, keepdims=True)
    log_p = z - xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    loss = -xp.where(onehot, log_p, 0).sum() / len(labels)  # not a product: −∞ · 0 is NaN
    return record(loss, (logits,), lambda g: [(xp.exp(log_p) - onehot) * (g / len(labels))])


# The operators of Python and the methods of a Tensor.  A number or an array on the other side
# becomes a constant.
Tensor.__add__, Tensor.__radd__ = add, lambda b, a: add(a, b)
Tensor.__sub__, Tensor.__rsub__ = subtract, lambda b, a: subtract(a, b)
Tensor.__mul__, Tensor.__rmul__ = multiply, lambda b, a: multiply(a, b)
Tensor.__truediv__, Tensor.__rtruediv__ = divide, lambda b, a: divide(a, b)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda b, a: matmul(a, b)
Tensor.__neg__ = lambda a: multiply(a, -1.0)
Tensor.__pow__, Tensor.__getitem__ = power, getitem
Tensor.sum, Tensor.mean = sum, mean
Tensor.reshape = lambda a, *shape: reshape(a, shape)
Tensor.transpose = lambda a, *axes: transpose(a, axes)


# ------------------------------------------------------------------------------- gradient check


def gradient_check(f, *arrays, rng=None, step=None, directions=3):
    """The largest relative error of the gradients of `f` against central differences.

    f: maps tensors to one tensor.  arrays: its arguments, float64 (NumPy or CuPy).
    For random cotangents G and random tangents D it compares ⟨vjp(G), D⟩ with
    ⟨G, (f(x + hD) − f(x − hD)) / 2h⟩, all arguments at once and each alone.  Both are random:
    a cotangent of ones is blind to any f with a constant sum, and ΣO² is constant for orthogonal f.
    h = eps^(1/3), where truncation O(h²) and rounding O(eps/h) are both about eps^(2/3) ≈ 4e-11.
    Raises TypeError unless every array is float64.
    """
    for a in arrays:
        if getattr(a, "dtype", None) != np.float64:
            got = getattr(a, "dtype", type(a).__name__)
            raise TypeError(f"gradient_check needs float64 arrays, got {got}")
    rng = rng or np.random.default_rng(0)
    xp = array_module(*arrays)
    h = step or np.finfo(np.float64).eps ** (1 / 3)

    def draw(shape):
        return xp.asarray(rng.standard_normal(shape))

    worst = 0.0
    for _ in range(directions):
        inputs = [Tensor(xp.array(a), requires_grad=True) for a in arrays]
        out = f(*inputs)
        G = draw(out.shape)
        out.backward(G)
        tangents = [draw(a.shape) for a in arrays]
        for which in [range(len(arrays)), *([i] for i in range(len(arrays)))]:
            D = [t if i in which else xp.zeros_like(t) for i, t in enumerate(tangents)]
            with no_grad():
                up = f(*(Tensor(a + h * d) for a, d in zip(arrays, D))).data
                down = f(*(Tensor(a - h * d) for a, d in zip(arrays, D))).data
            numeric = float((G * (up - down)).sum()) / (2 * h)
            pairs = [(t.grad, d) for t, d in zip(inputs, D) if t.grad is not None]
            analytic = math.fsum(float((g * d).sum()) for g, d in pairs)
            # Relative to the size of the terms summed, so that cancellation cannot hide an error
            # nor invent one.
            scale = math.fsum(float(abs(g * d).sum()) for g, d in pairs)
            scale = max(scale, float(abs(G * (up - down)).sum()) / (2 * h), 1e-300)
            error = abs(analytic - numeric) / scale
            if not math.isfinite(error):
                return math.inf  # NaN compares false with everything, also with a tolerance
            worst = max(worst, error)
    return worst
