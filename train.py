"""Trains a skipless Orthogonal-Self-Attention Transformer on MNIST, on a CPU or a GPU.

    python train.py                          the main job, preset "mnist"
    python train.py --preset tiny            ten seconds, 1,000 images
    python train.py --attention softmax --skip --norm       a baseline: the usual ViT
    python train.py --resume runs/NAME       goes on with a stopped run
    python train.py --eval runs/NAME/checkpoint.npz         test accuracy of a trained model
    mpiexec -n 4 python train.py             the main job in four processes, or on four cards

Every run writes a folder with config.json, metrics.csv, summary.json, checkpoint.npz, curves.png.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"
)  # fmt: skip

if __name__ == "__main__":
    # One BLAS thread each for the threads of `Run.gradients`; read once, when NumPy is imported.
    os.environ.update(dict.fromkeys((*THREAD_VARIABLES, "OSA_THREADS"), "1"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np  # noqa: E402

import autograd as ag  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import machines  # noqa: E402
import report  # noqa: E402

# `train.parse`, `train.Run` and the rest, for programs of one's own.
from options import FILES, PRESETS, Config, UserError, check_values, parse  # noqa: E402, F401
from training import (  # noqa: E402, F401
    LATER,
    PROGRESS,
    Run,
    Stop,
    accuracy,
    attention_inputs,
    build,
    calibrate,
    make_optimizers,
    probe,
)


def repetition(run):
    """What a repetition of the run needs to know."""
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.args.data,
        "data_crc32": run.digest,
        "ranks": run.ranks.size,
        "graph": run.args.graph,
        **report.environment(run),
    }


def summarise(run, folder):
    """The one look at the test set; writes summary.json and curves.png, returns the summary."""
    x_test, y_test = run.xp.asarray(run.x_test), run.xp.asarray(run.y_test)
    test, _ = accuracy(run.model, x_test, y_test, run.standardise)
    validation, _ = accuracy(run.model, run.x_val, run.y_val, run.standardise)
    rows = report.read_metrics(folder / "metrics.csv")
    summary = {
        "test_accuracy": test,
        "validation_accuracy": validation,
        "train_loss": float(rows[-1]["train_loss"]) if rows else None,
        "steps": run.step,
        "seconds": round(run.seconds, 2),
        "orthogonality_error": run.worst_error if run.measures else None,
        "max_S_norm": run.largest_s if run.measures else None,
        "parameters": sum(p.size for p in run.parameters.values()),
        "peak_memory_mb": report.peak_memory(),
        "repeat": repetition(run),
    }
    report.write_json(folder / "summary.json", summary)
    if rows:
        report.draw_curves(rows, folder / "curves.png")
    return summary


def new_folder(args, config):
    """The folder of a new run, created; never one that holds a run already."""
    name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.out) if args.out else Path("runs") / name
    try:
        if any((folder / name).exists() for name in FILES):
            raise UserError(
                f"{folder} holds a run already; choose another --out, or --resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return check_folder(folder)


def check_folder(folder):
    """Refuses a folder in which a run's files could not be written later; returns it."""
    try:
        probe_file = folder / ".writable"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    for path in (folder / name for name in FILES):
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.W_OK)):
            raise UserError(f"{path} is not a file that can be written")
    return folder


@contextlib.contextmanager
def in_use(folder):
    """Keeps a second process out of `folder`; the lock ends with this one, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run") from None
        except OSError:
            pass  # a file system without locks
        for half in folder.glob("checkpoint.npz.*.tmp"):  # of a run killed while it saved
            half.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def kind(value):
    return [type(v) for v in value] if isinstance(value, list) else type(value)


def load_checkpoint(path, given):
    """(Config, arrays, meta) of a checkpoint; options that were given must agree with it."""
    arrays, meta = checkpoint.load(path)
    known, form = [f.name for f in dataclasses.fields(Config)], Config()
    config, progress = meta.get("config"), meta.get("progress")
    if (
        not isinstance(config, dict)
        or set(config) != set(known)
        or any(type(config[k]) is not type(getattr(form, k)) for k in known)
        or not isinstance(progress, dict)
        or {k: type(v) for k, v in progress.items()} != PROGRESS
        or not all(0 <= v < math.inf for v in progress.values())
        or type(meta.get("data")) not in (str, type(None))
        or any(kind(meta.get(k, form)) != kind(form) for k, form in LATER.items())
        or not all(0 <= v < math.inf for k in LATER for v in np.ravel(meta.get(k, 0)))
        or not meta.get("statistics", LATER["statistics"])[1] > 0
    ):
        raise UserError(f"{path} is not a checkpoint of this program")
    try:
        checkpoint.require_same(meta["config"], {**meta["config"], **given}, known)
    except checkpoint.CheckpointError as error:
        raise UserError(f"{path}: {error}") from None
    config = Config(**meta["config"])
    try:
        check_values(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, arrays, meta


def check_writable(path):
    """Refuses a file that could not be written later, so that no training is lost."""
    folder = os.path.dirname(os.path.abspath(path))
    other = os.path.lexists(path) and not path.endswith(".safetensors")
    if other or os.path.basename(path) in FILES:  # a checkpoint or data set would be lost
        raise UserError(f"--export {path}: would replace a file that is no .safetensors file")
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--export {path}: not a file that can be written")


def export(path, run):
    """Writes the weights, and all that another program needs to use them, as safetensors."""
    arrays = {k: ag.to_cpu(p.data) for k, p in run.parameters.items()}
    mean, std = run.statistics
    about = {"slope": run.model.layers[0][1].slope, "mean": mean, "std": std}
    metadata = {k: str(v) for k, v in {**dataclasses.asdict(run.config), **about}.items()}
    checkpoint.export_safetensors(path, arrays, metadata)
    print(f"exported {path}")


def main(arguments=None):
    try:
        ranks = machines.Ranks()
    except RuntimeError as error:
        raise UserError(str(error)) from None
    with ranks.ending_together():
        return main_of(ranks, arguments)


def main_of(ranks, arguments):
    """`main` in one of several processes."""
    config, args, given = parse(arguments, __doc__)
    ag.keep_freed_memory()
    saved = None
    if args.export:
        check_writable(args.export)
    if args.eval or args.resume:
        path = Path(args.eval or args.resume)
        if args.resume and path.name == "checkpoint.npz":
            args.resume = path = path.parent
        if args.resume or path.is_dir():
            path = path / "checkpoint.npz"
        config, *saved = load_checkpoint(path, given)
        # The same data and, as sums are rounded in another order by more threads, as many of them.
        args.data = args.data or saved[1].get("data")
        args.threads = args.threads or saved[1].get("threads")
    if args.eval and ranks.rank:
        return 0
    if args.device != "cpu":
        ranks.take_card()
    try:
        xp, device = ag.find_device(args.device)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    run = Run(config, args, xp, device, saved, ranks)
    each = f" in each of {ranks.size} ranks" if ranks.size > 1 else ""
    print(f"device {device}; {run.threads} threads{each}")

    if args.eval:
        x, y = xp.asarray(run.x_test), xp.asarray(run.y_test)
        print(f"test accuracy {accuracy(run.model, x, y, run.standardise)[0]:.2%}")
        if args.export:
            export(args.export, run)
        return 0

    if ranks.size > 1:
        start = zlib.crc32(b"".join(a.tobytes() for a in run.state().values()), run.digest)
        if not ranks.agree(start):
            raise UserError("the ranks do not begin with the same images and weights")
    if ranks.rank:
        with Stop() as stop:
            run.train(None, stop)
        return 0
    folder = check_folder(Path(args.resume)) if args.resume else new_folder(args, config)
    with in_use(folder):
        return work(run, folder)


def work(run, folder):
    """The run in its folder; returns the exit status."""
    config, args = run.config, run.args
    count = sum(p.size for p in run.parameters.values())
    print(f"{config.attention}, {config.depth} layers, {count:,} parameters, {run.steps:,} steps")
    print(f"writing {folder}")
    if args.resume:
        if (folder / "metrics.csv").exists():
            report.read_metrics(folder / "metrics.csv")
    else:
        report.write_json(folder / "config.json", repetition(run))
    with Stop() as stop:
        finished = run.train(folder, stop)
    if not finished:
        name = signal.Signals(stop.signal).name
        print(
            f"{name}: stopped after step {run.step}; go on with --resume {folder}", file=sys.stderr
        )
        return 128 + stop.signal
    print(f"trained for {run.seconds:.0f} s; testing on {len(run.y_test):,} images")
    summary = summarise(run, folder)
    if args.export:
        export(args.export, run)
    print(f"test accuracy {summary['test_accuracy']:.2%}")
    print(f"files in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by `>&-`
    sys.stdout.reconfigure(errors="replace")  # ‖S‖₂, on a terminal that has no such letters
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"train.py: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"train.py: error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"train.py: error: not enough memory: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
