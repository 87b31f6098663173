"""An invented run: a synthetic hospital, its cases, and answers in the course's form with errors;
and a reader of an atlas."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import hospital, icd, mimic, prompts, traces
from helpers.machinery import store

# model -> (share of answers for the note of another case, of the fallback, of broken form)
RATES = {
    "base": (0.0, 0.0, 1.0),
    "sft": (0.22, 0.6, 0.02),
    "grpo": (0.18, 0.3, 0.01),
    "sft-constrained": (0.2, 0.5, 0.0),
    "grpo-constrained": (0.15, 0.2, 0.0),
    "other": (0.4, 0.1, 0.05),
}


def invented_run(
    folder: Path, *, admissions: int = 600, test: int = 150, models: int = 3, seed: int = 0
) -> tuple[Path, Path]:
    """Writes folder/synthetic and folder/runs/synthetic-tiny; returns (run, data)."""
    data = hospital.write(folder / "synthetic", admissions=admissions, seed=seed)
    cases = mimic.build_cases(data, seed=seed)
    cases["split"] = np.where(np.arange(len(cases)) < test, "test", "train")
    run = folder / "runs" / "synthetic-tiny"
    keep(run / "cases", cases, "cases.parquet")
    for model, table in answers(cases[cases["split"] == "test"], models, seed).items():
        keep(run / "answers" / model, table)
    return run, data


def keep(folder: Path, table: pd.DataFrame, name: str = "answers.parquet") -> Path:
    """A whole artefact that holds one table."""
    job = store.artefact(folder, {"invented": True}, fresh=True)
    table.to_parquet(job.part / name)
    return job.finish()


def answers(cases: pd.DataFrame, models: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    rows = list(cases.itertuples())
    careful = [traces.template_teacher(row.note, "", habit=0.0) for row in rows]
    lazy = [traces.template_teacher(row.note, "", habit=1.0) for row in rows]
    rng = np.random.default_rng(seed)
    tables = {}
    for model in list(RATES)[:models]:
        wrong, fallback, broken = RATES[model]
        answered = []
        for i, row in enumerate(rows):
            think, code = lazy[i] if rng.random() < fallback else careful[i]
            if rng.random() < wrong:
                think, code = careful[rng.integers(len(rows))]
            text = prompts.answer(think, code)
            if rng.random() < broken:
                text, code = f"{think}\nIt may be {code} or not", None
            answered.append(answer(row, text, code))
        tables[model] = pd.DataFrame(answered)
    return tables


def answer(case: Any, completion: str, code: str | None) -> dict[str, Any]:
    """A row of a table of predictions."""
    return {
        "subject_id": case.subject_id,
        "hadm_id": case.hadm_id,
        "sample": 0,
        "completion": completion,
        "think": prompts.parse(completion).think,
        "predicted": icd.normalise(code),
    }


class Page(HTMLParser):
    """The tags of a page and what stands in its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        blocks = [content for attributes, content in self.scripts if "type" in attributes]
        self.numbers = json.loads(blocks[0])
        self.cases = [case for block in blocks[1:] for case in json.loads(block)]
        self.columns = {column["key"]: column for column in self.numbers["columns"]}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
