"""Evaluate a model without training anything: majority class and TF-IDF stand in the same table.

    make evaluate MODEL=DATEXIS/DeepICD-R1-7B [PROMPT=their-prompt.csv] [DATA=/path/to/mimic-iv]

MODEL is a hub id, a folder with a model, or an adapter that names its base. It answers the test
cases of notebook 5, through that notebook's own cells, into `answers/<model>/` of the run folder;
notebook 6 will show it beside the course's models. What is there already is loaded; interrupted, it
goes on. Exit status 1, with a sentence, where something will not do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# The cells of notebook 5 that it takes to answer: settings, cases, sizes, baselines, others.
NOTEBOOK = "05_inference"
SETTINGS = "05-03"
CELLS = ("05-04", "05-04b", "05-06", "05-10", "05-10b", "05-11", "05-14", "05-23")
CONTAMINATED = (
    "These data are not the synthetic hospital's. If they are MIMIC-IV, this model may have been "
    "trained on these patients: the released DeepICD-R1 models were, and of others nobody knows. "
    "Then the score says what it remembers, not how well it reads."
)


def label_of(model: str) -> str:
    """What a model is called in the table: the last two parts of its path or hub id."""
    path = Path(model)
    parts = path.resolve().parts if path.is_dir() else path.parts
    return "-".join(filter(None, (part.strip("/") for part in parts[-2:])))


def run(model: str, prompt: str | None) -> None:
    """Answer and print the table. Raises ValueError and OSError for a model, a prompt file or data
    that will not do."""
    from helpers.machinery import artefacts, others, places, switches

    artefacts.why_stale("data")  # raises for a folder of the reader's without MIMIC's files
    profile, _ = switches.setup()
    if not places.is_synthetic():
        print(CONTAMINATED, flush=True)
    from helpers import models

    if prompt:
        others.read_prompt_file(prompt)
    models.resolve(model)  # a slip is named now, not after the notes are read
    other = {"base": model, "four_bit": profile.four_bit["grpo"]}
    if prompt:
        other["prompt"] = str(Path(prompt).absolute())
    label = label_of(model)
    answer({label: other})
    show(label)


def answer(others: dict[str, dict]) -> None:
    """Run the cells of notebook 5, with these models and none of the course's own."""
    from IPython.core.interactiveshell import InteractiveShell

    from helpers.machinery import places

    os.environ["ICD_HEADLESS"] = "1"  # progress in plain text
    os.environ["MPLBACKEND"] = "agg"
    file = places.notebooks_dir() / f"{NOTEBOOK}.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    sources = {cell["id"]: "".join(cell["source"]) for cell in cells}
    shell = InteractiveShell.instance(colors="NoColor")
    shell.showtraceback = lambda *given, **options: None  # the error is raised below
    setup = (
        "from helpers import course, profiles\nprofile, run = profiles.current(), course.run_dir()"
    )
    choice = f"own = False\nothers = {others!r}"
    for source in (setup, sources[SETTINGS], choice, *(sources[name] for name in CELLS)):
        result = shell.run_cell(source, silent=True)
        error = result.error_before_exec or result.error_in_exec
        if error:
            raise error


def show(label: str) -> None:
    """Print and keep the table of the models that have answered the same cases."""
    import pandas as pd

    from helpers import course, metrics
    from helpers.machinery import notebooks

    cases = pd.read_parquet(course.path("cases") / "cases.parquet")
    answers = course.load_answers()
    ids = set(answers[label]["hadm_id"])
    test = cases[cases["hadm_id"].isin(ids)].reset_index(drop=True)
    train_codes = cases.loc[cases["split"] == "train", "code"]
    reports = {}
    for name, table in answers.items():
        if set(table["hadm_id"]) != ids:
            continue
        gold, samples, patients = metrics.align(test, table)
        codes = [sample[0] for sample in samples]
        reports[name] = metrics.report(gold, codes, train_codes=train_codes, patients=patients)
    content = {"models": reports}
    course.write(course.run_dir() / "evaluation.json", content)
    notebooks.print_table(content)
    print(f"{len(test)} test cases of {test['subject_id'].nunique()} patients")
    print(f"Answers: {course.show(course.path(f'answers/{label}'))}")


def main() -> int:
    """The command line; 1 with a sentence where something will not do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id or a folder: a model, or an adapter")
    parser.add_argument("--prompt", help="a prompt file: CSV with the columns role,content")
    parser.add_argument("--data", help="a folder with MIMIC-IV's hosp/ and note/")
    chosen = parser.parse_args()
    if chosen.data:
        os.environ["ICD_DATA_DIR"] = str(Path(chosen.data).absolute())
    try:
        run(chosen.model, chosen.prompt)
    except (
        ValueError,
        OSError,
        AssertionError,
        ArithmeticError,
        MemoryError,
        RuntimeError,
    ) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
