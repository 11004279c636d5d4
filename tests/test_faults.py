"""What ends a run before its time: kills, signals, full disks, a second run, a clock set back."""

import os
import subprocess
import sys
import time

import checkpoint
import kill_training
import numpy as np
import pytest
from test_train import ROOT, cli, json_of, refuse, rows_of, start, succeed, weights

import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no POSIX signals")
SMALL = """--preset tiny --width 16 --patch 7 --batch-size 50 --limit-data 150 --epochs 3 --warmup 2
--log-every 1 --threads 1 --device cpu""".split()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_run_killed_again_and_again_ends_with_the_same_weights(name):
    seen = kill_training.torment(4, epochs=4, signal_name=name)
    assert seen["kills"] == 4 and seen["in a save"] > 0


def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    succeed(*SMALL, "--max-steps", 2, "--out", folder)
    before = (folder / "checkpoint.npz").read_bytes()
    size = len(before) // 2
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *SMALL, "--resume", str(folder)], text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "checkpoint.npz could not be written: File too large" in done.stderr
    assert (folder / "checkpoint.npz").read_bytes() == before
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
    assert f"{folder / 'checkpoint.npz'} could not be written: No such file or directory" in line


def test_a_half_written_checkpoint_of_a_killed_run_is_put_away(tmp_path):
    succeed(*SMALL, "--max-steps", 1, "--out", tmp_path)
    (tmp_path / "checkpoint.npz.4711.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    succeed("--resume", tmp_path, "--max-steps", 2, "--device", "cpu")
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["notes.tmp"]


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(tmp_path):
    process = start(*SMALL, "--epochs", 10_000, "--out", "run", cwd=tmp_path)
    try:
        half = tmp_path / "run" / "checkpoint.npz.1.tmp"
        half.write_bytes(b"of the first run")
        if not (tmp_path / "run" / "checkpoint.npz").exists():
            for line in process.stdout:
                if line.startswith("step 4/"):  # the first epoch is saved
                    break
        resumed = refuse("--resume", tmp_path / "run", "--device", "cpu")
        begun = refuse(*SMALL, "--out", tmp_path / "run")
    finally:
        process.kill()
        process.communicate()
    assert "is in use by another run" in resumed and "holds a run already" in begun
    assert half.read_bytes() == b"of the first run"


def test_a_clock_that_is_set_back_is_harmless(tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    monkeypatch.chdir(tmp_path)
    succeed(*SMALL, "--max-steps", 3)
    folder = tmp_path / "runs" / "tiny-20260101-000000"
    seconds = [float(row["seconds"]) for row in rows_of(folder)]
    assert seconds == sorted(seconds) and json_of(folder / "summary.json")["seconds"] >= 0
    before = weights(folder)
    assert "holds a run already" in refuse(*SMALL, "--max-steps", 1)  # the same name again
    assert weights(folder) == before
    succeed("--resume", folder, "--max-steps", 4, "--device", "cpu")
    assert np.all(np.diff([float(row["seconds"]) for row in rows_of(folder)]) >= 0)


def test_nothing_is_half_written_when_an_export_fails(tmp_path):
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"earlier")
    result = cli(*SMALL, "--max-steps", 1, "--out", tmp_path / "run", "--export", target / "x")
    assert result.code == 2 and target.read_bytes() == b"earlier"
    assert train.FILES[0] not in os.listdir(tmp_path)
