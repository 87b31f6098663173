"""Metrics against other people's implementations, the identities that must hold, and a simulation of the intervals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import simple_icd_10_cm as cm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from helpers import icd, metrics
from tests import notebook_code

GOLD = [
    "I21.01",
    "I21.02",
    "I21.4",
    "I50.21",
    "J18.9",
    "J18.9",
    "A41.9",
    "S72.001A",
    "H65.00",
    "C50.911",
]
PREDICTED = [
    "I21.01",
    "I21.01",
    "I21.4",
    "I50.9",
    "J18.9",
    "A41.9",
    "A41.9",
    "S72.001D",
    "H54.0",
    None,
]
CODES = [
    *GOLD,
    *PREDICTED[:-1],
    "I10",
    "I22.0",
    "J18.1",
    "B34.9",
    "D49.9",
    "D50.0",
    "H59.0",
    "H60.0",
    "T07.XXXA",
    "K99.9",
]
LIBRARY = [c for c in cm.get_all_codes(False) if len(c) > 4 and "-" not in c]
PAIRS = st.lists(
    st.tuples(st.sampled_from(CODES), st.sampled_from(CODES) | st.none()), min_size=1, max_size=40
)


def quick(gold: list, predicted: list, **keywords: object) -> dict:
    return metrics.report(gold, predicted, n_boot=0, **keywords)


def at(level: str, codes: list) -> list:
    up = {"chapter": icd.chapter, "category": icd.category, "full": icd.normalise}[level]
    return [str(up(code) or "NIL") for code in codes]


# ---- point estimates -------------------------------------------------------------------------------------------------


def test_known_vector() -> None:
    r = metrics.report(GOLD, PREDICTED)
    expected = {
        "chapter": (0.7, 0.5556, 0.4167, 6, 8),
        "category": (0.7, 0.6190, 0.4815, 7, 9),
        "full": (0.4, 0.3333, 0.2308, 9, 13),
    }
    for level, values in expected.items():
        found = [
            r[level][key]
            for key in ("accuracy", "f1_gold", "f1_union", "n_classes", "n_classes_union")
        ]
        assert found == pytest.approx(values, abs=5e-5)
        for value, interval in (("f1_gold", "ci"), ("accuracy", "accuracy_ci")):
            low, high = r[level][interval]
            assert 0 <= low <= r[level][value] <= high <= 1
    assert (r["hp"], r["hr"], r["hf"], r["usable"], r["n"]) == pytest.approx(
        (18 / 27, 18 / 30, 0.6316, 0.9, 10), abs=5e-5
    )
    assert r["tree_distance"] == pytest.approx(sum([0, 2, 0, 3, 0, 8, 0, 2, 9]) / 9)
    assert (
        r["full"]["median_support"] == 1
        and r["full"]["f1_min10"] is None
        and r["full"]["n_classes_min10"] == 0
    )
    json.dumps(r, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_agrees_with_scikit_learn(pairs: list) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    r = quick(gold, predicted)
    for level in metrics.LEVELS:
        g, p = at(level, gold), at(level, predicted)
        own, keywords = r[level], {"zero_division": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert own["f1_gold"] == pytest.approx(
                sk.f1_score(g, p, labels=sorted(set(g)), average="macro", **keywords)
            )
            assert own["f1_union"] == pytest.approx(sk.f1_score(g, p, average="macro", **keywords))
            assert own["weighted_f1"] == pytest.approx(
                sk.f1_score(g, p, average="weighted", **keywords)
            )
            assert own["accuracy"] == pytest.approx(sk.accuracy_score(g, p))
            assert own["f1_gold"] == pytest.approx(metrics.macro_f1(g, p))


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_agrees_with_hiclass(pairs: list) -> None:
    from hiclass.metrics import (
        f1,
        precision,
        recall,
    )  # labels need a prefix for each level, or equal names collapse

    answered = [(g, p) for g, p in pairs if p is not None]
    if not answered:
        return
    g, p = (
        np.array(
            [
                [f"{level}:{x}" for level, x in zip(metrics.LEVELS, row, strict=True)]
                for row in zip(*(at(level, codes) for level in metrics.LEVELS), strict=True)
            ]
        )
        for codes in zip(*answered, strict=True)
    )
    r = quick(*zip(*answered, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (r["hp"], r["hr"], r["hf"]) == pytest.approx(
            (precision(g, p), recall(g, p), f1(g, p))
        )


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.randoms())
def test_identities(pairs: list, random: object) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    r = quick(gold, predicted, train_codes=gold)
    accuracy = [r[level]["accuracy"] for level in metrics.LEVELS]
    assert r["hr"] == pytest.approx(np.mean(accuracy)) and accuracy == sorted(
        accuracy, reverse=True
    )
    assert r["usable"] < 1 or r["hp"] == pytest.approx(r["hr"])
    assert r["hf"] == pytest.approx(2 * r["hp"] * r["hr"] / (r["hp"] + r["hr"]) if r["hr"] else 0)
    for level in metrics.LEVELS:
        x = r[level]
        assert x["f1_seen"] == x["f1_gold"] and x["n_classes_seen"] == x["n_classes"]
        assert x["f1_union"] * x["n_classes_union"] == pytest.approx(x["f1_gold"] * x["n_classes"])
        assert x["f1_min10"] is None or x["n_classes_min10"] > 0
    assert (r["tree_distance"] == 0) == (r["usable"] > 0 and r["full"]["accuracy"] == r["usable"])
    random.shuffle(pairs)  # type: ignore[attr-defined]
    shuffled = quick(*map(list, zip(*pairs, strict=True)), train_codes=gold)
    assert all(
        shuffled[level] == r[level] for level in metrics.LEVELS
    )  # the order of the cases does not matter


def test_perfect_and_hopeless() -> None:
    r = metrics.report(GOLD, GOLD, train_codes=["I21.01", "Z00.00"])
    assert r["hf"] == r["usable"] == 1 and r["tree_distance"] == 0
    for level in metrics.LEVELS:
        x = r[level]
        assert x["f1_gold"] == x["f1_union"] == x["f1_seen"] == x["accuracy"] == x["coverage"] == 1
        assert x["ci"] == x["accuracy_ci"] == [1, 1] and x["n_classes_seen"] == 1
    r = metrics.report(GOLD, [None] * len(GOLD))
    assert (r["usable"], r["hp"], r["hr"], r["hf"], r["tree_distance"]) == (0, 0, 0, 0, None)
    for level in metrics.LEVELS:
        x = r[level]
        assert x["f1_gold"] == x["f1_union"] == x["accuracy"] == x["coverage"] == 0
        assert x["ci"] == [0, 0] and x["n_classes_union"] == x["n_classes"] + 1
    json.dumps(r, allow_nan=False)


@pytest.mark.parametrize(
    "junk", [None, math.nan, "", "NIL", "Sepsis", "410.71", 7, "I10 and J18.9", pd.NA]
)
def test_an_unusable_answer_is_nil_at_every_level(junk: object) -> None:
    assert quick(GOLD, [*PREDICTED[:-1], junk]) == quick(GOLD, PREDICTED)


def test_codes_count_by_shape_however_written() -> None:
    assert (
        quick(["i21.01", "K99.9", "I2101ZZ"], [" I2101 ", "k999", "I21.01ZZ"])["full"]["accuracy"]
        == 1
    )
    assert (
        quick(["I21.01"], ["I21"])["category"]["accuracy"] == 1
        and quick(["I21.01"], ["I21"])["full"]["accuracy"] == 0
    )
    frame = pd.DataFrame({"gold": GOLD, "predicted": PREDICTED})
    assert (
        quick(frame.gold, frame.predicted)
        == quick(np.array(GOLD), PREDICTED)
        == quick(tuple(GOLD), iter(PREDICTED))
    )


def test_f1_seen_and_min10() -> None:
    gold = ["I10"] * 10 + ["J18.9"] * 9 + ["A41.9"]
    r = metrics.report(gold, ["I10"] * 20, train_codes=["J18.9", "A41.9"])["full"]
    assert r["f1_min10"] == pytest.approx(20 / 30) and r["n_classes_min10"] == 1
    assert (
        r["f1_seen"] == 0
        and r["n_classes_seen"] == 2
        and r["coverage"] == pytest.approx(1 / 3)
        and r["median_support"] == 9
    )
    assert metrics.report(gold, gold, train_codes=[])["full"]["f1_seen"] is None


def test_head_middle_tail() -> None:
    train = ["I10"] * 50 + ["J18.9"] * 20 + ["I21.01", "I21.02"] * 10 + ["A41.9"] * 10
    gold = ["I10", "I10", "J18.9", "I21.01", "I21.02", "A41.9", "Z00.00"]
    bands = metrics.head_middle_tail(
        gold, ["I10", None, "I10", "I21.01", "I21.01", "A41.9", "Z00.00"], train
    )
    assert list(bands) == ["head", "middle", "tail", "unseen"]
    assert [(v["n_classes"], v["n_cases"]) for v in bands.values()] == [
        (1, 2),
        (1, 1),
        (3, 3),
        (1, 1),
    ]
    assert [v["f1_gold"] for v in bands.values()] == pytest.approx([0.5, 0, (2 / 3 + 0 + 1) / 3, 1])
    assert [v["accuracy"] for v in bands.values()] == pytest.approx([0.5, 0, 2 / 3, 1])
    r = quick(gold, gold)["full"]  # bands partition the gold classes
    assert sum(v["n_classes"] for v in bands.values()) == r["n_classes"]
    frequent = metrics.head_middle_tail(gold[:2], gold[:2], train, n_boot=50)
    assert frequent["head"]["n_cases"] == 2 and frequent["middle"]["f1_gold"] is None
    assert metrics.head_middle_tail(gold, gold, [])["unseen"]["n_cases"] == 7


# ---- intervals and tests ---------------------------------------------------------------------------------------------


def hospital(
    rng: np.random.Generator, patients: int, codes: list[str], skill: np.ndarray
) -> tuple[list, list, np.ndarray]:
    """Cases of a long-tailed hospital: patients come back, often with the same code; wrong answers are other codes."""
    share = 1 / np.arange(1, len(codes) + 1)
    share /= share.sum()
    unit = np.repeat(np.arange(patients), 1 + rng.poisson(0.5, patients))
    usual, other = (
        rng.choice(len(codes), patients, p=share),
        rng.choice(len(codes), len(unit), p=share),
    )
    gold = np.where(rng.random(len(unit)) < 0.4, usual[unit], other)
    right = rng.random(len(unit)) < skill[gold]
    predicted = np.where(right, gold, rng.choice(len(codes), len(unit), p=share))
    return [codes[i] for i in gold], [codes[i] for i in predicted], unit


def test_coverage_of_the_intervals() -> None:
    """The 95 % interval holds the expected score on a test set of this size in about 95 % of simulated test sets."""
    rng = np.random.default_rng(1)
    codes = LIBRARY[::300][:250]
    skill = rng.beta(3, 2, len(codes))
    draws = [hospital(rng, 400, codes, skill) for _ in range(500)]
    scores = [quick(g, p) for g, p, _ in draws]
    keys = [
        (level, *names)
        for level in metrics.LEVELS
        for names in (("f1_gold", "ci"), ("accuracy", "accuracy_ci"))
    ]
    truth = {key: np.mean([s[key[0]][key[1]] for s in scores]) for key in keys}
    hits = dict.fromkeys(keys, 0)
    for g, p, unit in draws[:200]:
        r = metrics.report(g, p, patients=unit, n_boot=200)
        for level, score, interval in keys:
            low, high = r[level][interval]
            assert low <= r[level][score] <= high
            hits[level, score, interval] += low <= truth[level, score, interval] <= high
    assert all(0.90 <= k / 200 <= 0.995 for k in hits.values()), hits


def test_p_values_under_the_null_and_power() -> None:
    rng = np.random.default_rng(2)
    codes = LIBRARY[::1500]
    skill, p_values, found = np.full(len(codes), 0.6), [], 0
    for _ in range(150):
        gold, a, unit = hospital(rng, 200, codes, skill)
        b = [g if rng.random() < 0.6 else codes[rng.integers(len(codes))] for g in gold]
        c = [g if rng.random() < 0.6 else codes[rng.integers(len(codes))] for g in gold]
        p_values.append(metrics.compare(gold, b, c, patients=unit, n_boot=200)["full"]["p"])
        found += (
            metrics.compare(
                gold,
                b,
                [g if rng.random() < 0.85 else x for g, x in zip(gold, b, strict=True)],
                patients=unit,
                n_boot=200,
            )["full"]["p"]
            < 0.05
        )
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    assert 0.35 <= np.mean(p_values) <= 0.65 and found == 150


def test_patients_who_come_back_widen_the_interval() -> None:
    gold = GOLD * 40
    right = np.repeat(
        np.random.default_rng(0).random(40) < 0.5, 10
    )  # a patient is read well or badly as a whole
    predicted = [g if ok else "Z99.89" for g, ok in zip(gold, right, strict=True)]
    alone = np.diff(metrics.report(gold, predicted)["full"]["accuracy_ci"])
    together = np.diff(
        metrics.report(gold, predicted, patients=np.repeat(np.arange(40), 10))["full"][
            "accuracy_ci"
        ]
    )
    assert together > 2 * alone


def test_interval_of_accuracy_is_that_of_the_binomial() -> None:
    gold, predicted = ["I10"] * 1000, ["I10"] * 700 + ["J18.9"] * 300
    low, high = metrics.report(gold, predicted, n_boot=2000)["full"]["accuracy_ci"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.7 * 0.3 / 1000), rel=0.1)
    odd = metrics.report(gold[:3] + ["J18.9"] * 4, ["I10"] * 7, patients=list("aabbccc"))["full"]
    assert odd["accuracy_ci"][0] < odd["accuracy"] < odd["accuracy_ci"][1]


def test_the_engine_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    gold, predicted, unit = hospital(rng, 61, CODES, np.full(len(CODES), 0.6))
    silent = [None] * len(
        gold
    )  # scores 0 in every resample, so the difference is the other model's
    boot = {"patients": unit, "n_boot": 40, "seed": 5}
    point, fast = metrics.differences(gold, silent, predicted, **boot)["category"]
    half, stream, slow = np.arange(61) < 30, np.random.default_rng(5), []
    g, p = at("category", gold), at("category", predicted)
    for weights in stream.permuted(np.tile(half.astype(np.float32), (40, 1)), axis=1):
        rows = np.flatnonzero(weights[unit])
        slow.append(metrics.macro_f1([g[i] for i in rows], [p[i] for i in rows]))
    assert point == pytest.approx(metrics.macro_f1(g, p))
    assert fast == pytest.approx((np.array(slow) - np.mean(slow)) * math.sqrt(30 / 31), abs=1e-6)


def test_the_interval_of_a_mean_is_that_of_the_report() -> None:
    rng = np.random.default_rng(4)
    gold, predicted, unit = hospital(rng, 80, CODES, np.full(len(CODES), 0.6))
    boot = {"n_boot": 200, "seed": 3}
    r = metrics.report(gold, predicted, patients=unit, **boot)
    for level in metrics.LEVELS:
        right = np.equal(at(level, gold), at(level, predicted))
        interval = metrics.mean_interval(right, unit, **boot)
        assert interval == pytest.approx(r[level]["accuracy_ci"], abs=1e-6)
    gains = rng.normal(0.3, 1, len(unit))
    low, high = metrics.mean_interval(gains, unit)
    assert gains.min() < low < gains.mean() < high < gains.max()
    low, high = metrics.mean_interval(gains - 10, unit)
    assert low < gains.mean() - 10 < high, "not cut at 0: these are no shares"
    assert np.isnan(metrics.mean_interval(gains, np.zeros(len(gains)))).all(), "one patient"
    assert np.isnan(metrics.mean_interval(gains, unit, n_boot=0)).all()
    assert metrics.mean_interval([1, 1, 1]).tolist() == [1, 1]


@settings(max_examples=30, deadline=None)
@given(PAIRS, st.integers(0, 3))
def test_compare_is_antisymmetric(pairs: list, seed: int) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    other = predicted[::-1]
    forth, back = (
        metrics.compare(gold, *m, n_boot=50, seed=seed)
        for m in ((predicted, other), (other, predicted))
    )
    a, b = quick(gold, predicted), quick(gold, other)
    same = metrics.compare(gold, predicted, predicted, n_boot=50)
    for level in metrics.LEVELS:
        f, r = forth[level], back[level]
        assert (
            f["f1_gold"]
            == pytest.approx(b[level]["f1_gold"] - a[level]["f1_gold"])
            == -r["f1_gold"]
        )
        assert f["accuracy"] == pytest.approx(b[level]["accuracy"] - a[level]["accuracy"])
        assert same[level]["f1_gold"] == 0 and same[level]["mcnemar_p"] == 1
        if len(gold) > 1:
            assert (
                f["ci"] == pytest.approx([-r["ci"][1], -r["ci"][0]], abs=1e-5) and f["p"] == r["p"]
            )
            assert same[level]["ci"] == [0, 0] and same[level]["p"] == 1
            assert 0 < f["p"] <= 1
        assert f["mcnemar_p"] == r["mcnemar_p"]
    json.dumps(forth, allow_nan=False)


def test_same_seed_same_numbers() -> None:
    assert metrics.report(GOLD, PREDICTED, seed=1) == metrics.report(GOLD, PREDICTED, seed=1)
    assert (
        metrics.report(GOLD, PREDICTED, seed=1)["full"]["ci"]
        != metrics.report(GOLD, PREDICTED, seed=2)["full"]["ci"]
    )


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (3, 11), (30, 12), (200, 260)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    from scipy.stats import binomtest

    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    assert metrics.mcnemar(a, b) == pytest.approx(expected)


# ---- several samples for each case -----------------------------------------------------------------------------------

SAMPLES = [
    ["I2101", "I2101", "I2102", None],
    [None, None, None, None],
    ["J189", "A419", "A419", "J189"],
    ["I10"] * 4,
]


def test_votes_and_agreement() -> None:
    vote = notebook_code.function("06", "majority_vote")
    agree = notebook_code.function("06", "agreement", majority_vote=vote)
    assert [vote(each) for each in SAMPLES] == ["I2101", None, "J189", "I10"]
    assert [agree(each) for each in SAMPLES] == [0.5, 0, 0.5, 1]


# ---- tidy tables for the figures -------------------------------------------------------------------------------------


def test_outcomes_put_every_case_in_one_kind() -> None:
    cases = pd.DataFrame({"subject_id": range(6), "hadm_id": range(6), "code": "I2101"})
    answers = ["I21.01", "I2102", "I509", "J189", None, "1", "J189"]
    table = pd.DataFrame({"hadm_id": [*range(6), 0], "sample": [0] * 6 + [1], "predicted": answers})
    frame = metrics.outcomes(cases, table)
    assert frame["kind"].tolist() == [*metrics.KINDS, "unusable"]
    assert frame["predicted"].tolist() == ["I2101", "I2102", "I509", "J189", None, None]
    with pytest.raises(ValueError, match="share no hadm_id"):
        metrics.outcomes(cases, table.assign(hadm_id=table["hadm_id"] + 100))


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Outcomes of two models on the same cases."""
    rng = np.random.default_rng(6)
    gold, sft, unit = hospital(rng, 150, CODES, np.full(len(CODES), 0.6))
    grpo = [g if rng.random() < 0.3 else p for g, p in zip(gold, sft, strict=True)]
    sft = [p if rng.random() < 0.95 else None for p in sft]
    codes = [icd.normalise(code) for code in gold]
    cases = pd.DataFrame({"subject_id": unit, "hadm_id": range(len(gold)), "code": codes})
    return {
        model: metrics.outcomes(cases, cases.assign(predicted=predicted))
        for model, predicted in {"sft": sft, "grpo": grpo}.items()
    }


BOOT = {"n_boot": 100, "seed": 2}


def test_the_intervals_of_the_figures_are_those_of_the_report(tables: dict) -> None:
    """One bootstrap: what a figure shows is what the table says."""
    sft, grpo = tables.values()
    patients = {"patients": sft["subject_id"], **BOOT}
    r = metrics.report(sft["gold"], sft["predicted"], **patients)
    scope = {"pd": pd, "metrics": metrics, "resampling": BOOT}
    table = notebook_code.function("06", "how_far_up", **scope)(tables)
    reached = table.set_index(["model", "kind"]).loc["sft"]
    for level in metrics.LEVELS:
        assert reached.loc[level, "reached"] == pytest.approx(r[level]["accuracy"])
        interval = reached.loc[level, ["low", "high"]].tolist()
        assert interval == pytest.approx(r[level]["accuracy_ci"], abs=1e-6)
    assert reached["share"].sum() == pytest.approx(1) == reached.loc["unusable", "reached"]
    heart = [table[table["gold"].str.startswith("I")] for table in (sft, grpo)]
    row = metrics.chapter_differences(*heart, **BOOT).iloc[0]
    c = metrics.compare(
        heart[0]["gold"],
        *(table["predicted"] for table in heart),
        patients=heart[0]["subject_id"],
        **BOOT,
    )["full"]
    scores = [c["f1_gold"], *c["ci"]]
    assert row[["difference", "low", "high"]].tolist() == pytest.approx(scores, abs=1e-6)


def test_differences_by_chapter_are_paired_and_on_shared_cases(tables: dict) -> None:
    sft, some = tables["sft"], tables["grpo"].iloc[::2]
    table = metrics.chapter_differences(sft, some, **BOOT)
    assert table["chapter"].tolist() == sorted({icd.chapter(code) for code in some["gold"]})
    assert table["cases"].sum() == len(some)
    assert (table["difference"] == table["after"] - table["before"]).all()
    assert (table["low"].isna() == (table["cases"] < 10)).all(), (
        "of a few cases there is no telling"
    )
    same = metrics.chapter_differences(some, some, **BOOT)
    enough = same[same["cases"] >= 10]
    assert not same["difference"].any() and not enough[["low", "high"]].any(axis=None)


def test_confused_pairs_count_usable_wrong_answers() -> None:
    cases = pd.DataFrame(
        {"subject_id": range(10), "hadm_id": range(10), "code": ["I2101"] * 6 + ["J189"] * 4}
    )
    answers = ["I2102"] * 4 + ["I2101", None] + ["J441"] * 2 + ["J189"] * 2
    outcomes = metrics.outcomes(cases, cases.assign(predicted=answers))
    scope = {"np": np, "pd": pd, "metrics": metrics, "resampling": BOOT}
    confused_pairs = notebook_code.function("06", "confused_pairs", **scope)
    pairs = confused_pairs(outcomes)
    assert pairs[["gold", "predicted", "cases", "of"]].values.tolist() == [
        ["I2101", "I2102", 4, 6],
        ["J189", "J441", 2, 4],
    ]
    assert (pairs["low"] <= pairs["cases"]).all() and (pairs["cases"] <= pairs["high"]).all()
    assert (pairs["high"] <= pairs["of"]).all()
    assert confused_pairs(outcomes[outcomes["kind"] == "full"]).empty
    assert len(confused_pairs(outcomes, top=1)) == 1


def test_agreement_and_accuracy_by_group() -> None:
    table = pd.DataFrame(
        {
            "subject_id": range(5),
            "agreement": [0.5, 0.5, 1, 1, 1],
            "right": [True, False, True, True, False],
        }
    )
    scope = {"pd": pd, "metrics": metrics, "resampling": {"n_boot": 0}}
    mean_by = notebook_code.function("06", "mean_by", **scope)
    curve = mean_by(table, ["agreement"], "right")
    assert curve[["agreement", "right", "n"]].values.tolist() == [
        [0.5, 0.5, 2],
        [1, pytest.approx(2 / 3), 3],
    ]
    two = mean_by(table.assign(model="sft"), ["model", "agreement"], "right")
    assert two.columns.tolist() == ["model", "agreement", "right", "low", "high", "n"]
    assert two["low"].isna().all()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.report(GOLD, PREDICTED[:-1]), "unequal lengths"),
        (lambda: metrics.report(GOLD, PREDICTED, patients=[1, 2]), "unequal lengths"),
        (lambda: metrics.report([], []), "no cases"),
        (lambda: metrics.report(["I10", None], ["I10", "I10"]), "gold, row 1"),
        (lambda: metrics.report([math.nan], ["I10"]), "gold, row 0"),
        (lambda: metrics.report(["Sepsis"], ["I10"]), "'Sepsis' is not"),
        (lambda: metrics.report("I10", ["I10"]), "one string"),
        (lambda: metrics.report(["I10"], "I10"), "one string"),
        (lambda: metrics.report(["I10"], ["I10"], patients=[None]), "patients, row 0"),
        (lambda: metrics.report(["I10"], ["I10"], patients=[math.nan]), "patients, row 0"),
        (
            lambda: metrics.report(["I10"], ["I10"], patients=pd.array([pd.NA], "Int64")),
            "patients, row 0",
        ),
        (lambda: metrics.report(["I10"], ["I10"], train_codes=["x"]), "train_codes, row 0"),
        (lambda: metrics.report(["I10"], ["I10"], n_boot=-1), "n_boot"),
        (lambda: metrics.compare(GOLD, PREDICTED, PREDICTED[1:]), "'b': 9"),
        (lambda: metrics.mean_interval([], []), "no cases"),
        (lambda: metrics.mean_interval([1.0], [1, 2]), "unequal lengths"),
        (lambda: metrics.mean_interval([1.0, 0.0], n_boot=-1), "n_boot"),
        (lambda: metrics.mcnemar([True], []), "unequal lengths"),
    ],
)
def test_bad_input_gets_a_clear_error(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_one_patient_has_no_interval() -> None:
    r = metrics.report(GOLD, PREDICTED, patients=[1] * 10)["full"]
    assert r["ci"] == r["accuracy_ci"] == [None, None] and r["f1_gold"] == pytest.approx(1 / 3)
    c = metrics.compare(GOLD, PREDICTED, GOLD, patients=[1] * 10)["full"]
    assert c["ci"] == [None, None] and c["p"] is None


CASES = pd.DataFrame(
    {"hadm_id": [3, 1, 2], "subject_id": [30, 10, 10], "code": ["I10", "J189", "A419"]}
)
ANSWERS = pd.DataFrame(
    {
        "hadm_id": [1, 2, 3, 3, 2, 1],
        "sample": [1, 0, 1, 0, 1, 0],
        "predicted": ["J189", None, "I2101", "I10", "A419", "J181"],
    }
)


def test_align() -> None:
    gold, samples, patients = metrics.align(CASES, ANSWERS)
    assert (gold, patients) == (["I10", "J189", "A419"], [30, 10, 10])
    assert samples == [["I10", "I2101"], ["J181", "J189"], [None, "A419"]]
    one = ANSWERS[ANSWERS["sample"] == 0].drop(columns="sample")
    assert metrics.align(CASES, one)[1] == [["I10"], ["J181"], [None]]


@pytest.mark.parametrize(
    ("cases", "answers", "message"),
    [
        (CASES.drop(columns="code"), ANSWERS, "cases: a column"),
        (CASES, ANSWERS.drop(columns="predicted"), "predictions: a column"),
        (pd.concat([CASES, CASES]), ANSWERS, "occur twice"),
        (CASES, pd.concat([ANSWERS, ANSWERS]), "6 rows of predictions repeat hadm_id and sample"),
        (CASES, ANSWERS.drop(columns="sample"), "repeat hadm_id"),
        (CASES[:2], ANSWERS, "2 predictions are for admissions that are not in cases"),
        (CASES, ANSWERS[ANSWERS.hadm_id != 2], "1 cases have no prediction, first hadm_id 2"),
    ],
)
def test_align_refuses_what_does_not_match(
    cases: pd.DataFrame, answers: pd.DataFrame, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.align(cases, answers)


# ---- speed and weight ------------------------------------------------------------------------------------------------


def test_a_thousand_resamples_in_two_seconds() -> None:
    rng = np.random.default_rng(0)
    codes = LIBRARY[::30][:2000]
    gold, predicted, unit = hospital(rng, 6700, codes, np.full(len(codes), 0.5))
    quick(gold, predicted)  # loads the library of codes
    start = time.process_time()
    metrics.report(gold[:10_000], predicted[:10_000], patients=unit[:10_000])
    assert time.process_time() - start < 2


def test_no_torch_and_no_figure_library() -> None:
    code = (
        "import sys; from helpers import metrics; metrics.report(['I10'], ['I10']);"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
