"""What the tests of the operator share: its implementations, inputs, tolerances and an oracle."""

import math
from typing import NamedTuple

import numpy as np
import pytest

import autograd as ag
import fast
import osa_minimal

DTYPES = {"float32": np.float32, "float64": np.float64}


class Operator(NamedTuple):
    """One way to compute O = exp(S) V and its gradients."""

    forward: object
    backward: object

    def gradients(self, Q, K, V, alpha, dO):
        return self.backward(dO, self.forward(Q, K, V, alpha)[1])

    def matrix(self, Q, K, alpha):
        """A = exp(S), by applying it to the identity."""
        I = np.eye(Q.shape[-2], dtype=Q.dtype)
        return self.forward(Q, K, np.broadcast_to(I, (*Q.shape[:-1], len(I))), alpha)[0]

    def on_tensors(self):
        return ag.operator(self.forward, self.backward)


def operator(module, how):
    return Operator(lambda *arrays: module.osa_forward(*arrays, how), module.osa_backward)


ROUTES = ["auto", "gram", "qr", "newton_schulz", "dense", "products"]
METHODS = ["qr", "newton_schulz"]
OPERATORS = {r: operator(fast, r) for r in ROUTES}
OPERATORS |= {f"paper {m}": operator(osa_minimal, m) for m in METHODS}


def columns(rng, n, m):
    """A random n × m matrix with orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((n, m)))[0]


def make(name):
    """Q, K, V, alpha in float64 for a named situation; asymmetric random data."""
    rng = np.random.default_rng(len(name))
    n = rng.standard_normal
    Q, K, V, alpha = n((13, 3)), n((13, 3)), n((13, 5)), 0.3
    if name == "batch, alpha per head":
        Q, K, V = n((2, 3, 13, 2)), n((2, 3, 13, 2)), n((2, 3, 13, 4))
        alpha = np.array([0.5, -0.2, 0.05]).reshape(3, 1, 1)
    elif name == "batch, one head has alpha 0":
        Q, K, V = n((2, 3, 13, 2)), n((2, 3, 13, 2)), n((2, 3, 13, 2))
        alpha = np.array([0.5, 0.0, 0.1]).reshape(3, 1, 1)
    elif name == "repeated columns":
        Q[:, 2], K[:, 0] = Q[:, 0], Q[:, 1]  # rank of [Q, K]: 4 of 6
    elif name in ("columns 1e-3 apart", "columns 1e-7 apart"):
        apart = float(name.split()[1])
        Q[:, 2], K[:, 0] = Q[:, 0] + apart * Q[:, 2], Q[:, 1] + apart * K[:, 0]
    elif name == "repeated tokens":
        Q, K = (np.repeat(a[:3], [6, 4, 3], axis=0) for a in (Q, K))  # rank 3 of 6
    elif name == "repeated angles":
        P = columns(rng, 13, 6)
        Q, K, alpha = P[:, :3], P[:, 3:], 2.0  # the six eigenvalues are ± i alpha/√3
    elif name == "K = Q":
        K = Q.copy()  # S = 0 though s and P are not
    elif name == "alpha = 0":
        alpha = 0.0
    elif name == "Q = K = V = 0":
        Q, K, V = 0 * Q, 0 * K, 0 * V
    elif name == "Q = 0":
        Q = 0 * Q
    elif name == "N < 2 d_v":
        Q, K, V = Q[:4], K[:4], V[:4]
    elif name == "N = 2 d_v + 1":
        Q, K, V = Q[:7], K[:7], V[:7]
    elif name == "N = 1":
        Q, K, V = Q[:1], K[:1], V[:1]
    elif name == "d_v = 1":
        Q, K, V = Q[:, :1], K[:, :1], V[:, :1]
    elif name == "padded rows":
        Q[9:], K[9:] = 0, 0
    elif name == "large angles":
        alpha = 1.5  # ‖S‖ ≈ 20
    else:
        assert name == "generic"
    return Q, K, V, alpha


CASES = """generic|batch, alpha per head|batch, one head has alpha 0|repeated columns|
columns 1e-3 apart|columns 1e-7 apart|repeated tokens|repeated angles|K = Q|alpha = 0|
Q = K = V = 0|Q = 0|N < 2 d_v|N = 2 d_v + 1|N = 1|d_v = 1|padded rows|
large angles""".replace("\n", "").split("|")


def cast(dtype, *arrays):
    return [np.asarray(a, dtype) for a in arrays]


def norm_S(Q, K, alpha):
    """The largest ‖S‖₂ of the batch, by SVD of the N × N matrices, in float64."""
    Q, K, alpha = cast(np.float64, Q, K, alpha)
    return float(np.linalg.norm(osa_minimal.skew_scores(Q, K, alpha), 2, axis=(-2, -1)).max())


def tolerance(Q, K, alpha, c=3):
    """c (n + 10) eps max(1, ‖S‖): the error of a backward stable exp of S, entry by entry.

    Rounding S (relative error eps in each of sums of n or r terms) moves exp(S) by up to
    n eps ‖S‖, as the derivative of exp has norm 1 at a skew-symmetric matrix; the products around
    it add n eps ‖V‖, and a series of ‖S‖ + 10 terms as many eps.  The observed factor is below 1;
    c = 3 covers entries of V and dO of size 3, and other linear algebra libraries.
    """
    return c * (Q.shape[-2] + 10) * np.finfo(Q.dtype).eps * max(1.0, norm_S(Q, K, alpha))


def close(actual, expected, atol):
    actual = ag.to_cpu(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def gradient_sizes(Q, K, V, alpha, dO):
    """By how much the error of each gradient can exceed that of exp(S): dQ, dK, dV, dα."""
    d_v = Q.shape[-1]
    dS = np.linalg.norm(dO) * np.linalg.norm(V)  # bounds the gradient of S
    s = np.abs(alpha).max() / math.sqrt(d_v)
    norm_Q, norm_K = np.linalg.norm(Q), np.linalg.norm(K)
    # dQ = s (dS − dSᵀ) K,  dK = −s (dS − dSᵀ) Q,  dV = exp(S)ᵀ dO,  dα = ⟨dS, S/α⟩
    return s * norm_K * dS, s * norm_Q * dS, 1.0, norm_Q * norm_K / math.sqrt(d_v) * dS


def gradients_close(actual, expected, sizes, tol):
    for a, e, size in zip(actual, expected, sizes, strict=True):
        close(np.asarray(ag.to_cpu(a)), e, tol * size)


def expm_one_by_one(S):
    """SciPy's exp of each matrix by itself (Padé with scaling and squaring, no spectrum)."""
    expm = pytest.importorskip("scipy.linalg", reason="the oracle is SciPy's expm").expm
    flat = S.reshape(-1, *S.shape[-2:])
    return np.stack([expm(M) for M in flat]).reshape(S.shape)


def definition(Q, K, V, alpha, dO):
    """A = exp(S), O = A V and dQ, dK, dV, dα for ⟨dO, O⟩, by N × N matrices and SciPy's expm alone.

    The gradient of S is L(Sᵀ, dO Vᵀ), the upper right quarter of exp [[Sᵀ, dO Vᵀ], [0, Sᵀ]]; the
    rest is the chain rule through S = α (Q Kᵀ − K Qᵀ)/√d_v.
    """
    Q, K, V, alpha, dO = cast(np.float64, Q, K, V, alpha, dO)
    unit, N = (Q @ K.mT - K @ Q.mT) / math.sqrt(Q.shape[-1]), Q.shape[-2]
    St = alpha * unit.mT
    E = expm_one_by_one(np.block([[St, dO @ V.mT], [0 * St, St]]))
    At, dS = E[..., :N, :N], E[..., :N, N:]
    dQKt = alpha / math.sqrt(Q.shape[-1]) * (dS - dS.mT)
    dalpha = ag.unbroadcast((dS * unit).sum(axis=(-2, -1), keepdims=True), alpha.shape)
    return At.mT, At.mT @ V, dQKt @ K, dQKt.mT @ Q, At @ dO, dalpha


def skew(rng, *shape):
    M = rng.standard_normal((*shape, shape[-1]))
    return M - M.swapaxes(-1, -2)


PLANES = [[0, 1], [-1, 0]]
SPECTRA = {
    "generic": lambda rng: skew(rng, 6),
    "odd": lambda rng: skew(rng, 7),
    "batch": lambda rng: skew(rng, 2, 3, 4),
    "zero": lambda rng: np.zeros((5, 5)),
    "repeated": lambda rng: turned(1.3 * np.kron(np.eye(3), PLANES), rng),
    "nearly repeated": lambda rng: turned(np.kron(np.diag([1, 1 + 1e-9, 1e-9]), PLANES), rng),
    "large": lambda rng: 5 * skew(rng, 6),
    "one by one": lambda rng: np.zeros((1, 1)),
}


def turned(S, rng):
    """U S Uᵀ for a random rotation U, exactly skew-symmetric."""
    U = columns(rng, *S.shape)
    S = U @ S @ U.T
    return (S - S.T) / 2


def spectral_norm(S):
    return float(np.linalg.norm(S, 2, axis=(-2, -1)).max())


def phi1(Z):
    """φ₁(Z) = ∫₀¹ e^{tZ} dt by Gauss' rule with 32 points, right for ‖Z‖ < 40 to all digits."""
    points, weights = np.polynomial.legendre.leggauss(32)
    return sum(w / 2 * expm_one_by_one((1 + t) / 2 * Z) for t, w in zip(points, weights))
