"""How far does a larger base, or a longer GRPO, get towards the ideal reader? `python -m benchmarks.larger`: one GPU, offline.

    python -m benchmarks.larger                       the shipped base and one ten times larger, GRPO of 50 and of 200 steps
    python -m benchmarks.larger --minutes 9           begins no new row after nine minutes; the same command goes on from there
    python -m benchmarks.larger --batches 20000       a larger base that also reads more
    python -m benchmarks.larger --cpu                 without a GPU, for as long as it takes: days
    python -m benchmarks.larger --dry-run-cpu         two layers, a few steps: does this file still work?

The larger base is a Qwen2 with the shipped tokenizer, pre-trained from nothing on the shipped base's corpus, by the same code
(helpers/tiny_base/build.py); its learning rate is lower in proportion to its width. SFT and GRPO are those of the study
(`study.train`), and all answer the study's test hospital, as the ideal reader does. Not the same as there: a GPU trains and
answers in 16 bit, and the shipped base read its last 300 batches in a second go. One seed says nothing about the luck of
training: take more (--seeds) before you believe a small difference.

Bases and adapters are kept in `runs/larger/`, by all that they were made from; a training that was killed goes on from its last
checkpoint, a pre-training begins anew. A row once begun is finished, however long it takes: where commands are cut off after
some minutes, ask for one size and one length at a time (--times 1 --more-steps 1), on a machine that keeps `runs/`. One row for
each model in results/gpu/larger-<device>.csv, beside those of earlier commands; what the time does not reach says "not
measured". Read it with pandas.read_csv(path, comment="#").
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from filelock import FileLock

from benchmarks import gpu
from helpers import course, metrics, models, profiles, study, synthetic
from helpers.profiles import Profile
from helpers.tiny_base import build

KEY = ("base", "batches", "arm", "seed", "steps")  # what tells a row from the others
COLUMNS = (
    *KEY,
    "parameters",
    "tokens_read",
    "perplexity",
    "chapter",
    "chapter_low",
    "chapter_high",
    "category",
    "category_low",
    "category_high",
    "full",
    "full_low",
    "full_high",
    "usable",
    "train_minutes",
    "answer_minutes",
    "status",
)
HEAD, KV_HEADS = 64, 2
BATCH_TOKENS = 4096


def shape(times: float) -> dict[str, int]:
    """Fields of Qwen2's config for about `times` as many parameters as the shipped base has, as deep for its width, in multiples
    of 64, as NF4 needs. Raises ValueError where no such shape is near."""
    wanted = times * models.tiny_manifest()["parameters"]
    found = []
    for layers in range(1, 33):
        for hidden in range(
            HEAD * KV_HEADS, 3073, HEAD * KV_HEADS
        ):  # as many heads to each of the shared keys
            inner = 64 * round(2.75 * hidden / 64)
            layer = hidden * (2 * hidden + 2 * KV_HEADS * HEAD + 3 * inner)
            off = (
                abs((layers * layer + build.VOCABULARY * hidden) / wanted - 1)
                + abs(hidden / layers / 64 - 1) / 4
            )
            found.append(
                (
                    off,
                    {
                        "hidden_size": hidden,
                        "intermediate_size": inner,
                        "num_hidden_layers": layers,
                        "num_attention_heads": hidden // HEAD,
                        "num_key_value_heads": KV_HEADS,
                    },
                )
            )
    off, best = min(found, key=lambda pair: pair[0])
    if off > 0.5:
        raise ValueError(
            f"--times {times}: no Qwen2 of these proportions is near that. Choose between 0.2 and 400."
        )
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
    model = Qwen2ForCausalLM(
        Qwen2Config(**config, bos_token_id=None, eos_token_id=end, pad_token_id=end)
    )
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        models.keep_memory()
        model.set_attn_implementation("eager")
    rate = min(1.0, build.CONFIG["hidden_size"] / config["hidden_size"]) * build.RATE
    cores = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(
        min(cores, 12), mp_context=get_context("spawn")
    ) as pool:  # a fork would copy CUDA's state
        log = build.train(
            model,
            tokenizer,
            batches,
            0,
            rate,
            batch_tokens,
            part,
            source=Ahead(pool, min(cores, 12)),
        )
        pool.shutdown(cancel_futures=True)
    build.save(model, tokenizer, part)
    tokenizer.save_pretrained(str(part))
    record = {
        "parameters": model.num_parameters(),
        "tokens_seen": log[-1]["tokens"],
        "minutes": log[-1]["minutes"],
        "held_out_perplexity": round(
            build.perplexity(model.float(), tokenizer, build.held_out()), 3
        ),
    }
    course.write(part / "manifest.json", record)
    part.rename(out)


@dataclasses.dataclass(frozen=True)
class Job:
    """One row: an arm of the study with so many steps, on the shipped base (`batches` 0) or on one of `times` its size."""

    times: float
    batches: int
    arm: str
    seed: int
    steps: int


class Bench:
    """Makes what a job needs, once for a device and for settings: folders are named by all that they were made from."""

    def __init__(
        self, where: Path, profile: Profile, cases: pd.DataFrame, device: str, batch_tokens: int
    ) -> None:
        self.where, self.profile, self.cases, self.device, self.batch_tokens = (
            where,
            profile,
            cases,
            device,
            batch_tokens,
        )
        self.failed: dict[Path, str] = {}

    def base(self, job: Job) -> Path:
        """Folder of the base, pre-trained if it is not there."""
        if job.times == 1:
            return models.TINY_BASE
        made_from = [
            shape(job.times),
            build.CONFIG,
            build.RECIPE,
            build.RATE,
            self.batch_tokens,
            self.device,
        ]
        made_from += [
            synthetic.casebook().sha256,
            build.sha256(models.TINY_BASE / "tokenizer.json"),
        ]
        out = self.where / f"base-x{job.times:g}-{job.batches}-{course.digest(made_from)[:8]}"
        return self.make(out, lambda: pretrain(out, job.times, job.batches, self.batch_tokens))

    def profile_of(self, job: Job) -> Profile:
        base = "tiny" if job.times == 1 else str(self.base(job))
        return dataclasses.replace(self.profile, base=base, **{f"{job.arm}_steps": job.steps})

    def adapter(self, job: Job) -> Path:
        """Folder of the adapter, trained if it is not there, the one that it starts from first."""
        arm, profile, record = (
            study.ARMS[job.arm],
            self.profile_of(job),
            course.read(self.base(job) / "manifest.json"),
        )
        start = arm.start and self.adapter(
            dataclasses.replace(job, arm=arm.start, steps=getattr(profile, f"{arm.start}_steps"))
        )
        settings = [
            profile.record("sft"),
            profile.record("grpo"),
            dataclasses.asdict(arm),
            record,
            str(start),
            self.device,
        ]
        name = "shipped" if job.times == 1 else self.base(job).name
        out = (
            self.where
            / name
            / f"seed-{job.seed}"
            / f"{job.arm}-{job.steps}-{course.digest(settings)[:8]}"
        )
        return self.make(out, lambda: study.train(job.arm, job.seed, out, start, profile))

    def answers(self, job: Job) -> dict[str, Any]:
        """Answers to the cases, and the minutes that they took."""
        out, profile = self.adapter(job), self.profile_of(job)
        kept = out / f"answers-{course.digest(self.cases['hadm_id'].tolist())[:8]}.json"
        if not course.read(kept):
            started = time.time()
            loaded, tokenizer = models.load(profile, out, four_bit=profile.grpo_4bit)
            said = study._answers(loaded, tokenizer, self.cases, profile)["predicted"]
            codes = [None if code != code else code for code in said]
            course.write(kept, {"answer_minutes": (time.time() - started) / 60, "answers": codes})
        return course.read(kept)

    def make(self, out: Path, work: Callable[[], None]) -> Path:
        """Do the work that leaves `out`, unless it is there; one process does it, others wait. What failed is not tried again."""
        if out in self.failed:
            raise RuntimeError(f"{out.name} failed: {self.failed[out]}")
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f".{out.name}.lock")):
            if not out.is_dir():
                print(f"{out.relative_to(self.where)} ...", file=sys.stderr, flush=True)
                started = time.time()
                try:
                    work()
                except Exception as error:
                    self.failed[out] = (
                        f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                    )
                    raise
                course.write(
                    out / "minutes.json", {"train_minutes": (time.time() - started) / 60}
                )  # of the last go, if killed
        return out

    def row(self, job: Job) -> dict[str, Any]:
        """The columns of a row beside its key."""
        base = course.read(self.base(job) / "manifest.json")
        told, minutes = self.answers(job), course.read(self.adapter(job) / "minutes.json")
        return {
            "parameters": base["parameters"],
            "tokens_read": base["tokens_seen"],
            "perplexity": base["held_out_perplexity"],
            **scores(self.cases, told["answers"]),
            **minutes,
            "answer_minutes": told["answer_minutes"],
            "status": "measured",
        }


def jobs(options: argparse.Namespace, profile: Profile) -> list[Job]:
    """All rows that are asked for, the ones that others start from first. Raises ValueError for numbers that will not do."""
    grpo = [round(profile.grpo_steps * more) for more in options.more_steps]
    if min([*options.times, *options.more_steps]) <= 0 or min(grpo) < 1 or options.batches < 50:
        raise ValueError(
            "--times and --more-steps must be above 0, a step of GRPO must remain, and --batches be 50 or more."
        )
    arms, todo = [("sft", profile.sft_steps), *(("grpo", steps) for steps in grpo)], []
    for seed in options.seeds:
        for times in options.times:
            if times != 1:
                shape(times)
            todo += [
                Job(times, 0 if times == 1 else options.batches, arm, seed, steps)
                for arm, steps in arms
            ]
    return todo


def scores(cases: pd.DataFrame, said: list[str | None]) -> dict[str, Any]:
    """Macro-F1 per level with its interval over patients, and the share of usable answers."""
    found = metrics.report([*cases["code"]], said, patients=[*cases["subject_id"]])
    row = {"usable": found["usable"]}
    for level in metrics.LEVELS:
        row |= {
            level: found[level]["f1_gold"],
            f"{level}_low": found[level]["ci"][0],
            f"{level}_high": found[level]["ci"][1],
        }
    return row


def show(table: pd.DataFrame) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| base | batches | arm | seed | steps | chapter | category | full code | usable | status |",
        "|---" * 10 + "|",
    ]
    for row in table.astype(object).where(table.notna(), "").to_dict("records"):
        f1 = (
            f"{row[level]:.3f} [{row[f'{level}_low']:.3f}, {row[f'{level}_high']:.3f}]"
            if row[level] != ""
            else ""
            for level in metrics.LEVELS
        )
        usable = f"{row['usable']:.1%}" if row["usable"] != "" else ""
        lines.append(
            "| " + " | ".join([*(str(row[key]) for key in KEY), *f1, usable, row["status"]]) + " |"
        )
    return "\n".join(lines)


def put(rows: list[dict[str, Any]], path: Path | None, stamp: dict[str, str]) -> pd.DataFrame:
    """These rows as a table, with what the CSV holds of other commands with the same versions; written there, if there is one."""
    new = pd.DataFrame(rows, columns=list(COLUMNS))
    if not path:
        return new
    with FileLock(
        Path(tempfile.gettempdir(), f"icd-{course.digest(str(path.absolute()))[:16]}.lock")
    ):  # none beside the figures
        if path.is_file() and f"# versions: {stamp['versions']}\n" in path.read_text(
            encoding="utf-8"
        ):
            old = pd.read_csv(path, comment="#", keep_default_na=False, na_values=[""])
            done, before = new["status"] == "measured", old[old["status"] == "measured"]
            new = pd.concat([new[~done], before, new[done]])
            new = new.drop_duplicates(list(KEY), keep="last").sort_values(
                list(KEY), na_position="first", ignore_index=True
            )
        whole = ["batches", "seed", "steps", "parameters", "tokens_read"]
        table = new.astype(dict.fromkeys(whole, "Int64")).round(4).to_csv(index=False)
        course.write(path, "".join(f"# {key}: {value}\n" for key, value in stamp.items()) + table)
    return new


def run(
    bench: Bench, todo: list[Job], end: float, path: Path | None, stamp: dict[str, str]
) -> pd.DataFrame:
    """Every row that the time is enough for; the CSV is written after each."""
    read = synthetic.ideal_reader(study.hospitals()[1]).loc[bench.cases["hadm_id"], "full"]
    ideal = {
        "base": "",
        "arm": "ideal reader",
        **scores(bench.cases, [*read]),
        "status": "computed",
    }
    found: dict[Job, dict[str, Any]] = {job: dict(gpu.UNMEASURED) for job in todo}

    def keep() -> pd.DataFrame:
        rows = [ideal]
        for job, row in found.items():
            base = "shipped" if job.times == 1 else f"{job.times:g} x"
            rows.append(
                {
                    "base": base,
                    "batches": job.batches,
                    "arm": job.arm,
                    "seed": job.seed,
                    "steps": job.steps,
                    **row,
                }
            )
        return put(rows, path, stamp)

    for job in todo:
        if time.time() < end:
            try:
                found[job] = bench.row(job)
            except Exception as error:  # it costs this row, and those that start from what failed
                traceback.print_exc()
                found[job] = {
                    "status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
                }
            keep()
    return keep()


def dry_run(folder: Path) -> Profile:
    """Small hospitals, short trainings, and a place of its own for all of it."""
    os.environ |= {"ICD_RUNS_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    small = dataclasses.replace(
        profiles.get("tiny"),
        admissions=150,
        max_new_tokens=8,
        sft_steps=6,
        sft_batch=2,
        grpo_steps=2,
        grpo_save_steps=2,
        grpo_prompts_per_step=2,
        grpo_num_generations=2,
        grpo_batch=4,
        grpo_grad_accum=1,
        grpo_max_completion=8,
    ).validate()
    profiles.PROFILES["tiny"] = small
    study.TEST_ADMISSIONS, study.WATCHED, study.WATCH_EVERY = 40, 2, 2
    return small


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a row failed; 2 where there is no CUDA device, or for numbers that will not do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--times",
        type=float,
        nargs="+",
        default=[1, 10],
        help="sizes, in shipped bases (default 1 10)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=5300,
        help="of pre-training, of 4,096 tokens (default 5300, as shipped)",
    )
    parser.add_argument(
        "--more-steps",
        type=float,
        nargs="+",
        default=[1, 4],
        help="times the steps of GRPO (default 1 4)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no new row after that (default: no limit)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV (default results/gpu; a dry run writes none)"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="two layers, a few steps, on the CPU"
    )
    options = parser.parse_args(arguments)
    for name, value in gpu.QUIET.items():
        os.environ.setdefault(name, value)
    if options.cpu or options.dry_run_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
            logging.ERROR
        )  # a faster kernel that need not be there
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import torch

    if not (torch.cuda.is_available() or options.cpu or options.dry_run_cpu):
        print(
            "benchmarks.larger: there is no CUDA device here. --cpu trains on the CPU, for days; --dry-run-cpu shows "
            "whether the code works.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        profile, batch_tokens, device = profiles.get("tiny"), BATCH_TOKENS, "CPU"
        if options.dry_run_cpu:
            profile, batch_tokens, device = dry_run(Path(folder)), 512, "dry run, CPU"
            options.times, options.batches, options.more_steps, options.seeds = (
                [1, 0.2],
                50,
                [1, 2],
                [0],
            )
        elif torch.cuda.is_available():
            device = torch.cuda.get_device_name(0)
        try:
            todo = jobs(options, profile)
        except ValueError as error:
            print(f"benchmarks.larger: {error}", file=sys.stderr)
            return 2
        end = time.time() + 60 * options.minutes - (time.time() - psutil.Process().create_time())
        bench = Bench(
            course.run_dir().parent / "larger", profile, study.test_cases(), device, batch_tokens
        )
        stamp = gpu.stamp_of(device) | {
            "command": " ".join(["python -m benchmarks.larger", *sys.argv[1:]])
        }
        out = options.out or (None if options.dry_run_cpu else gpu.ROOT / "results" / "gpu")
        table = run(
            bench,
            todo,
            end,
            out and out / f"larger-{re.sub('[^a-z0-9]+', '-', device.lower())}.csv",
            stamp,
        )
        print(
            "\n".join(f"{key}: {value}" for key, value in stamp.items()) + f"\n\n{show(table)}",
            flush=True,
        )
    return int(table["status"].str.startswith("failed").any())


if __name__ == "__main__":
    sys.exit(main())
