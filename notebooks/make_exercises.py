"""Writes exercises/*.ipynb from solutions/*.ipynb: the same notebooks without answers and outputs.

    python notebooks/make_exercises.py

In every cell the lines from `### BEGIN SOLUTION` to `### END SOLUTION` become one line that raises
NotImplementedError, at the same indentation.  Markers and metadata are those of nbgrader, which can
take the solutions as its source notebooks.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = 'raise NotImplementedError("your code")'


def without_solution(source):
    """The lines of a cell with each solution replaced by the stub; ValueError for odd markers."""
    kept, inside = [], False
    for line in source:
        marker = line.strip()
        if marker in (BEGIN, END):
            if inside != (marker == END):
                raise ValueError(f"{marker} where it cannot stand")
            inside = not inside
            if inside:
                kept.append(line.replace(BEGIN, STUB))
        elif not inside:
            kept.append(line)
    if inside:
        raise ValueError(f"{BEGIN} without {END}")
    if kept:
        kept[-1] = kept[-1].rstrip("\n")  # the last line of a cell has no end
    return kept


def exercise(solution):
    """The exercise notebook (JSON text) of a solution notebook (JSON text)."""
    notebook = json.loads(solution)
    for cell in notebook["cells"]:
        cell["source"] = without_solution(cell["source"])
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main():
    (FOLDER / "exercises").mkdir(exist_ok=True)
    for path in sorted((FOLDER / "solutions").glob("*.ipynb")):
        text = exercise(path.read_text(encoding="utf-8"))
        # "\n" on Windows too, so that the file does not depend on who wrote it
        with open(FOLDER / "exercises" / path.name, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        print(f"exercises/{path.name}")


if __name__ == "__main__":
    main()
