"""What several relatives share: named shapes, heads, activations, a linear recurrence.

Each operation stands beside its vector-Jacobian product (VJP), as in autograd.py.
"""

import autograd as ag
from autograd import Tensor, array_module


def shaped(sizes=None, /, **named):
    """The named arguments as Tensors, each given as (array, "... N d"), the letters of its shape.

    A letter stands for one size in all arguments, `...` for the same batch dimensions; sizes: what
    is known beforehand.  None stays None.  Raises ValueError or TypeError naming the argument.
    """
    sizes, out, first = {"1": 1, **(sizes or {})}, [], None
    for name, (a, letters) in named.items():
        out.append(a if a is None or isinstance(a, Tensor) else Tensor(a))
        if a is None:
            continue
        a, letters, shape = out[-1], letters.split(), list(out[-1].shape)
        if letters[0] == "..." and a.ndim >= len(letters) - 1:
            shape[: a.ndim - len(letters) + 1] = [a.shape[: a.ndim - len(letters) + 1]]
        known = ", ".join(f"{x} = {n}" for x, n in sizes.items() if x in letters and x != "1")
        fits = len(shape) == len(letters) and a.size
        if not fits or any(sizes.setdefault(x, n) != n for x, n in zip(letters, shape)):
            wanted = f"({', '.join(letters)})" + (known and f" with {known}")
            raise ValueError(f"{name} must be {wanted}, got shape {a.shape}")
        first = first or (name, a.dtype)
        if a.dtype != first[1] or a.dtype.name not in ("float32", "float64"):
            raise TypeError(f"{name} must be float32 or float64 like {first[0]}, got {a.dtype}")
    return out


def T(X):
    """The last two axes exchanged, of a Tensor or an array."""
    return X.transpose(*range(X.ndim - 2), X.ndim - 1, X.ndim - 2)


def swap(X):
    """(..., a, b, c) -> (..., b, a, c)"""
    return X.transpose(*range(X.ndim - 3), X.ndim - 2, X.ndim - 3, X.ndim - 1)


def split_heads(X, heads):
    """(..., N, d) -> (..., h, N, d/h)"""
    if heads < 1 or X.shape[-1] % heads:
        raise ValueError(f"heads must divide the width: {heads} heads, width {X.shape[-1]}")
    return swap(X.reshape(*X.shape[:-1], heads, X.shape[-1] // heads))


def join_heads(X):
    """(..., h, N, p) -> (..., N, h p)"""
    return swap(X).reshape(*X.shape[:-3], X.shape[-2], X.shape[-3] * X.shape[-1])


def _sigmoid(a):
    xp = array_module(a)
    s = xp.exp(xp.minimum(a, 0)) / (1 + xp.exp(-abs(a)))  # nothing overflows
    return s, s


sigmoid = ag.operator(_sigmoid, lambda g, s: [g * s * (1 - s)])  # 1/(1 + e^{−a})


def silu(a):
    """a σ(a)"""
    return a * sigmoid(a)


def _scan(A, J):
    S = J.copy()
    for t in range(1, J.shape[-3]):
        S[..., t, :, :] += S[..., t - 1, :, :] @ A[..., t, :, :]
    return S, (A, S)


def _scan_backward(G, saved):
    """The same recurrence from the last to the first: Λ_t = Λ_{t+1} A_{t+1}ᵀ + G_t is ∂/∂J_t."""
    A, S = saved
    after = T(array_module(A).roll(A, -1, axis=-3))  # A_{t+1}ᵀ
    Lam = _scan(after[..., ::-1, :, :], G[..., ::-1, :, :])[0][..., ::-1, :, :]
    dA = array_module(A).zeros_like(A)
    dA[..., 1:, :, :] = T(S[..., :-1, :, :]) @ Lam[..., 1:, :, :]
    return dA, Lam


# S_t = S_{t−1} A_t + J_t from S = 0:  A (..., N, n, n), J (..., N, m, n) -> S (..., N, m, n).
scan = ag.operator(_scan, _scan_backward)
