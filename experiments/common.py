"""Many training runs, several at a time, each in a process of its own with one thread.

Results are rows of a CSV file; a run whose row is there is not repeated, so a stopped experiment
goes on where it was.
"""

import argparse
import csv
import functools
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
# Read when NumPy is imported, by the worker processes too.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OSA_THREADS": "1"}
sys.path.insert(0, str(ROOT))

OUTCOME = ("validation", "test", "loss", "max_s", "parameters", "seconds")


@functools.cache
def dataset(path):
    from training import data

    return data.load(path)


def arguments(doc, **flags):
    """What an experiment's command line says: --processes, --quick, --draw and flags of its own;
    `folder` is where its results lie."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    flags |= {"quick": "a minute, into runs/quick", "draw": "figures from committed results"}
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args()
    args.folder = ROOT / "runs" / "quick" if args.quick else RESULTS
    return args


def train_once(options):
    """Trains as `python train.py --NAME VALUE …` would, without a folder; the outcome as a dict.

    options: {field of `train.Config`: value}; "steps" ends the schedule early; "arm", "task" and
    "setting" are names; with "every" only each so many of the images of validation and test are
    looked at, with "tuning" no test image at all.
    A run that diverges has accuracy NaN.  seconds: processor time of this process, in training.
    """
    import numpy as np

    import train
    from fast.threads import keep_freed_memory
    from training import report
    from training.options import parse

    keep_freed_memory()
    options = dict(options)
    steps, every, tuning = (options.pop(name, None) for name in ("steps", "every", "tuning"))
    options = {k: v for k, v in options.items() if k not in ("arm", "task", "setting")}
    arguments = ["--threads", "1"]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        arguments += [option] if value is True else [] if value is False else [option, str(value)]
    config, args, _ = parse(train.Config, train.PRESETS, arguments)
    run = train.Run(config, dataset(args.data))
    run.steps = steps or run.steps
    start, losses, largest = time.process_time(), [], 0.0
    outcome = {name: math.nan for name in OUTCOME} | {"parameters": run.weights.size}
    with np.errstate(all="ignore"):
        try:
            for t in range(run.steps):
                losses.append(float(run.step(t)[0]))
                if not math.isfinite(losses[-1]):
                    return outcome | {"max_s": largest}
                if (t + 1) % 25 == 0:
                    some = run.standardise(run.x_val[:16])
                    largest = max(largest, report.probe(run.model, some)[0])
        except FloatingPointError:
            return outcome | {"max_s": math.inf}
    seconds = time.process_time() - start

    def accuracy(x, y):
        return report.accuracy(run.model, x[::every], y[::every], run.standardise)[0]

    validation = accuracy(run.x_val, run.y_val)
    test = math.nan if tuning else accuracy(run.dataset.x_test, run.dataset.y_test)
    tail = losses[-50:]
    values = validation, test, sum(tail) / len(tail), largest, run.weights.size, round(seconds, 1)
    return dict(zip(OUTCOME, values))


def run_all(path, jobs, processes, train=train_once):
    """Rows {**job, **outcome} of every job (a dict of options), in order; `path` keeps them, and
    about.json beside it where and when the last of them ran."""
    names = list(dict.fromkeys(name for job in jobs for name in job))
    done = {}
    if path.exists():
        done = {key(row, names): row for row in read(path)}
    todo = [job for job in jobs if key(job, names) not in done]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, {k: v for k, v in job.items() if v != ""}): job
                   for job in todo}  # fmt: skip
        for i, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            if future.exception():
                pool.shutdown(cancel_futures=True)
            row = {name: job.get(name, "") for name in names} | future.result()
            done[key(job, names)] = {k: str(v) for k, v in row.items()}
            print(f"{i}/{len(todo)}", *(f"{k}={v}" for k, v in row.items() if v != ""), flush=True)
            write(path, done.values(), [*names, *OUTCOME])
    if todo:
        note(path)
    return [done[key(job, names)] for job in jobs]


def note(path):
    """Notes in about.json where and when the file was made."""
    from training.report import machine

    file = path.with_name("about.json")
    notes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    text = json.dumps(notes | {path.name: machine()}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def best_row(rows, job, names):
    """The row with the best validation accuracy of those that agree with `job` in `names`."""
    some = [row for row in rows if key(row, names) == key(job, names)]
    return max(some, key=lambda row: (row["validation"] != "nan", float(row["validation"])))


def key(row, names):
    return tuple(str(row.get(name, "")) for name in names)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_depth(rows, name, arm):
    """Depths, and the mean and the standard deviation of a column over the seeds."""
    values = {}
    for row in rows:
        if row["arm"] == arm:
            values.setdefault(int(row["depth"]), []).append(float(row[name]))
    depths = sorted(values)
    sd = [statistics.stdev(values[d]) if len(values[d]) > 1 else 0.0 for d in depths]
    return depths, [statistics.mean(values[d]) for d in depths], sd


def write(path, rows, names):
    """A CSV file, replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".tmp"), path)
