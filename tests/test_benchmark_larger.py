"""The benchmark of larger bases: the shapes, the corpus written ahead, and that it runs whole where there is no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import larger
from helpers import models, profiles, study
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
    widths = (
        shape["hidden_size"],
        shape["intermediate_size"],
        larger.HEAD * shape["num_key_value_heads"],
    )
    assert not any(width % 64 for width in widths), "NF4 packs blocks of 64"
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0


def test_the_shipped_size_has_the_shipped_shape() -> None:
    assert {name: build.CONFIG[name] for name in larger.shape(1)} == larger.shape(1)


def test_documents_written_ahead_are_those_of_the_shipped_base() -> None:
    with ThreadPoolExecutor(2) as pool:
        source = larger.Ahead(pool, 2)
        for seed, early in ((1000, True), (1001, True), (1002, False), (1003, False)):
            assert list(source(20, seed, early=early)) == list(
                build.documents(20, seed, early=early)
            )
        assert set(source.waiting) == {
            (20, 1002, True),
            (20, 1003, True),
            (20, 1004, False),
            (20, 1005, False),
        }


def test_what_cannot_be_done_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert larger.main([]) == 2
    assert (
        "no CUDA device" in (said := capsys.readouterr()).err
        and said.err.count("\n") == 1
        and not said.out
    )
    for wrong, said in (
        ("--times 1 0.01", "--times 0.01"),
        ("--times 0", "above 0"),
        ("--batches 20", "--batches be 50"),
        ("--more-steps 0.001", "a step of GRPO"),
    ):
        assert larger.main(["--cpu", *wrong.split()]) == 2
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1 and not told.out


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> larger.Bench:
    """A bench whose trainings leave an empty folder, and whose answers are one code."""
    done: list[str] = []

    def pretrain(out: Path, times: float, batches: int, batch_tokens: int) -> None:
        done.append(out.name[: len("base-x10-60")])
        out.mkdir()
        record = {"parameters": 7, "tokens_seen": 8, "held_out_perplexity": 1.5}
        (out / "manifest.json").write_text(json.dumps(record))

    def train(
        arm: str, seed: int, out: Path, start: Path | None, profile: profiles.Profile
    ) -> None:
        done.append(f"{arm}-{seed} after {start.name[:3]}" if start else f"{arm}-{seed}")
        out.mkdir()

    cases = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [3, 4], "code": ["I10", "J189"]})
    ideal = pd.DataFrame({"full": ["I10", "J189"]}, index=[3, 4])
    monkeypatch.setattr(larger, "pretrain", pretrain)
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(larger.models, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(study, "_answers", lambda *_: pd.DataFrame({"predicted": ["I10", None]}))
    monkeypatch.setattr(study, "hospitals", lambda: (tmp_path, tmp_path))
    monkeypatch.setattr(larger.synthetic, "ideal_reader", lambda _: ideal)
    made = larger.Bench(tmp_path / "larger", profiles.get("tiny"), cases, "card", 512)
    made.done = done
    return made


STAMP = {"device": "card", "versions": "torch 2"}


def asked(**changed) -> list[larger.Job]:
    options = {"times": [1, 10], "batches": 60, "more_steps": [1], "seeds": [0]} | changed
    return larger.jobs(argparse.Namespace(**options), profiles.get("tiny"))


def test_everything_is_made_once_and_rows_of_earlier_commands_stay(
    bench: larger.Bench, tmp_path: Path
) -> None:
    path = tmp_path / "gpu" / "larger-card.csv"  # whose folder is not there yet
    larger.run(bench, asked(), float("inf"), path, STAMP)
    first = ["sft-0", "grpo-0 after sft", "base-x10-60", "sft-0", "grpo-0 after sft"]
    assert bench.done == first
    larger.run(bench, asked(seeds=[1], times=[1]), float("inf"), path, STAMP)
    assert bench.done == [*first, "sft-1", "grpo-1 after sft"]
    table = larger.run(
        bench, asked(seeds=[0, 2], batches=70), 0.0, path, STAMP
    )  # no time left: what is there stays
    assert len(bench.done) == 7
    kept = pd.read_csv(path, comment="#")
    for rows in (table, kept):
        assert rows["status"].value_counts().to_dict() == {
            "measured": 6,
            "not measured: time was up": 6,
            "computed": 1,
        }
    assert set(kept.loc[kept["status"] == "measured", "full"]) == {0.5}
    assert set(kept["parameters"].dropna()) == {7, models.tiny_manifest()["parameters"]}, (
        "whole numbers stay whole"
    )
    larger.run(bench, asked(times=[1]), 0.0, path, STAMP | {"versions": "torch 3"})
    assert "measured" not in set(pd.read_csv(path, comment="#")["status"]), (
        "figures of other versions stand under this stamp"
    )
    assert [other.name for other in path.parent.iterdir()] == [path.name], (
        "something is left beside the figures"
    )


def test_another_device_or_other_settings_share_nothing(bench: larger.Bench) -> None:
    bench.row(job := asked(times=[1])[0])
    for name, value in (
        ("device", "other card"),
        ("profile", dataclasses.replace(bench.profile, sft_lr=1.0)),
    ):
        setattr(bench, name, value)
        before = len(bench.done)
        bench.row(job)
        assert len(bench.done) == before + 1, name


def test_what_failed_costs_its_rows_alone_and_is_not_tried_again(
    bench: larger.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(*_) -> None:
        tried.append(1)
        raise RuntimeError("no room")

    monkeypatch.setattr(larger, "pretrain", broken)
    table = larger.run(bench, asked(), float("inf"), None, STAMP).set_index(["base", "arm"])[
        "status"
    ]
    assert len(tried) == 1 and (table["shipped"] == "measured").all()
    assert (
        table["10 x", "sft"] == "failed: RuntimeError: no room"
        and "failed: RuntimeError: no room" in table["10 x", "grpo"]
    )


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
    made = table[table["arm"] != "ideal reader"]
    assert (made["status"] == "measured").all() and (
        made[["train_minutes", "answer_minutes"]] > 0
    ).all().all()
    told = sorted(zip(made["base"], made["arm"], made["steps"], strict=True))
    assert told == sorted(
        (base, *rest)
        for base in ("0.2 x", "shipped")
        for rest in (("sft", 6), ("grpo", 2), ("grpo", 4))
    )
    small = made[made["base"] == "0.2 x"]
    assert small["parameters"].between(7e5, 8e5).all() and (small["perplexity"] > 100).all(), (
        "it hardly read anything"
    )


@pytest.mark.slow
def test_what_the_time_does_not_reach_says_so(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.larger", "--dry-run-cpu", "--minutes", "0"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("| not measured: time was up |") == 6, (
        done.stderr
    )
    assert not list((root / "results").glob("gpu/*dry*")), "a dry run leaves no figures behind"
