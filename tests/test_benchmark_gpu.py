"""The GPU benchmark: it runs whole where there is no GPU to measure, and says so where it was asked
to measure."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks import gpu
from helpers import profiles
from helpers.machinery import memory


def token_counts(cases: pd.DataFrame, tokenizer) -> list[int]:
    return [len(tokenizer(note, add_special_tokens=False)["input_ids"]) for note in cases["note"]]


def test_without_cuda_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device here, nothing was measured"):
        gpu.main([])


def test_every_size_has_dimensions_and_batches() -> None:
    for size, name in gpu.SIZES.items():
        assert memory.config(f"Qwen/Qwen2.5-{size}-Instruct")
        assert profiles.get(name).base != "tiny"


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda p: p.name)
def test_a_shorter_step_has_the_same_peak(profile: profiles.Profile) -> None:
    short = gpu.shortened(profile)
    for stage in memory.NOTEBOOK:
        accumulation = "gradient_accumulation_steps"
        assert getattr(short, stage)[accumulation] <= getattr(profile, stage)[accumulation]
        assert memory.estimate(short, stage, gpu=True) == memory.estimate(profile, stage, gpu=True)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_trl_defaults_share_lengths_with_ours_and_nothing_else(stage: str, ours: bool) -> None:
    profile = profiles.get("gpu24")
    arguments = gpu.arguments(stage, profile, ours)
    assert ("learning_rate" in arguments) == ours and ("optim" in arguments) == ours
    batch = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    own = getattr(profile, stage)
    if not ours:
        assert batch == (8, 1)
    else:
        assert batch == (own["per_device_train_batch_size"], own["gradient_accumulation_steps"])
    length = arguments.get("max_length") or arguments["max_completion_length"]
    assert length == {"sft": 2560, "grpo": 512}[stage]
    assert own == getattr(profiles.get("gpu24"), stage), "the profile itself was changed"


def test_nothing_of_a_cell_stays_behind() -> None:
    from bitsandbytes.optim import GlobalOptimManager
    from torch import nn

    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(nn.Embedding(2, 2), "weight", {"optim_bits": 32})
    gpu.release()
    assert not GlobalOptimManager.get_instance().module_weight_config_triple


def test_notes_of_a_batch_differ_in_length_and_the_longest_is_as_long_as_asked() -> None:
    from helpers import models

    tokenizer = models.load_tokenizer("tiny")
    lengths = token_counts(gpu.long_cases(16, tokenizer, 640), tokenizer)
    assert lengths[0] >= 640 and lengths[8] >= 640
    for first in (0, 8):
        for i in range(1, 8):
            assert 630 - 10 * i < lengths[first + i] <= 640 - 10 * i, lengths


@pytest.mark.parametrize("together", [1, 2, 4])
def test_each_generation_has_a_prompt_of_full_length_whatever_its_size(together: int) -> None:
    from helpers import models

    tokenizer = models.load_tokenizer("tiny")
    lengths = token_counts(gpu.long_cases(8, tokenizer, 640, group=together), tokenizer)
    assert all(max(lengths[i : i + together]) >= 640 for i in range(0, 8, together)), lengths
    assert together == 1 or min(lengths) < 640, "and the others are shorter: there is padding"


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


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("Attempting to unscale\nFP16 gradients."), "failed: ValueError: Attempting to"),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),  # from a library's own call
    ],
)
def test_any_other_failure_costs_one_cell_and_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, status: str
) -> None:
    pytest.importorskip("torch")

    def train(*args: object) -> None:
        raise error

    monkeypatch.setattr(gpu, "train", train)
    (row,) = gpu.run_cell("sft", gpu.dry_run_profile(tmp_path), None, 1, 0.0, 0.0)
    assert row["status"].startswith(status) and "\n" not in row["status"]
    assert ("estimate_gb" in row) == (status == "out of memory")


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
    row = gpu.peaks(10.8, watch)
    assert row.pop("estimate_error") == pytest.approx(-0.1)
    assert row == {
        "estimate_gb": 10.8,
        "allocated_gb": 9.0,
        "reserved_gb": 11.0,
        "card_gb": 12.0,
        "generation_gb": 9.0,
        "training_gb": 6.0,
    }


@pytest.mark.parametrize("warms_up", [True, False])
def test_a_step_that_only_warms_up_is_not_taken_for_a_figure(warms_up: bool) -> None:
    """A GRPO cell that the deadline ends in its second step has run one step, of a few tokens: it
    says nothing."""

    class Trainer:
        generation_config = SimpleNamespace(max_new_tokens=512)

    watch, control = gpu.stopwatch(0, 1e12), SimpleNamespace(should_training_stop=False)
    if warms_up:
        watch.warm_up(Trainer)
        assert Trainer.generation_config.max_new_tokens == gpu.WARM_TOKENS
    watch.on_step_begin(None, None, control)
    watch.on_step_end(None, None, control)
    assert Trainer.generation_config.max_new_tokens == 512
    row = gpu.timings(watch, {"batch": 8, "accumulate": 2})
    expected = "measured, first step"
    if warms_up:
        expected = "not measured: no step after the warm-up in the time"
    assert row["status"] == expected and ("seconds_per_step" in row) != warms_up


def test_the_time_of_a_step_is_shared_out_among_its_phases() -> None:
    watch = SimpleNamespace(generation=None, steps=[])
    row = gpu.timings(watch, {"batch": 8, "accumulate": 2})
    assert row["status"] == "not measured: no whole step in the time"
    watch.steps = [{"step": 9.0, "optimiser": 1.0}, *[{"step": 4.0, "optimiser": 1.0}] * 2]
    row = gpu.timings(watch, {"batch": 8, "accumulate": 2})
    assert (row["seconds_per_step"], row["optimiser_s"], row["forward_backward_s"]) == (4, 1, 3)
    assert row["steps"] == 2 and row["sequences_per_s"] == 4


HANGING = """
import sys, time
from benchmarks import gpu

gpu.RESERVE, gpu.train = 0, lambda *_: time.sleep(600)
sys.exit(gpu.main(["--dry-run-cpu", "--minutes", "0.4", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_it_ends_in_time_whatever_hangs(tmp_path: Path, root: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and time.monotonic() - began < 26, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert set(table["cell"]) == set(gpu.CELLS)
    assert (table["status"] == "not measured: time was up").all()
    assert "not measured" in done.stdout


@pytest.mark.slow
def test_a_dry_run_goes_through_every_cell(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run-cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert list(table.columns) == list(gpu.COLUMNS) and set(table["cell"]) == set(gpu.CELLS)
    assert table["status"].str.startswith("measured").all()
    is_trained = ~table["cell"].str.startswith("generate")
    trained = table[is_trained]
    assert (trained["seconds_per_step"] > 0).all()
    is_trl = trained["cell"].str.contains("TRL")
    assert ((trained["estimate_gb"] > 0) != is_trl).all(), "the estimate is about our settings"
    phases = table.dropna(subset=["rewards_s"])
    assert len(phases) == 2  # GRPO twice: where its step goes adds up
    parts = phases[["generation_s", "rewards_s", "forward_backward_s", "optimiser_s"]]
    assert (parts > 0).all(axis=None)
    assert (parts.sum(axis=1) / phases["seconds_per_step"]).between(0.95, 1.05).all()
    generated = table[~is_trained]
    assert len(generated) == 3 * len(gpu.BATCHES)
    assert (generated[["tokens_per_s", "prefill_s", "decode_tokens_per_s"]] > 0).all(axis=None)
    assert table["reserved_gb"].isna().all()  # memory of a card is not made up on a CPU
    stamp = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    names = [line.split(":")[0] for line in stamp]
    assert names == ["# device", "# host", "# versions", "# date", "# command"]
