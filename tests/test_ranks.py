"""training/ranks.py: several ranks train like one, and end together, whatever happens to one.

Those that start mpiexec are skipped where mpi4py or mpiexec is missing: requirements-mpi.txt.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import autograd as ag
import train
from training import checkpoint, folder, ranks
from training.options import UserError

ROOT = Path(train.__file__).parent
MPIEXEC = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")
mpi = pytest.mark.skipif(
    not (MPIEXEC and importlib.util.find_spec("mpi4py")), reason="mpi4py or mpiexec is missing"
)
SMALL = """--preset tiny --width 16 --patch 7 --batch-size 50 --limit-data 150 --epochs 3 --warmup 2
--log-every 1 --device cpu""".split()
LONG = [*SMALL, "--epochs", "100000", "--threads", "1"]


def started(ranks, *program, **kw):
    command = [MPIEXEC, "-n", str(ranks), sys.executable, *map(str, program)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **kw
    )


def mpiexec(ranks, *program):
    """(exit status, standard output, standard error) of a program run by so many ranks."""
    process = started(ranks, *program)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def saved(folder):
    """The arrays of a run's checkpoint, as bytes, and its step."""
    arrays, meta = checkpoint.load(folder / "checkpoint.safetensors")
    return {k: a.tobytes() for k, a in arrays.items()}, meta["progress"]["step"]


# ---------------------------------------------------------------------------- the same training

FLOAT64 = """
import sys, numpy as np, train
from training.ranks import Ranks

def wide(*arguments, build=train.build):
    model = build(*arguments)
    for p in model.parameters.values():
        p.data = p.data.astype(np.float64)
    return model

train.build, ranks = wide, Ranks()
config, args, _ = train.parse(train.Config, train.PRESETS, sys.argv[2:])
run = train.Run(config, train.data.load(), threads=args.threads, ranks=ranks)
results = {f"step {i}": run.step(i) for i in range(6)}
results |= {k: p.data for k, p in run.parameters.items()}
np.savez(f"{sys.argv[1]}/{ranks.size}-{ranks.rank}", **results)
"""


@mpi
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_several_ranks_with_unequal_slices_make_the_steps_of_one(optimizer, tmp_path):
    arguments = [tmp_path, *SMALL, "--threads", 3, "--optimizer", optimizer]
    runs = {}
    for size in (1, 2, 4):  # slices of 12 and 13, and threads with 3 to 17 images
        code, _, err = mpiexec(size, "-c", FLOAT64, *arguments)
        assert (code, err) == (0, "")
        runs[size] = [dict(np.load(tmp_path / f"{size}-{rank}.npz")) for rank in range(size)]
    for size in (2, 4):
        for ours in runs[size]:
            for name, wanted in runs[1][0].items():
                assert ours[name].dtype == np.float64
                assert ours[name].tobytes() == runs[size][0][name].tobytes()  # no rank drifts
                # Sums of 50 terms in another order, 4 eps; Muon's quintic multiplies a small
                # singular value by 3.4 five times, AdamW divides by a root of small squares, and
                # each of six steps carries on what the last one rounded: 4 eps · 3.4⁵ · 6 = 3e-12.
                assert abs(ours[name] - wanted).max() < 3e-12 * max(1, abs(wanted).max()), name


@mpi
def test_two_ranks_equal_two_threads_to_the_bit_and_rank_0_alone_writes(tmp_path):
    common = [ROOT / "train.py", *SMALL]
    code, out, err = mpiexec(2, *common, "--threads", 1, "--out", tmp_path / "ranks")
    assert (code, err) == (0, "")
    assert "1 threads in each of 2 ranks" in out and out.count("test accuracy") == 1
    steps = [line.partition("/")[0] for line in out.splitlines() if line.startswith("step ")]
    assert steps == [f"step {i}" for i in range(1, 10)]
    code, _, _ = mpiexec(1, *common, "--threads", 2, "--out", tmp_path / "threads")
    assert code == 0 and saved(tmp_path / "ranks") == saved(tmp_path / "threads")
    assert sorted(os.listdir(tmp_path / "ranks")) == sorted(folder.FILES)


@mpi
def test_a_run_of_several_ranks_resumes_to_the_bit(tmp_path):
    common = [ROOT / "train.py", *SMALL, "--threads", 1]
    for out, steps in (("whole", [7]), ("parts", [4, 7])):
        for i, last in enumerate(steps):
            where = "--resume" if i else "--out"
            code, _, err = mpiexec(2, *common, "--max-steps", last, where, tmp_path / out)
            assert (code, err) == (0, "")
    assert saved(tmp_path / "whole") == saved(tmp_path / "parts")


class Doubling:
    """As if a second rank had the same gradients."""

    def Allreduce(self, mine, total):
        assert type(mine) is type(total) is np.ndarray and mine.ndim == 1
        total[...] = 2 * mine


def test_gradients_of_every_device_are_summed_through_the_host(xp, rng):
    both = ranks.Ranks()
    both.comm, both.size, both.takes_gpu_arrays = Doubling(), 2, False
    mine, right = rng.standard_normal(17), xp.asarray(np.array(7))
    g = xp.asarray(mine.copy())
    gradients = both.summed(lambda x, y: (xp.asarray(np.array(0.25)), right), g, batch_size=8)
    loss, right = gradients(None, np.zeros(3))  # 3 of 8 images
    assert (float(loss), float(right)) == (2 * 3 / 8 * 0.25, 14)
    assert (ag.to_cpu(g) == 2 * (3 / 8 * mine)).all()


# -------------------------------------------------------------------------------- without MPI


def test_mpi_is_imported_only_when_mpiexec_started_the_program():
    program = "import sys, train; train.Ranks(); assert 'mpi4py' not in sys.modules"
    environ = {k: v for k, v in os.environ.items() if k not in ranks.STARTED}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, check=True)


def test_mpiexec_without_mpi4py_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="requirements-mpi.txt"):
        train.main(["--preset", "tiny"])


def test_each_rank_of_a_machine_takes_its_own_card(monkeypatch):
    used = []
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 4)
    device = types.SimpleNamespace(use=lambda: None)
    cuda = types.SimpleNamespace(runtime=runtime, Device=lambda i: used.append(i) or device)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    this = ranks.Ranks()
    options = train.parse(train.Config, train.PRESETS, ["--device", "cuda"])
    for this.neighbour in (0, 3, 5):
        with pytest.raises(UserError, match="no GPU can be used"):  # there is but a part of CuPy
            train.work(this, *options)
    assert used == [0, 3, 1]


# ------------------------------------------------------------------------------ ending together


@mpi
def test_what_all_ranks_refuse_ends_the_job_with_its_message(tmp_path):
    for words, arguments in {
        "--lr: nan is not from 0": ["--lr", "nan"],
        "3 ranks need as many images in a batch": ["--batch-size", 2, "--out", tmp_path / "a"],
        "--graph": ["--graph", "--out", tmp_path / "a"],
    }.items():
        code, _, err = mpiexec(3, ROOT / "train.py", *SMALL, *arguments)
        assert code != 0 and words in err and "Traceback" not in err
        assert not (tmp_path / "a").exists()


FAILING = """
import sys, train

step = train.Run.step
def failing(run, t):
    if t == 4 and run.ranks.rank == 1:
        raise {error}("the memory of rank 1 is broken")
    return step(run, t)
train.Run.step = failing
sys.exit(train.main(sys.argv[1:]))
"""


@mpi
@pytest.mark.parametrize("error", ["MemoryError", "KeyboardInterrupt"])
def test_an_error_in_one_rank_ends_the_job_with_its_message(error, tmp_path):
    program = FAILING.format(error=error)
    code, _, err = mpiexec(2, "-c", program, *LONG, "--out", tmp_path / "run")
    assert code != 0 and f"{error}: the memory of rank 1 is broken" in err
    assert saved(tmp_path / "run")[1] == 3


ANNOUNCED = """
import os, sys, train

os.write(1, f"rank {os.environ['PMI_RANK']} {os.getpid()}\\n".encode())
sys.exit(train.main(sys.argv[1:]))
"""


def after_five_steps(number, rank, folder):
    """(exit status, output) of two ranks, one of which gets a signal after five steps."""
    process, pids = started(2, "-c", ANNOUNCED, *LONG, "--out", folder), {}
    for line in process.stdout:
        words = line.split()
        if words[:1] == ["rank"]:
            pids[int(words[1])] = int(words[2])
        if line.startswith("step 5/"):
            os.kill(pids[rank], number)
            break
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


@mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_leaves_a_checkpoint(rank, tmp_path):
    code, out = after_five_steps(signal.SIGKILL, rank, tmp_path / "run")
    assert code != 0 and "Killed" in out
    resume = ["--resume", tmp_path / "run", "--max-steps", saved(tmp_path / "run")[1] + 2]
    assert mpiexec(2, ROOT / "train.py", *LONG, *resume)[::2] == (0, "")


@mpi
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    code, out = after_five_steps(signal.SIGTERM, 1, tmp_path / "run")
    assert code == 143 and f"SIGTERM: stopped after step {saved(tmp_path / 'run')[1]}" in out
