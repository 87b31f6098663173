"""The benchmark of larger bases: the shapes, the corpus written ahead, and that it runs whole where
there is no GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import larger
from helpers import models, profiles
from helpers.machinery import places, store
from tools import tiny_base

TINY = profiles.get("tiny")
CASES = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [3, 4], "code": ["I10", "J189"]})
STAMP = {"device": "card", "versions": "torch 2"}
FOREVER = float("inf")


@pytest.mark.parametrize("times", [0.3, 1, 2, 5, 10, 30, 100])
def test_a_base_is_as_large_as_was_asked_for(times: float) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.initialization import no_init_weights

    shape = larger.shape(times)
    with torch.device("meta"), no_init_weights():
        model = Qwen2ForCausalLM(Qwen2Config(**tiny_base.CONFIG | shape))
    assert 0.75 < model.num_parameters() / models.tiny_manifest()["parameters"] / times < 1.25
    keys = larger.HEAD * shape["num_key_value_heads"]
    widths = (shape["hidden_size"], shape["intermediate_size"], keys)
    assert not any(width % 64 for width in widths), "NF4 packs blocks of 64"
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0


def test_the_shipped_size_has_the_shipped_shape() -> None:
    shape = larger.shape(1)
    assert {name: tiny_base.CONFIG[name] for name in shape} == shape


def test_documents_written_ahead_are_those_of_the_shipped_base() -> None:
    with ThreadPoolExecutor(2) as pool:
        source = larger.Ahead(pool, 2)
        for seed, early in ((1000, True), (1001, True), (1002, False), (1003, False)):
            documents = list(tiny_base.documents(20, seed, early=early))
            assert list(source(20, seed, early=early)) == documents
        ahead = {(20, 1002, True), (20, 1003, True), (20, 1004, False), (20, 1005, False)}
        assert set(source.waiting) == ahead


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("--times 1 0.01", "--times 0.01: no Qwen2 of these proportions"),
        ("--times 0", "above 0"),
        ("--times -1", "above 0"),
        ("--batches 20", "--batches be 50"),
        ("--more-steps 0.001", "a step of GRPO"),
    ],
)
def test_numbers_that_will_not_do_are_refused_in_one_line(wrong: str, text: str) -> None:
    with pytest.raises(SystemExit, match=text) as refusal:
        larger.main(["--cpu", *wrong.split()])
    assert "\n" not in str(refusal.value)


def test_without_cuda_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device here"):
        larger.main([])


def rows_of(arguments: str = "--batches 60 --more-steps 1") -> list[larger.Job]:
    return larger.jobs(larger.options_of(arguments.split()), TINY)


class Trainings:
    """What stands in for the trainings, and the list of what was asked of it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def pretrain(self, out: Path, times: float, batches: int, batch_tokens: int) -> None:
        self.done.append(f"base x{times:g} {batches}")
        record = {"parameters": 7, "tokens_seen": 8, "held_out_perplexity": 1.5}
        places.write(out / "manifest.json", record)

    def train(self, arm: str, seed: int, artefact: store.Artefact, start, profile) -> None:
        self.done.append(f"{arm}-{seed} after {start.name}" if start else f"{arm}-{seed}")
        (artefact.part / "adapter").write_text("")

    def answer(self, adapter: Path, cases: pd.DataFrame, profile, **options) -> pd.DataFrame:
        return pd.DataFrame({"predicted": ["I10", None]})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    trainings = Trainings()
    ideal = pd.DataFrame({"full": ["I10", "J189"]}, index=[3, 4])
    monkeypatch.setattr(larger, "pretrain", trainings.pretrain)
    monkeypatch.setattr(larger.run, "train", trainings.train)
    monkeypatch.setattr(larger.run, "answer", trainings.answer)
    monkeypatch.setattr(larger.casebook, "ideal_reader", lambda folder: ideal)
    return trainings


@pytest.fixture
def bench(tmp_path: Path, trainings: Trainings) -> larger.Bench:
    return larger.Bench(tmp_path / "larger", TINY, CASES, "card", 512)


def test_everything_is_made_once_and_rows_of_earlier_commands_stay(
    bench: larger.Bench, trainings: Trainings, tmp_path: Path
) -> None:
    path = tmp_path / "gpu" / "larger-card.csv"  # whose folder is not there yet

    def measure(arguments: str, end: float = FOREVER, stamp: dict = STAMP) -> pd.DataFrame:
        return larger.measure(bench, rows_of(arguments), tmp_path, end, path, stamp)

    measure("--batches 60 --more-steps 1")
    first = ["sft-0", "grpo-0 after sft-280", "base x10 60", "sft-0", "grpo-0 after sft-280"]
    assert trainings.done == first
    measure("--batches 60 --more-steps 1 --seeds 1 --times 1")
    assert trainings.done == [*first, "sft-1", "grpo-1 after sft-280"]
    late = measure("--batches 70 --more-steps 1 --seeds 0 2", end=0.0)  # what is there stays
    assert len(trainings.done) == 7
    for rows in (late, pd.read_csv(path, comment="#")):
        assert rows["status"].value_counts().to_dict() == {
            "measured": 6,
            "not measured: time was up": 6,
            "computed": 1,
        }
    kept = pd.read_csv(path, comment="#")
    assert set(kept.loc[kept["status"] == "measured", "full"]) == {0.5}
    parameters = {7, models.tiny_manifest()["parameters"]}
    assert set(kept["parameters"].dropna()) == parameters
    assert "10 x,60,sft,0,280,7,8,1.5," in path.read_text(), "whole numbers stay whole"
    measure("--batches 60 --times 1 --more-steps 1", end=0.0, stamp=STAMP | {"versions": "torch 3"})
    statuses = set(pd.read_csv(path, comment="#")["status"])
    assert "measured" not in statuses, "figures of other versions stand under this stamp"
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change",
    [
        {"device": "other card"},
        {"profile": TINY.replace(sft={"learning_rate": 1.0})},
        {"profile": TINY.replace(max_note_tokens=200)},
    ],
)
def test_another_device_or_other_settings_share_nothing(
    bench: larger.Bench, trainings: Trainings, change: dict
) -> None:
    job = rows_of("--times 1 --batches 60")[0]
    bench.row(job)
    bench.row(job)
    assert trainings.done == ["sft-0"]
    dataclasses.replace(bench, **change).row(job)
    assert trainings.done == ["sft-0", "sft-0"]


def test_more_steps_are_another_adapter_after_the_same_start(
    bench: larger.Bench, trainings: Trainings
) -> None:
    rows = rows_of("--times 1 --batches 60 --more-steps 1 4")
    assert [job.steps for job in rows] == [280, 50, 200]
    folders = [bench.adapter(job) for job in reversed(rows)]
    assert len(set(folders)) == 3
    assert trainings.done == ["sft-0", "grpo-0 after sft-280", "grpo-0 after sft-280"]


def test_what_failed_costs_its_rows_alone_and_is_not_tried_again(
    bench: larger.Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def broken(*_) -> None:
        tried.append(1)
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(larger, "pretrain", broken)
    rows = rows_of("--batches 60 --more-steps 1 4 --times 10 1")
    table = larger.measure(bench, rows, tmp_path, FOREVER, None, STAMP)
    statuses = table.set_index(["base", "arm"])["status"]
    assert len(tried) == 1 and (statuses["shipped"] == "measured").all()
    assert set(statuses["10 x"]) == {"failed: RuntimeError: no room"}


@pytest.mark.slow
def test_a_dry_run_goes_through_all_of_it(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.larger", "--dry-run-cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert list(table.columns) == list(larger.COLUMNS)
    ideal = table[table["arm"] == "ideal reader"]
    assert list(ideal["status"]) == ["computed"] and ideal["chapter"].item() > 0.9
    rows = table[table["arm"] != "ideal reader"]
    assert (rows["status"] == "measured").all()
    assert (rows[["train_minutes", "answer_minutes"]] >= 0).all(axis=None)
    stages = (("sft", 6), ("grpo", 2), ("grpo", 4))
    expected = [(base, *stage) for base in ("0.2 x", "shipped") for stage in stages]
    assert sorted(zip(rows["base"], rows["arm"], rows["steps"], strict=True)) == sorted(expected)
    small = rows[rows["base"] == "0.2 x"]
    assert small["parameters"].between(7e5, 8e5).all()
    assert (small["perplexity"] > 100).all(), "it hardly read anything"


@pytest.mark.slow
def test_what_the_time_does_not_reach_says_so(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.larger", "--dry-run-cpu", "--minutes", "0"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not measured: time was up") == 6
    assert not list((root / "results").glob("gpu/*dry*")), "a dry run leaves no figures behind"
