"""The folder of a run: made, checked before any work, and kept from a second run."""

import contextlib
import os
import time
from pathlib import Path

from training.options import UserError

FILES = ("config.json", "metrics.csv", "summary.json", "checkpoint.safetensors", "curves.png")


def new(out, preset):
    """The folder of a new run, created: `out`, or runs/PRESET-TIME under a name of its own."""
    folder = Path(out or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        for i in range(2, 1000):
            try:
                folder.mkdir(parents=True, exist_ok=bool(out))
                break
            except FileExistsError:
                if out:
                    raise
                folder = folder.with_name(f"{folder.name.partition('.')[0]}.{i}")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return check(folder)


def check(folder):
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


def old(resume):
    """The folder of a stopped run, named itself or by its checkpoint."""
    return check(Path(resume) if Path(resume).is_dir() else Path(resume).parent)


def check_export(path):
    """Refuses a file that could not be written later, or that is no export of before."""
    folder = os.path.dirname(os.path.abspath(path))
    other = os.path.lexists(path) and not path.endswith(".safetensors")
    if other or os.path.basename(path) in FILES:  # a checkpoint or data set would be lost
        raise UserError(f"--export {path}: would replace a file that is no .safetensors file")
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--export {path}: not a file that can be written")


@contextlib.contextmanager
def in_use(folder, new):
    """Keeps a second process out of `folder`; the lock ends with this one, however it ends.

    new: refuses a folder with a file of a run's names, unless one that never saved has left it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        clear(folder, new)
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
        clear(folder, new)
        yield
    finally:
        os.close(descriptor)


def clear(folder, new):
    """Removes what killed runs have left half-done."""
    found = tuple(name for name in FILES if new and (folder / name).exists())
    unsaved = found in (FILES[:1], FILES[:2])  # and it is a run's config.json, not another's
    if found and not (unsaved and b'"data_crc32"' in (folder / FILES[0]).read_bytes()):
        raise UserError(f"{folder} holds a run already; choose another --out, or --resume {folder}")
    for path in (path for name in FILES for path in folder.glob(f"{name}.*.tmp")):
        path.unlink(missing_ok=True)
    for name in found:
        (folder / name).unlink()
