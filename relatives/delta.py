"""Deep Delta Learning: the skip connection replaced by a rank-one update of each token's features.

The state x (N, d), or (N, d, m) with m values, meets the output k̃ of a branch (attention or MLP):

    k = k̃/√(|k̃|² + ε²);   β = 2σ(c w_b + b_b) ∈ (0, 2);   v = x' w_v + b_v, or v_scale · σ(that)
    x ← x + β k (v − kᵀx) = (I − β k kᵀ) x + β k v

Source: arXiv 2601.00417 and its code, which squashes v (v_scale 4) where the paper does not (None).
x' is Vin, the state compressed to (N, d) where m > 1, and by default x itself.
Shapes: X (..., N, d) or (..., N, d, m); Kin (k̃), C, Vin (..., N, d); wb (d, 1), bb (1,), wv (d, m),
bv (m,) or None.  Cost: N d m, token by token, causal as its branch.
Assumes RMSNorm before the branch and in c; it is itself the skip.
Beside OSA: a rank-one update of the features, orthogonal at β = 0 and 2 only (eigenvalue 1 − β),
where OSA's is an orthogonal rank-2d update of the tokens.
"""

import autograd as ag
from relatives.ops import shaped, sigmoid


def delta(X, Kin, C, wb, bb, wv, bv, *, Vin=None, k_eps, v_scale=None):
    """The new state, of the shape of X, by the formulas above."""
    wide = X.ndim > Kin.ndim
    if wide and Vin is None:
        raise ValueError(f"Vin, the compressed state, is needed for an X of shape {X.shape}")
    X, Kin, C, wb, bb, wv, bv, Vin = shaped(
        {} if wide else {"m": 1}, X=(X, "... N d m" if wide else "... N d"), Kin=(Kin, "... N d"),
        C=(C, "... N d"), wb=(wb, "d 1"), bb=(bb, "1"), wv=(wv, "d m"), bv=(bv, "m"),
        Vin=(Vin, "... N d"),
    )  # fmt: skip
    v = (X if Vin is None else Vin) @ wv  # (..., N, m)
    v = v if bv is None else v + bv
    v = v if v_scale is None else sigmoid(v) * float(v_scale)
    beta = sigmoid(C @ wb + bb) * 2.0  # (..., N, 1)
    k = Kin / ag.sqrt((Kin * Kin).sum(axis=-1, keepdims=True) + float(k_eps) ** 2)
    k, X = k[..., None], X if wide else X[..., None]  # (..., N, d, 1), (..., N, d, m)
    error = v - (k * X).sum(axis=-2)  # v − kᵀX (..., N, m)
    X = X + k * (beta * error)[..., None, :]
    return X if wide else X[..., 0]
