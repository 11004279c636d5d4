"""The notebooks run, and are committed as they ran: in order, with outputs, small, portable."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# A path from the root of a disk, as tracebacks and file listings print them.
ROOTS = "home|root|work|tmp|Users|usr|mnt|content|opt"
ABSOLUTE = re.compile(rf"(?<![\w.:/])/(?:{ROOTS})/|\b[A-Z]:\\\w")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def text_of(notebook):
    """Sources and textual outputs; images are left out, whose base64 may contain anything."""
    parts = ["".join(cell["source"]) for cell in notebook["cells"]]
    for output in outputs(notebook):
        parts.append("".join(output.get("text", "")))
        parts += ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(parts) + json.dumps(notebook["metadata"])


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_committed_notebook_is_a_complete_run(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = code_cells(notebook)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for output in outputs(notebook)]
    assert "error" not in kinds
    assert "stream" in kinds, "no printed output is stored"
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook)), "no figure is stored"
    assert not any(o.get("name") == "stderr" for o in outputs(notebook)), "a warning is stored"
    assert path.stat().st_size < 500_000
    found = ABSOLUTE.search(text_of(notebook))
    assert not found, f"absolute path: {found.group()}"


FOLDERS = (FOLDER, FOLDER / "exercises", FOLDER / "solutions")
ALL = [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]


@pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_nbconvert_would_write_a_py_file(path):
    about = json.loads(path.read_text(encoding="utf-8"))["metadata"]["language_info"]
    assert about["file_extension"] == ".py" and about["nbconvert_exporter"] == "python"
    assert about["mimetype"] == "text/x-python"


def execute(path, **options):
    """The notebook after a run; CellExecutionError carries the failing cell and its traceback."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(
        notebook, kernel_name="python3", resources=resources, startup_timeout=300, **options
    ).execute()
    assert not any(o.get("name") == "stderr" for o in outputs(notebook)), "a warning is printed"
    return notebook


@pytest.mark.filterwarnings("default")  # Jupyter's own warnings are not ours to mend
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_runs(path):
    execute(path, timeout=300)
