"""The GPU benchmark: it runs whole where there is no GPU to measure, and says so where it was asked to measure."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks import gpu
from helpers import fit, profiles


def test_without_cuda_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert "no CUDA device" in said.err and said.err.count("\n") == 1 and not said.out


def test_every_size_has_dimensions_and_batches() -> None:
    for size, name in gpu.SIZES.items():
        assert fit.config(f"Qwen/Qwen2.5-{size}-Instruct") and profiles.get(name).base != "tiny"
    for p in profiles.PROFILES.values():
        gpu.trl_defaults(p).validate()


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda p: p.name)
def test_a_shorter_step_has_the_same_peak(profile: profiles.Profile) -> None:
    short = gpu.shortened(profile)
    assert short.validate() and short.grpo_grad_accum <= profile.grpo_grad_accum
    for stage in fit.NOTEBOOK:
        assert fit.estimate(short, stage, gpu=True) == fit.estimate(profile, stage, gpu=True)


def test_nothing_of_a_cell_stays_behind() -> None:
    from bitsandbytes.optim import GlobalOptimManager
    from torch import nn

    GlobalOptimManager.get_instance().register_module_override(
        nn.Embedding(2, 2), "weight", {"optim_bits": 32}
    )
    gpu.release()
    assert not GlobalOptimManager.get_instance().module_weight_config_triple


HANGING = """
import sys, time
from benchmarks import gpu

gpu.RESERVE, gpu.train = 0, lambda *_: time.sleep(600)
sys.exit(gpu.main(["--dry-run-cpu", "--minutes", "0.4", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_it_ends_in_time_whatever_hangs(tmp_path: Path, root: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and time.monotonic() - began < 26, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert (
        set(table["cell"]) == set(gpu.CELLS)
        and (table["status"] == "not measured: time was up").all()
    )
    assert "not measured" in done.stdout


@pytest.mark.slow
def test_a_dry_run_goes_through_every_cell(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run-cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert list(table.columns) == list(gpu.COLUMNS) and set(table["cell"]) == set(gpu.CELLS)
    told = table["status"].str.startswith("measured") | (
        table["status"] == "not measured: needs a GPU and flash-attn"
    )
    assert (
        told.all()
        and (
            table["cell"].str.contains("continuous")
            == table["status"].str.startswith("not measured")
        ).all()
    )
    trained = table[~table["cell"].str.startswith("generate")]
    assert (trained["seconds_per_step"] > 0).all()
    assert ((trained["estimate_gb"] > 0) != trained["cell"].str.contains("TRL")).all(), (
        "the estimate is about our settings"
    )
    phases = table.dropna(subset=["rewards_s"])
    assert len(phases) == 2  # GRPO twice: where its step goes adds up
    parts = phases[["generation_s", "rewards_s", "forward_backward_s", "optimiser_s"]]
    assert (parts > 0).all(axis=None) and (parts.sum(axis=1) / phases["seconds_per_step"]).between(
        0.95, 1.05
    ).all()
    generated = table[
        table["cell"].str.startswith("generate") & ~table["cell"].str.contains("continuous")
    ]
    assert len(generated) == 3 * len(gpu.BATCHES)
    assert (generated[["tokens_per_s", "prefill_s", "decode_tokens_per_s"]] > 0).all(axis=None)
    assert table["reserved_gb"].isna().all()  # memory of a card is not made up on a CPU
    stamp = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in stamp] == [
        "# device",
        "# host",
        "# versions",
        "# date",
        "# command",
    ]


def test_notes_of_a_batch_differ_in_length_and_the_longest_is_as_long_as_asked() -> None:
    from helpers import models

    tokenizer = models.load_tokenizer("tiny")
    notes = gpu.long_cases(16, tokenizer, 640)["note"]
    lengths = [len(tokenizer(note, add_special_tokens=False)["input_ids"]) for note in notes]
    assert lengths[0] >= 640 and lengths[8] >= 640
    for first in (0, 8):
        cut = [640 - 10 * i for i in range(8)]
        assert all(
            want - 10 < got <= want
            for got, want in zip(lengths[first + 1 : first + 8], cut[1:], strict=True)
        ), lengths


def test_a_device_that_failed_ends_the_run_and_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    todo = {"dry run": gpu.dry_run_profile(tmp_path)}
    calls = []

    def train(*args: object) -> None:
        calls.append(args)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "train", train)
    rows = gpu.measure(todo, 5, 1, tmp_path / "x.csv", {})
    assert len(calls) == 1 and len(rows) == len(gpu.CELLS)
    assert all(row["status"].startswith("not measured: the device failed in") for row in rows)
    assert len(pd.read_csv(tmp_path / "x.csv", comment="#")) == len(rows)


def test_any_other_failure_costs_one_cell_and_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")

    def train(*args: object) -> None:
        raise ValueError("Attempting to unscale FP16 gradients.")

    monkeypatch.setattr(gpu, "train", train)
    (row,) = gpu.run_cell("sft", gpu.dry_run_profile(tmp_path), None, 1, 0.0, 0.0)
    assert row["status"] == "failed: ValueError: Attempting to unscale FP16 gradients."


def test_peaks_are_told_by_phase_and_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    watch, now = gpu.stopwatch(0, 0), [4.0, 5.0]
    for name, value in {
        "is_available": True,
        "memory_reserved": 3e9,
        "mem_get_info": (76e9, 80e9),
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now[0] * 1e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: now[1] * 1e9)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: now.__setitem__(slice(2), (1.0, 2.0))
    )

    class Trainer:
        def _generate(self) -> None:
            now[:] = 9.0, 11.0

        def _calculate_rewards(self) -> None:
            now[:] = 2.0, 2.0

    watch.phase(trainer := Trainer(), "_generate", "generation")
    watch.phase(trainer, "_calculate_rewards", "rewards")
    trainer._generate()
    trainer._calculate_rewards()
    now[:] = 6.0, 7.0  # the passes that train
    row = gpu.memory(10.8, watch)
    assert {key: value for key, value in row.items() if key != "estimate_error"} == {
        "estimate_gb": 10.8,
        "allocated_gb": 9.0,
        "reserved_gb": 11.0,
        "card_gb": 12.0,
        "generation_gb": 9.0,
        "training_gb": 6.0,
    }
    assert row["estimate_error"] == pytest.approx(-0.1)


@pytest.mark.parametrize("together", [1, 2, 4])
def test_each_generation_has_a_prompt_of_full_length_whatever_its_size(together: int) -> None:
    from helpers import models

    tokenizer = models.load_tokenizer("tiny")
    notes = gpu.long_cases(8, tokenizer, 640, group=together)["note"]
    lengths = [len(tokenizer(note, add_special_tokens=False)["input_ids"]) for note in notes]
    assert all(max(lengths[i : i + together]) >= 640 for i in range(0, 8, together)), lengths
    assert together == 1 or min(lengths) < 640, "and the others are shorter: there is padding"


@pytest.mark.parametrize("config", [True, False])
def test_a_step_that_only_warms_up_is_not_taken_for_a_figure(config: bool) -> None:
    """A GRPO cell that the deadline ends in its second step has run one step, of a few tokens: it says nothing."""

    class Trainer:
        generation_config = SimpleNamespace(max_new_tokens=512)

    watch, control = gpu.stopwatch(0, 1e12), SimpleNamespace(should_training_stop=False)
    if config:
        watch.warm_up(Trainer)
        assert Trainer.generation_config.max_new_tokens == gpu.WARM_TOKENS
    watch.on_step_begin(None, None, control)
    watch.on_step_end(None, None, control)
    assert Trainer.generation_config.max_new_tokens == 512
    row = gpu.timings(watch, {"batch": 8, "accumulate": 2})
    assert row["status"] == (
        "not measured: no step after the warm-up in the time" if config else "measured, first step"
    )
    assert ("seconds_per_step" in row) != config
