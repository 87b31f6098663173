"""Checkers of notebook 6: macro-F1 on paper, a paired interval, and where a chapter's errors go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from exercises.core import (
    WRONG,
    Decoy,
    Stop,
    Trial,
    Verdict,
    call,
    call_on_run,
    checker,
    compare,
    number,
    numbers,
    require_filled,
    right,
    shown,
    table,
    try_out,
    verdict,
)
from helpers import icd, metrics

GOLD = ("I21.4", "I21.4", "I21.4", "J18.9", "A41.9", "K92.2")
PREDICTED = ("I21.4", "I21.4", None, "J18.9", "J18.9", "N39.0")


@checker("6.1")
def f1_by_hand(f1: Any) -> Verdict:
    """f1: {"f1_gold", "f1_union"} of the six cases at full code."""
    require_filled(f1, "f1")
    scores = metrics.report(GOLD, PREDICTED, n_boot=0)["full"]
    usable = [(g, p) for g, p in zip(GOLD, PREDICTED, strict=True) if p]
    without_none = metrics.report(*zip(*usable, strict=True), n_boot=0)["full"]
    total = scores["f1_gold"] * scores["n_classes"]
    common = [
        Decoy(scores["accuracy"], "That is the accuracy. Compute one F1 for each class first."),
        Decoy(
            scores["weighted_f1"],
            "You weight the classes by their cases. In macro-F1 each class counts the same.",
        ),
        Decoy(
            2 * 3 / (len(GOLD) + len(usable)),
            "That is micro-F1: counts of all classes together. Compute one F1 for each class.",
        ),
    ]
    drops = (
        "You leave out the case without a usable answer. It is an error: I21.4 has three cases, "
        "and one of them is missed."
    )
    predicted_only = total / len({p for p in PREDICTED if p})
    decoys = {
        "f1_gold": [
            Decoy(without_none["f1_gold"], drops),
            Decoy(
                predicted_only,
                "You average over the classes that were predicted. Average over the classes of "
                "the truth: a class that is never predicted counts with 0.",
            ),
            Decoy(
                total / (scores["n_classes"] + 1),
                "You count N39.0 as a class. It occurs in the answers only: that is f1_union.",
            ),
            Decoy(scores["f1_union"], "That is f1_union: it also counts N39.0 and 'no answer'."),
            *common,
        ],
        "f1_union": [
            Decoy(without_none["f1_union"], drops),
            Decoy(
                total / (scores["n_classes"] + 1),
                "One class is missing: 'no usable answer' counts as one here.",
            ),
            Decoy(scores["f1_gold"], "That is f1_gold: N39.0 and 'no answer' are classes as well."),
            Decoy(predicted_only, "The union holds the classes of the truth and of the answers."),
            *common,
        ],
    }
    otherwise = (
        "F1 of a class is 2 × hits / (cases with this code + answers with this code). I21.4: 2 "
        "hits, 3 cases, 2 answers. Which classes go into the mean, and with which F1?"
    )
    complaints = []
    for name, known in decoys.items():
        if name not in f1:
            raise Stop(WRONG, f"{name!r} is missing. Keep the names of the cell.")
        complaints += compare(
            number(f1[name], name),
            scores[name],
            known,
            name=name,
            otherwise=otherwise,
            tolerance=0.004,
        )
    return verdict(
        complaints,
        "The same answers, two scores: a macro-F1 without its list of classes is not a result.",
    )


# ------------------------------------------------------------------------------- 6.2


def made_outcomes(seed: int = 0, patients: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Invented: right or wrong for two models, and the patient of each case. A patient's cases are
    alike, and the two models often agree."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, patients)
    patient = np.repeat(np.arange(patients), counts)
    easy = np.repeat(rng.random(patients) < 0.6, counts)  # what both models get right
    a = np.where(rng.random(len(patient)) < 0.03, ~easy, easy)
    gains = np.repeat(rng.random(patients) < 0.15, counts)  # patients whom only model b reads well
    b = np.where(gains, True, a)
    return a, b, patient


def half_width(deviations: np.ndarray) -> float:
    return float(1.96 * deviations.std())


def widths(a: np.ndarray, b: np.ndarray, patient: np.ndarray) -> dict[str, float]:
    """Half the width of the 95 % interval of accuracy(b) − accuracy(a): the right one, and those of
    the usual mistakes, from variance formulas."""
    n = len(a)

    def by_patient(values: np.ndarray) -> float:
        sums = pd.Series(values - values.mean()).groupby(patient).sum()
        return float(((sums**2).sum()) ** 0.5 / n)

    gain = b.astype(float) - a.astype(float)
    paired = by_patient(gain)
    unpaired = (by_patient(a.astype(float)) ** 2 + by_patient(b.astype(float)) ** 2) ** 0.5
    return {
        "right": 1.96 * paired,
        "cases": 1.96 * float(gain.std()) / n**0.5,
        "unpaired": 1.96 * unpaired,
        "ninety": 1.645 * paired,
        "one sigma": paired,
    }


WIDTHS = {
    "cases": "You resample cases. Two cases of one patient are not independent, so the interval is "
    "too narrow. Draw patients, and take all their cases.",
    "unpaired": "You resample the two models apart. They answered the same cases: draw once, score "
    "both on this draw, and take the difference.",
    "ninety": "Your interval is as wide as a 90 % interval. For 95 % take the quantiles 0.025 and "
    "0.975.",
    "one sigma": "Your interval is as wide as one standard error on each side. For 95 % take the "
    "quantiles 0.025 and 0.975 of the resamples.",
}


def complaints_about_interval(
    interval: Any, a: np.ndarray, b: np.ndarray, patient: np.ndarray, where: str
) -> list[str]:
    """Complaints about an interval, by its centre and its width."""
    low, high = numbers(interval, 2, "the interval")
    if not np.isfinite(high - low):
        return [f"{where}: [{low:+.3f}, {high:+.3f}] is no interval. Leave missing values out."]
    if low > high:
        return [f"{where}: the lower end {low:+.3f} is above the upper end {high:+.3f}."]
    known = widths(a, b, patient)
    difference = float(b.mean() - a.mean())
    centre, half = (low + high) / 2, (high - low) / 2
    size = known["right"]
    if abs(centre + difference) < 0.4 * size < abs(centre - difference):
        return [
            f"{where}: the sign is turned. The second model minus the first: {difference:+.3f}."
        ]
    if abs(centre - 100 * difference) < 40 * size and abs(difference) > 0.01 and half > 10 * size:
        return [f"{where}: you give points. Give shares, such as {difference:.3f}."]
    if abs(centre - difference) > 0.4 * size:
        return [
            f"{where}: the interval lies around {centre:+.3f}, the difference of the accuracies is "
            f"{difference:+.3f}. Put the quantiles around the difference itself."
        ]
    if half < 0.02 * size:
        return [f"{where}: the interval is a point. Do all your resamples draw the same patients?"]
    nearest = min(known, key=lambda name: abs(np.log(half / known[name])))
    if nearest == "right" or abs(half / size - 1) < 0.12:
        return []
    shape = (
        f"{where}: [{low:+.3f}, {high:+.3f}] is {half / size:.2f} times as wide as it should be."
    )
    if abs(half / known[nearest] - 1) < 0.15:
        return [f"{shape} {WIDTHS[nearest]}"]
    return [f"{shape} Draw patients with all their cases, score both models, take the difference."]


@checker("6.2")
def own_interval(function: Callable) -> Verdict:
    """paired_interval(right_a, right_b, patients) -> (low, high)."""
    made = made_outcomes()
    interval = call(function, *made)
    complaints = complaints_about_interval(interval, *made, "On invented answers")
    if complaints:
        return verdict(complaints)
    cases = table("cases", "cases.parquet")[["hadm_id", "subject_id", "code"]]
    named = {
        name: table(f"answers/{name}", "answers.parquet").set_index("hadm_id")["predicted"]
        for name in ("sft", "grpo")
    }
    test = cases[cases["hadm_id"].isin(named["sft"].index)]
    a, b = (
        (test["hadm_id"].map(named[name]) == test["code"]).to_numpy() for name in ("sft", "grpo")
    )
    own = test["subject_id"].to_numpy()
    interval = call_on_run(function, a, b, own)
    if (a == b).all():
        return right(
            "On your run SFT and GRPO are right on the same cases: the interval is [0, 0]."
        )
    complaints = complaints_about_interval(interval, a, b, own, "On your run")
    low, high = numbers(interval, 2, "the interval")
    return verdict(
        complaints,
        f"GRPO minus SFT on your run, accuracy at full code: {b.mean() - a.mean():+.3f} "
        f"[{low:+.3f}, {high:+.3f}].",
    )


# ------------------------------------------------------------------------------- 6.3


def where_to(
    gold: Sequence[str], predicted: Sequence[str | None], chapter: int
) -> tuple[int, float]:
    """The wrong chapter that a chapter's cases go to most often, and the share of its cases."""
    true = [icd.chapter(code) for code in gold]
    named = [icd.chapter(code) for code in predicted]
    wrong = pd.Series([n for t, n in zip(true, named, strict=True) if t == chapter and n])
    wrong = wrong[wrong != chapter]
    counts = wrong.value_counts()
    largest = counts[counts == counts.max()].index.min()
    return int(largest), float(counts.max() / true.count(chapter))


def _columns(gold: Sequence, predicted: Sequence, chapter: int) -> tuple[int, float]:
    answered = [(g, p) for g, p in zip(gold, predicted, strict=True) if p]
    golds, answers = zip(*answered, strict=True)
    return where_to(answers, golds, chapter)


def _of_errors(gold: Sequence, predicted: Sequence, chapter: int) -> tuple[int, float]:
    largest, share = where_to(gold, predicted, chapter)
    pairs = [(icd.chapter(g), icd.chapter(p)) for g, p in zip(gold, predicted, strict=True)]
    of_chapter = [p for g, p in pairs if g == chapter]
    return largest, share * len(of_chapter) / sum(p != chapter for p in of_chapter)


def _of_everything(gold: Sequence, predicted: Sequence, chapter: int) -> tuple[int, float]:
    largest, share = where_to(gold, predicted, chapter)
    of_chapter = sum(icd.chapter(code) == chapter for code in gold)
    return largest, share * of_chapter / len(gold)


def _without_none(gold: Sequence, predicted: Sequence, chapter: int) -> tuple[int, float]:
    answered = [(g, p) for g, p in zip(gold, predicted, strict=True) if p]
    return where_to(*zip(*answered, strict=True), chapter)


def _higher_in_tie(gold: Sequence, predicted: Sequence, chapter: int) -> tuple[int, float]:
    named = [
        icd.chapter(p) for g, p in zip(gold, predicted, strict=True) if icd.chapter(g) == chapter
    ]
    counts = Counter(other for other in named if other not in (None, chapter))
    most = max(counts.values())
    return max(other for other in counts if counts[other] == most), most / len(named)


DIRECTIONS = (
    Decoy(
        _columns,
        "You read the columns: which cases are wrongly called this chapter. Read the row: what are "
        "the cases of this chapter called?",
    ),
    Decoy(_of_errors, "You divide by the chapter's errors. Divide by all cases of the chapter."),
    Decoy(_of_everything, "You divide by all cases. Divide by the cases of this chapter."),
    Decoy(
        _without_none,
        "You leave out the cases without a usable answer. They are cases of the chapter too.",
    ),
    Decoy(_higher_in_tie, "Two wrong chapters come equally often: take the lower number."),
)
# Chapter 5 (mental disorders) goes to 6 and 9, chapter 6 to 9, chapter 10 equally often to 9 and 5,
# and some answers are missing.
MADE_GOLD = ["F32.9"] * 10 + ["G40.909"] * 6 + ["I50.9"] * 8 + ["J18.9"] * 6
MADE_PREDICTED: list[str | None] = ["F32.9"] * 2 + ["G40.909"] * 4 + ["I50.9"] + [None] * 3
MADE_PREDICTED += ["F10.239", "G40.909", "I50.9", "I50.9", "I50.9", None]
MADE_PREDICTED += ["I50.9", "I50.9", "J18.9", "J18.9", "J18.9", "F32.9", "F32.9", None]
MADE_PREDICTED += ["I50.9", "I50.9", "F32.9", "F32.9", "J18.9", None]


@checker("6.3")
def swallowed(function: Callable) -> Verdict:
    """where_to(gold, predicted, chapter) -> (wrong chapter, share of the chapter's cases)."""
    hint = "Keep the cases whose true chapter it is, drop the right ones, count what is left."
    trials = [
        Trial(
            (MADE_GOLD, MADE_PREDICTED, chapter),
            where_to(MADE_GOLD, MADE_PREDICTED, chapter),
            hint,
            f"{len(MADE_GOLD)} invented cases, chapter {chapter}",
        )
        for chapter in (5, 6, 9, 10)
    ]
    complaints = try_out(function, trials, DIRECTIONS)
    if complaints:
        return verdict(complaints)
    cases = table("cases", "cases.parquet").set_index("hadm_id")["code"]
    answers = table("answers/grpo", "answers.parquet")
    gold = [*answers["hadm_id"].map(cases)]
    predicted = [code if isinstance(code, str) else None for code in answers["predicted"]]
    true = pd.Series([icd.chapter(code) for code in gold])
    named = pd.Series([icd.chapter(code) for code in predicted])
    wrong = (true != named).groupby(true).agg(["mean", "size"])
    strays = ((true != named) & named.notna()).groupby(true).any()
    wrong = wrong[strays]
    if wrong.empty:
        return right("On your run no case leaves its chapter.")
    worst = int(wrong.loc[wrong["size"] >= min(20, wrong["size"].max()), "mean"].idxmax())
    expected = where_to(gold, predicted, worst)
    result = call_on_run(function, gold, predicted, worst)
    other, share = numbers(result, 2, "the result")
    if other != expected[0] or abs(share - expected[1]) > 1e-6:
        return verdict([f"On your run, chapter {worst}: you give {shown(result)}. {hint}"])
    names = {each: f"{each} ({icd.chapter_short(each)})" for each in (worst, int(other))}
    return right(
        f"On your run GRPO is worst at chapter {names[worst]}. Its cases go most often to chapter "
        f"{names[int(other)]}: {share:.0%} of them."
    )
