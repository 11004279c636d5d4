"""A huge batch of small matrices is its members alone, forward and backward."""

import numpy as np
import pytest
from test_properties_autograd import with_gradients

import autograd as ag
import fast
import osa_minimal
from autograd import Tensor
from fast.basis import cholesky_basis
from fast.small import Products
from relatives.softmax import softmax_attention
from relatives.transformer import layer_norm
from training.optimizers import orthogonalise, retract


def attention(operator, how):
    def run(dO, Q, K, V):
        O, saved = operator.osa_forward(Q, K, V, 0.7, how)
        return O, *operator.osa_backward(dO, saved)[:3]

    return run


def exponential(G, M, W):
    small = Products(M - M.mT, W)
    return small.value, *small.adjoint(G)


# name: (function of arrays with one batch axis, their shapes without it)
FUNCTIONS = {
    "osa, auto": (attention(fast, "auto"), [(3, 1)] * 4),
    "osa, qr": (attention(fast, "qr"), [(3, 1)] * 4),
    "osa of the paper": (attention(osa_minimal, "qr"), [(3, 1)] * 4),
    "softmax attention": (with_gradients(softmax_attention), [(3, 1), (3, 3)]),
    "layer_norm": (
        with_gradients(lambda X: layer_norm(X, np.arange(4.0), np.ones(4))),
        [(4,), (4,)],
    ),
    "matmul": (with_gradients(ag.matmul), [(2, 2), (2, 3), (3, 2)]),
    "linear": (
        with_gradients(lambda X: ag.linear(X, np.arange(6.0).reshape(3, 2), np.ones(2))),
        [(2, 2), (2, 3)],
    ),
    "softmax": (with_gradients(ag.softmax), [(4,), (4,)]),
    "orthogonalise": (lambda M: [orthogonalise(M)], [(3, 2)]),
    "retract": (lambda M: [retract(M / 9)], [(3, 2)]),
    "cholesky_basis": (cholesky_basis, [(3, 2)]),
    "Products": (exponential, [(3, 1), (3, 3), (3, 1)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_huge_batch_is_its_members_alone(name, rng):
    function, shapes = FUNCTIONS[name]
    n = 120_000  # several parts for `parallel`
    arrays = [rng.standard_normal((n, *shape)) for shape in shapes]
    together = function(*arrays)
    for i in (0, *rng.integers(1, n - 1, 20), n - 1):
        alone = function(*(a[i : i + 1] for a in arrays))
        for a, b in zip(together, alone):
            # All numbers are of size 1 … 10, and the route may be another for one than for all.
            np.testing.assert_allclose(a[i : i + 1], b, rtol=0, atol=1e-12 * (1 + abs(b).max()))


def test_cross_entropy_of_a_huge_batch_is_the_mean(rng):
    n = 100_000
    logits, labels = rng.standard_normal((n, 3)).astype(np.float32), rng.integers(0, 3, n)
    z = Tensor(logits, requires_grad=True)
    loss = ag.cross_entropy(z, labels)
    loss.backward()
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    # NumPy adds in pairs: log₂ n roundings and a few more.
    assert abs(loss.data + np.log(p[np.arange(n), labels]).mean()) < 32 * np.finfo(np.float32).eps
    assert abs(z.grad - (p - np.eye(3)[labels]) / n).max() < 8 * np.finfo(np.float32).eps / n
