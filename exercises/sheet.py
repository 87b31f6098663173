"""`make exercises`: checks every exercise that a student has filled in, and writes a sheet to hand
in: exercises.md in the run folder. It also lists what the student expected in each notebook.

Only the filled cells run, each in a process of its own with a time limit, with the imports and
functions of its notebook that it uses. One that fails or hangs does not stop the others.

Environment: ICD_STUDENT (the name on the sheet; asked for where a person watches),
ICD_EXERCISE_SECONDS (the limit, 120).
"""

from __future__ import annotations

import argparse
import ast
import datetime
import html
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from exercises import core, expectations

SECONDS = 120.0
MARKS = {
    core.EMPTY: "not filled in",
    core.RIGHT: "**right**",
    core.WRONG: "not right yet",
    core.ERROR: "error",
    core.MISSING: "cannot be checked yet",
}


@dataclass(frozen=True)
class Row:
    """One line of the sheet."""

    exercise: core.Exercise
    source: str  # what the student wrote, "" where the cell is not there
    verdict: core.Verdict


# ------------------------------------------------------------------------------- a student's cells


def grade_id(number: str) -> str:
    """The nbgrader id of the cell to fill: "exercise-6-2"."""
    return f"exercise-{number.replace('.', '-')}"


def answer_of(cells: list[Any], number: str) -> str:
    """The source of an exercise's cell: the one with its id, else the code before its check."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    for cell in code:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id(number):
            return cell.source
    call = re.compile(rf"^check\(\s*[\"']{re.escape(number)}[\"']", re.MULTILINE)
    for before, cell in zip(code, code[1:], strict=False):
        if call.search(cell.source):
            return before.source
    return ""


def is_filled(source: str, exercise: core.Exercise) -> bool:
    """Whether a cell holds something else than the stub, blank space aside."""
    return bool(source.strip()) and source.split() != exercise.stub.split()


def names_in(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def context(cells: list[Any], source: str) -> str:
    """The imports and functions of the notebook that a cell uses, as code.

    Cells with magics are left out, and so is a cell that is no Python.
    """
    try:
        needed = names_in(ast.parse(source))
    except SyntaxError:
        return ""
    chosen: list[ast.stmt] = []
    for cell in reversed([cell for cell in cells if cell.cell_type == "code"]):
        if cell.source == source or cell.metadata.get("nbgrader"):
            continue
        try:
            statements = ast.parse(cell.source).body
        except SyntaxError:
            continue
        for statement in reversed(statements):
            if not (defined(statement) & needed):
                continue
            chosen.insert(0, statement)
            needed |= names_in(statement)
    return "\n".join(ast.unparse(statement) for statement in chosen)


def defined(statement: ast.stmt) -> set[str]:
    """The names that an import or a function brings; none for any other statement."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    return {statement.name} if isinstance(statement, ast.FunctionDef) else set()


# ------------------------------------------------------------------------------- one exercise


def judge_source(number: str, source: str, before: str = "") -> core.Verdict:
    """Run a cell and check the names that it defines. `before` runs first."""
    exercise = core.exercises()[number]
    name = f"<exercise {number}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "exercise"}
    try:
        exec(compile(before, "<notebook>", "exec"), scope)
        exec(compile(source, name, "exec"), scope)
    except (Exception, SystemExit) as error:
        return core.Verdict(core.ERROR, tuple(core.explain(error)))
    missing = [answer for answer in exercise.answers if answer not in scope]
    if missing:
        line = f"{' and '.join(missing)}: not defined. Keep the names that the cell came with."
        return core.Verdict(core.WRONG, (line,))
    return core.judge(number, *(scope[answer] for answer in exercise.answers))


def judge_alone(number: str, source: str, before: str, seconds: float) -> core.Verdict:
    """`judge_source` in a process of its own, ended after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        task.write_text(json.dumps({"number": number, "source": source, "before": before}))
        command = [
            sys.executable,
            "-m",
            "exercises.sheet",
            "--task",
            str(task),
            "--to",
            str(result),
        ]
        env = os.environ | {"ICD_HEADLESS": "1"}
        for name in core.STRICT:
            env.pop(name, None)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            done = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, timeout=seconds, **quiet
            )
        except subprocess.TimeoutExpired:
            lines = (
                f"It was stopped after {seconds:.0f} seconds.",
                "Look for a loop that never ends. ICD_EXERCISE_SECONDS gives more time.",
            )
            return core.Verdict(core.ERROR, lines)
        if not result.is_file():
            line = f"The process that ran it ended (code {done.returncode}) without a verdict."
            return core.Verdict(core.ERROR, (line,))
        content = json.loads(result.read_text())
        return core.Verdict(content["state"], tuple(content["lines"]))


def run_task(task: Path, result: Path) -> None:
    """The child of `judge_alone`."""
    content = json.loads(task.read_text())
    verdict = judge_source(content["number"], content["source"], content["before"])
    result.write_text(json.dumps({"state": verdict.state, "lines": verdict.lines}))


# ------------------------------------------------------------------------------- the sheet


def rows(folder: Path, seconds: float = SECONDS) -> list[Row]:
    """Every exercise of the course with its verdict; says what it does."""
    notebooks: dict[str, list[Any]] = {}
    found = []
    for number, exercise in core.exercises().items():
        path = folder / f"{exercise.notebook}.ipynb"
        if exercise.notebook not in notebooks:
            notebooks[exercise.notebook] = cells_of(path)
        cells = notebooks[exercise.notebook]
        source = answer_of(cells, number)
        if not is_filled(source, exercise):
            verdict = core.Verdict(core.EMPTY)
        else:
            verdict = judge_alone(number, source, context(cells, source), seconds)
            print(verdict.text(number), flush=True)
        found.append(Row(exercise, source, verdict))
    return found


def cells_of(path: Path) -> list[Any]:
    """The cells of a notebook, none where it is missing or cannot be read: this is said."""
    try:
        return list(nbformat.read(path, as_version=4).cells)
    except (OSError, ValueError) as error:
        print(f"{path.name} cannot be read ({type(error).__name__}): its exercises are left out.")
        return []


def fenced(source: str, language: str = "python") -> str:
    """Code or text in a fence that is longer than any in it."""
    longest = max([2, *(len(ticks) for ticks in re.findall("`+", source))])
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{source.strip()}\n{fence}"


def expected() -> list[str]:
    """The lines of the sheet with what the student expected. A damaged file is said in them."""
    lines = ["", "## What you expected", ""]
    try:
        entries = expectations.read()
    except (OSError, ValueError) as error:
        return [*lines, html.escape(str(error), quote=False)]
    missing = [key for key in expectations.questions() if key not in entries]
    for key in sorted(entries):
        entry = entries[key]
        question = html.escape(" ".join(entry.question.split()), quote=False)
        lines += [f"**{html.escape(key)}** · {question} (saved {entry.history()})", ""]
        lines += [fenced(entry.text, "text"), ""]
    if missing:
        lines.append(f"Not written down: {', '.join(missing)}.")
    return lines


def page(listed: list[Row], student: str, run: str, expected: Sequence[str] = ()) -> str:
    """The sheet in Markdown; `expected` are the lines of that function."""
    right = [row for row in listed if row.verdict.state == core.RIGHT]
    filled = [row for row in listed if row.verdict.state != core.EMPTY]
    points = sum(row.exercise.points for row in right)
    most = sum(row.exercise.points for row in listed)
    day = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    lines = [
        f"# Exercises: {student}",
        "",
        f"{day} · run {run} · {len(filled)} of {len(listed)} filled in, {len(right)} right, "
        f"{points} of {most} points",
        "",
        "| exercise | title | minutes | verdict | points |",
        "|---|---|---|---|---|",
    ]
    for row in listed:
        exercise = row.exercise
        earned = exercise.points if row.verdict.state == core.RIGHT else 0
        cells = [exercise.number, exercise.title, exercise.minutes, MARKS[row.verdict.state]]
        lines.append(f"| {' | '.join(cells)} | {earned} of {exercise.points} |")
    for row in filled:
        exercise = row.exercise
        lines += ["", f"## {exercise.number} {exercise.title}", ""]
        lines += [f"{MARKS[row.verdict.state]}", ""]
        lines += [f"- {line}" for line in row.verdict.lines]
        lines += ["", fenced(row.source)]
    return "\n".join([*lines, *expected]).rstrip() + "\n"


def student_name() -> str:
    """ICD_STUDENT, else the name that a person types, else a blank to fill in."""
    name = os.environ.get("ICD_STUDENT", "").strip()
    if not name and sys.stdin is not None and sys.stdin.isatty():
        name = input("Your name on the sheet: ").strip()
    return " ".join(name.split()) or "(name)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the exercises and write the sheet.")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task:
        run_task(options.task, options.to)
        return 0
    from helpers.machinery import places

    seconds = float(os.environ.get("ICD_EXERCISE_SECONDS") or SECONDS)
    student = student_name()
    listed = rows(places.notebooks_dir(), seconds)
    run = places.run_dir()
    sheet = places.write(run / "exercises.md", page(listed, student, places.show(run), expected()))
    right = sum(row.verdict.state == core.RIGHT for row in listed)
    filled = sum(row.verdict.state != core.EMPTY for row in listed)
    print(f"{filled} of {len(listed)} exercises are filled in, {right} right: {places.show(sheet)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
