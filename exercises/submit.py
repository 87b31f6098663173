"""`make submit`: trains a team's GRPO, judges it on a held-out hospital, and puts a row into
leaderboard.csv of the run folder. `make leaderboard` makes the table anew from settings files.

    python -m exercises.submit my.yaml                   one settings file
    python -m exercises.submit --from-run strict         the settings of a run of notebook 4
    python -m exercises.submit --board a.yaml folder/    the table anew, from all these files

What is equal for everybody: base, SFT adapter, labelled notes, completions, seed (submission.py).
What is trained and answered is kept under its settings, so the same file is loaded the second time,
and an interrupted training goes on. FRESH=submit makes it anew. The row of a file is the same
whenever it is made on the same machine, but for the minutes.

Environment: ICD_SUBMIT_SEED, the seed of the held-out hospital. With the one that stands here a
team can look as often as it likes; a teacher takes another. Research and teaching only.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exercises import submission
from exercises.submission import BASELINE_TEAM, KEY, SEED, SFT_TEAM, Plan, Refused
from helpers import course
from helpers.machinery import artefacts, places, store, switches
from helpers.profiles import Profile

if TYPE_CHECKING:
    import pandas as pd

PUBLIC_SEED = 77  # of the held-out hospital; nothing else in the course uses it
ADMISSIONS = 2225  # about 2,000 cases after the funnel
TAKEN = {0: "the course's own hospital", 50: "the test hospital of notebook 7"}
CORPUS = range(1000, 100_000)  # hospitals that the shipped base has read
THREADS = "2"
MEASURES = {"category": "category", "full": "full", "chapter": "chapter"}  # column -> level
COLUMNS = [
    "team",
    "category",
    "category_low",
    "category_high",
    "difference",
    "difference_low",
    "difference_high",
    "full",
    "full_difference",
    "full_difference_low",
    "full_difference_high",
    "chapter",
    "full_macro_f1",
    "usable",
    "labels",
    "completions",
    "minutes",
    "cases",
    "hospital",
    "key",
]
SHARES = ("category", "full", "chapter", "full_macro_f1", "usable")
ANEW = "make leaderboard SETTINGS=... makes the table anew from the settings files."


class Damaged(ValueError):
    """A leaderboard that is not as it was written, or of another hospital or baseline."""


# ------------------------------------------------------------------------------- what is made


@dataclass(frozen=True)
class Adapters:
    """Folders of the course's own cases, SFT and GRPO in this run."""

    cases: Path
    sft: Path
    grpo: Path


@dataclass(frozen=True)
class Capstone:
    """The held-out hospital, and what is trained and answered for it. admissions: its size."""

    profile: Profile
    seed: int
    admissions: int = ADMISSIONS

    @functools.cached_property
    def adapters(self) -> Adapters:
        """The course's own, made first if missing. Raises Refused where the run's are others."""
        found = Adapters(*(course.need(name) for name in ("cases", "sft", "grpo")))
        expected = {
            "sft": submission.sft_settings(self.profile),
            "grpo": submission.baseline(self.profile),
        }
        for name, settings in expected.items():
            recorded = store.inputs_of(getattr(found, name))["settings"]
            submission.check_course(name, recorded, settings)
        manifest = places.read(places.data_dir() / "truth" / "manifest.json")
        wanted = {"admissions": self.profile.admissions, "seed": SEED}
        if any(manifest.get(name) != value for name, value in wanted.items()):
            problem = (
                f"{places.show(places.data_dir())} is not the hospital of {wanted['admissions']:,} "
                "admissions that everybody has, so the labels are not equal. Unset ICD_DATA_DIR"
            )
            raise Refused("the data", [problem])
        return found

    @functools.cached_property
    def cases(self) -> pd.DataFrame:
        """All cases of the held-out hospital."""
        from helpers import mimic
        from helpers.study import run

        return mimic.build_cases(run.hospital_of(self.admissions, self.seed), seed=0)

    @functools.cached_property
    def hospital(self) -> str:
        """A short mark of the held-out notes. It does not tell the seed."""
        return store.digest(self.cases["note"].tolist())[:8]

    def adapter(self, plan: Plan, rewards: list[Any]) -> Path:
        """Folder of a submission's adapter, trained if it is not there."""
        inputs = {
            artefacts.VERSION: artefacts.__version__,
            "submission": plan.record(),
            "profile": self.profile.record("sft"),
            "needs": {
                "cases": store.key(self.adapters.cases),
                "sft": store.key(self.adapters.sft),
            },
        }
        job = store.artefact(
            folder() / plan.key / "grpo",
            inputs,
            label=f"GRPO of {plan.team}",
            fresh=artefacts.is_fresh("submit"),
        )
        if job.why:
            train(plan, rewards, self, job)
            job.finish()
        return job.path

    def answers(self, name: str, adapter: Path, label: str) -> Path:
        """Folder of a model's answers to the held-out cases: answers.parquet (hadm_id, predicted)
        and minutes.json."""
        from helpers import casebook, inference, models

        four_bit = self.profile.four_bit["grpo"]
        inputs = {
            "adapter": weights_of(adapter),
            "hospital": [self.seed, self.admissions, casebook.casebook().sha256],
            "profile": self.profile.record("answers"),
            "four_bit": four_bit,
        }
        job = store.artefact(
            folder() / name / f"answers-{self.seed}",
            inputs,
            label=f"answers of {label}",
            fresh=artefacts.is_fresh("submit"),
        )
        if job.why:
            started = time.time()
            model, tokenizer = models.load(self.profile, adapter, four_bit=four_bit)
            table = inference.predict(
                model, tokenizer, self.cases, self.profile, keep=job.work, label=label
            )
            table[["hadm_id", "predicted"]].to_parquet(job.part / "answers.parquet")
            minutes = (time.time() - started) / 60
            places.write(job.part / "minutes.json", {"minutes": minutes})
            job.finish()
        return job.path


def weights_of(adapter: Path) -> dict[str, str]:
    """File name -> sha256 of an adapter's weights: trained anew elsewhere from the same settings,
    they may differ."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(adapter.glob("*.safetensors"))
    }


def folder() -> Path:
    """Where submissions are kept."""
    return places.run_dir() / "submissions"


def board_path() -> Path:
    return places.run_dir() / "leaderboard.csv"


def train(plan: Plan, rewards: list[Any], capstone: Capstone, job: store.Artefact) -> None:
    """GRPO from the course's SFT, as in notebook 4. Adapter, log and minutes go to `job.part`."""
    import pandas as pd
    from trl import GRPOConfig, GRPOTrainer

    from helpers import models, traces, training
    from helpers.machinery import memory

    profile = capstone.profile
    memory.check(profile.replace(grpo=plan.arguments), "grpo")
    cases = pd.read_parquet(capstone.adapters.cases / "cases.parquet")
    labelled = cases[cases["split"] == "train"]
    if plan.notes:
        labelled = labelled.sample(min(plan.notes, len(labelled)), random_state=SEED)
    model, tokenizer = models.load(
        profile, capstone.adapters.sft, four_bit=profile.four_bit["grpo"], trainable=True
    )
    arguments = GRPOConfig(
        output_dir=str(job.work),
        **training.defaults(model.dtype, **plan.arguments),
        reward_weights=plan.weights,
        logging_steps=1,
        log_completions=False,  # completions quote notes
        seed=SEED,
    )
    clock = Clock(job.work / "minutes.json")
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        reward_funcs=rewards,
        train_dataset=traces.grpo_dataset(labelled, tokenizer, profile.max_note_tokens),
        processing_class=tokenizer,
        callbacks=[training.Steps(f"GRPO of {plan.team}"), clock],
    )
    warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
    training.run(trainer, job.work, "grpo")
    training.save(trainer, job.part)
    places.write(job.part / "minutes.json", {"minutes": clock.minutes()})


def Clock(path: Path) -> Any:
    """A callback that counts the minutes of a training, those before its last checkpoint
    included."""
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        started = time.time()
        before = places.read(path).get("minutes", 0.0)

        def minutes(self) -> float:
            return self.before + (time.time() - self.started) / 60

        def on_save(self, args, state, control, **kwargs):
            places.write(path, {"minutes": self.minutes()})

    return Counting()


# ------------------------------------------------------------------------------- rows


def row(
    team: str,
    key: str,
    spent: submission.Spending,
    minutes: float | None,
    capstone: Capstone,
    predicted: pd.Series,
    reference: pd.Series,
) -> dict[str, str]:
    """One row of the table, as text. predicted, reference: answers of the model and of the course's
    own GRPO, in the order of the cases.

    Accuracies with 95 % intervals over patients; differences are paired. minutes: None where
    nobody counted them.
    """
    from helpers import metrics

    cases = capstone.cases
    gold, patients = cases["code"], cases["subject_id"]
    report = metrics.report(gold, predicted, patients=patients)
    change = metrics.compare(gold, reference, predicted, patients=patients)
    shares = {
        "full_macro_f1": report["full"]["f1_gold"],
        "usable": report["usable"],
        "difference": change["category"]["accuracy"],
        "full_difference": change["full"]["accuracy"],
    }
    for column, level in MEASURES.items():
        shares[column] = report[level]["accuracy"]
    for column, interval in (
        ("category", report["category"]["accuracy_ci"]),
        ("difference", change["category"]["accuracy_ci"]),
        ("full_difference", change["full"]["accuracy_ci"]),
    ):
        shares[f"{column}_low"], shares[f"{column}_high"] = interval
    numbers = {name: f"{value + 0.0:.4f}" for name, value in shares.items()}
    others = {
        "team": team,
        "labels": str(spent.labels),
        "completions": str(spent.completions),
        "minutes": "" if minutes is None else f"{minutes:.1f}",
        "cases": str(len(cases)),
        "hospital": capstone.hospital,
        "key": key,
    }
    return {name: (numbers | others)[name] for name in COLUMNS}


def predicted_of(answers: Path, capstone: Capstone) -> pd.Series:
    """The codes of an answers folder in the order of the cases."""
    import pandas as pd

    table = pd.read_parquet(answers / "answers.parquet").set_index("hadm_id")["predicted"]
    return table.loc[capstone.cases["hadm_id"]].reset_index(drop=True)


def course_rows(capstone: Capstone) -> tuple[list[dict[str, str]], pd.Series]:
    """The rows of SFT and of the baseline, and the baseline's answers."""
    adapters = capstone.adapters
    grpo = predicted_of(capstone.answers("grpo", adapters.grpo, BASELINE_TEAM), capstone)
    sft = predicted_of(capstone.answers("sft", adapters.sft, SFT_TEAM), capstone)
    nothing = submission.Spending(0, 0)
    full = submission.budget(capstone.profile)
    rows = []
    for team, adapter, spent, codes in (
        (SFT_TEAM, adapters.sft, nothing, sft),
        (BASELINE_TEAM, adapters.grpo, full, grpo),
    ):
        key = (store.key(adapter) or "")[:KEY]
        rows.append(row(team, key, spent, None, capstone, codes, grpo))
    return rows, grpo


def team_row(
    plan: Plan, rewards: list[Any], capstone: Capstone, reference: pd.Series
) -> dict[str, str]:
    """The row of a submission, trained and answered where it is not there yet."""
    adapter = capstone.adapter(plan, rewards)
    answers = capstone.answers(plan.key, adapter, plan.team)
    minutes = sum(places.read(path / "minutes.json")["minutes"] for path in (adapter, answers))
    codes = predicted_of(answers, capstone)
    return row(plan.team, plan.key, plan.spent, minutes, capstone, codes, reference)


# ------------------------------------------------------------------------------- the table


def read_board(path: Path) -> list[dict[str, str]]:
    """The rows of a leaderboard; none where it is not there. Raises Damaged where it is not as it
    was written."""
    import pandas as pd

    if not path.exists():
        return []
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if list(table.columns) != COLUMNS:
            raise ValueError(f"its columns are {', '.join(map(str, table.columns))[:200]}")
        numbers = table.drop(columns=["team", "hospital", "key", "minutes"]).astype(float)
        outside = [name for name in SHARES if not numbers[name].between(0, 1).all()]
        if outside:
            raise ValueError(f"{', '.join(outside)} must be from 0 to 1")
        if numbers.isna().any(axis=None) or table.duplicated(["team", "key"]).any():
            raise ValueError("a number is missing, or a row is there twice")
        teams = set(table["team"])
        if not {SFT_TEAM, BASELINE_TEAM} <= teams:
            raise ValueError(f"the rows of {SFT_TEAM} and of {BASELINE_TEAM} are not both there")
    except (ValueError, OSError) as error:
        raise Damaged(
            f"{places.show(path)} is damaged: {error}. Nothing trained is lost. {ANEW}"
        ) from error
    return table.to_dict("records")


def with_rows(
    board: Sequence[dict[str, str]], fresh: Sequence[dict[str, str]], path: Path
) -> list[dict[str, str]]:
    """The table with these rows in place of those with the same team and key. Raises Damaged where
    it is of another hospital or baseline than the course's rows among `fresh`."""
    before = {(each["team"], each["key"]): each for each in board}
    for each in fresh:
        old = next((other for other in board if other["team"] == each["team"]), each)
        is_course = each["team"] in (SFT_TEAM, BASELINE_TEAM)
        if is_course and old != each:
            changed = [name for name in COLUMNS if old[name] != each[name]]
            raise Damaged(
                f"{places.show(path)} is of another hospital or another baseline "
                f"({each['team']} has another {', '.join(changed)}), and would compare what cannot "
                f"be compared. {ANEW}"
            )
    before |= {(each["team"], each["key"]): each for each in fresh}
    return sorted(
        before.values(), key=lambda each: (-float(each["category"]), each["team"], each["key"])
    )


def write_board(path: Path, rows: list[dict[str, str]]) -> None:
    import pandas as pd

    places.write(path, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))


def shown(rows: Sequence[dict[str, str]]) -> str:
    """The table for the reader's eyes."""
    import pandas as pd

    def interval(each: dict[str, str], name: str, style: str) -> str:
        numbers = [float(each[name + end]) for end in ("", "_low", "_high")]
        value, low, high = (format(number, style) for number in numbers)
        return f"{value} [{low}, {high}]"

    lines = []
    for each in rows:
        lines.append(
            {
                "team": each["team"],
                "category": interval(each, "category", ".3f"),
                "minus baseline": interval(each, "difference", "+.3f"),
                "full": f"{float(each['full']):.3f}",
                "full minus baseline": interval(each, "full_difference", "+.3f"),
                "chapter": f"{float(each['chapter']):.3f}",
                "macro-F1": f"{float(each['full_macro_f1']):.3f}",
                "usable": f"{float(each['usable']):.3f}",
                "labels": each["labels"],
                "completions": each["completions"],
                "minutes": each["minutes"],
                "settings": each["key"],
            }
        )
    return pd.DataFrame(lines).to_string(index=False, justify="left")


# ------------------------------------------------------------------------------- commands


def submit(given: submission.Submission, capstone: Capstone, run_code: bool) -> None:
    """Train, judge, and put the row into the table of this run."""
    plan = submission.plan(given, capstone.profile)
    rewards = submission.functions(plan, run_code)
    places.say(submission.described(plan, capstone.profile))
    path = board_path()
    read_board(path)  # a damaged one is said before hours of work
    rows, reference = course_rows(capstone)
    with_rows(read_board(path), rows, path)
    rows.append(team_row(plan, rewards, capstone, reference))
    with store.lock(path):
        table = with_rows(read_board(path), rows, path)
        write_board(path, table)
    finish(table, path, capstone)


def board(paths: Sequence[Path], capstone: Capstone, run_code: bool) -> list[Refused]:
    """Make the table anew from settings files; returns those that were refused. The table that was
    there is kept beside it as leaderboard-before.csv."""
    plans, refused = [], []
    for path in paths:
        try:
            plan = submission.plan(submission.read(path), capstone.profile)
            plans.append((plan, submission.functions(plan, run_code)))
        except Refused as error:
            refused.append(error)
    rows, reference = course_rows(capstone)
    made: dict[str, dict[str, str]] = {}
    for plan, rewards in plans:
        places.say(submission.described(plan, capstone.profile))
        try:
            if plan.key not in made:  # of two teams with the same settings
                made[plan.key] = team_row(plan, rewards, capstone, reference)
            rows.append(made[plan.key] | {"team": plan.team})
        except Refused as error:  # its own reward stopped in the middle
            refused.append(error)
    path = board_path()
    with store.lock(path):
        if path.exists():
            places.write(path.with_name("leaderboard-before.csv"), path.read_bytes())
        table = with_rows([], rows, path)
        write_board(path, table)
    finish(table, path, capstone)
    return refused


def finish(table: list[dict[str, str]], path: Path, capstone: Capstone) -> None:
    places.say(f"\n{shown(table)}")
    places.say(
        f"\n{len(capstone.cases):,} held-out cases of {capstone.cases['subject_id'].nunique():,} "
        "patients. Accuracies; 95 % intervals over patients, for one seed of training: they say "
        "nothing about the luck of another seed."
    )
    places.say(f"Table: {places.show(path)}. {places.NOTICE}")


def from_run(name: str, team: str, profile: Profile) -> submission.Submission:
    """The settings of a run of notebook 4, written as a settings file into the run folder. Raises
    Refused where there is no such run, or another file of that name."""
    if name == artefacts.BASELINE:
        raise Refused(name, ["it is the course's own run, and a row of the table already"])
    adapter = artefacts.path(f"grpo@{name}")
    if not store.is_whole(adapter):
        known = [
            each
            for each in artefacts.experiments()
            if store.is_whole(artefacts.path(f"grpo@{each}"))
        ]
        problem = (
            f"there is no finished run of notebook 4 of that name. There are: "
            f"{', '.join(known) or 'none'}"
        )
        raise Refused(name, [problem])
    problem = submission.team_problem(team)
    if problem:
        raise Refused(name, [f'{problem}. Give another one, as in TEAM="Ada and Grace"'])
    recorded = store.inputs_of(adapter)["settings"]
    given = submission.of_run(f"{name}.yaml", team, recorded, profile)
    path = folder() / given.name
    text = f"# From the run {name!r} of notebook 4.\n{given.text()}"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        where = places.show(path)
        problem = f"{where} is there and differs. Submit it (SETTINGS={where}), or remove it"
        raise Refused(name, [problem])
    submission.plan(given, profile)
    places.write(path, text)
    passed = [*profile.grpo, *submission.baseline(profile)]
    unsure = [each for each in given.changes if each not in passed]
    if unsure:
        places.say(
            f"{', '.join(unsure)}: notebook 4 hands this to the trainer only if you changed its "
            "cells. Here it counts."
        )
    places.say(f"The settings of {name!r}: {places.show(path)}. This file is what you hand in.")
    return submission.read(path)


def held_out_seed() -> int:
    """The seed of the held-out hospital: ICD_SUBMIT_SEED, or the public one. Raises ValueError for
    one that the course uses."""
    text = os.environ.get("ICD_SUBMIT_SEED", "").strip()
    if not text:
        return PUBLIC_SEED
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(
            "ICD_SUBMIT_SEED must be a whole number of at most 18 digits, such as 20270115."
        )
    seed = int(text)
    if seed in TAKEN or seed in CORPUS:
        what = TAKEN.get(seed, "a hospital that the base has read")
        raise ValueError(
            f"ICD_SUBMIT_SEED={seed} is {what}. Take another number, of six digits or more."
        )
    return seed


def files_of(names: Sequence[str]) -> list[Path]:
    """Settings files, of a folder all *.yaml and *.yml. Raises ValueError where there is none."""
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            paths += sorted(each for each in path.iterdir() if each.suffix in (".yaml", ".yml"))
        else:
            paths.append(path)
    if not paths:
        raise ValueError(f"{', '.join(names)}: there is no settings file (*.yaml).")
    return list(dict.fromkeys(paths))


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(description="The capstone: submit, or make the table anew.")
    add = commands.add_argument
    add("settings", nargs="*", help="a settings file; with --board files and folders")
    add("--from-run", metavar="NAME", help="the settings of a run of notebook 4")
    add("--team", help="with --from-run: the name in the table (else the run's)")
    add("--board", action="store_true", help="make the table anew from all these files")
    add("--run-code", action="store_true", help="run reward functions of teams on this machine")
    return commands


def main(arguments: Sequence[str] | None = None, capstone: Capstone | None = None) -> int:
    """The command line; 1 with a sentence where something is refused."""
    commands = parser()
    chosen = commands.parse_args(arguments)
    if chosen.board and (chosen.from_run or not chosen.settings):
        commands.error("--board takes settings files or folders")
    if not chosen.board and len(chosen.settings) + bool(chosen.from_run) != 1:
        commands.error("give one settings file, or --from-run NAME")
    os.environ.setdefault("OMP_NUM_THREADS", THREADS)  # another number rounds in another order
    try:
        seed = held_out_seed()
        paths = files_of(chosen.settings) if chosen.settings else []
        if not places.is_synthetic():
            problem = "it is judged on synthetic patients, and needs a run on them"
            raise Refused("the capstone", [f"{problem}. Unset ICD_DATA_DIR"])
        profile, _ = switches.setup()
        capstone = capstone or Capstone(profile, seed)
        if chosen.board:
            refused = board(paths, capstone, chosen.run_code)
            for error in refused:
                print(f"\n{error}", file=sys.stderr)
            return int(bool(refused))
        if chosen.from_run:
            given = from_run(chosen.from_run, chosen.team or chosen.from_run, capstone.profile)
        else:
            given = submission.read(paths[0])
        submit(given, capstone, chosen.run_code)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
