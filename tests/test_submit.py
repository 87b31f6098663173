"""The capstone: rules that keep the labels equal, a settings file that gives the same row whenever it is made, a table
that nothing half-written gets into, and code of a team that runs only when asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from exercises import submission, submit
from exercises.submission import Refused
from helpers import course, inference, models, profiles
from helpers.machinery import artefacts, places, store
from tests import small_course
from tests.test_makefile import checkout, environment
from tools import tiny_base

ROOT = Path(__file__).parent.parent
TINY = profiles.get("tiny")
BUDGET = submission.Spending(400, 3200)
REWARD = """
def vowels(completions, code, **columns):
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [sum(text.count(v) for v in "aeiou") / 20 for text in texts]
"""


def file(folder: Path, text: str, name: str = "my.yaml") -> Path:
    """A settings file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def planned(folder: Path, **changes: Any) -> submission.Plan:
    return submission.plan(submission.Submission("my.yaml", "Ada", changes, folder), TINY)


# ------------------------------------------------------------------------------- what is equal


def test_the_budget_is_what_the_course_spends() -> None:
    assert submission.budget(TINY) == BUDGET
    assert planned(Path()).spent == BUDGET


@pytest.mark.parametrize(
    ("changes", "labels", "completions"),
    [
        ({"max_steps": 10}, 80, 640),
        ({"num_generations": 16}, 200, 3200),
        ({"num_generations": 4, "max_steps": 25}, 400, 1600),
        ({"num_generations": 4, "notes": 400}, 400, 3200),
        ({"notes": 100}, 100, 3200),
        ({"num_iterations": 2, "max_steps": 100}, 400, 3200),
        ({"num_iterations": 2, "max_steps": 99}, 400, 3200),
        ({"per_device_train_batch_size": 16, "max_steps": 100}, 400, 3200),
        ({"gradient_accumulation_steps": 1, "max_steps": 100}, 400, 3200),
    ],
)
def test_what_a_training_spends(changes: dict, labels: int, completions: int) -> None:
    assert planned(Path(), **changes).spent == submission.Spending(labels, completions)


SIZES = st.fixed_dictionaries(
    {},
    optional={
        "max_steps": st.integers(1, 200),
        "num_generations": st.sampled_from([2, 4, 8, 16, 3]),
        "per_device_train_batch_size": st.sampled_from([8, 16, 24, 32, 64]),
        "gradient_accumulation_steps": st.integers(1, 4),
        "num_iterations": st.integers(1, 4),
        "notes": st.integers(1, 500),
        "learning_rate": st.floats(1e-6, 0.1),
    },
)


@examples(max_examples=40)
@given(SIZES)
def test_whatever_is_allowed_spends_no_more_than_the_course(changes: dict) -> None:
    try:
        plan = planned(Path(), **changes)
    except Refused as error:
        numbers = submission.spent(TINY.grpo | {k: v for k, v in changes.items() if k != "notes"})
        alone = changes.get("notes", numbers.labels)
        is_over = numbers.completions > 3200 or min(alone, numbers.labels) > 400
        size = submission.drawn(TINY.grpo | changes)
        group = changes.get("num_generations", 8)
        assert is_over or size % group or alone < size // group, error
        return
    assert plan.spent.labels <= 400 and plan.spent.completions <= 3200
    assert plan.arguments["save_steps"] % changes.get("num_iterations", 1) == 0
    TINY.replace(grpo=plan.arguments)  # and the profile adds up


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, 900),
        ({"notes": 40}, 40),
        ({"num_iterations": 3, "max_steps": 70}, 900),
        ({"num_generations": 4, "notes": 50, "gradient_accumulation_steps": 1}, 50),
    ],
)
def test_trl_draws_what_is_counted(changes: dict, notes: int) -> None:
    from trl.trainer.utils import RepeatSampler

    plan = planned(Path(), **changes)
    arguments = plan.arguments
    iterations = arguments.get("num_iterations", 1)
    accumulation = arguments["gradient_accumulation_steps"]
    sampler = RepeatSampler(
        range(notes),
        mini_repeat_count=arguments["num_generations"],
        batch_size=submission.drawn(arguments) // arguments["num_generations"],
        repeat_count=iterations * accumulation,
        seed=0,
    )
    seen: set[int] = set()
    completions, rows = 0, []
    for step in range(arguments["max_steps"] * accumulation):
        if not rows:
            rows = list(sampler)  # an epoch
        drawn, rows = rows[: submission.drawn(arguments)], rows[submission.drawn(arguments) :]
        if step % (accumulation * iterations) == 0:  # else the last generation is used again
            completions += len(drawn)
            seen |= set(drawn)
    assert submission.Spending(len(seen), completions) == plan.spent


def test_a_profile_that_trains_by_epochs_has_no_budget() -> None:
    with pytest.raises(Refused, match="trains by epochs"):
        submission.budget(profiles.get("paper"))


def test_what_may_be_changed_are_arguments_of_trl() -> None:
    from trl import GRPOConfig

    names = {each.name for each in fields(GRPOConfig)}
    assert set(submission.ALLOWED) - set(submission.OWN) <= names
    assert not set(submission.ALLOWED) & set(submission.REFUSED)
    fixed = set(submission.baseline(TINY)) - set(submission.ALLOWED)
    assert fixed <= set(submission.REFUSED), (
        "a setting of notebook 4 is neither allowed nor refused"
    )


# ------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 3", "seed: cannot be changed: everybody trains with the same seed"),
        ("start: strict", "start: cannot be changed: everybody starts from the SFT adapter"),
        ("base: tiny", "base: cannot be changed"),
        ("four_bit: false", "four_bit: cannot be changed"),
        ("r: 8", "r: cannot be changed: the LoRA adapter"),
        ("num_train_epochs: 3", "num_train_epochs: cannot be changed"),
        ("learning_rat: 0.1", "learning_rat: is no setting of the capstone. Do you mean learning_"),
        ("model_name: x", "model_name: is no setting of the capstone."),
        ("learning_rate: 1e-3", "YAML takes 1e-3 for text: write 1.0e-3"),
        ("learning_rate: fast", "'fast' is text, and must be a number"),
        ("learning_rate: 0", "learning_rate: 0 must be above 0"),
        ("learning_rate: .nan", "must be a number"),
        ("learning_rate: .inf", "must be a number"),
        ("learning_rate: true", "must be a number"),
        ("learning_rate: 2", "must be at most 0.1"),
        ("max_steps: 10.5", "must be a whole number"),
        ("max_steps: -1", "must be at least 1"),
        ("max_steps: 60", "draws 3,840 completions, the course draws 3,200; max_steps: 50"),
        ("num_generations: 4", "sees 800 labelled notes, the course sees 400; notes: 400 would"),
        ("num_generations: 6", "cannot be shared out in groups of 6"),
        ("num_generations: 1", "must be at least 2"),
        ("notes: 4", "are about 8 notes, but notes is 4"),
        ("max_completion_length: 200", "max_completion_length: must be at most 96"),
        ("loss_type: best", "must be one of grpo, dr_grpo"),
        ("scale_rewards: true", "must be one of group, batch, none"),
        ("mask_truncated_completions: yes please", "must be true or false"),
        ("rewards: exact_reward", "must be a list"),
        ("rewards: []", "must be a list"),
        ("rewards: [best_reward]", "no reward is called best_reward"),
        ("rewards: [format_reward, format_reward]", "format_reward stands there twice"),
        ("rewards: [{hierarchical_reward: {bonus: 1}}, format_reward]", "has no setting ['bonus']"),
        ("rewards: [{hierarchical_reward: {chapter_credit: a}}, format_reward]", "must be a num"),
        ("rewards: [exact_reward]", "reward_weights: 2 weights for 1 rewards"),
        ("reward_weights: [0, 0]", "not all of them 0"),
        ("reward_weights: [a, 1]", "must be a list of numbers"),
        ("rewards: [format_reward, mine.py:f]", "mine.py cannot be read"),
        ("rewards: [format_reward, ../mine.py:f]", "with the file beside the settings file"),
        ("rewards: [format_reward, /etc/mine.py:f]", "with the file beside the settings file"),
    ],
)
def test_what_the_rules_do_not_allow_is_said(tmp_path: Path, text: str, says: str) -> None:
    path = file(tmp_path, f"team: Ada\n{text}\n")
    with pytest.raises(Refused) as refusal:
        submission.plan(submission.read(path), TINY)
    assert says in str(refusal.value) and str(refusal.value).startswith("my.yaml is refused:")


def test_all_problems_are_named_at_once_with_the_list_of_what_is_allowed(tmp_path: Path) -> None:
    path = file(tmp_path, "team: Ada\nseed: 1\nbeta: -1\nspeed: 2\n")
    with pytest.raises(Refused) as refusal:
        submission.plan(submission.read(path), TINY)
    text = str(refusal.value)
    assert all(f"\n  - {name}: " in text for name in ("seed", "beta", "speed"))
    assert f"allowed are: {', '.join(submission.ALLOWED)}" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 0.1", "team: is missing"),
        ("team: 42", "put quotes around a number"),
        ("team: '=1+1'", "that begins with a letter or digit"),
        ("team: ''", "1 to 40 letters"),
        (f"team: {'a' * 41}", "1 to 40 letters"),
        ('team: "a\\nb"', "1 to 40 letters"),
        ("team: sft", "is a row of the course"),
        ("team: GRPO, the baseline", "is a row of the course"),
        ("team: Ada\nbeta: 0.1\nbeta: 0.2", "beta: stands there twice"),
        ("team: Ada\nrewards: [&a format_reward, *a]", "references"),
        ("- team", "it must hold lines such as"),
        ("", "it must hold lines such as"),
        ("team: Ada\n1: 2", "it must hold lines such as"),
        ("team: [", "it is no settings file"),
        ("team: !!python/object:os.system x", "it is no settings file"),
        ("#" * 30_000, "at most 20,000 are read"),
    ],
)
def test_a_file_that_is_no_submission_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Refused) as refusal:
        submission.read(file(tmp_path, text))
    assert says in str(refusal.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        submission.read(tmp_path / "none.yaml")


@examples(max_examples=40)
@given(st.binary(max_size=200))
def test_no_file_however_strange_raises_anything_else(raw: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.yaml"
        path.write_bytes(raw)
        try:
            given = submission.read(path)
        except Refused:
            return
        assert submission.TEAM.fullmatch(given.team)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=2)
    ),
    max_leaves=4,
)


@examples(max_examples=40)
@given(st.dictionaries(st.sampled_from([*submission.ALLOWED, "seed", "other"]), VALUES, max_size=4))
def test_no_value_however_strange_raises_anything_else(changes: dict) -> None:
    try:
        plan = planned(Path("nowhere"), **changes)
    except Refused as error:
        assert error.problems
    else:
        assert plan.spent.completions <= 3200 and json.dumps(plan.record())


# ------------------------------------------------------------------------------- the file and its key

GOOD = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-7, 0.1),
        "beta": st.floats(0, 10),
        "max_steps": st.integers(1, 50),
        "temperature": st.floats(0.1, 5),
        "scale_rewards": st.sampled_from(["group", "batch", "none"]),
        "mask_truncated_completions": st.booleans(),
        "rewards": st.sampled_from(
            [
                ["format_reward", "exact_reward"],
                ["format_reward", {"hierarchical_reward": {"chapter_credit": 0.0}}],
            ]
        ),
        "reward_weights": st.lists(st.floats(0.1, 2), min_size=2, max_size=2),
    },
)
TEAMS = st.from_regex(submission.TEAM, fullmatch=True).filter(
    lambda name: not submission.team_problem(name)
)


@examples(max_examples=40)
@given(TEAMS, GOOD)
def test_a_settings_file_comes_back_as_it_was_written(team: str, changes: dict) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        before = submission.Submission("my.yaml", team, changes, Path(folder).absolute())
        again = submission.read(file(Path(folder), before.text()))
        assert again == before
        assert submission.plan(again, TINY).key == submission.plan(before, TINY).key


def test_the_key_is_that_of_what_counts(tmp_path: Path) -> None:
    same = [
        "team: Ada\n",
        "team: Grace\n",
        "# nothing new\nteam: Ada\nlearning_rate: 3.0e-4\nbeta: 0\nreward_weights: [0.1, 1]\n",
    ]
    keys = {submission.plan(submission.read(file(tmp_path, text)), TINY).key for text in same}
    assert len(keys) == 1
    own = "team: Ada\nrewards: [format_reward, mine.py:vowels]\n"
    texts = ["team: Ada\nbeta: 0.1\n", "team: Ada\nnotes: 300\n", own]
    (tmp_path / "mine.py").write_text(REWARD)
    for text in texts:
        keys.add(submission.plan(submission.read(file(tmp_path, text)), TINY).key)
    (tmp_path / "mine.py").write_text(REWARD.replace("20", "30"))
    keys.add(submission.plan(submission.read(file(tmp_path, own)), TINY).key)
    assert len(keys) == 5, "other code under the same name is another submission"


# ------------------------------------------------------------------------------- code of a team


def own_reward(folder: Path, source: str, name: str = "f") -> submission.Plan:
    (folder / "mine.py").write_text(source, encoding="utf-8")
    return planned(folder, rewards=["format_reward", f"mine.py:{name}"])


def test_code_runs_only_when_asked(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    source = f"open({str(trace)!r}, 'w').close()\n{REWARD}"
    plan = own_reward(tmp_path, source, "vowels")
    with pytest.raises(Refused, match="RUN_CODE=1") as refusal:
        submission.functions(plan, run_code=False)
    assert "may do all that you may do" in str(refusal.value) and not trace.exists()
    first, own = submission.functions(plan, run_code=True)
    assert trace.exists() and first.__name__ == "format_reward" and own.__name__ == "vowels"
    assert own(completions=["aeiou", "xyz"], code=["I10", "I10"], note=["", ""]) == [0.25, 0.0]
    assert not [*tmp_path.glob("__pycache__")]


def test_what_runs_is_what_was_read(tmp_path: Path) -> None:
    plan = own_reward(tmp_path, REWARD, "vowels")
    (tmp_path / "mine.py").write_text("raise SystemExit")
    assert len(submission.functions(plan, run_code=True)) == 2


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def g(**x): pass", "mine.py defines no function f"),
        ("f = 3", "mine.py defines no function f"),
        ("def f(:", "it stops in line 1: SyntaxError"),
        ("import nowhere", "it stops in line 1: ModuleNotFoundError"),
        ("raise SystemExit(1)", "it stops in line 1: SystemExit"),
        ("def f(completions, **c):\n    return 1 / 0", "it stops in line 2: ZeroDivisionError"),
        ("def f(completions, code):\n    return [0]", "unexpected keyword argument"),
        ("def f(completions, **c):\n    return None", "TypeError"),
        ("def f(completions, **c):\n    return [0.0]", "1 numbers for 4 completions"),
        ("def f(completions, **c):\n    return [None] * len(completions)", "TypeError"),
        ("def f(completions, **c):\n    return [float('nan')] * 4", "not finite"),
    ],
)
def test_a_reward_that_will_not_do_is_said_before_any_training(
    tmp_path: Path, source: str, says: str
) -> None:
    with pytest.raises(Refused) as refusal:
        submission.functions(own_reward(tmp_path, source), run_code=True)
    assert says in str(refusal.value)


# ------------------------------------------------------------------------------- the seed


def test_the_held_out_hospital_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.study import run

    monkeypatch.delenv("ICD_SUBMIT_SEED", raising=False)
    assert submit.held_out_seed() == submit.PUBLIC_SEED
    assert {submission.SEED, run.TEST_SEED} == set(submit.TAKEN)
    assert tiny_base.HOSPITAL_SEED in submit.CORPUS
    documents = models.tiny_manifest()["documents"]
    assert tiny_base.HOSPITAL_SEED + documents // tiny_base.DOCUMENTS in submit.CORPUS
    assert submit.PUBLIC_SEED not in submit.CORPUS and submit.PUBLIC_SEED not in submit.TAKEN


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "the course's own hospital"),
        ("50", "the test hospital of notebook 7"),
        ("1003", "that the base has read"),
        ("-1", "whole number"),
        ("abc", "whole number"),
        ("1.5", "whole number"),
        ("9" * 30, "whole number"),
    ],
)
def test_a_seed_that_will_not_do_is_said(
    monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.setenv("ICD_SUBMIT_SEED", text)
    with pytest.raises(ValueError, match=says):
        submit.held_out_seed()
    monkeypatch.setenv("ICD_SUBMIT_SEED", "20270115")
    assert submit.held_out_seed() == 20270115


# ------------------------------------------------------------------------------- rows and the table

CODES = ["I214", "I2101", "I5021", "J189", "J441", "A419", "K2211", "N179", "S72001A", "E1165"]


class Trainings:
    """What stands in for training and answering, and what was asked of it. A model is a folder with
    a file `skill.safetensors`: the share of the cases that it answers rightly; the others get a sibling code."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.answered = 0
        self.kept: list[bool] = []  # whether a training found what an earlier one left
        self.stop = False

    def train(self, plan: Any, rewards: list, capstone: Any, job: store.Artefact) -> None:
        self.kept.append((job.work / "state").exists())
        places.write(job.work / "state", "half")
        if self.stop:
            raise KeyboardInterrupt
        self.trained.append(plan.team)
        skill = 0.5 + 100 * plan.arguments["learning_rate"]
        places.write(job.part / "skill.safetensors", str(skill))
        places.write(job.part / "minutes.json", {"minutes": 3.0})

    def load(self, profile: Any, adapter: Path, **options: Any) -> tuple[float, None]:
        return float((adapter / "skill.safetensors").read_text()), None

    def predict(self, skill: float, _: None, cases: pd.DataFrame, *given: Any, **options: Any):
        self.answered += 1
        draws = np.random.default_rng(7).random(len(cases))
        wrong = [f"{code[:3]}9" if i % 2 else None for i, code in enumerate(cases["code"])]
        predicted = np.where(draws < skill, cases["code"], wrong)
        return pd.DataFrame({"hadm_id": cases["hadm_id"], "predicted": predicted}).iloc[::-1]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    trainings = Trainings()
    monkeypatch.setattr(submit, "train", trainings.train)
    monkeypatch.setattr(models, "load", trainings.load)
    monkeypatch.setattr(inference, "predict", trainings.predict)
    return trainings


def invented(folder: Path, seed: int = 77, *, grpo: float = 0.6) -> submit.Capstone:
    """A capstone with a small invented hospital, and the course's adapters as folders with a skill."""
    capstone = submit.Capstone(TINY, seed)
    paths = []
    for name, skill in (("cases", 0), ("sft", 0.5), ("grpo", grpo)):
        job = store.artefact(folder / "course" / name, {"skill": skill})
        if job.why:
            places.write(job.part / "skill.safetensors", str(skill))
            job.finish()
        paths.append(job.path)
    rng = np.random.default_rng(seed)
    code = rng.choice(CODES, 120)
    cases = {"hadm_id": np.arange(120) + 500, "subject_id": np.arange(120) // 2, "code": code}
    notes = [f"note {seed} {i}" for i in range(120)]
    vars(capstone).update(
        adapters=submit.Adapters(*paths), cases=pd.DataFrame(cases | {"note": notes})
    )
    return capstone


def table() -> list[dict[str, str]]:
    return submit.read_board(submit.board_path())


def numbers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without the minutes."""
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


def test_sft_and_the_baseline_are_rows_from_the_start(
    places: Path, trainings: Trainings, capsys
) -> None:
    better = file(places, "team: Ada\nlearning_rate: 2.0e-3\n")
    assert submit.main([str(better)], invented(places)) == 0
    rows = {row["team"]: row for row in table()}
    assert list(rows) == ["Ada", submission.BASELINE_TEAM, submission.SFT_TEAM], "best first"
    baseline, ada, sft = rows[submission.BASELINE_TEAM], rows["Ada"], rows[submission.SFT_TEAM]
    assert (baseline["labels"], baseline["completions"]) == ("400", "3200")
    assert (ada["labels"], ada["completions"], ada["minutes"]) == ("400", "3200", "3.0")
    assert (sft["labels"], sft["completions"], sft["minutes"]) == ("0", "0", "")
    assert float(baseline["difference"]) == 0 and float(baseline["difference_low"]) == 0
    for row in rows.values():
        assert list(row) == submit.COLUMNS
        low, middle, high = (float(row[f"category{end}"]) for end in ("_low", "", "_high"))
        assert 0 <= low <= middle <= high <= 1
        change = float(row["category"]) - float(baseline["category"])
        assert float(row["difference"]) == pytest.approx(change, abs=2e-4)
        low, high = float(row["difference_low"]), float(row["difference_high"])
        assert low <= float(row["difference"]) <= high
        assert float(row["full"]) <= float(row["category"]) <= float(row["chapter"])
    assert float(ada["difference_low"]) > 0 > float(sft["difference"])
    said = capsys.readouterr().out
    assert "labelled notes 400 of 400" in said and "Research and teaching only" in said
    assert "learning_rate 0.002 (before: 0.0003)" in said


def test_no_answer_is_shown_case_by_case(places: Path, trainings: Trainings, capsys) -> None:
    submit.main([str(file(places, "team: Ada\n"))], invented(places))
    told = capsys.readouterr()
    text = told.out + told.err + submit.board_path().read_text()
    assert not [code for code in CODES if code in text]
    assert not re.search(r"\b5\d\d\b(?!\d)", re.sub(r"[\d.,]*[.,]\d+", "", text).replace("120", ""))
    kept = pd.read_parquet(next(submit.folder().glob("*/answers-77/answers.parquet")))
    assert list(kept.columns) == ["hadm_id", "predicted"]


def test_the_row_is_that_of_the_metrics(places: Path, trainings: Trainings) -> None:
    from helpers import metrics

    capstone = invented(places)
    submit.main([str(file(places, "team: Ada\nlearning_rate: 2.0e-3\n"))], capstone)
    row = table()[0]
    cases = capstone.cases
    codes = {
        name: trainings.predict(skill, None, cases).set_index("hadm_id").loc[cases["hadm_id"]]
        for name, skill in (("ada", 0.7), ("grpo", 0.6))
    }
    ada, grpo = codes["ada"]["predicted"].tolist(), codes["grpo"]["predicted"].tolist()
    report = metrics.report(cases["code"], ada, patients=cases["subject_id"])
    change = metrics.compare(cases["code"], grpo, ada, patients=cases["subject_id"])
    assert row["category"] == f"{report['category']['accuracy']:.4f}"
    assert row["full_macro_f1"] == f"{report['full']['f1_gold']:.4f}"
    assert row["usable"] == f"{report['usable']:.4f}"
    wanted = [f"{value:.4f}" for value in change["category"]["accuracy_ci"]]
    assert [row["difference_low"], row["difference_high"]] == wanted
    wanted = [f"{value:.4f}" for value in change["full"]["accuracy_ci"]]
    assert [row["full_difference_low"], row["full_difference_high"]] == wanted


def test_the_same_file_gives_the_same_row_and_trains_once(
    places: Path, trainings: Trainings, monkeypatch
) -> None:
    path = str(file(places, "team: Ada\nlearning_rate: 2.0e-3\n"))
    assert submit.main([path], invented(places)) == 0
    first, text = table(), submit.board_path().read_text()
    assert submit.main([path], invented(places)) == 0
    assert submit.board_path().read_text() == text and trainings.trained == ["Ada"]
    assert trainings.answered == 3
    monkeypatch.setenv("FRESH", "submit")
    assert submit.main([path], invented(places)) == 0
    assert trainings.trained == ["Ada", "Ada"] and numbers(table()) == numbers(first)


def test_every_look_stays_in_the_table(places: Path, trainings: Trainings) -> None:
    for rate in ("1.0e-3", "2.0e-3", "1.0e-3"):
        submit.main([str(file(places, f"team: Ada\nlearning_rate: {rate}\n"))], invented(places))
    submit.main([str(file(places, "team: Grace\nlearning_rate: 2.0e-3\n"))], invented(places))
    assert [row["team"] for row in table()].count("Ada") == 2
    assert trainings.trained == ["Ada", "Ada"], "Grace's settings are trained already"


def test_the_table_is_made_anew_from_the_files_of_a_folder(
    places: Path, trainings: Trainings, capsys
) -> None:
    folder = places / "handed in"
    folder.mkdir()
    file(folder, "team: Ada\nlearning_rate: 2.0e-3\n", "a.yaml")
    file(folder, "team: Grace\nlearning_rate: 1.0e-3\n", "b.yml")
    file(folder, "team: Eve\nseed: 9\n", "c.yaml")
    file(folder, "team: Alan\nlearning_rate: 2.0e-3\n", "d.yaml")
    (folder / "notes.txt").write_text("none")
    for name in ("a.yaml", "b.yml"):
        assert submit.main([str(folder / name)], invented(places)) == 0
    by_hand = table()
    assert submit.main(["--board", str(folder)], invented(places)) == 1, "one was refused"
    rows = table()
    assert {row["team"] for row in rows} == {*(row["team"] for row in by_hand), "Alan"}
    assert [row for row in rows if row["team"] != "Alan"] == by_hand
    err = capsys.readouterr().err
    assert "c.yaml is refused" in err and "seed: cannot be changed" in err
    before = submit.board_path().with_name("leaderboard-before.csv")
    assert submit.read_board(before) == by_hand
    again = submit.board_path().read_text()
    assert submit.main(["--board", str(folder)], invented(places)) == 1
    assert submit.board_path().read_text() == again


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no table": lambda text: "\x00\xff",
    "a column less": lambda text: text.replace("category,", "", 1),
    "no number": lambda text: re.sub(r"\n(Ada),[\d.]+", r"\n\1,high", text),
    "above one": lambda text: re.sub(r"\n(Ada),[\d.]+", r"\n\1,1.5000", text),
    "a row twice": lambda text: text + text.splitlines()[1] + "\n",
    "no baseline": lambda text: "\n".join(x for x in text.splitlines() if "GRPO" not in x) + "\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_said_before_any_training_and_can_be_made_anew(
    places: Path, trainings: Trainings, capsys, damage: str
) -> None:
    ada = file(places, "team: Ada\nlearning_rate: 2.0e-3\n", "a.yaml")
    grace = file(places, "team: Grace\nlearning_rate: 1.0e-3\n", "g.yaml")
    submit.main([str(ada)], invented(places))
    path = submit.board_path()
    good = table()
    damaged = DAMAGES[damage](path.read_text())
    path.write_text(damaged, encoding="utf-8")
    assert submit.main([str(grace)], invented(places)) == 1
    assert "leaderboard.csv is damaged" in capsys.readouterr().err
    assert trainings.trained == ["Ada"] and path.read_text(encoding="utf-8") == damaged
    assert submit.main(["--board", str(ada)], invented(places)) == 0
    assert table() == good


def test_other_weights_under_the_same_settings_answer_anew(
    places: Path, trainings: Trainings
) -> None:
    capstone = invented(places)
    submit.course_rows(capstone)
    (capstone.adapters.grpo / "skill.safetensors").write_text("0.9")  # as after FRESH=grpo
    rows, _ = submit.course_rows(capstone)
    assert trainings.answered == 3 and float(rows[1]["full"]) > 0.8


@pytest.mark.parametrize("change", [{"seed": 20270115}, {"grpo": 0.65}])
def test_rows_of_another_hospital_or_baseline_are_not_put_side_by_side(
    places: Path, trainings: Trainings, capsys, change: dict
) -> None:
    ada = str(file(places, "team: Ada\nlearning_rate: 2.0e-3\n"))
    submit.main([ada], invented(places))
    text = submit.board_path().read_text()
    assert submit.main([ada], invented(places, **change)) == 1
    assert "another hospital or another baseline" in capsys.readouterr().err
    assert submit.board_path().read_text() == text
    assert submit.main(["--board", ada], invented(places, **change)) == 0
    assert submit.board_path().read_text() != text


def test_an_interrupted_training_goes_on(places: Path, trainings: Trainings) -> None:
    path = str(file(places, "team: Ada\nlearning_rate: 2.0e-3\n"))
    trainings.stop = True
    with pytest.raises(KeyboardInterrupt):
        submit.main([path], invented(places))
    assert not submit.board_path().exists()
    trainings.stop = False
    assert submit.main([path], invented(places)) == 0
    assert trainings.kept == [False, True] and len(table()) == 3
    assert not [*submit.folder().glob("*/.making/*/state")]


def test_the_minutes_before_an_interruption_count(tmp_path: Path) -> None:
    path = tmp_path / "minutes.json"
    places.write(path, {"minutes": 4.0})
    clock = submit.Clock(path)
    assert 4.0 <= clock.minutes() < 4.5
    clock.on_save(None, None, None)
    assert 4.0 <= places.read(path)["minutes"] < 4.5
    assert submit.Clock(tmp_path / "none.json").minutes() < 0.5


def test_code_without_the_flag_stops_before_any_training(
    places: Path, trainings: Trainings, capsys
) -> None:
    (places / "mine.py").write_text(REWARD)
    text = "team: Ada\nrewards: [format_reward, mine.py:vowels]\nlearning_rate: 2.0e-3\n"
    ada = str(file(places, text))
    other = str(file(places, "team: Grace\n", "g.yaml"))
    assert submit.main([ada], invented(places)) == 1
    assert "RUN_CODE=1" in capsys.readouterr().err and not trainings.trained
    assert submit.main(["--board", ada, other], invented(places)) == 1
    assert {row["team"] for row in table()} >= {"Grace"} and trainings.trained == ["Grace"]
    assert submit.main(["--board", "--run-code", ada, other], invented(places)) == 0
    assert {"Ada", "Grace"} <= {row["team"] for row in table()}


# ------------------------------------------------------------------------------- from notebook 4


def run_of_notebook_4(name: str, **changes: Any) -> None:
    """A finished experiment with these settings."""
    settings = submission.baseline(TINY) | {"name": name} | changes
    job = course.artefact("grpo", settings)
    places.write(job.part / "adapter_model.safetensors", "weights")
    job.finish()


def test_a_run_of_notebook_4_writes_its_settings_file(
    places: Path, trainings: Trainings, capsys
) -> None:
    changes = {"learning_rate": 2e-3, "rewards": ["format_reward", "exact_reward"]}
    run_of_notebook_4("strict", **changes, scale_rewards="batch", save_steps=5)
    arguments = ["--from-run", "strict", "--team", "Ada and Grace"]
    assert submit.main(arguments, invented(places)) == 0
    path = submit.folder() / "strict.yaml"
    written = yaml.safe_load(path.read_text())
    assert written == {"team": "Ada and Grace", **changes, "scale_rewards": "batch"}
    assert "scale_rewards: notebook 4 hands this" in capsys.readouterr().out
    first = table()
    assert submit.main([str(path)], invented(places)) == 0, "the file alone gives the same row"
    assert table() == first and trainings.trained == ["Ada and Grace"]
    path.write_text("team: Other\n")
    assert submit.main(arguments, invented(places)) == 1
    assert "is there and differs" in capsys.readouterr().err
    assert path.read_text() == "team: Other\n"


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("baseline", {}, "it is the course's own run"),
        ("none", {}, "no finished run of notebook 4 of that name. There are: other"),
        ("weak", {"start": "weak"}, "start: cannot be changed"),
        ("lucky", {"seed": 4}, "seed: cannot be changed"),
        ("long", {"max_steps": 200}, "draws 12,800 completions"),
    ],
)
def test_a_run_that_the_rules_do_not_allow_is_said(
    places: Path, trainings: Trainings, capsys, name: str, changes: dict, says: str
) -> None:
    run_of_notebook_4("other")
    if changes:
        run_of_notebook_4(name, **changes)
    assert submit.main(["--from-run", name, "--team", "Ada"], invented(places)) == 1
    assert says in capsys.readouterr().err
    assert not [*submit.folder().glob("*.yaml")] and not trainings.trained


# ------------------------------------------------------------------------------- the course's own


def test_a_run_whose_own_sft_was_changed_is_refused() -> None:
    expected = submission.sft_settings(TINY)
    submission.check_course("sft", dict(expected), expected)
    with pytest.raises(Refused, match="another learning_rate.*FRESH=sft"):
        submission.check_course("sft", expected | {"learning_rate": 0.1}, expected)


def test_the_shipped_run_is_the_courses_own() -> None:
    shipped = ROOT / "results" / "synthetic-tiny"
    expected = {"sft": submission.sft_settings(TINY), "grpo": submission.baseline(TINY)}
    for name, settings in expected.items():
        recorded = store.inputs_of(shipped / name)["settings"]
        submission.check_course(name, recorded, settings)
        fixed = set(settings) - set(artefacts.WITHOUT_EFFECT)
        assert fixed == set(recorded), "the rules look at other settings than the notebook records"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"admissions": 9000, "seed": 0}, "is not the hospital of 6,000 admissions"),
        ({"admissions": 6000, "seed": 1}, "is not the hospital of 6,000 admissions"),
    ],
)
def test_other_data_are_refused(places: Path, monkeypatch, changes: dict, says: str) -> None:
    run = ROOT / "results" / "synthetic-tiny"
    monkeypatch.setattr(course, "need", lambda name: run / name)
    folder = Path(os.environ["ICD_DATA_DIR"])
    submit.places.write(folder / "truth" / "manifest.json", changes)
    with pytest.raises(Refused, match=says):
        submit.Capstone(TINY, 77).adapters  # noqa: B018
    submit.places.write(folder / "truth" / "manifest.json", {"admissions": 6000, "seed": 0})
    assert submit.Capstone(TINY, 77).adapters.sft == run / "sft"


def test_real_patients_are_no_matter_for_a_contest(places: Path, monkeypatch, capsys) -> None:
    (places / "mimic-iv" / "hosp").mkdir(parents=True)
    monkeypatch.setenv("ICD_DATA_DIR", str(places / "mimic-iv"))
    assert submit.main([str(file(places, "team: Ada\n"))]) == 1
    assert "judged on synthetic patients" in capsys.readouterr().err


# ------------------------------------------------------------------------------- make and docs


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    here = checkout(folder, "my course")
    stub = here / ".venv" / "bin" / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    return subprocess.run(
        ["make", *arguments], cwd=here, capture_output=True, text=True, env=environment()
    )


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["submit", "SETTINGS=my file.yaml"], ["my file.yaml"]),
        (["submit", "SETTINGS=a.yaml", "RUN_CODE=1"], ["a.yaml", "--run-code"]),
        (["submit", "SETTINGS=a.yaml", "RUN_CODE=0"], ["a.yaml"]),
        (["submit", "RUN=small r", "TEAM=A & B"], ["--from-run", "small r", "--team", "A & B"]),
        (["leaderboard", "SETTINGS=a.yaml b.yaml"], ["--board", "a.yaml", "b.yaml"]),
        (["leaderboard", "SETTINGS=in/", "RUN_CODE=1"], ["--board", "in/", "--run-code"]),
    ],
)
def test_make_hands_over_what_it_is_given(
    tmp_path: Path, arguments: list[str], given: list[str]
) -> None:
    done = make(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["-m", "exercises.submit", *given]
    assert submit.parser().parse_args(given)


@pytest.mark.parametrize("target", ["submit", "leaderboard"])
def test_make_says_what_is_missing(tmp_path: Path, target: str) -> None:
    done = make(tmp_path, target)
    assert done.returncode == 2 and "SETTINGS= is missing" in done.stdout


def test_the_commands_refuse_a_mixture() -> None:
    for arguments in ([], ["a.yaml", "b.yaml"], ["a.yaml", "--from-run", "x"], ["--board"]):
        with pytest.raises(SystemExit):
            submit.main(arguments)


def test_the_guide_says_the_rules_that_hold() -> None:
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    capstone = text.partition("## The capstone")[2]
    for number in (f"{BUDGET.labels:,}", f"{BUDGET.completions:,}", f"seed {submit.PUBLIC_SEED}"):
        assert number in capstone, number
    example = re.search(r"```yaml\n(.*?)```", capstone, re.S)
    assert example
    for name in ("make submit SETTINGS=", "make submit RUN=", "make leaderboard", "RUN_CODE=1"):
        assert name in capstone, name
    assert "ICD_SUBMIT_SEED" in capstone
    teaching = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    assert "make leaderboard" in teaching and "ICD_SUBMIT_SEED" in teaching


def test_the_spread_in_the_guide_is_that_of_the_study() -> None:
    from helpers import icd

    answers = pd.read_csv(ROOT / "results" / "study" / "predictions.csv", dtype=str)
    gold = answers["code"].map(icd.category)
    accuracy = {
        arm: [
            100 * (answers[f"{arm}/{seed}"].map(icd.category) == gold).mean() for seed in range(5)
        ]
        for arm in ("sft", "grpo")
    }
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    low, high = min(accuracy["grpo"]), max(accuracy["grpo"])
    assert f"between {low:.1f} % and {high:.1f} %" in text
    assert f"standard deviation of {np.std(accuracy['grpo'], ddof=1):.1f} points" in text
    assert f"SFT alone had {np.mean(accuracy['sft']):.1f} % in the mean" in text


def test_the_example_in_the_guide_is_allowed(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text.partition("## The capstone")[2], re.S)
    source = re.search(r"```python\n(.*?)```", text.partition("## The capstone")[2], re.S)
    (tmp_path / "my_reward.py").write_text(source[1], encoding="utf-8")
    plan = submission.plan(submission.read(file(tmp_path, example[1])), TINY)
    assert plan.code and len(submission.functions(plan, run_code=True)) == 2


# ------------------------------------------------------------------------------- the real thing

COUNTING = """
import json
from pathlib import Path

HERE = Path({folder!r})


def vowels(completions, code, note, trainer_state=None, **columns):
    if trainer_state is not None:  # in training
        calls = json.loads((HERE / "calls.json").read_text())
        calls.append([len(completions), sorted(set(note))])
        (HERE / "calls.json").write_text(json.dumps(calls))
        if (HERE / "stop").exists() and trainer_state.global_step == 2:
            raise RuntimeError("a power cut")
    texts = [one[-1]["content"] for one in completions]
    return [sum(text.count(v) for v in "aeiou") / 20 for text in texts]
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> submit.Capstone:
    """A run on 300 admissions with the shipped adapters as its SFT and GRPO, and a held-out hospital
    of 20."""
    small_course.prepare(tmp_path)
    for name, value in small_course.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    needs = ["cases", "traces"]
    for name, settings in (
        ("sft", submission.sft_settings(TINY)),
        ("grpo", submission.baseline(TINY)),
    ):
        job = course.artefact(name, settings, needs)
        shutil.copytree(ROOT / "results" / "synthetic-tiny" / name, job.part, dirs_exist_ok=True)
        (job.part / store.RECORD).unlink()
        job.finish()
        needs = ["cases", "sft"]
    profile = TINY.replace(admissions=300, grpo={"save_steps": 1})
    return submit.Capstone(profile, 77, 20)


@pytest.mark.slow
def test_a_real_training_goes_on_and_its_row_is_the_same_again(
    small: submit.Capstone, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "mine.py").write_text(COUNTING.format(folder=str(tmp_path)))
    (tmp_path / "calls.json").write_text("[]")
    (tmp_path / "stop").write_text("")
    text = (
        "team: Ada\nrewards: [format_reward, mine.py:vowels]\nmax_steps: 4\nnotes: 4\n"
        "num_generations: 2\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 1\n"
        "max_completion_length: 8\nlearning_rate: 1.0e-3\n"
    )
    path = str(file(tmp_path, text))
    assert submit.main([path, "--run-code"], small) == 1
    assert "a power cut" in capsys.readouterr().err and not submit.board_path().exists()
    (tmp_path / "stop").unlink()
    assert submit.main([path, "--run-code"], small) == 0
    assert "going on from where it was interrupted" in capsys.readouterr().out
    first = table()
    ada = next(row for row in first if row["team"] == "Ada")
    adapter = next(submit.folder().glob("*/grpo/adapter_model.safetensors")).parent
    went_on = small_course.weights(adapter)
    assert len(pd.read_csv(adapter / "training_log.csv")) == 4

    (tmp_path / "calls.json").write_text("[]")
    monkeypatch.setenv("FRESH", "submit")
    assert submit.main(["--board", path, "--run-code"], small) == 0
    again = small_course.weights(adapter)
    assert all((went_on[name] == again[name]).all() for name in went_on)
    assert numbers(table()) == numbers(first)
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert sum(count for count, _ in calls) == int(ada["completions"]) == 16
    assert len({note for _, notes in calls for note in notes}) == int(ada["labels"]) == 4
    start = small_course.weights(small.adapters.sft)
    assert any((start[name] != again[name]).any() for name in start), "nothing was trained"
