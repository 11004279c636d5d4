"""What a run leaves for people to read: metrics.csv, progress, summary.json, curves.png."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import autograd as ag
from fast import attention_matrix
from osa_minimal import rotation_angles
from training import checkpoint
from training.checkpoint import reading, replacing
from training.data import standardise
from training.optimizers import schedule

tqdm.monitor_interval = 0  # no thread that Ctrl-C could meet while Python ends
ROOT = Path(__file__).resolve().parent.parent


def accuracy(model, images, labels, scale):
    """Share of `images` (uint8) taken for `labels` when scaled, and the mean cross-entropy."""
    right, loss, batch = 0, 0.0, max(1, 8192 // len(model.outer["b_E"].data))  # tokens: memory
    with ag.no_grad():
        for i in range(0, len(labels), batch):
            y = labels[i : i + batch]
            logits = model(scale(images[i : i + batch]))
            right += int((logits.data.argmax(axis=1) == y).sum())
            loss += float(ag.cross_entropy(logits, y).data) * len(y)
    return right / len(labels), loss / len(labels)


def probe(model, images):
    """max ‖S‖₂ and max |AᵀA − I|, A by fast/, over layers, heads, images; NaN where no α is."""
    seen = [(math.nan, math.nan)]
    with ag.no_grad():
        X = model.embed(images)
        for attention, mlp in model.layers:
            if "alpha" in attention.parameters:
                alpha, F = attention.parameters["alpha"].data, attention.project(X).data
                xp = ag.array_module(F)
                if not xp.isfinite(F).all():
                    raise FloatingPointError("Q, K or V contains NaN or Inf")
                Q, K, _ = xp.split(F, 3, axis=-1)
                A = attention_matrix(Q, K, alpha)
                error = abs(A.swapaxes(-1, -2) @ A - xp.eye(A.shape[-1], dtype=A.dtype)).max()
                seen.append((float(rotation_angles(Q, K, alpha).max()), float(error)))
            X = mlp(attention(X))
    return tuple(map(float, np.fmax.reduce(seen)))


class Log:
    """metrics.csv, a row per logging step; on a terminal a bar of progress, else a line per row."""

    COLUMNS = ("step", "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy",
               "gradient_norm", "max_S_norm", "orthogonality_error", "seconds")  # fmt: skip

    def __init__(self, folder, run, progress, last):
        self.run, self.progress, self.last = run, progress, last
        path = folder / "metrics.csv"
        rows = read_metrics(path) if path.exists() else []
        rows = [row for row in rows if row["step"] <= progress.step]  # the rest is redone
        with replacing(path) as file:  # so that a full disk loses none
            lines = [",".join(self.COLUMNS) + "\r\n", *(line(row.values()) for row in rows)]
            file.writelines(text.encode() for text in lines)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.first = progress.step, progress.seconds
        self.start = time.perf_counter() - progress.seconds
        progress.sums = [np.float64(a) for a in progress.sums]  # in float32 many steps lose digits
        self.bar = tqdm(total=run.steps, initial=progress.step, unit="step", dynamic_ncols=True,
                        file=sys.stdout, disable=not sys.stdout.isatty())  # fmt: skip

    def add(self, loss, right):
        """Counts a step.  Sums stay on the device: float() would make the host wait for it."""
        progress = self.progress
        progress.sums = [a + b for a, b in zip(progress.sums, (loss, right, 1))]
        progress.step += 1
        progress.seconds = time.perf_counter() - self.start
        self.bar.update()

    def due(self):
        return self.progress.step % self.progress.log_every == 0 or self.progress.step == self.last

    def row(self, norm):
        """Measures, writes a row and shows it."""
        run, progress = self.run, self.progress
        loss, right, count = map(float, progress.sums)
        loss, train = loss / count, right / count / run.batches.size
        if not math.isfinite(loss):
            raise FloatingPointError("the loss is NaN or Inf")
        few = min(16, 1 + 1024 // len(run.model.outer["b_E"].data))  # A is N × N
        some = run.standardise(run.x_val[:few])
        s_norm, error = probe(run.model, some) if run.has_angles else (math.nan, math.nan)
        progress.worst_error = float(np.fmax(progress.worst_error, error))
        progress.largest_s = float(np.fmax(progress.largest_s, s_norm))
        val, _ = accuracy(run.model, run.x_val[:1000], run.y_val[:1000], run.standardise)
        step, seconds = progress.step, progress.seconds
        rate = schedule(step - 1, run.steps, run.config.warmup) * run.config.lr
        values = (step, step / run.batches.per_epoch, rate, loss, train, val, float(norm), s_norm,
                  error, seconds)  # fmt: skip
        self.file.write(line(values))
        self.file.flush()
        per_step = (seconds - self.first[1]) / (step - self.first[0])
        rotation = f"  max ‖S‖₂ {s_norm:.2f}" if run.has_angles else ""
        text = f"loss {loss:.4f}  accuracy {train:.2%} train {val:.2%} validation{rotation}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"step {step}/{run.steps}  {text}  {run.batches.size / per_step:,.0f} images/s  "
                  f"{per_step * (run.steps - step):.0f} s left", flush=True)  # fmt: skip
        progress.sums = [np.float64(0)] * 3

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()


def line(values):
    """A row of metrics.csv."""
    return ",".join(f"{v:.7g}" for v in values) + "\r\n"


def read_metrics(path):
    """The rows of a metrics.csv, {column: number}."""
    expected = "the metrics.csv of a run; move it away to go on without the earlier rows"
    with reading(path, expected), open(path, newline="", encoding="utf-8") as file:
        lines = [text for text in file if text.endswith("\n")]  # else the computer stopped in it
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
        if any(tuple(row) != Log.COLUMNS for row in rows):
            raise ValueError("the columns are not those of a run")
    return rows


def draw_curves(rows, path):
    """curves.png: loss, accuracy, ‖S‖₂ and orthogonality error against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    axes[3].set_ylim(1e-8, 1e-4)  # from rounding, float32's eps = 1.2e-7, to what one could see
    for axis, label, scale, *names in (
        (axes[0], "cross-entropy", "log", "train_loss"),
        (axes[1], "accuracy", "linear", "train_accuracy", "validation_accuracy"),
        (axes[2], "largest rotation angle, rad", "linear", "max_S_norm"),
        (axes[3], "orthogonality error", "log", "orthogonality_error"),
    ):
        axis.set(xlabel="step", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
        for name, style in zip(names, ("-", "--")):
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=name)
        axis.legend()
    figure.savefig(path, dpi=120)


def machine():
    """Command, date, processor, versions and commit: where a number comes from."""
    commit, torch, cpuinfo = None, sys.modules.get("torch"), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    if (ROOT / ".git").exists():  # not that of a repository around this folder
        ours = ["--git-dir", ROOT / ".git", "--work-tree", ROOT]  # whatever GIT_DIR says
        command = ["git", *ours, "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
            commit = done.stdout.strip() or None
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processor": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__ if torch else None,
        "commit": commit,
    }


def begin(run, progress, folder, device, args):
    """Says what will be done and writes config.json; returns what a repetition of it needs."""
    config = run.config
    count = f"{config.depth} layers, {run.weights.size:,} parameters, {run.steps:,} steps"
    print(f"{config.attention}, {count}\nwriting {folder}", flush=True)
    repeat = {
        "config": dataclasses.asdict(config),
        "data": progress.data or None,
        "data_crc32": progress.digest,
        "ranks": run.ranks.size,
        "graph": args.graph,
        "threads": run.threads,
        "device": device,
        "cupy": run.xp.__version__ if run.xp is not np else None,
        **machine(),
    }
    with replacing(folder / "config.json") as file:  # also of a run that is extended
        file.write((json.dumps(repeat, indent=2) + "\n").encode())
    os.environ.pop("MPLBACKEND", None)  # nothing is shown
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # missing, or broken
        print(f"curves.png will not be drawn: {error}", file=sys.stderr)
    return repeat


def print_accuracy(model, dataset, statistics, xp):
    """The one look at the test set; returns the accuracy."""
    x, y = xp.asarray(dataset.x_test), xp.asarray(dataset.y_test)
    print(f"testing on {len(y):,} images", flush=True)  # with a token per pixel it takes a minute
    test, _ = accuracy(model, x, y, lambda images: standardise(images, *statistics))
    print(f"test accuracy {test:.2%}")
    return test


def finish(run, progress, folder, repeat):
    """Tests the trained network; writes summary.json and curves.png."""
    print(f"{progress.step:,} steps took {progress.seconds:.0f} s in all")
    validation, _ = accuracy(run.model, run.x_val, run.y_val, run.standardise)
    rows = read_metrics(folder / "metrics.csv")
    summary = {
        "test_accuracy": print_accuracy(run.model, run.dataset, run.statistics, run.xp),
        "validation_accuracy": validation,
        "train_loss": rows[-1]["train_loss"] if rows else None,
        "steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "orthogonality_error": progress.worst_error if run.has_angles else None,
        "max_S_norm": progress.largest_s if run.has_angles else None,
        "parameters": run.weights.size,
        "repeat": repeat,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if rows:
        try:
            draw_curves(rows, folder / "curves.png")
        except Exception as error:  # all else is written
            print(f"curves.png was not drawn: {error}", file=sys.stderr)
    print(f"files in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def export(path, model, config, statistics):
    """Writes the weights, and all that another program needs to use them, as safetensors."""
    arrays = {k: ag.to_cpu(p.data) for k, p in model.parameters.items()}
    about = {"slope": model.slope, "mean": statistics[0], "std": statistics[1]}
    metadata = {k: str(v) for k, v in {**dataclasses.asdict(config), **about}.items()}
    checkpoint.export(path, arrays, metadata)
    print(f"exported {path}")
