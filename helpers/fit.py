"""Will it fit? The peak memory of SFT and GRPO, from the base's dimensions and the profile, before anything is loaded.

An estimate, not a measurement: `python -m benchmarks.gpu` measures. docs/scaling.md compares the two where both are known.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import models, profiles
from helpers.profiles import Profile

NOTEBOOK = {"sft": "03_lora_sft", "grpo": "04_qlora_grpo"}
#: a layer's part of a token on a T4 (False) and an A100 (True), by TRL's QLoRA GRPO notebook (28 layers, 256 tokens)
LAYER_SECONDS = {False: 94 / 256 / 28, True: 33 / 256 / 28}
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
#: fields of _SHAPE of Qwen/Qwen2.5-*-Instruct, largest first
QWEN = tomllib.loads(Path(__file__).with_name("qwen.toml").read_text(encoding="utf-8"))


def config(base: str) -> dict[str, Any]:
    """The config of a profile's base: of its folder, of the table above, or of the hub's local cache; of a model for pictures
    and text, its part for text. Raises OSError if there is none, or none that the estimate knows how to read."""
    if base in QWEN:
        return QWEN[base]
    if (file := Path(models.base_path(base), "config.json")).is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{file} is damaged: {error}") from error
    else:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(base, local_files_only=True).to_dict()
    found |= found.get("text_config") or {}
    lacking = [name for name in (*_SHAPE[:4], "vocab_size") if not isinstance(found.get(name), int)]
    if lacking or any("expert" in name for name in found):
        what = f"no {', '.join(lacking)}" if lacking else "a mixture of experts"
        raise OSError(f"{base}: memory cannot be estimated; its config.json tells of {what}.")
    return found


def device_gb() -> tuple[float, float]:
    """(free, total) memory in GB of 1e9 bytes: of the first CUDA device (in a launch, of the process's own), what its allocator
    keeps idle counted as free; without one, available and installed RAM, shared out among the processes of a launch."""
    if profiles._gpu_gb() is None:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available / 1e9 / _processes(), memory.total / 1e9 / _processes()
    import torch

    device = int(os.environ.get("LOCAL_RANK", "0"))
    free, total = torch.cuda.mem_get_info(device)
    return (
        free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    ) / 1e9, total / 1e9


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def estimate(
    profile: Profile, stage: str, *, processes: int = 1, gpu: bool | None = None
) -> dict[str, float]:
    """Peak memory of one process in training stage "sft" or "grpo", in GB of 1e9 bytes, with the terms it is made of.

    Sequences are taken as long as the profile allows; several processes share the rows of a step. b: 2 bytes (bf16, fp16), or
    4 in float32 without a GPU (`gpu`; None: as on this machine). H, I, L: hidden width, MLP width, layers; T: tokens of one
    micro-step, batch x (prompt + answer).

    weights      linear maps at 0.516 bytes in NF4 (4 bits, and 0.127 for double-quantised scales: Dettmers et al. 2023,
                 section 3.2), else b; embeddings and untied output layer b
    lora         16 bytes a parameter: float32 weight, gradient, two Adam moments (an 8-bit optimiser takes some 6 less); 4
                 more with several processes, for DDP's gradient buckets
    activations  with gradient checkpointing (Chen et al. 2016) the input of every layer, b·L·H·T, and what one layer keeps for
                 its backward pass, b·(10H + 6I)·T; without it L times the latter, which assumes that every layer keeps as
                 much as the one recomputed. In 4 bits also the largest weight matrix, dequantised
    head         TRL scores at most 4,096 tokens by 32,768 entries of the vocabulary at a time (trl/kernels): 8 bytes each
    kv           GRPO's generation: keys and values of all completions generated at once, batch x steps per generation
    prefill      GRPO's generation first reads all these prompts in one pass: b·(6H + 4I) for each of their tokens; 2·b·I more on
                 a GPU, where float32 adapters on a 16-bit base work on float32 copies (TRL generates outside autocast)
    overhead     0.8: CUDA context, kernels, fragmentation. On a CPU 1.9: 0.8 for Python and its libraries, as seen, and 1.1 for
                 freed memory that models.keep_memory keeps, set by the two measured peaks of `tiny`
    peak         weights + lora + max(activations + head, generation) + overhead

    Not counted: roll-outs by vLLM, which takes a share of the card of its own; attention scores, which SDPA does not keep; and on
    a 16-bit base the copies that PEFT makes of each LoRA layer's input, some 4·I a token at once and 2·(6H + I) in one layer.
    All but `prefill` was set by one peak of TRL's QLoRA GRPO notebook on a T4; nine more lie within 15 % (docs/scaling.md).
    tests/test_fit.py follows every live tensor of small models: it agrees on `prefill`, finds 18H + 7I in the backward pass of a
    recomputed layer (a fifth more `activations` for 7B), and less than 10H + 6I kept by a layer that is not. Raises ValueError
    for another stage, OSError as `config` does.
    """
    if stage not in NOTEBOOK:
        raise ValueError(f"estimate: stage is {stage!r}, but must be one of {', '.join(NOTEBOOK)}.")
    c, grpo, p = config(profile.base), stage == "grpo", profile
    b = 2 if (profiles._gpu_gb() is not None if gpu is None else gpu) else 4
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = (c.get(field) for field in _SHAPE)
    head = c.get("head_dim") or hidden // heads
    q, kv = heads * head, (kv_heads or heads) * head
    batch, four_bit, prompt = (
        getattr(p, f"{stage}_batch"),
        getattr(p, f"{stage}_4bit"),
        p.max_prompt_tokens,
    )
    rows = (
        batch * getattr(p, f"{stage}_grad_accum") // processes
    )  # a process's share of a step, as course.per_device has it
    batch = max((k for k in range(1, batch + 1) if rows % k == 0), default=1)
    length = prompt + (p.grpo_max_completion if grpo else p.max_new_tokens)
    layer = b * (10 * hidden + 6 * inner)
    kept = b * layers * hidden + layer if p.gradient_checkpointing else layers * layer
    at_once = (
        (batch * (p.grpo_steps_per_generation or 0) or rows) if grpo and not p.grpo_vllm else 0
    )
    cache = at_once * 2 * layers * kv * b  # for one token of each completion
    matrices = layers * (2 * hidden * (q + kv) + 3 * hidden * inner)
    terms = {
        "weights": (0.516 if four_bit else b) * matrices
        + b * vocabulary * hidden * (1 if tied else 2),
        "lora": p.sft_lora_r
        * layers
        * (7 * hidden + 2 * q + 2 * kv + 3 * inner)
        * (16 + 4 * (processes > 1)),
        "activations": batch * length * kept + four_bit * b * hidden * inner,
        "head": min(batch * length, 4096) * min(vocabulary, 32768) * 8,
        "kv": cache * length,
        "prefill": at_once * prompt * b * (6 * hidden + (6 if b == 2 else 4) * inner),
        "overhead": 0.8e9 if b == 2 else 1.9e9,
    }
    training, generation = (
        terms["activations"] + terms["head"],
        max(terms["kv"], cache * prompt + terms["prefill"]),
    )
    terms["peak"] = terms["weights"] + terms["lora"] + terms["overhead"] + max(training, generation)
    return {name: value / 1e9 for name, value in terms.items()}


def rollout_seconds(profile: Profile, *, new_card: bool) -> float:
    """Seconds that the roll-outs of one GRPO step take with transformers' generate, by order of magnitude.

    A token takes the time to call each layer's many small kernels, whatever the batch; that time is TRL's (LAYER_SECONDS), on an
    A100 for cards with bf16 (`new_card`), else on a T4. The forward and backward passes come on top.
    """
    generations = profile.grpo_grad_accum / (
        profile.grpo_steps_per_generation or profile.grpo_grad_accum
    )
    tokens = generations * profile.grpo_max_completion
    return tokens * config(profile.base)["num_hidden_layers"] * LAYER_SECONDS[new_card]


def measured(profile: Profile, stage: str) -> float | None:
    """Measured peak in GB, where this is the profile's class of hardware and none of its settings was changed."""
    same = profile == profiles.PROFILES.get(profile.name) and (profiles._gpu_gb() is None) == (
        profile.base == "tiny"
    )
    return profile.peak_gb.get(NOTEBOOK[stage]) if same else None


def _levers(p: Profile, stage: str) -> list[list[dict[str, Any]]]:
    """Settings that can be lowered, the harmless ones first: each a list of changes, the nearest first. The last is the base."""
    batch, accum, n = (
        getattr(p, f"{stage}_batch"),
        getattr(p, f"{stage}_grad_accum"),
        p.grpo_prompts_per_step,
    )
    grpo, notes = stage == "grpo", [p.max_note_tokens * quarters // 4 for quarters in (3, 2, 1)]
    at_once = grpo and p.grpo_steps_per_generation and batch * p.grpo_steps_per_generation
    return [
        [{"gradient_checkpointing": True}],
        [
            {f"{stage}_batch": k, f"{stage}_grad_accum": batch * accum // k}
            | ({"grpo_steps_per_generation": at_once // k} if at_once else {})
            for k in range(batch, 0, -1)
            if batch * accum % k == 0
        ],
        [{"grpo_steps_per_generation": k} for k in range(accum * grpo, 0, -1) if accum % k == 0],
        [{f"{stage}_4bit": True}],
        [
            {"max_note_tokens": k, "max_prompt_tokens": p.max_prompt_tokens - p.max_note_tokens + k}
            for k in notes
        ],
        [
            {"grpo_prompts_per_step": k, "grpo_grad_accum": accum * k // n}
            for k in range(n * grpo, 0, -1)
            if accum * k % n == 0
        ],
        [{"base": name} for name in QWEN],
    ]


def remedies(
    profile: Profile, stage: str, room: float, *, processes: int = 1
) -> list[tuple[Profile, float]]:
    """Profiles that fit into `room` GB, each with its estimate: one for each setting that is enough when lowered alone, to the
    nearest value; where only a smaller base would be, also one with several settings lowered together.

    Each is estimated anew and passes Profile.validate. Batch and steps per generation leave the step's sequences as they are.
    """

    def lowered(p: Profile, lever: int) -> tuple[Profile, float]:
        options = [(p, before := estimate(p, stage, processes=processes)["peak"])]
        for change in _levers(p, stage)[lever]:
            try:
                q = dataclasses.replace(p, **change).validate(processes=processes)
            except ValueError:
                continue
            if (gb := estimate(q, stage, processes=processes)["peak"]) < before:
                options.append((q, gb))
        return next(
            (option for option in options if option[1] <= room),
            min(options, key=lambda option: option[1]),
        )

    *settings, base = (lowered(profile, lever) for lever in range(7))
    found, together = [option for option in settings if option[1] <= room], (profile, 0.0)
    for lever in [*range(4), *range(6)] * (not found):  # the harmless ones twice
        together = lowered(together[0], lever)
        if together[1] <= room:
            found.append(together)
            break
    return found + [base] * (base[1] <= room)


def _advice(profile: Profile, stage: str, room: float) -> str:
    before, lines = estimate(profile, stage, processes=_processes())["peak"], []
    for p, gb in remedies(profile, stage, room, processes=_processes()):
        old, new = dataclasses.asdict(profile), dataclasses.asdict(p)
        change = ", ".join(f"{name} = {value}" for name, value in new.items() if value != old[name])
        lines.append(f"\n  - {change}: {gb:.1f} GB, {before - gb:.1f} GB less")
    if not lines:
        return "No setting makes it fit: take a smaller profile (ICD_PROFILE) or a larger device."
    return (
        "Any one of these is enough (in helpers/profiles.yaml or the settings cell), by estimate:"
        + "".join(lines)
    )


def check(profile: Profile, stage: str) -> None:
    """Refuse, before a model is loaded, what the device has no room for.

    Raises MemoryError that says what is needed, what there is, and the nearest settings that fit. On a CPU all the RAM that is
    installed counts, since other programs can give way. A base is let pass whose config is not on this machine yet, or not one
    that `config` can read.
    """
    (free, total), gpu = device_gb(), profiles._gpu_gb() is not None
    try:
        guess = estimate(profile, stage, processes=_processes())["peak"]
    except OSError:
        return
    need = measured(profile, stage) or guess
    if need > (room := free if gpu else total):
        raise MemoryError(
            f"{stage.upper()} in profile {profile.name!r} needs about {need:.1f} GB, there are {room:.1f} GB"
            f"{'' if gpu else ' (on a CPU a rough estimate)'}. {_advice(profile, stage, room - need + guess)}"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, numpy or Python says that there was no memory: a CPU's have no class of their own."""
    told = (
        "out of memory",
        "DefaultCPUAllocator",
        "annot allocate memory",
        "bad_alloc",
        "Unable to allocate",
        "ALLOC_FAILED",
    )
    return any(words in str(error) for words in told) or (
        isinstance(error, MemoryError) and not str(error)
    )


@contextmanager
def advice_on_memory(profile: Profile, stage: str) -> Iterator[None]:
    """Around a training: where it runs out of memory, on a GPU or a CPU, the MemoryError says what to lower (`oom_advice`)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(oom_advice(error, profile, stage)) from error


def oom_advice(error: BaseException, profile: Profile, stage: str) -> str:
    """What to lower, and by how much, after a stage ran out of memory.

    By the error's text, what was asked for less what was free is missing. The advice lowers the estimate by that, and by a
    twentieth of the whole more.
    """
    found = re.findall(r"(allocate|of which) ([\d.]+) (?:([KMGTP])iB|bytes)", str(error))
    said = {
        word: float(number) * 1024 ** " KMGTP".index(unit or " ") / 1e9
        for word, number, unit in found
    }
    missing = max(0.0, said.get("allocate", 0.0) - said.get("of which", 0.0))
    try:
        peak = estimate(profile, stage, processes=_processes())["peak"]
    except OSError as error:
        return f"{stage.upper()} ran out of memory. {error} Lower {stage}_batch to half, raise {stage}_grad_accum in proportion."
    more = (
        ""
        if "reserved by PyTorch" not in str(error)
        else (
            "\nWhere much is 'reserved by PyTorch but unallocated', PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True can be enough."
        )
    )
    lack = f"about {missing:.1f} GB were missing" if said else "how much was missing is not told"
    return (
        f"{stage.upper()} ran out of memory: {lack}, {peak:.1f} GB were estimated. Restart the "
        f"kernel, which frees what is held. {_advice(profile, stage, 0.95 * peak - missing)}{more}"
    )


def table(profile: Profile) -> pd.DataFrame:
    """For SFT and GRPO on this machine: estimated, measured and available GB, whether it fits, and the time where there is a
    figure to go by."""
    gpu, rows = profiles._gpu_gb() is not None, {}
    free, mark = device_gb()[0], " (rough on a CPU)" * (not gpu)
    for stage in NOTEBOOK:
        try:
            guess = estimate(profile, stage, processes=_processes())["peak"]
        except OSError:
            guess = None
        need = (known := measured(profile, stage)) or guess
        fits = "not known" if need is None else "yes" if need <= free else "no"
        rows[stage.upper()] = {
            "estimated GB": f"{guess:.1f}{mark}" if guess else "not known",
            "measured GB": f"{known:.1f}" if known else "not measured",
            "available GB": f"{free:.1f}",
            "fits": fits,
            "time": profile.expected(NOTEBOOK[stage]),
        }
        if (
            gpu
            and guess
            and stage == "grpo"
            and NOTEBOOK[stage] not in profile.minutes
            and not profile.grpo_vllm
        ):
            seconds = rollout_seconds(
                profile, new_card="bfloat16" in str(models.dtype_for_device())
            )
            rows[stage.upper()]["time"] = (
                f"not measured; roll-outs by a rule of thumb {seconds:.0f} s a step"
            )
    return pd.DataFrame(rows).T
