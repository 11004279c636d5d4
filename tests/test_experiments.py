"""Every experiment runs in its quick form, and its figure is drawn from the committed results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = ROOT / "runs" / "quick"
NAMES = (
    "ablation", "canvas", "comparison", "depth", "length", "propagation", "recall", "relatives",
)  # fmt: skip


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def quick(results, *command):
    """Runs the quick form; finished jobs are not repeated, so the old `results` go first."""
    for old in QUICK.glob(f"{results}*"):
        old.unlink()
    done = run(*command, "--quick")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_form_runs_and_draws(name):
    quick(name, f"experiments/{name}.py")
    for suffix in (".csv", ".png"):
        assert (QUICK / (name + suffix)).stat().st_size > 200


def test_the_long_form_of_length_trains_at_every_length():
    quick("length_long", "experiments/length.py", "--long")
    rows = (QUICK / "length_long.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 5


def test_the_long_form_of_depth_tunes_each_arm_and_trains():
    quick("depth_all", "experiments/depth.py", "--long")
    for name in ("depth_all_tuning.csv", "depth_all.csv"):
        assert len((QUICK / name).read_text(encoding="utf-8").splitlines()) > 2


def test_the_comparison_trains_on_the_images_of_another_folder():
    """The bundled ones stand in for Fashion-MNIST's."""
    code = "import comparison; comparison.FASHION = 'data/mnist.npz'; comparison.main()"
    quick("fashion", "-c", f"import sys; sys.path.insert(0, 'experiments'); {code}", "--fashion")
    rows = (QUICK / "fashion.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 2 and all(",data/mnist.npz," in row for row in rows[1:])


@pytest.mark.parametrize("name", [*NAMES, "mnist", "fashion"])
def test_the_figure_is_drawn_from_committed_results(name, tmp_path):
    """In a copy, so that the committed figure stays as it is."""
    folder = tmp_path / "experiments"
    (folder / "results").mkdir(parents=True)
    for file in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments/results").glob("*.*")]:
        if file.suffix != ".png":
            (folder / file.relative_to(ROOT / "experiments")).write_bytes(file.read_bytes())
    script, *options = ("comparison", "--fashion") if name == "fashion" else (name,)
    done = run(str(folder / f"{script}.py"), *options, "--draw")
    assert done.returncode == 0, done.stderr
    assert (folder / "results" / f"{name}.png").stat().st_size > 10_000
    pages = [(ROOT / p).read_text(encoding="utf-8") for p in ("relatives/README.md", "RESULTS.md")]
    for row in done.stdout.splitlines():  # "relatives" prints its table; accuracy begins at cell 6
        arm, *cells = row.strip("| ").split(" | ")
        assert row in pages[0] and f"| {arm} | {' | '.join(cells[5:])} |" in pages[1]
