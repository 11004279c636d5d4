"""Checkpoints: named arrays and a JSON record in one .npz file, replaced whole or not at all.

A file is written under a temporary name in the same folder, brought to the disk and only then
renamed, so whatever goes wrong (a full disk, a lost folder, Ctrl-C) leaves the earlier file as it
was.  A file is read without pickle, and what its headers declare is checked against its size
before memory is taken for it.
"""

import contextlib
import json
import math
import os
import warnings
import zipfile

import numpy as np

META = "__meta__"
EXPECTED = "an .npz checkpoint written by this program"


class CheckpointError(ValueError):
    """A checkpoint could not be read, written or used; the message is one line."""


def save(path, arrays, meta):
    """Writes {name: array} and the JSON of the dict `meta` to `path`, an uncompressed .npz.

    arrays: NumPy, any shape, of booleans, integers or floats of at most 64 bits.
    Raises CheckpointError if the disk refuses, with the earlier file intact; TypeError or
    ValueError for arrays, names or a `meta` that cannot be kept.
    """
    _check_arrays(arrays, reserved=META)
    record = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    with _replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in {**arrays, META: record}.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def load(path):
    """(arrays, meta) as `save` was given them, tuples in `meta` as lists.

    Raises CheckpointError if the file is missing, truncated, altered or not a checkpoint.
    """
    with reading(path, CheckpointError, EXPECTED):
        arrays = read_npz(path, limit=os.path.getsize(path))
        if META not in arrays:
            raise ValueError(f"holds no {META}")
        meta = json.loads(arrays.pop(META).tobytes())
        if not isinstance(meta, dict):
            raise ValueError(f"{META} is not a JSON object")
    return arrays, meta


def require_same(saved, wanted, fields):
    """Raises CheckpointError for the first of `fields` in which the dicts differ, with both values.

    saved: the `meta` of a checkpoint.  wanted: what this run asks for; tuples count as lists.
    """
    for field in fields:
        value = json.loads(json.dumps(wanted[field]))
        if field not in saved or saved[field] != value:
            kept = repr(saved[field]) if field in saved else "nothing"
            raise CheckpointError(f"{field} differs: {kept} in the checkpoint, {value!r} here")


def export_safetensors(path, arrays, metadata):
    """Writes {name: array} and a dict of strings as a safetensors file, replaced like `save`'s.

    Layout: the header's length (8 bytes, little-endian), the header (JSON, padded with spaces to
    a multiple of 8), then the arrays in row-major order, the widest dtype first.
    Raises CheckpointError if the disk refuses; TypeError or ValueError for what cannot be kept.
    """
    _check_arrays(arrays, reserved="__metadata__")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError("the metadata of a safetensors file are strings")
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        a, start, end = arrays[name], end, end + arrays[name].nbytes
        dtype = "BOOL" if a.dtype == bool else f"{a.dtype.kind.upper()}{8 * a.itemsize}"  # F32, I64
        header[name] = {"dtype": dtype, "shape": list(a.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for a in (arrays[name] for name in names):
            file.write(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())  # row-major


def read_npz(path, limit, check=lambda name, shape, dtype: None):
    """{name: array} of an .npz file without pickle; call it inside `reading`.

    limit: the bytes that all members together may declare.  check: called for each array before
    memory is taken for it, to raise ValueError for one that is not wanted.
    Raises ValueError, or whatever zipfile and NumPy raise, for a damaged file.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        declared = sum(member.file_size for member in members)
        if declared > limit:
            raise ValueError(f"declares {declared:,} bytes of arrays, more than {limit:,}")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in arrays:
                raise ValueError(f"{member.filename!r} is not an array, or is there twice")
            with archive.open(member) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is not in version 1.0 of the .npy format")
                with warnings.catch_warnings():  # of a file from Python 2, which is none the worse
                    warnings.simplefilter("ignore", UserWarning)
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype.kind not in "biuf":
                    raise ValueError(f"{name} has dtype {dtype}")
                check(name, shape, dtype)
                nbytes = math.prod(shape) * dtype.itemsize
                if nbytes != member.file_size - file.tell():
                    raise ValueError(f"{name} declares {dtype} {shape}, but is not of that size")
                a = read_bytes(file, nbytes).view(dtype)
                arrays[name] = a.reshape(shape[::-1]).T if fortran else a.reshape(shape)
    return arrays


def read_bytes(file, count):
    """uint8 (count,): the rest of a binary file; ValueError if that is not `count` bytes."""
    out = bytearray()  # grows with what is there, whatever the header says
    while piece := file.read(4096):  # small, because 1 byte of LZMA can unpack to 7,000
        out += piece
        if len(out) > count:
            raise ValueError(f"goes on after the {count:,} bytes that its header declares")
    if len(out) < count:
        raise ValueError(f"truncated: {len(out):,} of the {count:,} bytes that its header declares")
    return np.frombuffer(out, np.uint8)


@contextlib.contextmanager
def reading(path, error_class, expected):
    """Inside this context whatever a bad file causes becomes an `error_class` of one line."""
    try:
        yield
    except Exception as error:  # zipfile, gzip, zlib, lzma, NumPy and json raise many classes
        what = next(iter(str(error).splitlines()), "")[:200]  # a name can be all of the file
        if isinstance(error, OSError) and error.filename:  # it could not be opened
            what = error.strerror
        elif type(error) is not ValueError:
            what = f"damaged or truncated ({type(error).__name__}: {what})"
        raise error_class(f"{path}: {what}; expected {expected}") from error


def _check_arrays(arrays, reserved):
    for name, a in arrays.items():
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "biuf" or a.itemsize > 8:
            raise TypeError(f"{name} is not a NumPy array of booleans, integers or floats")
        if not name or name == reserved:
            raise ValueError(f"an array cannot be named {name!r}")


@contextlib.contextmanager
def _replacing(path):
    """A binary file that takes the place of `path` once all of it is on the disk."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")
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
            raise CheckpointError(f"{path} could not be written: {why}") from error
        raise
    with contextlib.suppress(OSError):  # the new name itself; not every system opens a folder
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
