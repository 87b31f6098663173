"""Puts the exercises of exercises/cells.yaml into the notebooks, or brings them up to date.

    python -m tools.insert_exercises            # all notebooks
    python -m tools.insert_exercises --reset    # also cells that somebody has filled in

Each exercise becomes three cells behind the cell that `after` names: the text, the cell to fill,
the check; those behind a notebook's own "Check" get a heading. Their ids stay the same, so running
it again changes nothing. They carry nbgrader's metadata (schema 3). A notebook is not executed: the
output of an unfilled check is known. A cell that has been filled in is kept.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from exercises import core
from exercises.sheet import grade_id

ROOT = Path(__file__).parent.parent
SECTION = (
    "## Exercises\n\n"
    "Fill in the cell under a task and run it, then run the check below it: it says what is right, "
    "or what went wrong. `make exercises` checks all of them and writes a sheet to hand in "
    "([docs/exercises.md](../docs/exercises.md))."
)


def is_ours(cell: NotebookNode) -> bool:
    """Whether this tool made a cell."""
    return cell.get("id", "").startswith("exercise-")


def nbgrader(name: str, **roles: Any) -> dict[str, Any]:
    """Cell metadata for nbgrader, schema 3."""
    record = {"schema_version": 3, "grade_id": name, "grade": False, "solution": False}
    return {"nbgrader": record | {"locked": True, "task": False} | roles}


def is_stub(source: str) -> bool:
    """Whether `...` still stands in a cell, as in any stub, old or new. What is no Python is not
    a stub: somebody is writing it."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree))


def text_of(exercise: core.Exercise) -> str:
    """The markdown of an exercise."""
    return (
        f"### Exercise {exercise.number} · {exercise.title} ({exercise.minutes} minutes)\n\n"
        f"{exercise.text.strip()}\n\n"
        f"<details><summary>Hint</summary>\n\n{exercise.hint.strip()}\n\n</details>"
    )


def check_of(exercise: core.Exercise) -> str:
    """The code of the check cell."""
    names = ", ".join(exercise.answers)
    return f'from exercises import check\n\ncheck("{exercise.number}", {names})'


def cells_of(exercise: core.Exercise, before: dict[str, NotebookNode], reset: bool) -> list[Any]:
    """The three cells of an exercise. before: the cells of the notebook by id, as they are."""
    name = grade_id(exercise.number)
    text = new_markdown_cell(
        text_of(exercise), id=f"{name}-text", metadata=nbgrader(f"{name}-text")
    )
    roles = {"solution": True, "locked": False}
    answer = new_code_cell(exercise.stub.strip(), id=name, metadata=nbgrader(name, **roles))
    roles = {"grade": True, "points": exercise.points}
    check_id = f"{name}-check"
    check = new_code_cell(check_of(exercise), id=check_id, metadata=nbgrader(check_id, **roles))
    said = core.Verdict(core.EMPTY).text(exercise.number) + "\n"
    check.outputs = [new_output("stream", name="stdout", text=said)]
    old = before.get(name)
    if old is not None and not reset and not is_stub(old.source):
        print(f"  {exercise.number}: filled in, kept")
        answer, check = old, before.get(check_id, check)
    for cell in (answer, check):
        if cell.id in before and before[cell.id].source == cell.source and not reset:
            cell.execution_count = before[cell.id].execution_count  # it was run as it stands
    return [text, answer, check]


def inserted(notebook: NotebookNode, exercises: list[core.Exercise], reset: bool) -> NotebookNode:
    """The notebook with these exercises, and with no others of ours.

    Raises ValueError where the cell that an exercise follows is not there.
    """
    before = {cell["id"]: cell for cell in notebook.cells if is_ours(cell)}
    notebook.cells = [cell for cell in notebook.cells if not is_ours(cell)]
    own = [cell["id"] for cell in notebook.cells]
    groups: dict[str, list[core.Exercise]] = {}
    for exercise in exercises:
        if exercise.after not in own:
            raise ValueError(
                f"exercise {exercise.number} follows the cell {exercise.after!r}, which "
                f"{exercise.notebook} lacks. Name another in exercises/cells.yaml."
            )
        groups.setdefault(exercise.after, []).append(exercise)
    for after, group in groups.items():
        place = [cell["id"] for cell in notebook.cells].index(after) + 1
        new = [cell for exercise in group for cell in cells_of(exercise, before, reset)]
        if notebook.cells[place - 2].source.startswith("## Check"):
            heading = "exercise-section"
            new.insert(0, new_markdown_cell(SECTION, id=heading, metadata=nbgrader(heading)))
        notebook.cells[place:place] = new
    return notebook


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reset", action="store_true", help="empty filled cells as well")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks")
    options = parser.parse_args(arguments)
    stems = dict.fromkeys(exercise.notebook for exercise in core.exercises().values())
    for stem in stems:
        path = options.folder / f"{stem}.ipynb"
        listed = [each for each in core.exercises().values() if each.notebook == stem]
        text = path.read_text(encoding="utf-8")
        notebook = inserted(nbformat.reads(text, as_version=4), listed, options.reset)
        nbformat.validate(notebook)
        new = nbformat.writes(notebook) + "\n"
        if new != text:
            path.write_text(new, encoding="utf-8")
        print(f"{path.name}: {len(listed)} exercises{'' if new != text else ', unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
