"""Checkers of notebook 7: what one seed would have said, Student's t, and Holm's correction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from exercises.core import (
    Decoy,
    Trial,
    Verdict,
    checker,
    compare,
    number,
    numbers,
    require_filled,
    try_out,
    verdict,
)
from helpers import metrics
from helpers.study import analyse

LOSES, GAINS = "loses more than 2 points", "gains"


@functools.cache
def scores() -> dict[str, dict[str, tuple[float, ...]]]:
    """Arm -> level -> macro-F1 of each seed that both arms have, in the committed study."""
    answers = analyse.read()
    seeds = sorted(name.split("/")[1] for name in answers if name.startswith("grpo/"))
    table: dict[str, dict[str, tuple[float, ...]]] = {}
    for arm in ("sft", "grpo"):
        runs = [answers[f"{arm}/{seed}"] for seed in seeds]
        reports = [metrics.report(answers["code"], run, n_boot=0) for run in runs]
        table[arm] = {
            level: tuple(report[level]["f1_gold"] for report in reports) for level in metrics.LEVELS
        }
    return table


def differences(level: str) -> tuple[float, ...]:
    """GRPO minus SFT in macro-F1, in points, one for each seed."""
    pairs = zip(scores()["sft"][level], scores()["grpo"][level], strict=True)
    return tuple(100 * (grpo - sft) for sft, grpo in pairs)


def claims(points: tuple[float, ...]) -> dict[str, int]:
    """How many seeds alone would have led to each of the two claims."""
    return {
        LOSES: sum(point < -2 for point in points),
        GAINS: sum(point > 0 for point in points),
    }


@checker("7.1")
def one_seed(single_seeds: Any) -> Verdict:
    """single_seeds: {LOSES, GAINS}: the number of single seeds that would have led to the claim."""
    require_filled(single_seeds, "single_seeds")
    points = differences("chapter")
    expected = claims(points)
    full = claims(differences("full"))
    mean = claims((float(np.mean(points)),))
    any_loss = sum(point < 0 for point in points)
    decoys = {
        LOSES: [
            Decoy(any_loss, "That is every seed below zero. The claim needs more than two points."),
            Decoy(full[LOSES], "Is this the full code? The question is about the chapter."),
            Decoy(mean[LOSES], "You judge the mean. Look at each seed alone."),
        ],
        GAINS: [
            Decoy(full[GAINS], "Is this the full code? The question is about the chapter."),
            Decoy(mean[GAINS], "You judge the mean. Look at each seed alone."),
            Decoy(any_loss, "That is the number of seeds that lose."),
        ],
    }
    otherwise = 'Print contrasts["grpo"].loc["chapter", "per_seed"] and count. 0.02 is two points.'
    complaints = []
    for name, known in decoys.items():
        value = number(single_seeds.get(name), f"single_seeds[{name!r}]")
        complaints += compare(value, expected[name], known, name=f"{name!r}", otherwise=otherwise)
    shown = ", ".join(f"{point:+.1f}" for point in points)
    return verdict(
        complaints,
        f"The seeds at chapter: {shown}. One and the same method: with a single seed one could "
        "have reported a loss or a gain.",
    )


@checker("7.2")
def student(interval: Any) -> Verdict:
    """interval: (low, high), Student's 95 % interval of the five differences at chapter."""
    from scipy import stats

    points = np.array(differences("chapter"))
    n, mean, sd = len(points), points.mean(), points.std(ddof=1)
    t = stats.t.ppf(0.975, n - 1)

    def around(half: float) -> list[float]:
        return [mean - half, mean + half]

    decoys = [
        Decoy(
            around(1.96 * sd / n**0.5),
            f"You use 1.96. It is right for many seeds. With {n} seeds the standard deviation "
            f"itself is uncertain: t with {n - 1} degrees of freedom gives {t:.2f}.",
        ),
        Decoy(
            around(t * sd / n),
            f"You divide by {n}. The standard error of a mean is sd / √n.",
        ),
        Decoy(
            around(t * points.std(ddof=0) / n**0.5),
            f"Your standard deviation divides by {n}. Of a sample divide by {n - 1} (ddof=1).",
        ),
        Decoy(
            around(t * sd),
            "This is where a next seed would lie. For the mean divide the spread by √n.",
        ),
        Decoy(
            around(stats.t.ppf(0.95, n - 1) * sd / n**0.5),
            "You leave 5 % on each side. A 95 % interval leaves 2.5 % on each side.",
        ),
        Decoy(
            around(stats.t.ppf(0.975, n) * sd / n**0.5),
            f"You use {n} degrees of freedom. One is spent on the mean: {n - 1}.",
        ),
        Decoy(around(sd / n**0.5), "That is one standard error. Multiply it by t."),
        Decoy([end / 100 for end in around(t * sd / n**0.5)], "Give points, not shares."),
    ]
    full = np.array(differences("full"))
    full_half = t * full.std(ddof=1) / n**0.5
    of_full = [full.mean() - full_half, full.mean() + full_half]
    decoys.append(Decoy(of_full, "That is the full code. The question is about the chapter."))
    otherwise = "mean ± t · s / √n, with the s of a sample and t for n − 1 degrees of freedom."
    given = numbers(interval, 2, "interval")
    expected = around(t * sd / n**0.5)
    complaints = compare(
        given, expected, decoys, name="interval", otherwise=otherwise, tolerance=0.06
    )
    low, high = expected
    place = "inside" if low < 0 < high else "outside"
    return verdict(
        complaints,
        f"[{low:+.1f}, {high:+.1f}] points, and zero is {place}. With {n} seeds an interval is "
        "wide: that no loss is seen does not mean that there is none.",
    )


# ------------------------------------------------------------------------------- 7.3


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `p`."""
    order = np.argsort(p, kind="stable")
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p[place] * (len(p) - rank)))
        adjusted[place] = largest
    return adjusted


def _steps(p: list[float], first: int = 0, cap: bool = True) -> list[float]:
    """Without the running maximum."""
    adjusted = [0.0] * len(p)
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        value = p[place] * (len(p) - rank - first)
        adjusted[place] = min(1.0, value) if cap else value
    return adjusted


def _uncapped(p: list[float]) -> list[float]:
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, p[place] * (len(p) - rank))
        adjusted[place] = largest
    return adjusted


def _hochberg(p: list[float]) -> list[float]:
    """Benjamini and Hochberg, which controls another error."""
    adjusted, smallest = [0.0] * len(p), 1.0
    for rank, place in reversed([*enumerate(np.argsort(p, kind="stable"), 1)]):
        smallest = min(smallest, p[place] * len(p) / rank)
        adjusted[place] = smallest
    return adjusted


CORRECTIONS = (
    Decoy(
        lambda p: [min(1.0, each * len(p)) for each in p],
        "That is Bonferroni: every p times the number of tests. Holm multiplies only the smallest "
        "by m, the next by m − 1, and so on.",
    ),
    Decoy(
        lambda p: [each * len(p) for each in p],
        "That is Bonferroni, and some values are above 1. Holm multiplies only the smallest by m, "
        "the next by m − 1, and so on.",
    ),
    Decoy(
        _steps,
        "A larger p gets a smaller corrected p from you. An adjusted value is at least as large as "
        "the one before it: take the running maximum.",
    ),
    Decoy(
        lambda p: _steps(p, cap=False),
        "Two steps are missing: the running maximum, and the limit at 1.",
    ),
    Decoy(_uncapped, "Some of your values are above 1. A p-value ends at 1."),
    Decoy(
        lambda p: sorted(holm(p)),
        "The values are right, but in sorted order. Give them in the order of the input.",
    ),
    Decoy(_hochberg, "That is Benjamini-Hochberg. It allows a share of false findings; Holm none."),
    Decoy(lambda p: list(p), "You give back the p-values as they are."),
)


@checker("7.3")
def correction(function: Callable) -> Verdict:
    """holm(p) -> adjusted p-values in the order of the input."""
    hint = "Smallest p times m, next times m − 1, ...; running maximum; at most 1; input order."
    inputs = (
        [0.04, 0.001, 0.03, 0.6, 0.045],
        [0.5, 0.9, 0.01, 0.6],
        [0.051, 0.24, 0.001, 0.001, 0.001, 0.98, 0.001, 0.07],
        [0.03],
    )
    trials = [Trial((p,), holm(p), hint) for p in inputs]
    complaints = try_out(function, trials, CORRECTIONS, tolerance=1e-4)
    return verdict(
        complaints,
        "Eight tests of one study give eight chances for a false alarm. Holm corrects for them, "
        "and is never stricter than Bonferroni.",
    )
