"""Every experiment runs in its quick form, and its figure is drawn from the committed results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = (
    "ablation", "canvas", "comparison", "depth", "length", "propagation", "recall", "relatives",
)  # fmt: skip


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_form_runs_and_draws(name):
    for old in (ROOT / "runs" / "quick").glob(f"{name}*"):
        old.unlink()  # finished jobs are not repeated
    done = run(f"experiments/{name}.py", "--quick")
    assert done.returncode == 0, done.stderr
    for suffix in (".csv", ".png"):
        assert (ROOT / "runs" / "quick" / (name + suffix)).stat().st_size > 200


def test_the_long_form_of_depth_tunes_each_arm_and_trains():
    folder = ROOT / "runs" / "quick"
    for old in folder.glob("depth_all*"):
        old.unlink()
    done = run("experiments/depth.py", "--long", "--quick")
    assert done.returncode == 0, done.stderr
    for name in ("depth_all_tuning.csv", "depth_all.csv"):
        assert len((folder / name).read_text(encoding="utf-8").splitlines()) > 2


@pytest.mark.parametrize("name", [*NAMES, "mnist"])
def test_the_figure_is_drawn_from_committed_results(name, tmp_path):
    """In a copy, so that the committed figure stays as it is."""
    folder = tmp_path / "experiments"
    (folder / "results").mkdir(parents=True)
    for file in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments/results").glob("*.*")]:
        if file.suffix != ".png":
            (folder / file.relative_to(ROOT / "experiments")).write_bytes(file.read_bytes())
    done = run(str(folder / f"{name}.py"), "--draw")
    assert done.returncode == 0, done.stderr
    assert (folder / "results" / f"{name}.png").stat().st_size > 10_000
    pages = [(ROOT / p).read_text(encoding="utf-8") for p in ("relatives/README.md", "RESULTS.md")]
    for row in done.stdout.splitlines():  # "relatives" prints its table; accuracy begins at cell 6
        arm, *cells = row.strip("| ").split(" | ")
        assert row in pages[0] and f"| {arm} | {' | '.join(cells[5:])} |" in pages[1]
