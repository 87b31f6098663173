"""A model of others beside the baselines, nothing trained: names, refusals, contamination, and the whole way with a local folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from helpers import hospital
from tests import mimic_fixture as fixture
from tools import evaluate


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("DATEXIS/DeepICD-R1-7B", "DATEXIS-DeepICD-R1-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen-Qwen2.5-7B-Instruct"),
        ("gpt2", "gpt2"),
    ],
)
def test_a_model_is_called_after_its_id(model: str, label: str) -> None:
    assert evaluate.label_of(model) == label


def test_a_folder_is_called_after_itself_and_its_parent(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "synthetic-tiny" / "sft"
    folder.mkdir(parents=True)
    assert evaluate.label_of(str(folder)) == "synthetic-tiny-sft"
    assert evaluate.label_of("/tmp") == "tmp", "as a container mounts it"
    monkeypatch.chdir(folder.parent)
    assert evaluate.label_of("sft") == evaluate.label_of("./sft/") == "synthetic-tiny-sft"


def test_the_cells_that_it_runs_are_in_the_notebook_and_train_nothing(root: Path) -> None:
    cells = nbformat.read(root / "notebooks" / f"{evaluate.NOTEBOOK}.ipynb", as_version=4).cells
    sources = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
    order = [name for name in sources if name in (evaluate.SETTINGS, *evaluate.CELLS)]
    assert order == [evaluate.SETTINGS, *evaluate.CELLS]
    assert (
        "own = True" in sources[evaluate.SETTINGS] and "others = {}" in sources[evaluate.SETTINGS]
    )
    needed = [sources[name] for name in evaluate.CELLS if "course.need(" in sources[name]]
    assert len(needed) == 1 and 'if own:\n    adapters = {"base": None' in needed[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no model is there"),
        (["{folder}"], "no model is there"),
        (["{tiny}", "--prompt", "{folder}/none.csv"], "none.csv"),
        (["{tiny}", "--prompt", "{folder}/bad.csv"], "the columns role and content are needed"),
        (["{tiny}", "--data", "{folder}"], "no hosp/ and note/ with MIMIC-IV's files"),
    ],
)
def test_what_will_not_do_is_said_before_anything_is_made(
    places: Path, root: Path, monkeypatch, capsys, arguments: list[str], says: str
) -> None:
    (places / "bad.csv").write_text("a,b\n1,2\n")
    tiny = root / "helpers" / "tiny_base"
    given = [part.format(folder=places, tiny=tiny) for part in arguments]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given])
    monkeypatch.setenv("ICD_DATA_DIR", os.environ["ICD_DATA_DIR"])  # the command sets it
    assert evaluate.main() == 1
    assert says in capsys.readouterr().err
    assert not [*places.glob("runs/*/answers")]


def test_contamination_is_said_for_data_that_the_hospital_did_not_write(
    places: Path, root: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(evaluate, "answer", lambda others: None)
    monkeypatch.setattr(evaluate, "show", lambda label: None)
    evaluate.run(str(root / "helpers" / "tiny_base"), None)
    assert "trained on these patients" not in capsys.readouterr().out
    own = fixture.write_folder(places / "mimic-iv", fixture.tables(3))
    monkeypatch.setenv("ICD_DATA_DIR", str(own))
    evaluate.run(str(root / "helpers" / "tiny_base"), None)
    said = capsys.readouterr().out
    assert "this model may have been trained on these patients" in " ".join(said.split())


@pytest.mark.slow
def test_a_local_model_stands_beside_the_baselines_without_any_training(
    places: Path, root: Path
) -> None:
    data, model = places / "small", places / "someones" / "model"
    hospital.write(data, admissions=300, seed=0)
    shutil.copytree(root / "helpers" / "tiny_base", model)
    prompt = places / "prompt.csv"
    prompt.write_text('role,content\nuser,"Code this: {note}"\nassistant,<think>\n')
    env = os.environ | {"ICD_NOTEBOOKS_DIR": str(root / "notebooks"), "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tools.evaluate", str(model), "--prompt", str(prompt)]
    command += ["--data", str(data)]
    for again in (False, True):
        done = subprocess.run(
            command, cwd=root, env=env, text=True, capture_output=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("is up to date, loaded" in done.stdout) == again
    run = places / "runs" / "small-tiny"
    for name in ("majority", "tfidf", "someones-model"):
        assert name.replace("tfidf", "TF-IDF").split("-")[0].lower() in done.stdout.lower()
    answers = pd.read_parquet(run / "answers" / "someones-model" / "answers.parquet")
    cases = pd.read_parquet(run / "cases" / "cases.parquet")
    assert set(answers["hadm_id"]) == set(cases.loc[cases["split"] == "test", "hadm_id"])
    reports = json.loads((run / "evaluation.json").read_text())["models"]
    assert set(reports) == {"majority", "tfidf", "someones-model"}
    assert all("ci" in report["full"] for report in reports.values())
    assert reports["tfidf"]["full"]["accuracy"] > reports["majority"]["full"]["accuracy"]
    assert not (run / "sft").exists() and not (run / "traces").exists()


@pytest.mark.parametrize(
    "error", [FloatingPointError("float16"), MemoryError("one case"), RuntimeError("a cell failed")]
)
def test_what_stops_a_run_is_one_sentence(error: Exception, monkeypatch, capsys) -> None:
    def stopped(model: str, prompt: str | None) -> None:
        raise error

    monkeypatch.setattr(evaluate, "run", stopped)
    monkeypatch.setattr("sys.argv", ["evaluate", "gpt2"])
    assert evaluate.main() == 1
    assert capsys.readouterr().err == f"{error}\n"
