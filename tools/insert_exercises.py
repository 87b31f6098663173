"""Puts the exercises and the questions after expectations of exercises/cells.yaml into the
notebooks, or brings them up to date.

    python -m tools.insert_exercises            # all notebooks
    python -m tools.insert_exercises --reset    # also cells that somebody has filled in

Each exercise becomes three cells behind the cell that `after` names: the text, the cell to fill,
the check; those behind a notebook's own "Check" get a heading. Their ids stay the same, so running
it again changes nothing. They carry nbgrader's metadata (schema 3). A notebook is not executed: the
output of an unfilled check is known. A cell that has been filled in is kept.

A question after an expectation becomes two code cells: one with a box before the cell that
`ask_before` names, and one behind `recall_after`. Their output where no person watches is known.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from exercises import core, expectations
from exercises.sheet import grade_id

ROOT = Path(__file__).parent.parent
WIDTH = 100  # columns of a line of code
SECTION = (
    "## Exercises\n\n"
    "A check says what is right, or what went wrong. `make exercises` checks all exercises and "
    "writes a sheet to hand in ([docs/exercises.md](../docs/exercises.md))."
)


def is_ours(cell: NotebookNode) -> bool:
    """Whether this tool made a cell."""
    return cell.get("id", "").startswith(("exercise-", "expectation-"))


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
        "Replace each `...`, run it, then run the check.\n\n"
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
    if not reset:
        keep_counts([answer, check], before)
    return [text, answer, check]


def keep_counts(cells: Iterable[NotebookNode], before: dict[str, NotebookNode]) -> None:
    """A cell whose code did not change stays executed."""
    for cell in cells:
        if cell.id in before and before[cell.id].source == cell.source:
            cell.execution_count = before[cell.id].execution_count


def code_of(question: expectations.Question) -> tuple[str, str]:
    """The code of the cell that asks, and of the cell that shows the text again."""
    key, text = json.dumps(question.expectation), question.question.strip()
    call = f"expectations.write({key}, {json.dumps(text, ensure_ascii=False)})"
    if len(call) > WIDTH:  # as ruff formats it
        lines = textwrap.wrap(text, WIDTH, break_long_words=False)
        if len(text) + len('    "",') > WIDTH:
            lines = textwrap.wrap(text, WIDTH - len('    " ",'), break_long_words=False)
        lines = [f"{line} " for line in lines[:-1]] + lines[-1:]
        quoted = "\n".join(f"    {json.dumps(line, ensure_ascii=False)}" for line in lines)
        call = f"expectations.write(\n    {key},\n{quoted},\n)"
    imports = "from exercises import expectations\n\n"
    return imports + call, f"{imports}expectations.recall({key})"


def pair_of(
    question: expectations.Question, before: dict[str, NotebookNode]
) -> tuple[NotebookNode, NotebookNode]:
    """The cell that asks and the cell that shows the text again. before: as in `cells_of`."""
    name = f"expectation-{question.expectation}"
    ask, again = code_of(question)
    cells = new_code_cell(ask, id=f"{name}-write"), new_code_cell(again, id=f"{name}-recall")
    text = question.question.strip()
    shown = [
        (expectations.asked_html(text), expectations.asked_text(text)),
        (expectations.recalled_html(), expectations.recalled_text()),
    ]
    for cell, (page, plain) in zip(cells, shown, strict=True):
        data = {"text/html": page, "text/plain": plain}
        cell.outputs = [new_output("display_data", data=data)]
    keep_counts(cells, before)
    return cells


def inserted(
    notebook: NotebookNode,
    exercises: list[core.Exercise],
    reset: bool,
    questions: Iterable[expectations.Question] = (),
) -> NotebookNode:
    """The notebook with these exercises and questions, and with no others of ours.

    Raises ValueError where the cell next to one of them is not there.
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
    for question in questions:  # last: the text is shown right below its result
        ask, again = pair_of(question, before)
        notebook.cells.insert(_code_place(notebook, question, question.ask_before), ask)
        notebook.cells.insert(_code_place(notebook, question, question.recall_after) + 1, again)
    return notebook


def _code_place(notebook: NotebookNode, question: expectations.Question, cell_id: str) -> int:
    """The place of a code cell. Raises ValueError where the notebook has no such code cell."""
    code = [cell["id"] if cell.cell_type == "code" else "" for cell in notebook.cells]
    if cell_id not in code:
        raise ValueError(
            f"expectation {question.expectation} stands beside the code cell {cell_id!r}, which "
            f"{question.notebook} lacks. Name another in exercises/cells.yaml."
        )
    return code.index(cell_id)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reset", action="store_true", help="empty filled cells as well")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks")
    options = parser.parse_args(arguments)
    rows = [*core.exercises().values(), *expectations.questions().values()]
    stems = dict.fromkeys(row.notebook for row in rows)
    for stem in stems:
        path = options.folder / f"{stem}.ipynb"
        listed = [each for each in core.exercises().values() if each.notebook == stem]
        asked = [each for each in expectations.questions().values() if each.notebook == stem]
        text = path.read_text(encoding="utf-8")
        notebook = inserted(nbformat.reads(text, as_version=4), listed, options.reset, asked)
        nbformat.validate(notebook)
        new = nbformat.writes(notebook) + "\n"
        if new != text:
            path.write_text(new, encoding="utf-8")
        unchanged = "" if new != text else ", unchanged"
        print(f"{path.name}: {len(listed)} exercises, {len(asked)} questions{unchanged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
