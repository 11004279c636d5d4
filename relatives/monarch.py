"""Monarch mixing: a fixed structured matrix over the tokens, two block-diagonal factors.

    M = perm(l, s) · blockdiag(W₂) · perm(r, l) · blockdiag(W₁),    perm(a, b): (a, b) transposed
    W₁: k blocks (q, p), k p = N;   W₂: l blocks (s, r), l r = k q;   M (l s, N)

Source: Dao et al., Monarch, 2022, and the reference code of HazyResearch/fly.  If all blocks are
orthogonal then M is (ours): k q(q−1)/2 + l s(s−1)/2 angles, 294 for N = 49 against 1,176.
Every channel alike.  Cost: N q + k q s per channel, 2 N^1.5 for p = q = r = s = √N.  Causal: no.
Assumes a skip and norm as published; with orthogonal blocks neither.
Beside OSA: the isometry that looks at no data; a task it does as well on needs no attention.
"""

from relatives.ops import T, shaped


@shaped(X="... N c", W1="k q p", W2="l s r")
def monarch(X, W1, W2):
    """M X (..., l s, c) by the formulas above."""
    (*batch, N, c), (k, q, p), (l, s, r) = X.shape, W1.shape, W2.shape
    if k * p != N:
        raise ValueError(f"W1 must be (k, q, p) with k p = {N} tokens, got {W1.shape}")
    if l * r != k * q:
        raise ValueError(f"W2 must be (l, s, r) with l r = k q = {k * q}, got {W2.shape}")
    z = W1 @ X.reshape(*batch, k, p, c)  # (k, q, p) x (..., k, p, c) -> (..., k, q, c)
    z = T(z.reshape(*batch, r, l, c), -3, -2)  # (..., l, r, c)
    return T(W2 @ z, -3, -2).reshape(*batch, l * s, c)
