"""What a trainer shows and keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from helpers import training
from helpers.machinery import memory


@pytest.mark.parametrize(
    ("processes", "batch", "accumulate", "each"),
    [
        (1, 16, 1, (16, 1)),
        (2, 16, 1, (8, 1)),
        (4, 2, 8, (2, 2)),
        (4, 2, 16, (2, 4)),
        (3, 4, 6, (4, 2)),
        (8, 2, 4, (1, 1)),
    ],
)
def test_the_processes_share_the_rows_of_a_step(
    monkeypatch, processes: int, batch: int, accumulate: int, each: tuple
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    arguments = dict(zip(names, (batch, accumulate), strict=True)) | {"learning_rate": 1.0}
    share = memory.per_device(arguments)
    assert tuple(share[name] for name in names) == each and share["learning_rate"] == 1.0
    assert (
        memory.per_device(arguments | {"steps_per_generation": 50})["steps_per_generation"]
        == each[1]
    )
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(ValueError, match="11 rows per step cannot be shared among 7 processes"):
        memory.per_device(dict(zip(names, (11, 1), strict=True)))


def test_defaults_follow_the_precision_and_call_no_one() -> None:
    import torch

    entries = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for dtype, flags in ((torch.bfloat16, (True, False)), (torch.float16, (False, True))):
        arguments = training.defaults(dtype, **entries)
        assert (arguments["bf16"], arguments["fp16"]) == flags
    assert training.defaults(torch.float32, **entries)["report_to"] == "none"


def test_steps_go_on_from_where_a_training_does(places: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ICD_HEADLESS", "1")
    steps = training.Steps("SFT")
    state = SimpleNamespace(max_steps=30, global_step=20)
    args = SimpleNamespace(gradient_checkpointing=False)
    steps.on_train_begin(args, state, None)
    for state.global_step in range(21, 31):
        steps.on_step_end(args, state, None)
    assert steps.bar.n == 30 and steps.bar.total == 30
    steps.on_train_end(args, state, None)
    assert "30/30" in capsys.readouterr().err


def test_the_held_out_reward_is_measured_once_a_step_and_where_a_training_goes_on() -> None:
    measured = []
    rows = []
    watch = training.HeldOut(5, lambda: measured.append(1) or 0.5, rows.append)
    state = SimpleNamespace(global_step=0, max_steps=12, log_history=[])
    watch.on_train_begin(None, state, None)
    watch.on_train_begin(None, state, None)
    for state.global_step in range(1, 13):
        watch.on_step_end(None, state, None)
    assert [row["step"] for row in state.log_history] == [0, 5, 10, 12]
    assert len(measured) == 4 and rows == state.log_history


def test_one_group_watches_a_reward_under_its_own_name(monkeypatch) -> None:
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append(figure))
    group = training.OneGroup(2, 2, lambda texts, codes: (texts, codes))

    def some_reward(completions, code, **columns):
        return [float(len(c[0]["content"])) for c in completions]

    watched = group.watching(some_reward)
    assert watched.__name__ == "some_reward"
    completions = [[{"content": text}] for text in ("a", "bb", "ccc")]
    assert watched(completions, ["I10"] * 3) == [1.0, 2.0, 3.0]
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    group.on_step_end(None, state, None)
    assert not shown
    state.global_step = 2
    group.on_step_end(None, state, None)
    assert shown == [(["a", "bb"], ["I10", "I10"])]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_second_training_in_a_process_can_load_a_checkpoint_too(
    places: Path, monkeypatch, processes: str
) -> None:
    import torch

    monkeypatch.setenv("WORLD_SIZE", processes)
    for label in ("sft", "grpo", "sft"):
        training.Steps(label)
    torch.save({"state": torch.ones(2)}, places / "optimizer.pt")
    if processes == "2":  # there a CPU is called so
        place = torch.device("cpu:0")
        assert torch.load(places / "optimizer.pt", map_location=place)["state"].sum() == 2


def test_an_older_card_trains_in_half_precision_with_its_weights_in_float32(monkeypatch) -> None:
    import torch

    from helpers import models

    entries = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype, compute, flags in (
        ((7, 5), torch.float32, torch.float16, (False, True)),  # a T4
        ((8, 0), torch.bfloat16, torch.bfloat16, (True, False)),
        ((9, 0), torch.bfloat16, torch.bfloat16, (True, False)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert models.dtype_for_device() == dtype
        assert models.nf4().bnb_4bit_compute_dtype == compute
        arguments = training.defaults(models.dtype_for_device(), **entries)
        assert (arguments["bf16"], arguments["fp16"]) == flags
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.dtype_for_device() == models.nf4().bnb_4bit_compute_dtype == torch.float32
    arguments = training.defaults(torch.float32, **entries)
    assert not arguments["bf16"] and not arguments["fp16"]


def test_a_training_shorter_than_its_logging_steps_keeps_its_mean_loss(tmp_path: Path) -> None:
    last = {"step": 2, "train_loss": 1.5, "train_runtime": 3.0}
    for history, losses in (
        ([last], [1.5]),
        ([{"step": 1, "loss": 2.0}, last], [2.0]),
        ([{"step": 0, "eval_reward": 0.4}, last], [None]),
    ):
        trainer = SimpleNamespace(
            save_model=lambda folder: None, state=SimpleNamespace(log_history=history)
        )
        training.save(trainer, tmp_path)
        log = pd.read_csv(tmp_path / "training_log.csv")
        assert [*log.get("loss", [None])] == losses
