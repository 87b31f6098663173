"""The study of rewards: arms x seeds, each in a folder of its own, resumable. `python -m helpers.study run|show` (`make study`).

Question, fixed before the runs: full-code macro-F1 of SFT + GRPO with the hierarchical reward, minus SFT alone. Each seed has
its own split of the patients, its own traces, SFT and GRPO; all arms answer the cases of one hospital that nothing else sees. A
sceptic's arms spend the same labels on supervised training instead. What is finished is kept as a column of
results/study/predictions.csv and a training log beside it; what was interrupted goes on from its last checkpoint. Started
twice, two processes share the work (OMP_NUM_THREADS=1 for each: on 2 cores that is faster than one process on both).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from helpers import (
    course,
    inference,
    metrics,
    mimic,
    models,
    profiles,
    prompts,
    rewards,
    synthetic,
    traces,
)

_BESIDE, _INSIDE = (
    Path(__file__).parent.parent / "results" / "study",
    Path(__file__).parent / "_results" / "study",
)
RESULTS = (
    _INSIDE if _INSIDE.is_dir() else _BESIDE
)  # inside the package where pip installed the course
TEST_SEED, TEST_ADMISSIONS = (
    50,
    4450,
)  # of the study's own test hospital: at least 4,000 cases after the funnel
CODE_ALONE = "The code alone."  # reasoning of the arm that is taught codes without reasons
MARGIN = -0.02  # "no loss" at category and chapter
WATCHED, WATCH_EVERY = (
    256,
    25,
)  # validation notes whose reward is looked at during GRPO, and how often (steps)
PRIMARY = ("sft", "grpo", "full")
SECONDARY = (
    *((*PRIMARY[:2], level) for level in ("category", "chapter")),
    *(("sft", arm, "full") for arm in ("grpo-strict", "sft-codes", "sft-own")),
    *((arm, "grpo", "full") for arm in ("grpo-strict", "sft-codes", "sft-own")),
)


@dataclass(frozen=True)
class Arm:
    """What an arm starts from (another arm's adapter, or the base), and what it is taught by."""

    about: str
    start: str | None = None
    rewards: tuple[str | dict[str, Any], ...] = ()  # GRPO with these (rewards.named); none: SFT
    weights: tuple[float, ...] = ()
    taught: str = "traces"  # SFT on: traces (of half the cases), codes (of all), own (traces and the start's own right answers)
    habit: float = traces.HABIT
    core: bool = True
    longer: float = 1.0  # times the profile's steps


_RECORDS = yaml.safe_load(Path(__file__).with_name("arms.yaml").read_text(encoding="utf-8"))
ARMS = {
    name: Arm(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    )
    for name, record in _RECORDS.items()
}


def folder() -> Path:
    """Where the study's adapters and checkpoints live: `study` beside the runs."""
    return course.run_dir().parent / "study"


def hospitals() -> tuple[Path, Path]:
    """Data folders of the course's hospital and of the study's test hospital, made if missing."""
    from filelock import FileLock

    made, book = [], synthetic.casebook().sha256[:8]
    for admissions, seed in ((profiles.get("tiny").admissions, 0), (TEST_ADMISSIONS, TEST_SEED)):
        path = folder() / f"hospital-{seed}-{admissions}-{book}"
        with FileLock(path.with_suffix(".lock")):
            if not path.is_dir():
                synthetic.write_hospital(path, admissions=admissions, seed=seed)
        made.append(path)
    return made[0], made[1]


def test_cases() -> pd.DataFrame:
    """All cases of the test hospital; its patients share nothing with the course's but the casebook."""
    return mimic.build_cases(hospitals()[1], seed=0)


def cases_of(split: str, seed: int) -> pd.DataFrame:
    """The course's cases of "train", "val" or "test" under this seed's split of the patients."""
    cases = mimic.build_cases(hospitals()[0], seed=seed)
    return cases[cases["split"] == split].reset_index(drop=True)


def _traces(
    cases: pd.DataFrame, arm: Arm, profile: profiles.Profile, seed: int, start: Path | None
) -> pd.DataFrame:
    half = cases.sample(frac=profile.traces_share, random_state=seed)
    if arm.taught == "codes":
        return traces.checked([(c.hadm_id, CODE_ALONE, c.code, c.note) for c in cases.itertuples()])
    taught = traces.from_template(half, habit=arm.habit)
    if (
        arm.taught == "own"
    ):  # two answers to each case without a trace, about GRPO's number of roll-outs; the first right one
        others = cases[~cases["hadm_id"].isin(half["hadm_id"])]
        model, tokenizer = models.load(profile, start, four_bit=profile.grpo_4bit)
        said = _answers(
            model, tokenizer, others, profile, samples=2, temperature=1.0, batch_size=64, seed=seed
        )
        said = said.merge(others[["hadm_id", "code", "note"]], on="hadm_id")
        well = said["completion"].map(lambda text: prompts.parse(text).is_well_formed)
        right = said[(said["predicted"] == said["code"]) & well].drop_duplicates("hadm_id")
        own = [(c.hadm_id, c.think, c.code, True, None) for c in right.itertuples()]
        taught = pd.concat(
            [taught, pd.DataFrame(own, columns=list(traces.COLUMNS))], ignore_index=True
        )
    return taught


def _answers(
    model: Any, tokenizer: Any, cases: pd.DataFrame, profile: profiles.Profile, **options: Any
) -> pd.DataFrame:
    limits = {"max_new_tokens": profile.max_new_tokens, "max_note_tokens": profile.max_note_tokens}
    watch = {"progress": lambda x: course.progress(x, "answers")}
    return inference.predict(
        model, tokenizer, cases, **({"batch_size": 128} | limits | watch | options)
    )


def train(
    name: str, seed: int, out: Path, start: Path | None, profile: profiles.Profile | None = None
) -> None:
    """Train one arm and save its adapter, tokenizer and training_log.csv to `out`, whole or not at all.

    The trainers are configured as in notebooks 03 and 04; a checkpoint left beside `out` is gone on from. `profile`: the tiny
    one unless another is given.
    """
    import torch
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint, set_seed
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    arm, profile, work = (
        ARMS[name],
        profile or profiles.get("tiny"),
        out.with_name(f".{out.name}.work"),
    )
    set_seed(seed)  # LoRA draws its first weights before a trainer sets the seed
    course.drop_half(work)
    dtype = models.dtype_for_device()
    cases, common = (
        cases_of("train", seed),
        {
            "output_dir": str(work),
            "report_to": "none",
            "disable_tqdm": True,
            "seed": seed,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "save_total_limit": 1,
            "use_cpu": not torch.cuda.is_available(),
        },
    )
    lora = LoraConfig(
        r=profile.sft_lora_r,
        lora_alpha=profile.sft_lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if arm.rewards:
        model, tokenizer = models.load(profile, start, four_bit=profile.grpo_4bit, trainable=True)
        pays, watched = (
            [rewards.named(each) for each in arm.rewards],
            cases_of("val", seed).head(WATCHED),
        )

        def held_out() -> float:
            said = _answers(model, tokenizer, watched, profile)
            return float(
                np.mean(
                    rewards.total(
                        [*said["completion"]], [*watched["code"]], note=[*watched["note"]]
                    )
                )
            )

        config = GRPOConfig(
            **common,
            max_steps=round(profile.grpo_steps * arm.longer),
            per_device_train_batch_size=profile.grpo_batch,
            gradient_accumulation_steps=profile.grpo_grad_accum,
            num_generations=profile.grpo_num_generations,
            max_completion_length=profile.grpo_max_completion,
            temperature=profile.grpo_temperature,
            learning_rate=profile.grpo_lr,
            lr_scheduler_type=profile.grpo_schedule,
            warmup_steps=profile.grpo_warmup,
            beta=profile.grpo_beta,
            loss_type=profile.grpo_loss_type,
            reward_weights=list(arm.weights),
            logging_steps=1,
            save_steps=profile.grpo_save_steps,
        )
        trainer: Any = GRPOTrainer(
            model=model,
            args=config,
            reward_funcs=pays,
            processing_class=tokenizer,
            train_dataset=traces.grpo_dataset(cases, tokenizer, profile.max_note_tokens),
            callbacks=[course.TrainerProgress(name), course.HeldOut(WATCH_EVERY, held_out)],
            **({} if start else {"peft_config": lora}),
        )
    else:
        table = _traces(cases, arm, profile, seed, start)
        model, tokenizer = models.load(profile)
        config = SFTConfig(
            **common,
            max_steps=round(profile.sft_steps * arm.longer),
            per_device_train_batch_size=profile.sft_batch,
            gradient_accumulation_steps=profile.sft_grad_accum,
            learning_rate=profile.sft_lr,
            lr_scheduler_type="cosine",
            warmup_steps=profile.sft_warmup,
            max_length=profile.max_prompt_tokens + profile.max_new_tokens,
            train_sampling_strategy="group_by_length",
            logging_steps=5,
            save_steps=profile.sft_save_steps,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=traces.sft_dataset(cases, table, tokenizer, profile.max_note_tokens),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[course.TrainerProgress(name)],
        )
    trainer.remove_callback(PrinterCallback)
    models.float32_adapters(trainer.model)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.is_dir() else None)
    part = out.with_name(f".{out.name}.part")
    trainer.model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    rows = [
        row for row in trainer.state.log_history if {"loss", "reward", "eval_reward"} & set(row)
    ]
    pd.DataFrame(rows).groupby("step", as_index=False).first().to_csv(
        part / "training_log.csv", index=False
    )
    part.rename(out)
    shutil.rmtree(work)


def settings(name: str) -> dict[str, Any]:
    """All that an arm's adapter depends on beside the seed: its own settings, the profile's, those of the arm it starts from."""
    own = {key: value for key, value in asdict(ARMS[name]).items() if key not in ("about", "core")}
    start, profile = ARMS[name].start, profiles.get("tiny")
    record = profile.record("grpo" if ARMS[name].rewards else "sft")
    for shared in (
        "sft_lora_r",
        "sft_lora_alpha",
        "grpo_4bit",
    ):  # GRPO has the LoRA of SFT, and all answer as GRPO does
        record[shared] = getattr(profile, shared)
    own |= {
        "start": settings(start) if start else None,
        "profile": record,
        "casebook": synthetic.casebook().sha256,
    }
    return json.loads(json.dumps(own))


def adapter(name: str, seed: int) -> Path:
    """The adapter of an arm and seed, trained if it is not there yet or was made with other settings, the one that it starts from
    first. One process trains it; another that needs it meanwhile waits.
    """
    from filelock import FileLock

    out, start, now = folder() / f"seed-{seed}" / name, ARMS[name].start, settings(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f"{name}.lock")):
        work, made_with = out.with_name(f".{name}.work"), out.with_name(f".{name}.json")
        if course.read(made_with) not in ({}, now):
            print(
                f"seed {seed}, {name}: its settings have changed, so it is trained anew (before.{name}: as it was)",
                flush=True,
            )
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(before := out.with_name(f"before.{name}"), ignore_errors=True)
            if out.is_dir():
                out.rename(before)
        course.write(made_with, now)
        if not out.is_dir():
            train(name, seed, out, adapter(start, seed) if start else None)
    return out


def run(seeds: list[int], arms: list[str], results: Path = RESULTS) -> None:
    """Every arm of every seed that has no column in predictions.csv yet; what another process is at is left to it.

    Raises ValueError for an unknown arm, and where predictions.csv holds answers to other cases, or of an arm whose settings have
    changed since.
    """
    import torch
    from filelock import FileLock, Timeout

    if unknown := [name for name in arms if name not in ARMS]:
        raise ValueError(f"no arm is called {', '.join(unknown)}. Known: {', '.join(ARMS)}.")
    profile, cases = profiles.get("tiny"), test_cases()
    blank = cases[["subject_id", "hadm_id", "code"]].astype(str)
    results.mkdir(parents=True, exist_ok=True)
    table, made = results / "predictions.csv", results / "runs.csv"

    def done() -> pd.DataFrame:
        so_far = pd.read_csv(table, dtype=str) if table.exists() else blank
        if not so_far[[*blank]].equals(blank):
            raise ValueError(
                f"{table} answers other cases than those of the test hospital: move it away to start anew."
            )
        return so_far

    then, answered = (
        course.read(results / "design.json").get("settings", {}),
        {column.split("/")[0] for column in done()},
    )
    if changed := [
        name for name in ARMS if name in answered and then.get(name) not in (None, settings(name))
    ]:
        raise ValueError(
            f"{table} has answers of {', '.join(changed)}, made with other settings than those of now. Put the "
            f"settings back (what you try goes into an arm of its own), or move {results} away to start anew."
        )
    design = {
        "primary": PRIMARY,
        "secondary": SECONDARY,
        "margin": MARGIN,
        "test_cases": len(cases),
        "watched": WATCHED,
    }
    course.write(
        results / "design.json",
        {
            "about": {name: arm.about for name, arm in ARMS.items()},
            **design,
            "settings": {name: settings(name) for name in ARMS},
        },
    )
    for name, seed in ((name, seed) for name in arms for seed in seeds):
        try:
            with FileLock(folder() / f"{name}-{seed}.lock", timeout=0):
                if (column := f"{name}/{seed}") in done():
                    continue
                print(f"seed {seed}, {name}: {ARMS[name].about}", flush=True)
                started = time.time()
                out = adapter(name, seed)
                trained = time.time()
                model, tokenizer = models.load(profile, out, four_bit=profile.grpo_4bit)
                said = _answers(model, tokenizer, cases, profile)
                log = pd.read_csv(out / "training_log.csv")
                row = {
                    "arm": name,
                    "seed": seed,
                    "steps": int(log["step"].max()),
                    "threads": torch.get_num_threads(),
                    "train_minutes": round((trained - started) / 60, 1),
                    "answer_minutes": round((time.time() - trained) / 60, 1),
                    "usable": round(said["predicted"].notna().mean(), 4),
                }
                log.to_csv(results / f"log-{name}-{seed}.csv", index=False)
                with FileLock(folder() / "table.lock"):
                    if course.read(results / "design.json").get("settings", {}).get(
                        name
                    ) != settings(name):
                        raise ValueError(
                            f"{name}: another study changed its settings meanwhile: its answers are not put down."
                        )
                    lines = made.read_text().splitlines() if made.exists() else [",".join(row)]
                    lines = [
                        line for line in lines if not line.startswith(f"{name},{seed},")
                    ]  # of a run killed just here
                    course.write(made, "\n".join([*lines, ",".join(map(str, row.values()))]) + "\n")
                    # Last, because a column counts as done.
                    course.write(
                        table,
                        done()
                        .assign(**{column: said["predicted"].fillna("NIL").to_numpy()})
                        .to_csv(index=False),
                    )
        except Timeout:
            print(f"seed {seed}, {name}: another process is at it", flush=True)


def read(results: Path = RESULTS) -> pd.DataFrame:
    """predictions.csv: subject_id, hadm_id, code and a column arm/seed for each finished run, all as text ("NIL": unusable).

    Raises FileNotFoundError where the study has not begun.
    """
    if not (results / "predictions.csv").is_file():
        raise FileNotFoundError(
            f"{results / 'predictions.csv'} is not there: the study has not begun. Run: make study"
        )
    return pd.read_csv(results / "predictions.csv", dtype=str)


def contrast(
    table: pd.DataFrame, a: str, b: str, *, n_boot: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Arm b minus arm a, per level: macro-F1 difference, 95 % interval, two-sided p, seeds; from predictions.csv (as strings).

    Bootstrap over seeds and patients: each resample draws seeds with replacement and half of the patients without
    (as `metrics` does), and averages the paired differences over the drawn seeds. The spread of few seeds is widened by
    sqrt(n / (n - 1)), without which a bootstrap of 5 seeds is a tenth too narrow. `t_ci` is Student's interval over the seeds
    alone, patients fixed: it is stricter about few seeds. Raises ValueError without a common seed.
    """
    from scipy import stats

    seeds_a, seeds_b = (
        {c.split("/")[1] for c in table if c.startswith(f"{arm}/")} for arm in (a, b)
    )
    seeds = sorted(seeds_a & seeds_b)
    if not seeds:
        raise ValueError(
            f"no seed has both {a} and {b}. Run: python -m helpers.study run --arms {a} {b}"
        )
    rng, out = np.random.default_rng(seed), {}
    answers = {
        (arm, s): [None if v == "NIL" else v for v in table[f"{arm}/{s}"]]
        for arm in (a, b)
        for s in seeds
    }
    boot = {"patients": [*table["subject_id"]], "n_boot": n_boot, "seed": seed}
    per_seed = [
        metrics.differences([*table["code"]], answers[a, s], answers[b, s], **boot) for s in seeds
    ]
    drawn = rng.integers(0, len(seeds), (n_boot, len(seeds)))
    for level in metrics.LEVELS:
        points = np.array([d[level][0] for d in per_seed])
        strays = np.stack(
            [d[level][1] for d in per_seed]
        )  # seeds x resamples, the same patients for each seed
        point, n = float(points.mean()), len(seeds)
        wide = point + (points - point) * (n / (n - 1)) ** 0.5 if n > 1 else points
        means = (wide[drawn] + strays[drawn, np.arange(n_boot)[:, None]]).mean(1)
        away = means - means.mean()
        low, high = (float(point + q) for q in np.quantile(away, [0.025, 0.975]))
        p = (1 + int((np.abs(away) >= abs(point) - 1e-9).sum())) / (1 + n_boot)
        half = stats.t.ppf(0.975, n - 1) * points.std(ddof=1) / n**0.5 if n > 1 else np.nan
        out[level] = {
            "f1_gold": point,
            "ci": [low, high],
            "t_ci": [float(point - half), float(point + half)],
            "p": p,
            "seeds": n,
            "per_seed": points.round(4).tolist(),
        }
    return out


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Macro-F1 per level and the share of usable answers, one row for each arm of ARMS and seed that has answered."""
    rows, order = [], list(ARMS)
    columns = [(*column.split("/"), column) for column in table if column.split("/")[0] in ARMS]
    for arm, seed, column in sorted(columns, key=lambda c: (order.index(c[0]), int(c[1]))):
        said = [None if v == "NIL" else v for v in table[column]]
        found = metrics.report([*table["code"]], said, n_boot=0)
        rows.append(
            {
                "arm": arm,
                "seed": int(seed),
                **{level: found[level]["f1_gold"] for level in metrics.LEVELS},
                "usable": found["usable"],
            }
        )
    return pd.DataFrame(rows)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The primary contrast, then the secondary ones with Holm's p: what could be computed from the runs that are there.

    `holds`: primary and secondary differences: the interval excludes zero (secondary: and Holm's p is below 0.05). `no_loss`, at
    category and chapter: the interval lies above MARGIN.
    """
    rows, pairs = [], {}
    have = {column.split("/")[0] for column in table}
    for kind, (a, b, level) in (("primary", PRIMARY), *(("secondary", s) for s in SECONDARY)):
        if not {a, b} <= have:
            continue  # has not run
        if (a, b) not in pairs:
            pairs[a, b] = contrast(table, a, b)
        found = pairs[a, b][level]
        low, high, t_low, t_high = *found["ci"], *found["t_ci"]
        rows.append(
            {
                "kind": kind,
                "contrast": f"{b} - {a}",
                "level": level,
                "difference": found["f1_gold"],
                "low": low,
                "high": high,
                "t_low": t_low,
                "t_high": t_high,
                "p": found["p"],
                "seeds": found["seeds"],
                "per_seed": found["per_seed"],
            }
        )
    out = pd.DataFrame(rows)
    adjusted = holm({i: p for i, p in out["p"].items() if out["kind"][i] == "secondary"})
    out.insert(out.columns.get_loc("p") + 1, "holm", pd.Series(adjusted, dtype=float))
    outside = (out["low"] > 0) | (out["high"] < 0)
    out["holds"] = outside & (out["holm"].isna() | (out["holm"] < 0.05))
    out["no_loss"] = (out["low"] > MARGIN).where(out["level"] != "full")
    return out


def holm(p: dict[Any, float]) -> dict[Any, float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979): the smallest times m, the next times m - 1, ..."""
    adjusted, highest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[key]))
        adjusted[key] = highest
    return adjusted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.study", description=__doc__)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--arms", nargs="+", default=[name for name, arm in ARMS.items() if arm.core]
    )
    args = parser.parse_args()
    os.environ["ICD_PROFILE"] = "tiny"  # whatever the hardware: its figures are a CPU's
    try:
        course.setup()
        if args.what == "run":
            run(args.seeds, args.arms)
        table = read()
        print(
            scores(table)
            .groupby("arm", sort=False)[[*metrics.LEVELS, "usable"]]
            .agg(["mean", "std"])
            .round(3)
            .to_string()
        )
        print("\n" + verdicts(table).round(4).to_string(index=False))
        return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
