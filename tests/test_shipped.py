"""The finished run that ships with the course: taken where there is none, never in place of one, and what a training gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import small_course as small

from helpers import course, inference, mimic, traces
from helpers.machinery import artefacts, notebooks, places, store, switches
from tools import ship_run

SHIPPED = small.ROOT / "results" / "synthetic-tiny"
RECORDS = sorted(SHIPPED.rglob(store.RECORD))


@pytest.fixture
def shipped(places: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped run of two small artefacts, and no run folder yet."""
    folder = places / "shipped" / "synthetic-tiny"
    for name in ("sft", "answers/sft"):
        job = store.artefact(folder / name, {"settings": 1})
        (job.part / "table.csv").write_text("a,b\n1,2\n")
        job.finish()
        record = json.loads((folder / name / store.RECORD).read_text())
        (folder / name / store.RECORD).write_text(json.dumps(record | {"origin": ship_run.ORIGIN}))
    monkeypatch.setenv("ICD_SHIPPED_DIR", str(folder.parent))
    return folder


def test_a_new_run_begins_with_what_ships_and_says_so(shipped, capsys):
    _, run = course.setup()
    assert "ships with the course" in capsys.readouterr().out
    assert (run / "answers" / "sft" / "table.csv").read_text() == "a,b\n1,2\n"
    assert not store.artefact(run / "sft", {"settings": 1}).why
    assert "up to date, loaded (it ships with the course)" in capsys.readouterr().out


def test_other_settings_or_fresh_make_it_anew(shipped):
    switches.take_shipped()
    assert course.run_dir().is_dir()
    assert store.artefact(course.run_dir() / "sft", {"settings": 2}).why == "settings changed"
    assert store.artefact(course.run_dir() / "sft", {"settings": 1}, fresh=True).why


def test_a_run_that_is_there_is_left_alone(shipped, capsys):
    (course.run_dir() / "sft").mkdir(parents=True)
    course.setup()
    assert not any((course.run_dir() / "sft").iterdir())
    assert "ships" not in capsys.readouterr().out


@pytest.mark.parametrize("cut", ["table.csv", store.RECORD])
def test_a_copy_that_was_cut_off_is_not_taken_for_whole(shipped, cut):
    switches.take_shipped()
    assert course.run_dir().is_dir()
    (course.run_dir() / "sft" / cut).unlink()
    assert store.artefact(course.run_dir() / "sft", {"settings": 1}).why


def test_nothing_of_it_comes_to_a_run_on_other_data_or_of_another_profile(
    shipped, places, monkeypatch
):
    (places / "mimic" / "hosp").mkdir(parents=True)
    monkeypatch.setenv("ICD_DATA_DIR", str(places / "mimic"))
    shutil.copytree(shipped, shipped.with_name("mimic-tiny"))
    switches.take_shipped()
    assert not course.run_dir().exists()
    monkeypatch.setenv("ICD_DATA_DIR", str(places / "synthetic"))
    monkeypatch.setenv("ICD_PROFILE", "small")
    switches.take_shipped()
    assert not course.run_dir().exists()


def test_of_the_processes_of_a_launch_the_first_takes_it(shipped, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    switches.take_shipped()
    assert not course.run_dir().exists()


# ------------------------------------------------------------------------------ what is committed


def test_the_committed_run_is_whole_and_no_larger_than_it_may_be() -> None:
    names = {str(record.parent.relative_to(SHIPPED)) for record in RECORDS}
    assert {"cases", "traces", "sft", "grpo", "metrics", "answers/sft", "answers/grpo"} <= names
    assert not [record for record in RECORDS if not store.is_whole(record.parent)]
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < ship_run.MOST_MB * 1e6
    for file in files:
        if file.suffix in (".json", ".md", ".jinja", ".csv"):
            text = file.read_text(encoding="utf-8")
            assert not any(f"/{root}/" in text for root in ("home", "root", "work", "tmp")), file


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.parent.name)
def test_the_committed_run_was_made_by_the_present_settings(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICD_PROFILE", "tiny")
    content = json.loads(record.read_text())
    assert content["origin"] == ship_run.ORIGIN
    inputs = content["inputs"]
    assert content["key"] == store.digest(inputs)
    name = str(record.parent.relative_to(SHIPPED))
    profile = artefacts._with_effect(artefacts.profiles.current().record(name.split("/")[0]))
    assert inputs["profile"] == json.loads(json.dumps(profile))
    assert inputs[artefacts.VERSION] == artefacts.__version__
    for need, key in inputs["needs"].items():
        if need != "data":
            assert key == store.key(SHIPPED / need), f"{name} was made from another {need}"


def test_every_table_of_it_can_be_read_by_the_present_code() -> None:
    counts = mimic.read_counts(SHIPPED / "cases" / "cases.parquet")
    cases = pd.read_parquet(SHIPPED / "cases" / "cases.parquet")
    assert len(cases) == list(counts["funnel"].values())[-1] and "skipped" in counts
    assert list(pd.read_parquet(SHIPPED / "traces" / "traces.parquet")) == list(traces.COLUMNS)
    for folder in (SHIPPED / "answers").iterdir():
        assert set(inference.COLUMNS) <= set(pd.read_parquet(folder / "answers.parquet")), folder


def test_an_unfinished_run_is_not_shipped(places: Path) -> None:
    run = course.run_dir()
    job = store.artefact(run / "sft", {})
    (job.part / "x").write_text("x")
    job.finish()
    with pytest.raises(ValueError, match="no finished run.*grpo"):
        ship_run.ship(run, places / "target")
    assert not (places / "target").exists()


def first_steps(root: Path, notebook: str, stage: str, steps: int) -> pd.DataFrame:
    """The log of a training that is begun anew and killed at its checkpoint after so many steps."""
    folder = Path(shutil.copytree(small.ROOT / "notebooks", root / "notebooks"))
    content = nbformat.read(folder / f"{notebook}.ipynb", as_version=4)
    cell = next(cell for cell in content.cells if cell.source.startswith("settings = {"))
    cell.source += f"\nsettings['save_steps'] = {steps}"  # changes no result, and no key
    nbformat.write(content, folder / f"{notebook}.ipynb")
    env = os.environ | {
        "ICD_PROFILE": "tiny",
        "ICD_RUNS_DIR": str(root / "runs"),
        "ICD_DATA_DIR": str(root / "synthetic"),
        "ICD_SHIPPED_DIR": str(SHIPPED.parent),
        "ICD_NOTEBOOKS_DIR": str(folder),
        "FRESH": stage,
    }
    command = [sys.executable, "-m", "helpers.machinery.notebooks", "run", "--only", notebook]
    process = subprocess.Popen(command, env=env, cwd=small.ROOT, start_new_session=True)
    pattern = f".making/{stage}.*/checkpoint-{steps}/trainer_state.json"
    limit = time.monotonic() + 1500
    try:
        while not (found := [*places.run_dir().glob(pattern)]):
            assert process.poll() is None, f"{notebook} ended before its step {steps}"
            assert time.monotonic() < limit, f"{notebook} did not come to step {steps}"
            time.sleep(0.5)
        history = json.loads(found[0].read_text())["log_history"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    return pd.DataFrame(history).groupby("step").first()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "stage", "steps", "column", "tolerance"),
    [
        ("03_lora_sft", "sft", 20, "loss", 0.002),
        ("04_qlora_grpo", "grpo", 4, "reward", 0.05),
    ],
)
def test_a_training_from_the_start_begins_like_the_shipped_one(
    notebook: str,
    stage: str,
    steps: int,
    column: str,
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ICD_PROFILE", "tiny")
    monkeypatch.setenv("ICD_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("ICD_DATA_DIR", str(tmp_path / "synthetic"))
    log = first_steps(tmp_path, notebook, stage, steps)[column].dropna()
    kept = pd.read_csv(SHIPPED / stage / "training_log.csv").set_index("step")[column].dropna()
    kept = kept[kept.index <= steps]
    assert len(log) == len(kept) >= 4
    print(pd.DataFrame({"now": log, "shipped": kept}).to_string())
    assert abs(log.iloc[0] - kept.iloc[0]) <= tolerance
    assert abs(log.mean() - kept.mean()) <= tolerance


def test_the_runner_says_so_too(shipped, places, capsys):
    (places / "notebooks" / "00_x.ipynb").write_text(
        nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]))
    )
    notebooks.run("00_x")
    assert "ships with the course" in capsys.readouterr().out
    assert (course.run_dir() / "sft" / "table.csv").is_file()
