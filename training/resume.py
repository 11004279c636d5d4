"""Stopping a run and going on as if it had never stopped: signals, and what a checkpoint holds."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from autograd import to_cpu
from training import checkpoint
from training.options import UserError, check_values

NAME = "checkpoint.safetensors"
SECONDS = 60  # from save to save, where an epoch takes longer


@dataclasses.dataclass
class Progress:
    """How far a run has come, and what was seen on the way."""

    step: int = 0
    seconds: float = 0.0
    worst_error: float = 0.0
    largest_s: float = 0.0
    sums: list = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])  # since the last row
    threads: int = 0  # sums are rounded in another order by more of them
    log_every: int = 50
    data: str = ""  # the path of --data
    digest: int = 0  # of the training images
    statistics: list = dataclasses.field(default_factory=lambda: [0.0, 1.0])  # mean, deviation
    image: list = dataclasses.field(default_factory=lambda: [28, 28, 1])  # its shape (H, W, C)
    classes: int = 0


class Stop:
    """Notes SIGINT, SIGTERM and SIGHUP, so that the step in progress is finished; a second one
    ends the process."""

    def __init__(self, ranks):
        self.signal, self.ranks = None, ranks

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
        self.before = {n: signal.signal(n, self.notice) for n in dict.fromkeys(numbers)
                       if signal.getsignal(n) is not signal.SIG_IGN}  # fmt: skip
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def notice(self, number, frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def farewell(self, folder, step):
        """Says what stopped the run and how to go on; returns the exit status."""
        name = signal.Signals(self.signal).name
        text = f"{name}: stopped after step {step}; go on with --resume {folder}"
        print(text, file=sys.stderr)
        return 128 + self.signal

    def steps(self, first, last):
        """first, first + 1, …, last − 1, until a signal."""
        for t in range(first, last):
            if self.ranks.stopped(self):
                return
            yield t


def state(run):
    """Every array that training changes, by name, on the CPU."""
    arrays = {f"model.{k}": p.data for k, p in run.parameters.items()}
    for optimizer, _, _ in run.updates:
        arrays |= {f"optimizer.{k}": a for k, a in optimizer.state.items()}
    return {k: to_cpu(a) for k, a in arrays.items()}


class Saver:
    """Writes folder/checkpoint.safetensors; where training diverges, says which one is left."""

    def __init__(self, folder, run, progress):
        self.path, self.run, self.progress = folder / NAME, run, progress
        self.saved_at, self.saved_step = time.monotonic(), None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind and issubclass(kind, FloatingPointError):
            kept = f"the last good checkpoint is {self.path}"
            kept = kept if self.path.exists() else "none was saved yet"
            raise FloatingPointError(f"{error}, at step {self.progress.step}; {kept}") from None

    def due(self):
        """At the end of an epoch, and a minute after the last time."""
        epoch_ended = self.progress.step % self.run.batches.per_epoch == 0
        return epoch_ended or time.monotonic() - self.saved_at > SECONDS

    def save(self):
        """Saves this step, once, unless a number in it is NaN or Inf."""
        if self.saved_step == self.progress.step:
            return
        arrays, progress = state(self.run), dataclasses.asdict(self.progress)
        for name, a in arrays.items():
            if not np.isfinite(a).all():
                raise FloatingPointError(f"{name} contains NaN or Inf")
        progress["sums"] = [float(a) for a in self.progress.sums]
        meta = {"config": dataclasses.asdict(self.run.config), "progress": progress}
        checkpoint.save(self.path, arrays, meta)
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step


def load(path, Config, given):
    """(Config, Progress, arrays) of a checkpoint file, or of the folder of a run; what was given on
    the command line must agree with it."""
    path = Path(path) / NAME if os.path.isdir(path) else Path(path)
    arrays, meta = checkpoint.load(path)
    config, progress = (
        read(kind, meta.get(name) if isinstance(meta, dict) else None, path)
        for kind, name in ((Config, "config"), (Progress, "progress"))
    )
    for name, value in given.items():
        saved = getattr(config, name)
        if name == "epochs" and value > saved:
            print(f"epochs {saved} → {value}: the rates go on as those of {value} epochs")
            config.epochs = value
        elif saved != value:
            raise UserError(f"{path}: {name} differs: {saved!r} in the checkpoint, {value!r} here")
    try:
        check_values(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, progress, arrays


def read(kind, values, path):
    """The dataclass `kind` of a dict that has exactly its fields, of its types."""
    form = dataclasses.asdict(kind())
    if not isinstance(values, dict) or {k: types(v) for k, v in values.items()} != {
        k: types(v) for k, v in form.items()
    }:
        raise UserError(f"{path} is not a checkpoint of this program")
    numbers = [v for value in values.values() for v in (value if type(value) is list else [value])]
    if not all(0 <= v < np.inf for v in numbers if type(v) is not str) and kind is Progress:
        raise UserError(f"{path} is not a checkpoint of this program")
    return kind(**values)


def types(value):
    return [type(v) for v in value] if isinstance(value, list) else type(value)


def restore(arrays, parameters, optimizers=(), xp=np):
    """Puts a checkpoint's arrays in the place of those of the model and of the optimisers."""
    mine = {f"model.{k}": p.data for k, p in parameters.items()}
    for optimizer in optimizers:
        mine |= {f"optimizer.{k}": a for k, a in optimizer.state.items()}
    if not optimizers:
        arrays = {k: a for k, a in arrays.items() if k.startswith("model.")}

    def form(arrays):
        return {k: (a.shape, a.dtype.kind, a.dtype.itemsize) for k, a in arrays.items()}

    if form(mine) != form(arrays):
        raise UserError("the checkpoint's arrays are not those of this configuration")
    for k, a in arrays.items():
        if not np.isfinite(a).all():
            raise UserError(f"the checkpoint's {k} contains NaN or Inf")
        mine[k][...] = xp.asarray(a)
