"""training/data.py: what it reads, what it refuses, and how it splits, scales and orders images."""

import contextlib
import gzip
import io
import math
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from training import data
from training.options import UserError

ROOT = Path(data.__file__).parent.parent


def small(n=12, m=5, image=(3, 3), labels=4):
    """Four arrays with every label present and no two images alike."""
    rng = np.random.default_rng(7)
    return {
        "x_train": rng.integers(0, 256, (n, *image), dtype=np.uint8),
        "y_train": (np.arange(n) % labels).astype(np.uint8),
        "x_test": rng.integers(0, 256, (m, *image), dtype=np.uint8),
        "y_test": (np.arange(m) % labels).astype(np.uint8),
    }


def idx_bytes(a):
    return struct.pack(f">{1 + a.ndim}I", 0x0800 | a.ndim, *a.shape) + a.tobytes()


def write_npz(path, arrays, compressed=False):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def write_idx(folder, arrays, opener=open, end="", dotted=False):
    folder.mkdir()
    for key, a in arrays.items():
        stem = data.IDX[key].replace("-idx", ".idx") if dotted else data.IDX[key]
        with opener(folder / (stem + end), "wb") as file:
            file.write(idx_bytes(a))
    return folder


def refusal(path):
    """The message with which `path` is refused: one line that names it."""
    with pytest.raises(UserError) as caught:
        data.load(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "; expected" in text
    return text


@contextlib.contextmanager
def little_memory(most=2**20):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def assert_holds(dataset, arrays):
    for key, a in arrays.items():
        got = getattr(dataset, key)
        assert got.dtype == np.uint8 and got.shape == a.shape and (got == a).all()
        assert got.flags.c_contiguous


# ------------------------------------------------------------------------------- bundled MNIST


def test_bundled_file_is_mnist():
    mnist = data.load()
    assert mnist.x_train.shape == (60000, 28, 28) and mnist.x_test.shape == (10000, 28, 28)
    assert mnist.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(mnist.y_test).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]  # fmt: skip
    assert mnist.classes == 10
    mean, std = data.statistics(mnist.x_train)
    assert abs(mean - 0.1307) < 5e-5 and abs(std - 0.3081) < 5e-5  # the numbers everybody uses


def test_readme_of_data_prints_the_checksums_that_it_states(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("data/README.md").read_text(encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert printed.getvalue().count("\n") == 5 and printed.getvalue() in text


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_the_bundled_file_is_refused_when_damaged(tmp_path, monkeypatch, damage):
    content, at = bytearray(Path(data.BUNDLED).read_bytes()), 5_000_000
    monkeypatch.setattr(data, "BUNDLED", str(tmp_path / "mnist.npz"))
    content[at] ^= damage == "altered"
    if damage != "missing":
        Path(data.BUNDLED).write_bytes(content[: at if damage == "truncated" else None])
    with pytest.raises(UserError) as caught:
        data.load()
    text = str(caught.value)
    assert data.BUNDLED in text and "\n" not in text
    assert ("no such file" if damage == "missing" else "damaged or truncated") in text


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("image", [(3, 3), (2, 5), (4, 3, 3), (3, 3, 1)], ids=str)
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_file_is_read_as_written(tmp_path, compressed, image):
    arrays = small(image=image)
    for lay_out in (np.ascontiguousarray, np.asfortranarray):
        laid_out = {k: lay_out(a) for k, a in arrays.items()}
        dataset = data.load(write_npz(tmp_path / "own.npz", laid_out, compressed))
        assert_holds(dataset, arrays)
        assert dataset.classes == 4


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.int8, ">i4", bool], ids=str)
def test_whole_labels_of_any_dtype_are_read(tmp_path, dtype):
    arrays = small(labels=2)
    wide = {k: a.astype(dtype) if k[0] == "y" else a for k, a in arrays.items()}
    assert_holds(data.load(write_npz(tmp_path / "own.npz", wide)), arrays)
    column = {k: a[:, None] if k[0] == "y" else a for k, a in wide.items()}  # as Keras has CIFAR-10
    assert_holds(data.load(write_npz(tmp_path / "own.npz", column)), arrays)


def test_npz_of_python_2_is_read_without_a_warning(tmp_path):
    """Its headers say 12L for 12, at which NumPy warns."""
    path, arrays = tmp_path / "old.npz", small()
    with zipfile.ZipFile(path, "w") as archive:
        for name, a in arrays.items():
            raw = npy(a.shape, a.tobytes())
            if name == "x_train":
                assert raw.count(b"(12, ") == raw.count(b"} ") == 1
                raw = raw.replace(b"(12, ", b"(12L, ").replace(b"} ", b"}")
            archive.writestr(f"{name}.npy", raw)
    assert_holds(data.load(path), arrays)


def test_test_images_alone_are_enough_to_test(tmp_path):
    alone = {k: a for k, a in small().items() if k.endswith("test")}
    for path in (write_npz(tmp_path / "own.npz", alone), write_idx(tmp_path / "idx", alone)):
        assert_holds(data.load(path, ("test",)), alone)
        assert "train" in refusal(path)
    more = alone | {"x_train": np.zeros(3), "extra": np.array([None])}  # what is not needed
    assert_holds(data.load(write_npz(tmp_path / "own.npz", more), ("test",)), alone)


def write_cifar(folder):
    """The six files of CIFAR-10's binary version, and the arrays that they hold."""
    folder.mkdir()
    arrays = small(n=9, m=4, image=(32, 32, 3))
    for part, ends in (("train", (0, 2, 3, 6, 7, 9)), ("test", (0, 4))):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        records = np.hstack([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)])
        for name, a, b in zip(data.CIFAR[part == "test"], ends, ends[1:]):
            (folder / name).write_bytes(records[a:b].tobytes())
    return arrays


def test_the_binary_files_of_cifar_10_are_read_as_written(tmp_path):
    arrays = write_cifar(tmp_path / "c")
    assert_holds(data.load(tmp_path / "c"), arrays)
    assert data.load(tmp_path / "c", ("test",)).x_test.shape == (4, 32, 32, 3)
    path = tmp_path / "c" / data.CIFAR[0][2]
    content = path.read_bytes()
    for changed in (b"", content[:-1], content + b"\0", content[:3072]):
        path.write_bytes(changed)
        assert "is not of the" in refusal(path.parent)
    path.unlink()
    assert "No such file" in refusal(path.parent)
    (path.parent / "data_batch_1").write_bytes(b"a pickle")
    assert "take the .bin files" in refusal(path.parent)


@pytest.mark.parametrize("opener, end", [(open, ""), (gzip.open, ".gz")])
@pytest.mark.parametrize("dotted", [False, True])
def test_idx_folder_is_read_as_written(tmp_path, opener, end, dotted):
    arrays = small()
    assert_holds(data.load(write_idx(tmp_path / "idx", arrays, opener, end, dotted)), arrays)


# ------------------------------------------------------------------------------------ refusing


def test_paths_that_are_no_data_set_are_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nothing.npz")
    assert "holds no train-images-idx3-ubyte" in refusal(tmp_path)
    (tmp_path / "digits.csv").write_text("5,0,4")
    assert "is not an .npz file" in refusal(tmp_path / "digits.csv")
    (tmp_path / "text.npz").write_text("not a zip file")
    assert "damaged or truncated" in refusal(tmp_path / "text.npz")


@pytest.mark.parametrize("key", data.IDX)
def test_missing_array_or_file_is_named(tmp_path, key):
    arrays = small()
    folder = write_idx(tmp_path / "idx", arrays)
    (folder / data.IDX[key]).unlink()
    assert f"holds no {data.IDX[key]}" in refusal(folder)
    del arrays[key]
    assert f"holds no {key}" in refusal(write_npz(tmp_path / "own.npz", arrays))


WRONG = {
    "flat": ({"x_test": np.zeros((5, 9), np.uint8)}, "x_test has shape (5, 9)"),
    "one-hot": ({"y_train": np.zeros((12, 4), np.uint8)}, "y_train has shape (12, 4)"),
    "float images": ({"x_train": np.zeros((12, 3, 3), np.float32)}, "x_train has dtype float32"),
    "five axes": ({"x_test": np.zeros((5, 3, 3, 1, 1), np.uint8)}, "has shape (5, 3, 3, 1, 1)"),
    "half labels": ({"y_test": np.full(5, 0.5)}, "y_test has labels from 0.5 to 0.5"),
    "no labels": ({"y_test": np.full(5, np.nan)}, "y_test has labels from nan to nan"),
    "negative labels": ({"y_train": np.arange(12) - 1}, "y_train has labels from -1 to 10"),
    "large labels": ({"y_train": np.full(12, 2**40)}, "y_train has labels from 1099511627776 to"),
    "complex labels": ({"y_test": np.zeros(5, complex)}, "y_test has dtype complex128"),
    "empty": (small(n=0), "x_train has shape (0, 3, 3)"),
    "empty test set": (small(m=0), "x_test has shape (0, 3, 3)"),
    "images of no pixels": ({"x_train": np.zeros((12, 0, 0), np.uint8)}, "has shape (12, 0, 0)"),
    "counts": ({"y_train": np.zeros(11, np.uint8)}, "12 images x_train but 11 labels y_train"),
    "test counts": ({"y_test": np.zeros(6, np.uint8)}, "5 images x_test but 6 labels y_test"),
    "two sizes": ({"x_test": np.zeros((5, 2, 2), np.uint8)}, "x_train has images of (3, 3)"),
    "label 255": ({"y_train": np.full(12, 255, np.uint8)}, "y_train has labels from 255 to 255"),
    "unseen label": ({"y_test": np.full(5, 4, np.uint8)}, "y_test has a label 4, above the 3"),
    "one label": ({"y_train": np.uint8(3)}, "y_train has shape ()"),
    "objects": ({"y_train": np.array([None] * 12)}, "dtype object"),
    "strings": ({"y_train": np.array(["5"] * 12)}, "dtype <U1"),
}


@pytest.mark.parametrize("wrong, message", WRONG.values(), ids=WRONG)
def test_arrays_of_the_wrong_form_are_refused(tmp_path, wrong, message):
    assert message in refusal(write_npz(tmp_path / "own.npz", small() | wrong))


@pytest.mark.parametrize("name", ["empty", "counts", "test counts", "two sizes", "unseen label"])
def test_idx_files_of_the_wrong_form_are_refused(tmp_path, name):
    wrong, message = WRONG[name]
    with pytest.raises(UserError, match=re.escape(message)):
        data.load(write_idx(tmp_path / "idx", small() | wrong))


@pytest.mark.parametrize(
    "magic", [0x00000801, 0x00000D03, 0x00000804, 0x03080000, 0x1F8B0803, 0x01000803]
)
def test_idx_file_with_another_magic_is_refused(tmp_path, magic):
    folder = write_idx(tmp_path / "idx", small())
    path = folder / data.IDX["x_train"]
    path.write_bytes(struct.pack(">I", magic) + path.read_bytes()[4:])
    text = refusal(folder)
    assert f"{path}: wrong magic 0x{magic:08x}; expected" in text and "magic 0x00000803" in text


def good(folder, kind, key):
    """A file to damage, and the path to load."""
    if kind in ("npz", "compressed npz"):
        path = write_npz(folder / "own.npz", small(), kind != "npz")
        return path, path
    opener, end = (gzip.open, ".gz") if kind == "gzip" else (open, "")
    path = write_idx(folder / "idx", small(), opener, end)
    return path / (data.IDX[key] + end), path


NPZ = [("npz", ""), ("compressed npz", "")]
GZIP = [("gzip", "x_train"), ("gzip", "y_test")]
PLAIN = [("IDX", "x_train"), ("IDX", "y_test")]


@pytest.mark.parametrize("kind, key", NPZ + GZIP + PLAIN)
def test_a_file_cut_anywhere_or_lengthened_is_refused(tmp_path, kind, key):
    file, path = good(tmp_path, kind, key)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        text = refusal(path)
        assert "truncated" in text or "is not of the" in text, length
    if kind in ("IDX", "gzip"):
        for opener in (open, gzip.open if kind == "gzip" else open):
            file.write_bytes(content)
            with opener(file, "ab") as longer:
                longer.write(b"\1")
            refusal(path)


@pytest.mark.parametrize("kind, key", NPZ + GZIP)
def test_a_file_with_a_changed_byte_is_refused_or_read_unchanged(tmp_path, kind, key):
    file, path = good(tmp_path, kind, key)
    content, refused = bytearray(file.read_bytes()), 0
    for i in range(len(content)):
        for mask in (0x55, 0x10):
            content[i] ^= mask
            file.write_bytes(content)
            content[i] ^= mask
            try:
                assert_holds(data.load(path), small())  # dates, permissions, a name in gzip
            except UserError:
                refused += 1
    assert refused > len(content) / 2


def declare(path, *sizes):
    """Writes other sizes, packed and not, into the last entry of the zip's directory."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\1\2") + 20
    raw[at : at + 8] = struct.pack("<2I", *(max(0, min(size, 2**32 - 2)) for size in sizes))
    path.write_bytes(raw)


def npy(shape, content=b""):
    file = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": "|u1"}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def test_header_that_lies_is_refused_without_taking_memory(tmp_path):
    lies = [(10**6, 1000, 1000), (10**12, 1, 1), (10**30, 1, 1), (10**6, 30, 30), (-1, 3, 3)]
    with little_memory():
        for number, shape in enumerate(lies):
            path = tmp_path / f"{number}.npz"
            arrays = small()
            del arrays["x_train"]
            write_npz(path, arrays)
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("x_train.npy", npy(shape, bytes(108)))
            refusal(path)
            declare(path, 2**20, len(npy(shape)) + math.prod(shape))
            refusal(path)
        for number, shape in enumerate([(2**32 - 1,) * 3, (10**6, 1000, 1000), (10**6, 30, 30)]):
            for opener, end in [(open, ""), (gzip.open, ".gz")]:
                folder = write_idx(tmp_path / f"{number}{end}", small(), opener, end)
                with opener(folder / (data.IDX["x_train"] + end), "wb") as file:
                    file.write(struct.pack(">4I", 0x803, *shape) + bytes(108))
                why = "is not of the 900,000,000 bytes" if shape[1] == 30 else "x_train has shape"
                assert why in refusal(folder)


def test_bombs_are_refused_without_being_unpacked(tmp_path):
    zeros = bytes(20_000_000)
    folder = write_idx(tmp_path / "idx", small())
    (folder / data.IDX["y_test"]).unlink()
    with gzip.open(folder / (data.IDX["y_test"] + ".gz"), "wb") as file:
        file.write(struct.pack(">2I", 0x801, 5) + zeros)
    long_header = b"\x93NUMPY\2\0" + struct.pack("<I", len(zeros)) + zeros
    others = {k: npy(a.shape, a.tobytes()) for k, a in small().items()}
    for name, content in (("a", npy((5,), zeros)), ("b", long_header)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for key, raw in (others | {"y_test": content}).items():
                archive.writestr(f"{key}.npy", raw)
    with little_memory():
        assert "is not of the 5 bytes" in refusal(folder)
        assert "is not of that size" in refusal(tmp_path / "a.npz")
        assert "is not in version 1.0" in refusal(tmp_path / "b.npz")


# --------------------------------------------------------------------------- splitting, scaling


def dataset(n):
    """Image i < 256 has the value i in every pixel, and the label i % 10."""
    x = np.arange(n, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    y = (np.arange(n) % 10).astype(np.uint8)
    return data.Dataset(x, y, x[:5], y[:5])


def test_split_is_drawn_by_the_generator_alone():
    first, again, other = (
        data.split(dataset(100), 50, np.random.default_rng(s)) for s in (3, 3, 4)
    )
    assert all((a == b).all() for a, b in zip(first, again))
    assert (first[2] != other[2]).any() and sorted(first[2][:, 0, 0]) != list(range(10))
    images = np.concatenate([first[0], first[2]])[:, 0, 0]
    assert (np.concatenate([first[1], first[3]]) == images % 10).all()


SPLITS = [(100, limit, limit, max(1, min(16, limit // 5))) for limit in (1, 4, 5, 10, 50, 84)]
SPLITS += [(n, 0, n - n // 6, n // 6) for n in (12, 100, 250)]  # a sixth
SPLITS += [(2, 0, 1, 1), (40_000, 0, 35_000, 5000)]


@pytest.mark.parametrize("n, limit, kept, held_out", SPLITS)
def test_a_limit_keeps_so_many_images_and_what_is_held_out_depends(n, limit, kept, held_out):
    numbered = data.Dataset(np.arange(n), np.arange(n), None, None)
    x, y, x_val, y_val = data.split(numbered, limit, np.random.default_rng(0))
    assert len(x) == len(y) == kept and len(x_val) == len(y_val) == held_out
    assert not set(x) & set(x_val)


def test_statistics_are_those_of_the_pixels_and_take_little_memory():
    x = np.random.default_rng(1).integers(0, 200, (60000, 28, 28), dtype=np.uint8)
    with little_memory(40e6):
        data.statistics(x)
    mean, std = data.statistics(x[:5000, :4, :4])
    x = x[:5000, :4, :4] / 255
    assert abs(mean - x.mean()) < 1e-14 and abs(std - x.std()) < 1e-14
    assert type(mean) is float and type(std) is float
    with pytest.raises(UserError, match="all pixels are equal"):
        data.statistics(np.full((3, 2, 2), 9, np.uint8))
