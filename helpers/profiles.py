"""One frozen record for each class of hardware (profiles.yaml): all that tells the tiny model from the 7B one.

`current()` chooses by the hardware; the environment variable ICD_PROFILE overrides the choice.
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

TINY_BASE = Path(__file__).parent / "tiny_base"
DRIVER = "/proc/driver/nvidia/version"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Every number that depends on the hardware. Fields sft_*, grpo_*, infer_* concern that stage alone."""

    name: str
    about: str
    base: str  # "tiny" (ships with the course), a hub id, or a local folder
    teacher: str = (
        "template"  # who writes the reasoning traces: "template", or the id of a larger model
    )
    gradient_checkpointing: bool = False

    admissions: int  # of the synthetic hospital, where ICD_DATA_DIR names no real one
    traces_share: float  # part of the training cases that gets a reasoning trace
    max_note_tokens: int  # the note is cut to this, the answer never
    max_prompt_tokens: int  # note, instructions and chat layout
    max_new_tokens: int  # reasoning and diagnosis

    sft_steps: int  # optimiser steps; -1: go by sft_epochs
    sft_epochs: float = 1.0
    sft_batch: int  # sequences per device and micro-step
    sft_grad_accum: int = 1
    sft_lr: float
    sft_warmup: int = 10
    sft_lora_r: int
    sft_lora_alpha: int
    sft_4bit: bool = True
    sft_optim: str = "adamw_torch"
    sft_save_steps: int = 50

    grpo_steps: int  # optimiser steps; -1: one epoch
    grpo_prompts_per_step: int
    grpo_num_generations: int  # roll-outs per prompt: the group within which advantages are taken
    grpo_batch: int  # completions per device and micro-step
    grpo_grad_accum: int = 1
    grpo_steps_per_generation: int | None = (
        None  # micro-steps fed by one generation; None: grpo_grad_accum
    )
    grpo_lr: float
    grpo_warmup: int = 0
    grpo_schedule: str = "constant_with_warmup"  # of the learning rate, as transformers names it
    grpo_4bit: bool = True
    grpo_temperature: float = 1.0
    grpo_max_completion: int
    grpo_loss_type: str = "dapo"
    grpo_beta: float = 0.0
    grpo_optim: str = "adamw_torch"
    grpo_save_steps: int = 20
    grpo_vllm: bool = False  # roll-outs by vLLM; not with a 4-bit base

    infer_batch_tokens: int  # prompt + answer tokens of one batch
    infer_cases: int | None = None  # test cases answered; None: all
    infer_constrained_cases: int = 300

    minutes: dict[str, float] = field(
        default_factory=dict
    )  # notebook -> minutes; absent: not measured
    peak_gb: dict[str, float] = field(
        default_factory=dict
    )  # notebook -> peak memory; absent: not measured

    def record(self, artefact: str) -> dict[str, object]:
        """The fields that an artefact depends on: the common ones and its stage's, never times or memory."""
        stage = {"sft": "sft_", "grpo": "grpo_", "predictions": "infer_"}.get(artefact, "-")
        other = tuple({"sft_", "grpo_", "infer_"} - {stage})
        keep = {k: v for k, v in dataclasses.asdict(self).items() if not k.startswith(other)}
        manifest = TINY_BASE / "manifest.json"
        if self.base == "tiny" and manifest.is_file():
            keep["base"] = "tiny " + hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
        return {k: v for k, v in keep.items() if k not in ("about", "minutes", "peak_gb")}

    def expected(self, notebook: str) -> str:
        """`about 4 min`, `under a minute` or `time not measured`."""
        minutes = self.minutes.get(notebook)
        return (
            "time not measured"
            if minutes is None
            else "under a minute"
            if minutes < 1
            else f"about {minutes:.0f} min"
        )

    def validate(self, *, processes: int = 1) -> Profile:
        """Check batch arithmetic and lengths before a model is loaded; returns the profile itself.

        `processes` is the number of devices, which share the rows of a step (course.per_device). Raises ValueError naming
        everything that is wrong, each with its fix.
        """
        kinds = {
            "int": int,
            "int | None": int | None,
            "float": int | float,
            "bool": bool,
            "str": str,
        }
        given = [
            (f.name, getattr(self, f.name), f.type)
            for f in dataclasses.fields(self)
            if f.type in kinds
        ]
        least = {
            "sft_steps": -1,
            "grpo_steps": -1,
            "sft_warmup": 0,
            "grpo_warmup": 0,
        }  # the other counts: 1
        if wrong := [
            f"{name} = {value!r} must be {kind}"
            + f", at least {least.get(name, 1)}" * ("int" in kind)
            for name, value, kind in given
            if not isinstance(value, kinds[kind])
            or isinstance(value, bool) != (kind == "bool")
            or ("int" in kind and value is not None and value < least.get(name, 1))
        ]:
            raise ValueError(f"profile {self.name!r} does not add up:\n  - " + "\n  - ".join(wrong))
        n, accum, save = self.grpo_num_generations, self.grpo_grad_accum, self.grpo_save_steps
        batch, rollouts = self.grpo_batch, self.grpo_prompts_per_step * n
        per_generation = self.grpo_steps_per_generation or accum
        cycle = max(1, per_generation // accum)  # optimiser steps fed by one generation
        fix = (
            f"set grpo_grad_accum = {rollouts // batch}"
            if rollouts % batch == 0
            else f"set grpo_batch = {n} and grpo_grad_accum = grpo_prompts_per_step"
        )
        checks = [  # what must hold, and what to say where it does not
            (
                n >= 2,
                "grpo_num_generations must be at least 2: an advantage compares roll-outs of one prompt",
            ),
            (
                batch * per_generation % max(n, 1) == 0,
                f"grpo_batch x steps per generation = {batch * per_generation} is not divisible by "
                f"grpo_num_generations = {n}: make grpo_batch a multiple of {n}",
            ),
            (
                rollouts == batch * accum,
                f"grpo_prompts_per_step x grpo_num_generations = {rollouts}, but grpo_batch x "
                f"grpo_grad_accum = {batch * accum}: {fix}",
            ),
            *(
                (
                    rows % processes == 0,
                    f"{rows} {what} per step cannot be shared among {processes} processes: launch on "
                    f"a divisor of {rows}",
                )
                for rows, what in (
                    (rollouts, "roll-outs"),
                    (self.sft_batch * self.sft_grad_accum, "rows of SFT"),
                )
            ),
            (
                per_generation % accum == 0 or accum % per_generation == 0,
                f"grpo_steps_per_generation = {per_generation} must be a multiple or a divisor of grpo_grad_accum = {accum}",
            ),
            (
                save % cycle == 0,
                f"grpo_save_steps = {save} is no multiple of the generation cycle of {cycle} steps, "
                f"so a resumed run would repeat prompts: set it to {-(-save // cycle) * cycle}",
            ),
            (
                not (self.grpo_vllm and self.grpo_4bit),
                "grpo_vllm needs a 16-bit base: set grpo_4bit = False",
            ),
            (
                self.max_note_tokens < self.max_prompt_tokens,
                f"max_note_tokens = {self.max_note_tokens} leaves no "
                f"room for the instructions: set it below max_prompt_tokens = {self.max_prompt_tokens}",
            ),
            (
                self.grpo_max_completion <= self.max_new_tokens,
                f"grpo_max_completion = {self.grpo_max_completion} "
                f"exceeds max_new_tokens: set it to {self.max_new_tokens} or less",
            ),
            (0 < self.traces_share <= 1, f"traces_share = {self.traces_share} must lie in (0, 1]"),
        ]
        if self.base == "tiny" and (TINY_BASE / "config.json").is_file():
            config = json.loads((TINY_BASE / "config.json").read_text())
            head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            widths = (
                config["hidden_size"],
                config["intermediate_size"],
                head * config["num_key_value_heads"],
            )
            tokens, room = (
                self.max_prompt_tokens + self.max_new_tokens,
                config["max_position_embeddings"],
            )
            checks += [
                (
                    not any(width % 64 for width in widths),
                    f"the tiny base's widths {widths} are no multiples "
                    "of 64, as NF4 needs: change them in helpers/tiny_base and run make tiny-base",
                ),
                (
                    tokens <= room,
                    f"max_prompt_tokens + max_new_tokens = {tokens} exceeds the tiny base's "
                    f"context of {room}: lower one of them",
                ),
            ]
        if wrong := [text for holds, text in checks if not holds]:
            raise ValueError(f"profile {self.name!r} does not add up:\n  - " + "\n  - ".join(wrong))
        return self


def _load() -> dict[str, Profile]:
    loaded = {}
    for name, record in yaml.safe_load(
        (Path(__file__).parent / "profiles.yaml").read_text(encoding="utf-8")
    ).items():
        fields: dict[str, Any] = {}
        for key, value in record.items():
            more = (
                {f"{key}_{k}": v for k, v in value.items()}
                if key in ("sft", "grpo", "infer")
                else {key: value}
            )
            if wrong := (fields.keys() & more.keys()) or more.keys() - {
                f.name for f in dataclasses.fields(Profile)
            }:
                raise ValueError(
                    f"helpers/profiles.yaml, {name}: {', '.join(sorted(wrong))} stands there twice or is no setting"
                )
            fields |= more
        loaded[name] = Profile(name=name, **fields)
    return loaded


PROFILES = _load()


def get(name: str) -> Profile:
    """The profile of this name. Raises ValueError that lists the known ones."""
    if name not in PROFILES:
        known = "; ".join(f"{p.name} ({p.about})" for p in PROFILES.values())
        raise ValueError(f"ICD_PROFILE: there is no profile {name!r}. Known: {known}.")
    return PROFILES[name]


def choose(gpu_gb: float | None) -> str:
    """Name of the profile for a card with `gpu_gb` GiB of memory; None: no CUDA device. `paper` takes weeks on one card, so it
    is never chosen by hardware alone."""
    sizes = ((21, "gpu24"), (10, "t4"))
    return next((name for least, name in sizes if gpu_gb is not None and gpu_gb >= least), "tiny")


def current() -> Profile:
    """The profile in force: ICD_PROFILE, else by the hardware. Validated for the number of processes launched."""
    name = os.environ.get("ICD_PROFILE", "").strip()
    return get(name or choose(_gpu_gb())).validate(processes=int(os.environ.get("WORLD_SIZE", "1")))


def _gpu_gb() -> float | None:
    """Memory of the first CUDA device in GiB; None: no device that this torch can use, or hidden from it.

    Another process looks, and only where a driver may be: from the moment that torch has looked, nothing hides a card from it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    maybe = os.name == "nt" or any(
        os.path.exists(path) for path in (DRIVER, "/dev/nvidiactl", "/dev/dxg")
    )
    return _look(visible) if maybe and visible not in ("", "-1") else None


def unusable_card() -> bool:
    """Whether a driver is there, but no card that this torch can use: too old a driver or card, or a torch without CUDA."""
    wanted = not os.environ.get("ICD_PROFILE") and os.environ.get("CUDA_VISIBLE_DEVICES") not in (
        "",
        "-1",
    )
    return wanted and os.path.exists(DRIVER) and _gpu_gb() is None


@functools.cache
def _look(visible: str | None) -> float | None:
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0)"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    ).stdout
    return float(found or 0) or None
