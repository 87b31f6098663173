"""Checkers of notebook 5: what padding costs, and which characters a trie allows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from exercises.core import (
    WRONG,
    Decoy,
    Stop,
    Trial,
    Verdict,
    checker,
    compare,
    number,
    require_filled,
    table,
    try_out,
    verdict,
)
from helpers import icd

LENGTHS = (10, 40, 20, 30)  # tokens of four notes, in file order
BATCH = 2


def batches(lengths: Collection[int]) -> list[list[int]]:
    lengths = list(lengths)
    return [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]


def padding(lengths: Collection[int]) -> float:
    """The share of computed tokens that are padding."""
    computed = sum(len(batch) * max(batch) for batch in batches(lengths))
    return 1 - sum(lengths) / computed


@checker("5.1")
def padding_by_hand(padding_share: Any) -> Verdict:
    """padding_share: {"file order", "sorted"}: padding as a share of what is computed."""
    require_filled(padding_share, "padding_share")
    complaints = []
    total = sum(LENGTHS)
    orders = {"file order": LENGTHS, "sorted": sorted(LENGTHS, reverse=True)}
    for name, order in orders.items():
        if name not in padding_share:
            raise Stop(WRONG, f"The row {name!r} is missing. Keep the names of the cell.")
        parts = [1 - sum(batch) / (len(batch) * max(batch)) for batch in batches(order)]
        expected = padding(order)
        decoys = [
            Decoy(
                sum(parts) / len(parts),
                "You average the shares of the two batches. A long batch costs more than a short "
                "one: add up the tokens of both first, then divide.",
            ),
            Decoy(
                1 - total / (len(order) * max(order)),
                "You pad every note to the longest of all. A batch is as long as its own longest.",
            ),
            Decoy(
                expected / (1 - expected),
                "You divide the padding by the notes' own tokens. Divide by all that is computed.",
            ),
            Decoy(1 - expected, "That is the share of useful tokens. Take it from one."),
            Decoy(
                padding(orders["sorted" if name == "file order" else "file order"]),
                "You have the two orders the wrong way round.",
            ),
            Decoy(100 * expected, "You give percent. Give a share between 0 and 1."),
        ]
        otherwise = (
            "Write each batch as a rectangle: number of notes × longest note. Padding is what is "
            "in the rectangles and not in the notes, as a share of the rectangles."
        )
        complaints += compare(
            number(padding_share[name], name),
            expected,
            decoys,
            name=f"{name!r}",
            otherwise=otherwise,
            tolerance=0.006,
        )
    return verdict(
        complaints, "Sorting saves 20 of 140 computed tokens here, and changes no answer."
    )


# ------------------------------------------------------------------------------- 5.2

END = "<"


def allowed(prefix: str, codes: Collection[str]) -> set[str]:
    """The characters that may follow a prefix; `<` where the prefix is a whole code."""
    longer = {code[len(prefix)] for code in codes if code.startswith(prefix) and code != prefix}
    return longer | ({END} if prefix in codes else set())


def _no_end_inside(prefix: str, codes: Collection[str]) -> set[str]:
    longer = allowed(prefix, codes) - {END}
    return longer or allowed(prefix, codes)


def _never_ends(prefix: str, codes: Collection[str]) -> set[str]:
    return allowed(prefix, codes) - {END}


def _always_ends(prefix: str, codes: Collection[str]) -> set[str]:
    return allowed(prefix, codes) | {END}


def _rests(prefix: str, codes: Collection[str]) -> set[str]:
    return {code[len(prefix) :] or END for code in codes if code.startswith(prefix)}


def _only_longer_or_end(prefix: str, codes: Collection[str]) -> set[str]:
    return allowed(prefix, codes) or {END}


TRIES = (
    Decoy(
        _no_end_inside,
        "A code can be the beginning of another one: I21 is a code, and I21.4 goes on. After such "
        "a prefix both is allowed, the end and the next character.",
    ),
    Decoy(_never_ends, "The answer never ends. After a whole code `<` is allowed: </diagnosis>."),
    Decoy(_always_ends, "You allow the end everywhere. I21. is no code: it must go on."),
    Decoy(_rests, "You give all that is left of each code. Give the next character only."),
    Decoy(
        _only_longer_or_end, "After a prefix that no code has, nothing is allowed: an empty set."
    ),
)
CODES = ("I21", "I21.4", "I21.09", "J18.9", "J90")
TRIE_TRIALS = {
    "I21": "I21 is a code itself, and two codes go on with a dot.",
    "J9": "Only J90 goes on from here.",
    "I21.4": "The code is whole, and no other code goes on from it.",
    "": "At the beginning the first letters of all codes are allowed.",
    "J": "J18.9 and J90 part here.",
    "I21.": "I21.4 and I21.09 part here.",
    "X": "No code begins with X: nothing is allowed.",
    "J18": "J18 is no code in this list, it must go on.",
}


@checker("5.2")
def trie(function: Callable[[str, Collection[str]], Any]) -> Verdict:
    """allowed(prefix, codes) -> set of next characters."""
    trials = [
        Trial((prefix, list(CODES)), allowed(prefix, CODES), hint, f"after {prefix!r}")
        for prefix, hint in TRIE_TRIALS.items()
    ]
    complaints = try_out(function, trials, TRIES)
    if complaints:
        return verdict(complaints)
    cases = table("cases", "cases.parquet")
    codes = sorted(
        icd.dotted(code) for code in cases.loc[cases["split"] == "train", "code"].unique()
    )
    prefixes = sorted({code[:length] for code in codes for length in range(len(code) + 1)})
    hint = "This prefix comes from the codes of your own training cases."
    trials = [Trial((p, codes), allowed(p, codes), hint, f"after {p!r}") for p in prefixes]
    complaints = try_out(function, trials)
    choices = [len(allowed(prefix, codes)) for prefix in prefixes]
    alone = sum(count == 1 for count in choices) / len(choices)
    return verdict(
        complaints,
        f"Right for all {len(prefixes)} prefixes of the {len(codes)} codes of your run. After "
        f"{alone:.0%} of them one character alone is allowed: there the trie decides, not the "
        "model.",
    )
