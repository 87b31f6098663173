"""The study's bookkeeping: what a contrast is, what is resumed, what is kept. Training itself is tested where it is slow."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_course as small

from helpers import course, metrics, profiles, rewards, study

CODES = ["I2101", "I214", "J189", "A419", "E870", "N179"]


def table(gain: dict[int, float], n: int = 600) -> pd.DataFrame:
    """Invented answers: arm a right in half of the cases, arm b also in a share `gain` of the others, by seed."""
    rng = np.random.default_rng(5)
    gold = rng.choice(CODES, n)
    out = pd.DataFrame({"subject_id": (np.arange(n) // 2).astype(str), "code": gold})
    for seed, share in gain.items():
        right = rng.random(n) < 0.5
        wrong = np.array([CODES[(CODES.index(g) + 1) % len(CODES)] for g in gold])
        out[f"a/{seed}"] = np.where(right, gold, wrong)
        out[f"b/{seed}"] = np.where(
            right | (rng.random(n) < share), gold, np.where(rng.random(n) < 0.1, "NIL", wrong)
        )
    return out


def test_a_contrast_averages_paired_differences_over_seeds() -> None:
    found = study.contrast(table({0: 0.3, 1: 0.3, 2: 0.3}), "a", "b", n_boot=300)["full"]
    assert found["seeds"] == 3 and found["f1_gold"] == pytest.approx(
        np.mean(found["per_seed"]), abs=1e-3
    )
    assert 0.1 < found["f1_gold"] < 0.2 and found["ci"][0] > 0.05 and found["p"] < 0.01
    none = study.contrast(table({0: 0.0, 1: 0.0, 2: 0.0}), "a", "a", n_boot=100)["full"]
    assert none["f1_gold"] == 0 and none["ci"] == [0, 0] and none["p"] == 1


def test_seeds_that_disagree_widen_the_interval() -> None:
    alike, apart = table({0: 0.3, 1: 0.3, 2: 0.3}), table({0: 0.0, 1: 0.3, 2: 0.6})
    widths = []
    for answers in (alike, apart):
        low, high = study.contrast(answers, "a", "b", n_boot=400)["full"]["ci"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_one_seed_gives_the_paired_interval_of_metrics() -> None:
    answers = table({0: 0.3})
    usable = [None if v == "NIL" else v for v in answers["b/0"]]
    one = study.contrast(answers, "a", "b", n_boot=500)["full"]
    same = metrics.compare(
        [*answers["code"]], [*answers["a/0"]], usable, patients=[*answers["subject_id"]], n_boot=500
    )["full"]
    assert one["f1_gold"] == pytest.approx(same["f1_gold"]) and one["ci"] == pytest.approx(
        same["ci"], abs=0.01
    )


def test_a_missing_arm_is_named() -> None:
    with pytest.raises(ValueError, match="no seed has both a and grpo"):
        study.contrast(table({0: 0.1}), "a", "grpo")
    with pytest.raises(ValueError, match="no arm is called magic"):
        study.run([0], ["magic"])


def test_holm() -> None:
    adjusted = study.holm({"x": 0.01, "y": 0.04, "z": 0.03})
    assert adjusted == pytest.approx({"x": 0.03, "z": 0.06, "y": 0.06})


def test_every_arm_starts_from_one_that_exists_and_the_core_answers_the_question() -> None:
    for arm in study.ARMS.values():
        assert arm.start is None or arm.start in study.ARMS
        assert len(arm.rewards) == len(arm.weights) and arm.taught in ("traces", "codes", "own")
        assert all(rewards.named(reward).__name__.endswith("_reward") for reward in arm.rewards)
    core = {name for name, arm in study.ARMS.items() if arm.core}
    assert core == {"sft", "grpo", "grpo-strict", "sft-codes", "sft-own"}


def test_few_seeds_get_a_wide_interval_and_a_stricter_one_beside_it() -> None:
    found = study.contrast(table({0: 0.0, 1: 0.3, 2: 0.6}), "a", "b", n_boot=2000)["full"]
    spread = np.std(found["per_seed"], ddof=1)
    assert found["t_ci"][0] == pytest.approx(
        found["f1_gold"] - 4.303 * spread / 3**0.5, abs=1e-3
    )  # Student's t
    half = (found["ci"][1] - found["ci"][0]) / 2
    assert 1.6 * spread / 3**0.5 < half < 4.303 * spread / 3**0.5


def test_the_interval_over_seeds_and_patients_covers_the_truth() -> None:
    """Both sources of luck are drawn anew each time; the true difference is that of ever more seeds and patients."""
    rng, inside, tries = np.random.default_rng(0), 0, 60
    truth = (
        0.5 * 0.3
    )  # in accuracy, which is what macro-F1 comes close to here: classes alike, errors spread evenly
    for _ in range(tries):
        answers = {}
        gold = rng.choice(CODES, 400)
        other = np.array([CODES[(CODES.index(g) + 1 + rng.integers(5)) % 6] for g in gold])
        for seed in range(5):
            right = rng.random(400) < 0.5
            gain = rng.normal(0.3, 0.1)
            answers[f"a/{seed}"] = np.where(right, gold, other)
            answers[f"b/{seed}"] = np.where(right | (rng.random(400) < gain), gold, other)
        whole = pd.DataFrame({"subject_id": np.arange(400).astype(str), "code": gold, **answers})
        low, high = study.contrast(whole, "a", "b", n_boot=200)["full"]["ci"]
        inside += low < truth < high
    assert inside / tries > 0.85


def test_verdicts_say_what_was_fixed_before_the_runs() -> None:
    rng, arms = (
        np.random.default_rng(1),
        {"sft": 0.5, "grpo": 0.7, "sft-codes": 0.8, "sft-own": 0.5},
    )
    gold = rng.choice(CODES, 800)
    said = {
        f"{arm}/{seed}": np.where(rng.random(800) < share, gold, rng.choice(CODES, 800))
        for arm, share in arms.items()
        for seed in range(3)
    }
    found = study.verdicts(
        pd.DataFrame({"subject_id": np.arange(800).astype(str), "code": gold, **said})
    )
    primary = found[found["kind"] == "primary"]
    assert list(primary["contrast"]) == ["grpo - sft"] and list(primary["level"]) == ["full"]
    assert bool(primary["holds"].iloc[0]) and np.isnan(primary["holm"].iloc[0])
    by_name = found.set_index(["contrast", "level"])
    assert (
        not by_name.loc[("sft-own - sft", "full"), "holds"]
        and by_name.loc[("sft-codes - sft", "full"), "holds"]
    )
    assert by_name.loc[("grpo - sft-codes", "full"), "difference"] < 0
    assert ("grpo-strict - sft", "full") not in by_name.index  # has not run
    secondary = found[found["kind"] == "secondary"]
    assert (secondary["holm"] >= secondary["p"]).all()
    assert secondary.set_index("level").loc[["category", "chapter"], "no_loss"].all()


def test_scores_are_those_of_metrics() -> None:
    answers = table({0: 0.3}).rename(columns={"a/0": "sft/0", "b/0": "grpo/0"})
    found = study.scores(answers).set_index("arm")
    said = [None if v == "NIL" else v for v in answers["grpo/0"]]
    assert (
        found.loc["grpo", "full"]
        == metrics.report([*answers["code"]], said, n_boot=0)["full"]["f1_gold"]
    )
    assert found.loc["grpo", "usable"] < 1 == found.loc["sft", "usable"]


def test_answers_to_other_cases_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [3, 4], "code": ["I10", "J189"]})
    monkeypatch.setattr(study, "test_cases", lambda: cases)
    monkeypatch.setattr(study, "folder", lambda: tmp_path)
    cases.assign(hadm_id=[3, 5], **{"sft/0": "I10"}).to_csv(
        tmp_path / "predictions.csv", index=False
    )
    with pytest.raises(ValueError, match="answers other cases than those of the test hospital"):
        study.run([0], ["sft"], tmp_path)
    with pytest.raises(FileNotFoundError, match="make study"):
        study.read(tmp_path / "nowhere")


def test_answers_of_arms_that_changed_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [3, 4], "code": ["I10", "J189"]})
    monkeypatch.setattr(study, "test_cases", lambda: cases)
    monkeypatch.setattr(study, "folder", lambda: tmp_path / "work")
    (tmp_path / "work").mkdir()
    cases.assign(**{"sft/0": "I10", "grpo/0": "I10"}).to_csv(
        tmp_path / "predictions.csv", index=False
    )
    study.run(
        [0], ["sft", "grpo"], tmp_path
    )  # nothing to do, but what the settings are is written down

    with (
        monkeypatch.context() as patch
    ):  # another text is no other setting, and a further arm is welcome
        patch.setitem(
            study.ARMS,
            "sft",
            dataclasses.replace(study.ARMS["sft"], about="other words", core=False),
        )
        patch.setitem(study.ARMS, "mine", study.Arm("mine"))
        study.run([0], ["sft"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(
            study.ARMS, "grpo", dataclasses.replace(study.ARMS["grpo"], weights=(0.1, 2.0))
        )
        with pytest.raises(ValueError, match="answers of grpo, made with other settings"):
            study.run([0], ["sft"], tmp_path)
    with monkeypatch.context() as patch:  # what GRPO starts from
        patch.setitem(study.ARMS, "sft", dataclasses.replace(study.ARMS["sft"], habit=0.1))
        with pytest.raises(ValueError, match="answers of sft, grpo, made with other settings"):
            study.run([0], ["sft"], tmp_path)
    tiny = profiles.get("tiny")
    for field, value, arms in (
        ("grpo_lr", 1.0, "grpo"),
        ("sft_lora_r", 8, "sft, grpo"),
        ("grpo_4bit", False, "sft, grpo"),
        ("admissions", 99, "sft, grpo"),
    ):
        monkeypatch.setitem(profiles.PROFILES, "tiny", dataclasses.replace(tiny, **{field: value}))
        with pytest.raises(ValueError, match=f"answers of {arms}, made with other settings"):
            study.run([0], ["sft"], tmp_path)


def test_another_size_is_another_hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "folder", lambda: tmp_path)
    monkeypatch.setattr(study, "TEST_ADMISSIONS", 5)
    found = []
    for admissions in (6, 8, 6):
        monkeypatch.setitem(
            profiles.PROFILES,
            "tiny",
            dataclasses.replace(profiles.get("tiny"), admissions=admissions),
        )
        found.append(study.hospitals())
    assert found[0] == found[2] and found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_a_study_whose_settings_another_one_changed_meanwhile_puts_nothing_down(
    tmp_path: Path, monkeypatch
) -> None:
    cases = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [3, 4], "code": ["I10", "J189"]})
    log = pd.DataFrame({"step": [1], "loss": [0.5]})

    def adapter(name: str, seed: int) -> Path:
        log.to_csv(tmp_path / "training_log.csv", index=False)
        design = course.read(tmp_path / "design.json")
        design["settings"][name]["longer"] = 3.0  # the other study's
        course.write(tmp_path / "design.json", design)
        return tmp_path

    monkeypatch.setattr(study, "test_cases", lambda: cases)
    monkeypatch.setattr(study, "folder", lambda: tmp_path)
    monkeypatch.setattr(study, "adapter", adapter)
    monkeypatch.setattr(study.models, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(study, "_answers", lambda *_: pd.DataFrame({"predicted": ["I10", None]}))
    with pytest.raises(ValueError, match="sft: another study changed its settings"):
        study.run([0], ["sft"], tmp_path)
    assert not (tmp_path / "predictions.csv").exists() and not (tmp_path / "runs.csv").exists()


def test_scores_come_in_the_order_of_arms_and_seeds_and_unknown_arms_are_left_out() -> None:
    answers = table({1: 0.3, 0: 0.2}).rename(
        columns=lambda c: c.replace("a/", "grpo/").replace("b/", "sft/")
    )
    answers["gone/0"] = "I10"
    found = study.scores(answers)
    assert [*zip(found["arm"], found["seed"], strict=True)] == [
        ("sft", 0),
        ("sft", 1),
        ("grpo", 0),
        ("grpo", 1),
    ]


def test_an_adapter_made_with_other_settings_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(name: str, seed: int, out: Path, start: Path | None) -> None:
        assert not out.with_name(f".{name}.work").exists(), "checkpoints of other settings are left"
        trained.append(name)
        out.mkdir()

    monkeypatch.setattr(study, "folder", lambda: tmp_path)
    monkeypatch.setattr(study, "train", train)
    for _ in range(2):
        study.adapter("grpo", 0)
    assert trained == ["sft", "grpo"]
    (tmp_path / "seed-0" / ".grpo.work" / "checkpoint-20").mkdir(parents=True)
    monkeypatch.setitem(study.ARMS, "grpo", dataclasses.replace(study.ARMS["grpo"], longer=2.0))
    study.adapter("grpo", 0)
    assert trained == ["sft", "grpo", "grpo"]
    assert (
        "seed 0, grpo: its settings have changed, so it is trained anew" in capsys.readouterr().out
    )
    assert (tmp_path / "seed-0" / "before.grpo").is_dir(), "hours of training are not thrown away"
    monkeypatch.setitem(study.ARMS, "sft", dataclasses.replace(study.ARMS["sft"], habit=0.0))
    study.adapter("grpo", 0)
    assert trained == ["sft", "grpo", "grpo", "sft", "grpo"]


def test_the_results_that_ship_were_made_with_the_settings_of_now() -> None:
    design = json.loads((study.RESULTS / "design.json").read_text())
    answered = {column.split("/")[0] for column in study.read() if "/" in column}
    assert {name: design["settings"][name] for name in answered} == {
        name: study.settings(name) for name in answered
    }


SMALL = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from helpers import course, profiles, rewards, study

kill_at = int(sys.argv[2])
profiles.PROFILES["tiny"] = replace(
    profiles.PROFILES["tiny"], admissions=150, max_new_tokens=8, sft_steps=6, sft_save_steps=2, sft_batch=2, grpo_steps=4,
    grpo_save_steps=2, grpo_prompts_per_step=2, grpo_num_generations=2, grpo_batch=4, grpo_grad_accum=1, grpo_max_completion=8)
study.TEST_ADMISSIONS, study.WATCHED, study.WATCH_EVERY = 40, 2, 2
study.cases_of = lambda split, seed, real=study.cases_of: real(split, seed).head(12)
# After so few steps no answer is usable and every honest reward is the same: this one has something to compare.
rewards.hierarchical_reward = lambda completions, code=None, **c: [sum(map(str(t).count, "aeiou")) / 20 for t in completions]
rewards.hierarchical_reward.__name__ = "hierarchical_reward"

def held(every, measure, held_out=course.HeldOut):
    callback = held_out(every, measure)
    real = callback.on_step_end
    def on_step_end(args, state, control, **kwargs):
        real(args, state, control, **kwargs)
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    callback.on_step_end = on_step_end
    return callback

course.HeldOut = held
study.run([0], ["sft", "grpo"], Path(sys.argv[1]))
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
    made = tmp_path / "killed" / "study" / "seed-0"
    before = (made / "sft" / "adapter_model.safetensors").stat().st_mtime_ns
    assert not (made / "grpo").exists() and [
        p.name for p in (made / ".grpo.work").glob("checkpoint-*")
    ] == ["checkpoint-2"]
    (
        made / ".grpo.work" / "checkpoint-3"
    ).mkdir()  # as a kill leaves it that comes while it is written
    assert list(study.read(tmp_path / "killed" / "results"))[3:] == ["sft/0"]
    again = study_run("killed")
    assert again.returncode == 0, again.stderr
    assert (made / "sft" / "adapter_model.safetensors").stat().st_mtime_ns == before
    for arm in ("sft", "grpo"):
        one, other = (
            small.weights(tmp_path / name / "study" / "seed-0" / arm)
            for name in ("whole", "killed")
        )
        assert all(np.array_equal(one[key], other[key]) for key in one), arm
    one, other = (small.weights(made / arm) for arm in ("sft", "grpo"))
    assert any(not np.array_equal(one[key], other[key]) for key in one), "GRPO trained nothing"
    for file in ("predictions.csv", "log-sft-0.csv"):
        tables = [pd.read_csv(tmp_path / name / "results" / file) for name in ("whole", "killed")]
        shared = [
            c for c in tables[0] if "runtime" not in c and "time" not in c and "num_tokens" not in c
        ]
        pd.testing.assert_frame_equal(*(t[shared] for t in tables))
    log = pd.read_csv(tmp_path / "killed" / "results" / "log-grpo-0.csv")
    assert list(log["step"]) == [0, 1, 2, 3, 4] and list(
        log.loc[log["eval_reward"].notna(), "step"]
    ) == [0, 2, 4]
