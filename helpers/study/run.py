"""Trains and answers arms × seeds, each once: `python -m helpers.study run` (`make study`).

What is finished is kept as a column of results/study/predictions.csv and a training log beside it;
what was interrupted goes on from its last checkpoint. Started twice, two processes share the work
(OMP_NUM_THREADS=1 for each: on 2 cores that is faster than one process on both). Taught in notebook
7.
"""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import (
    casebook,
    hospital,
    icd,
    inference,
    mimic,
    models,
    profiles,
    prompts,
    rewards,
    traces,
    training,
)
from helpers.machinery import places, store
from helpers.profiles import Profile
from helpers.study import ARMS, RESULTS, Arm, analyse

TEST_SEED = 50
TEST_ADMISSIONS = 4450  # at least 4,000 cases after the funnel
WATCHED = 256  # validation notes whose reward is looked at during GRPO
WATCH_EVERY = 25  # steps
BATCH = 128  # cases answered at once: another number pads them otherwise, which changes low bits
OPTIMISER = "adamw_torch_fused"  # of all committed runs, whatever the profile says
CODE_ALONE = "The code alone."  # reasoning of the arm that is taught codes without reasons
FIELDS = (  # of the profile, beside the arguments of the trainer
    "admissions",
    "traces_share",
    "max_note_tokens",
    "max_prompt_tokens",
    "max_new_tokens",
    "lora",
    "four_bit",
)


def folder() -> Path:
    """Where the study's hospitals, adapters and answers live: `study` beside the runs."""
    return places.run_dir().parent / "study"


def hospital_of(admissions: int = TEST_ADMISSIONS, seed: int = TEST_SEED) -> Path:
    """Data folder of a synthetic hospital, of the study's own by default; written if missing."""
    inputs = {"casebook": casebook.casebook().sha256}
    artefact = store.artefact(folder() / f"hospital-{seed}-{admissions}", inputs)
    if artefact.why:
        hospital.write(artefact.part, admissions=admissions, seed=seed)
        artefact.finish()
    return artefact.path


def test_cases(admissions: int = TEST_ADMISSIONS) -> pd.DataFrame:
    """All cases of the study's hospital, which shares nothing with the course's but the
    casebook."""
    return mimic.build_cases(hospital_of(admissions), seed=0)


def cases_of(split: str, seed: int, profile: Profile) -> pd.DataFrame:
    """The course's cases of "train", "val" or "test" under this seed's split of the patients."""
    cases = mimic.build_cases(hospital_of(profile.admissions, 0), seed=seed)
    return cases[cases["split"] == split].reset_index(drop=True)


def arguments(name: str, profile: Profile) -> dict[str, Any]:
    """What the config of an arm's trainer is called with, in TRL's names."""
    arm = ARMS[name]
    if arm.rewards:
        stage = profile.grpo | {"logging_steps": 1, "reward_weights": arm.weights}
    else:
        length = profile.max_prompt_tokens + profile.max_new_tokens
        stage = profile.sft | {"logging_steps": 5, "max_length": length}
        stage["train_sampling_strategy"] = "group_by_length"
    steps = round(stage["max_steps"] * arm.longer)
    return stage | {"max_steps": steps, "optim": OPTIMISER} | arm.changes


def settings(name: str, profile: Profile) -> dict[str, Any]:
    """All that an arm's adapter depends on beside the seed; so too for the arm it starts from."""
    record = asdict(ARMS[name])
    del record["about"], record["core"], record["changes"]  # the last are in `arguments`
    if record["start"]:
        record["start"] = settings(record["start"], profile)
    record["arguments"] = arguments(name, profile)
    record["base"] = profiles.fingerprint(profile.base)
    record["casebook"] = casebook.casebook().sha256
    return record | {field: getattr(profile, field) for field in FIELDS}


def train(
    name: str,
    seed: int,
    artefact: store.Artefact,
    start: Path | None,
    profile: Profile,
    *,
    watched: int = WATCHED,
    watch_every: int = WATCH_EVERY,
) -> None:
    """Train one arm: adapter, tokenizer and training_log.csv go to `artefact.part`.

    Checkpoints go to `artefact.work`. start: folder of the adapter that it goes on from. The
    trainers are configured as in notebooks 3 and 4.
    """
    from peft import LoraConfig
    from transformers.trainer_utils import set_seed
    from trl import GRPOConfig, GRPOTrainer, SFTConfig

    set_seed(seed)  # LoRA draws its first weights before a trainer sets the seed
    arm = ARMS[name]
    stage = "grpo" if arm.rewards else "sft"
    cases = cases_of("train", seed, profile)
    lora = LoraConfig(**profile.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    config = training.defaults(models.dtype_for_device(), **arguments(name, profile))
    config |= {"output_dir": str(artefact.work), "seed": seed}
    callbacks = [training.Steps(name)]
    if arm.rewards:
        model, tokenizer = models.load(
            profile, start, four_bit=profile.four_bit[stage], trainable=True
        )
        validation = cases_of("val", seed, profile).head(watched)

        def held_out_reward() -> float:
            answers = inference.predict(model, tokenizer, validation, profile, batch_size=BATCH)
            total = rewards.total(
                answers["completion"].tolist(),
                validation["code"].tolist(),
                note=validation["note"].tolist(),
            )
            return float(np.mean(total))

        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(**config),
            reward_funcs=[rewards.named(reward) for reward in arm.rewards],
            processing_class=tokenizer,
            train_dataset=traces.grpo_dataset(cases, tokenizer, profile.max_note_tokens),
            peft_config=None if start else lora,
            callbacks=[*callbacks, training.HeldOut(watch_every, held_out_reward)],
        )
    else:
        trainer = _supervised(
            name, seed, start, profile, cases, lora, SFTConfig(**config), callbacks
        )
    training.run(trainer, artefact.work, stage)
    training.save(trainer, artefact.part)


def _supervised(
    name: str,
    seed: int,
    start: Path | None,
    profile: Profile,
    cases: pd.DataFrame,
    lora: Any,
    config: Any,
    callbacks: list[Any],
) -> Any:
    """The SFTTrainer of an arm: of a new adapter, or of the start's on GRPO's labels."""
    from trl import SFTTrainer

    taught = ARMS[name].taught
    goes_on = taught in ("samples", "labels")
    # Before the base is loaded: sampling moves the numbers that LoRA's weights are drawn from.
    table = _traces(ARMS[name], cases, seed, start, profile)
    model, tokenizer = models.load(
        profile,
        start if goes_on else None,
        four_bit=profile.four_bit["grpo" if goes_on else "sft"],
        trainable=goes_on,
    )
    lessons = traces.sft_dataset(cases, table, tokenizer, profile.max_note_tokens)
    if taught == "labels":
        lessons = lessons.map(_code_alone, fn_kwargs={"tokenizer": tokenizer})
    return SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=lessons,
        peft_config=None if goes_on else lora,
        callbacks=callbacks,
    )


def _traces(
    arm: Arm, cases: pd.DataFrame, seed: int, start: Path | None, profile: Profile
) -> pd.DataFrame:
    """What SFT is taught (`Arm.taught`).

    Own: of two answers to each case without a trace, about GRPO's number of completions, the first
    that is right and well-formed.
    """
    sampling = {"temperature": 1.0, "batch_size": 64, "seed": seed}
    if arm.taught == "codes":
        rows = [(case.hadm_id, CODE_ALONE, case.code, case.note) for case in cases.itertuples()]
        return traces.checked(rows)
    if arm.taught == "samples":
        spent = labels_of_grpo(cases, seed, profile)
        answers = answer(start, spent, profile, samples=profile.grpo["num_generations"], **sampling)
        return _right(answers, spent, "code").groupby("hadm_id").head(2)
    if arm.taught == "labels":
        spent = labels_of_grpo(cases, seed, profile)
        lessons = _right(answer(start, spent, profile), spent, "category")
        return lessons.drop(columns="code").merge(spent[["hadm_id", "code"]], on="hadm_id")
    half = cases.sample(frac=profile.traces_share, random_state=seed)
    table = traces.from_template(half, habit=arm.habit)
    if arm.taught == "own":
        others = cases[~cases["hadm_id"].isin(half["hadm_id"])]
        answers = answer(start, others, profile, samples=2, **sampling)
        own = _right(answers, others, "code").drop_duplicates("hadm_id")
        table = pd.concat([table, own], ignore_index=True)
    return table


def labels_of_grpo(cases: pd.DataFrame, seed: int, profile: Profile) -> pd.DataFrame:
    """The cases that GRPO sees with this seed, as trl's RepeatSampler draws them."""
    import torch

    grpo = profile.grpo
    batch = grpo["per_device_train_batch_size"] * grpo["gradient_accumulation_steps"]
    count = grpo["max_steps"] * batch // grpo["num_generations"]
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed))
    return cases.iloc[order[:count].tolist()]


def _right(answers: pd.DataFrame, cases: pd.DataFrame, level: str) -> pd.DataFrame:
    """The well-formed answers that are right at this level, each text once, as a table of
    traces."""
    cut = icd.category if level == "category" else str
    gold = answers["hadm_id"].map(cases.set_index("hadm_id")["code"])
    is_well_formed = answers["completion"].map(lambda text: prompts.parse(text).is_well_formed)
    is_right = answers["predicted"].map(cut, na_action="ignore") == gold.map(cut)
    right = answers[is_right & is_well_formed].drop_duplicates(["hadm_id", "completion"])
    right = right.assign(code=right["predicted"], kept=True, why=None)
    return right[list(traces.COLUMNS)]


def _code_alone(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """The lesson as text whose completion is the answer alone, without the reasoning."""
    text = prompts.chat(tokenizer, [*row["prompt"], *row["completion"]])
    prompt, tag, code = text.rpartition("<diagnosis>")
    return {"prompt": prompt, "completion": tag + code}


def answer(
    adapter_folder: Path | None, cases: pd.DataFrame, profile: Profile, **options: Any
) -> pd.DataFrame:
    """Answers to cases (`inference.predict`) of an adapter on the base as GRPO has it."""
    model, tokenizer = models.load(profile, adapter_folder, four_bit=profile.four_bit["grpo"])
    return inference.predict(model, tokenizer, cases, profile, **{"batch_size": BATCH} | options)


def adapter(name: str, seed: int, profile: Profile) -> Path:
    """Folder of an arm's adapter, trained if missing, after the one that it starts from."""
    path = folder() / f"seed-{seed}" / name
    artefact = store.artefact(path, settings(name, profile), label=f"{name}, seed {seed}")
    if artefact.why:
        start = ARMS[name].start
        train(name, seed, artefact, adapter(start, seed, profile) if start else None, profile)
        artefact.finish()
    return artefact.path


def run(seeds: list[int], arms: list[str], results: Path = RESULTS) -> None:
    """Every arm of every seed that has no column in predictions.csv yet.

    What another process is at is left to it. Raises ValueError where predictions.csv holds answers
    to other cases, or of an arm whose settings have changed since.
    """
    profile = profiles.get("tiny")
    cases = test_cases()
    for name, seed in itertools.product(arms, seeds):
        if f"{name}/{seed}" in _answered(results, cases, profile):
            continue
        inputs = settings(name, profile) | {"cases": store.digest(cases["hadm_id"].tolist())}
        path = folder() / f"seed-{seed}" / f"answers-{name}"
        label = f"answers of {name}, seed {seed}"
        artefact = store.artefact(path, inputs, label=label, wait=False)
        if artefact is None:
            places.say(f"{label}: another process is at it")
            continue
        if artefact.why:
            _train_and_answer(name, seed, artefact, cases, profile)
        _publish(artefact.path, results, cases, profile)


def _answered(results: Path, cases: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """predictions.csv, or its first columns where it is not there. Raises ValueError as `run`
    does."""
    table = cases[["subject_id", "hadm_id", "code"]].astype(str)
    path = results / "predictions.csv"
    if not path.exists():
        return table
    answered = analyse.read(results)
    if not answered[list(table)].equals(table):
        raise ValueError(
            f"{path} answers other cases than those of the test hospital: move it away to start "
            "anew."
        )
    recorded = places.read(results / "design.json").get("settings", {})
    arms = ARMS.keys() & recorded.keys() & {column.split("/")[0] for column in answered}
    changed = [name for name in sorted(arms) if recorded[name] != settings(name, profile)]
    if changed:
        raise ValueError(
            f"{path} has answers of {', '.join(changed)}, made with other settings than those of "
            "now. Put the settings back (what you try goes into an arm of its own), or move "
            f"{results} away to start anew."
        )
    return answered


def _train_and_answer(
    name: str, seed: int, artefact: store.Artefact, cases: pd.DataFrame, profile: Profile
) -> None:
    """The answers of one run, its training log, and a row on the run itself."""
    import torch

    started = time.time()
    adapter_folder = adapter(name, seed, profile)
    trained = time.time()
    answers = answer(adapter_folder, cases, profile, keep=artefact.work)
    answers.to_parquet(artefact.part / "answers.parquet")
    log = shutil.copy(adapter_folder / "training_log.csv", artefact.part)
    row = {
        "arm": name,
        "seed": seed,
        "steps": pd.read_csv(log)["step"].max(),
        "threads": torch.get_num_threads(),
        "train_minutes": round((trained - started) / 60, 1),
        "answer_minutes": round((time.time() - trained) / 60, 1),
        "usable": round(answers["predicted"].notna().mean(), 4),
    }
    pd.DataFrame([row]).to_csv(artefact.part / "run.csv", index=False)
    artefact.finish()


def _publish(answers: Path, results: Path, cases: pd.DataFrame, profile: Profile) -> None:
    """Put a run's answers, log, row and settings beside those of the others."""
    rows = pd.read_csv(answers / "run.csv", dtype=str)
    name, seed = rows.loc[0, ["arm", "seed"]]
    with store.lock(results / "predictions.csv"):
        table = _answered(results, cases, profile)
        log = (answers / "training_log.csv").read_bytes()
        places.write(results / f"log-{name}-{seed}.csv", log)
        runs = results / "runs.csv"
        if runs.exists():
            rows = pd.concat([pd.read_csv(runs, dtype=str), rows])
        rows = rows.drop_duplicates(["arm", "seed"], keep="last")
        places.write(runs, rows.to_csv(index=False))
        design = {"settings": {}} | places.read(results / "design.json")
        design["settings"][name] = settings(name, profile)
        places.write(results / "design.json", design)
        predicted = pd.read_parquet(answers / "answers.parquet")["predicted"].fillna("NIL")
        table[f"{name}/{seed}"] = predicted.to_numpy()
        places.write(results / "predictions.csv", table.to_csv(index=False))  # last: it counts
