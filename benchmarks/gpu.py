"""Peak memory and time of SFT, GRPO and generation on one GPU: `python -m benchmarks.gpu`. Under nine minutes, offline.

    python -m benchmarks.gpu                                  0.5B, 1.5B and 7B, into results/gpu/<device>.csv
    python -m benchmarks.gpu --models 7B --minutes 5 --out /tmp
    python -m benchmarks.gpu --dry-run-cpu                    two tiny layers, one step: does this file still work?
    python -m benchmarks.gpu --docs                           the tables of estimates in docs/scaling.md anew; no GPU

What is real: SFTTrainer and GRPOTrainer, set up as in notebooks 03 and 04; NF4 by the same loader; the course's rewards;
synthetic discharge summaries of about 1,500 words, their admission notes cut as the profile says. 0.5B and 1.5B have the
batches and lengths of the profile t4, larger ones those of gpu24.

What is not: the weights are random, of Qwen2.5's published dimensions, so nothing is downloaded. Random weights hardly ever end
an answer, so every completion runs to its limit; and what they write is no answer, so the rewards score written ones. The
tokenizer is the tiny one that ships with the course: how many tokens there are costs time and memory, not which. A note
shorter than the profile allows goes on with the next, so that prompts have the length that the estimate is about.

"TRL defaults": the same model, data, lengths and LoRA, all else as SFTConfig and GRPOConfig come (batch of 8, no accumulation,
adapters in bf16, hence AdamW's states too; the estimate is about ours and not told there). An optimiser step is shortened to
one generation (GRPO) or two micro-batches (SFT), which changes neither the peak nor the pace; profile_step_s is the step of the
profile, by proportion. Of each cell's steps the first warms up, in GRPO with completions of 8 tokens; the figure is the median
of the others. Prompts of a batch differ in length as notes do, the longest is as long as the profile allows: the others are
padded, on the left, which decides how attention works. Every cell is measured for all models before the next one; what the time
does not reach says "not measured", and when it is up the process ends, whatever it was doing. Read the CSV with
pandas.read_csv(path, comment="#").
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from helpers import course, fit, profiles
from helpers.profiles import Profile

ROOT = Path(__file__).parents[1]
SIZES = {
    "0.5B": "t4",
    "1.5B": "t4",
    "3B": "gpu24",
    "7B": "gpu24",
    "14B": "gpu24",
    "32B": "gpu24",
}  # size -> whose batches
CARDS = {"t4": 16, "gpu24": 24, "paper": 80}  # GB of the card that a profile is for
BATCHES = (1, 16, 64)  # prompts generated for at once
NEW_TOKENS = 64  # of each, in the generation cells
WARM_TOKENS = 8  # of each completion of a first GRPO step
CELLS = (
    "sft",
    "grpo",
    "sft, TRL defaults",
    "grpo, TRL defaults",
    "generate nf4",
    "generate nf4, LoRA in float32",
    "generate 16-bit",
    "generate 16-bit, continuous batching",
)  # in the order in which they are measured
STEPS = 3  # at most, the first to warm up
RESERVE = 45  # seconds kept back for what ends by itself only: one generation, one micro-step
UNMEASURED = {"status": "not measured: time was up"}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


# ------------------------------------------------------------------------------------------------ model and data


def random_model(base: str, tokenizer: Any, *, four_bit: bool) -> Any:
    """A Qwen2 of the base's dimensions with random weights on the device, in NF4 or 16 bit, by the loader of checkpoints.

    Every matrix is a view of one random buffer as large as the largest: 7B needs 1.1 GB of RAM and no disk.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from helpers import models

    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {key: value for key, value in fit.config(base).items() if key in fit._SHAPE}
    config, dtype = (
        Qwen2Config(**shape, **ends, max_position_embeddings=32768),
        models.dtype_for_device(),
    )
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in Qwen2ForCausalLM(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    buffer = block.repeat(-(-max(size.numel() for size in shapes.values()) // len(block)))
    weights = {
        name: torch.ones(size, dtype=dtype) if "norm" in name else buffer[: size.numel()].view(size)
        for name, size in shapes.items()
    }
    kwargs: dict[str, Any] = {"quantization_config": models.nf4()} if four_bit else {}
    if torch.cuda.is_available():
        kwargs["device_map"] = {"": 0}
    return Qwen2ForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, **kwargs
    )


def lora_of(p: Profile) -> Any:
    """The LoRA of notebook 03."""
    from peft import LoraConfig

    return LoraConfig(
        r=p.sft_lora_r,
        lora_alpha=p.sft_lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def get_adapter(model: Any, p: Profile) -> Any:
    """The model with that LoRA on it."""
    from peft import get_peft_model

    return get_peft_model(model, lora_of(p))


def long_cases(
    count: int, tokenizer: Any, tokens: int, seed: int = 0, group: int = 8
) -> pd.DataFrame:
    """hadm_id, note, code of `count` synthetic admissions. The first note of every `group` has at least `tokens` tokens, each of
    the others 1/64 of that less than the one before it, down to 7/64."""
    from helpers import models, notes, synthetic

    drawn = synthetic.draw(24, seed)
    texts = [notes.admission_note(text) for text in synthetic.summaries(drawn, seed, full=True)]
    pairs = [
        (text, row["code"].replace(".", "")) for text, row in zip(texts, drawn, strict=True) if text
    ]
    rows = []
    for i in range(count):
        note, following = pairs[i % len(pairs)][0], i
        while (
            i < len(pairs) and len(tokenizer(note, add_special_tokens=False)["input_ids"]) < tokens
        ):
            following += 1
            note += "\n" + pairs[following % len(pairs)][0]
        note = note if i < len(pairs) else rows[i - len(pairs)]["note"]
        rows.append({"hadm_id": i, "note": note, "code": pairs[i % len(pairs)][1]})
    for i, row in enumerate(rows):
        less = i % group % 8 * (tokens // 64)
        row["note"] = (
            models.truncate_note(row["note"], tokenizer, tokens - less) if less else row["note"]
        )
    return pd.DataFrame(rows)


def written_answer(case: Any, tokenizer: Any, tokens: int) -> tuple[str, str]:
    """Reasoning of about `tokens` tokens less the tags and the code, and the code. The text is the note's own."""
    from helpers import models, prompts

    return models.truncate_note(
        prompts.neutralise(case.note), tokenizer, max(4, tokens - 24)
    ), case.code


# ---------------------------------------------------------------------------------------------------------- cells


def synchronise() -> float:
    """Wait for the device, then the time in seconds."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def stopwatch(share: float, deadline: float) -> Any:
    """A trainer callback that times steps and their phases, and ends the training when time is up (perf_counter times): after
    a step, but not the first, when `share` has come; in the middle of a step when `deadline` has."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.spent: dict[str, float] = {}
            self.peaks: dict[
                str, tuple[int, int]
            ] = {}  # of each phase: bytes of tensors, and of the allocator
            self.config: Any = None  # of a trainer that generates
            self.length = 0

        def peak(self, name: str) -> None:
            """Put down the peak since the last call to the phase that has just ended."""
            import torch

            if torch.cuda.is_available():
                now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                self.peaks[name] = tuple(map(max, now, self.peaks.get(name, (0, 0))))
                torch.cuda.reset_peak_memory_stats()

        def phase(self, trainer: Any, method: str, name: str) -> None:
            work = getattr(trainer, method)

            def timed(*args: Any, **kwargs: Any) -> Any:
                began = synchronise()
                self.peak("training")
                result = work(*args, **kwargs)
                self.peak(name if name == "generation" else "training")
                self.spent[name] = self.spent.get(name, 0.0) + synchronise() - began
                return result

            setattr(trainer, method, timed)

        def warm_up(self, trainer: Any) -> None:
            """Shorten the completions of the first step."""
            self.config, self.length = (
                trainer.generation_config,
                trainer.generation_config.max_new_tokens,
            )
            self.config.max_new_tokens = min(WARM_TOKENS, self.length)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began, self.spent = synchronise(), {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.updating = synchronise()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.spent["optimiser"] = synchronise() - self.updating

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = (
                control.should_training_stop or time.perf_counter() > deadline
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = synchronise()
            self.steps.append({"step": now - self.began, **self.spent})
            if self.config:
                self.config.max_new_tokens = self.length
            late = now > deadline or (len(self.steps) > 1 and now > share)
            control.should_training_stop = control.should_training_stop or late

    return Stopwatch()


def train(
    stage: str, p: Profile, tokenizer: Any, steps: int, ours: bool, share: float, deadline: float
) -> dict[str, Any]:
    """Some steps of SFT or GRPO with a fresh random model. Returns the columns of the CSV that it can fill."""
    import torch
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from helpers import models, prompts, rewards, traces

    model = random_model(p.base, tokenizer, four_bit=getattr(p, f"{stage}_4bit"))
    batch, accum = getattr(p, f"{stage}_batch"), getattr(p, f"{stage}_grad_accum")
    together = (
        batch * (p.grpo_steps_per_generation or accum) // p.grpo_num_generations
    )  # prompts of one generation
    group = 8 if stage == "sft" else together
    cases = long_cases(steps * batch * accum, tokenizer, p.max_note_tokens, group=group)
    cuda, watch = torch.cuda.is_available(), stopwatch(share, deadline)
    common: dict[str, Any] = {
        "max_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1000,
        "seed": 0,
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        "dataloader_pin_memory": cuda,
    }
    if ours:
        common |= {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accum,
            "gradient_checkpointing": p.gradient_checkpointing,
            "optim": getattr(p, f"{stage}_optim"),
        }
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        common["output_dir"] = folder
        if stage == "sft":
            answers = [
                written_answer(case, tokenizer, p.max_new_tokens) for case in cases.itertuples()
            ]
            table = pd.DataFrame(answers, columns=["think", "code"]).assign(
                hadm_id=cases["hadm_id"], kept=True, why=None
            )
            dataset = traces.sft_dataset(cases, table, tokenizer, p.max_note_tokens)
            common |= {"max_length": p.max_prompt_tokens + p.max_new_tokens}
            common |= {"train_sampling_strategy": "group_by_length"} if ours else {}
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**common),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=lora_of(p),
                callbacks=[watch],
            )
            first = dataset[0]
            whole = len(
                tokenizer.apply_chat_template(first["prompt"] + first["completion"])["input_ids"]
            )
        else:
            dataset = traces.grpo_dataset(cases, tokenizer, p.max_note_tokens)
            answers = [
                prompts.answer(*written_answer(case, tokenizer, p.grpo_max_completion))
                for case in cases[:8].itertuples()
            ]
            common |= {
                "max_completion_length": p.grpo_max_completion,
                "shuffle_dataset": False,
            }  # a longest prompt in each group
            common |= (
                {
                    "num_generations": p.grpo_num_generations,
                    "temperature": p.grpo_temperature,
                    "beta": p.grpo_beta,
                    "loss_type": p.grpo_loss_type,
                    "reward_weights": list(rewards.DEFAULT_WEIGHTS),
                    "steps_per_generation": p.grpo_steps_per_generation,
                }
                if ours
                else {}
            )
            trainer = GRPOTrainer(
                model=get_adapter(model, p) if ours else model,
                peft_config=None if ours else lora_of(p),
                reward_funcs=[on_written(reward, answers) for reward in rewards.DEFAULT],
                args=GRPOConfig(**common),
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[watch],
            )
            if steps > 1:
                watch.warm_up(trainer)
            watch.phase(trainer, "_generate", "generation")
            watch.phase(trainer, "_calculate_rewards", "rewards")
            whole = 0
        trainer.remove_callback(PrinterCallback)
        if ours:
            models.float32_adapters(trainer.model)
        trainer.train()
    prompt = len(
        tokenizer.apply_chat_template(dataset[0]["prompt"], add_generation_prompt=True)["input_ids"]
    )
    answer = whole - prompt if stage == "sft" else p.grpo_max_completion
    exact = dataclasses.replace(p, max_prompt_tokens=prompt, max_new_tokens=answer)
    row: dict[str, Any] = {
        "batch": batch,
        "accumulate": accum,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
    }
    row = timings(watch, row)
    return (
        row | memory(fit.estimate(exact, stage)["peak"] if ours else None, watch)
        if "steps" in row
        else row
    )


def timings(watch: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The row with what a stopwatch saw: medians of the steps after the first. A first step counts where it is the only one,
    unless its answers were cut short to warm up: then there is no figure."""
    if not (timed := watch.steps[1:] or ([] if watch.config else watch.steps)):
        return {
            **row,
            "status": f"not measured: {'no step after the warm-up' if watch.steps else 'no whole step'} in the time",
        }
    seconds = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
    rest = seconds["step"] - sum(
        seconds.get(name, 0) for name in ("generation", "rewards", "optimiser")
    )
    phases = {
        f"{name}_s": seconds[name]
        for name in ("generation", "rewards", "optimiser")
        if name in seconds
    }
    return {
        **row,
        **phases,
        "forward_backward_s": rest,
        "steps": len(timed),
        "seconds_per_step": seconds["step"],
        "sequences_per_s": row["batch"] * row["accumulate"] / seconds["step"],
        "status": "measured" if watch.steps[1:] else "measured, first step",
    }


def on_written(
    reward: Callable[..., list[float]], answers: list[str]
) -> Callable[..., list[float]]:
    """The reward, given written answers in place of what random weights generate."""

    def scored(completions: list[Any], code: list[str], **columns: Any) -> list[float]:
        return reward(
            completions=[answers[i % len(answers)] for i in range(len(completions))],
            code=code,
            **columns,
        )

    scored.__name__ = reward.__name__
    return scored


def generate(
    p: Profile, tokenizer: Any, four_bit: bool, lora: bool, share: float
) -> list[dict[str, Any]]:
    """Tokens a second by batch, with the prompts read in and without; one row for each batch that time and memory are enough
    for. `lora`: with a float32 adapter on, which is how notebook 04 rolls out."""
    import torch

    from helpers import models

    model, rows = random_model(p.base, tokenizer, four_bit=four_bit), []
    if lora:
        model = get_adapter(model, p)
        models.float32_adapters(model)
    model.eval()
    ids = torch.randint(0, len(tokenizer), (max(BATCHES), p.max_prompt_tokens), device=model.device)
    mask = torch.ones_like(ids)
    mask[1:, : p.max_prompt_tokens // 16] = (
        0  # padding on the left, as roll-outs have: without any, attention takes another path
    )
    new = min(NEW_TOKENS, p.grpo_max_completion)
    for batch in BATCHES:
        row: dict[str, Any] = {
            "batch": batch,
            "prompt_tokens": p.max_prompt_tokens,
            "answer_tokens": new,
        }
        if time.perf_counter() > share:
            rows.append(row | UNMEASURED)
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with torch.inference_mode():
                taken = []
                for length in (2, 2, new):  # the first warms up
                    began = synchronise()
                    model.generate(
                        ids[:batch],
                        attention_mask=mask[:batch],
                        max_new_tokens=length,
                        min_new_tokens=length,
                        do_sample=True,
                        pad_token_id=tokenizer.pad_token_id,
                    )
                    taken.append(synchronise() - began)
        except torch.OutOfMemoryError:
            rows.append({**row, "status": "out of memory"})
            continue
        decoding = batch * (new - 2) / max(taken[2] - taken[1], 1e-9)
        rows.append(
            {
                **row,
                **memory(),
                "steps": 1,
                "tokens_per_s": batch * new / taken[2],
                "prefill_s": taken[1],
                "decode_tokens_per_s": decoding,
                "status": "measured",
            }
        )
    return rows


def generate_continuously(p: Profile, tokenizer: Any, share: float) -> list[dict[str, Any]]:
    """Tokens a second of transformers' other engine, which GRPOTrainer can use too. It takes most of the card for its cache, so
    no memory is told, and it runs in threads of its own. Without flash-attn it would ask a hub for one."""
    import torch
    from transformers import GenerationConfig

    if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
        return [{"status": "not measured: needs a GPU and flash-attn"}]
    model, rows, new = (
        random_model(p.base, tokenizer, four_bit=False).eval(),
        [],
        min(NEW_TOKENS, p.grpo_max_completion),
    )
    ids = torch.randint(0, len(tokenizer), (max(BATCHES), p.max_prompt_tokens)).tolist()
    for batch in BATCHES[1:]:
        row: dict[str, Any] = {
            "batch": batch,
            "prompt_tokens": p.max_prompt_tokens,
            "answer_tokens": new,
        }
        if time.perf_counter() > share:
            rows.append(row | UNMEASURED)
            continue
        ends = GenerationConfig(
            max_new_tokens=new, do_sample=True, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id
        )
        began = synchronise()
        made = model.generate_batch(ids[:batch], generation_config=ends)
        if len(made) < batch or any(answer.error for answer in made.values()):
            rows.append({**row, "status": f"failed: {len(made)} of {batch} answers"})
            continue
        tokens = sum(len(answer.generated_tokens) for answer in made.values())
        rows.append(
            {
                **row,
                "steps": 1,
                "tokens_per_s": tokens / (synchronise() - began),
                "status": "measured, start included",
            }
        )
    return rows


def memory(estimate: float | None = None, watch: Any = None) -> dict[str, Any]:
    """Peak memory since the last reset, or in the phases of a stopwatch, in GB of 1e9 bytes: of tensors, of torch's allocator,
    and of the card, which is what the estimate beside it is about: the allocator's, and what the card holds beside it (CUDA's
    context). Empty columns on a CPU."""
    import torch

    row: dict[str, Any] = {"estimate_gb": estimate}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peaks = {
            "whole": (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()),
            **(watch.peaks if watch else {}),
        }
        allocated, reserved = (max(values) for values in zip(*peaks.values(), strict=True))
        card = total - free - torch.cuda.memory_reserved() + reserved
        row |= {
            "allocated_gb": allocated / 1e9,
            "reserved_gb": reserved / 1e9,
            "card_gb": card / 1e9,
        }
        if "generation" in peaks:
            row |= {
                f"{phase}_gb": max(peaks[name][0] for name in names if name in peaks) / 1e9
                for phase, names in {
                    "generation": ["generation"],
                    "training": ["training", "whole"],
                }.items()
            }
        row |= {"estimate_error": estimate * 1e9 / card - 1} if estimate else {}
    return row


def release() -> float:
    """Free what a cell has left on the device; GB of tensors that are still there."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()  # it keeps the embeddings of all models trained with an 8-bit optimiser
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 1e9


def trl_defaults(p: Profile) -> Profile:
    """The profile with the batch shapes that SFTConfig and GRPOConfig come with; lengths and LoRA stay."""
    one = {
        "gradient_checkpointing": True,
        "sft_batch": 8,
        "sft_grad_accum": 1,
        "grpo_batch": 8,
        "grpo_grad_accum": 1,
    }
    return dataclasses.replace(
        p, **one, grpo_prompts_per_step=1, grpo_num_generations=8, grpo_steps_per_generation=None
    )


def shortened(p: Profile) -> Profile:
    """The profile with no more micro-steps to an optimiser step than show its peak and its pace."""
    cycle = min(p.grpo_steps_per_generation or p.grpo_grad_accum, p.grpo_grad_accum)
    return dataclasses.replace(
        p,
        sft_grad_accum=min(p.sft_grad_accum, 2),
        grpo_grad_accum=cycle,
        grpo_prompts_per_step=p.grpo_batch * cycle // p.grpo_num_generations,
    )


class Broken(RuntimeError):
    """The CUDA context is lost; the text is the status of what was not measured."""


def run_cell(
    cell: str, p: Profile, tokenizer: Any, steps: int, share: float, deadline: float
) -> list[dict[str, Any]]:
    """One cell's rows. Running out of memory is a result; any other failure is told and costs this cell alone, unless the device
    itself has failed: then every further call on it fails too, and Broken is raised."""
    import torch

    stage, ours, held = cell.split(",")[0], "TRL" not in cell, release()
    short = shortened(p) if ours else trl_defaults(p)
    try:
        if "continuous" in cell:
            return generate_continuously(p, tokenizer, share)
        if cell.startswith("generate"):
            return generate(p, tokenizer, "nf4" in cell, "LoRA" in cell, share)
        row = train(stage, short, tokenizer, steps, ours, share, deadline)
        times = getattr(p, f"{stage}_grad_accum") / getattr(short, f"{stage}_grad_accum")
        row |= (
            {"profile_step_s": times * row["seconds_per_step"]}
            if ours and "seconds_per_step" in row
            else {}
        )
        return [row | {"held_gb": held}]
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(
            error
        ):  # the latter from a library's own call
            estimate = (
                fit.estimate(short, stage)["peak"]
                if ours and not cell.startswith("generate")
                else None
            )
            return [{"estimate_gb": estimate, "held_gb": held, "status": "out of memory"}]
        traceback.print_exc()
        if isinstance(error, getattr(torch, "AcceleratorError", Broken)):
            raise Broken(
                f"not measured: the device failed in {p.base.split('-Instruct')[0].split('/')[-1]}, {cell}"
            ) from error
        said = " ".join(str(error).split())
        return [{"status": f"failed: {type(error).__name__}{': ' * bool(said)}{said[:120]}"}]


# --------------------------------------------------------------------------------------------------------- report

COLUMNS = (
    "model",
    "cell",
    "shapes",
    "status",
    "batch",
    "accumulate",
    "prompt_tokens",
    "answer_tokens",
    "steps",
    "seconds_per_step",
    "profile_step_s",
    "sequences_per_s",
    "tokens_per_s",
    "prefill_s",
    "decode_tokens_per_s",
    "generation_s",
    "rewards_s",
    "forward_backward_s",
    "optimiser_s",
    "allocated_gb",
    "generation_gb",
    "training_gb",
    "reserved_gb",
    "card_gb",
    "estimate_gb",
    "estimate_error",
    "held_gb",
)


def write(path: Path, rows: list[dict[str, Any]], stamp: dict[str, str]) -> None:
    """The CSV, its stamp in lines that begin with #."""
    table = pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(
        index=False, float_format="%.4g", na_rep=""
    )
    course.write(path, "".join(f"# {key}: {value}\n" for key, value in stamp.items()) + table)


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; what is empty was not measured or does not apply."""
    named = {
        "model": "model",
        "cell": "cell",
        "batch": "batch",
        "accumulate": "x",
        "seconds_per_step": "s/step",
        "generation_s": "generation",
        "rewards_s": "rewards",
        "forward_backward_s": "training",
        "tokens_per_s": "tokens/s",
        "card_gb": "GB",
        "estimate_gb": "estimate",
        "status": "status",
    }
    lines = ["| " + " | ".join(named.values()) + " |", "|---" * len(named) + "|"]
    for row in rows:
        values = (row.get(key) for key in named)
        cells = (
            "" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    todo: dict[str, Profile], minutes: float, steps: int, path: Path | None, stamp: dict[str, str]
) -> list[dict[str, Any]]:
    """Every cell, each for all models, the smallest first; the CSV is written after each. Once `minutes` have passed since this
    process was started, it prints what there is and ends."""
    from transformers.utils import logging

    from helpers import models

    logging.disable_progress_bar()
    jobs = [(name, cell) for cell in CELLS for name in todo]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {job: [UNMEASURED] for job in jobs}
    end = time.perf_counter() + 60 * minutes - (time.time() - psutil.Process().create_time())
    saving = threading.Lock()

    def keep() -> list[dict[str, Any]]:
        rows = [
            {
                "model": name,
                "cell": cell,
                "shapes": "TRL" if "TRL" in cell else todo[name].name,
                **row,
            }
            for name in todo
            for cell in CELLS
            for row in found[name, cell]
        ]
        with saving:
            if path:
                write(path, rows, stamp)
        return rows

    def give_up() -> None:
        report(keep(), stamp)
        os._exit(0)  # the main thread may be inside a kernel, from which nothing else calls it back

    guard = threading.Timer(end - time.perf_counter() - 5, give_up)
    guard.daemon = True
    guard.start()
    tokenizer, deadline = models.load_tokenizer("tiny"), end - RESERVE
    weight = {name: fit.estimate(p, "sft")["weights"] ** 0.5 for name, p in todo.items()}
    for k, (name, cell) in enumerate(jobs):
        if (now := time.perf_counter()) < deadline:
            print(f"{name}: {cell} ...", file=sys.stderr, flush=True)
            share = now + (deadline - now) * weight[name] / sum(
                weight[other] for other, _ in jobs[k:]
            )
            try:
                found[name, cell] = run_cell(cell, todo[name], tokenizer, steps, share, deadline)
            except Broken as broken:
                found |= {job: [{"status": str(broken)}] for job in jobs[k:]}
                break
            finally:
                keep()
    guard.cancel()
    return keep()


def report(rows: list[dict[str, Any]], stamp: dict[str, str]) -> None:
    """Print the stamp and the table."""
    print(
        "\n".join(f"{key}: {value}" for key, value in stamp.items()) + f"\n\n{show(rows)}",
        flush=True,
    )


def stamp_of(device: str) -> dict[str, str]:
    """What a figure depends on beside the code: device, its memory and driver, host, versions, date, command."""
    import torch

    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = (
            subprocess.run(query, capture_output=True, text=True, check=False)
            if shutil.which(query[0])
            else None
        )
        driver = asked.stdout.split("\n")[0] if asked and not asked.returncode else "unknown"
        device += (
            f", {torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB, driver {driver}"
        )
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    host = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": device,
        "host": host,
        "versions": f"{versions}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
    }


def dry_run_profile(folder: Path) -> Profile:
    """A base of two layers and a profile that takes a second or two a step on a CPU."""
    shape = dict(zip(fit._SHAPE, (128, 256, 2, 2, 1, 4096, True), strict=True))
    course.write(folder / "config.json", json.dumps(shape))
    return dataclasses.replace(
        profiles.get("tiny"),
        name="dry run",
        base=str(folder),
        max_note_tokens=48,
        max_prompt_tokens=128,
        max_new_tokens=48,
        gradient_checkpointing=True,
        sft_batch=2,
        sft_grad_accum=2,
        sft_lora_r=8,
        sft_4bit=True,
        grpo_prompts_per_step=1,
        grpo_num_generations=4,
        grpo_batch=2,
        grpo_grad_accum=2,
        grpo_max_completion=8,
    ).validate()


# ---------------------------------------------------------------------------------------------- docs/scaling.md

# Peaks in GB by the lists of models in TRL's two notebooks; dimensions by the models' config.json (fit._SHAPE, then head_dim)
T4 = {
    "grpo": {"Qwen2.5-7B": 9.2, "Qwen3-8B": 9.9, "Llama-3.1-8B": 9.5, "Llama-3.2-3B": 5.7},
    "sft": {
        "Qwen2.5-7B": 10.8,
        "Qwen3-8B": 12.8,
        "Llama-3.1-8B": 10.9,
        "Llama-3.2-3B": 4.7,
        "Qwen3-14B": 14.1,
    },
}
T4_SHAPES = {
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False, 128),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, False, 128),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False, 128),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True, 128),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 151936, False, 128),
}


def known_peaks() -> list[tuple[str, float, float]]:
    """Case, its peak in GB as somebody measured it, and the estimate of the same.

    TRL's QLoRA notebooks (`grpo_` and `sft_trl_lora_qlora`, one T4, r = 32) name a peak for each model. GRPO: 8 x 256 tokens, and
    prompts of a length that is not told; 160 is a guess. SFT: 1 x 1,024 tokens. The TRL of October 2025 cast embeddings and
    output layer to float32 before QLoRA training, two bytes a parameter more than today. Its pull request 4335 ended that; by the
    figures that it gives, the 14B model was measured after the change. TRL 1.16 casts neither.
    """
    p, tiny = (
        dataclasses.replace(
            profiles.get("gpu24"),
            sft_batch=1,
            sft_grad_accum=4,
            max_prompt_tokens=768,
            max_new_tokens=256,
            grpo_batch=8,
            grpo_grad_accum=1,
            grpo_prompts_per_step=1,
            grpo_max_completion=256,
            sft_lora_r=32,
        ),
        profiles.get("tiny"),
    )
    rows = [
        (
            "Qwen2.5-7B, GRPO, T4: 8 x 256 tokens, prompts counted in",
            9.2,
            fit.estimate(dataclasses.replace(p, max_prompt_tokens=0), "grpo", gpu=True)["peak"],
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        for stage, figures in T4.items():
            for name, known in figures.items():
                shape = dict(zip((*fit._SHAPE, "head_dim"), T4_SHAPES[name], strict=True))
                course.write(Path(folder) / "config.json", json.dumps(shape))
                same = dataclasses.replace(
                    p, base=folder, max_prompt_tokens=160 if stage == "grpo" else 768
                )
                guess, case = (
                    fit.estimate(same, stage, gpu=True)["peak"],
                    f"{name}, {stage.upper()}, T4",
                )
                rows.append(
                    (case + ", prompts of 160 tokens on top" * (stage == "grpo"), known, guess)
                )
                if stage == "sft" and "14B" not in name:
                    cast = (
                        shape["vocab_size"]
                        * shape["hidden_size"]
                        * (1 if shape["tie_word_embeddings"] else 2)
                        * 2
                        / 1e9
                    )
                    rows[-1] = (f"{case}, embeddings in float32", known, guess + cast)
    return rows + [
        (
            f"`tiny`, {stage.upper()}, on a CPU, which set its overhead",
            tiny.peak_gb[notebook],
            fit.estimate(tiny, stage, gpu=False)["peak"],
        )
        for stage, notebook in fit.NOTEBOOK.items()
        if notebook in tiny.peak_gb
    ]


def docs_tables() -> dict[str, str]:
    """The tables of estimates in docs/scaling.md, by the name that stands in its markers."""
    replace, at_hand = (
        dataclasses.replace,
        {p.name: p for p in profiles.PROFILES.values() if p.base != "tiny"},
    )

    def gb(p: Profile, stage: str) -> str:
        return f"{fit.estimate(p, stage, gpu=True)['peak']:.1f}"

    lines = ["| profile | card | base | SFT | GRPO | measured |", "|---|---|---|---|---|---|"]
    for p in at_hand.values():
        base, measured = (
            p.base.split("/")[-1],
            ", ".join(f"{k} {v} GB" for k, v in p.peak_gb.items()) or "not measured",
        )
        sft, grpo = (
            f"{x}, **does not fit**" if float(x) > CARDS[p.name] else x
            for x in (gb(p, "sft"), gb(p, "grpo"))
        )
        lines.append(f"| {p.name} | {CARDS[p.name]} GB | {base} | {sft} | {grpo} | {measured} |")
    tables = {"profiles": "\n".join(lines)}
    lines = ["| case | known peak, GB | estimate | off by |", "|---|---|---|---|"]
    for case, known, guess in known_peaks():
        lines.append(
            f"| {case} | {known} | {guess:.1f} | {round(guess / known - 1, 2) + 0.0:+.0%} |"
        )
    tables["known"] = "\n".join(lines)
    lines = ["| profile | completions generated at once | GRPO |", "|---|---|---|"]
    for p in at_hand.values():
        for k in (k for k in range(p.grpo_grad_accum, 0, -1) if p.grpo_grad_accum % k == 0):
            lines.append(
                f"| {p.name} | {k * p.grpo_batch} | {gb(replace(p, grpo_steps_per_generation=k), 'grpo')} |"
            )
    tables["generation"] = "\n".join(lines)
    lines = [
        "| base | SFT in NF4 | SFT in 16 bit | GRPO in NF4 | GRPO in 16 bit |",
        "|---|---|---|---|---|",
    ]
    least = replace(at_hand["gpu24"], sft_batch=1, grpo_batch=8, grpo_steps_per_generation=1)
    for base in reversed(fit.QWEN):
        cells = [
            gb(replace(least, base=base, **{f"{s}_4bit": bits}), s)
            for s in ("sft", "grpo")
            for bits in (True, False)
        ]
        lines.append(f"| {base.removeprefix('Qwen/')} | {' | '.join(cells)} |")
    tables["bases"] = "\n".join(lines)
    return tables


def write_docs(page: Path = ROOT / "docs" / "scaling.md") -> None:
    """Put the tables between their markers, `<!-- name -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, table in docs_tables().items():
        text = re.sub(
            rf"(<!-- {name} -->\n)(?:.*?\n)??(<!-- end -->)",
            lambda m, t=table: f"{m[1]}{t}\n{m[2]}",
            text,
            flags=re.S,
        )
    course.write(page, text)


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="time budget (default 9)")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["0.5B", "1.5B", "7B"],
        choices=SIZES,
        help="sizes of Qwen2.5",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV (default results/gpu; a dry run writes none)"
    )
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="two tiny layers, one step, on the CPU"
    )
    parser.add_argument(
        "--docs", action="store_true", help="write the tables of estimates into docs/scaling.md"
    )
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs()
        return 0
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if options.dry_run_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault(
        "CUDA_VISIBLE_DEVICES", "0"
    )  # with several a trainer would spread each batch over them
    import torch

    if not torch.cuda.is_available() and not options.dry_run_cpu:
        print(
            "benchmarks.gpu: there is no CUDA device here, nothing was measured. --dry-run-cpu shows whether the code works.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        device, steps = "dry run, CPU", 1
        todo = {"dry run": dry_run_profile(Path(folder))} if options.dry_run_cpu else {}
        if not options.dry_run_cpu:
            device, steps = torch.cuda.get_device_name(0), STEPS
            todo = {
                size: dataclasses.replace(
                    profiles.get(SIZES[size]), base=f"Qwen/Qwen2.5-{size}-Instruct"
                )
                for size in sorted(options.models, key=lambda size: float(size[:-1]))
            }
        out = options.out or (None if options.dry_run_cpu else ROOT / "results" / "gpu")
        path = out / f"{re.sub('[^a-z0-9]+', '-', device.lower())}.csv" if out else None
        stamp = stamp_of(device)
        report(measure(todo, options.minutes, steps, path, stamp), stamp)
        if (
            torch.cuda.is_available()
        ):  # threads of a generation that hangs would keep the process alive
            sys.stdout.flush()
            os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
