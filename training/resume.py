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
from training.options import UserError

NAME = "checkpoint.safetensors"
# Ctrl-C, kill, a closed terminal or console, a limit of time, and a cluster's warnings of one.
SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGXCPU", "SIGUSR1", "SIGUSR2"
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
    """Notes one of SIGNALS, so that the step in progress is finished; a second one ends the
    process."""

    def __init__(self, ranks):
        self.signal, self.ranks = 0, ranks

    def __enter__(self):
        numbers = {getattr(signal, name, signal.SIGINT) for name in SIGNALS}
        caught = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        self.before = {n: signal.signal(n, self.notice) for n in caught}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def notice(self, number, frame):
        if self.signal:
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
            if number := self.ranks.largest(self.signal):  # all stop after the same step
                self.signal = number
                return
            yield t


def state(parameters, updates=()):
    """Every array that training changes, by name; updates: as `assign` has them."""
    arrays = {f"model.{k}": p.data for k, p in parameters.items()}
    for optimizer, _, _ in updates:
        arrays |= {f"optimizer.{k}": a for k, a in optimizer.state.items()}
    return arrays


class Saver:
    """Writes folder/checkpoint.safetensors; where training diverges, says which one is left."""

    def __init__(self, folder, run, progress):
        self.path, self.run, self.progress = folder / NAME, run, progress
        self.saved_at, self.saved_step = time.monotonic(), None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind and issubclass(kind, OSError):  # nobody reads any more: `| head`, a closed terminal
            self.save()
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
        arrays = {k: to_cpu(a) for k, a in state(self.run.parameters, self.run.updates).items()}
        for name, a in arrays.items():
            if not np.isfinite(a).all():
                raise FloatingPointError(f"{name} contains NaN or Inf")
        self.progress.sums = [float(a) for a in self.progress.sums]
        checkpoint.save(self.path, arrays, about(self.run.config, self.progress))
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step


def about(config, progress):
    """What a checkpoint says of a run, as JSON has it."""
    return {"config": dataclasses.asdict(config), "progress": dataclasses.asdict(progress)}


def load(path, Config, given, longer=False):
    """(Config, Progress, arrays) of a checkpoint file, or of the folder of a run; what was given on
    the command line must agree with it; longer: but for more epochs."""
    path = Path(path) / NAME if os.path.isdir(path) else Path(path)
    arrays, meta = checkpoint.load(path)
    with checkpoint.reading(path, "the configuration and the progress of a run"):
        if types(meta) != types(about(Config(), Progress())):
            raise ValueError("not a checkpoint of this program")
        config, progress = Config(**meta["config"]), Progress(**meta["progress"])
        for field in dataclasses.fields(config):
            field.metadata["convert"](str(getattr(config, field.name)))
        if min(progress.step, progress.threads) < 0 or not progress.statistics[1] > 0:
            raise ValueError("a count below 0, or no deviation")
    for name, value in given.items():
        saved = getattr(config, name)
        if longer and name == "epochs" and value > saved:
            print(f"epochs {saved} → {value}: the rates go on as those of {value} epochs")
            config.epochs = value
        elif saved != value:
            raise UserError(f"{path}: {name} differs: {saved!r} in the checkpoint, {value!r} here")
    return config, progress, arrays


def types(value):
    """A piece of JSON, with the types in place of what it holds."""
    if isinstance(value, dict):
        return {k: types(v) for k, v in value.items()}
    return [types(v) for v in value] if isinstance(value, list) else type(value)


def restore(arrays, parameters, updates=(), xp=np):
    """Puts a checkpoint's arrays in the place of those of the model, and of its optimisers."""
    mine = state(parameters, updates)
    arrays = {k: a for k, a in arrays.items() if updates or k.startswith("model.")}
    wanted, got = ({k: (a.shape, a.dtype) for k, a in b.items()} for b in (mine, arrays))
    if wanted != got:
        raise UserError("the checkpoint's arrays are not those of this configuration")
    for k, a in arrays.items():
        mine[k][...] = xp.asarray(a)
