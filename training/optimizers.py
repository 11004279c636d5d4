"""AdamW, Muon on orthogonal matrices, gradient clipping and the learning-rate schedule.

All weights of a run lie in one array and all gradients in another (`flatten`): an operation costs
its launch on a GPU, whatever its size, and a network has hundreds of small parameters.  An
optimiser gets its part of both and changes the weights in place.
"""

import math

import numpy as np

from autograd import array_module
from fast.gpu import product


def flatten(parameters, weights=None):
    """All weights in one array (n,), or in that which is given, and all gradients, zeros, in
    another; every p.data and p.grad of the dict `parameters` becomes a view of them, in order."""
    weights = joined(parameters) if weights is None else weights
    grads = 0 * weights
    for p, w, g in zip(parameters.values(), views(weights, parameters), views(grads, parameters)):
        p.data, p.grad = w, g
    return weights, grads


def joined(parameters):
    """A copy of all weights, one after the other (n,), in their one dtype."""
    parts = [p.data.reshape(-1) for p in parameters.values()]
    if len(dtypes := {str(p.dtype) for p in parts}) != 1:
        raise ValueError(f"parameters must be of one dtype, got {sorted(dtypes) or 'none'}")
    return array_module(*parts).concatenate(parts)


def views(a, parameters):
    """The parts of the array a (n,), one after the other, in the shapes of the parameters."""
    start = 0
    for p in parameters.values():
        yield a[start : start + p.size].reshape(p.shape)
        start += p.size


def schedule(t, steps, warmup):
    """The factor on the rates in step t = 0, 1, …: linear warm-up to 1, then half a cosine to 0."""
    warmup = min(warmup, steps // 2)
    if t < warmup:
        return (t + 1) / warmup
    done = min(1, (t - warmup) / max(1, steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def clip(grads, largest):
    """Scales the gradients (n,), in place, to a norm of at most `largest`; returns the norm before.

    Raises FloatingPointError for a norm that is NaN or Inf; a GPU is not waited for, the gradients
    turn to NaN instead, and the loss will show it.
    """
    if not largest >= 0:
        raise ValueError(f"largest must be 0 or more, got {largest}")
    xp, size = array_module(grads), abs(grads).max()
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are answers
        unit = grads / xp.where(size > 0, size, 1)  # whose squares do not overflow
        norm = size * xp.sqrt((unit * unit).sum())
    if xp is np and not math.isfinite(norm):
        raise FloatingPointError("the norm of the gradients is NaN or Inf")
    grads *= xp.where(norm < math.inf, xp.minimum(1, largest / (norm + 1e-12)), math.nan)
    return norm


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""

    def __init__(self, parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        self.parameters, self.betas, self.eps = parameters, betas, eps
        self.weight_decay = weight_decay
        self.mean, self.rms = 0 * joined(parameters), 0 * joined(parameters)
        self.state = named(self.mean, parameters, "mean") | named(self.rms, parameters, "rms")

    def step(self, w, g, lr, count):
        """Update number `count` = 1, 2, … of the weights w (n,), in place, by their gradients g."""
        (b1, b2), xp = self.betas, array_module(w)
        self.mean += (1 - b1) * (g - self.mean)
        # √(β₂ rms² + (1 − β₂) g²), without squares that overflow
        xp.hypot(math.sqrt(b2) * self.rms, math.sqrt(1 - b2) * g, out=self.rms)
        mean, rms = self.mean / (1 - b1**count), self.rms / xp.sqrt(1 - b2**count)
        w -= lr * (mean / (rms + self.eps) + self.weight_decay * w)


def named(a, parameters, what):
    """{name.what: its part of a}, for checkpoints."""
    return dict(zip((f"{name}.{what}" for name in parameters), views(a, parameters)))


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
    xp, tall = array_module(M), M.shape[-2] > M.shape[-1]
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


def gram(W):
    """WᵀW or WWᵀ, whichever is smaller, for matrices W (..., n, m)."""
    Wt = W.swapaxes(-1, -2)
    return product(Wt, W) if W.shape[-2] > W.shape[-1] else product(W, Wt)


def retract(W, steps=2):
    """The nearest (semi-)orthogonal matrix to W (..., n, m), for W within about lr of one.

    Cubic Newton–Schulz, W ← W (3I − WᵀW)/2: the error is squared by each step.
    """
    n, m = W.shape[-2:]
    I = array_module(W).eye(min(n, m), dtype=W.dtype)
    for _ in range(steps):
        C = 1.5 * I - 0.5 * gram(W)
        W = product(W, C) if n > m else product(C, W)
    return W


def orthogonal(W):
    """Whether W (..., n, m) has nearly orthonormal columns or rows, so that `retract` converges."""
    I = array_module(W).eye(min(W.shape[-2:]), dtype=W.dtype)
    return bool(abs(gram(W) - I).max() < 0.1)


class Muon:
    """Nesterov momentum whose update is orthogonalised, and weights that are kept orthogonal.

    buffer ← momentum · buffer + G,  W ← retract(W − lr · orthogonalise(G + momentum · buffer))

    For matrices (..., n, m) that begin (semi-)orthogonal; lr is about the angle in radians by which
    a step can turn one.  Matrices of one shape are updated as one batch, so `self.parameters` are
    sorted by shape.
    """

    def __init__(self, parameters, momentum=0.95):
        self.momentum, self.parameters, self.state, self.buffers = momentum, {}, {}, []
        for name, p in parameters.items():
            if p.ndim < 2 or not orthogonal(p.data):
                raise ValueError(f"Muon keeps matrices orthogonal, and {name} does not begin so")
        for shape in dict.fromkeys(p.shape[-2:] for p in parameters.values()):
            group = {k: p for k, p in parameters.items() if p.shape[-2:] == shape}
            self.buffers.append(0 * joined(group).reshape(-1, *shape))
            self.state |= named(self.buffers[-1].reshape(-1), group, "m")
            self.parameters |= group

    def step(self, w, g, lr, count):
        """Update of the weights w (n,) by their gradients g, as `self.parameters` lie."""
        start = 0
        for buffer in self.buffers:
            part = slice(start, start + buffer.size)
            W, G = (a[part].reshape(buffer.shape) for a in (w, g))
            buffer *= self.momentum
            buffer += G
            W[...] = retract(W - lr * orthogonalise(G + self.momentum * buffer))
            start = part.stop


def assign(config, parameters):
    """The parameters in the order of their optimisers, and [(optimiser, its part, rate), …].

    "muon": Muon at the rate `lr` for the orthogonal matrices of the layers, AdamW at `adam_lr` for
    the rest; "adamw": AdamW at `lr` for both.  α has AdamW at a rate of its own, relative to the
    value at which it starts.
    """
    groups, muon = {"alpha": {}, "matrices": {}, "rest": {}}, config.optimizer == "muon"
    for k, p in parameters.items():
        matrix = muon and k.startswith("layers.") and p.ndim > 1 and orthogonal(p.data)
        kind = "alpha" if k.endswith(".alpha") else "matrices" if matrix else "rest"
        groups[kind][k] = p
    rest = AdamW(groups["rest"], weight_decay=config.weight_decay)
    made = [(rest, config.adam_lr if muon else config.lr)]
    if groups["alpha"]:
        made.append((AdamW(groups["alpha"]), config.alpha_lr * abs(joined(groups["alpha"]))))
    if groups["matrices"]:
        made.append((Muon(groups["matrices"]), config.lr))
    ordered, updates = {}, []
    for one, rate in made:
        start = sum(p.size for p in ordered.values())
        ordered |= one.parameters
        updates.append((one, slice(start, sum(p.size for p in ordered.values())), rate))
    return ordered, updates
