"""Images and labels: the bundled MNIST, an .npz file of four arrays, or a folder of IDX files.

Everything is read without pickle, and what a file declares is checked before memory is taken for
it.  Random choices are drawn from the NumPy generator that the caller passes, on the CPU, so
both devices see the same images in the same order.
"""

import gzip
import hashlib
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autograd import array_module
from training.checkpoint import reading

BUNDLED = str(Path(__file__).resolve().parent.parent / "data" / "mnist.npz")
SHA256 = "a7ca5941ed14a4e275a85c70d92dc1ec30216050a9a8efb4cd648939b6ce6b80"
SIZE = 9_477_731
LIMIT = 2**30  # bytes of one data set, unpacked

IDX = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
EXPECTED = "square uint8 images x_train, x_test (n, H, H) and uint8 labels y_train, y_test (n,)"


class DataError(ValueError):
    """A data set could not be read or used; the message is one line."""


class Dataset(NamedTuple):
    """Images x (n, H, H) and labels y (n,), uint8, labels counted from 0; and a name."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str

    @property
    def classes(self):
        """The number of classes, one more than the largest training label."""
        return int(self.y_train.max()) + 1


def load(path=None):
    """The Dataset at `path`: None for the bundled MNIST, an .npz file, or a folder of IDX files.

    An .npz file holds the arrays x_train, y_train, x_test, y_test and no others.  A folder holds
    the four files of MNIST's own format, plain or .gz.
    Raises DataError if something is missing, truncated, altered, or not of the right form.
    """
    if path is None:
        _verify_bundled()
    path = BUNDLED if path is None else os.fspath(path)
    name = os.path.basename(os.path.normpath(path))
    if os.path.isdir(path):
        arrays = {key: _read_idx(path, key) for key in IDX}
    elif os.path.isfile(path) and path.endswith(".npz"):
        with reading(path, DataError, EXPECTED):
            arrays = _read_npz(path)
    else:
        what = "is not an .npz file" if os.path.exists(path) else "no such file or folder"
        raise DataError(f"{path}: {what}; expected an .npz file or a folder of IDX files")
    with reading(path, DataError, EXPECTED):
        _check_arrays(arrays)
    return Dataset(**arrays, name=name)


def split(dataset, validation=5000, limit=None, *, rng):
    """x_train, y_train, x_val, y_val: the training images, some of them held out at random.

    validation: how many are held out, the first of a permutation drawn from `rng`; 0 is allowed.
    limit: how many of the others are kept for training (None: all).  With a limit at most
    limit // 5 images are held out (one at least, if `validation` is not 0).
    Raises DataError where the data set has too few images for that.
    """
    n = len(dataset.x_train)
    if validation < 0 or (limit is not None and limit < 1):
        raise DataError(f"validation must be >= 0 and limit >= 1, got {validation} and {limit}")
    if limit is not None:
        validation = min(validation, max(1, limit // 5))
    if validation + (limit or 1) > n:
        wanted = f"{validation} for validation and {limit or 1} to train on"
        raise DataError(f"{dataset.name} has {n} training images; {wanted} are too many")
    order = rng.permutation(n)
    held_out, kept = order[:validation], order[validation:][:limit]
    x, y = dataset.x_train, dataset.y_train
    return x[kept], y[kept], x[held_out], y[held_out]


def statistics(x):
    """The mean and standard deviation, as floats, of all pixels of uint8 images x, scaled to 0..1.

    Computed exactly from the histogram.  Raises DataError if all pixels are equal.
    """
    array_module(x)  # TypeError for what is no array
    if x.dtype != np.uint8:
        raise DataError(f"images must be uint8, got {x.dtype}")
    counts = np.zeros(256, np.int64)
    for start in range(0, len(x), 4096):  # bincount widens its argument to 8 bytes
        counts += np.bincount(x[start : start + 4096].ravel(), minlength=256)
    levels = np.arange(256) / 255
    if np.count_nonzero(counts) < 2:
        raise DataError("all pixels are equal: there is no standard deviation to divide by")
    share = counts / counts.sum()
    mean = float(share @ levels)
    return mean, math.sqrt(share @ (levels - mean) ** 2)


def standardise(x, mean, std):
    """(x/255 − mean)/std in float32, for uint8 images x of any shape, NumPy or CuPy."""
    array_module(x)  # TypeError for what is no array
    if x.dtype != np.uint8:
        raise DataError(f"images must be uint8, got {x.dtype}")
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise DataError(f"mean and std must be finite, and std positive, got {mean} and {std}")
    out = x.astype(np.float32)
    out *= 1 / (255 * std)
    out -= mean / std
    return out


def pad(x, width):
    """Images x (n, H, H) with `width` zero pixels added on every side."""
    return np.pad(x, ((0, 0), (width, width), (width, width)))


def crops(x, chosen, offsets, size):
    """size × size windows of the padded images x[chosen], at offsets (B, 2) from their corners.

    x: (n, H, H); chosen: (B,) integers; NumPy or CuPy.  Returns (B, size, size) in x's dtype.
    Raises DataError for negative ones, which would count from the end, and IndexError beyond it;
    on a GPU, where it would have to wait, it does not look.
    """
    xp = array_module(x, chosen, offsets)
    if xp is np and min(chosen.min(initial=0), offsets.min(initial=0)) < 0:
        raise DataError("chosen and offsets must not be negative")
    window = xp.arange(size)
    rows = (offsets[:, 0, None] + window)[:, :, None]
    columns = (offsets[:, 1, None] + window)[:, None, :]
    return x[chosen[:, None, None], rows, columns]


class Batches:
    """The images of each step, in an order drawn from the seed and the epoch, each moved by up to
    `shift` pixels; of one of several ranks its slice.  They live on the device, and so do the
    orders, moved there once per epoch."""

    def __init__(self, x, y, config, xp=np, rank=0, ranks=1):
        self.shift, self.seed, self.xp, self.epoch = config.shift, config.seed, xp, None
        self.size = min(config.batch_size, len(x))
        if self.shift >= x.shape[1]:
            raise DataError(f"--shift must be less than the image's {x.shape[1]} pixels")
        if self.size < ranks:
            raise DataError(f"{ranks} ranks need as many images in a batch, got {self.size}")
        self.x, self.y, self.image = xp.asarray(pad(x, self.shift)), xp.asarray(y), x.shape[1]
        self.per_epoch = len(x) // self.size
        self.slice = self.size * rank // ranks, self.size * (rank + 1) // ranks

    def choose(self, t):
        """Which images step t = 0, 1, … takes (B,), and their offsets (B, 2)."""
        epoch, i = divmod(t, self.per_epoch)
        if epoch != self.epoch:
            rng, n, self.epoch = np.random.default_rng([self.seed, 2, epoch]), len(self.x), epoch
            self.order = self.xp.asarray(rng.permutation(n))
            self.offsets = self.xp.asarray(rng.integers(0, 2 * self.shift + 1, (n, 2)))
        part = slice(*(i * self.size + end for end in self.slice))
        return self.order[part], self.offsets[part]

    def images(self, chosen, offsets):
        """The chosen images, moved by their offsets, uint8, and their labels."""
        return crops(self.x, chosen, offsets, self.image), self.y[chosen]


def _verify_bundled():
    with reading(BUNDLED, DataError, f"{SIZE:,} bytes with SHA-256 {SHA256[:12]}..."):
        with open(BUNDLED, "rb") as file:
            digest = hashlib.sha256(file.read(SIZE + 1)).hexdigest()
        if digest != SHA256:
            size = os.path.getsize(BUNDLED)
            raise ValueError(f"altered or truncated: {size:,} bytes with SHA-256 {digest[:12]}...")


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        for member in file.zip.infolist():  # np.load takes all memory that is declared
            with file.zip.open(member) as array:
                version = np.lib.format.read_magic(array)
                read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
                shape, _, dtype = read_header(array)
                _check_header(member.filename.removesuffix(".npy"), shape, dtype)
                if math.prod(shape) != member.file_size - array.tell():
                    raise ValueError(f"{member.filename} declares {shape}, but is not of that size")
        return {key: file[key] for key in file.files}


def _read_idx(folder, key):
    stems = IDX[key], IDX[key].replace("-idx", ".idx")
    paths = [os.path.join(folder, stem + end) for stem in stems for end in ("", ".gz")]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise DataError(f"{folder}: holds no {IDX[key]}; expected that or {IDX[key]}.gz")
    ndim, form = (3, "square images") if key[0] == "x" else (1, "labels")
    magic = 0x0800 | ndim  # 08: uint8, then the number of dimensions
    opener = gzip.open if path.endswith(".gz") else open
    with (
        reading(path, DataError, f"IDX {form} with magic 0x{magic:08x}"),
        opener(path, "rb") as file,
    ):
        header = file.read(4 + 4 * ndim)  # big-endian
        if len(header) < 4 + 4 * ndim:
            raise ValueError(f"truncated: {len(header)} of the {4 + 4 * ndim} header bytes")
        found, *shape = struct.unpack(f">{1 + ndim}I", header)
        if found != magic:
            raise ValueError(f"wrong magic 0x{found:08x}")
        _check_header(key, tuple(shape), np.dtype(np.uint8))
        content = bytearray()  # grows with what is there, whatever the header says
        while piece := file.read(2**16):
            content += piece
            if len(content) > math.prod(shape):
                break
        if len(content) != math.prod(shape):
            raise ValueError(f"is not of the {math.prod(shape):,} bytes that its header declares")
        return np.frombuffer(content, np.uint8).reshape(shape)


def _check_header(name, shape, dtype):
    if name not in IDX:
        raise ValueError(f"holds an array {name!r}")
    if dtype != np.uint8:
        raise ValueError(f"{name} has dtype {dtype}")
    square = len(shape) == 3 and shape[1] == shape[2] if name[0] == "x" else len(shape) == 1
    if not square or 0 in shape or math.prod(shape) > LIMIT:
        raise ValueError(f"{name} has shape {shape}")


def _check_arrays(arrays):
    missing = [key for key in IDX if key not in arrays]
    if missing:
        raise ValueError(f"holds no {missing[0]}")
    image, largest = arrays["x_train"].shape[1:], min(254, arrays["y_train"].max())
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if len(x) != len(y):
            raise ValueError(f"{len(x)} images x_{part} but {len(y)} labels y_{part}")
        if x.shape[1:] != image:
            raise ValueError(f"x_train has images of {image}, x_{part} of {x.shape[1:]}")
        if y.max() > largest:
            raise ValueError(f"y_{part} has a label {y.max()}, above the {largest} allowed")
