"""Checkers of notebook 4: advantages, a reward of one's own, and groups that teach nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from exercises.core import (
    WRONG,
    Decoy,
    Stop,
    Trial,
    Verdict,
    call,
    checker,
    compare,
    numbers,
    require_filled,
    same,
    shown,
    try_out,
    verdict,
)
from helpers import icd, prompts, rewards

GROUP = np.array([1.1, 0.5, 0.5, 0.5])
GROUPS = {"group": GROUP, "ten times": 10 * GROUP, "flat": np.full(4, 0.5)}


def advantages(reward: np.ndarray, ddof: int = 1) -> np.ndarray:
    return (reward - reward.mean()) / (reward.std(ddof=ddof) + 1e-4)


@checker("4.1")
def advantages_by_hand(my_advantages: Any) -> Verdict:
    """my_advantages: {"group", "ten times", "flat"}: four numbers each."""
    require_filled(my_advantages, "my_advantages")
    complaints = []
    for name, reward in GROUPS.items():
        if name not in my_advantages:
            raise Stop(WRONG, f"The row {name!r} is missing. Keep the names of the cell.")
        given = numbers(my_advantages[name], len(reward), f"my_advantages[{name!r}]")
        decoys = [
            Decoy(
                advantages(reward, ddof=0),
                "You divide by the standard deviation of a population (numpy's default). The "
                "trainer uses that of a sample: divide the squares by n − 1 (ddof=1).",
            ),
            Decoy(reward - reward.mean(), "You forget to divide by the standard deviation."),
            Decoy(
                advantages(GROUP) * (10 if name == "ten times" else 1),
                "Larger rewards do not mean larger steps: the standard deviation grows as well, "
                "and the factor cancels.",
            ),
            Decoy(reward, "These are the rewards. An advantage is measured against the group."),
            Decoy(np.full(4, np.nan), "0 / 0: the small number ε in the formula avoids it."),
        ]
        otherwise = "Mean first, then each distance from it, then divide by the standard deviation."
        if name == "flat":
            otherwise = "All four rewards equal their mean. What is their distance from it?"
        complaints += compare(
            given, advantages(reward), decoys, name=f"{name!r}", otherwise=otherwise, tolerance=0.02
        )
    return verdict(
        complaints,
        "The scale of a reward cancels, only its order and its spread inside the group count.",
    )


# ------------------------------------------------------------------------------- 4.2

BLOCK = 0.25


def block_reward(completions: list, code: list[str], **columns: object) -> list[float]:
    """The hierarchical reward with one level more: 0.25 for the right block."""
    return [
        _credit(predicted, gold)
        for predicted, gold in rewards.predicted_and_gold(completions, code)
    ]


def _credit(
    predicted: str | None, gold: str, *, unusable: float = -0.5, asks_validity: bool = True
) -> float:
    if predicted == gold:
        return 1.0
    if predicted is None or (asks_validity and not icd.is_valid(predicted)):
        return unusable
    mine, right = icd.ancestors(predicted), icd.ancestors(gold)
    for level, credit in (("category", 0.4), ("block", BLOCK), ("chapter", 0.15)):
        if mine[level] == right[level]:
            return credit
    return 0.0


def _each(credit: Callable[..., float], **options: Any) -> Callable[[list, list], list[float]]:
    def decoy(completions: list, code: list) -> list[float]:
        pairs = rewards.predicted_and_gold(completions, code)
        return [credit(predicted, gold, **options) for predicted, gold in pairs]

    return decoy


def _letter(predicted: str | None, gold: str) -> float:
    credit = _credit(predicted, gold)
    if credit in (0.0, 0.15):
        return 0.15 if predicted and predicted[0] == gold[0] else 0.0
    return credit


def _released_order(predicted: str | None, gold: str) -> float:
    credit = _credit(predicted, gold)
    return 0.15 if credit == BLOCK else credit


LADDER = (
    Decoy(
        _each(_credit, unusable=0.0),
        "Answers that cannot be used get 0 from you. They get −0.5, else giving up pays as well as "
        "an earnest wrong answer.",
    ),
    Decoy(
        _each(_credit, asks_validity=False),
        "You pay a code that does not exist, such as I21.01ZZ. Ask icd.is_valid first.",
    ),
    Decoy(
        _each(_letter),
        "You take the first letter for the chapter. Use icd.chapter: A and B share one, H has two.",
    ),
    Decoy(
        _each(_released_order),
        "The block never pays. Ask for it before the chapter: each block lies in one chapter.",
    ),
)
STEPS = (
    ("I21.01", "I20.0", "I20 and I21 are in the same block, I20-I25."),
    ("I21.01", "I50.1", "I50 is in another block, but in the same chapter."),
    ("J18.9", "J12.9", "J12 and J18 are in the same block."),
    ("A41.9", "A40.9", "A40 and A41 are in the same block, A30-A49."),
)


@checker("4.2")
def own_reward(function: Callable) -> Verdict:
    """block_reward(completions, code, **columns) -> list of floats, as TRL calls it."""
    good, gold = prompts.answer("Findings: pain.", "I21.01"), "I2101"
    result = call(function, completions=[good, good], code=[gold, gold], note=["a note", "a note"])
    if not isinstance(result, list) or len(result) != 2:
        raise Stop(
            WRONG,
            f"For two completions give a list of two numbers, not {shown(result)}. TRL calls a "
            "reward with a list of completions and one right code for each.",
        )
    trials = [
        Trial(
            ([row["completion"]], [row["gold"]]),
            block_reward([row["completion"]], [row["gold"]]),
            row["why"].capitalize() + ".",
            f'"{row["name"]}"',
        )
        for row in rewards.truth_table()
    ]
    for right, answer, hint in STEPS:
        arguments = ([prompts.answer("Findings: pain.", answer)], [right])
        trials.append(Trial(arguments, block_reward(*arguments), hint, f"{answer} for {right}"))
    complaints = try_out(function, trials, LADDER)
    return verdict(
        complaints,
        f"Right on {len(trials)} completions. You can pass this function to GRPOTrainer as it is.",
    )


# ------------------------------------------------------------------------------- 4.3


def flat_share(p: Any, n: int) -> float:
    """Mean share of groups of n that are all right or all wrong."""
    p = np.asarray(p, float)
    return float(np.mean(p**n + (1 - p) ** n))


FLAT = (
    Decoy(
        lambda p, n: float(np.mean(np.asarray(p, float) ** n)),
        "You count the groups that are all right. A group that is all wrong is flat as well.",
    ),
    Decoy(
        lambda p, n: flat_share([np.mean(p)], n),
        "You average p first. Notes differ: compute the share for each note, then take the mean.",
    ),
    Decoy(
        lambda p, n: 1 - flat_share(p, n),
        "That is the share of groups with spread. Flat is the opposite.",
    ),
    Decoy(
        lambda p, n: float(np.mean((1 - np.asarray(p, float)) ** n)),
        "You count the groups that are all wrong. A group that is all right is flat as well.",
    ),
)


@checker("4.3")
def flat_groups(function: Callable) -> Verdict:
    """flat_share(p, n): p, the probability of a right completion for each note."""
    inputs = (([0.62], 8), ([0.95, 0.29], 8), ([1.0, 0.0, 0.5], 2), ([0.9, 0.6, 0.1, 0.2], 4))
    hint = "All n right: p to the power n. All n wrong: (1 − p) to the power n."
    trials = [Trial((np.array(p), n), flat_share(p, n), hint) for p, n in inputs]
    complaints = try_out(function, trials, FLAT)
    even, mixed = flat_share([0.62], 8), flat_share([0.95, 0.29], 8)
    assert same(np.mean([0.95, 0.29]), 0.62)
    return verdict(
        complaints,
        f"If every note has p = 0.62, {even:.1%} of the groups are flat. If half of the notes have "
        f"0.95 and half 0.29, the mean p is the same, and {mixed:.0%} are flat: easy notes and "
        "hopeless notes teach nothing.",
    )
