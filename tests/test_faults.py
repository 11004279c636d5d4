"""What ends a run before its time: kills, signals, full disks, a second run, a clock set back."""

import os
import subprocess
import sys
import time

import kill_training
import numpy as np
import pytest
from test_train import NAME, ROOT, json_of, refuse, rows_of, start, succeed, weights

from training import checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no POSIX signals")
SMALL = """--preset tiny --width 16 --patch 7 --batch-size 50 --limit-data 150 --epochs 3 --warmup 2
--log-every 1 --threads 1 --device cpu""".split()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_run_killed_again_and_again_ends_with_the_same_weights(name):
    seen = kill_training.torment(4, epochs=4, signal_name=name)
    assert seen["kills"] == 4 and seen["in a save"] > 0
    assert seen["half files"] > 0 or name != "SIGKILL"


def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    succeed(*SMALL, "--max-steps", 2, "--out", folder)
    before = (folder / NAME).read_bytes()
    size = len(before) // 2
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *SMALL, "--resume", str(folder)], text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{NAME} could not be written: File too large" in done.stderr
    assert (folder / NAME).read_bytes() == before
    assert not list(folder.glob("*.tmp"))
    succeed("--resume", folder, "--device", "cpu")
    assert json_of(folder / "summary.json")["steps"] == 9


def test_a_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    folder, save = tmp_path / "run", checkpoint.save

    def lost(path, *rest):
        folder.rename(tmp_path / "elsewhere")
        save(path, *rest)

    monkeypatch.setattr(checkpoint, "save", lost)
    line = refuse(*SMALL, "--max-steps", 1, "--out", folder)
    assert f"{folder / NAME} could not be written: No such file or directory" in line


def test_half_written_files_of_a_killed_run_are_put_away(tmp_path):
    succeed(*SMALL, "--max-steps", 1, "--out", tmp_path)
    for name in (f"{NAME}.4711.tmp", "metrics.csv.4711.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    succeed("--resume", tmp_path, "--max-steps", 2, "--device", "cpu")
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["notes.tmp"]


@pytest.mark.parametrize("left", [["config.json"], ["config.json", "metrics.csv"]], ids=len)
def test_a_run_killed_before_it_saved_can_be_begun_again(left, tmp_path):
    succeed(*SMALL, "--max-steps", 1, "--out", tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in left:
            path.unlink()
    succeed(*SMALL, "--max-steps", 2, "--out", tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "2"]


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(tmp_path):
    process = start(*SMALL, "--epochs", 10_000, "--out", "run", cwd=tmp_path)
    try:
        half = tmp_path / "run" / f"{NAME}.1.tmp"
        half.write_bytes(b"of the first run")
        if not (tmp_path / "run" / NAME).exists():
            for line in process.stdout:
                if line.startswith("step 4/"):  # the first epoch is saved
                    break
        resumed = refuse("--resume", tmp_path / "run", "--max-steps", 1)
        begun = refuse(*SMALL, "--max-steps", 1, "--out", tmp_path / "run")
    finally:
        process.kill()
        process.communicate()
    assert "is in use by another run" in resumed and "is in use by another run" in begun
    assert half.read_bytes() == b"of the first run"


def test_a_clock_that_is_set_back_is_harmless(tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.chdir(tmp_path)
    succeed(*SMALL, "--max-steps", 3)
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    seconds = [float(row["seconds"]) for row in rows_of(folder)]
    assert seconds == sorted(seconds) and json_of(folder / "summary.json")["seconds"] >= 0
    before = weights(folder)
    succeed(*SMALL, "--max-steps", 2)
    assert weights(folder) == before and len(list((tmp_path / "runs").iterdir())) == 2
    succeed("--resume", folder, "--max-steps", 4, "--device", "cpu")
    assert np.all(np.diff([float(row["seconds"]) for row in rows_of(folder)]) >= 0)
