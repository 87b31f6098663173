"""The study's bookkeeping: what a contrast is, what is resumed, what is kept. Training itself is tested where it is slow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers import metrics, study

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
        out[f"b/{seed}"] = np.where(right | (rng.random(n) < share), gold, np.where(rng.random(n) < 0.1, "NIL", wrong))
    return out


def test_a_contrast_averages_paired_differences_over_seeds() -> None:
    found = study.contrast(table({0: 0.3, 1: 0.3, 2: 0.3}), "a", "b", n_boot=300)["full"]
    assert found["seeds"] == 3 and found["f1_gold"] == pytest.approx(np.mean(found["per_seed"]), abs=1e-3)
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
    same = metrics.compare([*answers["code"]], [*answers["a/0"]], usable, patients=[*answers["subject_id"]], n_boot=500)["full"]
    assert one["f1_gold"] == pytest.approx(same["f1_gold"]) and one["ci"] == pytest.approx(same["ci"], abs=0.01)


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
    core = {name for name, arm in study.ARMS.items() if arm.core}
    assert core == {"sft", "grpo", "grpo-strict", "sft-codes", "sft-own"}
