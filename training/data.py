"""Images and labels: the bundled MNIST, an .npz file, a folder of IDX files or of CIFAR-10's.

Everything is read without pickle, and what a file declares is checked before memory is taken for
it.  Random choices are drawn from the NumPy generator that the caller passes, on the CPU, so
both devices see the same images in the same order.
"""

import gzip
import math
import os
import struct
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.checkpoint import reading
from training.options import UserError

BUNDLED = str(Path(__file__).resolve().parent.parent / "data" / "mnist.npz")
LIMIT = 2**30  # bytes of one data set, unpacked

IDX = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
CIFAR = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
CIFAR_PICKLES = *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
PICKLES = "CIFAR-10 in pickles, which can run any program: take the .bin files"
EXPECTED = "uint8 images x_train, x_test (n, H, W[, C]) and labels y_train, y_test (n,) of 0 to 254"


class Dataset(NamedTuple):
    """Images x (n, H, W) or (n, H, W, C) and labels y (n,), uint8, counted from 0."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def classes(self):
        """The number of classes, one more than the largest training label."""
        return int(self.y_train.max()) + 1


def load(path=None, parts=("train", "test")):
    """The Dataset at `path`: None for the bundled MNIST, an .npz file, or a folder.

    An .npz file holds the arrays x_train, y_train, x_test, y_test.  A folder holds the files of
    MNIST's own format, plain or .gz, or the six .bin files of CIFAR-10.
    parts: what is read, and has to be right; ("test",) leaves None for the training images.
    Raises UserError if something is missing, truncated, altered, or not of the right form.
    """
    path, names = path or BUNDLED, [f"{kind}_{part}" for part in parts for kind in "xy"]
    with reading(path, EXPECTED):
        if os.path.isdir(path):
            inside = os.listdir(path)
            if "data_batch_1" in inside:
                raise ValueError(PICKLES)
            read = _read_cifar if {*CIFAR[0], *CIFAR[1]} & {*inside} else _read_idx
            arrays = {key: read(path, key) for key in names}
        elif os.path.isfile(path) and str(path).lower().endswith(".npz"):
            arrays = _read_npz(path, names)
        else:
            known = "is not an .npz file" if os.path.exists(path) else "no such file or folder"
            raise ValueError(PICKLES if os.path.basename(path) in CIFAR_PICKLES else known)
        return Dataset(*(_checked(arrays).get(key) for key in IDX))


def split(dataset, limit, rng):
    """x_train, y_train, x_val, y_val: the training images, some of them held out at random.

    Held out are 5,000, but at most a sixth of all, and with a limit at most a fifth of it; one at
    least.  limit: how many of the others are kept for training; 0: all.
    Raises UserError where the data set has too few images for that.
    """
    n = len(dataset.x_train)
    validation = max(1, min(5000, n // 6, (limit or n) // 5))
    if validation + (limit or 1) > n:
        wanted = f"{validation} for validation and {limit or 1} to train on"
        raise UserError(f"there are {n} training images; {wanted} are too many")
    order = rng.permutation(n)
    held_out, kept = order[:validation], order[validation:][: limit or n]
    x, y = dataset.x_train, dataset.y_train
    return tuple(np.ascontiguousarray(a[i]) for i in (kept, held_out) for a in (x, y))


def statistics(x):
    """The mean and standard deviation, as floats, of all pixels of uint8 images x, scaled to 0..1.

    Computed exactly from the histogram.  Raises UserError if all pixels are equal.
    """
    counts = np.zeros(256, np.int64)
    for start in range(0, len(x), 4096):  # bincount widens its argument to 8 bytes
        counts += np.bincount(x[start : start + 4096].ravel(), minlength=256)
    if np.count_nonzero(counts) < 2:
        raise UserError("all pixels are equal: there is no standard deviation to divide by")
    levels, share = np.arange(256) / 255, counts / counts.sum()
    mean = float(share @ levels)
    return mean, math.sqrt(share @ (levels - mean) ** 2)


def standardise(x, mean, std):
    """(x/255 − mean)/std in float32, for uint8 images x of any shape, NumPy or CuPy."""
    out = x.astype(np.float32)
    out *= 1 / (255 * std)
    out -= mean / std
    return out


class Batches:
    """The images of each step, in an order drawn from the seed and the epoch, each moved by up to
    `shift` pixels; of one of several ranks its slice.  They live on the device, and so do the
    orders, moved there once per epoch."""

    def __init__(self, x, y, config, xp=np, rank=0, ranks=1):
        self.shift, self.seed, self.xp, self.epoch = config.shift, config.seed, xp, None
        self.size = min(config.batch_size, len(x))
        if self.size < ranks:
            what = f"--batch-size {config.batch_size}, {len(x)} training images"
            raise UserError(f"{ranks} ranks need as many images in a batch, got {what}")
        if self.shift >= min(x.shape[1:3]):
            raise UserError(f"--shift {self.shift} can move all of an image of {x.shape[1:3]} away")
        width = ((0, 0), (self.shift, self.shift), (self.shift, self.shift), (0, 0))[: x.ndim]
        self.x, self.y, self.image = xp.asarray(np.pad(x, width)), xp.asarray(y), x.shape[1:3]
        self.per_epoch = len(x) // self.size
        self.slice = self.size * rank // ranks, self.size * (rank + 1) // ranks

    def choose(self, t, whole=False):
        """Which images step t = 0, 1, … takes (B,), and their offsets (B, 2); whole: of all."""
        epoch, i = divmod(t, self.per_epoch)
        if epoch != self.epoch:
            rng, n, self.epoch = np.random.default_rng([self.seed, 2, epoch]), len(self.x), epoch
            self.order = self.xp.asarray(rng.permutation(n))
            self.offsets = self.xp.asarray(rng.integers(0, 2 * self.shift + 1, (n, 2)))
        ends = (0, self.size) if whole else self.slice
        part = slice(*(i * self.size + end for end in ends))
        return self.order[part], self.offsets[part]

    def images(self, chosen, offsets):
        """The chosen images (B, H, W[, C]), uint8, moved by their offsets, and their labels."""
        (H, W), arange = self.image, self.xp.arange
        rows = (offsets[:, :1] + arange(H))[:, :, None]
        columns = (offsets[:, 1:] + arange(W))[:, None, :]
        return self.x[chosen[:, None, None], rows, columns], self.y[chosen]


def _read_npz(path, names):
    with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of headers by Python 2, none the worse
        for key in names:
            if f"{key}.npy" not in archive.namelist():
                raise ValueError(f"holds no {key}")
            member = archive.getinfo(f"{key}.npy")
            with archive.open(member) as array:  # np.load takes all memory that is declared
                if np.lib.format.read_magic(array) != (1, 0):  # of 64 kB at most
                    raise ValueError(f"{key} is not in version 1.0 of .npy")
                shape, _, dtype = np.lib.format.read_array_header_1_0(array)
                _check_header(key, shape, dtype)
                size = math.prod(shape) * dtype.itemsize
                if size != member.file_size - array.tell() or size > 1032 * os.path.getsize(path):
                    raise ValueError(f"{key} declares {shape}, but is not of that size")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[f"{key}.npy"] for key in names}


def _bytes(file, count):
    """uint8 (count,): the rest of a file; memory is taken as it is found, whatever was declared."""
    content = bytearray()
    while len(content) <= count and (piece := file.read(2**16)):
        content += piece
    if len(content) != count:
        raise ValueError(f"is not of the {count:,} bytes that its header declares")
    return np.frombuffer(content, np.uint8)


def _read_idx(folder, key):
    stems = IDX[key], IDX[key].replace("-idx", ".idx")
    paths = [os.path.join(folder, stem + end) for stem in stems for end in ("", ".gz")]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise ValueError(f"holds no {IDX[key]} or {IDX[key]}.gz")
    ndim = 3 if key[0] == "x" else 1
    magic = 0x0800 | ndim  # 08: uint8, then the number of dimensions
    opener = gzip.open if path.endswith(".gz") else open
    with reading(path, f"IDX with magic 0x{magic:08x}"), opener(path, "rb") as file:
        found, *shape = struct.unpack(f">{1 + ndim}I", file.read(4 + 4 * ndim))
        if found != magic:
            raise ValueError(f"wrong magic 0x{found:08x}")
        _check_header(key, tuple(shape), np.dtype(np.uint8))
        return _bytes(file, math.prod(shape)).reshape(shape)


def _read_cifar(folder, key):
    """Records of a label and 32 × 32 pixels of red, of green and of blue, a byte each."""
    arrays = []
    for name in CIFAR[key.endswith("test")]:
        path = os.path.join(folder, name)
        with reading(path, "CIFAR-10's binary records of 3,073 bytes"), open(path, "rb") as file:
            count = max(1, os.path.getsize(path) // 3073)
            records = _bytes(file, 3073 * count).reshape(-1, 3073)
        pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays.append(records[:, 0] if key[0] == "y" else pixels)
    return np.concatenate(arrays)


def _check_header(name, shape, dtype):
    if dtype != np.uint8 if name[0] == "x" else dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {dtype}")
    if len(shape) == 4 and shape[1] < 5 < shape[3]:
        raise ValueError(f"{name} has shape {shape}; channels stand last, (n, H, W, C)")
    fits = len(shape) in (3, 4) if name[0] == "x" else shape and shape[1:] in ((), (1,))
    if not fits or 0 in shape or math.prod(shape) * dtype.itemsize > LIMIT:
        raise ValueError(f"{name} has shape {shape}")


def _checked(arrays):
    """The arrays in rows, labels as uint8; ValueError for what cannot be trained on or tested."""
    for name, y in arrays.items():
        if name[0] == "y":
            x = arrays["x" + name[1:]]
            if y.min() < 0 or y.max() > 254 or (y != np.floor(y)).any():
                raise ValueError(f"{name} has labels from {y.min()} to {y.max()}")
            if len(x) != len(y):
                raise ValueError(f"{len(x)} images x{name[1:]} but {len(y)} labels {name}")
    arrays = {k: np.ascontiguousarray(a, np.uint8) for k, a in arrays.items()}
    arrays |= {k: a.reshape(-1) for k, a in arrays.items() if k[0] == "y"}  # Keras has (n, 1)
    x, y, x_test, y_test = map(arrays.get, IDX)
    if x is not None and x.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"x_train has images of {x.shape[1:]}, x_test of {x_test.shape[1:]}")
    if x is not None and y_test.max() > y.max():
        raise ValueError(f"y_test has a label {y_test.max()}, above the {y.max()} of y_train")
    return arrays
