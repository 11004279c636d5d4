"""PD-SSM: a state-space model whose transitions are a permutation-like matrix times a diagonal one.

    s = softmax(x Sel) (K,),   M = Σ_k s_k Pd[k] (n to, n from),   P = softmax of each column of M,
    hardened to a single 1;   D = σ(x W_m + b_m) e^{iφ},   φ = 2π σ(x W_p + b_p)
    h_t = P_t (D_t ∘ h_{t−1}) + x_t (B_re + i B_im) ∈ ℂⁿ from h = 0
    y_t = Re(h_t (C_re + i C_im)) + x_t ∘ D_sk

Source: arXiv 2509.22284 and its JAX code; its torch code hardens the other axis, another operator.
Straight through: the gradient of the hardened P is taken as that of the soft one.
Cost: N K n² for M; the recurrence N n, here N n², as the transitions are formed.  Causal: only.
Assumes a norm behind it; its own code has no skip.
Beside OSA: products of mixing matrices stay bounded because each is sparse (1-norm max |D| < 1, and
columns may merge), where OSA's stay orthogonal because each is a rotation.
"""

import math

import autograd as ag
from autograd import array_module
from relatives.ops import T, shaped, sigmoid

sin = ag.operator(lambda a: (array_module(a).sin(a), a), lambda g, a: [g * array_module(a).cos(a)])


def _hard(P):
    """1 at the largest entry of each row, the first of equal ones, 0 elsewhere."""
    columns = array_module(P).arange(P.shape[-1])
    return (P.argmax(axis=-1)[..., None] == columns).astype(P.dtype), None


straight_through = ag.operator(_hard, lambda g, _: [g])


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


@shaped(x="... N H", Sel="H K", Pd="K n n", W1m="H n", b1m="n", W1p="H n", b1p="n", Bre="H n",
        Bim="H n", Cre="n H", Cim="n H", Dsk="H")  # fmt: skip
def pdssm(x, Sel, Pd, W1m, b1m, W1p, b1p, Bre, Bim, Cre, Cim, Dsk):
    """(..., N, H) by the formulas above, each complex a + ib as the matrix [[a, b], [−b, a]]."""
    K, n, _ = Pd.shape
    M = (ag.softmax(x @ Sel) @ Pd.reshape(K, n * n)).reshape(*x.shape[:-1], n, n)
    Pt = straight_through(ag.softmax(T(M)))  # Pᵀ: rows are sources
    size, phase = sigmoid(x @ W1m + b1m), sigmoid(x @ W1p + b1p) * (2 * math.pi)
    re, im = ((size * sin(phase + a))[..., None] * Pt for a in (math.pi / 2, 0.0))  # (D P)ᵀ
    A = ag.concatenate([ag.concatenate([re, im]), ag.concatenate([im * -1.0, re])], axis=-2)
    b = x @ ag.concatenate([Bre, Bim])  # rows [Re, Im] (..., N, 2n)
    h = scan(A, b[..., None, :])[..., 0, :]
    return h @ ag.concatenate([Cre, Cim * -1.0], axis=0) + x * Dsk
