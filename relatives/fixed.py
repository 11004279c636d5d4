"""Mixing that does not look at the tokens: none, O = V, or by a fixed orthogonal matrix, O = A V.

What attention is worth on a task is what it does better than these.
"""

import numpy as np

from autograd import Tensor, array_module
from osa_minimal import random_orthogonal
from relatives.ops import split_heads
from relatives.softmax import Softmax


class Identity(Softmax):
    """No mixing between tokens at all: O = V."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.parameters["W_QK"]

    def project(self, X):
        """V (B, h, N, d_v) alone."""
        return split_heads((X @ self.parameters["W_V"]).reshape(-1, *X.shape[-2:]), self.heads)

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
