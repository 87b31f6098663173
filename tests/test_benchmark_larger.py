"""The benchmark of larger bases: the shapes, the corpus written ahead, and that it runs whole where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import larger
from helpers import models
from helpers.tiny_base import build


@pytest.mark.parametrize("times", [0.3, 1, 2, 5, 10, 30, 100])
def test_a_base_is_as_large_as_was_asked_for(times: float) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.initialization import no_init_weights

    shape = larger.shape(times)
    with torch.device("meta"), no_init_weights():
        model = Qwen2ForCausalLM(Qwen2Config(**build.CONFIG | shape))
    assert 0.75 < model.num_parameters() / models.tiny_manifest()["parameters"] / times < 1.25
    widths = shape["hidden_size"], shape["intermediate_size"], larger.HEAD * shape["num_key_value_heads"]
    assert not any(width % 64 for width in widths), "NF4 packs blocks of 64"
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0


def test_the_shipped_size_has_the_shipped_shape() -> None:
    assert {name: build.CONFIG[name] for name in larger.shape(1)} == larger.shape(1)


def test_documents_written_ahead_are_those_of_the_shipped_base() -> None:
    with ThreadPoolExecutor(2) as pool:
        source = larger.Ahead(pool, 2)
        for seed, early in ((1000, True), (1001, True), (1002, False), (1003, False)):
            assert list(source(20, seed, early=early)) == list(build.documents(20, seed, early=early))
        assert set(source.waiting) == {(20, 1002, True), (20, 1003, True), (20, 1004, False), (20, 1005, False)}


def test_what_cannot_be_done_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert larger.main([]) == 2
    assert "no CUDA device" in (said := capsys.readouterr()).err and said.err.count("\n") == 1 and not said.out
    assert larger.main(["--cpu", "--times", "1", "0.01"]) == 2
    assert "--times 0.01" in (said := capsys.readouterr()).err and said.err.count("\n") == 1 and not said.out


@pytest.mark.slow
def test_a_dry_run_goes_through_all_of_it(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.larger", "--dry-run-cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert list(table.columns) == list(larger.COLUMNS)
    assert list(table["status"]) == ["computed"] + ["measured"] * 6
    assert table.loc[0, "arm"] == "ideal reader" and table.loc[0, "chapter"] > 0.9
    assert list(table.loc[1:, "arm"]) == ["sft", "grpo", "grpo"] * 2 and list(table.loc[1:, "steps"]) == [6, 2, 4] * 2
    assert set(table.loc[4:, "parameters"]) == {755_100} and (table.loc[4:, "perplexity"] > 100).all(), "it hardly read anything"
    assert (table.loc[1:, ["train_minutes", "answer_minutes"]] > 0).all().all()


@pytest.mark.slow
def test_what_the_time_does_not_reach_says_so(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.larger", "--dry-run-cpu", "--minutes", "0"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("| not measured: time was up |") == 6, done.stderr
    assert not list((root / "results").glob("gpu/*dry*")), "a dry run leaves no figures behind"
