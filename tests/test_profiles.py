"""Profiles: the choice by hardware, TRL's and PEFT's own names, and what is refused with its remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import course, profiles, training
from helpers.machinery import memory

TINY = profiles.get("tiny")
ALL = profiles.PROFILES.values()


@pytest.mark.parametrize("profile", ALL, ids=lambda p: p.name)
def test_every_profile_adds_up_and_is_frozen(profile: profiles.Profile) -> None:
    assert profile.check() is profile
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.base = "x"  # type: ignore[misc]


@pytest.mark.parametrize("profile", ALL, ids=lambda p: p.name)
def test_trl_and_peft_take_every_entry_under_its_own_name(
    profile: profiles.Profile, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    for stage, config in (("sft", SFTConfig), ("grpo", GRPOConfig)):
        entries = getattr(profile, stage)
        given = training.defaults(torch.float32, **entries)
        arguments = config(output_dir=str(tmp_path), **given)
        for name, value in entries.items():
            taken = getattr(arguments, name)
            assert getattr(taken, "value", taken) == value, name
    assert LoraConfig(**profile.lora).r == profile.lora["r"]
    with pytest.raises(TypeError, match="learning_rat"):
        GRPOConfig(output_dir=str(tmp_path), **(profile.grpo | {"learning_rat": 1}))


@pytest.mark.parametrize("profile", ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("processes", [2, 4])
def test_every_profile_can_be_launched_on_more_devices(
    profile: profiles.Profile, processes: int, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for entries in (profile.sft, profile.grpo):
        share = memory.per_device(entries)
        product = share["per_device_train_batch_size"] * share["gradient_accumulation_steps"]
        whole = entries["per_device_train_batch_size"] * entries["gradient_accumulation_steps"]
        assert product * processes == whole


def test_the_tiny_base_suits_nf4_and_its_context() -> None:
    config = json.loads((profiles.TINY_BASE / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    key_width = head * config["num_key_value_heads"]
    widths = (config["hidden_size"], config["intermediate_size"], key_width)
    assert not any(width % 64 for width in widths), "NF4 wants multiples of 64"
    assert TINY.max_prompt_tokens + TINY.max_new_tokens <= config["max_position_embeddings"]


@pytest.mark.parametrize(
    ("gpu_gb", "name"),
    [(None, "tiny"), (6, "tiny"), (14.7, "t4"), (23.6, "gpu24"), (79.2, "gpu24"), (139, "gpu24")],
)
def test_the_hardware_chooses(gpu_gb: float | None, name: str) -> None:
    assert profiles.choose(gpu_gb) == name


def test_icd_profile_overrides_and_an_unknown_name_lists_the_known(monkeypatch) -> None:
    monkeypatch.setenv("ICD_PROFILE", "t4")
    assert profiles.current().name == "t4"
    monkeypatch.setenv("ICD_PROFILE", "huge")
    with pytest.raises(ValueError, match=r"no profile 'huge'\. Known: tiny .*t4 .*gpu24 .*paper"):
        profiles.current()


def test_icd_base_names_another_base_for_the_profile_in_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder is found from wherever a notebook's kernel was started."""
    monkeypatch.setenv("ICD_PROFILE", "small")
    monkeypatch.delenv("ICD_BASE", raising=False)
    assert profiles.current() == profiles.get("small")
    assert profiles.get("small").base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.chdir(tmp_path)
    for given, base in (
        ("helpers/tiny_base", str(profiles.TINY_BASE)),  # beginning at the course's own folder
        (str(tmp_path), str(tmp_path)),
        ("owner/model", "owner/model"),
        ("tiny", "tiny"),
        (" ", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ):
        monkeypatch.setenv("ICD_BASE", given)
        assert profiles.current().base == base
    monkeypatch.setenv("ICD_BASE", "helpers/tiny_base")
    assert profiles.current().replace(base="x") == profiles.get("small").replace(base="x")
    assert profiles.get("small").record("sft") != profiles.current().record("sft")


def test_without_a_driver_the_choice_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICD_PROFILE", raising=False)
    code = (
        "import os, sys\nreal = os.path.exists\n"
        "os.path.exists = lambda p: 'nvidia' not in str(p) and real(p)\n"
        "from helpers import profiles\n"
        "assert profiles.current().name == 'tiny' and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


CHANGES = [
    ({"grpo": {"steps_per_generation": 8, "save_steps": 10}}, r"save_steps.*multiple of 4"),
    ({"grpo": {"use_vllm": True}}, r"four_bit.grpo to false"),
    ({"max_note_tokens": 384}, r"no room for the instructions"),
    ({"grpo": {"max_completion_length": 100}}, r"exceeds max_new_tokens"),
    ({"traces_share": 0.0}, r"traces_share = 0.0 must lie"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_does_not_add_up_is_refused_with_its_remedy(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TINY.replace(**change)


def test_replace_changes_the_named_entries_alone() -> None:
    changed = TINY.replace(grpo={"max_steps": 3}, max_new_tokens=100)
    assert changed.grpo == TINY.grpo | {"max_steps": 3} and changed.max_new_tokens == 100
    assert TINY.grpo["max_steps"] != 3


FILES = [
    ("sft", "learning_rate", "1e-5", r"learning_rate = '1e-5' must be a number"),
    ("sft", "per_device_train_batch_size", 0, r"per_device_train_batch_size = 0 .*at least 1"),
    ("grpo", "gradient_accumulation_steps", 0, r"gradient_accumulation_steps = 0 .*at least 1"),
    ("grpo", "max_steps", -2, r"max_steps = -2 must be a number, at least -1"),
    ("lora", "r", 0, r"r = 0 .*at least 1"),
    ("inference", "batch_tokens", 0, r"batch_tokens = 0"),
    ("four_bit", "sft", "no", r"four_bit.sft = 'no' must be true or false"),
    (None, "traces_share", "half", r"traces_share = 'half' must be float"),
    (None, "max_new_tokens", True, r"max_new_tokens = True must be int"),
    (None, "sft", 7, r"sft = 7 must be dict"),
    (None, "learning_rate", 1.0, r"unexpected keyword argument 'learning_rate'"),
]


@pytest.mark.parametrize(("part", "name", "value", "says"), FILES)
def test_a_file_with_a_fault_is_named(
    tmp_path: Path, part: str | None, name: str, value: object, says: str
) -> None:
    file = Path(profiles.__file__).with_name("tiny.yaml")
    record = yaml.safe_load(file.read_text())
    (record[part] if part else record)[name] = value
    copy = tmp_path / "mine.yaml"
    copy.write_text(yaml.safe_dump(record))
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{says}"):
        profiles.read(copy)


def test_a_file_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("about: x\nbase: tiny\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: .*missing.*admissions"):
        profiles.read(tmp_path / "mine.yaml")


def test_measured_times_never_make_an_artefact_stale() -> None:
    faster = TINY.replace(minutes={"03_lora_sft": 1}, peak_gb={"03_lora_sft": 2}, about="other")
    for stage in ("cases", "traces", "sft", "grpo", "answers", "metrics"):
        assert faster.record(stage) == TINY.record(stage)
    changed = TINY.replace(grpo={"learning_rate": 1.0})
    assert changed.record("sft") == TINY.record("sft")
    assert changed.record("grpo") != TINY.record("grpo")


def test_a_base_is_known_by_its_weights(tmp_path: Path) -> None:
    assert profiles.fingerprint("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = profiles.fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert profiles.fingerprint(str(tmp_path)) != before
    for name in ("chat_template.jinja", "tokenizer.model", "manifest.json"):
        before = profiles.fingerprint(str(tmp_path))
        (tmp_path / name).write_text("{}")
        assert profiles.fingerprint(str(tmp_path)) != before, name
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert profiles.fingerprint(str(tmp_path)) != before, "a manifest of a copied base is not asked"
    assert profiles.fingerprint("tiny").startswith("tiny ")


def test_times_are_told_or_said_to_be_unknown() -> None:
    timed = TINY.replace(minutes={"03_lora_sft": 4.2})
    assert timed.expected("03_lora_sft") == "about 4 min"
    assert timed.expected("99_none") == "time not measured"


def test_another_process_looks_for_the_card_and_what_is_hidden_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(text: str, code: int = 0) -> None:
        done = subprocess.CompletedProcess((), code, stdout=text)
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
        profiles._ask_torch.cache_clear()

    monkeypatch.setattr(profiles, "DRIVER", __file__)  # as if there were one
    monkeypatch.delenv("ICD_PROFILE", raising=False)
    answers("23.6\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert profiles.current().name == "tiny" and not profiles.unusable_card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert profiles.current().name == "gpu24" and not profiles.unusable_card()
    answers("0\n")
    assert profiles.current().name == "tiny" and profiles.unusable_card()
    answers("", 1)  # torch broke
    assert profiles.current().name == "tiny" and profiles.unusable_card()
    profiles._ask_torch.cache_clear()


def test_the_tiny_profile_stays_on_the_cpu_and_without_a_launcher_one_card_is_taken(
    places: Path,
) -> None:
    """The figures of the course are a CPU's; and SFTTrainer and GRPOTrainer refuse several cards without a launcher."""

    def visible(**env: str) -> str:
        code = (
            "from helpers import course; course.setup(); import os; "
            "print('see', os.environ.get('CUDA_VISIBLE_DEVICES'))"
        )
        hidden = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=clean | env, text=True, capture_output=True, check=True)
        return done.stdout.splitlines()[-1]

    assert visible() == "see "
    assert visible(ICD_PROFILE="t4") == "see 0"
    assert visible(ICD_PROFILE="t4", CUDA_VISIBLE_DEVICES="1") == "see 1"
    assert visible(ICD_PROFILE="t4", LOCAL_RANK="1") == "see None"


def test_the_first_cell_of_each_notebook_names_the_time_and_memory_that_were_measured() -> None:
    for path in sorted(course.notebooks_dir().glob("0*.ipynb")):
        head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        memory = f", {TINY.peak_gb[path.stem]} GB" if path.stem in TINY.peak_gb else ""
        line = rf"\| time and memory \| tiny: {TINY.expected(path.stem)}{memory} [|·]"
        assert re.search(line, head), path.name
