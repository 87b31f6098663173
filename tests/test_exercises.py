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

# (exercise, what stands in the solution, the mistake in its place, what the message says)
MISTAKES = [
    ("0.1", '("A41.9", "B34.9"): 0.15', '("A41.9", "B34.9"): 0', "first letter for the chapter"),
    ("0.1", '("H65.00", "H54.0"): 0', '("H65.00", "H54.0"): 0.15', "two chapters"),
    ("0.1", '"I21.01ZZ"): -0.5', '"I21.01ZZ"): 0', "not merely wrong"),
    ("0.1", '"I21.01ZZ"): -0.5', '"I21.01ZZ"): 0.4', "for codes that exist"),
    ("0.1", '"I21"): 0.4', '"I21"): -0.5', "I21 is a header"),
    ("0.1", '"J18.9"): 0', '"J18.9"): -0.5', "wrong, but usable"),
    ("0.1", '"I50.1"): 0.15', '"I50.1"): 0.4', "another category"),
    ("0.1", '"I21.01"): 0.4', '"I21.01"): 0.5', "only these values"),
    ("0.1", '"I21.01"): 0.4', '"I21.01"): "0.4"', "must be one number"),
    ("0.1", '"I21.01"): 0.4', '"I21.01"): ...', "still stands at"),
    ("0.2", "codes.pop() if len(codes) == 1 else None", "icd.normalise(answers[0]) if answers else None", "Do not take the first one"),
    ("0.2", "codes.pop() if len(codes) == 1 else None", "icd.normalise(answers[-1]) if answers else None", "Do not take the last one"),
    ("0.2", 'text.partition("</think>")', '"", True, text', "is a thought"),
    ("0.2", "icd.normalise(answer) for", "answer for", "same code. Use icd.normalise"),
    ("0.2", "icd.normalise(answer) for", 'answer.replace(".", "") for', "word is no code"),
    ("0.2", '(.*?)</diagnosis>"', '(.*?)(?:</diagnosis>|$)"', "was cut off"),
    ("1.1", '"medications": True', '"medications": False', "took these at home"),
    ("1.1", '"procedure": False', '"procedure": True', "stands early"),
    ("1.1", '"results": False', '"results": True', "chosen at the end"),
    ("1.1", '"exam": True', '"exam": "yes"', "write True or False"),
    ("1.2", "patients[split == \"test\"].isin(known).mean()", "len(known & set(patients[split == \"test\"])) / patients[split == \"test\"].nunique()", "You count patients"),
    ("1.2", 'set(patients[split == "train"])', 'set(patients[split != "test"])', "outside the test split"),
    ("1.2", 'patients[split == "test"].isin(known).mean()', 'patients[split == "train"].isin(set(patients[split == "test"])).mean()', "count the training cases"),
    ("1.2", "np.random.default_rng(seed).permutation(len(cases))", "np.arange(len(cases))", "Shuffle the rows first"),
    ("1.2", "default_rng(seed)", "default_rng()", "same seed gives another split"),
    ("1.2", "default_rng(seed)", "default_rng(7)", "Another seed gives the same split"),
    ("1.2", "round(0.7 * len(cases))", "round(0.5 * len(cases))", "asked are 70%"),
    ("1.2", "    return split\n", "    code = {p: s for p, s in zip(cases['subject_id'], split)}\n    return [code[p] for p in cases['subject_id']]\n", "You split by patient"),
    ("1.3", "base.\nBrief", "base.\n\nBrief", "stops at the first blank line"),
    ("1.3", 'secret = "Treated for pneumonia"', 'secret = "Crackles"', "keeps the secret too"),
    ("1.3", 'secret = "Treated for pneumonia"', 'secret = "neumonia"', "2 times"),
    ("1.3", "Physical Exam:\n", "Physical Exam: ", "finds no exam"),
    ("1.3", 'secret = "Treated for pneumonia"', 'secret = "removal of the clot"', "the notebook's own"),
    ("2.1", "share = falls_back.sum() / (joined[\"code_teacher\"] != joined[\"code\"]).sum()", "share = falls_back[joined['code'].isin(traces.fallbacks())].mean()", "how often the habit strikes"),
    ("2.1", "share = falls_back.sum() / (joined[\"code_teacher\"] != joined[\"code\"]).sum()", "share = falls_back.mean()", "Divide by the wrong ones"),
    ("2.1", "share = falls_back.sum() / (joined[\"code_teacher\"] != joined[\"code\"]).sum()", "share = falls_back[joined['code'].isin(traces.fallbacks())].mean() * (joined['code_teacher'] != joined['code']).mean()", "different bases"),
    ("2.1", "share = falls", "share = 1 - falls", "share of the other errors"),
    ("2.1", "share = falls", "share = 100 * falls", "You give percent"),
    ("2.2", " and not is_stated", "", "denied somewhere"),
    ("2.2", r'rf"\b(no|denies) {words}"', r'rf"\b(no) {words}"', "also say 'denies'"),
    ("2.2", "words = re.escape(\" \".join(finding.lower().split()))\n        is_denied = re.search(rf\"\\b(no|denies) {words}\", text)\n        is_stated = re.search(rf\"(?<!\\bno )(?<!\\bdenies ){words}\", text)\n        if is_denied and not is_stated", "words = re.escape(\" \".join(finding.lower().split()))\n        if re.search(rf\"\\b(no|denies)\\b.*{words}\", text)", "reaches too far"),
    ("2.2", "words = re.escape(\" \".join(finding.lower().split()))\n        is_denied = re.search(rf\"\\b(no|denies) {words}\", text)\n        is_stated = re.search(rf\"(?<!\\bno )(?<!\\bdenies ){words}\", text)\n        if is_denied and not is_stated", "if \"no \" + finding.lower() in text or 'denies ' + finding.lower() in text", "'no' ends another word"),
    ("2.2", "return True", "return False", "drops nothing"),
    ("3.1", "2 * 64)", "4 * 64)", "grouped-query"),
    ("3.1", "trainable = 4 * r", "trainable = r", "one layer"),
    ("3.1", " + mlp)", ")", "attention only"),
    ("3.1", "3 * (256 + 704)", "2 * (256 + 704)", "gate, up and down"),
    ("3.1", "trainable = 4 * r * (q_and_o + k_and_v + mlp)", "trainable = 4 * r * (2 * 256 + 2 * 256 + 2 * 256 + 704)", "A only"),
    ("3.1", "trainable = 4 * r * (q_and_o + k_and_v + mlp)", "trainable = 4 * (2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 704)", "frozen matrices"),
    ("3.2", "logits[:, :-1]", "logits[:, 1:]", "at the same place"),
    ("3.2", "is_completion[:, 1:]", "is_completion[:, :-1]", "moves with the tokens"),
    ("3.2", "of_tokens[is_completion[:, 1:]]", "of_tokens", "prompt and the padding"),
    ("3.2", "].mean()", "].sum()", "That is the sum"),
    ("3.2", "return -of_tokens[is_completion[:, 1:]].mean()", "return -np.mean([t[m].mean() for t, m in zip(of_tokens, is_completion[:, 1:])])", "average each row first"),
    ("3.2", "return -of", "return of", "The sign"),
    ("4.1", "[1.5, -0.5, -0.5, -0.5],  # mean 0", "[1.73, -0.58, -0.58, -0.58],  # mean 0", "ddof=1"),
    ("4.1", "[1.5, -0.5, -0.5, -0.5],  # mean 6", "[15, -5, -5, -5],  # mean 6", "cancels"),
    ("4.1", "[1.5, -0.5, -0.5, -0.5],  # mean 0", "[0.45, -0.15, -0.15, -0.15],  # mean 0", "divide by the standard deviation"),
    ("4.1", '"flat": [0, 0, 0, 0]', '"flat": [0.5, 0.5, 0.5, 0.5]', "measured against the group"),
    ("4.1", '"flat": [0, 0, 0, 0]', '"flat": [0, 0, 0]', "must be 4 numbers"),
    ("4.2", "rewards.append(-0.5)", "rewards.append(0.0)", "get −0.5"),
    ("4.2", "not icd.is_valid(predicted)", "predicted is None", "does not exist"),
    ("4.2", ' "block": 0.25,', "", "block never pays"),
    ("4.2", "    return rewards\n", "    return rewards[0]\n", "list of two numbers"),
    ("4.2", ", **columns: object", "", "TypeError"),
    ("4.2", "rewards.append(credit[shared[0]] if shared else 0.0)", "letter = 0.15 if predicted[0] == gold[0] else 0.0\n            rewards.append(credit[shared[0]] if shared and shared[0] != 'chapter' else letter)", "first letter for the chapter"),
    ("4.3", "p**n + (1 - p) ** n", "p**n", "all wrong is flat"),
    ("4.3", "np.mean(p**n + (1 - p) ** n)", "np.mean(p)**n + (1 - np.mean(p)) ** n", "average p first"),
    ("4.3", "return np", "return 1 - np", "groups with spread"),
    ("5.1", "40 / 140", "(30 / 80 + 10 / 60) / 2", "average the shares"),
    ("5.1", "40 / 140", "60 / 160", "longest of all"),
    ("5.1", "40 / 140", "40 / 100", "notes' own tokens"),
    ("5.1", "20 / 120", "100 / 120", "useful tokens"),
    ("5.1", "20 / 120", "40 / 140", "wrong way round"),
    ("5.2", "    return characters\n", "    return characters - {'<'} or characters\n", "beginning of another one"),
    ("5.2", "            characters.add(\"<\")\n", "            pass\n", "never ends"),
    ("5.2", "characters.add(code[len(prefix)])", "characters.add(code[len(prefix):])", "next character only"),
    ("5.2", "    return characters\n", "    return characters | {'<'}\n", "allow the end everywhere"),
    ("5.2", "    return characters\n", "    return characters or {'<'}\n", "an empty set"),
    ("5.2", "characters.add(code[len(prefix)])", "characters.add(code[len(prefix) + 5])", "IndexError"),
    ("6.1", '"f1_gold": 1.467 / 4', '"f1_gold": 0.5', "That is the accuracy"),
    ("6.1", '"f1_gold": 1.467 / 4', '"f1_gold": 1.667 / 4', "leave out the case"),
    ("6.1", '"f1_gold": 1.467 / 4', '"f1_gold": 1.467 / 3', "classes that were predicted"),
    ("6.1", '"f1_gold": 1.467 / 4', '"f1_gold": 1.467 / 6', "That is f1_union"),
    ("6.1", '"f1_gold": 1.467 / 4', '"f1_gold": 6 / 11', "micro-F1"),
    ("6.1", '"f1_gold": 1.467 / 4', '"f1_gold": (3 * 0.8 + 0.667) / 6', "weight the classes"),
    ("6.1", '"f1_union": 1.467 / 6', '"f1_union": 1.467 / 5', "One class is missing"),
    ("6.1", '"f1_union": 1.467 / 6', '"f1_union": 1.467 / 4', "That is f1_gold"),
    ("6.2", "gain.groupby(patients)", "gain.groupby(np.arange(len(gain)))", "resample cases"),
    ("6.2", "[0.025, 0.975]", "[0.05, 0.95]", "90 % interval"),
    ("6.2", "[0.025, 0.975]", "[0.16, 0.84]", "one standard error"),
    ("6.2", "right_b, right_a", "right_a, right_b", "sign is turned"),
    ("6.2", "gain.mean() + np", "np", "lies around"),
    ("6.2", "rng.permutation(len(of_patient))[: len(of_patient) // 2]", "rng.permutation(len(of_patient))", "interval is a point"),
    ("6.2", "return low, high", "return 100 * low, 100 * high", "you give points"),
    ("6.2", "return low, high", "return high, low", "above the upper end"),
    ("6.2", "total / cases)", "0)\n    a = pd.Series(np.array(right_a, float)).groupby(patients).agg(['sum', 'count']).to_numpy()\n    b = pd.Series(np.array(right_b, float)).groupby(patients).agg(['sum', 'count']).to_numpy()\n    differences = []\n    for _ in range(1000):\n        x, y = (rng.permutation(len(a))[: len(a) // 2] for _ in range(2))\n        (s, n), (t, m) = a[x].sum(0), b[y].sum(0)\n        differences.append(t / m - s / n)", "resample the two models apart"),
    ("6.3", "icd.chapter(answer) for code, answer in pairs if icd.chapter(code) == chapter", "icd.chapter(code) for code, answer in pairs if icd.chapter(answer) == chapter", "read the columns"),
    ("6.3", "most / len(named)", "most / sum(x != chapter for x in named)", "chapter's errors"),
    ("6.3", "most / len(named)", "most / len(gold)", "divide by all cases"),
    ("6.3", "most / len(named)", "most / sum(x is not None for x in named)", "without a usable answer"),
    ("7.1", '"loses more than 2 points": 1', '"loses more than 2 points": 4', "more than two points"),
    ("7.1", '"loses more than 2 points": 1', '"loses more than 2 points": 0', "full code"),
    ("7.1", '"gains": 1', '"gains": 5', "full code"),
    ("7.1", '"gains": 1', '"gains": 0', "judge the mean"),
    ("7.2", "stats.t.ppf(0.975, len(points) - 1)", "1.96", "You use 1.96"),
    ("7.2", "ddof=1", "ddof=0", "divides by 5"),
    ("7.2", "len(points) ** 0.5", "len(points)", "divide by 5"),
    ("7.2", " / len(points) ** 0.5", "", "next seed"),
    ("7.2", "0.975", "0.95", "leave 5 %"),
    ("7.2", '"chapter", "per_seed"', '"full", "per_seed"', "full code"),
    ("7.2", "100 * np.array", "np.array", "points, not shares"),
    ("7.3", "(len(p) - rank)", "len(p)", "Bonferroni"),
    ("7.3", "max(largest, min(1.0, p[place] * (len(p) - rank)))", "min(1.0, p[place] * (len(p) - rank))", "running maximum"),
    ("7.3", "min(1.0, p[place] * (len(p) - rank))", "p[place] * (len(p) - rank)", "above 1"),
    ("7.3", "return corrected", "return sorted(corrected)", "in sorted order"),
    ("7.3", "return corrected", "return p", "as they are"),
]  # fmt: skip


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
    monkeypatch.setenv("ICD_EXERCISE_SECONDS", "40")
    assert sheet.main([]) == 0
    text = (run / "exercises.md").read_text(encoding="utf-8")
    assert "# Exercises: Ada Lovelace" in text
    assert f"4 of {len(NUMBERS)} filled in, 1 right, 1 of " in text
    assert all(f"| {number} | {core.exercises()[number].title} |" in text for number in NUMBERS)
    assert "| 5.1 | Padding on paper | 5 | **right** | 1 of 1 |" in text
    assert "grouped-query attention" in text and "trainable = 630_784" in text
    assert "stopped after 40 seconds" in text and "ZeroDivisionError" in text
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


def test_a_student_copy_has_no_solutions() -> None:
    listed = subprocess.run(
        ["git", "check-attr", "export-ignore", "solutions", "tests/test_exercises.py", "exercises"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert listed.stdout.splitlines() == [
        "solutions: export-ignore: set",
        "tests/test_exercises.py: export-ignore: set",
        "exercises: export-ignore: unspecified",
    ]


def test_importing_the_checkers_is_light() -> None:
    code = "import sys, exercises; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
