"""The network with any attention, skip connections and layer normalisation.

With both it is the usual ViT: X ← X + Attention(LN(X)), X ← X + MLP(LN(X)), and LN at the end; with
neither the skipless network of `osa_minimal`; with skip="delta" x + y is replaced as `delta` says.
"""

import numpy as np

import autograd as ag
from osa_minimal import SkiplessTransformer, tensors
from relatives.delta import DeltaSkip
from relatives.ops import shaped


@shaped(X="... d", gain="d", bias="d")
def layer_norm(X, gain, bias, eps=1e-5):
    """gain ∘ X̂ + bias, X̂ = (X − mean)/√(variance + eps) over the last axis."""
    X = X - X.data[..., :1]  # leaves exactly 0 of equal entries, whatever their size
    centred = X - X.mean(axis=-1, keepdims=True)
    size = ag.array_module(X).maximum(abs(centred.data).max(axis=-1, keepdims=True), 1)
    centred = centred / size  # by a constant, as X̂ does not depend on it: no square overflows
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / ag.sqrt(variance + eps / size / size) * gain + bias


class LayerNorm:
    """Layer normalisation over the width; its parameters are `name`.gain and `name`.bias."""

    def __init__(self, name, d, xp, dtype):
        one = np.ones(d, dtype)
        self.parameters = tensors({f"{name}.gain": one, f"{name}.bias": 0 * one}, xp)

    def __call__(self, X):
        return layer_norm(X, *self.parameters.values())


SKIPS = {"none": lambda X, Y, C: Y, "add": lambda X, Y, C: X + Y, "delta": None}  # delta.py


class Block:
    """X ← skip(X, f(C), C) with C = norm(X), f an attention or an MLP."""

    def __init__(self, f, norm, skip):
        self.f, self.norm, self.skip, self.parameters = f, norm, skip, dict(f.parameters)
        for part in (norm, skip):
            self.parameters |= getattr(part, "parameters", {})

    def project(self, X):
        return self.f.project(self.norm(X))

    def __call__(self, X):
        C = self.norm(X)
        return self.skip(X, self.f(C), C)


class Transformer(SkiplessTransformer):
    """`SkiplessTransformer` with skip connections (SKIPS) and pre-LayerNorm (`norm`) at will."""

    def __init__(self, *, d, skip="none", norm=False, xp=np, dtype=np.float32, **kw):
        super().__init__(d=d, xp=xp, dtype=dtype, **kw)
        made = d, xp, dtype

        def block(f, i):
            ln = LayerNorm(f"norm_{i}", *made) if norm else lambda X: X
            return Block(f, ln, SKIPS[skip] or DeltaSkip(f"skip_{i}", *made))

        if skip != "none" or norm:
            self.layers = [(block(attention, 1), block(mlp, 2)) for attention, mlp in self.layers]
        self.last_norm = LayerNorm("norm", *made) if norm else lambda X: X
        self.outer |= self.last_norm.parameters if norm else {}

    def __call__(self, images):
        X = self.embed(images)
        for attention, mlp in self.layers:
            X = mlp(attention(X))
        return ag.linear(self.last_norm(X).mean(axis=1), self.outer["W_C"], self.outer["b_C"])
