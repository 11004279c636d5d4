"""Reverse-mode automatic differentiation over NumPy or CuPy arrays, from nothing.

A `Tensor` wraps an array and remembers the operation that made it: its parents and, for each of
them, a vector-Jacobian product (VJP), which takes the gradient of the output to that of the parent.
`Tensor.backward` walks the graph once, from the output to the leaves, and applies the VJPs.  Each
operation stands beside its VJPs, in the order of its arguments; one whose backward pass was derived
by hand, as that of Orthogonal Self-Attention, comes in through `operator`.
"""

import contextlib
import contextvars
import functools
import inspect
import math
import sys

import numpy as np

# ------------------------------------------------------------------------------------------ arrays

NUMBERS = bool, int, float, np.bool_, np.integer, np.floating


def array_module(*arrays):
    """The module (`numpy` or `cupy`) that the arrays, or the tensors' arrays, belong to.

    Numbers, Python's or NumPy's, are ignored; with no array at all the answer is `numpy`.
    Raises TypeError for something that is not an array, and for arrays of two modules.
    """
    found = None
    for a in arrays:
        module = _module_of(type(a.data if isinstance(a, Tensor) else a))
        if found is not None and module not in (None, found):
            names = f"{found.__name__} and {module.__name__}"
            raise TypeError(f"arrays of {names} cannot be mixed; move them to one device first")
        found = found or module
    return found or np


@functools.cache
def _module_of(kind):
    """The array module that a class belongs to; None for numbers."""
    if issubclass(kind, NUMBERS):
        return None
    if issubclass(kind, np.ndarray) and kind not in (np.ndarray, np.memmap):  # another `*` or `sum`
        raise TypeError(f"expected a plain array, got {kind.__name__}; np.asarray makes one")
    module = sys.modules[kind.__module__.partition(".")[0]]
    if not (hasattr(kind, "dtype") and hasattr(kind, "shape") and hasattr(module, "ndarray")):
        raise TypeError(f"expected a NumPy or CuPy array, got {kind.__name__}")
    return module


def to_cpu(a):
    """A NumPy copy of a CuPy array (the device is waited for); a NumPy array as it is."""
    return a.get() if hasattr(a, "get") else np.asarray(a)


def product(A, B):
    """A @ B of arrays, for all tensors; `fast` puts a function here that spares CuPy's copies."""
    return A @ B


# ------------------------------------------------------------------------------------ the graph

_recording = contextvars.ContextVar("recording", default=True)  # one value per thread


@contextlib.contextmanager
def no_grad():
    """Inside this context no graph is recorded.

    RuntimeError in a generator: whoever asked it for a value would be inside as well.
    """
    frame, names = sys._getframe(), {"__enter__", "__aenter__", "enter_context"}
    while frame.f_back and names & {frame.f_code.co_name, frame.f_back.f_code.co_name}:
        frame = frame.f_back  # out of this and of other contexts, to the `with`
    if frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        raise RuntimeError("no_grad() in a generator would hold outside of it between two values")
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Tensor:
    """An array, its gradient, and the operation that made it.

    data: a NumPy or CuPy array or a NumPy scalar (anything else is converted by NumPy).
    requires_grad: of a leaf, that `backward` adds to `.grad`; of a result, that it passes through.
    """

    __slots__ = ("data", "grad", "requires_grad", "_parents", "_backward")
    __array_ufunc__ = None  # let `array * Tensor` reach Tensor.__rmul__

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("a Tensor cannot wrap a Tensor")
        self.data = data if hasattr(data, "dtype") and hasattr(data, "ndim") else np.asarray(data)
        array_module(self.data)  # TypeError for what is no array
        if self.data.dtype.kind not in "biufc":
            raise TypeError(f"a tensor is an array of numbers, got {self.data.dtype}")
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

    def __repr__(self):
        return f"Tensor({self.data!r}, requires_grad={self.requires_grad})"

    def __array__(self, *args, **kw):
        raise TypeError("a Tensor is no array; take its .data")

    def backward(self, grad=None):
        """Adds the gradient of ⟨grad, self⟩ to `.grad` of every leaf that requires one.

        grad: array of this tensor's shape; may be left out for a tensor of size 1.
        The graph is freed on the way, so each graph can be walked once.
        Raises RuntimeError if there is nothing to differentiate or the graph was used already,
        ValueError for a `grad` of the wrong shape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() on a tensor that requires no gradient")
        xp = array_module(self.data)
        if grad is None or isinstance(grad, NUMBERS):
            if self.size != 1:
                raise ValueError(f"backward() needs a gradient for a tensor of shape {self.shape}")
            grad = xp.full_like(self.data, 1 if grad is None else grad)
        array_module(self.data, grad)  # TypeError for what is no array
        if (type(grad) is Tensor, grad.shape, grad.dtype) != (False, self.shape, self.dtype):
            got = f"{type(grad).__name__} {grad.dtype} {grad.shape}"
            raise ValueError(f"grad must be {self.dtype} {self.shape} as the tensor, got {got}")
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
                raise RuntimeError("this graph was freed by an earlier backward(); build it again")
            parents, got = node._parents, node._backward(frozen(g))
            got = got if isinstance(got, (list, tuple)) else [got]
            gave = f"the backward pass of {node._backward.__qualname__.partition('.')[0]} gave"
            if len(got) != len(parents):
                raise ValueError(f"{gave} {len(got)} gradients for {len(parents)} arguments")
            for p, gp in zip(parents, got):
                if not p.requires_grad:
                    continue
                if getattr(gp, "shape", None) != p.shape or not p.dtype <= gp.dtype:
                    it = f"{gp.dtype} {gp.shape}" if hasattr(gp, "dtype") else gp
                    raise ValueError(f"{gave} a gradient {it} for an argument {p.shape} {p.dtype}")
                array_module(p, gp)  # TypeError for what is no plain array
                # Never in place: `add` hands the same array to both parents.
                grads[id(p)] = grads[id(p)] + gp if id(p) in grads else gp
            node._parents, node._backward = (), _USED  # free what the operation saved


_USED = object()  # in the place of a backward pass whose saved arrays have been freed


def topological_order(output):
    """The tensors that `output` depends on and that need a gradient, parents before children.

    Why an order at all: in `b = a + a; c = b + b` the node b is reached twice from c.  Passing
    its gradient on at each visit would send the first half twice; b must wait until both halves
    have arrived.  In a topological order every child comes after its parents, so, walked
    backwards, a node's gradient is complete when its turn comes.  (Recursion would overflow.)
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
    g = total(g, axis=tuple(range(new)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return total(g, axis=stretched, keepdims=True) if stretched else g


def record(data, parents, backward):
    """A Tensor for `data`, made from the tensors `parents`.

    backward: takes the gradient of `data`, returns one gradient per parent, or None for those that
    need none; it is kept only if a graph is recorded.
    """
    out = Tensor(data)
    if _recording.get() and any(p.requires_grad for p in parents):
        out.requires_grad, out._parents, out._backward = True, tuple(parents), backward
        out.data = frozen(out.data)
    return out


def frozen(a):
    """A view of a NumPy array that cannot be written, as the backward pass will read it again."""
    if isinstance(a, np.ndarray):
        a = a.view(np.ndarray)
        a.flags.writeable = False
    return a


def operator(forward, backward):
    """Turns a pair of plain-array functions into an operation on tensors.

    forward(*arrays) -> (output, saved);  backward(grad, saved) -> one gradient per argument.
    """

    def apply(*args):
        parents, name = _tensors(*args), getattr(forward, "__name__", "an operator")
        result = forward(*_values(*parents))
        if not isinstance(result, (list, tuple)) or len(result) != 2:
            raise TypeError(f"{name} must give back (output, saved), got {type(result).__name__}")
        out, saved = result

        def vjp(g):
            return backward(g, saved)

        vjp.__qualname__ = name
        return record(out, parents, vjp)

    return apply


def _tensors(*args):
    """Tensors of one module; numbers, also 0-d arrays, take the dtype of their neighbours."""
    args = [a[()] if isinstance(a, np.ndarray) and not a.ndim else a for a in args]
    others = [a for a in args if not isinstance(a, NUMBERS)]
    xp, dtype = array_module(*others), next((a.dtype for a in others if a.dtype.kind == "f"), None)
    # A number is written by the device itself, where `asarray` would be a transfer.
    tensors = (Tensor(xp.full((), a, dtype)) if isinstance(a, NUMBERS) else a for a in args)
    return [a if isinstance(a, Tensor) else Tensor(a) for a in tensors]


def _values(*tensors):
    """The arrays that an operation keeps; copies of leaves, as an optimiser may change those."""
    if not _recording.get() or not any(t.requires_grad for t in tensors):
        return [t.data for t in tensors]
    return [t.data if t._parents else array_module(t).array(t.data) for t in tensors]


def _elementwise(out, parents, *vjps):
    """Records an operation with broadcasting: one VJP per parent, in argument order."""
    return record(out, parents, lambda g: [
        unbroadcast(vjp(g), p.shape) if p.requires_grad else None for p, vjp in zip(parents, vjps)
    ])  # fmt: skip


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
    A, B = _values(a, b)
    return _elementwise(A * B, (a, b), lambda g: g * B, lambda g: g * A)


def divide(a, b):
    """a / b elementwise, with broadcasting."""
    a, b = _tensors(a, b)
    A, B = _values(a, b)
    out = A / B
    return _elementwise(out, (a, b), lambda g: g / B, lambda g: -g * out / B)


def power(a, exponent):
    """a ** exponent for a constant number."""
    if not isinstance(exponent, NUMBERS):
        raise TypeError(f"exponent must be a number, got {type(exponent).__name__}")
    (a,) = _tensors(a)
    (A,), n = _values(a), exponent if isinstance(exponent, int) else float(exponent)
    lower = n - 1 if n else 0  # a⁰ is constant, also at 0
    return _elementwise(A**n, (a,), lambda g: g * (n * A**lower))


def exp(a):
    """e ** a elementwise."""
    (a,) = _tensors(a)
    out = array_module(a).exp(a.data)
    return _elementwise(out, (a,), lambda g: g * out)


def log(a):
    """The natural logarithm elementwise."""
    (a,) = _tensors(a)
    (A,) = _values(a)
    return _elementwise(array_module(A).log(A), (a,), lambda g: g / A)


def sqrt(a):
    """The square root elementwise."""
    return power(a, 0.5)


def maximum(a, b):
    """max(a, b) elementwise, with broadcasting; where they are equal the gradient is that of b."""
    a, b = _tensors(a, b)
    A, B = _values(a, b)
    out = array_module(A).maximum(A, B)
    return _elementwise(out, (a, b), lambda g: g * (A > B), lambda g: g * (A <= B))


def leaky_relu(a, slope, gain=1.0):
    """gain · (a if a > 0 else slope · a), for 0 ≤ slope ≤ 1 and gain > 0."""
    if not (0 <= slope <= 1 and gain > 0):
        raise ValueError(f"slope must be in 0 … 1 and gain positive, got {slope} and {gain}")
    (a,), slope, gain = _tensors(a), float(slope), float(gain)
    low = gain * slope * a.data if slope else 0  # not 0 · ∞
    out = array_module(a).maximum(gain * a.data, low)

    def vjp(g):  # arithmetic on the mask, in place: 6 times faster than `where`
        d = (out > 0) * g.dtype.type(gain * (1 - slope))
        d += g.dtype.type(gain * slope)
        d *= g
        return d

    return _elementwise(out, (a,), vjp)


def total(a, axis=None, keepdims=False, mean=False):
    """The sum or mean of an array, in float64: NumPy would add up rows one by one in float32."""
    wide = np.float64 if array_module(a) is np and a.dtype.kind == "f" else None
    out = a.sum(axis=axis, dtype=wide, keepdims=keepdims)
    out = out * (out.size / a.size) if mean else out
    return out.astype(a.dtype, copy=False) if a.dtype.kind == "f" else out


def sum(a, axis=None, keepdims=False, mean=False):
    """The sum over `axis` (an int, a tuple of ints, or None for all)."""
    (a,) = _tensors(a)
    out, xp = total(a.data, axis, keepdims, mean), array_module(a)
    weight = out.size / a.size if mean else 1.0

    def backward(g):
        g = g if axis is None or keepdims or not a.ndim else xp.expand_dims(g, axis)
        return [xp.broadcast_to(weight * g, a.shape)]

    return record(out, (a,), backward)


def mean(a, axis=None, keepdims=False):
    """The mean over `axis`."""
    (a,) = _tensors(a)
    if not a.size:
        raise ValueError(f"no mean of an empty tensor, shape {a.shape}")
    return sum(a, axis, keepdims, mean=True)


def reshape(a, shape):
    """The same entries in another shape."""
    (a,) = _tensors(a)
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    return record(_values(a)[0].reshape(shape), (a,), lambda g: [g.reshape(a.shape)])


def transpose(a, axes=()):
    """The axes in another order; reversed when none is given."""
    (a,) = _tensors(a)
    axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (list, tuple)) else axes
    axes = tuple(axes) or tuple(reversed(range(a.ndim)))
    out = _values(a)[0].transpose(axes)
    inverse = sorted(range(a.ndim), key=lambda i: axes[i] % a.ndim)
    return record(out, (a,), lambda g: [g.transpose(inverse)])


def getitem(a, index):
    """a[index] for ints, slices, `...` and None (not for integer arrays)."""
    (a,) = _tensors(a)
    for i in index if isinstance(index, tuple) else (index,):
        if not (i is None or i is Ellipsis or isinstance(i, (int, np.integer, slice))):
            raise TypeError(f"index must be ints, slices, ... and None, got {type(i).__name__}")

    def backward(g):
        full = array_module(g).zeros(a.shape, g.dtype)
        full[index] = g
        return [full]

    return record(_values(a)[0][index], (a,), backward)


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
    A, B = _values(a, b)
    At, Bt = A.swapaxes(-1, -2), B.swapaxes(-1, -2)
    return _elementwise(product(A, B), (a, b), lambda g: product(g, Bt), lambda g: product(At, g))


def linear(X, W, b):
    """X W + b for X (..., k), W (k, m), b (m,): one large product whatever the batch dimensions.

    ∂/∂X: g Wᵀ,  ∂/∂W: Xᵀ g,  ∂/∂b: the sum of g over all rows.
    """
    X, W, b = _tensors(X, W, b)
    if W.ndim != 2 or X.shape[-1:] != W.shape[:1] or b.shape != W.shape[1:]:
        raise ValueError(f"linear needs (..., k), (k, m), (m,): {X.shape}, {W.shape}, {b.shape}")
    x, w, _ = _values(X, W, b)
    rows = x.reshape(math.prod(X.shape[:-1]), W.shape[0])
    out = product(rows, w)
    out += b.data

    def backward(g):
        g = g.reshape(len(rows), W.shape[1])
        dX = product(g, w.T).reshape(X.shape) if X.requires_grad else None
        return dX, product(rows.T, g), total(g, axis=0)

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
    form = None if isinstance(labels, (Tensor, int, float)) else (labels.ndim, labels.dtype.kind)
    fits = form in ((1, "i"), (1, "u")) and logits.ndim == 2 and logits.size
    if not fits or len(labels) != len(logits.data):
        got = f"{logits.shape} and {labels!r}"[:200]
        raise ValueError(f"cross_entropy needs (B, C) logits and (B,) integer labels, got {got}")
    if xp is np and not 0 <= labels.min() <= labels.max() < logits.shape[1]:  # no wait on a GPU
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, classes {logits.shape[1]}")
    onehot = labels[:, None] == xp.arange(logits.shape[1])
    z = logits.data - logits.data.max(axis=-1, keepdims=True)
    log_p = z - xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    loss = total(xp.where(onehot, -log_p, 0).sum(axis=1), mean=True)  # no product: −∞ · 0 is NaN
    return record(loss, (logits,), lambda g: [(xp.exp(log_p) - onehot) * (g / len(labels))])


# Operators and methods; a number or an array on the other side becomes a constant.
Tensor.__add__, Tensor.__radd__ = add, lambda b, a: add(a, b)
Tensor.__sub__, Tensor.__rsub__ = subtract, lambda b, a: subtract(a, b)
Tensor.__mul__, Tensor.__rmul__ = multiply, lambda b, a: multiply(a, b)
Tensor.__truediv__, Tensor.__rtruediv__ = divide, lambda b, a: divide(a, b)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda b, a: matmul(a, b)
Tensor.__neg__ = lambda a: multiply(a, -1.0)
Tensor.__pow__, Tensor.__getitem__, Tensor.sum, Tensor.mean = power, getitem, sum, mean
Tensor.reshape = lambda a, *shape: reshape(a, shape)
Tensor.transpose = lambda a, *axes: transpose(a, axes)


# ------------------------------------------------------------------------------- gradient check


def gradient_check(f, *arrays, rng=None, directions=3):
    """The largest relative error of the gradients of `f` against central differences.

    f: maps tensors to one tensor.  arrays: its arguments, float64, else TypeError.
    For random cotangents G and random tangents D it compares ⟨vjp(G), D⟩ with
    ⟨G, (f(x + hD) − f(x − hD)) / 2h⟩, all arguments at once and each alone.  Both are random:
    a cotangent of ones is blind to any f with a constant sum, and ΣO² is constant for orthogonal f.
    h = eps^(1/3), where truncation O(h²) and rounding O(eps/h) are both about eps^(2/3) ≈ 4e-11.
    """
    for a in arrays:
        if isinstance(a, Tensor) or getattr(a, "dtype", None) != np.float64:
            got = f"{type(a).__name__} of {getattr(a, 'dtype', 'no dtype')}"
            raise TypeError(f"gradient_check needs float64 arrays, got {got}")
    rng, xp = rng or np.random.default_rng(0), array_module(*arrays)
    worst, h = 0.0, np.finfo(np.float64).eps ** (1 / 3)
    for _ in range(directions):
        inputs = [Tensor(xp.array(a), requires_grad=True) for a in arrays]
        (out,) = _tensors(f(*inputs))  # TypeError where f gives no tensor or array
        G, *tangents = (xp.asarray(rng.standard_normal(a.shape)) for a in (out, *arrays))
        out.backward(G)
        for which in [range(len(arrays)), *([i] for i in range(len(arrays)))]:
            D = [t if i in which else xp.zeros_like(t) for i, t in enumerate(tangents)]
            with no_grad():
                up = f(*(Tensor(a + h * d) for a, d in zip(arrays, D))).data
                down = f(*(Tensor(a - h * d) for a, d in zip(arrays, D))).data
            numeric = float((G * (up - down)).sum()) / (2 * h)
            pairs = [(t.grad, d) for t, d in zip(inputs, D) if t.grad is not None]
            analytic = math.fsum(float((g * d).sum()) for g, d in pairs)
            # Relative to the size of the terms: cancellation neither hides nor invents an error.
            scale = math.fsum(float(abs(g * d).sum()) for g, d in pairs)
            scale = max(scale, float(abs(G * (up - down)).sum()) / (2 * h), 1e-300)
            error = abs(analytic - numeric) / scale
            if not math.isfinite(error):
                return math.inf  # NaN compares false with everything, also with a tolerance
            worst = max(worst, error)
    return worst
