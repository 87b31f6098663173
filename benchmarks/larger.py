"""How far does a larger base, or a longer GRPO, get towards the ideal reader? `python -m benchmarks.larger`: one GPU, offline.

    python -m benchmarks.larger                       the shipped base and one ten times larger, GRPO of 50 and of 200 steps
    python -m benchmarks.larger --minutes 9           begins nothing new after nine minutes; the same command goes on from there
    python -m benchmarks.larger --batches 20000       a larger base that also reads more
    python -m benchmarks.larger --cpu                 without a GPU, for as long as it takes: days
    python -m benchmarks.larger --dry-run-cpu         two layers, a few steps: does this file still work?

The larger base is a Qwen2 with the shipped tokenizer, pre-trained from nothing on the shipped base's corpus, by the same code
(helpers/tiny_base/build.py); its learning rate is lower in proportion to its width. SFT and GRPO are those of the study
(`study.train`), and all answer the study's test hospital, as the ideal reader does. One seed says nothing about the luck of
training: take more (--seeds) before you believe a small difference.

Bases and adapters are kept in the run folder's `larger/`; a training that was killed goes on from its last checkpoint, a
pre-training begins anew. One row for each model in results/gpu/larger-<device>.csv; what the time does not reach says "not
measured". Read it with pandas.read_csv(path, comment="#").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from benchmarks import gpu
from helpers import course, metrics, models, profiles, study, synthetic
from helpers.profiles import Profile
from helpers.tiny_base import build

COLUMNS = ("base", "parameters", "tokens_read", "perplexity", "arm", "seed", "steps", "chapter", "chapter_low", "chapter_high",
           "category", "category_low", "category_high", "full", "full_low", "full_high", "usable", "train_minutes",
           "answer_minutes", "status")  # fmt: skip
HEAD, KV_HEADS = 64, 2
BATCH_TOKENS = 4096


def shape(times: float) -> dict[str, int]:
    """Fields of Qwen2's config for about `times` as many parameters as the shipped base has, as deep for its width, in multiples
    of 64, as NF4 needs. Raises ValueError where no such shape is near."""
    wanted = times * models.tiny_manifest()["parameters"]
    found = []
    for layers in range(1, 33):
        for hidden in range(HEAD * KV_HEADS, 3073, HEAD * KV_HEADS):  # as many heads to each of the shared keys
            inner = 64 * round(2.75 * hidden / 64)
            layer = hidden * (2 * hidden + 2 * KV_HEADS * HEAD + 3 * inner)
            off = abs((layers * layer + build.VOCABULARY * hidden) / wanted - 1) + abs(hidden / layers / 64 - 1) / 4
            found.append((off, {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                                "num_attention_heads": hidden // HEAD, "num_key_value_heads": KV_HEADS}))  # fmt: skip
    off, best = min(found, key=lambda pair: pair[0])
    if off > 0.5:
        raise ValueError(f"--times {times}: no Qwen2 of these proportions is near that. Choose between 0.2 and 400.")
    return best


class Ahead:
    """`build.documents`, written by other processes while the device is at work: a GPU reads faster than one core writes."""

    def __init__(self, pool: ProcessPoolExecutor, ahead: int) -> None:
        self.pool, self.ahead = pool, ahead
        self.waiting: dict[tuple[int, int, bool], Future[list[str]]] = {}

    def __call__(self, count: int, seed: int, *, early: bool = False) -> Iterator[str]:
        for later in range(seed, seed + self.ahead + 1):
            if (key := (count, later, early)) not in self.waiting:
                self.waiting[key] = self.pool.submit(written, *key)
        return iter(self.waiting.pop((count, seed, early)).result())


def written(count: int, seed: int, early: bool) -> list[str]:
    return list(build.documents(count, seed, early=early))


def pretrain(out: Path, times: float, batches: int, batch_tokens: int) -> None:
    """Pre-train a base and save it with the shipped tokenizer, log and record to `out`, whole or not at all."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(str(models.TINY_BASE))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = build.CONFIG | shape(times)
    model = Qwen2ForCausalLM(Qwen2Config(**config, bos_token_id=None, eos_token_id=end, pad_token_id=end))
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        models.keep_memory()
        model.set_attn_implementation("eager")
    rate = min(1.0, build.CONFIG["hidden_size"] / config["hidden_size"]) * build.RATE
    cores = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(min(cores, 12), mp_context=get_context("spawn")) as pool:  # a fork would copy CUDA's state
        log = build.train(model, tokenizer, batches, 0, rate, batch_tokens, part, source=Ahead(pool, min(cores, 12)))
        pool.shutdown(cancel_futures=True)
    build.save(model, tokenizer, part)
    tokenizer.save_pretrained(str(part))
    record = {"parameters": model.num_parameters(), "tokens_seen": log[-1]["tokens"], "minutes": log[-1]["minutes"],
              "held_out_perplexity": round(build.perplexity(model.float(), tokenizer, build.held_out()), 3)}  # fmt: skip
    course.write(part / "manifest.json", record)
    part.rename(out)


@dataclasses.dataclass(frozen=True)
class Model:
    """One row: which base, and the arm of the study with so many times its steps."""

    times: float  # the parameters of the shipped base; 1 is the shipped base itself
    arm: str
    more: float
    seed: int


def models_of(times: list[float], more: list[float], seeds: list[int]) -> list[Model]:
    """All rows, the ones that others start from first."""
    arms = [("sft", 1.0), *(("grpo", factor) for factor in more)]
    return [Model(size, arm, factor, seed) for seed in seeds for size in times for arm, factor in arms]


def base_of(times: float, batches: int, batch_tokens: int, where: Path) -> tuple[str, dict[str, Any]]:
    """Base and its record; one that is not there is pre-trained first."""
    if times == 1:
        return "tiny", models.tiny_manifest()
    out = where / f"base-x{times:g}-{batches}"
    if not out.is_dir():
        print(f"pre-training {out.name} ...", file=sys.stderr, flush=True)
        pretrain(out, times, batches, batch_tokens)
    return str(out), json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def measure(model: Model, base: str, profile: Profile, where: Path, cases: pd.DataFrame) -> dict[str, Any]:
    """Train the arm where it is not there yet, answer the cases, and score: the columns of a row."""
    name = Path(base).name if base != "tiny" else "shipped"
    longer = dataclasses.replace(profile, base=base, grpo_steps=round(profile.grpo_steps * model.more))

    def adapter(arm: str) -> Path:
        steps = getattr(longer, f"{arm}_steps")
        out = where / name / f"seed-{model.seed}" / f"{arm}-{steps}"
        if not out.is_dir():
            start = adapter(study.ARMS[arm].start) if study.ARMS[arm].start else None
            print(f"{name}, seed {model.seed}: {out.name} steps ...", file=sys.stderr, flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            started = time.time()
            study.train(arm, model.seed, out, start, longer)
            course.write(out / "train_minutes.json", {"train_minutes": (time.time() - started) / 60})  # of the last go, if killed
        return out

    out = adapter(model.arm)
    kept = out / "answers.json"
    if not course.read(kept):
        started = time.time()
        loaded, tokenizer = models.load(longer, out, four_bit=longer.grpo_4bit)
        said = study._answers(loaded, tokenizer, cases, longer)
        answers = [None if code != code else code for code in said["predicted"]]
        course.write(kept, {"answer_minutes": (time.time() - started) / 60, "answers": answers})
    told = course.read(kept)
    return {**scores(cases, told.pop("answers")), **told, **course.read(out / "train_minutes.json"),
            "steps": getattr(longer, f"{model.arm}_steps"), "status": "measured"}  # fmt: skip


def scores(cases: pd.DataFrame, said: list[str | None]) -> dict[str, Any]:
    """Macro-F1 per level with its interval over patients, and the share of usable answers."""
    found = metrics.report([*cases["code"]], said, patients=[*cases["subject_id"]])
    row = {"usable": found["usable"]}
    for level in metrics.LEVELS:
        row |= {level: found[level]["f1_gold"], f"{level}_low": found[level]["ci"][0], f"{level}_high": found[level]["ci"][1]}
    return row


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| base | arm | seed | steps | chapter | category | full code | usable | status |", "|---" * 9 + "|"]
    for row in rows:
        f1 = (f"{row[level]:.3f} [{row[f'{level}_low']:.3f}, {row[f'{level}_high']:.3f}]" if level in row else ""
              for level in metrics.LEVELS)  # fmt: skip
        usable = f"{row['usable']:.1%}" if "usable" in row else ""
        first = (str(row.get(key, "")) for key in ("base", "arm", "seed", "steps"))
        lines.append("| " + " | ".join([*first, *f1, usable, row["status"]]) + " |")
    return "\n".join(lines)


def run(
    options: argparse.Namespace, profile: Profile, batch_tokens: int, path: Path | None, stamp: dict[str, str]
) -> list[dict[str, Any]]:
    """Every model that the time is enough for; the CSV is written after each."""
    where, cases = course.run_dir().parent / "larger", study.test_cases()
    end = time.time() + 60 * options.minutes - (time.time() - psutil.Process().create_time())
    ideal = synthetic.ideal_reader(study.hospitals()[1]).loc[cases["hadm_id"], "full"]
    todo = models_of(options.times, options.more_steps, options.seeds)
    found: dict[Model, dict[str, Any]] = {model: dict(gpu.UNMEASURED) for model in todo}
    first = {"base": "", "arm": "ideal reader", **scores(cases, [*ideal]), "status": "computed"}

    def keep() -> list[dict[str, Any]]:
        rows = [first, *({"base": f"{m.times:g} x" if m.times != 1 else "shipped", "arm": m.arm, "seed": m.seed, **row}
                         for m, row in found.items())]  # fmt: skip
        table = pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, float_format="%.4g", na_rep="")
        if path:
            course.write(path, "".join(f"# {key}: {value}\n" for key, value in stamp.items()) + table)
        return rows

    for model in (m for m in todo if time.time() < end):
        try:
            base, record = base_of(model.times, options.batches, batch_tokens, where)
            found[model] |= {"parameters": record["parameters"], "tokens_read": record["tokens_seen"],
                             "perplexity": record["held_out_perplexity"]}  # fmt: skip
            if time.time() < end:
                found[model] |= measure(model, base, profile, where, cases)
        except Exception as error:  # it costs this row; the next may be of another size
            traceback.print_exc()
            found[model] |= {"status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"}
        keep()
    return keep()


def dry_run(folder: Path) -> Profile:
    """Small hospitals, short trainings, and a place of its own for all of it."""
    os.environ |= {"ICD_RUNS_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    small = dataclasses.replace(
        profiles.get("tiny"), admissions=150, max_new_tokens=8, sft_steps=6, sft_batch=2, grpo_steps=2, grpo_save_steps=2,
        grpo_prompts_per_step=2, grpo_num_generations=2, grpo_batch=4, grpo_grad_accum=1, grpo_max_completion=8,
    ).validate()  # fmt: skip
    profiles.PROFILES["tiny"] = small
    study.TEST_ADMISSIONS, study.WATCHED, study.WATCH_EVERY = 40, 2, 2
    return small


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=float, nargs="+", default=[1, 10], help="sizes, in shipped bases (default 1 10)")
    parser.add_argument("--batches", type=int, default=5300, help="of pre-training, of 4,096 tokens (default 5300, as shipped)")
    parser.add_argument("--more-steps", type=float, nargs="+", default=[1, 4], help="times the steps of GRPO (default 1 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after that (default: no limit)")
    parser.add_argument("--out", type=Path, help="folder of the CSV (default results/gpu; a dry run writes none)")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--dry-run-cpu", action="store_true", help="two layers, a few steps, on the CPU")
    options = parser.parse_args(arguments)
    for name, value in gpu.QUIET.items():
        os.environ.setdefault(name, value)
    if options.cpu or options.dry_run_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a faster kernel that need not be there
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import torch

    if not (torch.cuda.is_available() or options.cpu or options.dry_run_cpu):
        print("benchmarks.larger: there is no CUDA device here. --cpu trains on the CPU, for days; --dry-run-cpu shows "
              "whether the code works.", file=sys.stderr)  # fmt: skip
        return 2
    try:
        for times in set(options.times) - {1}:
            shape(times)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        profile, batch_tokens, device = profiles.get("tiny"), BATCH_TOKENS, "CPU"
        if options.dry_run_cpu:
            profile, batch_tokens, device = dry_run(Path(folder)), 512, "dry run, CPU"
            options.times, options.batches, options.more_steps = [1, 0.2], 50, [1, 2]
        elif torch.cuda.is_available():
            device = torch.cuda.get_device_name(0)
        stamp = gpu.stamp_of(device) | {"command": " ".join(["python -m benchmarks.larger", *sys.argv[1:]])}
        out = options.out or (None if options.dry_run_cpu else gpu.ROOT / "results" / "gpu")
        path = out / f"larger-{re.sub('[^a-z0-9]+', '-', device.lower())}.csv" if out else None
        rows = run(options, profile, batch_tokens, path, stamp)
        print("\n".join(f"{key}: {value}" for key, value in stamp.items()) + f"\n\n{show(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
