"""What several relatives share: named shapes, heads, activations."""

import functools
import inspect

import autograd as ag
from autograd import Tensor, array_module


def shaped(**wanted):
    """Makes the arguments of a function Tensors of the shapes `wanted`, each as "... N d".

    A letter stands for one size in all arguments, 3d for three times that of d, `...` for the same
    batch dimensions; None stays None.  Raises ValueError or TypeError naming the argument.
    """

    def decorate(f):
        @functools.wraps(f)
        def checked(*args, **kw):
            bound, sizes = inspect.signature(f).bind(*args, **kw), {}
            for name, a in bound.arguments.items():
                if name in wanted and a is not None:
                    bound.arguments[name] = _fitting(name, a, wanted[name].split(), sizes)
            return f(*bound.args, **bound.kwargs)

        checked.shapes = wanted
        return checked

    return decorate


def _fitting(name, a, letters, sizes):
    """a as a Tensor, of the sizes by letter and of the dtype in `sizes`, which it may add to."""
    a = a if isinstance(a, Tensor) else Tensor(a)
    batch, shape = a.ndim - len(letters) + 1, a.shape
    if letters[0] == "..." and batch >= 0:
        shape = shape[:batch], *shape[batch:]
    sizes |= {x: int(x[0]) * sizes.get(x[1:], 1) for x in letters if x[0].isdigit()}
    known = "".join(f", {x} = {n}" for x, n in sizes.items() if x in letters and x != "1")
    fits = len(shape) == len(letters) and 0 not in shape
    if not fits or any(sizes.setdefault(x, n) != n for x, n in zip(letters, shape)):
        raise ValueError(f"{name} must be ({', '.join(letters)}){known}, got shape {a.shape}")
    if a.dtype != sizes.setdefault("dtype", a.dtype) or a.dtype.name not in ("float32", "float64"):
        raise TypeError(f"{name} must be float32 or float64, as all the others, got {a.dtype}")
    return a


def T(X, i=-2, j=-1):
    """Two axes exchanged, by default the last two, of a Tensor or an array."""
    axes = list(range(X.ndim))
    axes[i], axes[j] = axes[j], axes[i]
    return X.transpose(*axes)


def split_heads(X, heads):
    """(..., N, d) -> (..., h, N, d/h)"""
    if heads < 1 or X.shape[-1] % heads:
        raise ValueError(f"heads must divide the width: {heads} heads, width {X.shape[-1]}")
    return T(X.reshape(*X.shape[:-1], heads, X.shape[-1] // heads), -3, -2)


def join_heads(X):
    """(..., h, N, p) -> (..., N, h p)"""
    return T(X, -3, -2).reshape(*X.shape[:-3], X.shape[-2], X.shape[-3] * X.shape[-1])


def _sigmoid(a):
    xp = array_module(a)
    s = xp.exp(xp.minimum(a, 0)) / (1 + xp.exp(-abs(a)))  # nothing overflows
    return s, s


sigmoid = ag.operator(_sigmoid, lambda g, s: [g * s * (1 - s)])  # 1/(1 + e^{−a})


def silu(a):
    """a σ(a)"""
    return a * sigmoid(a)
