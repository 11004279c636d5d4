"""What README and the pages beside it name and print is what the repository has and computes."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import train
from training.folder import FILES
from training.options import parse

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(*folders, end):
    paths = [p for folder in folders for p in sorted(ROOT.glob(f"{folder}*{end}"))]
    return {p: p.read_text(encoding="utf-8") for p in paths}


PAGES = read("", "fast/", "relatives/", end=".md")
TEXT = "\n".join(PAGES.values())
HOUSE = "".join(read("", "fast/", "relatives/", "training/", end=".py").values())
TESTS = "".join(read("tests/", end=".py").values())
SCRIPTS = "".join(read("experiments/", "benchmarks/", "notebooks/", end=".py").values())


def column(heading):
    """The cells under this heading in all tables."""
    cells = []
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.M):
        head, _, *rows = ([c.strip() for c in line.split("|")] for line in table.splitlines())
        cells += [row[head.index(heading)] for row in rows if heading in head]
    return cells


def named(cells):
    return re.findall(r"`(\w+)`", " ".join(cells))


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", text)]


def test_the_worked_example_prints_the_digits_of_readme():
    block = re.search(r"```python\n([^`]*skew_scores.*?)```", TEXT, re.S).group(1)
    names = {}
    exec(block, names)
    text = TEXT[TEXT.index("    S  =") : TEXT.index("S has rank 2")]
    rows = np.array([numbers(line) for line in text.splitlines()[:4]])
    assert np.array_equal(rows[:, :4], names["S"])
    assert np.array_equal(rows[:, 4:], np.round(names["A"], 4))
    for key in ("theta", "O", "dq", "dk", "dv", "dalpha"):
        printed = re.search(rf"\b{key} = ([-\d. ]*\d)", text).group(1)
        assert numbers(printed) == np.round(np.ravel(names[key]), 4).tolist(), key
    assert names["theta"][0] == pytest.approx(5**0.5, rel=1e-14)


def test_every_test_and_function_that_a_table_names_exists():
    tests, functions = named(column("test")), named(column("code"))
    assert len(column("test")) >= 10 and len(tests) >= 8 and len(functions) >= 18
    for name in tests + re.findall(r"`(test_\w+)`", TEXT):
        assert f"\ndef {name}(" in TESTS, name
    for name in functions:
        assert re.search(rf"^ *(def|class) {name}\b", HOUSE, re.M), name


def test_every_notebook_stands_in_the_table():
    notebooks = sorted(p.stem for p in ROOT.glob("notebooks/*.ipynb"))
    assert sorted(named(column("notebook"))) == notebooks


def test_every_line_that_readme_points_to_stands_where_it_says():
    rows = list(zip(column("in …"), column("the line")))
    assert len(rows) >= 5
    for where, line in (row for row in rows if "`" in row[0]):
        file, name = re.findall(r"`([^`]+)`", where)
        source = (ROOT / file).read_text(encoding="utf-8")
        found = ast.parse(source)
        for part in name.split("."):  # function, or Class.method
            found = next(node for node in ast.walk(found) if getattr(node, "name", None) == part)
        for code in re.findall(r"`([^`]+)`", line):
            assert code.partition("…")[0] in ast.get_source_segment(source, found), code


def test_every_command_and_option_exists(capsys):
    lines = re.findall(r"\btrain\.py((?: +[\w./-]+)*)", re.sub(" #.*", "", TEXT))
    assert len(lines) > 10
    for line in lines:
        if "-" in line:
            arguments = ["x" if a.isupper() or "/" in a else a for a in line.split()]
            parse(train.Config, train.PRESETS, arguments)
    with pytest.raises(SystemExit):
        parse(train.Config, train.PRESETS, ["--help"])
    known = capsys.readouterr().out + SCRIPTS
    for option in re.findall(r"`[^`\n]*?(--[a-z][\w-]+)", TEXT):
        assert option in known, option
    for name in re.findall(r"\bpython ([\w/]+\.py)|-r ([\w-]+\.txt)", TEXT):
        assert (ROOT / "".join(name)).exists(), name


def test_every_file_folder_and_link_exists():
    results = {p.name for p in ROOT.glob("*/results/*")} | {"gpu.json"}  # gpu.json: on a card
    for page, text in PAGES.items():
        names = re.findall(r"`([\w./-]+(?:\.(?:py|md|npz|txt|json|csv|safetensors|zip)|/))`", text)
        names += re.findall(r"\]\(([\w./-]+)\)", text)
        assert names, page
        for name in names:
            made = name in FILES or Path(name).name in results or name in MAKEFILE
            assert made or (ROOT / name).exists() or (page.parent / name).exists(), (page, name)


def test_every_make_target_exists():
    targets = re.findall(r"(?:`|^ {4})make ([a-z][\w-]*)", TEXT, re.M)
    assert len(targets) >= 5
    for target in targets:
        assert re.search(rf"^{target}\s*:", MAKEFILE, re.M), target
