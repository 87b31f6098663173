"""The smoke test: what it refuses, what it measures and counts, and, slow, the whole of it on a small hospital."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from helpers import hospital, profiles
from helpers.machinery import notebooks
from tests import mimic_fixture as fixture
from tools import smoke


def test_a_smoke_profile_differs_in_its_steps_and_has_a_run_folder_of_its_own(
    places: Path, monkeypatch
) -> None:
    for name in profiles.PROFILES:
        small, whole = profiles.get(f"{name}-smoke"), profiles.get(name)
        assert small.sft["max_steps"] == small.grpo["max_steps"] == 2
        again = small.replace(
            name=name, traces_share=whole.traces_share, sft=whole.sft, grpo=whole.grpo
        )
        assert again.record("sft") == whole.record("sft") and again.grpo == whole.grpo
        assert small.expected("03_lora_sft") == "time not measured"
    monkeypatch.setenv("ICD_PROFILE", "tiny-smoke")
    assert smoke.places.run_dir().name == "synthetic-tiny-smoke"
    with pytest.raises(ValueError, match="no profile 'big-smoke'"):
        profiles.get("big-smoke")


# ------------------------------------------------------------------------------------------ refusals


def test_a_profile_for_a_gpu_is_refused_without_one_or_with_a_smaller(
    places: Path, monkeypatch
) -> None:
    for card, says in ((None, "was not found"), (14.6, "has 15")):
        monkeypatch.setattr(profiles, "gpu_gb", lambda card=card: card)
        with pytest.raises(ValueError, match=f"'gpu24' is for a GPU of 21 GiB or more.*{says}"):
            smoke.check(profiles.get("gpu24"))
    monkeypatch.setattr(profiles, "gpu_gb", lambda: 80)
    smoke.check(profiles.get("gpu24"))
    monkeypatch.setattr(profiles, "gpu_gb", lambda: None)
    smoke.check(profiles.get("tiny"))


@pytest.mark.parametrize(
    ("content", "teacher", "says"),
    [
        ({}, "oracle", "no hosp/ and note/ with MIMIC-IV's files"),
        (fixture.tables(3), "template", "The template teacher knows the synthetic hospital alone"),
    ],
)
def test_data_that_will_not_do_end_in_a_sentence(
    places: Path, monkeypatch, capsys, content: dict, teacher: str, says: str
) -> None:
    own = places / "mimic-iv"
    own.mkdir()
    fixture.write_folder(own, content)
    monkeypatch.setenv("ICD_DATA_DIR", str(own))
    monkeypatch.setenv("ICD_TEACHER", teacher)
    assert smoke.main() == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not (places / "runs").exists(), "nothing is made before it is sure"


# ------------------------------------------------------------------------- what is cut, and measured


def test_every_notebook_is_cut_behind_the_cell_that_makes_its_artefact(
    places: Path, root: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ICD_NOTEBOOKS_DIR", str(root / "notebooks"))
    (places / "cut").mkdir()
    last = {
        "02_reasoning_traces": "job.finish()",
        "03_lora_sft": "sft_job.finish()",
        "04_qlora_grpo": "grpo_job.finish()",
        "05_inference": "for label, other in others.items()",
        "06_hierarchical_f1_analysis": "job.finish()",
    }
    for name in [smoke.FIRST, *last]:
        smoke.cut(name, places / "cut")
        content = nbformat.read(places / "cut" / f"{name}.ipynb", as_version=4)
        nbformat.validate(content)
        sources = [cell.source for cell in content.cells]
        assert sources[1] == smoke.BEFORE and sources[0].endswith("course.setup()")
        assert f"smoke.note({name!r})" in sources[-1]
        assert last.get(name, "all checks passed") in sources[-2]
    assert "smoke.keep_few(cases)" in (places / "cut" / f"{smoke.FIRST}.ipynb").read_text()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still, but for what is added to its only entry."""
    monkeypatch.setattr(smoke, "RATES", {})
    monkeypatch.setattr(smoke, "SPENT", [])
    now = [0.0]
    monkeypatch.setattr(smoke.time, "monotonic", lambda: now[0])
    return now


def test_an_answer_is_measured_in_a_batch_as_full_as_that_of_the_full_run(clock: list) -> None:
    calls = []

    def predict(model, tokenizer, cases, profile=None, **options) -> str:
        calls.append((len(cases), options))
        clock[0] += 2 + 0.5 * len(cases)  # a batch has its own cost
        return f"answers {len(calls)}"

    watched = smoke._watched_predict(predict)
    cases = pd.DataFrame({"hadm_id": range(8)})
    options = {"batch_size": 20, "samples": 2, "keep": "folder"}
    assert watched(None, None, cases, None, **options) == "answers 1"
    assert [n for n, _ in calls] == [8, 20] and calls[0][1]["keep"] == "folder"
    assert calls[1][1]["keep"] is None, "what is kept for a restart is not touched"
    assert smoke.RATES == {"answers": 12 / 40}
    watched(None, None, cases, None)
    assert len(calls) == 3, "once for each notebook is enough"
    assert sum(smoke.SPENT) == clock[0]


def test_a_row_is_measured_in_the_last_step_and_starting_up_is_not(clock: list) -> None:
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=16)
    callbacks: list = []
    trainer = SimpleNamespace(args=args, train_dataset=[0] * 24, add_callback=callbacks.append)

    def run(trainer, work, stage) -> None:
        clock[0] += 100  # starts up
        for seconds in (30, 12):  # the first step is slower
            callbacks[-1].on_step_begin(args, None, None)
            clock[0] += seconds
            callbacks[-1].on_optimizer_step(args, None, None)
            clock[0] += 50  # looks at held-out notes, saves
            smoke.SPENT.append(7)

    watched = smoke._watched_training(run)
    watched(trainer, None, "sft")
    assert smoke.RATES == {"rows": 12 / 24} and sum(smoke.SPENT) == 42 + 14
    args.num_generations = 8
    watched(trainer, None, "grpo")
    assert smoke.RATES == {"rows": 12 / 32}


def test_a_servers_reply_is_measured_with_its_neighbours(clock: list) -> None:
    def from_server(server, model, dialogues, limit, keep) -> list[str]:
        clock[0] += 6
        return [""] * len(dialogues)

    watched = smoke._watched_server(from_server)
    assert watched(None, None, {1: [], 2: [], 3: []}, 9, None) == ["", "", ""]
    assert smoke.RATES == {"answers": 2.0} and smoke.SPENT == [6.0]


def test_the_full_run_is_counted_by_the_numbers_of_the_notebooks(root: Path) -> None:
    full = {"train": 1000, "val": 100, "test": 300, "tested": 300}
    tiny = smoke.wanted(profiles.get("tiny"), full, kept=0.9)
    assert tiny["02_reasoning_traces"] == {"answers": 500 + 100}
    assert tiny["03_lora_sft"] == {"answers": 200, "rows": 280 * 16}
    assert tiny["04_qlora_grpo"] == {"answers": 24 * 8 + 4 * 100 + 100, "rows": 50 * 64}
    assert tiny["05_inference"] == {"answers": 3 * 300 + 4 * 300 + 750}
    by_epochs = smoke.wanted(profiles.get("paper"), full, kept=0.9)
    assert by_epochs["03_lora_sft"]["rows"] == 450
    assert by_epochs["04_qlora_grpo"]["rows"] == 8000
    stated = {  # where these numbers stand
        "03_lora_sft": (".head(128)",),
        "04_qlora_grpo": ("train.sample(24", '"watch": 256', '"watch_every": 25', ".head(64)"),
        "05_inference": ("sampled_cases, samples, temperature = 150, 5, 0.8",),
        "02_reasoning_traces": ('"held_out": 128',),
    }
    for name, texts in stated.items():
        cells = nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4).cells
        whole = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert all(text in whole for text in texts), name


def test_the_forecast_follows_from_what_was_measured(places: Path, monkeypatch) -> None:
    monkeypatch.setenv("ICD_PROFILE", "tiny-smoke")
    run = smoke.places.run_dir()
    counts = {"train": 1000, "val": 100, "test": 300, "tested": 300, "gb": 0.5}
    counts |= {"subject_id": 250, "chapter": 9, "category": 40, "code": 60}
    smoke.places.write(run / "smoke" / "full.json", counts)
    (run / "traces").mkdir(parents=True)
    pd.DataFrame({"kept": [True, True, True, False]}).to_parquet(run / "traces" / "traces.parquet")
    monkeypatch.setattr(notebooks, "names", lambda: [smoke.FIRST, "03_lora_sft", "05_inference"])
    monkeypatch.setattr(smoke, "gb", lambda *names: 0.25)
    rates = {
        smoke.FIRST: {},
        "03_lora_sft": {"answers": 1.0, "rows": 1.0},
        "05_inference": {"answers": 0.1},
    }
    for name, entry in rates.items():
        content = {"rates": entry, "spent": 56.0 * len(entry), "peak": 3.21}
        smoke.places.write(run / "smoke" / f"{name}.json", content)
        smoke.places.write(run / "notebooks" / f".{name}.json", {"seconds": 120.0})
    table = smoke.forecast(profiles.get("tiny"))
    hours = table["hours"].astype(float)
    assert hours[smoke.FIRST] == pytest.approx(120 / 3600, abs=0.006)
    assert hours["03_lora_sft"] == pytest.approx((8 + 200 + 280 * 16) / 3600, abs=0.006)
    assert hours["05_inference"] == pytest.approx((64 + 0.1 * 2850) / 3600, abs=0.006)
    assert table["memory GB"].tolist() == ["3.2"] * 3
    assert table["disk GB"].tolist() == ["0.500", "0.250", f"{0.25 * 2850 / 40:.3f}"]
    assert "1 s x 4,480 rows" in table.loc["03_lora_sft"].iloc[0]
    monkeypatch.setattr(smoke.places, "is_synthetic", lambda: False)
    said = smoke.contents(profiles.get("tiny"))
    assert "300 test cases of 250 patients" in said and "60 full codes" in said
    assert "ideal reader" not in said and "1,000 training cases" in said


# --------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_the_smoke_test_goes_through_every_stage_and_leaves_the_baseline_alone(
    places: Path, root: Path
) -> None:
    data = places / "small"
    hospital.write(data, admissions=400, seed=0)
    baseline = places / "runs" / "small-tiny"
    baseline.mkdir(parents=True)
    (baseline / "mine.txt").write_text("mine")
    env = os.environ | {
        "ICD_DATA_DIR": str(data),
        "ICD_NOTEBOOKS_DIR": str(root / "notebooks"),
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-m", "tools.smoke"]
    done = subprocess.run(command, cwd=root, env=env, text=True, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    run = places / "runs" / "small-tiny-smoke"
    for name in ("cases", "traces", "sft", "grpo", "answers/grpo", "metrics"):
        assert (run / name / "made_from.json").is_file(), name
    assert len(pd.read_parquet(run / "cases" / "cases.parquet")) == 40
    assert [*baseline.iterdir()] == [baseline / "mine.txt"]
    for text in ("hours", "memory GB", "disk GB", "rows", "In the table: majority class"):
        assert text in done.stdout
    table = pd.read_csv(run / "forecast.csv", index_col=0)
    assert len(table) == 6 and (table["hours"] >= 0).all() and (table["memory GB"] > 0.2).all()
