"""Deep Delta Learning: the skip connection replaced by a rank-one update of each token's features.

The state x (N, d) meets the output k̃ of a branch (attention or MLP), which read the context c:

    k = k̃/√(|k̃|² + ε²);   β = 2σ(c w_b + b_b) ∈ (0, 2);   v = x w_v + b_v, or v_scale · σ(that)
    x ← x + β k (v − kᵀx) = (I − β k kᵀ) x + β k v

Source: arXiv 2601.00417 and its code, which squashes v (v_scale 4) where the paper does not (None).
Left out: its states of several values a feature.  Cost: N d, token by token; causal as its branch.
Assumes RMSNorm before the branch, c = RMSNorm(x).
Beside OSA: a rank-one update of the features, orthogonal at β = 0 and 2 only (eigenvalue 1 − β),
where OSA's is an orthogonal rank-2d update of the tokens.
"""

import numpy as np

import autograd as ag
from osa_minimal import tensors
from relatives.ops import shaped, sigmoid


@shaped(X="... N d", Kin="... N d", C="... N d", wb="d 1", bb="1", wv="d 1", bv="1")
def delta(X, Kin, C, wb, bb, wv, bv, *, k_eps=1e-5, v_scale=None):
    """The new state (..., N, d) by the formulas above."""
    v = X @ wv + bv  # (..., N, 1)
    v = v if v_scale is None else sigmoid(v) * float(v_scale)
    beta = sigmoid(C @ wb + bb) * 2.0
    k = Kin / ag.sqrt((Kin * Kin).sum(axis=-1, keepdims=True) + float(k_eps) ** 2)
    return X + k * (beta * (v - (k * X).sum(axis=-1, keepdims=True)))


class DeltaSkip:
    """This rule as the skip of a block, (X, Y = f(C), C) -> the new X; at first β = 1 and v = 2."""

    def __init__(self, name, d, xp, dtype):
        zeros = {"wb": (d, 1), "bb": (1,), "wv": (d, 1), "bv": (1,)}
        self.own = tensors({k: np.zeros(shape, dtype) for k, shape in zeros.items()}, xp)
        self.parameters = {f"{name}.{k}": p for k, p in self.own.items()}

    def __call__(self, X, Y, C):
        return delta(X, Y, C, **self.own, v_scale=4.0)
