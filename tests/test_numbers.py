"""Each number in the prose is one that an output of its notebook prints, or has its source here.

Outputs are those that are committed. So a run with other numbers, once committed, fails by name
where the prose still says the old ones. What no output prints stands in prose_numbers.yaml: with
`is`, an expression that gives it, or with `source`, who says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
import pytest
import yaml

from helpers import casebook, course, icd, profiles, traces

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
SOURCES = yaml.safe_load(Path(__file__).with_name("prose_numbers.yaml").read_text("utf-8"))

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
        if any(figure.is_rounded(number) for number in numbers):
            continue
        entry = known.get(figure.written)
        if entry is None:
            problems.append(f"{figure.written} in cell {figure.cell}: … {figure.around} …")
            continue
        used.add(figure.written)
        if "is" in entry:
            value = evaluate(entry["is"])
            if not figure.is_rounded(value):
                problems.append(f"{figure.written}: {entry['is']} is {value} ({figure.around})")
    unused = [number for number in known if number not in used]
    return problems + [f"prose_numbers.yaml, {name}: {number} is not needed" for number in unused]


def evaluate(expression: str) -> float:
    """The value of an expression of prose_numbers.yaml."""

    def table(path: str) -> pd.DataFrame:
        return pd.read_csv(ROOT / path)

    def record(path: str) -> Any:
        return json.loads((ROOT / path).read_text(encoding="utf-8"))

    scope = {
        "casebook": casebook,
        "course": course,
        "icd": icd,
        "pd": pd,
        "profile": profiles.get("tiny"),
        "profiles": profiles,
        "record": record,
        "table": table,
        "traces": traces,
    }
    return float(eval(expression, scope))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_number_in_the_prose_of_a_notebook_has_its_source(name: str) -> None:
    cells = [cell for cell in notebook(name).cells if cell.cell_type == "markdown"]
    all_figures = (figure for cell in cells for figure in figures(cell.source, cell.id))
    problems = unproven(all_figures, outputs(name), name)
    assert not problems, "\n".join(problems)


def test_every_number_in_the_readme_has_its_source() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = tuple(number for name in NOTEBOOKS for number in outputs(name))
    problems = unproven(figures(text, "README"), numbers, "README")
    assert not problems, "\n".join(problems)


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
