"""What ends a run before its time: kills, signals, full disks, a second run, a clock set back; and
what surrounds it: forks, quotas, other programs' variables and modules."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import types
import zipfile

import kill_training
import numpy as np
import pytest
from test_train import NAME, ROOT, json_of, prepare, refuse, rows_of, shell, start, succeed, weights

import fast
import train
from fast.threads import parallel, quota
from training import checkpoint, data, report, resume

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Python 3.12, for a fork with threads
def test_threads_hang_neither_in_a_forked_child_nor_within_each_other(monkeypatch):
    monkeypatch.setenv("OSA_THREADS", "2")
    Q, one = np.ones((64, 2, 300, 16), np.float32), prepare(SMALL)
    run = train.Run(one.config, one.dataset, threads=2)

    def work():
        parallel(lambda a: fast.osa_forward(Q, Q, Q, a), [0.1, 0.2, 0.3])
        run.step(0)

    work()
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0


def test_where_python_is_ending_the_work_is_done_without_threads():
    code = "import atexit; from fast.threads import parallel; parallel(abs, [1, 2]); "
    code += "atexit.register(lambda: print(parallel(abs, [-1, -2])))"
    command, environ = [sys.executable, "-c", code], os.environ | {"OSA_THREADS": "2"}
    assert subprocess.check_output(command, text=True, env=environ, cwd=ROOT) == "[1, 2]\n"


@pytest.mark.parametrize("groups, limits", [
    ("0::/a/b", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}),
    ("4:pids:/x\n1:cpu:/a", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}),
], ids=["version 2", "version 1"])  # fmt: skip
def test_the_quota_of_every_control_group_around_us_counts(groups, limits, tmp_path):
    files = {f"sys/fs/cgroup/{k}": text for k, text in limits.items()}
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == 3 and quota(tmp_path / "elsewhere") == np.inf


def test_the_program_is_found_whatever_python_leaves_out_of_its_path(tmp_path):
    assert shell("--help", python=["-I"], cwd=tmp_path).code == 0
    result = shell("--help", python=["-I", "-S"], cwd=tmp_path)
    assert result.code == 2 and result.err.count("\n") == 1 and "not installed: " in result.err


def test_a_broken_matplotlib_and_what_others_are_told_ends_nothing(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise AttributeError('of another NumPy')")
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "MPLBACKEND": "unknown"}
    environ |= {"TQDM_NCOLS": "wide"}
    result = shell(*SMALL, "--max-steps", 1, "--out", tmp_path / "run", env=environ)
    assert result.code == 0 and "curves.png will not be drawn: of another NumPy" in result.err
    assert json_of(tmp_path / "run" / "summary.json")["steps"] == 1


def test_a_reader_who_leaves_costs_no_step(tmp_path):
    options = ["--batch-size", 1, "--epochs", 1, "--out", "run"]  # one save, after 150 steps
    with start(*SMALL, *options, cwd=tmp_path) as process:
        process.stdout.close()
    step = checkpoint.load(tmp_path / "run" / NAME)[1]["progress"]["step"]
    assert process.returncode == 141 and step == len(rows_of(tmp_path / "run")) < 150


def test_processes_variables_and_modules_of_others_are_no_trap(tmp_path, monkeypatch):
    commit = report.machine()["commit"]
    for name, value in {"GIT_DIR": "x", "HOME": tmp_path, "USERPROFILE": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    assert report.machine()["commit"] == commit
    succeed(*SMALL, "--max-steps", 1, "--out=~/run")
    assert (tmp_path / "run" / NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "lzma", None)
        assert "mnist.npz: Compression requires the (missing) lzma" in refuse(*SMALL)
        patch.setattr(data, "load", lambda *_: bytearray(2**62))
        assert "memory" in refuse(*SMALL)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert "srun --mpi=pmi2, or mpiexec" in refuse(*SMALL)
    alone = types.SimpleNamespace(COMM_WORLD=types.SimpleNamespace(rank=0, size=1))
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=alone))
    for name, value in {"RANK": "0", "SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert "started 2 processes and mpi4py sees 1" in refuse(*SMALL)


def test_the_mean_loss_of_many_steps_has_all_its_digits(tmp_path):
    progress, n = resume.Progress(), 100_000
    with report.Log(tmp_path, prepare(SMALL), progress, n) as log:
        for _ in range(n):
            log.add(np.float32(0.1), 1)
    assert abs(progress.sums[0] / n / float(np.float32(0.1)) - 1) < n * np.finfo(float).eps


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_half_made_venv_is_removed(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("gone")
    subprocess.run(["make", "-f", ROOT / "Makefile", "help"], cwd=tmp_path, capture_output=True)
    assert not (tmp_path / ".venv").exists()
