"""AdamW, Muon on orthogonal matrices, gradient clipping and the learning-rate schedule.

Parameters are a dict name -> Tensor, all of one dtype.  State is a dict name -> array, for
checkpoints.  Clipping and the optimisers join their parameters to one array first: on a GPU an
operation costs its launch, whatever its size, and a network has hundreds of small parameters.
"""

import math

import numpy as np

from autograd import array_module, fused
from products import product


def schedule(step, steps, warmup):
    """The factor on the learning rate: linear warm-up to 1, then half a cosine down to 0."""
    if not step >= 0:
        raise ValueError(f"step counts from 0, got {step}")
    if step < warmup:
        return (step + 1) / warmup
    done = min(1, (step - warmup) / max(1, steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def joined(arrays):
    """All numbers of the arrays, one after the other (n,)."""
    arrays = [a.reshape(-1) for a in arrays]
    return array_module(*arrays).concatenate(arrays)


def _data(parameters):
    return joined([p.data for p in parameters.values()])


def parts(numbers, parameters):
    """The pieces of a joined array (n,) or longer, views of it, in the parameters' shapes."""
    start = 0
    for p in parameters.values():
        yield numbers[start : start + p.size].reshape(p.shape)
        start += p.size


def _norm(g):
    with np.errstate(over="ignore"):  # Inf is an answer
        return array_module(g).sqrt((g * g).sum())


def gradient_norm(parameters):
    """‖·‖₂ of all gradients together, a 0-d array on their device."""
    return _norm(joined([p.grad for p in parameters.values()]))


def clip_gradients(parameters, largest):
    """Scales all gradients to a joint norm of at most `largest`; returns the norm before.

    Raises FloatingPointError for a norm that is NaN or Inf, which would turn all gradients to 0; on
    a GPU, where it would have to wait, they turn to NaN instead and the loss will show it.
    """
    g = joined([p.grad for p in parameters.values()])
    norm = clip(g, largest)
    for p, part in zip(parameters.values(), parts(g, parameters)):
        p.grad = part
    return norm


def clip(g, largest):
    """`clip_gradients` for joined gradients g (n,), in place."""
    if not largest >= 0:
        raise ValueError(f"largest must be 0 or more, got {largest}")
    norm = _norm(g)
    if array_module(norm) is np and not math.isfinite(norm):
        raise FloatingPointError("the norm of the gradients is NaN or Inf")
    g *= array_module(norm).minimum(1, largest / (norm + 1e-12)) + 0 * norm
    return norm


def _check(parameters, t):
    """Raises ValueError for t < 1 and for a gradient that is missing or of another shape."""
    if not t >= 1:
        raise ValueError(f"t counts the updates from 1, got {t}")
    for name, p in parameters.items():
        shape = getattr(p.grad, "shape", None)
        if shape != p.shape:
            raise ValueError(f"the gradient of {name} has shape {shape}, the parameter {p.shape}")


# AdamW's update as one kernel: inputs, outputs, code.
ADAMW = (
    "T g, T p1, T p2, T c1, T c2, T lr, T eps, T decay",
    "T w, T m, T v",
    """
        m += p1 * (g - m);
        v += p2 * (g * g - v);
        w -= lr * ((m / c1) / (sqrt(v / c2) + eps) + decay * w)""",
)


class Optimizer:
    """What AdamW and Muon share: a step is an update of joined parameters."""

    def step(self, lr, t):
        """One update with learning rate `lr`; t = 1, 2, … counts the updates."""
        _check(self.parameters, t)
        if not self.parameters:
            return
        w = _data(self.parameters)
        self.update(w, joined([p.grad for p in self.parameters.values()]), lr, t)
        for p, part in zip(self.parameters.values(), parts(w, self.parameters)):
            p.data = part  # not the caller's array


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""

    def __init__(self, parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        self.parameters, self.betas, self.eps = parameters, betas, eps
        self.weight_decay, self.state = weight_decay, {}
        self.m, self.v = 0 * _data(parameters), 0 * _data(parameters)
        for moment, numbers in (("m", self.m), ("v", self.v)):
            for name, part in zip(parameters, parts(numbers, parameters)):
                self.state[f"{name}.{moment}"] = part

    def update(self, w, g, lr, t):
        """`step` for joined parameters w and gradients g (n,); w is changed in place."""
        (b1, b2), m, v, xp = self.betas, self.m, self.v, array_module(w)
        c1, c2, decay = 1 - b1**t, 1 - b2**t, self.weight_decay
        if xp is not np:
            g = g.astype(w.dtype, copy=False)
            fused(xp, *ADAMW)(g, 1 - b1, 1 - b2, c1, c2, lr, self.eps, decay, w, m, v)
            return
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        w -= lr * ((m / c1) / (np.sqrt(v / c2) + self.eps) + decay * w)


def _tall(M):
    """Whether the matrices M (..., n, m) have more rows than columns."""
    array_module(M)  # TypeError for what is no array
    if M.ndim < 2:
        raise ValueError(f"expected matrices (..., n, m), got shape {M.shape}")
    return M.shape[-2] > M.shape[-1]


def orthogonalise(M, steps=5):
    """The orthogonal polar factor of M (..., n, m), roughly: most singular values in 0.7 … 1.2.

    Muon's quintic Newton–Schulz iteration (Jordan et al., 2024): fast from any starting point, but
    it never settles at 1, so it serves for update directions, not for a basis.  M with ‖M‖_F below
    some 1e-11, or with squares that underflow, counts as nothing and gives less.

    X ← (aI + bXXᵀ + c(XXᵀ)²) X is for Y = c^¼ X, with the square completed,
    Y ← ((YYᵀ + βI)² + γI) Y, β = b/(2√c), γ = a − β²: the same with fewer additions.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    beta, scale = b / (2 * math.sqrt(c)), c**0.25
    xp = array_module(M)
    tall = _tall(M)
    Y = M.swapaxes(-1, -2) if tall else M
    I = xp.eye(Y.shape[-2], dtype=M.dtype)
    beta_I, gamma_I = beta * I, (a - beta * beta) * I
    Y = Y * (scale / (xp.sqrt((Y * Y).sum(axis=(-2, -1), keepdims=True)) + 1e-12))
    for _ in range(steps):
        A = product(Y, Y.swapaxes(-1, -2))
        A += beta_I
        A = product(A, A)
        A += gamma_I
        Y = product(A, Y)
    Y = Y / scale
    return Y.swapaxes(-1, -2) if tall else Y


def retract(W, steps=2):
    """The nearest (semi-)orthogonal matrix to W (..., n, m), for W within about lr of one.

    Cubic Newton–Schulz, W ← W (3I − WᵀW)/2: the error is squared by each step.
    """
    tall = _tall(W)
    I = array_module(W).eye(min(W.shape[-2:]), dtype=W.dtype)
    for _ in range(steps):
        Wt = W.swapaxes(-1, -2)
        C = 1.5 * I - 0.5 * (product(Wt, W) if tall else product(W, Wt))
        W = product(W, C) if tall else product(C, W)
    return W


class Muon(Optimizer):
    """Momentum whose update is orthogonalised, kept on the (semi-)orthogonal matrices.

    W ← retract(W − lr · orthogonalise(momentum)): every weight starts orthogonal and stays so, and
    lr is about the angle in radians by which a step can turn it.  Matrices of one shape are updated
    as one batch, and `parameters` are sorted by shape.
    """

    def __init__(self, parameters, momentum=0.95, retraction=True):
        self.momentum, self.retraction = momentum, retraction
        self.parameters, self.state = {}, {}
        self.groups = []  # per shape: the momentum of all matrices (k, n, m)
        for name, p in parameters.items():
            if p.ndim < 2 or not p.size:
                raise ValueError(f"Muon takes matrices (..., n, m), {name} has shape {p.shape}")
        for shape in dict.fromkeys(p.shape[-2:] for p in parameters.values()):
            group = {k: p for k, p in parameters.items() if p.shape[-2:] == shape}
            buffer = 0 * _data(group)
            self.groups.append(buffer.reshape(-1, *shape))
            for name, part in zip(group, parts(buffer, group)):
                self.state[f"{name}.m"] = part
            self.parameters |= group

    def update(self, w, g, lr, t):
        """`step` for joined parameters w and gradients g (n,); w is changed in place."""
        start = 0
        for buffer in self.groups:
            part = slice(start, start + buffer.size)
            W, G = (a[part].reshape(buffer.shape) for a in (w, g))
            buffer *= self.momentum
            buffer += G
            W -= lr * orthogonalise(G + self.momentum * buffer)
            if self.retraction:
                W[...] = retract(W)
            start = part.stop
