"""README's numbers, commands and names are those of the repository."""

import re
from pathlib import Path

import numpy as np
import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", text)]


def test_the_worked_example_prints_the_digits_of_readme():
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(block, names)
    text = README[README.index("    S  =") : README.index("S has rank 2")]
    rows = np.array([numbers(line) for line in text.splitlines()[:4]])
    assert np.array_equal(rows[:, :4], names["S"])
    assert np.array_equal(rows[:, 4:], np.round(names["A"], 4))
    for key in ("theta", "O", "dq", "dk", "dv", "dalpha"):
        printed = re.search(rf"\b{key} = ([-\d. ]*\d)", text).group(1)
        assert numbers(printed) == np.round(np.ravel(names[key]), 4).tolist(), key
    assert names["theta"][0] == pytest.approx(5**0.5, rel=1e-14)


def test_every_test_and_function_that_readme_names_exists():
    sources = "".join(
        p.read_text(encoding="utf-8") for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    )
    table = README.partition("| equation | function | test |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| .* \| (.*) \| (.*) \|$", table, re.M)
    assert len(rows) >= 10
    for functions, tests in rows:
        for name in re.findall(r"`(\w+)`", tests):
            assert f"def {name}(" in sources, name
        for name in re.findall(r"`(\w+)`", functions):
            assert re.search(rf'(def|class) {name}\b|"{name}"', sources), name


def test_every_option_and_file_that_readme_names_exists():
    for line in re.findall(r"\.venv/bin/python train\.py(.*)", README):
        arguments = line.split("#")[0].split()
        arguments = ["x" if a.isupper() or "/" in a else a for a in arguments]
        train.parse(arguments)
    for name in re.findall(r"`([\w./-]+\.(?:py|md|npz|txt))`", README):
        assert (ROOT / name).exists() or name in ("checkpoint.npz", "INSTALL.txt"), name


def test_every_notebook_and_function_of_the_reading_order_exists():
    table = README.partition("| in the paper | notebook | code |")[2].partition("\n\n")[0]
    sources = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("*.py"))
    rows = re.findall(r"^\| .* \| (.*) \| (.*) \|$", table, re.M)
    named = [name for notebooks, _ in rows for name in re.findall(r"`(\w+)`", notebooks)]
    assert sorted(named) == sorted(p.stem for p in ROOT.glob("notebooks/*.ipynb"))
    for name in re.findall(r"`(\w+)`", "".join(functions for _, functions in rows)):
        assert re.search(rf"(def|class) {name}\b", sources), name


def test_every_make_target_that_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z][\w-]*)", README):
        assert re.search(rf"^{target}\s*:", makefile, re.M), target
