"""How far does a larger base, or a longer GRPO, get towards the ideal reader? One GPU, offline.

    python -m benchmarks.larger                  the shipped base and one ten times larger, GRPO of
                                                 50 and of 200 steps
    python -m benchmarks.larger --minutes 9      begins no new row after nine minutes; the same
                                                 command goes on from there
    python -m benchmarks.larger --batches 20000  a larger base that also reads more
    python -m benchmarks.larger --cpu            without a GPU, for as long as it takes: days
    python -m benchmarks.larger --dry-run-cpu    two layers, a few steps: does this file still work?

The larger base is a Qwen2 with the shipped tokenizer, pre-trained from nothing on the shipped
base's corpus, by the same code (tools/tiny_base.py); its learning rate is lower in proportion to
its width. SFT and GRPO are those of the study (helpers/study/run.py), and all answer the study's
test hospital, as the ideal reader does. Not the same as there: a GPU trains and answers in 16 bit,
and the shipped base read its last 300 batches in a second go. One seed says nothing about the luck
of training: take more (--seeds) before you believe a small difference.

Bases, adapters and answers are kept in `runs/larger/<device>/`, each with what it was made from; a
training that was killed goes on from its last checkpoint, a pre-training begins anew. A row once
begun is finished, however long it takes: where commands are cut off after some minutes, ask for one
size and one length at a time (--times 1 --more-steps 1), on a machine that keeps `runs/`. One row
for each model in results/gpu/larger-<device>.csv, beside those of earlier commands; what the time
does not reach says "not measured". Read it with pandas.read_csv(path, comment="#").
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from benchmarks import gpu
from helpers import casebook, metrics, models, profiles
from helpers.machinery import cpu, places, store
from helpers.profiles import Profile
from helpers.study import ARMS, run
from tools import tiny_base

KEY = ["base", "batches", "arm", "seed", "steps"]  # what tells a row from the others
F1 = [f"{level}{end}" for level in metrics.LEVELS for end in ("", "_low", "_high")]
COLUMNS = [
    *KEY,
    "parameters",
    "tokens_read",
    "perplexity",
    *F1,
    "usable",
    "train_minutes",
    "answer_minutes",
    "status",
]
HEAD = 64
KV_HEADS = 2
BATCH_TOKENS = 4096
DRY_RUN = ["--times", "1", "0.2", "--batches", "50", "--more-steps", "1", "2"]


# ---------------------------------------------------------------------------------- the larger base


def shape(times: float) -> dict[str, int]:
    """Fields of Qwen2's config for about `times` as many parameters as the shipped base has, as
    deep for its width, in multiples of 64, as NF4 needs. Raises ValueError where no such shape is
    near."""
    wanted = times * models.tiny_manifest()["parameters"]
    distances = {}
    for layers in range(1, 33):
        for hidden in range(HEAD * KV_HEADS, 3073, HEAD * KV_HEADS):
            inner = 64 * round(2.75 * hidden / 64)
            layer = hidden * (2 * hidden + 2 * KV_HEADS * HEAD + 3 * inner)
            parameters = layers * layer + tiny_base.VOCABULARY * hidden
            distance = abs(parameters / wanted - 1) + abs(hidden / layers / 64 - 1) / 4
            distances[distance] = layers, hidden, inner
    nearest = min(distances)
    if nearest > 0.5:
        raise ValueError(
            f"--times {times}: no Qwen2 of these proportions is near that. Choose between 0.2 and "
            "400."
        )
    layers, hidden, inner = distances[nearest]
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": KV_HEADS,
    }


class Ahead:
    """`tiny_base.documents`, written by other processes while the device is at work: a GPU reads
    faster than a core writes."""

    def __init__(self, pool: Executor, ahead: int) -> None:
        self.pool = pool
        self.ahead = ahead
        self.waiting: dict[tuple[int, int, bool], Future[list[str]]] = {}

    def __call__(self, count: int, seed: int, *, early: bool = False) -> Iterator[str]:
        for later in range(seed, seed + self.ahead + 1):
            key = (count, later, early)
            if key not in self.waiting:
                self.waiting[key] = self.pool.submit(_documents, *key)
        return iter(self.waiting.pop((count, seed, early)).result())


def _documents(count: int, seed: int, early: bool) -> list[str]:
    return list(tiny_base.documents(count, seed, early=early))


def pretrain(out: Path, times: float, batches: int, batch_tokens: int) -> None:
    """Pre-train a base and write it to `out`, with the shipped tokenizer, log and manifest."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(models.TINY_BASE))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = tiny_base.CONFIG | shape(times)
    ends = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    model = Qwen2ForCausalLM(Qwen2Config(**config, **ends))
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        cpu.keep_memory()
        model.set_attn_implementation("eager")
    narrower = min(1.0, tiny_base.CONFIG["hidden_size"] / config["hidden_size"])
    writers = min(12, max(1, (os.cpu_count() or 2) - 1))
    spawn = get_context("spawn")  # a fork would copy CUDA's state
    with ProcessPoolExecutor(writers, mp_context=spawn) as pool:
        log = tiny_base.train(
            model,
            tokenizer,
            batches,
            0,
            narrower * tiny_base.RATE,
            batch_tokens,
            out,
            source=Ahead(pool, writers),
        )
        pool.shutdown(cancel_futures=True)
    tiny_base.save(model, tokenizer, out)
    tokenizer.save_pretrained(str(out))
    perplexity = tiny_base.perplexity(model.float(), tokenizer, tiny_base.held_out())
    record = {
        "parameters": model.num_parameters(),
        "tokens_seen": log[-1]["tokens"],
        "minutes": log[-1]["minutes"],
        "held_out_perplexity": round(perplexity, 3),
    }
    places.write(out / "manifest.json", record)


# --------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Job:
    """One row: an arm of the study with so many steps, on the shipped base (`batches` 0) or on one
    of `times` its size."""

    times: float
    batches: int
    arm: str
    seed: int
    steps: int

    @property
    def base(self) -> str:
        return "shipped" if self.times == 1 else f"{self.times:g} x"  # of the shipped size


def jobs(options: argparse.Namespace, profile: Profile) -> list[Job]:
    """All rows that are asked for, the ones that others start from first. Raises ValueError for
    numbers that will not do."""
    steps = [round(profile.grpo["max_steps"] * more) for more in options.more_steps]
    if min([*options.times, *options.more_steps]) <= 0 or min(steps) < 1 or options.batches < 50:
        raise ValueError(
            "--times and --more-steps must be above 0, a step of GRPO must remain, and --batches "
            "be 50 or more."
        )
    rows = []
    for seed in options.seeds:
        for times in options.times:
            shape(times)
            batches = 0 if times == 1 else options.batches
            rows.append(Job(times, batches, "sft", seed, profile.sft["max_steps"]))
            rows += [Job(times, batches, "grpo", seed, each) for each in steps]
    return rows


@dataclass(frozen=True)
class Bench:
    """Makes what a job needs, each thing once. watch: options of the study's `train`."""

    where: Path
    profile: Profile
    cases: pd.DataFrame
    device: str
    batch_tokens: int = BATCH_TOKENS
    watch: dict[str, int] = field(default_factory=dict)

    def base(self, job: Job) -> Path:
        """Folder of the base, pre-trained if it is not there."""
        if job.times == 1:
            return models.TINY_BASE
        inputs = {
            "config": tiny_base.CONFIG | shape(job.times),
            "recipe": tiny_base.RECIPE,
            "rate": tiny_base.RATE,
            "batch_tokens": self.batch_tokens,
            "casebook": casebook.casebook().sha256,
            "tokenizer": tiny_base.sha256(models.TINY_BASE / "tokenizer.json"),
        }

        def work(artefact: store.Artefact) -> None:
            pretrain(artefact.part, job.times, job.batches, self.batch_tokens)

        return self._made(f"base-x{job.times:g}-{job.batches}", inputs, work)

    def adapter(self, job: Job) -> Path:
        """Folder of the adapter, trained if it is not there, the one that it starts from first."""
        profile = self._profile(job)
        start = None
        if ARMS[job.arm].start:
            start = self.adapter(replace(job, arm="sft", steps=profile.sft["max_steps"]))

        def work(artefact: store.Artefact) -> None:
            run.train(job.arm, job.seed, artefact, start, profile, **self.watch)

        return self._made(self._name(job), run.settings(job.arm, profile), work)

    def answers(self, job: Job) -> Path:
        """Folder of the answers to the cases."""
        adapter = self.adapter(job)

        def work(artefact: store.Artefact) -> None:
            profile = self._profile(job)
            answers = run.answer(adapter, self.cases, profile, keep=artefact.work)
            answers.to_parquet(artefact.part / "answers.parquet")

        cases = store.digest(self.cases["hadm_id"].tolist())
        inputs = {"adapter": store.key(adapter), "cases": cases}
        return self._made(f"{self._name(job)}-answers", inputs, work)

    def row(self, job: Job) -> dict[str, Any]:
        """The columns of a row beside its key."""
        base = places.read(self.base(job) / "manifest.json")
        answers = self.answers(job)
        predicted = pd.read_parquet(answers / "answers.parquet")["predicted"]
        return scores(self.cases, predicted) | {
            "parameters": base["parameters"],
            "tokens_read": base["tokens_seen"],
            "perplexity": base["held_out_perplexity"],
            "train_minutes": places.read(self.adapter(job) / "minutes.json")["minutes"],
            "answer_minutes": places.read(answers / "minutes.json")["minutes"],
            "status": "measured",
        }

    def _name(self, job: Job) -> str:
        return f"{self.base(job).name}/seed-{job.seed}/{job.arm}-{job.steps}"

    def _profile(self, job: Job) -> Profile:
        base = "tiny" if job.times == 1 else str(self.base(job))
        return self.profile.replace(base=base, **{job.arm: {"max_steps": job.steps}})

    def _made(
        self, name: str, inputs: dict[str, Any], work: Callable[[store.Artefact], None]
    ) -> Path:
        inputs = inputs | {"device": self.device}
        artefact = store.artefact(self.where / name, inputs, label=name)
        if artefact.why:
            started = time.time()
            work(artefact)
            minutes = (time.time() - started) / 60  # of the last go, if killed
            places.write(artefact.part / "minutes.json", {"minutes": minutes})
            artefact.finish()
        return artefact.path


def scores(cases: pd.DataFrame, predicted: pd.Series) -> dict[str, Any]:
    """Macro-F1 per level with its interval over patients, and the share of usable answers."""
    report = metrics.report(cases["code"], predicted, patients=cases["subject_id"])
    row = {"usable": report["usable"]}
    for level in metrics.LEVELS:
        low, high = report[level]["ci"]
        row |= {level: report[level]["f1_gold"], f"{level}_low": low, f"{level}_high": high}
    return row


# ------------------------------------------------------------------------------------------- report


def put(rows: list[dict[str, Any]], path: Path | None, stamp: dict[str, str]) -> pd.DataFrame:
    """These rows as a table, with what the CSV holds of other commands with the same versions;
    written there, if there is one."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    if not path:
        return table
    with store.lock(path):
        versions = f"# versions: {stamp['versions']}\n"
        if path.is_file() and versions in path.read_text(encoding="utf-8"):
            before = pd.read_csv(path, comment="#", keep_default_na=False, na_values=[""])
            is_new = table["status"] == "measured"
            was_measured = before["status"] == "measured"
            table = pd.concat([table[~is_new], before[was_measured], table[is_new]])
            table = table.drop_duplicates(KEY, keep="last")
            table = table.sort_values(KEY, na_position="first", ignore_index=True)
        csv = table.convert_dtypes().round(4).to_csv(index=False)
        head = "".join(f"# {key}: {value}\n" for key, value in stamp.items())
        places.write(path, head + csv)
    return table


def measure(
    bench: Bench,
    todo: list[Job],
    hospital: Path,
    end: float,
    path: Path | None,
    stamp: dict[str, str],
) -> pd.DataFrame:
    """Every row that the time is enough for; the CSV is written after each. hospital: data folder
    of the cases."""
    ideal = casebook.ideal_reader(hospital).loc[bench.cases["hadm_id"], "full"]
    first = {"base": "", "arm": "ideal reader", "status": "computed", **scores(bench.cases, ideal)}
    rows = {job: {name: getattr(job, name) for name in KEY} | gpu.UNMEASURED for job in todo}
    failed: dict[tuple[float, int], str] = {}  # what GRPO starts from
    for job in todo:
        start = job.times, job.seed
        if start in failed:
            rows[job]["status"] = failed[start]
        elif time.time() < end:
            try:
                rows[job] |= bench.row(job)
            except Exception as error:
                traceback.print_exc()
                text = " ".join(str(error).split())[:120]
                rows[job]["status"] = f"failed: {type(error).__name__}: {text}"
                if job.arm == "sft":
                    failed[start] = rows[job]["status"]
        table = put([first, *rows.values()], path, stamp)
    return table


# ------------------------------------------------------------------------------------------ command


def small(profile: Profile) -> Profile:
    """The profile of a dry run: a small hospital and short trainings."""
    grpo = {
        "max_steps": 2,
        "save_steps": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
    }
    sft = {"max_steps": 6, "per_device_train_batch_size": 2}
    return profile.replace(admissions=150, max_new_tokens=8, sft=sft, grpo=grpo)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--times", type=float, nargs="+", default=[1, 10], help="sizes, in shipped bases (1 10)")
    add("--batches", type=int, default=5300, help="of pre-training, of 4,096 tokens (5300)")
    add("--more-steps", type=float, nargs="+", default=[1, 4], help="times GRPO's steps (1 4)")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--minutes", type=float, default=float("inf"), help="begin no new row after that")
    add("--out", type=Path, help="folder of the CSV (results/gpu; a dry run writes none)")
    add("--cpu", action="store_true", help="train on the CPU")
    add("--dry-run-cpu", action="store_true", help="two layers, a few steps, on the CPU")
    options = parser.parse_args(arguments)
    if options.dry_run_cpu:
        options = parser.parse_args(DRY_RUN, options)
    elif not options.out:
        options.out = gpu.ROOT / "results" / "gpu"
    options.cpu |= options.dry_run_cpu
    return options


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a row failed. Raises SystemExit where there is no CUDA device, or for numbers
    that will not do."""
    options = options_of(arguments)
    gpu.switch(on_cpu=options.cpu)
    import torch

    if not (torch.cuda.is_available() or options.cpu):
        raise SystemExit(
            "benchmarks.larger: there is no CUDA device here. --cpu trains on the CPU, for days; "
            "--dry-run-cpu shows whether the code works."
        )
    profile = profiles.get("tiny")
    device = "CPU" if options.cpu else torch.cuda.get_device_name(0)
    admissions = run.TEST_ADMISSIONS
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.dry_run_cpu:
            os.environ["ICD_RUNS_DIR"] = scratch
            profile = small(profile)
            device = "dry run, CPU"
            admissions = 40
            settings = {"batch_tokens": 512, "watch": {"watched": 2, "watch_every": 2}}
        try:
            todo = jobs(options, profile)
        except ValueError as error:
            raise SystemExit(f"benchmarks.larger: {error}") from error
        end = psutil.Process().create_time() + 60 * options.minutes
        slug = re.sub("[^a-z0-9]+", "-", device.lower())
        where = places.run_dir().parent / "larger" / slug
        bench = Bench(where, profile, run.test_cases(admissions), device, **settings)
        stamp = gpu.stamp_of(device, "benchmarks.larger")
        path = options.out and options.out / f"larger-{slug}.csv"
        table = measure(bench, todo, run.hospital_of(admissions), end, path, stamp)
        print(*(f"{key}: {value}" for key, value in stamp.items()), sep="\n")
        print(table.round(3).to_string(index=False))
    return int(table["status"].str.startswith("failed").any())


if __name__ == "__main__":
    sys.exit(main())
