"""Will it fit? The peak memory of SFT and GRPO, from the base's dimensions and the profile, before
anything is loaded.

An estimate, not a measurement: `python -m benchmarks.gpu` measures. docs/scaling.md compares the
two where both are known. Shown in notebook 0; not needed to follow the course.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import profiles
from helpers.profiles import Profile

NOTEBOOK = {"sft": "03_lora_sft", "grpo": "04_qlora_grpo"}
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# How torch, numpy and Python say that there was no memory; on a CPU there is no class for it.
NO_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "annot allocate memory",
    "bad_alloc",
    "Unable to allocate",
    "ALLOC_FAILED",
    "_ArrayMemoryError",
    "CUDNN_STATUS_NOT_SUPPORTED",
)
# The fields that count here of models on the hub, largest model first.
ON_HUB = tomllib.loads(Path(__file__).with_name("memory_bases.toml").read_text(encoding="utf-8"))


def processes() -> int:
    """Number of processes of a launch; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def config(base: str) -> dict[str, Any]:
    """The config of a profile's base: of its folder, of the table above, or of the hub's local
    cache; of a model for pictures and text, its part for text. Raises OSError if there is none that
    the estimate knows how to read."""
    if base in ON_HUB:
        return ON_HUB[base]
    folder = profiles.TINY_BASE if base == "tiny" else Path(base)
    file = folder / "config.json"
    if file.is_file():
        try:
            fields = json.loads(file.read_bytes())
        except ValueError as error:
            raise OSError(f"{file} is damaged: {error}") from error
    else:
        from transformers import AutoConfig

        fields = AutoConfig.from_pretrained(base, local_files_only=True).to_dict()
    fields |= fields.get("text_config") or {}
    missing = [name for name in REQUIRED if not isinstance(fields.get(name), int)]
    if missing:
        raise OSError(
            f"{base}: memory cannot be estimated; config.json lacks {', '.join(missing)}."
        )
    if any("expert" in name for name in fields):
        raise OSError(f"{base}: memory cannot be estimated; it is a mixture of experts.")
    return fields


def device_gb() -> tuple[float, float]:
    """(free, total) memory in GB of 1e9 bytes, of the CUDA device of this process; without one, of
    the RAM.

    What torch's allocator keeps idle counts as free. The processes of a launch share the RAM.
    """
    if profiles.gpu_gb() is None:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available / 1e9 / processes(), memory.total / 1e9 / processes()
    import torch

    device = int(os.environ.get("LOCAL_RANK", "0"))
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) / 1e9, total / 1e9


def estimate(profile: Profile, stage: str, *, gpu: bool | None = None) -> dict[str, float]:
    """Peak memory of one process in training stage "sft" or "grpo", in GB of 1e9 bytes, with the
    terms it is made of.

    Sequences are taken as long as the profile allows; the processes of a launch share the rows of a
    step. b: 2 bytes (bf16, fp16), or 4 in float32 without a GPU (`gpu`; None: as on this machine).
    H, I, L: hidden width, MLP width, layers; T: tokens of one micro-step, batch x (prompt +
    completion).

    weights      linear maps at 0.516 bytes in NF4 (4 bits, and 0.127 for double-quantised scales:
                 Dettmers et al. 2023, section 3.2), else b; embeddings and untied output layer b
                 (below compute capability 8.0 they are float32: 0.5 more for Qwen2.5-1.5B)
    lora         16 bytes a parameter: float32 weight, gradient, two Adam moments (an 8-bit
                 optimiser takes some 6 less); 4 more with several processes, for DDP's gradient
                 buckets
    activations  with gradient checkpointing (Chen et al. 2016) the input of every layer, b·L·H·T,
                 and what one layer keeps for its backward pass, b·(10H + 6I)·T; without it L times
                 the latter, which assumes that every layer keeps as much as the one recomputed. In
                 4 bits also the largest weight matrix, dequantised
    head         TRL scores at most 4,096 tokens by 32,768 entries of the vocabulary at a time
                 (trl/kernels): 8 bytes each
    kv           GRPO's generation: keys and values of all completions generated at once, batch x
                 steps per generation
    prefill      GRPO's generation first reads all these prompts in one pass: b·(6H + 4I) for each
                 of their tokens; 2·b·I more on a GPU, where float32 adapters on a 16-bit base work
                 on float32 copies (TRL generates outside autocast)
    overhead     0.8: CUDA context, kernels, fragmentation. On a CPU 1.9: 0.8 for Python and its
                 libraries, and 1.1 for freed memory that the allocator keeps, set by the two
                 measured peaks of `tiny`
    peak         weights + lora + max(activations + head, generation) + overhead

    Not counted: completions by vLLM, which takes a share of the card of its own; attention scores,
    which SDPA does not keep; and on a 16-bit base the copies that PEFT makes of each LoRA layer's
    input. All but `prefill` was set by one peak of TRL's QLoRA GRPO notebook on a T4; nine more lie
    within 15 % (docs/scaling.md). tests/test_memory.py follows every live tensor of small models.
    Raises ValueError for another stage and as `per_device`, OSError as `config`.
    """
    if stage not in NOTEBOOK:
        raise ValueError(f"estimate: stage is {stage!r}, but must be one of {', '.join(NOTEBOOK)}.")
    fields = config(profile.base)
    arguments = getattr(profile, stage)
    on_gpu = profiles.gpu_gb() is not None if gpu is None else gpu
    b = 2 if on_gpu else 4
    hidden = fields["hidden_size"]
    inner = fields["intermediate_size"]
    layers = fields["num_hidden_layers"]
    vocabulary = fields["vocab_size"]
    heads = fields["num_attention_heads"]
    head = fields.get("head_dim") or hidden // heads
    q = heads * head
    kv = (fields.get("num_key_value_heads") or heads) * head
    embeddings = 1 if fields.get("tie_word_embeddings") else 2
    four_bit = profile.four_bit[stage]

    shares = per_device(arguments)
    batch = shares["per_device_train_batch_size"]
    rows = batch * shares["gradient_accumulation_steps"]
    prompt = profile.max_prompt_tokens
    length = prompt + arguments.get("max_completion_length", profile.max_new_tokens)
    layer = b * (10 * hidden + 6 * inner)
    kept = layers * layer
    if arguments["gradient_checkpointing"]:
        kept = b * layers * hidden + layer
    at_once = 0
    if stage == "grpo" and not arguments.get("use_vllm"):
        at_once = batch * (arguments.get("steps_per_generation") or 0) or rows
    cache = at_once * 2 * layers * kv * b  # for one token of each completion
    matrices = layers * (2 * hidden * (q + kv) + 3 * hidden * inner)
    lora_parameters = profile.lora["r"] * layers * (7 * hidden + 2 * q + 2 * kv + 3 * inner)

    terms = {
        "weights": (0.516 if four_bit else b) * matrices + b * vocabulary * hidden * embeddings,
        "lora": lora_parameters * (20 if processes() > 1 else 16),
        "activations": batch * length * kept + (b * hidden * inner if four_bit else 0),
        "head": min(batch * length, 4096) * min(vocabulary, 32768) * 8,
        "kv": cache * length,
        "prefill": at_once * prompt * b * (6 * hidden + (6 if on_gpu else 4) * inner),
        "overhead": 0.8e9 if on_gpu else 1.9e9,
    }
    training = terms["activations"] + terms["head"]
    generation = max(terms["kv"], cache * prompt + terms["prefill"])
    terms["peak"] = terms["weights"] + terms["lora"] + terms["overhead"] + max(training, generation)
    return {name: value / 1e9 for name, value in terms.items()}


def per_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """Batch and accumulation of each process of a launch: a step sees the same number of rows as on
    one device.

    Raises ValueError where the rows cannot be shared out evenly.
    """
    batch = arguments["per_device_train_batch_size"]
    rows = batch * arguments["gradient_accumulation_steps"]
    share, rest = divmod(rows, processes())
    if rest:
        raise ValueError(
            f"{rows} rows per step cannot be shared among {processes()} processes: "
            f"launch on a divisor of {rows}, or change the batch."
        )
    batch = max(size for size in range(1, batch + 1) if share % size == 0)
    shares = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": share // batch}
    if arguments.get("steps_per_generation"):
        shares["steps_per_generation"] = min(arguments["steps_per_generation"], share // batch)
    return arguments | shares


def measured(profile: Profile, stage: str) -> float | None:
    """Measured peak in GB, where this is the profile's class of hardware and none of its settings
    was changed."""
    is_shipped = profile == profiles.PROFILES.get(profile.name)
    is_its_hardware = (profiles.gpu_gb() is None) == (profile.name in ("tiny", "small"))
    return profile.peak_gb.get(NOTEBOOK[stage]) if is_shipped and is_its_hardware else None


def _guess(profile: Profile, stage: str) -> float | None:
    try:
        return estimate(profile, stage)["peak"]
    except OSError:
        return None


def _remedy(stage: str) -> str:
    return (
        f"Lower {stage}.per_device_train_batch_size and raise gradient_accumulation_steps in "
        "proportion, set gradient_checkpointing, lower max_note_tokens, or take a smaller profile "
        "(ICD_PROFILE)."
    )


def check(profile: Profile, stage: str) -> None:
    """Refuse, before a model is loaded, what the device has no room for.

    Raises MemoryError that says what is needed, what there is, and which terms are largest. On a
    CPU all the RAM that is installed counts, since other programs can give way. A base is let pass
    whose config cannot be read yet.
    """
    peak = measured(profile, stage) or _guess(profile, stage)
    free, total = device_gb()
    room = total if profiles.gpu_gb() is None else free
    if peak is None or peak <= room:
        return
    terms = pd.Series(estimate(profile, stage)).drop("peak").nlargest(3)
    largest = ", ".join(f"{name} {value:.1f}" for name, value in terms.items())
    raise MemoryError(
        f"{stage.upper()} in profile {profile.name!r} needs about {peak:.1f} GB (most: {largest}), "
        f"there are {room:.1f} GB. {_remedy(stage)}"
    )


@contextmanager
def advice(stage: str) -> Iterator[None]:
    """Around a training: where it runs out of memory, on a GPU or a CPU, the MemoryError says what
    to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        free, total = device_gb()
        raise MemoryError(
            f"{stage.upper()} ran out of memory ({free:.1f} of {total:.1f} GB are free now). "
            f"{_remedy(stage)} Then restart the kernel, which frees what is held."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, numpy or Python says that there was no memory."""
    return any(sign in f"{type(error).__name__}: {error}" for sign in NO_MEMORY)


def table(profile: Profile) -> pd.DataFrame:
    """For SFT and GRPO here: estimated, measured and available GB, whether it fits, time."""
    free, _ = device_gb()
    rough = " (rough on a CPU)" if profiles.gpu_gb() is None else ""
    rows = {}
    for stage, notebook in NOTEBOOK.items():
        guess = _guess(profile, stage)
        known = measured(profile, stage)
        need = known or guess
        fits = "not known"
        if need:
            fits = "yes" if need <= free else "no"
        rows[stage.upper()] = {
            "estimated GB": f"{guess:.1f}{rough}" if guess else "not known",
            "measured GB": f"{known:.1f}" if known else "not measured",
            "available GB": f"{free:.1f}",
            "fits": fits,
            "time": profile.expected(notebook),
        }
    return pd.DataFrame(rows).T
