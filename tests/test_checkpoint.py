"""Checkpoints and exports: exact, whole or absent, and refused when they are not what they say."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from training import checkpoint
from training.options import UserError

ROOT = Path(checkpoint.__file__).parent.parent

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
    "layers.0.W_QK": np.eye(2, dtype=np.float32),
}
META = {"step": 3, "seed": 0, "rate": 0.1, "name": "η", "none": None, "state": [{"a": 2**90}]}


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for name, a in wanted.items():
        assert got[name].dtype == a.dtype and got[name].shape == a.shape, name
        assert got[name].tobytes() == a.tobytes(), name
        assert got[name].flags.writeable, name


def refusal(path):
    """The message with which `path` is refused: one line that names it."""
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "expected a checkpoint" in text
    return text


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint, alone in its folder."""
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, {"W": np.arange(6, dtype=np.float32), "t": np.array(3)}, {"step": 1})
    return path


# ---------------------------------------------------------------------------------- round trip


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    checkpoint.save(tmp_path / "c", ARRAYS, META)
    arrays, meta = checkpoint.load(tmp_path / "c")
    assert_same(arrays, ARRAYS)
    assert meta == META and os.listdir(tmp_path) == ["c"]
    checkpoint.save(tmp_path / "d", ARRAYS, META)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


def read_safetensors(content):
    """(arrays, metadata) by the specification of the format, every rule asserted."""
    length = int.from_bytes(content[:8], "little")
    header, body, end = json.loads(content[8 : 8 + length]), content[8 + length :], 0
    metadata, arrays = header.pop("__metadata__"), {}
    dtypes = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "BOOL": "?"}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        assert start == end  # no holes
        arrays[name] = np.frombuffer(body[start:stop], dtypes[entry["dtype"]])
        arrays[name], end = arrays[name].reshape(entry["shape"]).copy(), stop
    assert end == len(body)
    return arrays, metadata


def test_a_checkpoint_and_an_export_follow_the_format(tmp_path):
    path, about = tmp_path / "m.safetensors", {"format": "np", "name": "η"}
    checkpoint.export(path, ARRAYS, about)
    arrays, metadata = read_safetensors(path.read_bytes())
    assert_same(arrays, ARRAYS)
    assert metadata == about and os.listdir(tmp_path) == ["m.safetensors"]
    checkpoint.save(path, ARRAYS, META)
    arrays, metadata = read_safetensors(path.read_bytes())
    assert_same(arrays, ARRAYS)
    assert json.loads(metadata["crc32, meta"].partition(" ")[2]) == META
    assert_same(safetensors.numpy.load_file(path), ARRAYS)


# ------------------------------------------------------------------------------ failed writing


@pytest.fixture(params=["save", "export"])
def write(request):
    return getattr(checkpoint, request.param)


@pytest.fixture
def precious(saved):
    """A checkpoint that must be there afterwards as it was, and alone."""
    before = saved.read_bytes()
    yield saved
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_earlier_file_survives_a_full_disk(precious, monkeypatch, write, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(UserError) as caught:
        write(precious, {"W": np.ones(4)}, {})
    assert str(caught.value) == f"{precious} could not be written: No space left on device"


PROGRAM = """
import resource, sys, numpy as np
from training import checkpoint
from training.options import UserError
arrays, size = {"a": np.ones(2), "b": np.ones(10**6, np.float32)}, int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    getattr(checkpoint, sys.argv[2])(sys.argv[1], arrays, {})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [0, 100, 70_000, 3_000_000])
def test_earlier_file_survives_a_write_that_stops_part_way(precious, write, size):
    pytest.importorskip("resource")
    command = [sys.executable, "-W", "error", "-c", PROGRAM, precious, write.__name__, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (f"{precious} could not be written: File too large\n", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_earlier_file_survives_an_interruption(precious, monkeypatch, error, write):
    class Torn(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise error

    monkeypatch.setattr(checkpoint, "open", Torn, raising=False)
    with pytest.raises(error):
        write(precious, {"W": np.ones(4)}, {})


def test_places_where_nothing_can_be_written_are_named(saved, write):
    (saved.parent / "folder").mkdir()
    places = {
        saved / "c": "Not a directory",  # a file in place of the folder
        saved.parent / "none" / "c": "No such file or directory",
        saved.parent / "folder": "Is a directory",
        saved.parent / ("n" * 300): "File name too long",
    }
    for path, why in places.items():
        with pytest.raises(UserError) as caught:
            write(path, {"W": np.ones(4)}, {})
        assert str(caught.value) == f"{path} could not be written: {why}"
    assert sorted(os.listdir(saved.parent)) == [saved.name, "folder"]
    assert os.listdir(saved.parent / "folder") == []


# -------------------------------------------------------------------------------- refused files


def test_paths_that_are_no_checkpoint_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none")
    refusal(tmp_path)
    for content in (b"", b"text", bytes(1000), b"PK\5\6" + bytes(17), b"\2" + bytes(7) + b"{}"):
        (tmp_path / "c").write_bytes(content)
        refusal(tmp_path / "c")


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
        except UserError as error:
            assert "\n" not in str(error) and str(saved) in str(error)
            refused += 1
        else:
            assert_same(arrays, wanted[0])
            assert meta == wanted[1]
    assert refused > len(content) / 2  # the rest is JSON that says the same


def put(path, header, body=bytes(16)):
    """A safetensors file of this header and these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def entry(dtype="F64", shape=(2,), start=0, end=16, **metadata):
    about = {"__metadata__": {"crc32, meta": metadata["meta"]}} if metadata else {}
    return about | {"W": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


def summed(record):
    """A header with the right checksum of this record."""
    return entry(meta=f"{checkpoint.checksum({'W': np.zeros(2)}, record)} {record}")


WRONG = {
    "another's": (entry(), "not written by this program"),
    "no sum": (entry(meta="{}"), "not written by this program"),
    "a wrong sum": (entry(meta="1 {}"), "altered"),
    "no string": (entry(meta=3), "damaged"),
    "unknown dtype": (entry("C9"), "damaged"),
    "NumPy's not": (entry("F8_E4M3", [16]), "damaged"),
    "a hole": (entry(start=8, end=24), "damaged"),
    "beyond the end": (entry(shape=[3], end=24), "damaged"),
    "a rest": (entry(shape=[1], end=8), "damaged"),
    "another size": (entry(shape=[3]), "damaged"),
    "no JSON": (b"{1}", "damaged"),
    "no UTF-8": (b'{"\xff": 1}', "damaged"),
    "too deep": (b"[" * 10**6, "damaged"),
    "half a record": (summed("[1"), "JSONDecodeError"),
    "a deep record": (summed("[" * 10**6), "RecursionError"),
}


@pytest.mark.parametrize("header, message", WRONG.values(), ids=WRONG)
def test_safetensors_files_that_are_no_checkpoint_are_refused(tmp_path, header, message):
    put(tmp_path / "c", header)
    assert message in refusal(tmp_path / "c")
    put(tmp_path / "c", summed('{"step": 1}'))  # with the right sum it is read
    assert checkpoint.load(tmp_path / "c")[1] == {"step": 1}


PEAK = """
import resource, sys
from training import checkpoint
from training.options import UserError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

checkpoint.load(sys.argv[1])
before = peak()
for path in sys.argv[2:]:
    try:
        checkpoint.load(path)
    except UserError:
        continue
    raise AssertionError(f"{path} was read")
assert peak() - before < 2**12, peak() - before  # kilobytes
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is counted in other units")
def test_a_file_that_declares_more_than_it_holds_is_refused_without_taking_memory(saved):
    sizes = 10**9, 10**12, 10**30, 2**63 - 1, 2**64 - 1
    headers = [entry("U8", shape, end=size) for size in sizes for shape in ([size], [size, 1])]
    headers += [entry("F64", [0, 10**30], end=0), entry("F64", [2**62]), entry("F64", [-1, -2])]
    paths = [saved.with_name(str(i)) for i in range(len(headers) + 3)]
    for path, header in zip(paths, headers):
        put(path, header)
    for path, length in zip(paths[-3:], (10**8, 10**12, 2**64 - 1)):  # of the header
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
    command = [sys.executable, "-W", "error", "-c", PEAK, *map(str, [saved, *paths])]
    subprocess.run(command, cwd=ROOT, check=True)
