"""What a run leaves for people to read: metrics.csv, progress, summary.json, curves.png."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
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
from training.checkpoint import CheckpointError, reading, replacing
from training.data import standardise
from training.optimizers import schedule

ROOT = Path(__file__).resolve().parent.parent


def accuracy(model, images, labels, standardise):
    """Share of `images` (uint8) classified as `labels`, and the mean cross-entropy."""
    right, loss, batch = 0, 0.0, max(1, 8192 // len(model.outer["b_E"].data))  # tokens: memory
    with ag.no_grad():
        for i in range(0, len(labels), batch):
            y = labels[i : i + batch]
            logits = model(standardise(images[i : i + batch]))
            right += int((logits.data.argmax(axis=1) == y).sum())
            loss += float(ag.cross_entropy(logits, y).data) * len(y)
    return right / len(labels), loss / len(labels)


def probe(model, images):
    """max ‖S‖₂ and max |AᵀA − I|, A by fast/, over layers, heads, images; NaN where no α is."""
    s_norm = error = math.nan
    with ag.no_grad():
        X = model.embed(images)
        for attention, mlp in model.layers:
            if "alpha" in attention.parameters:
                alpha, F = attention.parameters["alpha"].data, attention.project(X).data
                xp = ag.array_module(F)
                Q, K, _ = xp.split(F, 3, axis=-1)
                if not (xp.isfinite(Q).all() and xp.isfinite(K).all()):
                    raise FloatingPointError("Q or K contains NaN or Inf")
                A = attention_matrix(Q, K, alpha)
                deviation = abs(A.swapaxes(-1, -2) @ A - xp.eye(A.shape[-1], dtype=A.dtype)).max()
                s_norm = np.fmax(s_norm, float(rotation_angles(Q, K, alpha).max()))
                error = np.fmax(error, float(deviation))
            X = mlp(attention(X))
    return float(s_norm), float(error)


class Log:
    """metrics.csv, a row per logging step; on a terminal a bar of progress, else a line per row."""

    COLUMNS = ("step", "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy",
               "gradient_norm", "max_S_norm", "orthogonality_error", "seconds")  # fmt: skip

    def __init__(self, folder, run, progress, last):
        self.run, self.progress, self.last = run, progress, last
        path = folder / "metrics.csv"
        rows = read_metrics(path) if path.exists() else []
        rows = [row for row in rows if float(row["step"]) <= progress.step]  # the rest is redone
        with replacing(path) as file:  # so that a full disk loses none
            file.write((",".join(self.COLUMNS) + "\r\n").encode())
            file.writelines((",".join(row.values()) + "\r\n").encode() for row in rows)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)
        self.first = progress.step, progress.seconds
        self.start = time.perf_counter() - progress.seconds
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
        some = run.standardise(run.x_val[:16])
        s_norm, error = probe(run.model, some) if run.measures else (math.nan, math.nan)
        progress.worst_error = float(np.fmax(progress.worst_error, error))
        progress.largest_s = float(np.fmax(progress.largest_s, s_norm))
        val, _ = accuracy(run.model, run.x_val[:1000], run.y_val[:1000], run.standardise)
        step, seconds = progress.step, progress.seconds
        rate = schedule(step - 1, run.steps, run.config.warmup) * run.config.lr
        values = (step, step / run.batches.per_epoch, rate, loss, train, val, float(norm), s_norm,
                  error, seconds)  # fmt: skip
        self.writer.writerow({k: f"{v:.7g}" for k, v in zip(self.COLUMNS, values)})
        self.file.flush()
        per_step = (seconds - self.first[1]) / (step - self.first[0])
        rotation = f"  max ‖S‖₂ {s_norm:.2f}" if run.measures else ""
        text = f"loss {loss:.4f}  accuracy {train:.2%} train {val:.2%} validation{rotation}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"step {step}/{run.steps}  {text}  {run.batches.size / per_step:,.0f} images/s  "
                  f"{per_step * (run.steps - step):.0f} s left", flush=True)  # fmt: skip
        progress.sums = [0, 0, 0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()


def read_metrics(path):
    """The rows of a metrics.csv, dicts of strings."""
    expected = "the metrics.csv of a run; move it away to go on without the earlier rows"
    with reading(path, CheckpointError, expected):
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
                raise ValueError(f"the row of step {row['step']} is not complete")
            list(map(float, row.values()))
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
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axis, (label, scale, lines) in zip(axes.flat, panels):
        for (name, key), style in zip(lines.items(), ("-", "--")):
            if any(math.isfinite(v) for v in columns[key]):
                axis.plot(columns["step"], columns[key], style, label=name)
                axis.legend()
        positive = any(v > 0 for key in lines.values() for v in columns[key])
        axis.set(xlabel="step", ylabel=label, yscale=scale if positive else "linear")
        axis.grid(alpha=0.3)
    axes[1, 1].set_ylim(1e-8, 1e-4)  # from rounding, float32's eps = 1.2e-7, to what one could see
    figure.savefig(path, dpi=120)
    plt.close(figure)


def peak_memory():
    """The largest resident memory of this process so far, in MB; None on Windows."""
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def write_json(path, content):
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # a path that is not UTF-8


def cpu_model():
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def machine():
    """Command, date, processor, versions and commit: where a number comes from."""
    commit, torch = None, sys.modules.get("torch")
    if (ROOT / ".git").exists():  # not that of a repository around this folder
        command = ["git", "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
            commit = done.stdout.strip() or None
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
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
    if not args.resume:
        write_json(folder / "config.json", repeat)
    try:
        os.environ.pop("MPLBACKEND", None)  # nothing is shown
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"curves.png will not be drawn: {error}", file=sys.stderr)
    return repeat


def print_accuracy(model, dataset, statistics, xp):
    """The one look at the test set; returns the accuracy."""
    x, y = xp.asarray(dataset.x_test), xp.asarray(dataset.y_test)
    test, _ = accuracy(model, x, y, lambda images: standardise(images, *statistics))
    print(f"test accuracy {test:.2%}")
    return test


def finish(run, progress, folder, repeat, export_path):
    """Tests the trained network; writes summary.json, the export and curves.png; returns 0."""
    print(f"trained for {progress.seconds:.0f} s; testing on {len(run.dataset.y_test):,} images")
    validation, _ = accuracy(run.model, run.x_val, run.y_val, run.standardise)
    rows = read_metrics(folder / "metrics.csv")
    summary = {
        "test_accuracy": print_accuracy(run.model, run.dataset, run.statistics, run.xp),
        "validation_accuracy": validation,
        "train_loss": float(rows[-1]["train_loss"]) if rows else None,
        "steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "orthogonality_error": progress.worst_error if run.measures else None,
        "max_S_norm": progress.largest_s if run.measures else None,
        "parameters": run.weights.size,
        "peak_memory_mb": peak_memory(),
        "repeat": repeat,
    }
    write_json(folder / "summary.json", summary)
    export(export_path, run.model, run.config, run.statistics)
    if rows:
        with contextlib.suppress(ImportError):  # said before training
            draw_curves(rows, folder / "curves.png")
    print(f"files in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return 0


def export(path, model, config, statistics):
    """Writes the weights, and all that another program needs to use them, as safetensors; no path,
    no file; returns 0."""
    if path:
        arrays = {k: ag.to_cpu(p.data) for k, p in model.parameters.items()}
        about = {"slope": model.slope, "mean": statistics[0], "std": statistics[1]}
        metadata = {k: str(v) for k, v in {**dataclasses.asdict(config), **about}.items()}
        checkpoint.export(path, arrays, metadata)
        print(f"exported {path}")
    return 0
