"""The exercises: each solution passes its checker, each usual mistake gets its own message, and nothing that a student
writes stops a notebook or the sheet."""

from __future__ import annotations

import json
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
    assert NUMBERS == list(SOLUTIONS)
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
    ("0.2", ' or rest.count("<diagnosis>") != rest.count("</diagnosis>")', ' or "<diagnosis>" not in rest', "was cut off"),
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
    ("2.2", "words = re.escape(\" \".join(finding.lower().split()))\n        is_denied = re.search(rf\"\\b(no|denies) {words}\", text)\n        is_stated = re.search(rf\"(?<!\\bno )(?<!\\bdenies ){words}\", text)\n        if is_denied and not is_stated", "if \"no \" + finding.lower() in text or 'denies ' + finding.lower() in text", "drop"),
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
    ("6.3", "if icd.chapter(code) == chapter", "if icd.chapter(answer) == chapter", "read the columns"),
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
