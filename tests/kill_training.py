"""Kills a tiny training run again and again: `python tests/kill_training.py 50`.

Every second kill is at a random moment; the others are inside a save, which the run announces and
draws out.  After each kill the newest checkpoint must load, and the run goes on with --resume; at
the end its weights and rows must equal, bit for bit, those of a run that nobody killed.  A run
takes signals too: with --signal SIGINT, SIGTERM or SIGHUP it must say so, and end the same.
A short form runs among the tests (test_faults.py).
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training import checkpoint, report  # noqa: E402

SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM", "SIGHUP")
OPTIONS = """--preset tiny --width 16 --limit-data 50 --batch-size 10 --warmup 5 --log-every 2
--threads 1 --device cpu --data""".split()

# train.py whose files are written in pieces, announced and slowly, so that a kill falls into one.
SLOW = """
import io, os, runpy, signal, time

signal.signal(signal.SIGINT, signal.SIG_DFL)
from training import checkpoint, report

class Slow(io.FileIO):
    def write(self, content):
        for i in range(20):
            ends = (len(content) * n // 20 for n in (i, i + 1))
            super().write(content[slice(*ends)])
            os.write(2, b".")
            time.sleep(float(os.environ["PAUSE"]))

checkpoint.open, report.draw_curves = Slow, lambda *_: None
runpy.run_path("train.py", run_name="__main__")
"""


def begin(folder, epochs, pause=0.0):
    """A process that trains in `folder`, on 60 images of noise beside it."""
    images = folder.parent / "images.npz"
    if not images.exists():
        rng, arrays = np.random.default_rng(0), {}
        for part, n in (("train", 60), ("test", 20)):
            arrays[f"x_{part}"] = rng.integers(0, 256, (n, 14, 14), dtype=np.uint8)
            arrays[f"y_{part}"] = (np.arange(n) % 4).astype(np.uint8)
        np.savez(images, **arrays)
    going = "--resume" if (folder / "checkpoint.safetensors").exists() else "--out"
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *OPTIONS, images, "--epochs", str(epochs), going, folder],
        cwd=ROOT, env={**os.environ, "PAUSE": str(pause), "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(folder, epochs):
    """The result of a run that nobody kills."""
    process = begin(folder, epochs)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return result(folder)


def step_of(folder):
    return checkpoint.load(folder / "checkpoint.safetensors")[1]["progress"]["step"]


def result(folder):
    """The arrays of the checkpoint, and metrics.csv without its last column, the seconds."""
    arrays, _ = checkpoint.load(folder / "checkpoint.safetensors")
    rows = [list(row.values())[:-1] for row in report.read_metrics(folder / "metrics.csv")]
    return {k: a.tobytes() for k, a in arrays.items()}, rows


def torment(count, epochs, signal_name="SIGKILL", seed=0, tell=lambda seen: None):
    """Kills `count` times; how many hit a save, left a half-written file, or came too late."""
    rng, seen = random.Random(seed), {"kills": 0, "in a save": 0, "half files": 0, "ended": 0}
    number = getattr(signal, signal_name)
    with tempfile.TemporaryDirectory() as folder:
        whole, torn = Path(folder, "whole"), Path(folder, "torn")
        wanted, last, step = finish(whole, epochs), step_of(whole), 0
        while seen["kills"] < count:
            if step == last:  # all steps are made: once more from the start
                assert result(torn) == wanted
                seen["ended"] += 1
                for path in torn.iterdir():
                    path.unlink()
            in_save = seen["kills"] % 2 == 1
            process = begin(torn, epochs, pause=0.02 if in_save else 0)
            if in_save:
                for _ in range(rng.randrange(1, 60)):  # so many pieces are written, then
                    process.stderr.read(1)
            else:
                for _ in range(rng.randrange(1, 25)):  # lines of output, one for every other step
                    process.stdout.readline()
                time.sleep(rng.uniform(0, 0.03))
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            _, err = process.communicate()
            seen["kills"] += process.returncode != 0
            seen["in a save"] += in_save and process.returncode != 0
            assert process.returncode in (0, -number, 128 + number), (process.returncode, err)
            assert b"Traceback" not in err, err
            seen["half files"] += len(list(torn.glob("*.tmp")))
            before, step = step % last, 0
            if (torn / "checkpoint.safetensors").exists():
                step = step_of(torn)  # it loads
            assert step >= before, (before, step)  # nothing saved is lost
            tell(seen)
        assert finish(torn, epochs) == wanted
        assert not list(torn.glob("*.tmp"))  # the later run has put them away
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=50)
    parser.add_argument("--signal", default="SIGKILL", choices=SIGNALS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(torment(options.count, 12, options.signal, options.seed, print))
