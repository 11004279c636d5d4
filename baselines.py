"""What Orthogonal Self-Attention is compared with, in the same network.

Each attention replaces `attend` of `MultiHeadOSA`, and its parameters where it needs others;
`Transformer` adds skip connections and LayerNorm, which the skipless network does without.
"""

import numpy as np

import autograd as ag
from autograd import Tensor, array_module, product
from osa_minimal import MultiHeadOSA, SkiplessTransformer, random_orthogonal


def softmax_forward(F):
    """softmax(Q Kᵀ/√d_v) V from F = [Q, K, V] (..., N, 3 d_v), and what its backward needs."""
    xp = array_module(F)
    if F.ndim < 2 or F.shape[-1] % 3 or not F.size:
        raise ValueError(f"F must be (..., N, 3 d_v), not empty, got shape {F.shape}")
    d_v = F.shape[-1] // 3
    Q, K, V = F[..., :d_v], F[..., d_v : 2 * d_v], F[..., 2 * d_v :]
    A = product(Q * d_v**-0.5, K.swapaxes(-1, -2))  # (..., N, N)
    A -= A.max(axis=-1, keepdims=True)
    xp.exp(A, out=A)
    A /= A.sum(axis=-1, keepdims=True)
    return product(A, V), (F, A)


def softmax_backward(dO, saved):
    """dF for dO (..., N, d_v):  dV = Aᵀ dO,  dS = A ∘ (dO Vᵀ − ⟨dO, O⟩ per row),  O = A V."""
    F, A = saved
    d_v = F.shape[-1] // 3
    xp = array_module(F)
    Q, K, V = F[..., :d_v], F[..., d_v : 2 * d_v], F[..., 2 * d_v :]
    dS = product(dO, V.swapaxes(-1, -2))
    dS -= (dS * A).sum(axis=-1, keepdims=True)
    dS *= A
    dS *= d_v**-0.5
    parts = (dS, K), (dS.swapaxes(-1, -2), Q), (A.swapaxes(-1, -2), dO)  # dQ, dK, dV
    return [xp.concatenate([product(*part) for part in parts], axis=-1)]


softmax_attention = ag.operator(softmax_forward, softmax_backward)


class Softmax(MultiHeadOSA):
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762)."""

    def __init__(self, d, heads, rng, xp=np, dtype=np.float32):
        if heads == 1:  # OSA alone needs two: W_Q and W_K are orthogonal each, not [W_Q, W_K]
            W_Q, W_K, W_V, W_O = (random_orthogonal(d, d, rng, dtype) for _ in range(4))
            init = {"W_QK": np.concatenate([W_Q, W_K], axis=1)[None], "W_V": W_V, "W_O": W_O}
            self.heads = heads
            self.parameters = {k: Tensor(xp.asarray(a), True) for k, a in init.items()}
        else:
            super().__init__(d, heads, rng, xp, dtype)
            del self.parameters["alpha"]

    def attend(self, F):
        return softmax_attention(F)


class XSA(Softmax):
    """Exclusive self-attention (Zhai, arXiv 2603.09078): softmax's output without its part along v.

    z = y − (y·v̂) v̂,  v̂ = v / max(‖v‖, 1e-12), per token and head.
    """

    def attend(self, F):
        y, v = softmax_attention(F), F[..., 2 * (F.shape[-1] // 3) :]
        norm2 = ag.maximum((v * v).sum(axis=-1, keepdims=True), 1e-24)
        return y - v * ((y * v).sum(axis=-1, keepdims=True) / norm2)


class Identity(Softmax):
    """No mixing between tokens at all: O = V."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.parameters["W_QK"]

    def project(self, X):
        """V (B, h, N, d_v) alone."""
        (B, N, d), h = X.shape, self.heads
        return (X @ self.parameters["W_V"]).reshape(B, N, h, d // h).transpose(0, 2, 1, 3)

    def attend(self, V):
        return V


class FixedOrthogonal(Identity):
    """O = A V with a fixed Haar-random orthogonal A (N, N) per head, not trained."""

    def __init__(self, d, heads, rng, *args):
        super().__init__(d, heads, rng, *args)
        self.rng, self.A = rng.spawn(1)[0], None

    def attend(self, V):
        if self.A is None:  # N is known only now; the generator is this layer's own
            N = V.shape[-2]
            A = [random_orthogonal(N, N, self.rng, V.dtype) for _ in range(self.heads)]
            self.A = Tensor(array_module(V).asarray(np.stack(A)))
        return self.A @ V


ATTENTION = {
    "osa": MultiHeadOSA,
    "softmax": Softmax,
    "xsa": XSA,
    "identity": Identity,
    "fixed-orthogonal": FixedOrthogonal,
}


def layer_norm_forward(X, gain, bias, eps=1e-5):
    """gain ∘ X̂ + bias, X̂ = (X − mean)/√(variance + eps) over the last axis."""
    xp = array_module(X, gain, bias)
    if not X.shape[-1:] == gain.shape == bias.shape != (0,):
        raise ValueError(
            f"layer_norm needs (..., d), (d,), (d,), got {X.shape}, {gain.shape}, {bias.shape}"
        )
    centred = X - X.mean(axis=-1, keepdims=True)
    scale = 1 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    centred *= scale  # X̂
    return centred * gain + bias, (centred, scale, gain)


def layer_norm_backward(dY, saved):
    """dX = scale (D − mean(D) − X̂ mean(D ∘ X̂)) with D = dY ∘ gain."""
    Xhat, scale, gain = saved
    D, rows = dY * gain, tuple(range(dY.ndim - 1))
    dX = D - D.mean(axis=-1, keepdims=True) - Xhat * (D * Xhat).mean(axis=-1, keepdims=True)
    dX *= scale
    return dX, (dY * Xhat).sum(axis=rows), dY.sum(axis=rows)


layer_norm = ag.operator(layer_norm_forward, layer_norm_backward)


class LayerNorm:
    """Layer normalisation over the width, with its own gain and bias."""

    def __init__(self, name, d, xp, dtype):
        self.keys = f"{name}.gain", f"{name}.bias"
        start = xp.ones(d, dtype), xp.zeros(d, dtype)
        self.parameters = {k: Tensor(a, requires_grad=True) for k, a in zip(self.keys, start)}

    def __call__(self, X):
        return layer_norm(X, *(self.parameters[k] for k in self.keys))


class Transformer(SkiplessTransformer):
    """The same network with any attention, skip connections (`skip`) and pre-LayerNorm (`norm`).

    With both it is the usual ViT: X ← X + Attention(LN(X)), X ← X + MLP(LN(X)), and LN at the end.
    With neither it is the skipless network.
    """

    def __init__(self, *, attention="osa", skip=False, norm=False, xp=np, dtype=np.float32, **kw):
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        self.Attention, self.skip, self.norm = ATTENTION[attention], skip, norm
        super().__init__(xp=xp, dtype=dtype, **kw)
        if norm:
            d = kw["d"]
            self.layers = [
                (a, m, LayerNorm("norm_1", d, xp, dtype), LayerNorm("norm_2", d, xp, dtype))
                for a, m in self.layers
            ]
            self.last_norm = LayerNorm("norm", d, xp, dtype)
            self.ends |= self.last_norm.parameters

    def layer(self, X, attention, mlp, *norms):
        for f, norm in zip((attention, mlp), norms or (None, None)):
            Y = f(norm(X) if norm else X)
            X = X + Y if self.skip else Y
        return X

    def read_out(self, X):
        return super().read_out(self.last_norm(X) if self.norm else X)
