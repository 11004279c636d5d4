"""Cayley attention: the nearest relative, a rotation by one small solve in place of an exponential.

    S = Q Kᵀ/√d,   Z = ε/(2√N) (S − Sᵀ) (N, N),   R = (I − Z/2)⁻¹ (I + Z/2) ∈ SO(N),   O = R V

Source: the head of SGT, arXiv 2609.39739, Eq. 6–8, which forms R.  Theorem 2.1 of OSA holds for any
function of Z that is 1 at 0: with B (N, k) orthonormal, its span containing Q's and K's, Z̃ = BᵀZB,

    R V = V + B (I − Z̃/2)⁻¹ Z̃ BᵀV;        ε is a number or an array that broadcasts to (..., 1, 1).

Cost: N d² + d³.  Causal: impossible, as for OSA.  Assumes neither skip nor norm.
Beside OSA: exp and the Cayley map agree to second order in Z, so near the identity nothing tells
them apart.  Where exp turns a plane by θ, the Cayley map turns it by 2 arctan(θ/2): never by π, and
with a derivative 1/(1 + θ²/4) that fades where that of exp stays 1.
"""

import math

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped


def _rotate(B, Z, V):
    """R V; −Z in place of Z gives Rᵀ V."""
    xp = array_module(V)
    return V + B @ xp.linalg.solve(xp.eye(Z.shape[-1], dtype=Z.dtype) - Z / 2, Z @ (T(B) @ V))


def _forward(Q, K, V, eps):
    xp, unit = array_module(Q, eps), 1 / (2 * math.sqrt(Q.shape[-2] * Q.shape[-1]))
    B = xp.linalg.qr(xp.concatenate([Q, K], axis=-1))[0]  # (..., N, k), k = min(N, 2d)
    q, k = T(B) @ Q, T(B) @ K
    Z = eps * unit * (q @ T(k) - k @ T(q))
    O = _rotate(B, Z, V)
    return O, (Q, K, V, eps, unit, B, Z, O)


def _backward(G, saved):
    """⟨G, dR V⟩ = ⟨Y Xᵀ, dZ⟩, Y = (I + Z/2)⁻¹ G = (G + RᵀG)/2, X = (I − Z/2)⁻¹ V = (V + RV)/2."""
    Q, K, V, eps, unit, B, Z, O = saved
    dV = _rotate(B, -Z, G)
    Y, X = (G + dV) / 2, (V + O) / 2
    YQ, YK, XQ, XK = T(Y) @ Q, T(Y) @ K, T(X) @ Q, T(X) @ K  # (..., m, d)
    s = eps * unit
    dQ, dK = s * (Y @ XK - X @ YK), s * (X @ YQ - Y @ XQ)
    deps = unit * (YQ * XK - YK * XQ).sum(axis=(-2, -1), keepdims=True)
    return dQ, dK, dV, ag.unbroadcast(deps, eps.shape)


_cayley = ag.operator(_forward, _backward)


@shaped(Q="... N d", K="... N d", V="... N m")
def cayley(Q, K, V, eps):
    """R V (..., N, m) by the formulas above."""
    shape = getattr(eps, "shape", ())
    if shape and not (len(shape) <= Q.ndim and shape[-2:] == (1, 1)):
        raise ValueError(f"eps must be a number or broadcast to (..., 1, 1), got shape {shape}")
    return _cayley(Q, K, V, eps)
