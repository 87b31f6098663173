"""The study: what a contrast is, what is made once, what is kept. Training itself is tested where
it is slow."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_course as small

from helpers import casebook, metrics, models, plots, profiles, prompts, rewards, study, traces
from helpers.machinery import places, store
from helpers.study import analyse, pictures, run
from tests import notebook_code
from tools import atlas_findings

CODES = ["I2101", "I214", "J189", "A419", "E870", "N179"]
TINY = profiles.get("tiny")
INTERVALS = ("", "satterthwaite_")


def table(gain: dict[int, float], n: int = 600) -> pd.DataFrame:
    """Invented answers: arm a right in half of the cases, arm b also in a share `gain` of the
    others, by seed."""
    rng = np.random.default_rng(5)
    gold = rng.choice(CODES, n)
    answers = pd.DataFrame({"subject_id": (np.arange(n) // 2).astype(str), "code": gold})
    for seed, share in gain.items():
        right = rng.random(n) < 0.5
        wrong = np.array([CODES[(CODES.index(code) + 1) % len(CODES)] for code in gold])
        others = np.where(rng.random(n) < 0.1, "NIL", wrong)
        answers[f"a/{seed}"] = np.where(right, gold, wrong)
        answers[f"b/{seed}"] = np.where(right | (rng.random(n) < share), gold, others)
    return answers


# ------------------------------------------------------------------------------------------ analyse


def test_a_contrast_averages_paired_differences_over_seeds() -> None:
    alike = table({0: 0.3, 1: 0.3, 2: 0.3})
    full = analyse.contrast(alike, "a", "b", n_boot=300).loc["full"]
    assert full["contrast"] == "b - a" and full["seeds"] == 3
    assert full["difference"] == pytest.approx(np.mean(full["per_seed"]), abs=1e-3)
    assert 0.1 < full["difference"] < 0.2 and full["low"] > 0.05 and full["p"] < 0.01
    none = analyse.contrast(alike, "a", "a", n_boot=100).loc["full"]
    assert none["difference"] == none["low"] == none["high"] == 0 and none["p"] == 1
    assert none["satterthwaite_low"] == pytest.approx(0, abs=1e-5)


def test_seeds_that_disagree_widen_every_interval() -> None:
    widths = []
    for gain in ({0: 0.3, 1: 0.3, 2: 0.3}, {0: 0.0, 1: 0.3, 2: 0.6}):
        full = analyse.contrast(table(gain), "a", "b", n_boot=400).loc["full"]
        intervals = ("", "t_", "satterthwaite_")
        widths.append([full[f"{name}high"] - full[f"{name}low"] for name in intervals])
    assert all(apart > 2 * alike for alike, apart in zip(*widths, strict=True))


def test_one_seed_gives_the_paired_interval_of_metrics_and_none_over_seeds() -> None:
    answers = table({0: 0.3})
    usable = [None if code == "NIL" else code for code in answers["b/0"]]
    full = analyse.contrast(answers, "a", "b", n_boot=500).loc["full"]
    report = metrics.compare(
        [*answers["code"]], [*answers["a/0"]], usable, patients=[*answers["subject_id"]], n_boot=500
    )["full"]
    assert full["difference"] == pytest.approx(report["f1_gold"])
    assert [full["low"], full["high"]] == pytest.approx(report["ci"], abs=0.01)
    assert np.isnan(full["t_low"]) and np.isnan(full["satterthwaite_high"])


def test_a_missing_arm_is_named() -> None:
    with pytest.raises(ValueError, match="no seed has both a and grpo"):
        analyse.contrast(table({0: 0.1}), "a", "grpo")


def test_an_arm_is_not_taken_for_another_whose_name_begins_alike() -> None:
    answers = table({0: 0.3}).rename(columns={"a/0": "sft/0", "b/0": "sft-own/0"})
    with pytest.raises(ValueError, match="no seed has both sft and sft-codes"):
        analyse.contrast(answers, "sft", "sft-codes")
    assert list(analyse.scores(answers)["arm"]) == ["sft", "sft-own"]


def test_students_interval_knows_the_seeds_and_satterthwaites_the_patients_too() -> None:
    answers = table({0: 0.0, 1: 0.3, 2: 0.6})
    full = analyse.contrast(answers, "a", "b", n_boot=2000).loc["full"]
    error = np.std(full["per_seed"], ddof=1) / 3**0.5
    assert full["t_low"] == pytest.approx(full["difference"] - 4.303 * error, abs=1e-3)
    assert 1.6 * error < (full["high"] - full["low"]) / 2 < 4.303 * error
    # Where the seeds decide, it is nearly Student's; where they agree, it is that of the patients.
    assert full["satterthwaite_low"] == pytest.approx(full["t_low"], abs=0.01)
    alike = table({0: 0.3})
    for seed in (1, 2):
        alike[f"a/{seed}"] = alike["a/0"]
        alike[f"b/{seed}"] = alike["b/0"]
    full = analyse.contrast(alike, "a", "b", n_boot=2000).loc["full"]
    assert full["t_low"] == pytest.approx(full["difference"])
    assert full["satterthwaite_low"] == pytest.approx(full["low"], abs=0.01)


def test_the_interval_over_seeds_and_patients_covers_the_truth() -> None:
    """Both sources of luck are drawn anew each time; the true difference is that of ever more seeds
    and patients."""
    rng = np.random.default_rng(0)
    truth = (
        0.5 * 0.3
    )  # in accuracy, to which macro-F1 comes close: classes alike, errors spread evenly
    covered = []
    for _ in range(60):
        answers = {}
        gold = rng.choice(CODES, 400)
        other = np.array([CODES[(CODES.index(code) + 1 + rng.integers(5)) % 6] for code in gold])
        for seed in range(5):
            right = rng.random(400) < 0.5
            also = rng.random(400) < rng.normal(0.3, 0.1)
            answers[f"a/{seed}"] = np.where(right, gold, other)
            answers[f"b/{seed}"] = np.where(right | also, gold, other)
        whole = pd.DataFrame({"subject_id": np.arange(400).astype(str), "code": gold, **answers})
        full = analyse.contrast(whole, "a", "b", n_boot=200).loc["full"]
        covered.append(full["low"] < truth < full["high"])
    assert np.mean(covered) > 0.85


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_patients", "of_both", "bootstrap", "satterthwaite"),
    [  # spread in points as in the committed contrasts, by what varies; shares covered
        (5, 0.57, 0.30, 0.73, 0.98, 0.97),  # the primary
        (5, 0.00, 0.72, 0.78, 0.97, 0.97),  # SFT on all codes: patients decide
        (4, 1.86, 0.00, 1.11, 0.94, 0.95),  # 200 steps, chapter
        (3, 10.1, 0.00, 1.40, 0.81, 0.93),  # the weak start, chapter: seeds decide
    ],
)
def test_where_three_seeds_decide_the_bootstrap_is_too_narrow_and_satterthwaites_interval_is_not(
    monkeypatch: pytest.MonkeyPatch,
    seeds: int,
    of_seeds: float,
    of_patients: float,
    of_both: float,
    bootstrap: float,
    satterthwaite: float,
) -> None:
    """Simulated studies whose true difference is 0; docs/metrics.md quotes the shares."""
    rng = np.random.default_rng(1)
    answers = pd.DataFrame({f"{arm}/{seed}": ["I10"] for arm in "ab" for seed in range(seeds)})
    answers = answers.assign(subject_id="1", code="I10")
    covered = []
    for _ in range(600):
        common = of_patients * rng.standard_normal(301)

        def differences(*_, common=common, **__) -> dict:
            luck = common + of_both * rng.standard_normal(301)  # the first: of these patients
            point = luck[0] + of_seeds * rng.standard_normal()
            return dict.fromkeys(metrics.LEVELS, (point, luck[1:] - luck[1:].mean()))

        monkeypatch.setattr(metrics, "differences", differences)
        full = analyse.contrast(answers, "a", "b", n_boot=300).loc["full"]
        covered.append([full[f"{name}low"] < 0 < full[f"{name}high"] for name in INTERVALS])
    assert np.mean(covered, axis=0) == pytest.approx([bootstrap, satterthwaite], abs=0.03)


def test_holm() -> None:
    adjusted = analyse.holm(pd.Series({"x": 0.01, "y": 0.04, "z": 0.03}))
    assert adjusted.to_dict() == pytest.approx({"x": 0.03, "z": 0.06, "y": 0.06})
    assert analyse.holm(pd.Series({"x": 0.6, "y": 0.9})).tolist() == [1, 1]
    assert analyse.holm(pd.Series(dtype=float)).empty


def test_verdicts_say_what_was_fixed_before_the_runs() -> None:
    rng = np.random.default_rng(1)
    shares = {"sft": 0.5, "grpo": 0.7, "sft-codes": 0.8, "sft-own": 0.5}
    gold = rng.choice(CODES, 800)
    answers = pd.DataFrame({"subject_id": np.arange(800).astype(str), "code": gold})
    for arm, share in shares.items():
        for seed in range(3):
            right = rng.random(800) < share
            answers[f"{arm}/{seed}"] = np.where(right, gold, rng.choice(CODES, 800))
    verdict = analyse.verdicts(answers)
    primary = verdict[verdict["kind"] == "primary"]
    assert list(primary["contrast"]) == ["grpo - sft"] and list(primary["level"]) == ["full"]
    assert bool(primary["holds"].iloc[0]) and np.isnan(primary["holm"].iloc[0])
    rows = verdict.set_index(["contrast", "level"])
    assert not rows.loc[("sft-own - sft", "full"), "holds"]
    assert rows.loc[("sft-codes - sft", "full"), "holds"]
    assert rows.loc[("grpo - sft-codes", "full"), "difference"] < 0
    assert ("grpo-strict - sft", "full") not in rows.index  # has not run
    secondary = verdict[verdict["kind"] == "secondary"]
    assert (secondary["holm"] >= secondary["p"]).all()
    assert secondary.set_index("level").loc[["category", "chapter"], "no_loss"].all()


def test_before_two_arms_have_run_there_is_no_verdict() -> None:
    answers = table({0: 0.3}).rename(columns={"a/0": "sft/0"})
    assert analyse.verdicts(answers).empty


def test_scores_are_those_of_metrics() -> None:
    answers = table({0: 0.3}).rename(columns={"a/0": "sft/0", "b/0": "grpo/0"})
    scores = analyse.scores(answers).set_index("arm")
    usable = [None if code == "NIL" else code for code in answers["grpo/0"]]
    report = metrics.report([*answers["code"]], usable, n_boot=0)
    assert scores.loc["grpo", "full"] == report["full"]["f1_gold"]
    assert scores.loc["grpo", "usable"] < 1 == scores.loc["sft", "usable"]


def test_scores_come_in_the_order_of_arms_and_seeds_and_unknown_arms_are_left_out() -> None:
    renamed = {"a/1": "grpo/1", "a/0": "grpo/10", "b/1": "sft/1", "b/0": "sft/10"}
    scores = analyse.scores(
        table({1: 0.3, 0: 0.2}).rename(columns=renamed).assign(**{"gone/0": "I10"})
    )
    runs = [*zip(scores["arm"], scores["seed"], strict=True)]
    assert runs == [("sft", 1), ("sft", 10), ("grpo", 1), ("grpo", 10)]


def grpo_log(steps: int, **changes: float) -> pd.DataFrame:
    step = np.arange(1, steps + 1)
    log = pd.DataFrame({"step": step, "reward": step / 100, "frac_reward_zero_std": 0.2})
    held_out = pd.DataFrame({"step": [0, steps], "eval_reward": [0.5, 0.6]})
    whole = pd.concat([held_out, log]).groupby("step", as_index=False).first()
    return whole.assign(**changes)


# ----------------------------------------------------------------------------------------- pictures


def drawn(figure) -> list[str]:
    """Draws the figure; all of its texts."""
    figure.savefig(io.BytesIO())
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_the_picture_of_arms_has_a_row_for_each_and_shades_the_loss() -> None:
    import matplotlib.pyplot as plt

    answers = table({0: 0.3, 1: 0.2})
    contrasts = {arm: analyse.contrast(answers, "a", "b", n_boot=50) for arm in ("grpo", "sft-own")}
    figure = pictures.arms(contrasts, {"grpo": "GRPO", "sft-own": "its own right answers, long"})
    texts = drawn(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["GRPO", "its own right\nanswers, long"]
    points = f"{100 * contrasts['grpo'].loc['full', 'difference']:+.1f}"
    assert texts.count(points) >= 2 and texts.count("loss") == 2
    assert not plt.get_fignums(), "a notebook would show it twice"
    for panel in figure.axes:
        low, high = panel.get_xlim()
        assert low < study.MARGIN and all(
            low < x < high for row in contrasts.values() for x in row["high"]
        )


def test_the_figure_of_held_out_rewards_shows_each_seed_and_their_mean_as_far_as_all_went() -> None:
    scope = {"pd": pd, "plots": plots, "textwrap": textwrap}
    draw = plots.styled(notebook_code.function("07b", "held_out_figure", **scope))
    logs = {"grpo": [grpo_log(30), grpo_log(20)], "grpo-strict": [grpo_log(30)]}
    figure = draw(logs, {"grpo": "GRPO", "grpo-strict": "GRPO strict"})
    assert sorted(drawn(figure)) == ["GRPO", "GRPO strict"]
    (panel,) = figure.axes
    thick = [line for line in panel.lines if line.get_linewidth() > 2]
    assert len(panel.lines) == 5 and len(thick) == 2, "three seeds and two means"
    assert thick[0].get_xdata().tolist() == [0], "step 0 is the only one that both have"
    assert thick[1].get_xdata().tolist() == [0, 30]
    assert thick[1].get_ydata().tolist() == [0.5, 0.6]


# ---------------------------------------------------------------------------------------------- run


TAUGHT = ("traces", "codes", "own", "samples", "labels")


def test_every_arm_starts_from_one_that_exists_and_the_core_answers_the_question() -> None:
    for arm in study.ARMS.values():
        assert arm.start is None or arm.start in study.ARMS
        assert len(arm.rewards) == len(arm.weights) and arm.taught in TAUGHT
        assert all(rewards.named(reward).__name__.endswith("_reward") for reward in arm.rewards)
    core = {name for name, arm in study.ARMS.items() if arm.core}
    assert core == {"sft", "grpo", "grpo-strict", "sft-codes", "sft-own"}
    assert {arm for each in (study.PRIMARY, *study.SECONDARY) for arm in each[:2]} == core


@pytest.mark.parametrize("name", study.ARMS)
def test_the_arguments_of_every_arm_are_known_to_trl(name: str) -> None:
    from trl import GRPOConfig, SFTConfig

    config = GRPOConfig if study.ARMS[name].rewards else SFTConfig
    known = {field.name for field in dataclasses.fields(config)}
    assert set(run.arguments(name, TINY)) <= known


def test_longer_arms_take_more_steps_of_the_same_kind() -> None:
    once = run.arguments("grpo", TINY)
    longer = run.arguments("grpo-longer", TINY)
    assert longer == once | {"max_steps": 4 * TINY.grpo["max_steps"]}
    assert run.arguments("sft-weak", TINY)["max_steps"] == 56


def test_equal_labels_are_the_cases_that_grpo_draws() -> None:
    from trl.trainer.utils import RepeatSampler

    cases = pd.DataFrame({"hadm_id": range(1000)})
    for seed in (0, 3):
        sampler = RepeatSampler(cases, mini_repeat_count=8, batch_size=8, seed=seed)
        drawn = list(dict.fromkeys(sampler))[:400]
        assert run.labels_of_grpo(cases, seed, TINY)["hadm_id"].tolist() == drawn


def test_of_the_answers_only_right_and_well_formed_ones_are_taught_each_text_once() -> None:
    cases = pd.DataFrame({"hadm_id": [1, 2], "code": ["I2109", "J189"]})
    texts = {
        1: [("I21.09", "a"), ("I21.09", "a"), ("I21.4", "b"), ("I21.09", "")],
        2: [("I21.09", "c"), ("J18.9", "d")],
    }
    rows = []
    for hadm_id, answers in texts.items():
        for code, think in answers:
            completion = f"{think}\n</think>\n<diagnosis>{code}</diagnosis>"
            parsed = prompts.parse(completion)
            rows.append((hadm_id, completion, parsed.think, parsed.code))
    answers = pd.DataFrame(rows, columns=["hadm_id", "completion", "think", "predicted"])
    right = run._right(answers, cases, "code")
    assert right[["hadm_id", "think", "code"]].values.tolist() == [
        [1, "a", "I2109"],
        [2, "d", "J189"],
    ]
    near = run._right(answers, cases, "category")
    assert near["code"].tolist() == ["I2109", "I214", "J189"]


def test_where_labels_alone_are_taught_the_loss_is_on_the_code() -> None:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = models.load(TINY, four_bit=False)
    cases = pd.DataFrame({"hadm_id": [1], "note": ["CC: chest pain"]})
    table = traces.checked([(1, "It hurts.", "I2109", "CC: chest pain")])
    lessons = traces.sft_dataset(cases, table, tokenizer, 256)
    alone = lessons.map(run._code_alone, fn_kwargs={"tokenizer": tokenizer})
    rows = []
    for dataset in (lessons, alone):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(report_to="none", use_cpu=True, bf16=False),
            processing_class=tokenizer,
            train_dataset=dataset,
        )
        rows.append(trainer.train_dataset[0])
    whole, code = rows
    assert (
        tokenizer.decode(code["input_ids"]).rstrip()
        == tokenizer.decode(whole["input_ids"]).rstrip()
    )
    learned = [token for token in code["labels"] if token != -100]
    assert tokenizer.decode(learned) == "<diagnosis>I21.09</diagnosis><|im_end|>"


CASES = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [3, 4], "code": ["I10", "J189"]})


class Workshop:
    """A study whose trainings and answers are invented; `trained` lists them in order."""

    def __init__(self, root: Path) -> None:
        self.results = root / "results"
        self.trained: list[str] = []
        self.cases = CASES

    def train(self, name: str, seed: int, artefact: store.Artefact, start, profile) -> None:
        assert not any(artefact.work.iterdir()), "checkpoints of other settings are left"
        origin = f" after {start.name}" if start else ""
        self.trained.append(f"{name}-{seed}{origin}")
        log = pd.DataFrame({"step": [1, 2], "loss": [0.5, 0.25]})
        log.to_csv(artefact.part / "training_log.csv", index=False)

    def answer(self, adapter: Path, cases: pd.DataFrame, profile, **options) -> pd.DataFrame:
        return pd.DataFrame({"predicted": ["I10", None]})

    def run(self, *arms: str, seeds: tuple[int, ...] = (0,)) -> list[str]:
        """What was trained."""
        before = len(self.trained)
        run.run([*seeds], [*arms], self.results)
        return self.trained[before:]


@pytest.fixture
def workshop(places: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop(places)
    monkeypatch.setattr(run, "test_cases", lambda: shop.cases)
    monkeypatch.setattr(run, "train", shop.train)
    monkeypatch.setattr(run, "answer", shop.answer)
    return shop


def test_each_run_is_made_once_and_put_beside_the_others(workshop: Workshop) -> None:
    assert workshop.run("grpo", "sft") == ["sft-0", "grpo-0 after sft"]
    assert workshop.run("sft", "grpo", seeds=(0, 1)) == ["sft-1", "grpo-1 after sft"]
    answers = analyse.read(workshop.results)
    assert list(answers) == ["subject_id", "hadm_id", "code", "grpo/0", "sft/0", "sft/1", "grpo/1"]
    assert answers["sft/0"].tolist() == ["I10", "NIL"]
    rows = pd.read_csv(workshop.results / "runs.csv")
    assert rows[["arm", "seed", "steps", "usable"]].to_numpy().tolist() == [
        ["grpo", 0, 2, 0.5],
        ["sft", 0, 2, 0.5],
        ["sft", 1, 2, 0.5],
        ["grpo", 1, 2, 0.5],
    ]
    assert pd.read_csv(workshop.results / "log-grpo-1.csv")["loss"].tolist() == [0.5, 0.25]
    recorded = places.read(workshop.results / "design.json")["settings"]
    assert recorded == {name: run.settings(name, TINY) for name in ("sft", "grpo")}


def test_what_was_answered_but_not_put_down_is_neither_lost_nor_made_anew(
    workshop: Workshop,
) -> None:
    workshop.run("sft", "grpo")
    before = analyse.read(workshop.results)
    (workshop.results / "predictions.csv").unlink()  # as a kill leaves it that comes just before
    assert workshop.run("sft", "grpo") == []
    pd.testing.assert_frame_equal(analyse.read(workshop.results), before)
    assert len(pd.read_csv(workshop.results / "runs.csv")) == 2


def test_what_another_process_is_at_is_left_to_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def artefact(path: Path, inputs: dict, *, real=store.artefact, **options):
        return None if path.name == "answers-sft" else real(path, inputs, **options)

    monkeypatch.setattr(store, "artefact", artefact)
    assert workshop.run("sft", "grpo") == ["sft-0", "grpo-0 after sft"]
    assert "answers of sft, seed 0: another process is at it" in capsys.readouterr().out
    assert list(analyse.read(workshop.results))[3:] == ["grpo/0"]


def test_answers_to_other_cases_are_not_mixed_in(workshop: Workshop, tmp_path: Path) -> None:
    workshop.run("sft")
    workshop.cases = CASES.assign(hadm_id=[3, 5])
    with pytest.raises(ValueError, match="answers other cases than those of the test hospital"):
        workshop.run("grpo")
    with pytest.raises(FileNotFoundError, match="make study"):
        analyse.read(tmp_path / "nowhere")


def test_another_text_is_no_other_setting_and_a_further_arm_is_welcome(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.run("sft")
    about = dataclasses.replace(study.ARMS["sft"], about="other words", core=False)
    monkeypatch.setitem(study.ARMS, "sft", about)
    monkeypatch.setitem(study.ARMS, "mine", study.Arm("mine", habit=0.1))
    assert workshop.run("sft", "mine") == ["mine-0"]
    monkeypatch.delitem(study.ARMS, "mine")  # and one that is gone keeps its answers
    assert workshop.run("grpo") == ["grpo-0 after sft"]


@pytest.mark.parametrize(
    "arm, change, answers",
    [
        ("grpo", {"weights": [0.1, 2.0]}, "grpo"),
        ("sft", {"habit": 0.1}, "grpo, sft"),  # what GRPO starts from
        ("grpo", {"longer": 2.0}, "grpo"),
    ],
)
def test_answers_of_an_arm_that_changed_are_not_mixed_with_new_ones(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, arm: str, change: dict, answers: str
) -> None:
    workshop.run("sft", "grpo")
    monkeypatch.setitem(study.ARMS, arm, dataclasses.replace(study.ARMS[arm], **change))
    with pytest.raises(ValueError, match=f"answers of {answers}, made with other settings"):
        workshop.run("sft", seeds=(1,))


@pytest.mark.parametrize(
    "change, answers",
    [
        ({"grpo": {"learning_rate": 1.0}}, "grpo"),
        ({"sft": {"max_steps": 7}}, "grpo, sft"),
        ({"lora": {"r": 8}}, "grpo, sft"),
        ({"four_bit": {"grpo": False}}, "grpo, sft"),  # all answer on that base
        ({"admissions": 99}, "grpo, sft"),
        ({"max_note_tokens": 99}, "grpo, sft"),
    ],
)
def test_answers_of_another_profile_are_not_mixed_with_new_ones(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, change: dict, answers: str
) -> None:
    workshop.run("sft", "grpo")
    monkeypatch.setitem(profiles.PROFILES, "tiny", TINY.replace(**change))
    with pytest.raises(ValueError, match=f"answers of {answers}, made with other settings"):
        workshop.run("sft", seeds=(1,))


def test_what_does_not_change_the_result_does_not_change_the_settings() -> None:
    more = TINY.replace(minutes={"x": 1.0}, inference={"cases": 3, "batch_tokens": 9})
    assert run.settings("grpo", more) == run.settings("grpo", TINY)


def test_a_study_whose_settings_another_one_changed_meanwhile_puts_nothing_down(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.run("sft")

    def answer(*args, **options) -> pd.DataFrame:
        design = places.read(workshop.results / "design.json")
        design["settings"]["sft"]["longer"] = 3.0  # the other study's
        places.write(workshop.results / "design.json", design)
        return workshop.answer(*args, **options)

    monkeypatch.setattr(run, "answer", answer)
    with pytest.raises(ValueError, match="answers of sft, made with other settings"):
        workshop.run("sft", seeds=(1,))
    assert "sft/1" not in analyse.read(workshop.results)
    assert len(pd.read_csv(workshop.results / "runs.csv")) == 1


def test_an_adapter_made_with_other_settings_is_trained_anew_and_so_is_what_starts_from_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        run.adapter("grpo", 0, TINY)
    assert workshop.trained == ["sft-0", "grpo-0 after sft"]
    longer = dataclasses.replace(study.ARMS["grpo"], longer=2.0)
    monkeypatch.setitem(study.ARMS, "grpo", longer)
    run.adapter("grpo", 0, TINY)
    assert workshop.trained[2:] == ["grpo-0 after sft"]
    monkeypatch.setitem(study.ARMS, "sft", dataclasses.replace(study.ARMS["sft"], habit=0.0))
    run.adapter("grpo", 0, TINY)
    assert workshop.trained[3:] == ["sft-0", "grpo-0 after sft"]


def test_another_size_is_another_hospital_and_each_is_written_once(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(out: Path, *, admissions: int, seed: int) -> None:
        written.append((admissions, seed))
        (out / "hosp").mkdir(parents=True)
        (out / "hosp" / "patients.csv").write_text("")

    monkeypatch.setattr(run.hospital, "write", write)
    paths = [run.hospital_of(6), run.hospital_of(8), run.hospital_of(6, 0), run.hospital_of(6)]
    assert written == [(6, run.TEST_SEED), (8, run.TEST_SEED), (6, 0)]
    assert len(set(paths)) == 3 and paths[0] == paths[3]
    changed = dataclasses.replace(casebook.casebook(), sha256="another")
    monkeypatch.setattr(casebook, "casebook", lambda: changed)
    assert run.hospital_of(6) == paths[0] and len(written) == 4, "another casebook, other patients"


# -------------------------------------------------------------------------------- what is committed


def test_the_results_that_ship_were_made_with_the_settings_of_now() -> None:
    recorded = places.read(study.RESULTS / "design.json")["settings"]
    answered = {column.split("/")[0] for column in analyse.read() if "/" in column}
    assert recorded == {name: run.settings(name, TINY) for name in study.ARMS if name in answered}


# What design.json said of the profile before its settings were written in TRL's names. optim is not
# among it: the profile's adamw_torch was recorded, but never passed to the trainers, which took
# their own default.
RECORDED = {
    "sft": {
        "sft_steps": 280,
        "sft_epochs": 1.0,
        "sft_batch": 16,
        "sft_grad_accum": 1,
        "sft_lr": 0.001,
        "sft_warmup": 10,
        "sft_save_steps": 50,
    },
    "grpo": {
        "grpo_steps": 50,
        "grpo_num_generations": 8,
        "grpo_batch": 32,
        "grpo_grad_accum": 2,
        "grpo_lr": 0.0003,
        "grpo_warmup": 0,
        "grpo_schedule": "linear",
        "grpo_temperature": 1.0,
        "grpo_max_completion": 96,
        "grpo_loss_type": "dapo",
        "grpo_beta": 0.0,
        "grpo_save_steps": 20,
    },
}
NEW_NAMES = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "warmup": "warmup_steps",
    "schedule": "lr_scheduler_type",
    "max_completion": "max_completion_length",
}


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_recorded_settings_have_new_names_and_the_numbers_they_were_run_with(
    stage: str,
) -> None:
    settings = places.read(study.RESULTS / "design.json")["settings"][stage]
    numbers = {}
    for name, number in RECORDED[stage].items():
        name = name.removeprefix(f"{stage}_")
        numbers[NEW_NAMES.get(name, name)] = number
    arguments = settings["arguments"]
    assert arguments | numbers == arguments
    assert arguments["optim"] == "adamw_torch_fused" and not arguments["gradient_checkpointing"]
    assert settings["lora"] == {"r": 32, "lora_alpha": 64}
    assert settings["four_bit"] == {"sft": False, "grpo": True}
    lengths = ("max_note_tokens", "max_prompt_tokens", "max_new_tokens")
    assert [settings[name] for name in lengths] == [256, 384, 96]
    assert settings["admissions"] == 6000 and settings["traces_share"] == 0.5


def test_what_the_trainers_took_without_being_told_is_what_the_record_says() -> None:
    from trl import GRPOConfig, SFTConfig

    for config in (SFTConfig, GRPOConfig):
        assert config(output_dir="x", use_cpu=True, bf16=False).optim == run.OPTIMISER


def test_contrasts_of_the_committed_answers_are_the_printed_ones() -> None:
    full = analyse.contrast(analyse.read(), "sft", "grpo").loc["full"]
    assert [round(100 * full[name], 1) for name in ("difference", "low", "high")] == [4.4, 3.0, 5.6]
    assert full["per_seed"] == [0.031, 0.0407, 0.0567, 0.0449, 0.0457]


SMALL = """
import functools, os, signal, sys
from pathlib import Path
from helpers import profiles, rewards, training
from helpers.study import run

kill_at = int(sys.argv[2])
profiles.PROFILES["tiny"] = profiles.PROFILES["tiny"].replace(
    admissions=150, max_new_tokens=8,
    sft={"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2},
    grpo={"max_steps": 4, "save_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4,
          "gradient_accumulation_steps": 1, "max_completion_length": 8})
run.test_cases = functools.partial(run.test_cases, 40)
run.train = functools.partial(run.train, watched=2, watch_every=2)
run.cases_of = lambda *args, real=run.cases_of: real(*args).head(12)


# After so few steps no answer is usable and every honest reward is the same: this one differs.
def vowels(completions, code=None, **columns):
    return [sum(map(str(text).count, "aeiou")) / 20 for text in completions]


rewards.named = lambda reward: vowels


def held(every, measure, held_out=training.HeldOut):
    callback = held_out(every, measure)
    real = callback.on_step_end
    def on_step_end(args, state, control, **kwargs):
        real(args, state, control, **kwargs)
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    callback.on_step_end = on_step_end
    return callback

training.HeldOut = held
run.run([0], ["sft", "grpo"], Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_study_killed_in_its_grpo_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    def study_run(name: str, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
        env = os.environ | {
            "ICD_RUNS_DIR": str(tmp_path / name),
            "ICD_PROFILE": "tiny",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", SMALL, str(tmp_path / name / "results"), str(kill_at)]
        return subprocess.run(
            command, env=env, cwd=small.ROOT, text=True, capture_output=True, timeout=600
        )

    whole = study_run("whole")
    assert whole.returncode == 0, whole.stderr
    assert study_run("killed", 3).returncode == -9
    seed = tmp_path / "killed" / "study" / "seed-0"
    before = (seed / "sft" / "adapter_model.safetensors").stat().st_mtime_ns
    (work,) = [path for path in seed.glob(".making/grpo.*") if any(path.glob("checkpoint-*"))]
    assert not (seed / "grpo").exists() and (work / "checkpoint-2").is_dir()
    (work / "checkpoint-3").mkdir()  # as a kill leaves it that comes while it is written
    assert list(analyse.read(tmp_path / "killed" / "results"))[3:] == ["sft/0"]
    again = study_run("killed")
    assert again.returncode == 0, again.stderr
    assert "checkpoint-3 is not whole" in again.stdout
    assert (seed / "sft" / "adapter_model.safetensors").stat().st_mtime_ns == before
    for arm in ("sft", "grpo"):
        folders = [tmp_path / name / "study" / "seed-0" / arm for name in ("whole", "killed")]
        one, other = map(small.weights, folders)
        assert all(np.array_equal(one[key], other[key]) for key in one), arm
    one, other = (small.weights(seed / arm) for arm in ("sft", "grpo"))
    assert any(not np.array_equal(one[key], other[key]) for key in one), "GRPO trained nothing"
    for file in ("predictions.csv", "log-sft-0.csv"):
        tables = [pd.read_csv(tmp_path / name / "results" / file) for name in ("whole", "killed")]
        clocks = ("runtime", "time", "num_tokens")
        shared = [c for c in tables[0] if not any(clock in c for clock in clocks)]
        pd.testing.assert_frame_equal(*(each[shared] for each in tables))
    log = pd.read_csv(tmp_path / "killed" / "results" / "log-grpo-0.csv")
    assert list(log["step"]) == [0, 1, 2, 3, 4]
    assert list(log.loc[log["eval_reward"].notna(), "step"]) == [0, 2, 4]


def test_the_findings_of_notebook_6_are_counted_from_the_committed_answers() -> None:
    """What needs no hospital; the slow test below counts all of it."""
    kept = pd.read_csv(small.ROOT / "results" / "study" / "findings.csv")
    table = analyse.read()
    columns = {"trained": 0, "sure": 0.0, "code": table["code"]}
    tables = []
    for seed in atlas_findings.SEEDS:
        models = {name: table[f"{name}/{seed}"] for name in ("sft", "grpo")}
        tables.append(pd.DataFrame(columns | models | {"seed": seed}))
    counted = atlas_findings.findings(pd.concat(tables)).round(4)
    for name in ("cases", "repaired", "near", "broken", "far", "back", "full_gain", "chapter_gain"):
        assert list(counted[name]) == list(kept[name]), name


@pytest.mark.slow
def test_all_findings_of_notebook_6_can_be_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICD_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("ICD_PROFILE", "tiny")
    atlas_findings.main(tmp_path / "findings.csv")
    kept = pd.read_csv(small.ROOT / "results" / "study" / "findings.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "findings.csv"), kept)


def test_what_counts_as_near_far_and_back() -> None:
    """In I21, of I: right to chapter J, to I50, to nothing; wrong in J, I50, I21.4 or unusable to
    right."""
    before = ["I219", "I219", "I219", "J189", "I509", "I214", "NIL"]
    after = ["J189", "I509", "NIL", "I219", "I219", "I219", "I219"]
    answers = pd.DataFrame({"sft": before, "grpo": after, "code": "I219", "seed": 0})
    answers = answers.assign(trained=[1] * 3 + [100] * 4, sure=[1.0] * 4 + [0.4] * 3)
    row = atlas_findings.findings(answers).loc[0]
    assert (row["repaired"], row["near"], row["back"]) == (4, 1, 1)
    assert (row["broken"], row["far"]) == (3, 1)
    assert (row["rare_sft"], row["rare_grpo"], row["common_grpo"]) == (1, 0, 1)
    assert (row["sure_cases"], row["unsure_cases"], row["errors_where_sure"]) == (4, 3, 1)
