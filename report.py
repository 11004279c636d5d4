"""What a training run leaves for people to read: metrics.csv, the progress line, curves.png."""

import contextlib
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import checkpoint


class Log:
    """metrics.csv, one row per logging step, and the progress line."""

    COLUMNS = ("step", "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy",
               "gradient_norm", "max_S_norm", "orthogonality_error", "seconds")  # fmt: skip

    def __init__(self, folder, run):
        self.run, self.path = run, folder / "metrics.csv"
        rows = read_metrics(self.path) if self.path.exists() else []
        rows = [row for row in rows if float(row["step"]) <= run.step]  # later ones will be redone
        # The old rows go to a new file that then takes the name, so that a full disk loses none.
        new = self.path.with_name("metrics.csv.tmp")
        self.file = open(new, "w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)
        try:
            self.writer.writeheader()
            self.writer.writerows(rows)
            self.file.flush()
            if os.name == "nt":  # an open file cannot be renamed there
                self.file.close()
            os.replace(new, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                self.file.close()
            new.unlink(missing_ok=True)
            raise
        if self.file.closed:
            self.file = open(self.path, "a", newline="", encoding="utf-8")
            self.writer = csv.DictWriter(self.file, self.COLUMNS)
        self.first_step, self.first_seconds = run.step, run.seconds
        self.terminal = sys.stdout.isatty()

    def add(self, loss, right):
        # Sums stay on the device: float() would make the host wait for it at every step.
        self.run.sums = [a + b for a, b in zip(self.run.sums, (loss, right, 1))]

    def row(self, factor, norm, validation, s_norm, error):
        run = self.run
        loss, right, count = map(float, run.sums)
        loss, train = loss / count, right / count / run.batch_size
        values = (run.step, run.step / run.steps_per_epoch, factor * run.optimizers[-1][1], loss,
                  train, validation, norm, s_norm, error, run.seconds)  # fmt: skip
        self.writer.writerow({k: f"{v:.7g}" for k, v in zip(self.COLUMNS, values)})
        self.file.flush()
        per_step = (run.seconds - self.first_seconds) / (run.step - self.first_step)
        line = (
            f"step {run.step}/{run.steps}  loss {loss:.4f}  accuracy {train:.2%} train "
            f"{validation:.2%} validation  {run.batch_size / per_step:,.0f} images/s  "
            f"{per_step * (run.steps - run.step):.0f} s left"
        )
        if run.measures:
            line += f"  max ‖S‖₂ {s_norm:.2f}"
        print(
            f"\r\033[K{line}" if self.terminal else line,
            end="" if self.terminal else "\n",
            flush=True,
        )
        run.sums = [0, 0, 0]

    def close(self):
        if self.terminal:
            print()
        self.file.close()


def read_metrics(path):
    """The rows of a metrics.csv, dicts of strings."""
    expected = "the metrics.csv of a run; move it away to go on without the earlier rows"
    with checkpoint.reading(path, checkpoint.CheckpointError, expected):
        with open(path, newline="", encoding="utf-8") as file:
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the computer stopped while it was written
        reader = csv.DictReader(lines)
        rows = list(reader)
        if lines and reader.fieldnames != list(Log.COLUMNS):
            raise ValueError("the first line does not name the columns")
        for row in rows:
            if set(row) != set(Log.COLUMNS) or None in row.values():
                raise ValueError(
                    f"the row of step {row['step']} has not {len(Log.COLUMNS)} numbers"
                )
            for value in row.values():
                float(value)
    return rows


def draw_curves(rows, path):
    """curves.png: loss, accuracy, ‖S‖₂ and orthogonality error against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {k: [float(row[k]) for row in rows] for k in Log.COLUMNS}
    panels = (
        ("cross-entropy", "log", {"training": "train_loss"}),
        ("accuracy", "linear", {"training": "train_accuracy", "validation": "validation_accuracy"}),
        ("largest rotation angle, rad", "linear", {"max ‖S‖₂ over layers": "max_S_norm"}),
        ("orthogonality error", "log", {"max |AᵀA − I|": "orthogonality_error"}),
    )
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    for axis, (label, scale, lines) in zip(axes.flat, panels):
        for (name, key), style in zip(lines.items(), ("-", "--")):
            if any(math.isfinite(v) for v in columns[key]):
                axis.plot(columns["step"], columns[key], style, label=name)
                axis.legend()
        positive = any(v > 0 for key in lines.values() for v in columns[key])
        axis.set(ylabel=label, yscale=scale if positive else "linear")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[1, 1].set_ylim(1e-8, 1e-4)  # from rounding, float32's eps = 1.2e-7, to what one could see
    figure.savefig(path, dpi=120)
    plt.close(figure)


def peak_memory():
    """The largest resident memory of this process so far, in MB; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def write_json(path, content):
    path.write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
        errors="backslashreplace",
    )  # a path that is not UTF-8


def cpu_model():
    """The processor's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(run):
    """The command, device, threads, versions and commit."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": run.device,
        "threads": run.threads,
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cupy": run.xp.__version__ if run.xp is not np else None,
        "git_commit": commit,
    }
