"""The network with any attention, skip connections and layer normalisation.

With both it is the usual ViT: X ← X + Attention(LN(X)), X ← X + MLP(LN(X)), and LN at the end; with
neither the skipless network of `osa_minimal`.
"""

import numpy as np

import autograd as ag
from autograd import array_module
from osa_minimal import SkiplessTransformer, tensors


def layer_norm_forward(X, gain, bias, eps=1e-5):
    """gain ∘ X̂ + bias, X̂ = (X − mean)/√(variance + eps) over the last axis."""
    xp = array_module(X, gain, bias)
    if not X.shape[-1:] == gain.shape == bias.shape != (0,):
        raise ValueError(
            f"layer_norm needs (..., d), (d,), (d,), got {X.shape}, {gain.shape}, {bias.shape}"
        )
    centred = X - X.mean(axis=-1, keepdims=True)
    centred -= centred.mean(axis=-1, keepdims=True)  # what rounding left of a large mean
    scale = 1 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    centred *= scale  # X̂
    return centred * gain + bias, (centred, scale, gain)


def layer_norm_backward(dY, saved):
    """dX = scale (D − mean(D) − X̂ mean(D ∘ X̂)) with D = dY ∘ gain."""
    Xhat, scale, gain = saved
    D, rows = dY * gain, tuple(range(dY.ndim - 1))
    dX = D - D.mean(axis=-1, keepdims=True) - Xhat * (D * Xhat).mean(axis=-1, keepdims=True)
    dX *= scale
    return dX, ag.total(dY * Xhat, axis=rows), ag.total(dY, axis=rows)


layer_norm = ag.operator(layer_norm_forward, layer_norm_backward)


class LayerNorm:
    """Layer normalisation over the width; its parameters are `name`.gain and `name`.bias."""

    def __init__(self, name, d, xp, dtype):
        self.keys = f"{name}.gain", f"{name}.bias"
        arrays = np.ones(d, dtype), np.zeros(d, dtype)
        self.parameters = tensors(dict(zip(self.keys, arrays)), xp)

    def __call__(self, X):
        return layer_norm(X, *(self.parameters[k] for k in self.keys))


class Block:
    """X ← [X +] f([LN](X)), f an attention or an MLP; norm and skip may be left out."""

    def __init__(self, f, norm, skip):
        self.f, self.norm, self.skip = f, norm or (lambda X: X), skip
        self.parameters = f.parameters | (norm.parameters if norm else {})

    def project(self, X):
        return self.f.project(self.norm(X))

    def __call__(self, X):
        Y = self.f(self.norm(X))
        return X + Y if self.skip else Y


class Transformer(SkiplessTransformer):
    """`SkiplessTransformer` with skip connections (`skip`) and pre-LayerNorm (`norm`) at will."""

    def __init__(self, *, d, skip=False, norm=False, xp=np, dtype=np.float32, **kw):
        super().__init__(d=d, xp=xp, dtype=dtype, **kw)
        if skip or norm:
            self.layers = [
                tuple(
                    Block(f, LayerNorm(f"norm_{i}", d, xp, dtype) if norm else None, skip)
                    for i, f in enumerate(layer, 1)
                )
                for layer in self.layers
            ]
        self.last_norm = LayerNorm("norm", d, xp, dtype) if norm else lambda X: X
        self.outer |= self.last_norm.parameters if norm else {}

    def __call__(self, images):
        X = self.embed(images)
        for attention, mlp in self.layers:
            X = mlp(attention(X))
        return ag.linear(self.last_norm(X).mean(axis=1), self.outer["W_C"], self.outer["b_C"])
