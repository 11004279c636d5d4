"""Trains a skipless Orthogonal-Self-Attention Transformer on MNIST, on a CPU or a GPU.

    python train.py                          the main job, preset "mnist"
    python train.py --preset tiny            ten seconds, 1,000 images
    python train.py --operator paper         with the operator of osa_minimal.py, not that of fast/
    python train.py --attention softmax --skip --norm       a baseline: the usual ViT
    python train.py --resume runs/NAME       goes on with a stopped run
    python train.py --eval runs/NAME         test accuracy of a trained model
    mpiexec -n 4 python train.py             the main job in four processes, or on four cards

Every run writes a folder: config.json, metrics.csv, summary.json, curves.png, its checkpoint.
"""

import dataclasses
import functools
import os
import sys
import zlib

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from training.options import UserError, before_numpy, option, parse, run_command

if __name__ == "__main__":
    before_numpy()

import numpy as np

import autograd as ag
import osa_minimal
import relatives
from fast.gpu import find_device, recorded
from fast.threads import cores, keep_freed_memory
from training import data, folder, report, resume
from training.optimizers import assign, clip, flatten, schedule
from training.ranks import Ranks
from training.threads import in_threads

MIXERS = *relatives.ATTENTION, *relatives.LAYERS


@dataclasses.dataclass
class Config:
    """What determines the weights, with data, threads, ranks, --graph; the defaults are "mnist"."""

    preset: str = option("mnist", "mnist, tiny or pixels", choices=("mnist", "tiny", "pixels"))
    attention: str = option("osa", "what mixes tokens", choices=MIXERS)
    operator: str = option("fast", "osa by fast/ or osa_minimal.py", choices=("fast", "paper"))
    skip: str = option("none", "skip connections; alone: add", choices=relatives.SKIPS, alone="add")
    norm: bool = option(False, "layer normalisation")
    depth: int = option(4, "layers", least=1, most=1000)
    width: int = option(64, "of a token, d", least=1, most=16384)
    heads: int = option(2, "heads, h", least=1)
    patch: int = option(7, "side of a patch in pixels", least=1)
    mlp_ratio: int = option(4, "hidden width of the MLP / d", least=1, most=1024)
    eta: float = option(0.0, "correlation to which the leaky ReLUs take 0; 0: at most 0.65")
    s_norm: float = option(0.1, "‖S‖₂ on the first batch, for which α is calibrated", most=1e6)
    epochs: int = option(5, "passes over the images", least=1)
    batch_size: int = option(128, "images of a step", least=1)
    optimizer: str = option("muon", "of the weight matrices", choices=("muon", "adamw"))
    lr: float = option(0.01, "rate of matrices under muon, of all but α under adamw")
    adam_lr: float = option(0.01, "rate of what is no matrix, under muon")
    alpha_lr: float = option(0.01, "rate of α, relative to its start")
    weight_decay: float = option(0.0, "of adamw, but not of α")
    warmup: int = option(100, "steps in which the rates rise, half of all at most")
    clip: float = option(1.0, "largest norm of an optimiser's gradients", least=1e-6)
    shift: int = option(1, "training images are moved by up to so many pixels, each way")
    limit_data: int = option(0, "training images used; 0: all")
    seed: int = option(0, "of weights, images and their order")


PRESETS = {
    "mnist": {},
    "tiny": {"depth": 2, "epochs": 10, "limit_data": 1000, "batch_size": 50, "warmup": 20},
    "pixels": {"width": 32, "heads": 4, "patch": 1, "epochs": 1, "batch_size": 32, "s_norm": 1.0},
}  # fmt: skip


def build(config, image, classes, xp=np):
    """The model of a configuration, drawn from its seed."""
    if config.attention == "osa" and config.operator == "paper":
        attention = osa_minimal.MultiHeadOSA
    elif config.attention in relatives.LAYERS:  # some have weights for a number of tokens
        tokens = image[0] * image[1] // config.patch**2
        attention = functools.partial(relatives.LAYERS[config.attention], tokens=tokens)
    else:
        attention = relatives.ATTENTION[config.attention]
    return relatives.Transformer(
        d=config.width, heads=config.heads, depth=config.depth, patch=config.patch, image=image,
        classes=classes, mlp_ratio=config.mlp_ratio, eta=config.eta or None, attention=attention,
        skip=config.skip, norm=config.norm, rng=np.random.default_rng([config.seed, 0]), xp=xp,
    )  # fmt: skip


def gradients(model, images, labels):
    """Adds the gradients of the loss to every p.grad; returns the loss, and how many were right."""
    logits = model(images)
    loss = ag.cross_entropy(logits, labels)
    loss.backward()
    return loss.data, (logits.data.argmax(axis=1) == labels).sum()


class Run:
    """Images, model and optimisers of a configuration, and `step`, which changes the weights."""

    def __init__(self, config, dataset, xp=np, threads=1, ranks=None, graph=False, statistics=None):
        self.config, self.xp, self.dataset, self.ranks = config, xp, dataset, ranks or Ranks()
        rng = np.random.default_rng([config.seed, 1])
        x, y, x_val, y_val = data.split(dataset, config.limit_data, rng)
        self.x_val, self.y_val = xp.asarray(x_val), xp.asarray(y_val)
        self.digest = zlib.crc32(y, zlib.crc32(x))
        self.statistics = statistics or data.statistics(x)  # a resumed run's stay, whatever --data
        self.standardise = lambda images: data.standardise(images, *self.statistics)
        self.batches = data.Batches(x, y, config, xp, self.ranks.rank, self.ranks.size)
        self.steps = config.epochs * self.batches.per_epoch
        self.threads = min(threads if xp is np else 1, self.batches.size // self.ranks.size)
        # One model a thread, of the same weights.
        models = [build(config, x.shape[1:], dataset.classes, xp) for _ in range(self.threads)]
        self.model, self.has_angles = models[0], config.attention == "osa"
        images, _ = self.batches.images(*self.batches.choose(0, whole=True))
        osa_minimal.calibrate(self.model, self.standardise(images), config.s_norm)

        self.parameters, self.updates = assign(config, self.model.parameters)
        self.weights, self.grads = flatten(self.parameters)  # every p.data, p.grad is a view
        self.gradients = functools.partial(gradients, self.model)  # loss.backward() is there
        # Several threads, several machines, a CUDA graph: each line can be struck out.
        self.gradients = in_threads(gradients, models, self) if self.threads > 1 else self.gradients
        self.gradients = self.ranks.summed(self.gradients, self.grads, self.batches.size)
        self.update = recorded(self.update, xp) if graph else self.update

    def step(self, t):
        """Step t = 0, 1, …; returns the loss, how many were right and the norm of the gradients."""
        factor = schedule(t, self.steps, self.config.warmup)  # on the learning rates
        return self.update(*self.batches.choose(t), factor, t + 1)

    def update(self, chosen, offsets, factor, count):
        """The update number `count` = 1, 2, … of the weights, by the images chosen for it."""
        images, labels = self.batches.images(chosen, offsets)
        self.grads[...] = 0
        loss, right = self.gradients(self.standardise(images), labels)
        norm = 0.0
        for optimizer, part, rate in self.updates:  # clipped apart: ∂L/∂α is large where S/α is
            norm = self.xp.hypot(norm, clip(self.grads[part], self.config.clip))
            optimizer.step(self.weights[part], self.grads[part], factor * rate, count)
        return loss, right, norm


def train(run, where, progress, last, stop):
    """Steps until `last` or a signal, with metrics and checkpoints in the folder `where`."""
    with report.Log(where, run, progress, last) as log, resume.Saver(where, run, progress) as saver:
        for t in stop.steps(progress.step, last):
            loss, right, norm = run.step(t)
            log.add(loss, right)
            if log.due():
                log.row(norm)
            if saver.due():
                saver.save()
        saver.save()


def main(arguments=None):
    ranks = Ranks()
    with ranks.ending_together():
        return work(ranks, *parse(Config, PRESETS, arguments, __doc__))


def work(ranks, config, args, given):
    """What the command line asks for, in one of several processes; returns the exit status."""
    keep_freed_memory()
    if args.graph and ranks.size > 1:
        raise UserError("--graph: the gradients of several ranks are not summed in a CUDA graph")
    if not args.eval and config.operator == "paper" and config.attention != "osa":
        raise UserError(f"--operator paper: only osa has one, not {config.attention}")
    if args.export:
        folder.check_export(args.export)
    progress, arrays = resume.Progress(), None
    if args.eval or args.resume:
        config, progress, arrays = resume.load(args.eval or args.resume, Config, given, args.resume)
    if args.eval and ranks.rank:
        return 0
    progress.data = os.path.abspath(args.data) if args.data else progress.data
    threads = args.threads or progress.threads or max(1, min(8, cores() // ranks.neighbours))
    try:
        xp, device = find_device(args.device, ranks.neighbour)
        dataset = data.load(progress.data, ("test",) if args.eval else ("train", "test"))
        if args.eval:
            model = build(config, tuple(progress.image), progress.classes, xp)
            resume.restore(arrays, model.parameters, xp=xp)
            report.print_accuracy(model, dataset, progress.statistics, xp)
            if args.export:
                report.export(args.export, model, config, progress.statistics)
            return 0
        run = Run(config, dataset, xp, threads, ranks, args.graph, arrays and progress.statistics)
        if args.resume and progress.digest != run.digest:
            raise UserError(f"--resume {args.resume}: these are not the images it was trained on")
        if arrays:
            resume.restore(arrays, run.parameters, run.updates, xp)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    each = f" in each of {ranks.size} ranks" if ranks.size > 1 else ""
    print(f"device {device}; {run.threads} threads{each}")
    return in_folder(run, progress, args, device)


def in_folder(run, progress, args, device):
    """Trains and reports in the folder of a new or a stopped run; returns the exit status."""
    run.ranks.check_same(run.weights, run.digest)
    last = min(run.steps, args.max_steps or run.steps)
    if run.ranks.rank:  # the first rank alone looks at the results and writes them
        with resume.Stop(run.ranks) as stop:
            for t in stop.steps(progress.step, last):
                run.step(t)
        return 0
    progress.threads, progress.log_every = run.threads, args.log_every or progress.log_every or 50
    progress.digest, progress.statistics = run.digest, list(run.statistics)
    progress.image, progress.classes = [*run.x_val.shape[1:], 1][:3], run.dataset.classes
    where = folder.prepare(args, run.config.preset)
    with folder.in_use(where, new=not args.resume), resume.Stop(run.ranks) as stop:
        repeat = report.begin(run, progress, where, device, args)
        train(run, where, progress, last, stop)
    if progress.step < last:
        return stop.farewell(where, progress.step)
    report.finish(run, progress, where, repeat)
    if args.export:
        report.export(args.export, run.model, run.config, run.statistics)
    return 0


if __name__ == "__main__":
    run_command(main)
