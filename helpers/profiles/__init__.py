"""One record for each class of hardware (`<name>.yaml` beside this file): all that tells the tiny
model from the 7B one.

`sft` and `grpo` hold the argument names of TRL's SFTConfig and GRPOConfig, `lora` those of PEFT's
LoraConfig: notebooks pass them on as they are. `current()` chooses by the hardware; the environment
variable ICD_PROFILE overrides the choice, ICD_BASE the profile's base, ICD_TEACHER who writes the
traces. Taught in notebook 0.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TINY_BASE = Path(__file__).parent.parent / "tiny_base"
DRIVER = "/proc/driver/nvidia/version"
LEAST_GB = {"gpu24": 21, "t4": 10}  # memory of a card, in GiB, from which a profile is chosen
READING = ("base", "max_note_tokens", "max_prompt_tokens", "max_new_tokens")
# Of what may be less than 1; max_steps -1: go by epochs.
LEAST = {"max_steps": -1, "warmup_steps": 0, "beta": 0}
TEACHERS = ("template", "unsupervised", "oracle", "server", "server-oracle")
SMOKE = "-smoke"
STAGES = {  # the fields that the result of a stage depends on
    "data": ("admissions",),
    "traces": ("teacher", "traces_share"),
    "sft": (*READING, "lora", "sft"),
    "grpo": (*READING, "grpo"),
    "answers": (*READING, "inference"),
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Every number that depends on the hardware."""

    name: str
    about: str
    base: str  # "tiny" (ships with the course), a hub id, or a local folder
    teacher: str = "template"  # who writes the reasoning traces: one of TEACHERS
    admissions: int  # of the synthetic hospital, where ICD_DATA_DIR names no real one
    traces_share: float  # part of the training cases that gets a reasoning trace
    max_note_tokens: int  # the note is cut to this, the completion never
    max_prompt_tokens: int  # note, instructions and chat layout
    max_new_tokens: int  # reasoning and diagnosis
    four_bit: dict[str, bool]  # whether the base is in NF4 during "sft" and "grpo"
    lora: dict[str, Any]
    sft: dict[str, Any]
    grpo: dict[str, Any]
    inference: dict[str, Any]  # batch_tokens, cases (None: all test cases), constrained_cases
    # By notebook, where measured.
    minutes: dict[str, float] = field(default_factory=dict)
    peak_gb: dict[str, float] = field(default_factory=dict)

    def batch_size(self, samples: int = 1) -> int:
        """Cases that are answered at once, with so many completions each."""
        tokens = self.max_prompt_tokens + self.max_new_tokens
        return max(1, self.inference["batch_tokens"] // tokens // samples)

    def expected(self, notebook: str) -> str:
        """`about 4 min`, `under a minute` or `time not measured`."""
        minutes = self.minutes.get(notebook)
        if minutes is None:
            return "time not measured"
        return "under a minute" if minutes < 1 else f"about {minutes:.0f} min"

    def record(self, stage: str) -> dict[str, Any]:
        """The fields that the result of a stage depends on; the base with a mark of its weights."""
        names = STAGES.get(stage, ())
        if stage == "traces" and self.teacher != "template":  # a model writes them
            names += READING
        values = {name: getattr(self, name) for name in names}
        if "base" in values:
            values["base"] = fingerprint(self.base)
        return values

    def replace(self, **changes: Any) -> Profile:
        """A profile with some fields changed; of a dict, the entries that are named."""
        for name, value in changes.items():
            if isinstance(value, dict):
                changes[name] = getattr(self, name) | value
        return dataclasses.replace(self, **changes).check()

    def check(self) -> Profile:
        """The profile itself. Raises ValueError that names everything that does not add up, each
        with its remedy.

        TRL checks its own arguments when a trainer is configured; this is what it cannot know.
        """
        accumulation = self.grpo["gradient_accumulation_steps"]
        per_generation = self.grpo.get("steps_per_generation") or accumulation
        cycle = max(1, per_generation // accumulation)  # optimiser steps fed by one generation
        faults = []
        if self.grpo["save_steps"] % cycle:
            faults.append(
                f"grpo.save_steps must be a multiple of {cycle}, the steps that one generation "
                "feeds: a resumed run would repeat prompts"
            )
        if self.grpo.get("use_vllm") and self.four_bit["grpo"]:
            faults.append("grpo.use_vllm needs a 16-bit base: set four_bit.grpo to false")
        if self.max_note_tokens >= self.max_prompt_tokens:
            faults.append("max_note_tokens leaves no room for the instructions: set it lower")
        if self.grpo["max_completion_length"] > self.max_new_tokens:
            faults.append("grpo.max_completion_length exceeds max_new_tokens: set it lower")
        if not 0 < self.traces_share <= 1:
            faults.append(f"traces_share = {self.traces_share} must lie in (0, 1]")
        if self.teacher not in TEACHERS:
            known = ", ".join(TEACHERS)
            faults.append(f"teacher = {self.teacher!r} (ICD_TEACHER) must be one of {known}")
        if faults:
            raise ValueError(
                f"profile {self.name!r} does not add up:\n  - " + "\n  - ".join(faults)
            )
        return self


def read(path: Path) -> Profile:
    """The profile of a YAML file. Raises ValueError naming the file and what is missing, unknown or
    of the wrong kind."""
    record = yaml.safe_load(path.read_bytes())
    try:
        profile = Profile(name=path.stem, **record)
        for each in dataclasses.fields(profile):
            _check_kind(each, getattr(profile, each.name))
        return profile.check()
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Compare it with tiny.yaml.") from error


def _check_kind(each: dataclasses.Field, value: Any) -> None:
    kind = {"str": str, "int": int, "float": (int, float)}.get(each.type, dict)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{each.name} = {value!r} must be {each.type}")
    entries = value if isinstance(value, dict) else {each.name: value}
    for name, number in entries.items():
        least = LEAST.get(name, 1 if type(number) is int else 0)
        is_quoted = isinstance(number, str) and number[:1].isdigit()
        if is_quoted or (type(number) in (int, float) and number < least):
            raise ValueError(f"{name} = {number!r} must be a number, at least {least}")
        if each.name == "four_bit" and type(number) is not bool:
            raise ValueError(f"four_bit.{name} = {number!r} must be true or false")


def fingerprint(base: str) -> str:
    """A base with a mark of its weights: the tiny base's hash, sizes and times of a local folder's
    files, else the hub id."""
    folder = TINY_BASE if base == "tiny" else Path(base)
    if not folder.is_dir():
        return base
    if folder == TINY_BASE:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        mark = json.dumps(manifest.get("files", manifest)).encode()  # not how it was made
    else:
        kinds = (".safetensors", ".json", ".jinja", ".model")
        files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds]
        mark = str([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()
    return f"{base} {hashlib.sha256(mark).hexdigest()[:16]}"


PROFILES = {
    name: read(Path(__file__).with_name(f"{name}.yaml"))
    for name in ("tiny", "small", "t4", "gpu24", "paper")
}


def get(name: str) -> Profile:
    """The profile of this name; with "-smoke" behind it, that of its smoke test, with two steps.

    Raises ValueError that lists the known ones.
    """
    profile = PROFILES.get(name.removesuffix(SMOKE))
    if profile is None:
        known = "; ".join(f"{p.name} ({p.about})" for p in PROFILES.values())
        raise ValueError(f"ICD_PROFILE: there is no profile {name!r}. Known: {known}.")
    if name == profile.name:
        return profile
    two = {"max_steps": 2}
    smoke = profile.replace(name=name, traces_share=1.0, sft=two, grpo=two)
    return dataclasses.replace(smoke, minutes={}, peak_gb={})


def choose(gpu_memory: float | None) -> str:
    """Name of the profile for a card with so many GiB; None: no card. `paper` takes weeks and is
    never chosen for you."""
    for name, least in LEAST_GB.items():
        if (gpu_memory or 0) >= least:
            return name
    return "tiny"


def current() -> Profile:
    """The profile in force: ICD_PROFILE, else by the hardware; on the base that ICD_BASE names.

    ICD_BASE is a hub id or a folder; of a relative one, the course's own folder is the beginning.
    ICD_TEACHER names the teacher.
    """
    name = os.environ.get("ICD_PROFILE", "").strip()
    is_colab = "google.colab" in sys.modules  # where nobody asked for hours on its card
    profile = get(name or choose(None if is_colab else gpu_gb()))
    teacher = os.environ.get("ICD_TEACHER", "").strip() or profile.teacher
    base = os.environ.get("ICD_BASE", "").strip() or profile.base
    folder = Path(__file__).parents[2] / Path(base).expanduser()
    if base != "tiny" and folder.is_dir():
        base = str(folder)
    return profile.replace(teacher=teacher, base=base)


def gpu_gb() -> float | None:
    """Memory of the first CUDA device in GiB; None: no device that this torch can use, or hidden
    from it.

    Another process looks, and only where a driver may be: from the moment that torch has looked,
    nothing hides a card from it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    places = (DRIVER, "/dev/nvidiactl", "/dev/dxg")
    may_have_driver = os.name == "nt" or any(map(os.path.exists, places))
    if not may_have_driver or visible in ("", "-1"):
        return None
    return _ask_torch(visible)


def unusable_card() -> bool:
    """Whether a driver is there, but no card that this torch can use: too old a driver or card, or
    a torch without CUDA."""
    if os.environ.get("ICD_PROFILE") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return os.path.exists(DRIVER) and gpu_gb() is None


@functools.cache
def _ask_torch(visible: str | None) -> float | None:
    code = (
        "import torch\n"
        "has_card = torch.cuda.is_available()\n"
        "print(torch.cuda.get_device_properties(0).total_memory / 2**30 if has_card else 0)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return float(answer or 0) or None
