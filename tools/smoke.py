"""A smoke test: every stage with 40 cases and 2 steps, on the reader's own data, model and device.

    make smoke

It runs the notebooks' own cells, up to where each has made its artefact, in a run folder of its own
(`<data>-<profile>-smoke`, made anew each time): the runs of the course are not touched. Only the
table of cases is made in full. At the end it says what the full run will take, at the rates that it
measured. Exit status 1, with a sentence, for a data folder or a device that will not do, and where
a cell fails.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from helpers import profiles, teachers
from helpers.machinery import artefacts, notebooks, places

FEW = {"train": 24, "val": 8, "test": 8}
FIRST = "01_data_preparation"
TRACES = "02_reasoning_traces"
ANSWERS = "05_inference"
LAST = "06_hierarchical_f1_analysis"
MAKING = (".finish()", "course.answers(")  # in a cell that makes an artefact
LEAST_GB = {**profiles.LEAST_GB, "paper": 70}  # GiB of the card that a profile is for
RATES: dict[str, float] = {}  # seconds for each of the "answers", or "rows" of training
SPENT: list[float] = []  # seconds that went into them

BEFORE = (
    f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport smoke\nsmoke.watch()"
)
CAVEAT = """\
Measured with whatever else runs on this machine. A model that has seen 2 steps seldom ends its
answers: a trained one is quicker. Long notes that are
not among the 40 need more memory: notebook 0 has an estimate for the longest. Not in the table: the
download of the base, TF-IDF on all training notes, checkpoints, and the export of notebook 6 (the
base in 16 bits)."""


# ------------------------------------------------------------------------------------ in a notebook


def watch() -> None:
    """Measure from now on how long an answer and a row of training take: an answer in a batch as
    full as the full run's, a row in the last step."""
    from helpers import inference, teachers, training

    inference.predict = _watched_predict(inference.predict)
    teachers._from_server = _watched_server(teachers._from_server)
    training.run = _watched_training(training.run)


def _watched_predict(predict: Callable) -> Callable:
    def watched(
        model: Any, tokenizer: Any, cases: pd.DataFrame, profile: Any = None, **options: Any
    ) -> pd.DataFrame:
        start = time.monotonic()
        answers = predict(model, tokenizer, cases, profile, **options)
        if "answers" not in RATES and len(cases):
            samples = options.get("samples", 1)
            in_force = profile or profiles.current()
            size = options.get("batch_size") or in_force.batch_size(samples)
            batch = pd.concat([cases] * -(-size // len(cases)), ignore_index=True).head(size)
            again = options | {"batch_size": size, "keep": None, "label": ""}
            begin = time.monotonic()
            predict(model, tokenizer, batch, profile, **again)
            RATES["answers"] = (time.monotonic() - begin) / (size * samples)
        SPENT.append(time.monotonic() - start)
        return answers

    return watched


def _watched_server(from_server: Callable) -> Callable:
    def watched(server: Any, model: Any, dialogues: dict, *rest: Any) -> list[str]:
        start = time.monotonic()
        replies = from_server(server, model, dialogues, *rest)
        SPENT.append(time.monotonic() - start)
        RATES["answers"] = SPENT[-1] / max(1, len(dialogues))
        return replies

    return watched


def _watched_training(run: Callable) -> Callable:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds = 0.0  # of the last step

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begin = time.monotonic()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = time.monotonic() - self.begin
            SPENT.append(self.seconds)

    def watched(trainer: Any, *rest: Any) -> None:
        clock = Clock()
        trainer.add_callback(clock)
        run(trainer, *rest)
        arguments = trainer.args
        size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        most = len(trainer.train_dataset) * getattr(arguments, "num_generations", 1)
        RATES["rows"] = clock.seconds / min(size, most)

    return watched


def note(notebook: str) -> None:
    """Write down the rates and the peak of memory so far, in GB of 1e9 bytes."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved()
    content = {"rates": RATES, "spent": sum(SPENT), "peak": peak / 1e9}
    places.write(notes() / f"{notebook}.json", content)


def notes() -> Path:
    """Where the notebooks of a smoke test write down what they measure."""
    return places.run_dir() / "smoke"


def keep_few(cases: pd.DataFrame) -> None:
    """Note how many cases there are, and put 40 in the place of all."""
    most = profiles.current().inference["cases"]
    test = cases[cases["split"] == "test"]
    test = test.sample(min(most or len(test), len(test)), random_state=0)  # as notebook 5 does
    full = cases["split"].value_counts().to_dict() | {"tested": len(test)}
    full |= {name: test[name].nunique() for name in ("subject_id", "chapter", "category", "code")}
    places.write(notes() / "full.json", full | {"gb": gb("cases")})
    few = []
    for split, number in FEW.items():
        part = cases[cases["split"] == split]
        few.append(part.sample(min(number, len(part)), random_state=0))
    job = artefacts.artefact("cases", {"few": FEW}, ["data"])
    pd.concat(few, ignore_index=True).to_parquet(job.part / "cases.parquet")
    job.finish()


def gb(*names: str) -> float:
    """Size of artefacts on the disk."""
    files = [file for name in names for file in artefacts.path(name).rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


# -------------------------------------------------------------------------------- what it will take


def wanted(profile: profiles.Profile, full: dict[str, Any], kept: float) -> dict[str, dict]:
    """Notebook -> how many answers and rows of training the full run of a profile makes.

    full: cases in each split, and those that are tested; kept: the share of traces that are kept.
    The numbers are those of the notebooks' cells.
    """
    traced = profile.traces_share * full["train"]
    rollouts = profile.grpo["num_generations"]
    looks = min(128, full["val"])
    rows = {}
    for stage, size in (("sft", traced * kept), ("grpo", full["train"] * rollouts)):
        arguments = getattr(profile, stage)
        step = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        rows[stage] = size * arguments["num_train_epochs"]
        if arguments["max_steps"] > 0:
            rows[stage] = step * arguments["max_steps"]
    watched = (rows["grpo"] / step // 25 + 2) * min(256, full["val"])
    constrained = min(profile.inference["constrained_cases"], full["tested"])
    sampled = 5 * min(150, full["tested"])
    return {
        TRACES: {"answers": traced + looks},
        "03_lora_sft": {"answers": 2 * looks, "rows": rows["sft"]},
        "04_qlora_grpo": {"answers": 24 * rollouts + watched + looks, "rows": rows["grpo"]},
        ANSWERS: {"answers": 3 * full["tested"] + 4 * constrained + sampled},
    }


def forecast(profile: profiles.Profile) -> pd.DataFrame:
    """For each notebook what was measured, and hours and GB of the full run of `profile`."""
    full = places.read(notes() / "full.json")
    kept = pd.read_parquet(artefacts.path("traces") / "traces.parquet")["kept"].mean()
    amounts = wanted(profile, full, kept)
    table = {}
    for notebook in notebooks.names():
        record = places.read(notes() / f"{notebook}.json")
        took = places.read(places.run_dir() / "notebooks" / f".{notebook}.json")["seconds"]
        hours = (took - record["spent"]) / 3600  # loading, drawing and the like: as here
        disk = gb(*notebooks.makes(notebook))
        measured = []
        for what, rate in record["rates"].items():
            amount = amounts[notebook][what]
            hours += rate * amount / 3600
            measured.append(f"{rate:.3g} s x {amount:,.0f} {what}")
        if notebook in (TRACES, ANSWERS):  # tables grow, adapters do not
            disk *= amounts[notebook]["answers"] / sum(FEW.values())
        table[notebook] = {
            "measured rate x full run": ", ".join(measured) or "as measured here",
            "hours": f"{hours:.2f}",
            "memory GB": f"{record['peak']:.1f}",
            "disk GB": f"{full['gb'] if notebook == FIRST else disk:.3f}",
        }
    return pd.DataFrame(table).T


def contents(profile: profiles.Profile) -> str:
    """What will be in the table of the full run, in words."""
    full = places.read(notes() / "full.json")
    models = "majority class, TF-IDF, the base, SFT, SFT + GRPO"
    if places.is_synthetic():
        models += ", the ideal reader"
    return (
        f"In the table: {models}, on {full['tested']:,} test cases of {full['subject_id']:,} "
        f"patients; macro-F1 over {full['chapter']} chapters, {full['category']} categories and "
        f"{full['code']} full codes, with 95 % intervals. Traces by the teacher "
        f"{profile.teacher!r}, for {profile.traces_share:.0%} of {full['train']:,} training cases."
    )


# -------------------------------------------------------------------------------------- the command


def check(profile: profiles.Profile) -> None:
    """Refuse, before anything is made, what cannot end well."""
    artefacts.why_stale("data")  # raises for a folder of the reader's without MIMIC's files
    if artefacts.is_readers_own(places.data_dir()):
        teachers.check_teacher(profile.teacher)
    least = LEAST_GB.get(profile.name, 0)
    card = profiles.gpu_gb() or 0
    if card < least:
        there = f"has {card:.0f}" if card else "was not found"
        raise ValueError(
            f"profile {profile.name!r} is for a GPU of {least} GiB or more: a card that torch can "
            f"use {there}. Choose another profile (ICD_PROFILE=tiny runs anywhere)."
        )


def cut(notebook: str, folder: Path) -> None:
    """Write a copy of a notebook that stops once its artefact is made, and measures."""
    content = nbformat.read(places.notebooks_dir() / f"{notebook}.ipynb", as_version=4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    cells = [cell for cell in code if not cell.id.startswith(("exercise-", "expectation-"))]
    after = f"smoke.note({notebook!r})"
    if notebook == FIRST:
        after = f"smoke.keep_few(cases)\n{after}"
    else:
        making = [i for i, cell in enumerate(cells) if any(mark in cell.source for mark in MAKING)]
        cells = cells[: making[-1] + 1]
    cells.insert(1, nbformat.v4.new_code_cell(BEFORE))
    content.cells = [*cells, nbformat.v4.new_code_cell(after)]
    nbformat.write(content, folder / f"{notebook}.ipynb")


def run() -> None:
    """The whole smoke test; prints its table. Raises as `check`, SystemExit where a cell fails."""
    profile = profiles.current()
    check(profile)
    originals = [name for name in notebooks.names() if FIRST <= name <= LAST]
    os.environ["ICD_PROFILE"] = f"{profile.name}-smoke"
    folder = places.run_dir()
    shutil.rmtree(folder, ignore_errors=True)
    places.check_room(folder)
    (folder / "cut").mkdir()
    for name in originals:
        cut(name, folder / "cut")
    os.environ["ICD_NOTEBOOKS_DIR"] = str(folder / "cut")
    print(f"smoke test: 40 cases, 2 steps, in {places.show(folder)}\n{places.NOTICE}", flush=True)
    display = notebooks.Display(originals)
    for name in originals:
        notebooks.execute(name, display)
    table = forecast(profile)
    hours = table["hours"].astype(float).sum()
    print(f"\nWhat the full run of profile {profile.name} will take here:\n\n{table.to_string()}\n")
    print(f"About {hours:.1f} hours in all. {contents(profile)}\n\n{CAVEAT}")
    places.write(folder / "forecast.csv", table.to_csv())


def main() -> int:
    """The command line; 1 with a sentence where something will not do."""
    try:
        run()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
