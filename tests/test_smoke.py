"""The smoke test: what it refuses, what it measures and counts, and, slow, the whole of it on a small hospital."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from helpers import hospital, inference, profiles
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


def test_time_inside_another_measured_call_counts_once(monkeypatch) -> None:
    monkeypatch.setattr(smoke, "RATES", {})
    clock = iter([0.0, 1.0, 4.0, 10.0])  # the outer call takes 10 s, 3 of them the inner one
    monkeypatch.setattr(smoke.time, "monotonic", lambda: next(clock))

    def answer(cases: list, samples: int = 1) -> str:
        return "answers"

    inner = smoke.timed(answer, "answers", lambda cases, samples=1: len(cases) * samples)
    outer = smoke.timed(lambda trainer: inner([1, 2], samples=4), "rows", lambda trainer: 64)
    assert outer(None) == "answers"
    assert smoke.RATES == {"answers": [3.0, 8], "rows": [7.0, 64]}


def test_rows_of_training_are_those_that_the_data_could_fill(monkeypatch) -> None:
    from helpers import teachers, training

    monkeypatch.setattr(smoke, "RATES", {})
    for module, name in ((inference, "predict"), (teachers, "_from_server")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(training, "run", lambda trainer, work, stage: time.sleep(0.01))
    smoke.watch()
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=16)
    trainer = SimpleNamespace(
        args=args, train_dataset=[0] * 24, state=SimpleNamespace(global_step=2)
    )
    training.run(trainer, None, "sft")
    assert smoke.RATES["rows"][1] == 48 and smoke.RATES["rows"][0] >= 0.01
    args.num_generations = 8
    training.run(trainer, None, "grpo")
    assert smoke.RATES["rows"][1] == 48 + 64


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
        "03_lora_sft": {"answers": [8.0, 8], "rows": [48.0, 48]},
        "05_inference": {"answers": [10.0, 100]},
    }
    for name, entry in rates.items():
        smoke.places.write(run / "smoke" / f"{name}.json", {"rates": entry, "peak": 3.21})
        smoke.places.write(run / "notebooks" / f".{name}.json", {"seconds": 90.0})
    table = smoke.forecast(profiles.get("tiny"))
    hours = table["hours"].astype(float)
    assert hours[smoke.FIRST] == pytest.approx(90 / 3600, abs=0.006)
    assert hours["03_lora_sft"] == pytest.approx((34 + 200 + 280 * 16) / 3600, abs=0.006)
    assert hours["05_inference"] == pytest.approx((80 + 0.1 * 2850) / 3600, abs=0.006)
    assert table["memory GB"].tolist() == ["3.2"] * 3
    assert table["disk GB"].tolist() == ["0.500", "0.250", f"{0.25 * 28.5:.3f}"]
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
