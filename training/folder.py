"""The folder of a run: made, checked before any work, and kept from a second run."""

import contextlib
import os
from datetime import datetime
from pathlib import Path

from training.options import UserError

FILES = ("config.json", "metrics.csv", "summary.json", "checkpoint.safetensors", "curves.png")


def prepare(args, preset):
    """The folder of --resume or --out, or a new runs/PRESET-TIME; refused if not writable."""
    if args.resume:
        folder = Path(args.resume)
        folder = folder if folder.is_dir() else folder.parent
    else:
        folder = Path(args.out or f"runs/{preset}-{datetime.now():%Y%m%d-%H%M%S-%f}")
        folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink(missing_ok=True)  # another run may be doing the same
    return folder


def check_export(path):
    """Refuses a file that could not be written later, or that could be a run's."""
    folder, name = os.path.split(path)
    folder = folder or "."
    if not name.endswith(".safetensors") or name in FILES:
        raise UserError(f"--export {path}: give it a name.safetensors, not {FILES[3]}")
    if os.path.isdir(path) or not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UserError(f"--export {path}: not a file that can be written")


@contextlib.contextmanager
def in_use(folder, new):
    """Keeps a second process out of `folder`; the lock ends with this one, however it ends.

    new: refuses a folder with a file of a run's names, unless one that never saved has left it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is in use by another run") from None
            except OSError:
                pass  # a file system without locks
        clear(folder, new)
        yield


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
