"""Mutated files for everything that reads one: `python tests/fuzz_readers.py 10000`.

Each reader gets that many damaged copies of a good file: bits turned, bytes replaced, pieces cut,
doubled, swapped or lengthened, numbers in headers replaced by extreme ones.  A reader either
returns what is well formed or raises the program's own error of one line; it executes nothing, and
takes no more memory than a few times the file.  A short form runs among the tests (test_fuzz.py).
"""

import argparse
import dataclasses
import gzip
import json
import pickle
import random
import struct
import sys
import tempfile
import tracemalloc
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_data  # noqa: E402

import train  # noqa: E402
from training import checkpoint, data, report, resume  # noqa: E402
from training.options import UserError  # noqa: E402

MEMORY = 8 * 2**20  # bytes; the files themselves are of some 10 kB
EXTREME = [0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]


class Bomb:
    """Unpickled, it would announce itself: a reader that unpickles is found out."""

    def __reduce__(self):
        return exploded, ()


def exploded():
    raise SystemExit("a reader executed code from a file")


def mutated(raw, rng):
    """A damaged copy of the bytes."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(raw)) if raw else 0
        kind = rng.randrange(8)
        if not raw or kind == 0:
            raw[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == 1:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            raw[at] = rng.choice([0, 10, 34, 57, 91, 123, 127, 128, 255])
        elif kind == 3:
            del raw[at:]
        elif kind == 4:
            del raw[at : at + rng.choice([1, 4, 64])]
        elif kind == 5:
            form = rng.choice(["<H", ">I", "<I", "<Q"])
            number = rng.choice(EXTREME) % (1 << 8 * struct.calcsize(form))
            raw[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 6:  # a number in a text, as the headers of .npy and JSON have them
            digits = [i for i, b in enumerate(raw) if 48 <= b <= 57]
            if digits:
                i = rng.choice(digits)
                raw[i : i + 1] = str(rng.choice([*EXTREME, -1])).encode()
        else:
            other = rng.randrange(len(raw))
            size = rng.choice([1, 8, 64])
            raw[at : at + size] = raw[other : other + size]
    return bytes(raw)


def rezipped(raw, rng):
    """The zip file with one member damaged and its checksum right: past zip's own defence."""
    with tempfile.TemporaryFile() as before, tempfile.TemporaryFile() as after:
        before.write(raw)
        with zipfile.ZipFile(before) as old, zipfile.ZipFile(after, "w") as new:
            unlucky = rng.choice(old.namelist())
            for name in old.namelist():
                content = old.read(name)
                if name == unlucky:
                    bomb = rng.randrange(20) == 0
                    content = npy_of_pickle() if bomb else mutated(content, rng)
                new.writestr(name, content)
        after.seek(0)
        return after.read()


def npy_of_pickle():
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickle.dumps(Bomb())


def regzipped(raw, rng):
    return gzip.compress(mutated(gzip.decompress(raw), rng), 1)


def resummed(raw, rng):
    """The checkpoint with its record damaged and the checksum right."""
    arrays = safetensors.numpy.load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    record = header["__metadata__"]["crc32, meta"].partition(" ")[2].encode()
    record = mutated(record, rng).decode("utf-8", "replace")
    about = {"crc32, meta": f"{checkpoint.checksum(arrays, record)} {record}"}
    return safetensors.numpy.save(arrays, about)


# ------------------------------------------------------------------------------------ the readers


def read_data(path):
    dataset = data.load(path)
    for a in dataset[:4]:
        assert a.dtype == np.uint8 and a.size
    assert len(dataset.x_train) == len(dataset.y_train)


def read_folder(path):
    read_data(path.parent)


def read_checkpoint(path):
    config, progress, arrays = resume.load(path, train.Config, {})
    assert isinstance(config, train.Config) and all(a.dtype.kind in "biuf" for a in arrays.values())
    assert progress.step >= 0 and [type(v) for v in progress.sums] == [float] * 3


def npz(compressed):
    return lambda folder: test_data.write_npz(folder / "a.npz", test_data.small(), compressed)


def idx(opener, end):
    def write(folder):
        folder = test_data.write_idx(folder / "idx", test_data.small(), opener, end)
        return folder / (data.IDX["x_train"] + end)

    return write


def cifar(folder):
    test_data.write_cifar(folder / "cifar")
    return folder / "cifar" / data.CIFAR[0][1]


def saved(folder):
    meta = {"config": dataclasses.asdict(train.Config())}
    meta["progress"] = dataclasses.asdict(resume.Progress())
    arrays = {"model.W": np.ones((3, 4), np.float32), "optimizer.m": np.zeros(5)}
    checkpoint.save(folder / "checkpoint", arrays, meta)
    return folder / "checkpoint"


def metrics(folder):
    rows = [report.Log.COLUMNS] + 5 * [["1.5"] * 10]
    (folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    return folder / "metrics.csv"


# What writes a good file, what reads it, ways to damage it.
READERS = {
    "npz": (npz(False), read_data, [mutated, rezipped]),
    "npz, compressed": (npz(True), read_data, [mutated, rezipped]),
    "IDX": (idx(open, ""), read_folder, [mutated]),
    "IDX, gzip": (idx(gzip.open, ".gz"), read_folder, [mutated, regzipped]),
    "CIFAR-10": (cifar, read_folder, [mutated]),
    "checkpoint": (saved, read_checkpoint, [mutated, resummed]),
    "metrics.csv": (metrics, report.read_metrics, [mutated]),
}


def fuzz(reader, count, seed=0):
    """Counter of what happened; raises AssertionError at the first bad answer."""
    write, read, ways = READERS[reader]
    rng, seen = random.Random(f"{seed} {reader}"), Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = write(Path(folder))
        good = path.read_bytes()
        read(path)
        warnings.simplefilter("error")
        tracemalloc.start()
        for i in range(count):
            damaged = rng.choice(ways)(good, rng)
            path.write_bytes(damaged)
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            try:
                read(path)
                outcome = "read"
            except UserError as error:
                outcome = "refused"
                text = str(error)
                assert "\n" not in text and len(text) < 1000, (reader, i, text[:300])
            except BaseException:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{reader.replace(', ', '-')}-{i}"
                kept.write_bytes(damaged)
                print(f"{reader}, file {i}: kept as {kept}", file=sys.stderr)
                raise
            used = tracemalloc.get_traced_memory()[1] - start
            assert used < MEMORY, (reader, i, used)
            seen[outcome] += 1
            seen["peak kB"] = max(seen["peak kB"], used // 1024)
        tracemalloc.stop()
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--reader", action="append", choices=READERS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for reader in options.reader or READERS:
        seen = fuzz(reader, options.count, options.seed)
        print(f"{reader:16}", json.dumps(seen), flush=True)
