"""Profiles: the choice, the arithmetic and its messages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import course, profiles

TINY = profiles.get("tiny")


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda p: p.name)
def test_every_profile_adds_up_and_is_frozen(profile: profiles.Profile) -> None:
    assert profile.validate() is profile
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.grpo_lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_launch_on_more_devices_is_checked_too(profile: profiles.Profile, processes: int) -> None:
    assert profile.validate(processes=processes) is profile
    odd = "64 roll-outs per step cannot be shared among 3 processes.*\n.* 16 rows of SFT"
    with pytest.raises(ValueError, match=odd):
        dataclasses.replace(
            TINY, grpo_prompts_per_step=8, grpo_num_generations=8, grpo_batch=64, sft_batch=16
        ).validate(processes=3)


@pytest.mark.parametrize(
    ("gpu_gb", "name"),
    [(None, "tiny"), (6, "tiny"), (14.7, "t4"), (23.6, "gpu24"), (79.2, "gpu24"), (139, "gpu24")],
)
def test_the_hardware_chooses(gpu_gb: float | None, name: str) -> None:
    assert profiles.choose(gpu_gb) == name


def test_icd_profile_overrides_and_an_unknown_name_lists_the_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ICD_PROFILE", "t4")
    assert profiles.current().name == "t4"
    monkeypatch.setenv("ICD_PROFILE", "huge")
    with pytest.raises(ValueError, match=r"no profile 'huge'\. Known: tiny .*t4 .*gpu24 .*paper"):
        profiles.current()


def test_without_a_driver_the_choice_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICD_PROFILE", raising=False)
    code = (
        "import os, sys\nreal = os.path.exists\nos.path.exists = lambda p: 'nvidia' not in str(p) and real(p)\n"
        "from helpers import profiles\nassert profiles.current().name == 'tiny' and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grpo_batch": 60},
            r"not divisible by grpo_num_generations = 8: make grpo_batch a multiple of 8",
        ),
        ({"grpo_batch": 16}, r"set grpo_grad_accum = 4"),
        ({"grpo_num_generations": 1, "grpo_batch": 8}, r"at least 2"),
        (
            {"grpo_steps_per_generation": 4, "grpo_save_steps": 10},
            r"cycle of 4 steps.*set it to 12",
        ),
        (
            {"grpo_batch": 16, "grpo_grad_accum": 4, "grpo_steps_per_generation": 6},
            r"must be a multiple or a divisor",
        ),
        ({"grpo_vllm": True}, r"set grpo_4bit = False"),
        ({"max_note_tokens": 384}, r"set it below max_prompt_tokens = 384"),
        ({"grpo_max_completion": 100, "max_new_tokens": 96}, r"set it to 96 or less"),
        ({"traces_share": 0.0}, r"traces_share = 0.0 must lie"),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_fix(change: dict, message: str) -> None:
    base = dataclasses.replace(
        TINY,
        grpo_prompts_per_step=8,
        grpo_num_generations=8,
        grpo_batch=64,
        grpo_grad_accum=1,
        max_note_tokens=256,
        max_prompt_tokens=384,
        max_new_tokens=96,
        grpo_max_completion=64,
    )
    base.validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(base, **change).validate()


def code_cell(root: Path, notebook: str, mark: str) -> str:
    cells = json.loads((root / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    return next(
        text
        for cell in cells
        if cell["cell_type"] == "code" and mark in (text := "".join(cell["source"]))
    )


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_trl_takes_every_profile_as_the_notebooks_pass_it(
    profile: profiles.Profile,
    stage: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    import trl

    notebook, kind = {"sft": ("03_lora_sft", "SFTConfig"), "grpo": ("04_qlora_grpo", "GRPOConfig")}[
        stage
    ]
    for processes in (1, 2, 4):
        names = {
            "profile": profile,
            "torch": torch,
            kind: getattr(trl, kind),
            "model": SimpleNamespace(dtype=torch.float32),
            "limit": profile.max_prompt_tokens + profile.max_new_tokens,
            f"{stage}_job": SimpleNamespace(work=tmp_path),
            "held_out": [1] if profile.teacher == "template" else None,
        }
        exec(code_cell(root, notebook, "settings = {"), names)
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(processes))
            names["batch"], names["accumulate"] = course.per_device(
                names["settings"]["batch"], names["settings"]["accumulate"]
            )
        cell = code_cell(root, notebook, f"arguments = {kind}(")
        exec(cell[cell.index("per_generation =" if stage == "grpo" else "arguments =") :], names)
        made = names["arguments"]
        rows = made.per_device_train_batch_size * made.gradient_accumulation_steps * processes
        assert rows == getattr(profile, f"{stage}_batch") * getattr(
            profile, f"{stage}_grad_accum"
        ), "a step is a step"
        assert made.max_steps == getattr(profile, f"{stage}_steps") and made.optim == getattr(
            profile, f"{stage}_optim"
        )
        assert made.gradient_checkpointing == profile.gradient_checkpointing
        assert (
            not made.bf16 and not made.fp16
        )  # by the dtype of the model, which TRL would not look at
        if stage == "sft":
            assert made.num_train_epochs == profile.sft_epochs and made.max_length == names["limit"]
        else:
            assert made.generation_batch_size * processes % profile.grpo_num_generations == 0
            assert (
                made.max_completion_length == profile.grpo_max_completion
                and made.beta == profile.grpo_beta
            )


@given(
    prompts=st.integers(1, 16),
    group=st.integers(2, 16),
    accum=st.sampled_from([1, 2, 4, 8]),
    cycle=st.integers(1, 4),
    saves=st.integers(1, 10),
)
def test_what_validate_lets_pass_trl_takes(
    prompts: int, group: int, accum: int, cycle: int, saves: int
) -> None:
    batch, rest = divmod(prompts * group, accum)
    profile = dataclasses.replace(
        TINY,
        grpo_prompts_per_step=prompts,
        grpo_num_generations=group,
        grpo_batch=batch or 1,
        grpo_grad_accum=accum,
        grpo_steps_per_generation=accum * cycle,
        grpo_save_steps=saves * cycle,
    )
    if rest or not batch:
        with pytest.raises(ValueError):
            profile.validate()
    else:
        profile.validate()
        assert (
            batch * accum * cycle % group == 0
        )  # generation_batch_size divisible by num_generations


def test_measured_times_never_make_an_artefact_stale() -> None:
    faster = dataclasses.replace(
        TINY, minutes={"03_lora_sft": 1}, peak_gb={"03_lora_sft": 2}, about="another text"
    )
    for name in ("cases", "sft", "grpo", "predictions"):
        assert faster.record(name) == TINY.record(name)
    changed = dataclasses.replace(TINY, grpo_lr=1.0)
    assert changed.record("sft") == TINY.record("sft") and changed.record("grpo") != TINY.record(
        "grpo"
    )


def test_times_are_told_or_said_to_be_unknown() -> None:
    timed = dataclasses.replace(TINY, minutes={"03_lora_sft": 4.2})
    assert timed.expected("03_lora_sft") == "about 4 min"
    assert timed.expected("99_none") == "time not measured"


def test_another_process_looks_for_the_card_and_what_is_hidden_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiles, "DRIVER", __file__)  # as if there were one
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout="23.6\n")
    )
    monkeypatch.delenv("ICD_PROFILE", raising=False)
    profiles._look.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert profiles.current().name == "tiny" and not profiles.unusable_card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert profiles.current().name == "gpu24" and not profiles.unusable_card()
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout="0\n")
    )
    profiles._look.cache_clear()
    assert profiles.current().name == "tiny" and profiles.unusable_card()
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, stdout="")
    )  # torch broke
    profiles._look.cache_clear()
    assert profiles.current().name == "tiny" and profiles.unusable_card()
    profiles._look.cache_clear()


def test_the_tiny_profile_stays_on_the_cpu_and_without_a_launcher_one_card_is_taken(
    places: Path,
) -> None:
    """The figures of the course are a CPU's; and SFTTrainer and GRPOTrainer refuse several cards without a launcher."""

    def visible(**env: str) -> str:
        code = "from helpers import course; course.setup(); import os; print('see', os.environ.get('CUDA_VISIBLE_DEVICES'))"
        clean = {
            k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | env,
            text=True,
            capture_output=True,
            check=True,
        )
        return done.stdout.splitlines()[-1]

    assert visible() == "see "
    assert visible(ICD_PROFILE="t4") == "see 0"
    assert visible(ICD_PROFILE="t4", CUDA_VISIBLE_DEVICES="1") == "see 1"
    assert visible(ICD_PROFILE="t4", LOCAL_RANK="1") == "see None"


def test_the_first_cell_of_each_notebook_names_the_time_and_memory_that_were_measured() -> None:
    tiny = profiles.get("tiny")
    for path in sorted(course.notebooks_dir().glob("0*.ipynb")):
        head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        memory = f", {tiny.peak_gb[path.stem]} GB" if path.stem in tiny.peak_gb else ""
        assert re.search(
            rf"\| time and memory \| tiny: {tiny.expected(path.stem)}{memory} [|·]", head
        ), path.name


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sft_lr", "1e-5", r"sft_lr = '1e-5' must be float"),
        ("sft_batch", 0, r"sft_batch = 0 must be int, at least 1"),
        ("grpo_grad_accum", 0, r"grpo_grad_accum = 0 must be int, at least 1"),
        ("traces_share", "half", r"traces_share = 'half'"),
        ("sft_4bit", "no", r"sft_4bit = 'no' must be bool"),
        ("sft_lora_r", True, r"sft_lora_r = True must be int"),
        ("infer_batch_tokens", 0, r"infer_batch_tokens = 0"),
        ("grpo_steps", -2, r"grpo_steps = -2 must be int, at least -1"),
        ("infer_cases", 0, r"infer_cases = 0 must be int \| None, at least 1"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_named(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(profiles.get("tiny"), **{field: value}).validate()


@pytest.mark.parametrize("line", ["  sft_batch: 8", "  sft_stepz: 8"])
def test_a_setting_that_stands_twice_or_is_none_is_named(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (Path(profiles.__file__).parent / "profiles.yaml").read_text()
    (tmp_path / "profiles.yaml").write_text(text.replace("tiny:\n", f"tiny:\n{line}\n", 1))
    monkeypatch.setattr(profiles, "__file__", str(tmp_path / "profiles.py"))
    name = line.strip().split(":")[0]
    with pytest.raises(
        ValueError, match=rf"profiles.yaml, tiny: {name} stands there twice or is no setting"
    ):
        profiles._load()
