"""What the notebooks left, looked at by `make test` after they ran under the offline guard with nbmake."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from helpers import course, plots
from helpers.machinery import artefacts, notebooks
from tests.atlas_fixture import Page

pytestmark = pytest.mark.notebooks


def test_no_socket_left_the_machine() -> None:
    record = os.environ.get("ICD_OFFLINE_RECORD")
    assert record, "the offline guard was not on: run `make test`"
    noted = Path(record).read_text() if Path(record).exists() else ""
    assert not noted, f"attempts to reach the network:\n{noted}"


ANSWERS = ("majority", "tfidf", "base", "sft", "grpo", "ideal", "grpo-samples", "sft-unquantised")
STAGES = [name for name in artefacts.NOTEBOOKS if name != "answers"]


@pytest.mark.parametrize("name", [*STAGES, *(f"answers/{model}" for model in ANSWERS)])
def test_every_artefact_is_whole_and_up_to_date(name: str) -> None:
    assert not course.why_stale(name), f"{name}: {course.why_stale(name)}"


def test_the_table_has_every_row_of_the_contract() -> None:
    header, rows = notebooks.table(notebooks.results())
    assert [row[0] for row in rows][:5] == [
        plots.long_label(model) for model in list(plots.MODELS)[:5]
    ]
    assert rows[-1][0] == plots.long_label("ideal")
    assert all("[" in cell for row in rows[:5] for cell in row[1:4]), "an interval is missing"
    assert all("classes" in cell for cell in header[1:4])


def test_the_report_holds_the_figures() -> None:
    page = notebooks.write_report().read_text(encoding="utf-8")
    figures = list((course.run_dir() / "figures").glob("*.png"))
    assert figures and page.count("data:image/png;base64,") == len(figures)


def test_the_report_links_the_atlas_and_the_atlas_shows_every_case_that_was_answered() -> None:
    assert 'href="atlas.html"' in notebooks.write_report().read_text(encoding="utf-8")
    page = Page(course.run_dir() / "atlas.html")
    answers = pd.read_parquet(course.run_dir() / "answers" / "sft" / "answers.parquet")
    assert sorted(page.numbers["cases"]["hadm_id"]) == sorted(answers["hadm_id"].unique())
    assert {"majority", "tfidf", "base", "sft", "grpo", "ideal"} <= set(page.columns)
