"""checkpoint.py: files are exact, whole or absent, and refused when they are not what they say."""

import errno
import io
import json
import os
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import checkpoint
import numpy as np
import pytest
from checkpoint import CheckpointError

ROOT = Path(checkpoint.__file__).parent

ARRAYS = {
    "float32": np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32),
    "float64": np.array([np.pi, -0.0, np.inf, np.nan, 5e-324]),
    "float16": np.array([1.5, -2], np.float16),
    "int64": np.array([[-(2**63), 2**63 - 1]]),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "0-d": np.array(0.1),
    "0-d int": np.array(7),
    "empty": np.zeros((0, 4), np.float32),
    "column-major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(20.0).reshape(4, 5)[::2, ::-1],
    "big-endian": np.arange(3, dtype=">f8"),
    "blocks.0.W_Q": np.eye(2, dtype=np.float32),
    "file": np.arange(2),  # a name that np.savez cannot keep
}
META = {"step": 3, "seed": 0, "rate": 0.1, "name": "η", "none": None, "state": [{"a": 2**90}]}


def assert_same(got, wanted):
    assert list(got) == list(wanted)
    for name, a in wanted.items():
        assert got[name].dtype == a.dtype and got[name].shape == a.shape, name
        assert got[name].tobytes() == a.tobytes(), name
        assert got[name].flags.writeable, name


def refusal(path):
    """The message with which `path` is refused: one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "expected an .npz checkpoint" in text
    return text


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint, alone in its folder."""
    path = tmp_path / "checkpoint.npz"
    checkpoint.save(path, {"W": np.arange(6, dtype=np.float32), "t": np.array(3)}, {"step": 1})
    return path


# ---------------------------------------------------------------------------------- round trip


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "checkpoint.npz"
    checkpoint.save(path, ARRAYS, META)
    arrays, meta = checkpoint.load(path)
    assert_same(arrays, ARRAYS)
    assert meta == META
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_a_checkpoint_of_no_arrays_is_allowed(tmp_path):
    checkpoint.save(tmp_path / "c.npz", {}, {})
    assert checkpoint.load(tmp_path / "c.npz") == ({}, {})


def test_numpy_alone_reads_a_checkpoint(saved):
    with np.load(saved, allow_pickle=False) as file:
        assert file["W"].tolist() == [0, 1, 2, 3, 4, 5]
        assert json.loads(bytes(file["__meta__"])) == {"step": 1}


def test_the_same_state_makes_the_same_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        checkpoint.save(tmp_path / name, ARRAYS, META)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_name_without_a_folder_is_saved_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("c", {"a": np.ones(2)}, {})
    assert os.listdir() == ["c"] and checkpoint.load("c")[0]["a"].tolist() == [1, 1]


# ------------------------------------------------------------------------------ failed writing


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS = {
    "save": lambda path, arrays: checkpoint.save(path, arrays, {"step": 2}),
    "export": lambda path, arrays: checkpoint.export_safetensors(path, arrays, {}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_earlier_file_survives_a_full_disk(saved, monkeypatch, write, failing):
    before = saved.read_bytes()
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(CheckpointError) as caught:
        write(saved, {"W": np.ones(4)})
    assert str(caught.value) == f"{saved} could not be written: No space left on device"
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("size", [0, 100, 70_000, 3_000_000])
@pytest.mark.parametrize("write", WRITERS)
def test_earlier_file_survives_a_write_that_stops_part_way(saved, write, size):
    pytest.importorskip("resource")
    before = saved.read_bytes()
    program = f"""
import resource, sys, numpy as np, checkpoint
arrays = {{"a": np.ones(2), "b": np.ones(10**6, np.float32)}}
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
try:
    if {write!r} == "save":
        checkpoint.save(sys.argv[1], arrays, {{}})
    else:
        checkpoint.export_safetensors(sys.argv[1], arrays, {{}})
except checkpoint.CheckpointError as error:
    print(error)
"""
    command = [sys.executable, "-W", "error", "-c", program, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{saved} could not be written: File too large\n" and not done.stderr
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_earlier_file_survives_an_interruption(saved, monkeypatch, error):
    def stop(*_, **__):
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr(np.lib.format, "write_array", stop)
    with pytest.raises(error):
        checkpoint.save(saved, {"W": np.ones(4)}, {})
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_places_where_nothing_can_be_written_are_named(saved, write):
    (saved.parent / "folder").mkdir()
    places = {
        saved / "c.npz": "Not a directory",  # a file in place of the folder
        saved.parent / "none" / "c.npz": "No such file or directory",
        saved.parent / "folder": "not a regular file",
        saved.parent / ("n" * 300): "File name too long",
    }
    for path, why in places.items():
        with pytest.raises(CheckpointError) as caught:
            write(path, {"W": np.ones(4)})
        assert str(caught.value) == f"{path} could not be written: {why}"
    assert sorted(os.listdir(saved.parent)) == [saved.name, "folder"]
    assert os.listdir(saved.parent / "folder") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission_is_named(saved):
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            checkpoint.save(saved, {"W": np.ones(4)}, {})
        assert checkpoint.load(saved)[1] == {"step": 1}
    finally:
        saved.parent.chmod(0o700)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_cannot_be_kept_is_refused_before_writing(saved, write):
    before = saved.read_bytes()
    for bad in ([1.0], 1.0, np.array([None]), np.array(["a"]), np.ones(2, complex)):
        with pytest.raises(TypeError, match="W is not a NumPy array of"):
            write(saved, {"W": bad})
    with pytest.raises(ValueError, match="cannot be named ''"):
        write(saved, {"": np.ones(2)})
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_reserved_names_and_foreign_metadata_are_refused(saved):
    with pytest.raises(ValueError, match="cannot be named '__meta__'"):
        checkpoint.save(saved, {"__meta__": np.ones(2)}, {})
    with pytest.raises(ValueError, match="cannot be named '__metadata__'"):
        checkpoint.export_safetensors(saved, {"__metadata__": np.ones(2)}, {})
    with pytest.raises(TypeError, match="strings"):
        checkpoint.export_safetensors(saved, {"W": np.ones(2)}, {"step": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(saved, {"W": np.ones(2)}, {"seed": np.int64(1)})
    assert checkpoint.load(saved)[1] == {"step": 1}


# -------------------------------------------------------------------------------- refused files


def test_paths_that_are_no_checkpoint_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.npz")
    assert "Is a directory" in refusal(tmp_path)
    for content in (b"", b"text", bytes(1000), b"PK\5\6" + bytes(17)):
        (tmp_path / "c.npz").write_bytes(content)
        assert "damaged or truncated (BadZipFile" in refusal(tmp_path / "c.npz")


def test_a_checkpoint_cut_anywhere_is_refused(saved):
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        refusal(saved)


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_changed_byte_is_refused_or_changes_nothing(saved, mask):
    wanted, content = checkpoint.load(saved), bytearray(saved.read_bytes())
    refused = 0
    for i in range(len(content)):
        content[i] ^= mask
        saved.write_bytes(content)
        content[i] ^= mask
        try:
            arrays, meta = checkpoint.load(saved)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(saved) in str(error)
            refused += 1
        else:
            assert_same(arrays, wanted[0])
            assert meta == wanted[1]
    assert refused > len(content) / 2  # the rest are dates, permissions and the like


def write_members(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def record(text):
    return npy(np.frombuffer(text, np.uint8))


WRONG = {
    "no record": ({"a.npy": npy(np.ones(2))}, "holds no __meta__"),
    "not an array": ({"a.txt": b"hello"}, "'a.txt' is not an array"),
    "pickled": ({"a.npy": npy(np.array([{}], object))}, "a has dtype object"),
    "strings": ({"a.npy": npy(np.array("a"))}, "a has dtype <U1"),
    "complex": ({"a.npy": npy(np.ones(2, complex))}, "a has dtype complex128"),
    "no magic": ({"a.npy": b"hello" * 40}, "the magic string is not correct"),
    "version 2": ({"a.npy": b"\x93NUMPY\2\0" + bytes(100)}, "not in version 1.0"),
    "too short": ({"a.npy": npy(np.ones(2))[:-1]}, "is not of that size"),
    "too long": ({"a.npy": npy(np.ones(2)) + b"\0"}, "is not of that size"),
    "header cut": ({"a.npy": npy(np.ones(2))[:20]}, "EOF: reading array header"),
    "record is a list": ({"__meta__.npy": record(b"[1]")}, "__meta__ is not a JSON object"),
    "record is not JSON": ({"__meta__.npy": record(b"{1}")}, "JSONDecodeError"),
    "record is not UTF-8": ({"__meta__.npy": record(b'{"\xff": 1}')}, "UnicodeDecodeError"),
    "record is too deep": ({"__meta__.npy": record(b"[" * 10**6)}, "RecursionError"),
}


@pytest.mark.parametrize("members, message", WRONG.values(), ids=WRONG)
def test_zip_files_that_are_no_checkpoint_are_refused(tmp_path, members, message):
    write_members(tmp_path / "c.npz", members)
    assert message in refusal(tmp_path / "c.npz")


def test_an_array_that_is_there_twice_is_refused(saved):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("W.npy", npy(np.ones(6, np.float32)))
    assert "is there twice" in refusal(saved)


def test_an_array_of_python_2_is_read_without_a_warning(saved):
    """Its header says 6L for 6, at which NumPy warns."""
    raw = npy(np.arange(6.0))
    assert raw.count(b"(6,), } ") == 1
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("old.npy", raw.replace(b"(6,), } ", b"(6L,), }"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load(saved)[0]["old"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_that_declares_more_than_it_holds_is_refused_without_taking_memory(tmp_path):
    path = tmp_path / "c.npz"
    shapes = [(10**12,), (10**6, 10**6), (0, 10**30), (10**30,), (-8,), (-1, -7), (-1, 0), (8,)]
    tracemalloc.start()
    try:
        for shape in shapes:
            file = io.BytesIO()
            header = {"shape": shape, "fortran_order": False, "descr": "<f8"}
            np.lib.format.write_array_header_1_0(file, header)
            write_members(path, {"a.npy": file.getvalue() + bytes(56)})
            refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        write_members(path, {"a.npy": npy(np.zeros(10**6))}, compression=zipfile.ZIP_DEFLATED)
        tracemalloc.reset_peak()
        assert "declares 8,000,128 bytes of arrays, more than" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------- require_same


def test_the_first_field_that_differs_is_named_with_both_values():
    kept = {"depth": 6, "width": 64, "rates": [1, 2], "seed": 0}
    checkpoint.require_same(kept, kept | {"seed": 9}, ["depth", "width", "rates"])
    checkpoint.require_same(kept, {"rates": (1, 2)}, ["rates"])  # a tuple is kept as a list
    wanted = {"depth": 8, "width": 32, "route": None}
    for fields, message in [
        (["depth", "width"], "depth differs: 6 in the checkpoint, 8 here"),
        (["width", "depth"], "width differs: 64 in the checkpoint, 32 here"),
        (["route"], "route differs: nothing in the checkpoint, None here"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.require_same(kept, wanted, fields)
        assert str(caught.value) == message


# ---------------------------------------------------------------------------------- safetensors

DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "BOOL": "?"}


def read_safetensors(content):
    """The format as its specification states it: (arrays, metadata), every rule asserted."""
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and content[8:9] == b"{"
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata, arrays, spans = header.pop("__metadata__"), {}, []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        assert start % dtype.itemsize == 0
        arrays[name] = np.frombuffer(body[start:end], dtype).reshape(entry["shape"])
        spans.append((start, end))
    spans.sort()
    assert [start for start, _ in spans] == [0] + [end for _, end in spans[:-1]]  # no holes
    assert spans[-1][1] == len(body)
    return arrays, metadata


def assert_equal(got, wanted):
    assert set(got) == set(wanted)
    for name, a in wanted.items():
        little = a.astype(a.dtype.newbyteorder("<"))
        assert got[name].dtype == little.dtype and got[name].shape == a.shape, name
        assert got[name].tobytes() == little.tobytes(), name


def test_safetensors_export_follows_the_format(tmp_path):
    metadata = {"format": "np", "name": "η"}
    checkpoint.export_safetensors(tmp_path / "m.safetensors", ARRAYS, metadata)
    arrays, kept = read_safetensors((tmp_path / "m.safetensors").read_bytes())
    assert_equal(arrays, ARRAYS)
    assert kept == metadata
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_safetensors_library_reads_the_export(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    checkpoint.export_safetensors(path, ARRAYS, {"name": "η"})
    assert_equal(library.load_file(path), ARRAYS)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"name": "η"}
