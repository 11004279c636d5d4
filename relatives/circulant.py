"""Circulant attention: softmax of one periodic correlation per channel, applied as a convolution.

N = rows · columns tokens on a periodic grid, every channel a head of its own:

    [q, k, v] = X W_qkv;   a[δ] = (1/√N) Σ_p q[p] k[p + δ];   w = softmax of a over the N offsets δ
    y[p] = Σ_δ w[δ] v[p + δ];   out = (y ∘ SiLU(X W_g + b_g)) W_o + b_o

Source: arXiv 2512.21542 and its code; the paper's scale is 1/N, that of its code, taken here, 1/√N.
Cost: N log N · d beside the projections.  Causal: no.  Assumes pre-LayerNorm, a skip and a
convolution for position: the mixing matrix is doubly stochastic, it averages.
Beside OSA: mixing in N log N needs only a shift-invariant matrix; it would be orthogonal with a
spectrum of modulus one, where softmax gives one of modulus at most one.
"""

import numpy as np

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped, silu


def _cyclic(a, b, grid, conjugate):
    """F⁻¹(conj(F a) ∘ F b), or without the conjugate the convolution Σ_p a[p] b[δ − p]."""
    fft, on = array_module(a, b).fft, {"axes": (-3, -2)}
    A, B = (fft.rfft2(x.reshape(*x.shape[:-2], *grid, x.shape[-1]), **on) for x in (a, b))
    c = fft.irfft2((A.conj() if conjugate else A) * B, s=grid, **on)  # s: odd sizes as well
    return c.reshape(*c.shape[:-3], grid[0] * grid[1], c.shape[-1])


def correlate(a, b, grid):
    """c[δ] = Σ_p a[p] b[p + δ] on the periodic grid, channel by channel; a, b (..., N, d).

    ∂/∂a: the correlation of g and b;  ∂/∂b: the convolution of a and g.
    """

    def backward(g, saved):
        a, b = saved
        da, db = _cyclic(g, b, grid, True), _cyclic(a, g, grid, False)
        return ag.unbroadcast(da, a.shape), ag.unbroadcast(db, b.shape)

    return ag.operator(lambda a, b: (_cyclic(a, b, grid, True), (a, b)), backward)(a, b)


@shaped(X="... N d", Wqkv="d 3d", Wg="d d", bg="d", Wo="d d", bo="d")
def circulant(X, Wqkv, Wg, bg, Wo, bo, grid):
    """(..., N, d) by the formulas above; grid: (rows, columns), or one side."""
    (N, d), grid = X.shape[-2:], tuple(np.broadcast_to(grid, 2).tolist())
    if grid[0] < 1 or grid[0] * grid[1] != N:
        raise ValueError(f"grid must hold the {N} tokens, got {grid[0]} x {grid[1]}")
    qkv = X @ Wqkv
    q, k, v = (qkv[..., i : i + d] for i in (0, d, 2 * d))
    a = correlate(q, k, grid) * N**-0.5  # (..., N, d), one weight per offset
    y = correlate(T(ag.softmax(T(a))), v, grid)
    return (y * silu(X @ Wg + bg)) @ Wo + bo
