"""A whole training step (forward, backward, update) of the default preset, ours and PyTorch's.

The PyTorch side is the same model with the same optimisers in eager mode, written as one would
there: its own autograd, its attention one of `peers`.
"""

import itertools
import math
import time

import numpy as np
import peers
import torch
from torch.nn import functional

import train
from autograd import to_cpu
from osa_minimal import patchify
from training import data


class TorchModel:
    """The network of a `train.Run`, with its weights, under PyTorch's autograd."""

    def __init__(self, run, attention):
        self.attention, self.model = attention, run.model
        arrays = {k: to_cpu(t.data) for k, t in run.parameters.items()}
        self.p = {k: torch.tensor(a, requires_grad=True) for k, a in arrays.items()}

    def __call__(self, patches):
        p, h = self.p, self.model.layers[0][0].heads
        X = patches @ p["W_E"] + p["b_E"]
        B, N, d = X.shape
        for i, (_, mlp) in enumerate(self.model.layers):
            q = {k.rsplit(".", 1)[1]: v for k, v in p.items() if k.startswith(f"layers.{i}.")}
            QK = (X @ q["W_QK"].permute(1, 0, 2).reshape(d, -1)).reshape(B, N, h, -1)
            Q, K = QK.permute(0, 2, 1, 3).chunk(2, dim=-1)
            V = (X @ q["W_V"]).reshape(B, N, h, -1).permute(0, 2, 1, 3)
            O = self.attention(Q, K, V, q.get("alpha"))
            Y = O.permute(0, 2, 1, 3).reshape(B, N, d) @ q["W_O"]
            H = functional.leaky_relu(Y @ q["W_1"] + q["b_1"], mlp.slope) * mlp.gain
            X = H @ q["W_2"] + q["b_2"]
        return X.mean(dim=1) @ p["W_C"] + p["b_C"]


class TorchMuon:
    """`Muon` of training/optimizers.py: matrices of one shape as one batch."""

    def __init__(self, parameters):
        self.groups = {}
        for p in parameters:
            self.groups.setdefault(p.shape[-2:], []).append((p, torch.zeros_like(p)))

    @torch.no_grad()
    def step(self, lr):
        for (n, m), group in self.groups.items():
            for p, buffer in group:
                buffer.mul_(0.95).add_(p.grad)
            X = torch.cat([(p.grad + 0.95 * b).reshape(-1, n, m) for p, b in group])
            W = torch.cat([p.reshape(-1, n, m) for p, _ in group])
            if n > m:
                X, W = X.mT, W.mT
            X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-12)
            for _ in range(5):
                A = X @ X.mT
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
            W = W - lr * X
            for _ in range(2):
                W = 1.5 * W - 0.5 * (W @ W.mT) @ W
            W = W.mT if n > m else W
            start = 0
            for p, _ in group:
                count = math.prod(p.shape[:-2])
                p.copy_(W[start : start + count].reshape(p.shape))
                start += count


def torch_step(run, attention, images, labels, mode=None):
    """One step of the PyTorch model as a function that returns the loss, a tensor.

    mode: of `torch.compile`; None for eager.
    """
    model = TorchModel(run, attention)
    forward = torch.compile(model.__call__, mode=mode) if mode else model
    names = [
        k for k in model.p if k.startswith("layers.") and model.p[k].ndim > 1 and "alpha" not in k
    ]
    muon = TorchMuon([model.p[k] for k in names])
    adam = torch.optim.AdamW([p for k, p in model.p.items() if k not in names], lr=1e-5)
    patches = torch.tensor(np.ascontiguousarray(patchify(to_cpu(images), run.model.patch)))
    labels = torch.tensor(to_cpu(labels).astype(np.int64))

    def step():
        loss = functional.cross_entropy(forward(patches), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(model.p.values()), 1.0)
        muon.step(1e-5)
        adam.step()
        for p in model.p.values():
            p.grad = None
        return loss.detach()

    return step


def first_batch(run):
    """Images, standardised, and labels of the first step."""
    images, labels = run.batches.images(*run.batches.choose(0))
    return run.standardise(images), labels


def stepping(run):
    """One training step after the other, as a function without arguments."""
    t = itertools.count()
    return lambda: run.step(next(t))


def step(threads, repeats):
    """Milliseconds per step; ours runs with one BLAS thread in each of its threads."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    results, dataset = {}, data.load()
    for attention in ("osa", "softmax"):
        run = train.Run(train.Config(attention=attention), dataset, threads=threads)
        images, labels = first_batch(run)
        competitors = {"ours": stepping(run)}
        if attention == "osa":
            paper = train.Run(train.Config(operator="paper"), dataset, threads=threads)
            competitors["ours, --operator paper"] = stepping(paper)
        choices = peers.PEERS if attention == "osa" else {"fused softmax": peers.fused_softmax}
        for name, f in choices.items():
            competitors[f"PyTorch, {name}"] = torch_step(run, f, images, labels)
        rivals = [name for name in competitors if not name.startswith("ours")]
        first = {name: float(competitors[name]()) for name in rivals}
        own = float(run.gradients(images, labels)[0])
        assert all(abs(loss - own) < 1e-3 * own for loss in first.values()), (own, first)
        times = {}
        for name, f in competitors.items():
            if name not in rivals:
                with threadpool_limits(1, user_api="blas"):
                    times[name] = _median(f, 3 * repeats)
            else:
                times[name] = _median(f, repeats)
        best = min(times[name] for name in rivals)
        results[attention] = {
            "milliseconds": {k: round(1e3 * t, 1) for k, t in times.items()},
            "ours_over_best_pytorch": round(times["ours"] / best, 2),
        }
        if attention == "osa":
            ratio = times["ours, --operator paper"] / times["ours"]
            results[attention]["paper_over_ours"] = round(ratio, 2)
    return results


def _median(f, repeats):
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))
