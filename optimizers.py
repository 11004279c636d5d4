"""AdamW, Muon on orthogonal matrices, gradient clipping and the learning-rate schedule.

Parameters are a dict name -> Tensor.  State is a dict name -> array, for checkpoints.
"""

import math

import numpy as np

from autograd import array_module


def schedule(step, steps, warmup):
    """The factor on the learning rate: linear warm-up to 1, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1, (step - warmup) / max(1, steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def gradient_norm(parameters):
    """‖·‖₂ of all gradients together, a 0-d array on their device."""
    grads = [p.grad for p in parameters.values()]
    xp = array_module(*grads)
    with np.errstate(over="ignore"):  # Inf is an answer
        return xp.sqrt(xp.stack([(g * g).sum() for g in grads]).sum())


def clip_gradients(parameters, largest):
    """Scales all gradients to a joint norm of at most `largest`; returns the norm before.

    Raises FloatingPointError for a norm that is NaN or Inf, which would turn all gradients to 0; on
    a GPU, where it would have to wait, they turn to NaN instead and the loss will show it.
    """
    norm = gradient_norm(parameters)
    if array_module(norm) is np and not math.isfinite(norm):
        raise FloatingPointError("the norm of the gradients is NaN or Inf")
    factor = array_module(norm).minimum(1, largest / (norm + 1e-12)) + 0 * norm
    for p in parameters.values():
        p.grad = p.grad * factor
    return norm


def _check(parameters, t):
    """Raises ValueError for t < 1 and for a gradient that is missing or of another shape."""
    if not t >= 1:
        raise ValueError(f"t counts the updates from 1, got {t}")
    for name, p in parameters.items():
        shape = getattr(p.grad, "shape", None)
        if shape != p.shape:
            raise ValueError(f"the gradient of {name} has shape {shape}, the parameter {p.shape}")


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""

    def __init__(self, parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        self.parameters, self.betas, self.eps = parameters, betas, eps
        self.weight_decay = weight_decay
        self.state = {}
        for name, p in parameters.items():
            for moment in ("m", "v"):
                self.state[f"{name}.{moment}"] = array_module(p).zeros_like(p.data)

    def step(self, lr, t):
        """One update with learning rate `lr`; t = 1, 2, … counts the updates."""
        _check(self.parameters, t)
        b1, b2 = self.betas
        for name, p in self.parameters.items():
            g, m, v = p.grad, self.state[f"{name}.m"], self.state[f"{name}.v"]
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            update = (m / (1 - b1**t)) / (array_module(v).sqrt(v / (1 - b2**t)) + self.eps)
            p.data = p.data - lr * (update + self.weight_decay * p.data)  # not the caller's array


def orthogonalise(M, steps=5):
    """The orthogonal polar factor of M (..., n, m), roughly: most singular values in 0.7 … 1.2.

    Muon's quintic Newton–Schulz iteration (Jordan et al., 2024): fast from any starting point, but
    it never settles at 1, so it serves for update directions, not for a basis.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    xp = array_module(M)
    tall = M.shape[-2] > M.shape[-1]
    X = M.swapaxes(-1, -2) if tall else M
    X = X / (xp.sqrt((X * X).sum(axis=(-2, -1), keepdims=True)) + 1e-12)
    for _ in range(steps):
        XXt = X @ X.swapaxes(-1, -2)
        X = a * X + (b * XXt + c * (XXt @ XXt)) @ X
    return X.swapaxes(-1, -2) if tall else X


def retract(W, steps=2):
    """The nearest (semi-)orthogonal matrix to W (..., n, m), for W within about lr of one.

    Cubic Newton–Schulz, W ← ½ W (3I − WᵀW): the error is squared by each step.
    """
    tall = W.shape[-2] > W.shape[-1]
    for _ in range(steps):
        Wt = W.swapaxes(-1, -2)
        W = 1.5 * W - (0.5 * W @ (Wt @ W) if tall else 0.5 * (W @ Wt) @ W)
    return W


class Muon:
    """Momentum whose update is orthogonalised, kept on the (semi-)orthogonal matrices.

    W ← retract(W − lr · orthogonalise(momentum)): every weight starts orthogonal and stays so, and
    lr is about the angle in radians by which a step can turn it.  Matrices of one shape are updated
    as one batch.
    """

    def __init__(self, parameters, momentum=0.95, retraction=True):
        self.parameters, self.momentum, self.retraction = parameters, momentum, retraction
        self.state = {
            f"{name}.m": array_module(p).zeros_like(p.data) for name, p in parameters.items()
        }
        self.groups = {}
        for name, p in parameters.items():
            self.groups.setdefault(p.shape[-2:], []).append(name)

    def step(self, lr, t):
        """One update with learning rate `lr`; t = 1, 2, … counts the updates."""
        _check(self.parameters, t)
        for (n, m), names in self.groups.items():
            directions, weights = [], []
            for name in names:
                p, buffer = self.parameters[name], self.state[f"{name}.m"]
                buffer *= self.momentum
                buffer += p.grad
                nesterov = p.grad + self.momentum * buffer
                directions.append(nesterov.reshape(-1, n, m))
                weights.append(p.data.reshape(-1, n, m))
            xp = array_module(weights[0])
            W = xp.concatenate(weights) - lr * orthogonalise(xp.concatenate(directions))
            if self.retraction:
                W = retract(W)
            start = 0
            for name, w in zip(names, weights):
                p = self.parameters[name]
                p.data = W[start : start + len(w)].reshape(p.shape)
                start += len(w)
