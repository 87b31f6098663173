"""The exercises: each solution passes its checker, each usual mistake gets its own message, and nothing that a student
writes stops a notebook or the sheet."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from exercises import core, sheet
from helpers import traces
from tests.atlas_fixture import invented_run, keep
from tools import insert_exercises

ROOT = Path(__file__).parent.parent
NUMBERS = list(core.exercises())


def solutions() -> dict[str, str]:
    """Number -> the block of solutions/ that solves it."""
    blocks = {}
    for path in sorted((ROOT / "solutions").glob("nb*.py")):
        for block in re.split(r"^# %% ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            number, _, source = block.partition("\n")
            blocks[number] = source.strip() + "\n"
    return blocks


SOLUTIONS = solutions()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small invented run with cases, traces and answers."""
    folder = tmp_path_factory.mktemp("exercises")
    path, data = invented_run(folder)
    cases = pd.read_parquet(path / "cases" / "cases.parquet")
    written = traces.from_template(cases[cases["split"] == "train"].head(250))
    keep(path / "traces", written, "traces.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICD_PROFILE", "tiny")
        patch.setenv("ICD_DATA_DIR", str(data))
        patch.setenv("ICD_RUNS_DIR", str(path.parent))
        for name in (*core.STRICT, "FRESH", "ICD_STUDENT", "ICD_EXERCISE_SECONDS"):
            patch.delenv(name, raising=False)
        yield path


@pytest.fixture
def nothing(places: Path) -> Path:
    """A run folder in which nothing has been made."""
    return places


# ------------------------------------------------------------------------------- solutions


def test_every_exercise_has_a_solution_and_a_checker() -> None:
    assert list(SOLUTIONS) == NUMBERS
    for notebook in range(8):
        listed = [core.exercises()[n] for n in NUMBERS if n.startswith(f"{notebook}.")]
        minutes = [int(each.minutes) for each in listed]
        assert 2 <= len(listed) <= 3 and min(minutes) == 5 and 20 <= max(minutes) <= 30


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_passes(number: str, run: Path) -> None:
    verdict = sheet.judge_source(number, SOLUTIONS[number])
    assert verdict.state == core.RIGHT, verdict.text(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stub_is_not_filled_in_and_stops_nothing(number: str, nothing: Path, capsys) -> None:
    exercise = core.exercises()[number]
    cells = nbformat.read(ROOT / "notebooks" / f"{exercise.notebook}.ipynb", 4).cells
    before = sheet.context(cells, exercise.stub)
    assert sheet.judge_source(number, exercise.stub, before) == core.Verdict(core.EMPTY)
    core.check(number, *[...] * len(exercise.answers))
    assert capsys.readouterr().out == f"Exercise {number}: not filled in yet.\n"


# ------------------------------------------------------------------------------- usual mistakes

# What stands in a solution, the mistake in its place, and what the message says.
MISTAKES = [
    tuple(row[key] for key in ("exercise", "right", "mistake", "says"))
    for row in yaml.safe_load((ROOT / "tests" / "exercise_mistakes.yaml").read_text("utf-8"))
]


@pytest.mark.parametrize(
    ("number", "right", "mistake", "message"),
    MISTAKES,
    ids=[f"{number}-{i}" for i, (number, *_) in enumerate(MISTAKES)],
)
def test_a_usual_mistake_is_named(
    number: str, right: str, mistake: str, message: str, run: Path
) -> None:
    assert right in SOLUTIONS[number], (
        "the solution has changed: name the place of the mistake anew"
    )
    verdict = sheet.judge_source(number, SOLUTIONS[number].replace(right, mistake))
    assert verdict.state in (core.WRONG, core.ERROR)
    assert message in verdict.text(number), verdict.text(number)


def test_every_exercise_knows_its_usual_mistakes() -> None:
    known = [number for number, *_ in MISTAKES]
    assert {number: known.count(number) >= 3 for number in NUMBERS} == dict.fromkeys(NUMBERS, True)


# ------------------------------------------------------------------------------- what a student may write


def test_an_error_is_shown_with_its_line_and_its_arguments(run: Path) -> None:
    source = "def allowed(prefix, codes):\n    first = codes[0]\n    return first[99]\n"
    verdict = sheet.judge_source("5.2", source)
    assert verdict.state == core.ERROR
    text = verdict.text("5.2")
    assert "IndexError: string index out of range" in text and "Line 3: return first[99]" in text
    assert "It was called with: 'I21', ['I21'" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("share = 1 / 0", "Line 1: share = 1 / 0"),
        ("share = (", "SyntaxError"),
        ("exit()", "SystemExit"),
        ("other = 0.8", "share: not defined"),
        ("share = joined.mean()", "name 'joined' is not defined"),
        ("share = 'most of it'", "must be one number"),
        ("share = [0.8]", "must be one number"),
        ("share = None", "must be one number"),
        ("share = float('nan')", "Count first"),
    ],
)
def test_whatever_stands_in_a_cell_gets_an_answer(source: str, message: str, run: Path) -> None:
    verdict = sheet.judge_source("2.1", source)
    assert verdict.state in (core.WRONG, core.ERROR)
    assert message in verdict.text("2.1")


STRANGE = [None, 0, "", "text", [], {}, set(), object(), len, lambda *a, **k: None, [..., 1], True]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("value", STRANGE, ids=[str(i) for i in range(len(STRANGE))])
def test_no_answer_however_strange_raises(number: str, value: object, run: Path) -> None:
    verdict = core.judge(number, *[value] * len(core.exercises()[number].answers))
    assert verdict.state in (core.WRONG, core.ERROR) and verdict.lines


def test_a_function_can_spoil_nothing(run: Path) -> None:
    source = SOLUTIONS["1.2"].replace(
        "    patients = cases", "    split = split.copy()\n    patients = cases"
    )
    source = source.replace(
        "    return split\n",
        "    cases.drop(columns=['subject_id'], inplace=True)\n    return split\n",
    )
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert sheet.judge_source("1.2", source).state == core.RIGHT
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


NEEDS = {
    "1.2": "01_data_preparation",
    "2.1": "02_reasoning_traces",
    "2.2": "02_reasoning_traces",
    "5.2": "01_data_preparation",
    "6.2": "01_data_preparation",
}


@pytest.mark.parametrize("number", NEEDS)
def test_without_the_artefact_the_notebook_to_run_is_named(number: str, nothing: Path) -> None:
    source = "share = 0.8" if number == "2.1" else SOLUTIONS[number]
    verdict = sheet.judge_source(number, source)
    assert verdict.state == core.MISSING
    assert f"Run notebook {NEEDS[number]} first" in verdict.text(number)


@pytest.mark.parametrize("number", [n for n in NUMBERS if n not in (*NEEDS, "6.3")])
def test_the_others_need_no_run(number: str, nothing: Path) -> None:
    assert sheet.judge_source(number, SOLUTIONS[number]).state == core.RIGHT


def test_data_of_real_patients_stands_in_no_message(run: Path, monkeypatch) -> None:
    from helpers.machinery import places

    def spoken(function, *arguments) -> str:
        with pytest.raises(core.Stop) as stop:
            core.call_on_run(function, *arguments)
        return stop.value.verdict.text("2.2")

    def quoting(note: str) -> None:
        raise ValueError(note)

    assert "a secret note" in spoken(quoting, "a secret note")
    monkeypatch.setattr(places, "is_synthetic", lambda: False)
    assert "secret" not in spoken(quoting, "a secret note")
    assert "ValueError" in spoken(quoting, "a secret note")


def test_an_interval_by_the_ordinary_bootstrap_passes_too(run: Path) -> None:
    source = SOLUTIONS["6.2"].replace(
        "rng.permutation(len(of_patient))[: len(of_patient) // 2]",
        "rng.integers(0, len(of_patient), len(of_patient))",
    )
    assert sheet.judge_source("6.2", source).state == core.RIGHT


def test_a_grader_gets_an_error_where_a_student_gets_a_sentence(monkeypatch, capsys) -> None:
    core.check("3.1", 1)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(AssertionError, match="not right yet"):
        core.check("3.1", 1)
    with pytest.raises(AssertionError, match="not filled in"):
        core.check("3.1", ...)
    core.check("3.1", 598_016)
    assert capsys.readouterr().out.count("Exercise 3.1: right.") == 1


def test_an_unknown_exercise_is_refused() -> None:
    with pytest.raises(ValueError, match="no exercise has the number '9.9'. Known: 0.1"):
        core.judge("9.9", 1)


# ------------------------------------------------------------------------------- the sheet


def notebook(folder: Path, filled: dict[str, str]) -> None:
    """The notebooks of the course in `folder`, with exercises, some of them filled in."""
    for path in (ROOT / "notebooks").glob("0[0-7]_*.ipynb"):
        nb = nbformat.read(path, 4)
        nbformat.write(nb, folder / path.name)
    insert_exercises.main(["--folder", str(folder), "--reset"])
    for path in folder.glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            for number, source in filled.items():
                if cell["id"] == sheet.grade_id(number):
                    cell.source = source
        nbformat.write(nb, path)


def test_the_sheet_has_every_exercise_and_one_that_hangs_stops_no_other(
    run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    filled = {
        "5.1": SOLUTIONS["5.1"],
        "3.1": "trainable = 630_784",
        "4.3": "def flat_share(p, n):\n    while True:\n        pass\n",
        "7.3": "holm = 1 / 0  # ```",
    }
    notebook(tmp_path, filled)
    monkeypatch.setenv("ICD_NOTEBOOKS_DIR", str(tmp_path))
    monkeypatch.setenv("ICD_STUDENT", "Ada  Lovelace")
    monkeypatch.setenv("ICD_EXERCISE_SECONDS", "60")
    assert sheet.main([]) == 0
    text = (run / "exercises.md").read_text(encoding="utf-8")
    assert "# Exercises: Ada Lovelace" in text
    assert f"4 of {len(NUMBERS)} filled in, 1 right, 1 of " in text
    assert all(f"| {number} | {core.exercises()[number].title} |" in text for number in NUMBERS)
    assert "| 5.1 | Padding on paper | 5 | **right** | 1 of 1 |" in text
    assert "grouped-query attention" in text and "trainable = 630_784" in text
    assert "stopped after 60 seconds" in text and "ZeroDivisionError" in text
    assert text.count("````python") == 1, "a fence in the code needs a longer one around it"
    assert "4 of 20 exercises are filled in, 1 right" in capsys.readouterr().out


def test_a_cell_gets_the_imports_and_functions_of_its_notebook(tmp_path: Path) -> None:
    notebook(tmp_path, {})
    cells = sheet.cells_of(tmp_path / "06_hierarchical_f1_analysis.ipynb")
    before = sheet.context(cells, "weights = half_samples(10, 5, rng)")
    assert "import numpy as np" in before and "def half_samples" in before
    assert "course.setup" not in before and "torch" not in before


def test_an_answer_is_found_without_metadata_too() -> None:
    cells = [
        nbformat.v4.new_code_cell("share = 0.5"),
        nbformat.v4.new_markdown_cell("and now"),
        nbformat.v4.new_code_cell('from exercises import check\n\ncheck("2.1", share)'),
    ]
    assert sheet.answer_of(cells, "2.1") == "share = 0.5"
    assert sheet.answer_of(cells, "2.2") == ""


# ------------------------------------------------------------------------------- the cells in the notebooks


def test_the_notebooks_hold_the_exercises_of_the_list(tmp_path: Path) -> None:
    for path in (ROOT / "notebooks").glob("0[0-7]_*.ipynb"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    insert_exercises.main(["--folder", str(tmp_path)])
    for path in tmp_path.glob("*.ipynb"):
        same = path.read_bytes() == (ROOT / "notebooks" / path.name).read_bytes()
        assert same, f"{path.name}: run python -m tools.insert_exercises"


def test_a_cell_that_did_not_change_stays_executed_and_reset_begins_anew(tmp_path: Path) -> None:
    name = "00_start_here.ipynb"
    content = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    cells = {cell["id"]: cell for cell in content.cells}
    cells["exercise-0-1"].execution_count = 7
    cells["exercise-0-2"].source += "  # an older stub"
    for path in (ROOT / "notebooks").glob("0[1-7]_*.ipynb"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    nbformat.write(content, tmp_path / name)

    def counts(*options: str) -> list[int | None]:
        insert_exercises.main(["--folder", str(tmp_path), *options])
        after = nbformat.read(tmp_path / name, as_version=4).cells
        return [c.execution_count for c in after if c["id"] in ("exercise-0-1", "exercise-0-2")]

    assert counts() == [7, None]
    assert counts("--reset") == [None, None]


def test_inserting_keeps_what_is_filled_in_and_all_other_cells(tmp_path: Path, capsys) -> None:
    answer = "share = 0.75  # mine\n"
    notebook(tmp_path, {"2.1": answer, "0.1": "reward = {1: ...}  # an old stub"})
    insert_exercises.main(["--folder", str(tmp_path)])
    assert "2.1: filled in, kept" in capsys.readouterr().out
    cells = sheet.cells_of(tmp_path / "02_reasoning_traces.ipynb")
    assert sheet.answer_of(cells, "2.1") == answer
    assert sheet.answer_of(sheet.cells_of(tmp_path / "00_start_here.ipynb"), "0.1").startswith(
        "reward = {  #"
    )
    insert_exercises.main(["--folder", str(tmp_path), "--reset"])
    cells = sheet.cells_of(tmp_path / "02_reasoning_traces.ipynb")
    assert sheet.answer_of(cells, "2.1") == core.exercises()["2.1"].stub.strip()
    own = [cell for cell in cells if not insert_exercises.is_ours(cell)]
    original = sheet.cells_of(ROOT / "notebooks" / "02_reasoning_traces.ipynb")
    assert own == [cell for cell in original if not insert_exercises.is_ours(cell)]


def test_a_missing_place_is_named(tmp_path: Path) -> None:
    nb = nbformat.read(ROOT / "notebooks" / "02_reasoning_traces.ipynb", 4)
    nb.cells = [cell for cell in nb.cells if cell["id"] != "02-15"]
    exercise = core.exercises()["2.1"]
    with pytest.raises(ValueError, match="2.1 follows the cell '02-15', which 02_reasoning_traces"):
        insert_exercises.inserted(nb, [exercise], False)


KEYS = {"schema_version", "grade_id", "grade", "solution", "locked", "task"}


def test_the_cells_carry_what_nbgrader_asks_for(tmp_path: Path) -> None:
    notebook(tmp_path, {})
    for path in tmp_path.glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        nbformat.validate(nb)
        marked = [cell for cell in nb.cells if cell.metadata.get("nbgrader")]
        records = [cell.metadata["nbgrader"] for cell in marked]
        ids = [record["grade_id"] for record in records]
        assert len(ids) == len({*ids}) and all(re.fullmatch(r"[a-z0-9-]+", each) for each in ids)
        for cell, record in zip(marked, records, strict=True):
            assert record.keys() == KEYS | ({"points"} if record["grade"] else set())
            assert record["schema_version"] == 3 and cell["id"] == record["grade_id"]
            assert not (record["grade"] and record["solution"])
            assert record["locked"] != record["solution"]
        exercises = sum(each.notebook == path.stem for each in core.exercises().values())
        assert sum(record["solution"] for record in records) == exercises
        assert sum(record["grade"] for record in records) == exercises


HIDDEN = ("solutions", "tests/test_exercises.py", "tests/exercise_mistakes.yaml")


def test_a_student_copy_has_no_solutions() -> None:
    listed = subprocess.run(
        ["git", "check-attr", "export-ignore", *HIDDEN, "exercises"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert listed.stdout.splitlines() == [
        *(f"{path}: export-ignore: set" for path in HIDDEN),
        "exercises: export-ignore: unspecified",
    ]


def test_importing_the_checkers_is_light() -> None:
    code = "import sys, exercises; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
