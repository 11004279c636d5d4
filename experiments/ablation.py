"""What each part of the start is worth where sequences are long: one change at a time.

    python experiments/ablation.py [--processes 2] [--quick]

Preset "pixels" in patches of 2 x 2 with two heads (N = 196, width 32), STEPS steps of 32 images,
three seeds: as it is, then with one part taken back or one added (CHANGES), at the same rates:
ablation.csv.
"""

import contextlib
from unittest.mock import patch

import common

STEPS, SEEDS = 250, 3
BASE = {"preset": "pixels", "patch": 2, "depth": 4, "heads": 2, "s_norm": 1.0, "steps": STEPS}
CHANGES = {
    "as it is": {},
    "b_E Gaussian, 0.1, for the cosines": {"undone": "gaussian 0.1"},
    "b_E Gaussian, 0.5": {"undone": "gaussian 0.5"},
    "rate of α 0.001, whatever its start": {"undone": "absolute"},
    "one clipping of all gradients": {"undone": "one clipping"},
    "all of these, ‖S‖₂ = 0.1": {"undone": "gaussian 0.1, absolute, one clipping", "s_norm": 0.1},
    "‖S‖₂ = 0.1 at the start": {"s_norm": 0.1},
    "angles of 1 at most": {"undone": "bounded"},
    "two layers": {"depth": 2},
}  # fmt: skip


def bounded(self, F):
    """α/√(1 + ‖S‖_F²/2) for α, in each sample and head: no angle is larger than 1."""
    from fast.operator import osa_packed

    d_v, alpha = F.shape[-1] // 3, self.parameters["alpha"]
    Q, K = F[..., :d_v], F[..., d_v : 2 * d_v]
    Qt, Kt = (M.transpose(0, 1, 3, 2) for M in (Q, K))
    QK = Qt @ K
    # ‖S‖_F² = 2 s² (⟨QᵀQ, KᵀK⟩ − ⟨QᵀK, (QᵀK)ᵀ⟩), and squares of angles add up to half of it
    squares = ((Qt @ Q) * (Kt @ K) - QK * QK.transpose(0, 1, 3, 2)).sum(axis=(2, 3), keepdims=True)
    return osa_packed(F, alpha * (1 + alpha * alpha * squares / d_v) ** -0.5)


def undo(part):
    """The change by this name, as a context."""
    import numpy as np

    import fast
    import osa_minimal
    import train
    from training import optimizers

    def gaussian(rows, columns, d, dtype=np.float32):
        drawn = np.random.default_rng(0).standard_normal((rows * columns, d))
        return (float(part.split()[1]) * drawn).astype(dtype)

    def absolute(config, parameters):
        ordered, updates = optimizers.assign(config, parameters)
        return ordered, [(o, p, 0.001 if np.ndim(rate) else rate) for o, p, rate in updates]

    def clip_all(grads, largest):  # the gradients of one optimiser are a view of all
        return optimizers.clip(grads.base, largest)

    return {
        "gaussian": patch.object(osa_minimal, "position_embedding", gaussian),
        "absolute": patch.object(train, "assign", absolute),
        "one": patch.object(train, "clip", clip_all),
        "bounded": patch.object(fast.MultiHeadOSA, "attend", bounded),
    }[part.split()[0]]


def train_changed(options):
    options = dict(options)
    with contextlib.ExitStack() as stack:
        for part in filter(None, options.pop("undone", "").split(", ")):
            stack.enter_context(undo(part))
        return common.train_once(options)


def draw(path):
    """Test accuracy of every run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = common.read(path)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for i, arm in enumerate(arms):
        some = [row for row in rows if row["arm"] == arm]
        test = 100 * np.array([float(row["test"]) for row in some])
        axes.plot(test, np.full(len(test), i), "o", color=f"C{int(i > 0)}")
    axes.set(yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5))
    axes.set(xlabel=f"test accuracy after {rows[0]['steps']} steps, %")
    axes.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    args = common.arguments(__doc__)
    path = args.folder / "ablation.csv"
    jobs = [{"arm": arm, "undone": "", **BASE, **change, "seed": seed}
            for seed in range(SEEDS) for arm, change in CHANGES.items()]  # fmt: skip
    if args.quick:
        jobs = [job | {"steps": 3, "every": 20} for job in jobs[:2]]
    if not args.draw:
        common.run_all(path, jobs, args.processes, train_changed)
    draw(path)


if __name__ == "__main__":
    main()
