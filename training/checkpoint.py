"""Files that are replaced whole or not at all, and checkpoints in the format of safetensors.

A file is written under a temporary name in the same folder, brought to the disk and only then
renamed: whatever goes wrong (a full disk, a lost folder, Ctrl-C), the earlier file stays.
"""

import contextlib
import json
import os
import zlib

import numpy as np
import safetensors
import safetensors.numpy

from training.options import UserError


def save(path, arrays, meta):
    """Writes {name: array} and the JSON of the dict `meta` to `path`, with a checksum; UserError if
    the disk refuses, with the earlier file intact."""
    record = json.dumps(meta)
    export(path, arrays, {"crc32, meta": f"{checksum(arrays, record)} {record}"})


def export(path, arrays, metadata):
    """Writes {name: NumPy array} and a dict of strings as a safetensors file, like `save`."""
    rows = {k: np.asarray(a, order="C") for k, a in arrays.items()}  # others would be scrambled
    with replacing(path) as file:
        file.write(safetensors.numpy.save(rows, metadata))


def load(path):
    """(arrays, meta) as `save` was given them, tuples as lists; UserError for a file that is
    missing, truncated, altered or no checkpoint."""
    with reading(path, "a checkpoint written by this program"):
        with safetensors.safe_open(path, "np") as file:
            arrays, about = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
        crc, _, record = about.get("crc32, meta", "").partition(" ")
        if crc != str(checksum(arrays, record)):
            raise ValueError("altered, or not written by this program")
        return arrays, json.loads(record)


def checksum(arrays, record):
    """CRC-32 of names, dtypes, shapes, contents and the record."""
    crc = zlib.crc32(record.encode())
    for name, a in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {a.dtype} {a.shape}".encode(), crc)
        crc = zlib.crc32(a.tobytes(), crc)
    return crc


@contextlib.contextmanager
def reading(path, expected):
    """Inside this context whatever a bad file causes becomes a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the libraries that read files raise errors of many classes
        what = next(iter(str(error).splitlines()), "")[:200]  # a name can be all of the file
        if isinstance(error, OSError) and error.filename:  # it could not be opened
            what = error.strerror
        elif isinstance(error, FileNotFoundError):
            what = "no such file"
        elif type(error) not in (ValueError, RuntimeError):  # Python has no lzma; encrypted
            what = f"damaged or truncated ({type(error).__name__}: {what})"
        raise UserError(f"{path}: {what}; expected {expected}") from error


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once all of it is on the disk."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"{path} could not be written: {why}") from error
        raise
    with contextlib.suppress(OSError):  # the new name itself; not every system opens a folder
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
