"""Peak memory and time of SFT, GRPO and generation on one GPU, in under nine minutes, offline.

    python -m benchmarks.gpu                   0.5B, 1.5B and 7B, into results/gpu/<device>.csv
    python -m benchmarks.gpu --models 7B --minutes 5 --out /tmp
    python -m benchmarks.gpu --dry-run-cpu     two tiny layers, one step: does this file still work?

What is real: SFTTrainer and GRPOTrainer, set up as in notebooks 3 and 4; NF4 by the same loader;
the course's rewards; synthetic discharge summaries of about 1,500 words, their admission notes cut
as the profile says. 0.5B and 1.5B have the batches and lengths of the profile t4, larger ones those
of gpu24.

What is not: the weights are random, of Qwen2.5's published dimensions, so nothing is downloaded.
Random weights hardly ever end an answer, so every completion runs to its limit; and what they write
is no answer, so the rewards score written ones. The tokenizer is the tiny one that ships with the
course: how many tokens there are costs time and memory, not which. A note shorter than the profile
allows goes on with the next, so that prompts have the length that the estimate is about.

"TRL defaults": the same model, data, lengths and LoRA, all else as SFTConfig and GRPOConfig come
(batch of 8, no accumulation, adapters in bf16, hence AdamW's states too; the estimate is about ours
and not told there). An optimiser step is shortened to one generation (GRPO) or two micro-batches
(SFT), which changes neither the peak nor the pace; profile_step_s is the step of the profile, by
proportion. Of each cell's steps the first warms up, in GRPO with completions of 8 tokens; the
figure is the median of the others. Prompts of a batch differ in length as notes do, the longest is
as long as the profile allows: the others are padded, on the left, which decides how attention
works. Every cell is measured for all models before the next one; what the time does not reach says
"not measured", and when it is up the process ends, whatever it was doing. Read the CSV with
pandas.read_csv(path, comment="#").
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from helpers import profiles
from helpers.machinery import memory, places
from helpers.profiles import Profile

ROOT = Path(__file__).parents[1]
SIZES = {  # size -> whose batches
    "0.5B": "t4",
    "1.5B": "t4",
    "3B": "gpu24",
    "7B": "gpu24",
    "14B": "gpu24",
    "32B": "gpu24",
}
CELLS = (  # in the order in which they are measured
    "sft",
    "grpo",
    "sft, TRL defaults",
    "grpo, TRL defaults",
    "generate nf4",
    "generate nf4, LoRA in float32",
    "generate 16-bit",
)
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
PRINTED = (
    "model",
    "cell",
    "batch",
    "seconds_per_step",
    "generation_s",
    "forward_backward_s",
    "tokens_per_s",
    "card_gb",
    "estimate_gb",
    "status",
)
BATCHES = (1, 16, 64)  # prompts generated for at once
NEW_TOKENS = 64  # of each, in the generation cells
WARM_TOKENS = 8  # of each completion of a first GRPO step
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
Row = dict[str, Any]


# ----------------------------------------------------------------------------------- model and data


def random_model(base: str, tokenizer: Any, *, four_bit: bool) -> Any:
    """A Qwen2 of the base's dimensions with random weights on the device, in NF4 or 16 bit, by the
    loader of checkpoints.

    Every matrix is a view of one random buffer as large as the largest: 7B needs 1.1 GB of RAM and
    no disk.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from helpers import models

    dtype = models.dtype_for_device()
    config = Qwen2Config(
        **memory.config(base),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=32768,
    )
    with torch.device("meta"):
        state = Qwen2ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    largest = max(weight.numel() for weight in state.values())
    buffer = block.repeat(-(-largest // len(block)))
    weights = {}
    for name, weight in state.items():
        weights[name] = buffer[: weight.numel()].view(weight.shape)
        if "norm" in name:
            weights[name] = torch.ones(weight.shape, dtype=dtype)
    options: dict[str, Any] = {"quantization_config": models.nf4()} if four_bit else {}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    return Qwen2ForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, **options
    )


def lora_of(profile: Profile) -> Any:
    """The LoRA of notebook 3."""
    from peft import LoraConfig

    return LoraConfig(**profile.lora, target_modules="all-linear", task_type="CAUSAL_LM")


def long_cases(count: int, tokenizer: Any, tokens: int, group: int = 8) -> pd.DataFrame:
    """hadm_id, note, code of `count` synthetic admissions. The first note of every `group` has at
    least `tokens` tokens, each of the others 1/64 of that less than the one before it, down to
    7/64."""
    from helpers import hospital, notes, prompts

    drawn = hospital.draw(24, 0)
    pairs = []
    for text, row in zip(hospital.summaries(drawn, 0, full=True), drawn, strict=True):
        note = notes.admission_note(text)
        if note:
            pairs.append((note, row["code"].replace(".", "")))
    long_notes = []
    for first in range(len(pairs)):
        note = pairs[first][0]
        following = first
        while len(tokenizer(note, add_special_tokens=False)["input_ids"]) < tokens:
            following += 1
            note += "\n" + pairs[following % len(pairs)][0]
        long_notes.append(note)
    rows = []
    for i in range(count):
        note = long_notes[i % len(pairs)]
        less = i % group % 8 * (tokens // 64)
        if less:
            note = prompts.truncate_note(note, tokenizer, tokens - less)
        rows.append({"hadm_id": i, "note": note, "code": pairs[i % len(pairs)][1]})
    return pd.DataFrame(rows)


def written_answer(note: str, tokenizer: Any, tokens: int) -> str:
    """Reasoning of about `tokens` tokens less the tags and the code. The text is the note's own."""
    from helpers import prompts

    return prompts.truncate_note(prompts.neutralise(note), tokenizer, max(4, tokens - 24))


# ----------------------------------------------------------------------------------------- training


def synchronise() -> float:
    """Wait for the device, then the time in seconds."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def stopwatch(share: float, deadline: float) -> Any:
    """A trainer callback that times steps and their phases, and ends the training when time is up
    (perf_counter times): after a step, but not the first, when `share` has come; in the middle of a
    step when `deadline` has."""
    import torch
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.spent: dict[str, float] = {}
            self.peaks: dict[
                str, tuple[int, int]
            ] = {}  # phase -> bytes of tensors, of the allocator
            self.generation: Any = None  # config of a trainer that generates
            self.length = 0

        def peak(self, phase: str) -> None:
            """Put down the peak since the last call to the phase that has just ended."""
            if torch.cuda.is_available():
                now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                self.peaks[phase] = tuple(map(max, now, self.peaks.get(phase, (0, 0))))
                torch.cuda.reset_peak_memory_stats()

        def phase(self, trainer: Any, method: str, name: str) -> None:
            """Time a method of the trainer as a phase of its own."""
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
            self.generation = trainer.generation_config
            self.length = self.generation.max_new_tokens
            self.generation.max_new_tokens = min(WARM_TOKENS, self.length)

        def on_step_begin(self, args, state, control, **kwargs):
            self.spent = {}
            self.began = synchronise()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.updating = synchronise()

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.spent["optimiser"] = synchronise() - self.updating

        def on_substep_end(self, args, state, control, **kwargs):
            if time.perf_counter() > deadline:
                control.should_training_stop = True

        def on_step_end(self, args, state, control, **kwargs):
            now = synchronise()
            self.steps.append({"step": now - self.began, **self.spent})
            if self.generation:
                self.generation.max_new_tokens = self.length
            if now > deadline or (len(self.steps) > 1 and now > share):
                control.should_training_stop = True

    return Stopwatch()


def shortened(profile: Profile) -> Profile:
    """The profile with no more micro-steps to an optimiser step than show its peak and its pace."""
    accumulation = profile.grpo["gradient_accumulation_steps"]
    cycle = min(profile.grpo.get("steps_per_generation") or accumulation, accumulation)
    two = min(profile.sft["gradient_accumulation_steps"], 2)
    return profile.replace(
        sft={"gradient_accumulation_steps": two}, grpo={"gradient_accumulation_steps": cycle}
    )


def arguments(stage: str, profile: Profile, ours: bool) -> dict[str, Any]:
    """Of the trainer's config: those of the profile, or TRL's own with the profile's lengths."""
    from helpers import rewards

    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    if ours:
        given = dict(getattr(profile, stage))
    if stage == "sft":
        given["max_length"] = profile.max_prompt_tokens + profile.max_new_tokens
        if ours:
            given["train_sampling_strategy"] = "group_by_length"
    else:
        given["max_completion_length"] = profile.grpo["max_completion_length"]
        given["shuffle_dataset"] = False  # a longest prompt in each group
        if ours:
            given["reward_weights"] = list(rewards.DEFAULT_WEIGHTS)
    return given


def train(
    stage: str,
    profile: Profile,
    tokenizer: Any,
    steps: int,
    ours: bool,
    share: float,
    deadline: float,
) -> Row:
    """Some steps of SFT or GRPO with a fresh random model. Returns the columns of the CSV that it
    can fill."""
    import torch
    from transformers.trainer_callback import PrinterCallback

    from helpers import models, training

    model = random_model(profile.base, tokenizer, four_bit=profile.four_bit[stage])
    given = training.defaults(model.dtype, **arguments(stage, profile, ours))
    batch = given["per_device_train_batch_size"]
    accumulation = given["gradient_accumulation_steps"]
    group = 8
    if stage == "grpo":  # prompts of one generation
        together = batch * (given.get("steps_per_generation") or accumulation)
        group = together // given.get("num_generations", 8)
    cases = long_cases(
        steps * batch * accumulation, tokenizer, profile.max_note_tokens, group=group
    )
    watch = stopwatch(share, deadline)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        given |= {
            "output_dir": folder,
            "max_steps": steps,
            "save_strategy": "no",
            "logging_steps": 1000,
            "seed": 0,
        }
        build = sft_trainer if stage == "sft" else grpo_trainer
        trainer, prompt, answer = build(model, tokenizer, cases, profile, given, ours, watch)
        trainer.remove_callback(PrinterCallback)
        if ours:
            models.float32_adapters(trainer.model)
        trainer.train()
    sizes = {
        "batch": batch,
        "accumulate": accumulation,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
    }
    row = timings(watch, sizes)
    if "steps" not in row:
        return row
    estimate = None
    if ours:
        exact = dataclasses.replace(profile, max_prompt_tokens=prompt, max_new_tokens=answer)
        estimate = memory.estimate(exact, stage)["peak"]
    return row | peaks(estimate, watch)


def sft_trainer(
    model: Any,
    tokenizer: Any,
    cases: pd.DataFrame,
    profile: Profile,
    given: dict[str, Any],
    ours: bool,
    watch: Any,
) -> tuple[Any, int, int]:
    """The trainer, and tokens of the first prompt and of its answer."""
    from trl import SFTConfig, SFTTrainer

    from helpers import traces

    think = [written_answer(note, tokenizer, profile.max_new_tokens) for note in cases["note"]]
    table = cases[["hadm_id", "code"]].assign(think=think, kept=True, why=None)
    dataset = traces.sft_dataset(cases, table, tokenizer, profile.max_note_tokens)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**given),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora_of(profile),
        callbacks=[watch],
    )
    prompt = prompt_tokens(tokenizer, dataset[0]["prompt"])
    turns = dataset[0]["prompt"] + dataset[0]["completion"]
    return trainer, prompt, len(tokenizer.apply_chat_template(turns)["input_ids"]) - prompt


def grpo_trainer(
    model: Any,
    tokenizer: Any,
    cases: pd.DataFrame,
    profile: Profile,
    given: dict[str, Any],
    ours: bool,
    watch: Any,
) -> tuple[Any, int, int]:
    """The trainer, with phases timed, and tokens of the first prompt and of a completion."""
    from peft import get_peft_model
    from trl import GRPOConfig, GRPOTrainer

    from helpers import prompts, rewards, traces

    length = given["max_completion_length"]
    answers = [
        prompts.answer(written_answer(case.note, tokenizer, length), case.code)
        for case in cases[:8].itertuples()
    ]
    dataset = traces.grpo_dataset(cases, tokenizer, profile.max_note_tokens)
    lora = lora_of(profile)
    trainer = GRPOTrainer(
        model=get_peft_model(model, lora) if ours else model,
        peft_config=None if ours else lora,
        reward_funcs=[on_written(reward, answers) for reward in rewards.DEFAULT],
        args=GRPOConfig(**given),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    if given["max_steps"] > 1:
        watch.warm_up(trainer)
    watch.phase(trainer, "_generate", "generation")
    watch.phase(trainer, "_calculate_rewards", "rewards")
    return trainer, prompt_tokens(tokenizer, dataset[0]["prompt"]), length


def prompt_tokens(tokenizer: Any, turns: list[dict[str, str]]) -> int:
    return len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


def on_written(
    reward: Callable[..., list[float]], answers: list[str]
) -> Callable[..., list[float]]:
    """The reward, given written answers in place of what random weights generate."""

    @wraps(reward)
    def scored(completions: list[Any], code: list[str], **columns: Any) -> list[float]:
        written = [answers[i % len(answers)] for i in range(len(completions))]
        return reward(completions=written, code=code, **columns)

    return scored


def timings(watch: Any, row: Row) -> Row:
    """The row with what a stopwatch saw: medians of the steps after the first. A first step counts
    where it is the only one, unless its answers were cut short to warm up: then there is no figure.
    """
    steps = watch.steps[1:]
    status = "measured"
    if not steps and not watch.generation:
        steps = watch.steps
        status = "measured, first step"
    if not steps:
        reason = "no step after the warm-up" if watch.steps else "no whole step"
        return row | {"status": f"not measured: {reason} in the time"}
    seconds = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    whole = seconds.pop("step")
    phases = {f"{name}_s": value for name, value in seconds.items()}
    return {
        **row,
        **phases,
        "forward_backward_s": whole - sum(seconds.values()),
        "steps": len(steps),
        "seconds_per_step": whole,
        "sequences_per_s": row["batch"] * row["accumulate"] / whole,
        "status": status,
    }


def peaks(estimate: float | None = None, watch: Any = None) -> Row:
    """Peak memory since the last reset, or in the phases of a stopwatch, in GB of 1e9 bytes: of
    tensors, of torch's allocator, and of the card, which is what the estimate beside it is about:
    the allocator's, and what the card holds beside it (CUDA's context). Empty columns on a CPU."""
    import torch

    row: Row = {"estimate_gb": estimate}
    if not torch.cuda.is_available():
        return row
    phases = {"whole": (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())}
    if watch:
        phases |= watch.peaks
    allocated, reserved = (max(values) / 1e9 for values in zip(*phases.values(), strict=True))
    free, total = torch.cuda.mem_get_info()
    card = (total - free - torch.cuda.memory_reserved()) / 1e9 + reserved
    row |= {"allocated_gb": allocated, "reserved_gb": reserved, "card_gb": card}
    if "generation" in phases:
        row["generation_gb"] = phases["generation"][0] / 1e9
        training = phases["whole"], phases.get("training", (0, 0))
        row["training_gb"] = max(training)[0] / 1e9
    if estimate:
        row["estimate_error"] = estimate / card - 1
    return row


# --------------------------------------------------------------------------------------- generation


def generate(
    profile: Profile, tokenizer: Any, four_bit: bool, lora: bool, share: float
) -> list[Row]:
    """Tokens a second by batch, with the prompts read in and without; one row for each batch that
    time and memory are enough for. `lora`: with a float32 adapter on, which is how notebook 4
    generates."""
    import torch
    from peft import get_peft_model

    from helpers import models

    model = random_model(profile.base, tokenizer, four_bit=four_bit)
    if lora:
        model = get_peft_model(model, lora_of(profile))
        models.float32_adapters(model)
    model.eval()
    prompt = profile.max_prompt_tokens
    new = min(NEW_TOKENS, profile.grpo["max_completion_length"])
    ids = torch.randint(0, len(tokenizer), (max(BATCHES), prompt), device=model.device)
    mask = torch.ones_like(ids)
    mask[1:, : prompt // 16] = (
        0  # left padding, as in GRPO: without any, attention takes another path
    )

    def seconds(batch: int, length: int) -> float:
        began = synchronise()
        model.generate(
            ids[:batch],
            attention_mask=mask[:batch],
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        return synchronise() - began

    def measure(batch: int) -> Row:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with torch.inference_mode():
                seconds(batch, 2)  # warms up
                prefill = seconds(batch, 2)
                whole = seconds(batch, new)
        except torch.OutOfMemoryError:
            return {"status": "out of memory"}
        return {
            **peaks(),
            "steps": 1,
            "tokens_per_s": batch * new / whole,
            "prefill_s": prefill,
            "decode_tokens_per_s": batch * (new - 2) / max(whole - prefill, 1e-9),
            "status": "measured",
        }

    rows = []
    for batch in BATCHES:
        row = {"batch": batch, "prompt_tokens": prompt, "answer_tokens": new}
        late = time.perf_counter() > share
        rows.append(row | (UNMEASURED if late else measure(batch)))
    return rows


# -------------------------------------------------------------------------------------------- cells


class Broken(RuntimeError):
    """The CUDA context is lost; the text is the status of what was not measured."""


def release() -> float:
    """Free what a cell has left on the device; GB of tensors that are still there."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager

    # It keeps the embeddings of all models trained with an 8-bit optimiser.
    GlobalOptimManager.get_instance().initialize()
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 1e9


def run_cell(
    cell: str, profile: Profile, tokenizer: Any, steps: int, share: float, deadline: float
) -> list[Row]:
    """One cell's rows. Running out of memory is a result; any other failure is told and costs this
    cell alone, unless the device itself has failed: then every further call on it fails too, and
    Broken is raised."""
    import torch

    held = release()
    ours = "TRL" not in cell
    stage = cell.split(",")[0]
    try:
        if cell.startswith("generate"):
            return generate(profile, tokenizer, "nf4" in cell, "LoRA" in cell, share)
        short = shortened(profile)
        row = train(stage, short, tokenizer, steps, ours, share, deadline)
        if ours and "seconds_per_step" in row:
            accumulation = getattr(profile, stage)["gradient_accumulation_steps"]
            row["profile_step_s"] = row["seconds_per_step"] * accumulation / row["accumulate"]
        return [row | {"held_gb": held}]
    except Exception as error:
        if memory.is_out_of_memory(error):
            row = {"held_gb": held, "status": "out of memory"}
            if ours and stage in memory.NOTEBOOK:
                row["estimate_gb"] = memory.estimate(profile, stage)["peak"]
            return [row]
        traceback.print_exc()
        if isinstance(error, getattr(torch, "AcceleratorError", Broken)):
            name = profile.base.split("-Instruct")[0].split("/")[-1]
            raise Broken(f"not measured: the device failed in {name}, {cell}") from error
        text = " ".join(str(error).split())[:120]
        return [{"status": f"failed: {type(error).__name__}: {text}"}]


def measure(
    todo: dict[str, Profile], minutes: float, steps: int, path: Path | None, stamp: dict[str, str]
) -> list[Row]:
    """Every cell, each for all models, the smallest first; the CSV is written after each. Once
    `minutes` have passed since this process was started, it prints what there is and ends."""
    from transformers.utils import logging as hf_logging

    from helpers import models

    hf_logging.disable_progress_bar()
    jobs = [(name, cell) for cell in CELLS for name in todo]
    results: dict[tuple[str, str], list[Row]] = {job: [UNMEASURED] for job in jobs}
    end = time.perf_counter() + 60 * minutes - (time.time() - psutil.Process().create_time())
    deadline = end - RESERVE
    saving = threading.Lock()

    def keep() -> list[Row]:
        rows = []
        for name, profile in todo.items():
            for cell in CELLS:
                head = {"model": name, "cell": cell, "shapes": profile.name}
                if "TRL" in cell:
                    head["shapes"] = "TRL"
                rows += [head | row for row in results[name, cell]]
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
    tokenizer = models.load_tokenizer("tiny")
    width = {name: memory.estimate(each, "sft")["weights"] ** 0.5 for name, each in todo.items()}
    for k, (name, cell) in enumerate(jobs):
        now = time.perf_counter()
        if now >= deadline:
            break
        print(f"{name}: {cell} ...", file=sys.stderr, flush=True)
        part = width[name] / sum(width[other] for other, _ in jobs[k:])
        share = now + (deadline - now) * part
        try:
            results[name, cell] = run_cell(cell, todo[name], tokenizer, steps, share, deadline)
        except Broken as broken:
            results |= {job: [{"status": str(broken)}] for job in jobs[k:]}
            break
        finally:
            keep()
    guard.cancel()
    return keep()


# ------------------------------------------------------------------------------------------- report


def write(path: Path, rows: list[Row], stamp: dict[str, str]) -> None:
    """The CSV, its stamp in lines that begin with #."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    head = "".join(f"# {key}: {value}\n" for key, value in stamp.items())
    places.write(path, head + table.to_csv(index=False, float_format="%.4g"))


def report(rows: list[Row], stamp: dict[str, str]) -> None:
    """Print the stamp and the main columns; what is empty was not measured or does not apply."""
    table = pd.DataFrame(rows, columns=list(PRINTED))
    print(*(f"{key}: {value}" for key, value in stamp.items()), sep="\n")
    print(table.to_string(index=False, float_format="%.3g", na_rep=""), flush=True)


def stamp_of(device: str, command: str) -> dict[str, str]:
    """What a figure depends on beside the code: device, its memory and driver, host, versions,
    date, command."""
    import torch

    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    versions += [f"CUDA {torch.version.cuda}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        device += f", {total:.1f} GB, driver {driver()}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    processor = names[0] if names else platform.machine()
    return {
        "device": device,
        "host": f"{processor}, {os.cpu_count()} cores",
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join([f"python -m {command}", *sys.argv[1:]]),
    }


def driver() -> str:
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    answer = subprocess.run(query, shell=True, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0] or "unknown"


# ------------------------------------------------------------------------------------------ command


def dry_run_profile(folder: Path) -> Profile:
    """A base of two layers and a profile that takes a second or two a step on a CPU."""
    config = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    }
    places.write(folder / "config.json", config)
    sizes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    }
    return profiles.get("tiny").replace(
        name="dry run",
        base=str(folder),
        max_note_tokens=48,
        max_prompt_tokens=128,
        max_new_tokens=48,
        four_bit={"sft": True},
        lora={"r": 8},
        sft=sizes,
        grpo=sizes | {"num_generations": 4, "max_completion_length": 8},
    )


def switch(*, on_cpu: bool) -> None:
    """Environment of a benchmark: quiet, offline, one device."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault(
        "CUDA_VISIBLE_DEVICES", "0"
    )  # with several a trainer would spread each batch
    # a faster kernel that need not be there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """0. Raises SystemExit where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="time budget (9)")
    sizes = ["0.5B", "1.5B", "7B"]
    add("--models", nargs="+", default=sizes, choices=SIZES, help="sizes of Qwen2.5")
    add("--out", type=Path, help="folder of the CSV (results/gpu; a dry run writes none)")
    add("--dry-run-cpu", action="store_true", help="two tiny layers, one step, on the CPU")
    options = parser.parse_args(arguments)
    switch(on_cpu=options.dry_run_cpu)
    import torch

    with tempfile.TemporaryDirectory() as folder:
        if options.dry_run_cpu:
            device = "dry run, CPU"
            steps = 1
            todo = {"dry run": dry_run_profile(Path(folder))}
        elif torch.cuda.is_available():
            device = torch.cuda.get_device_name(0)
            steps = STEPS
            options.out = options.out or ROOT / "results" / "gpu"
            todo = {}
            for size in sorted(options.models, key=lambda size: float(size[:-1])):
                base = f"Qwen/Qwen2.5-{size}-Instruct"
                todo[size] = profiles.get(SIZES[size]).replace(base=base)
        else:
            raise SystemExit(
                "benchmarks.gpu: there is no CUDA device here, nothing was measured. --dry-run-cpu "
                "shows whether the code works."
            )
        slug = re.sub("[^a-z0-9]+", "-", device.lower())
        path = options.out and options.out / f"{slug}.csv"
        stamp = stamp_of(device, "benchmarks.gpu")
        report(measure(todo, options.minutes, steps, path, stamp), stamp)
        if torch.cuda.is_available():  # threads of a generation that hangs would keep the process
            os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
