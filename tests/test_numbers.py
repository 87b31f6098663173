"""Each number in the prose is one that an output of its notebook prints, or has its source here.

Outputs are those that are committed. So a run with other numbers, once committed, fails by name
where the prose still says the old ones. What no output prints stands in prose_numbers.yaml: with
`is`, an expression that gives it, or with `source`, who says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
import pytest
import simple_icd_10_cm as cm
import yaml
from safetensors import safe_open

from helpers import casebook, icd, metrics, profiles, rewards, traces
from helpers.machinery import notebooks
from helpers.study import run as study
from tools import tiny_base

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
SHIPPED = ROOT / "results" / "synthetic-tiny"
SOURCES = yaml.safe_load(Path(__file__).with_name("prose_numbers.yaml").read_text("utf-8"))

# Exercises by test_exercises.py, the five diagrams by test_diagrams.py, the teacher further down
TESTED_ELSEWHERE = ("exercise-", "00-10a", "01-09a", "03-17a", "04-17a", "04-23b", "04-37b")

# What is no figure: code, links, pictures, tags; names with a number in them; years; references.
_SILENT = re.compile(
    r"```.*?```|`[^`]*`|!?\[[^\]]*\]\(attachment[^)]*\)|(?<=\])\([^)]*\)|<[^>]+>|\$[^$]*\$"
    r"|\b[Nn]otebooks?(?:\s+\d+(?:\s*(?:,|and|to|or|–)\s*\d+)*)|\[\d\d(?=[\]_])\]|\[notebook \d\]"
    r"|\bICD-\d+(?:-CM)?|\bMIMIC-I+V?|^#+ \d+ ·|\b(?:19|20)\d\d\b|\([0-7]\d\)"
    r"|\b[A-Z]\d\d(?:\.\w+)?\b|\b(?:section|chapter|part|step|Table|Figure) \d[\d.]*",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(?![\w]|[.,]\d)")
_PRINTED = re.compile(r"(?<![\w.])(\d*\.\d+|\d+)(?!\w|\.\d)")


class Figure(NamedTuple):
    """A number in the prose: as it is written, its cell, and the words around it."""

    written: str
    cell: str
    around: str

    @property
    def value(self) -> float:
        return float(self.written.replace(",", ""))

    @property
    def decimals(self) -> int:
        return len(self.written.partition(".")[2])

    def is_rounded(self, printed: float) -> bool:
        """Whether a number, or it as a percentage or a share, is this one when rounded."""
        ways = (printed, 100 * printed, printed / 100)
        return any(abs(way - self.value) <= 0.5000001 * 10**-self.decimals for way in ways)


def figures(text: str, cell: str = "") -> Iterator[Figure]:
    """The numbers in a text of Markdown."""
    text = _SILENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    for match in _NUMBER.finditer(text):
        around = " ".join(text[max(0, match.start() - 40) : match.end() + 30].split())
        yield Figure(match.group(1), cell, around)


def printed(text: str) -> list[float]:
    """The numbers in an output."""
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL)
    return [float(number) for number in _PRINTED.findall(text.replace(",", ""))]


@cache
def notebook(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


@cache
def outputs(name: str) -> tuple[float, ...]:
    numbers: set[float] = set()
    for cell in notebook(name).cells:
        for output in cell.get("outputs", ()):
            texts = [output.get("text", "")]
            data = output.get("data", {})
            texts += [data[kind] for kind in data if kind.startswith("text/")]
            for text in texts:
                numbers.update(printed(text if isinstance(text, str) else "".join(text)))
    return tuple(numbers)


def unproven(all_figures: Iterator[Figure], numbers: tuple[float, ...], name: str) -> list[str]:
    """The figures that neither the numbers nor prose_numbers.yaml hold, and what that file holds
    beside the truth."""
    problems = []
    known = {entry["number"]: entry for entry in SOURCES.get(name, [])}
    used = set()
    for figure in all_figures:
        entry = known.get(figure.written)  # first: another number may be equal to it by chance
        if entry is None:
            if any(figure.is_rounded(number) for number in numbers):
                continue
            problems.append(f"{figure.written} in cell {figure.cell}: … {figure.around} …")
            continue
        used.add(figure.written)
        if "is" in entry:
            value = evaluate(entry["is"])
            if not figure.is_rounded(value):
                problems.append(f"{figure.written}: {entry['is']} is {value} ({figure.around})")
    unused = [number for number in known if number not in used]
    return problems + [f"prose_numbers.yaml, {name}: {number} is not needed" for number in unused]


# --------------------------------------------------------- what prose_numbers.yaml may ask for


def table(path: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / path)


def record(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def log(stage: str, column: str) -> pd.Series:
    """A column of a shipped training log by step."""
    return table(f"results/synthetic-tiny/{stage}/training_log.csv").set_index("step")[column]


def finding(column: str, seed: int = 0) -> float:
    return table("results/study/findings.csv").set_index("seed").loc[seed, column]


def about(value: float, digits: int) -> float:
    """Rounded to so many significant digits."""
    return float(f"{value:.{digits - 1}e}")


@cache
def cases() -> pd.DataFrame:
    return pd.read_parquet(SHIPPED / "cases" / "cases.parquet")


def training_cases() -> pd.DataFrame:
    return cases()[cases()["split"] == "train"]


@cache
def answered(model: str) -> pd.DataFrame:
    answers = pd.read_parquet(SHIPPED / "answers" / model / "answers.parquet")
    return cases().merge(answers, on=["hadm_id", "subject_id"], validate="one_to_one")


def reached(model: str, level: str) -> float:
    """Percentage of a model's answers that are right at this level."""
    both = answered(model)
    codes = both["predicted"].tolist()
    gold = both["code"].tolist()
    scores = metrics.report(gold, codes, patients=both["subject_id"].tolist(), n_boot=2)
    return 100 * scores[level]["accuracy"]


def grounded(model: str) -> float:
    """Percentage of a model's answers whose reasoning cites nothing but the note."""
    both = answered(model)
    columns = [both[name].tolist() for name in ("completion", "code", "note")]
    share = rewards.grounding_reward(columns[0], columns[1], note=columns[2])
    return 100 * float(pd.Series(share).gt(0.99).mean())


def billable_codes() -> int:
    return sum(map(cm.is_leaf, cm.get_all_codes()))


def lora_parameters() -> int:
    """Of the tiny profile's adapter, counted in the shipped one."""
    with safe_open(SHIPPED / "sft" / "adapter_model.safetensors", framework="np") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in [*weights.keys()])


def labelled_notes() -> float:
    """How many notes followed by their code the tiny base has read."""
    kinds = tiny_base.KINDS["conference"]
    seen = table("helpers/tiny_base/training_log.csv").set_index("step")["documents"]
    early = seen[tiny_base.EARLY * 5000]
    return kinds[0] * early + kinds[1] * (seen.iloc[-1] - early)


def notes_a_step() -> int:
    """How many notes one step of GRPO sees, with the tiny profile."""
    grpo = profiles.get("tiny").grpo
    completions = grpo["per_device_train_batch_size"] * grpo["gradient_accumulation_steps"]
    return completions // grpo["num_generations"]


def printed_in(name: str, number: float) -> float:
    """A number that an output of another notebook prints."""
    assert any(Figure(str(number), "", "").is_rounded(value) for value in outputs(name)), name
    return number


def printed_in_file(path: str, number: float) -> float:
    assert str(number) in (ROOT / path).read_text(encoding="utf-8"), path
    return number


def printed_in_code(name: str, assignment: str) -> float:
    """A number that a setting of a notebook holds."""
    assert any(assignment in cell.source for cell in notebook(name).cells), name
    return float(assignment.rpartition("=")[2])


def evaluate(expression: str) -> float:
    """The value of an expression of prose_numbers.yaml."""
    names = {
        "casebook": casebook,
        "icd": icd,
        "profile": profiles.get("tiny"),
        "study": study,
        "traces": traces,
    }
    return float(eval(expression, globals() | names))


# ---------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_number_in_the_prose_of_a_notebook_has_its_source(name: str) -> None:
    all_figures = (
        figure
        for cell in notebook(name).cells
        if cell.cell_type == "markdown" and not cell.id.startswith(TESTED_ELSEWHERE)
        for figure in figures(cell.source, cell.id)
    )
    problems = unproven(all_figures, outputs(name), name)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/results.md", "docs/running.md", "docs/atlas.md"]
)
def test_every_number_of_a_page_has_its_source(page: str) -> None:
    """In an output of any notebook: so a number of two digits may be found by chance."""
    text = (ROOT / page).read_text(encoding="utf-8")
    numbers = tuple(number for name in NOTEBOOKS for number in outputs(name))
    problems = unproven(figures(text, page), numbers, page)
    assert not problems, "\n".join(problems)


def test_the_table_of_the_readme_is_that_of_the_shipped_run() -> None:
    header, rows = notebooks.table(record("results/synthetic-tiny/metrics.json"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for cells in [header, *rows]:
        assert f"| {' | '.join(cells)} |" in text, cells


def test_notebook_4_compares_with_the_teacher_on_the_same_notes() -> None:
    """The template teacher reads the shipped run's test notes; SFT and GRPO have answered them."""
    test = answered("grpo")
    gold = test["code"].tolist()
    teacher = traces.from_template(test)
    assert teacher["hadm_id"].tolist() == test["hadm_id"].tolist()
    codes = {
        "teacher": teacher["code"],
        "SFT": answered("sft")["predicted"],
        "GRPO": test["predicted"],
    }
    is_specific = test["code"].isin(traces.fallbacks())
    columns = [is_specific.notna(), is_specific, ~is_specific]
    [cell] = [cell.source for cell in notebook("04_qlora_grpo").cells if cell.id == "04-37b"]
    sizes = [f"{column.sum():,}" for column in columns]
    assert (
        f"| | all {sizes[0]} notes | {sizes[1]} with a specific code | {sizes[2]} others |" in cell
    )
    for name, predicted in codes.items():
        is_right = predicted == test["code"]
        shares = [f"{100 * is_right[column].mean():.1f}" for column in columns]
        assert f"| {name} | {' | '.join(shares)} |" in cell, (name, shares)
    patients = test["subject_id"].tolist()
    difference = metrics.compare(
        gold, codes["teacher"].tolist(), codes["GRPO"].tolist(), patients=patients
    )["full"]
    points = [100 * share for share in (difference["accuracy"], *difference["accuracy_ci"])]
    written = "{:.1f} points [{:.1f}, {:.1f}]".format(*points).replace("-", "−")
    assert f"GRPO minus teacher is {written} (95 % interval)" in cell, written
    cell = cell.replace(written, "").partition("|---|---|---|---|")[2]
    rest = [figure.written for figure in figures(cell[cell.index("**") :])]
    assert rest == ["95"], f"numbers that nothing here compares: {rest}"


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_is_read_in_twenty_minutes(path: Path) -> None:
    cells = notebook(path.stem).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    most = 1900 if path.stem == "07_reward_ablation" else 2000
    assert len(" ".join(texts).split()) <= most


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Of 1,070 cases 43 % are wrong, .612 of them at I21.4.", ["1,070", "43", ".612"]),
        ("Notebook 7 and notebooks 3, 4 and 5 say so (Shao et al. 2024).", []),
        ("`lr=3` and [the 5 rules](docs/x5.md) in section 4.1 of ICD-10-CM", ["5"]),
        ("# 8 · Real notes", []),
    ],
)
def test_what_counts_as_a_number(text: str, found: list[str]) -> None:
    assert [figure.written for figure in figures(text)] == found


def test_a_number_is_that_of_an_output_if_it_is_rounded_so_or_a_percentage_of_it() -> None:
    half = Figure("43", "", "")
    assert half.is_rounded(0.4321) and half.is_rounded(43.4) and not half.is_rounded(0.44)
    assert Figure(".61", "", "").is_rounded(61.2) and not Figure(".61", "", "").is_rounded(0.62)
    problems = unproven(figures("It is 12 % of 7."), (0.123,), "none")
    assert len(problems) == 1 and problems[0].startswith("7 in cell")
