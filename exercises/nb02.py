"""Checkers of notebook 2: what the teacher's habit costs, and a check for denied findings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from exercises.core import (
    MISSING,
    Decoy,
    Stop,
    Trial,
    Verdict,
    call_on_run,
    checker,
    compare,
    number,
    right,
    table,
    try_out,
    verdict,
)
from helpers import traces


@checker("2.1")
def habit_share(share: Any) -> Verdict:
    """share: of the wrong traces, those whose code is exactly the unspecified sibling."""
    share = number(share, "share")
    written = table("traces", "traces.parquet")
    cases = table("cases", "cases.parquet")[["hadm_id", "code"]]
    kept = written[written["kept"]].merge(cases, on="hadm_id", suffixes=("_teacher", ""))
    siblings = kept["code"].map(traces.fallbacks())
    wrong = kept["code_teacher"] != kept["code"]
    hurried = kept["code_teacher"] == siblings
    if not wrong.any():
        raise Stop(
            MISSING, "The teacher of this run makes no error: there is nothing to share out."
        )
    expected = float(hurried.sum() / wrong.sum())
    rate = float(hurried[siblings.notna()].mean()) if siblings.notna().any() else 0.0
    decoys = [
        Decoy(
            rate,
            "That is how often the habit strikes among cases with a specific code. The question is "
            "about the wrong traces: how many of them are this one kind of error?",
        ),
        Decoy(float(hurried.mean()), "That is the share of all traces. Divide by the wrong ones."),
        Decoy(
            rate * float(wrong.mean()),
            "You multiply two shares that have different bases: one is of the cases with a "
            "specific code, one is of all traces. Count traces first, then divide.",
        ),
        Decoy(1 - expected, "That is the share of the other errors. Take it from one."),
        Decoy(100 * expected, "You give percent. Give a share between 0 and 1."),
    ]
    otherwise = (
        "Count first: how many traces are wrong (kept traces times the share that is wrong), and "
        "in how many does the teacher give the unspecified sibling? Then divide."
    )
    complaints = compare(share, expected, decoys, name="share", otherwise=otherwise, tolerance=0.02)
    return verdict(
        complaints,
        f"{hurried.sum()} of {wrong.sum()} wrong traces ({expected:.0%}) are the habit alone. A "
        "reward that knows the codes can see this error; a check of the format cannot.",
    )


# ------------------------------------------------------------------------------- 2.2


def cites_denied(think: str, note: str) -> bool:
    """Whether a trace cites a finding that the note denies and nowhere states."""
    text = " ".join(note.lower().split())
    for finding in traces.cited_findings(think):
        words = re.escape(" ".join(finding.lower().split()))
        is_denied = re.search(rf"\b(?:no|denies) {words}", text)
        is_stated = re.search(rf"(?<!\bno )(?<!\bdenies ){words}", text)
        if is_denied and not is_stated:
            return True
    return False


def _denied(pattern: str, *, lower: bool = True) -> Callable[[str, str], bool]:
    """A decoy: a finding counts as denied where the pattern is found, and nothing else is asked."""

    def decoy(think: str, note: str) -> bool:
        text = " ".join(note.split())
        text = text.lower() if lower else text
        quotes = [" ".join(each.split()) for each in traces.cited_findings(think)]
        quotes = [each.lower() if lower else each for each in quotes]
        return any(re.search(pattern.replace("FINDING", re.escape(q)), text) for q in quotes)

    return decoy


def _without_denies(think: str, note: str) -> bool:
    return cites_denied(think, re.sub("denies", "reports", note, flags=re.IGNORECASE))


def _case_sensitive(think: str, note: str) -> bool:
    hidden = re.sub(r"\bNo ", "Not ", note)
    return cites_denied(think, re.sub(r"\bDenies ", "Reports ", hidden))


DENIALS = (
    Decoy(
        _denied(r"\b(?:no|denies) FINDING"),
        "You drop a trace as soon as the finding is denied somewhere. Where the note also states "
        "it (often in its first line), the trace may cite it.",
    ),
    Decoy(
        _denied(r"(?:no|denies) FINDING"),
        "You find 'no' inside other words, and you drop findings that are denied and stated. Ask "
        r"for a whole word (\b in a regular expression), and look for a second place.",
    ),
    Decoy(
        _denied(r"\b(?:no|denies)\b.*FINDING"),
        "Your denial reaches too far: over a full stop, to findings of another sentence. The word "
        "must be directly before the finding.",
    ),
    Decoy(
        _denied(r"(?:no|denies).*FINDING"),
        "You look for the letters 'no' anywhere before the finding: 'noted' has them too. The "
        "word must be directly before the finding.",
    ),
    Decoy(_without_denies, "You see 'no' only. Notes also say 'denies'."),
    Decoy(_case_sensitive, "A sentence begins with a capital letter: compare in lower case."),
    Decoy(lambda think, note: False, "It drops nothing: every trial gives False."),
)


def _pair(findings: str, note: str, expected: bool, hint: str) -> Trial:
    think = f"Findings: {findings}.\nCirculatory: I21 Acute myocardial infarction.\nDetail: none."
    return Trial((think, note), expected, hint, f"cited {findings!r}, the note says {note!r}")


PAIRS = (
    _pair("chest pain", "HPI: pale. No chest pain.", True, "The note denies it: drop."),
    _pair("cough", "HPI: tired. denies cough.", True, "'denies' is a denial too: drop."),
    _pair("cough; fever", "HPI: cough. No fever.", True, "One of the two is denied: drop."),
    _pair("leg\nswelling", "HPI: tired. Denies leg  swelling.", True, "Line ends are white space."),
    _pair("chest pain", "CC: chest pain\nHPI: No chest pain.", False, "It is also stated: keep."),
    _pair("cough", "HPI: No fever. Cough at night.", False, "The 'no' is of the fever: keep."),
    _pair("fever", "HPI: rash noted, fever since noon.", False, "'noted' is no denial: keep."),
    _pair("rash", "HPI: allergic to cappuccino rash.", False, "'no' ends another word: keep."),
    _pair("Chest pain", "HPI: chest pain. Denies cough.", False, "It is stated: keep."),
    _pair("nothing specific", "HPI: No cough.", False, "It cites nothing that could be denied."),
)


@checker("2.2")
def denied(function: Callable[[str, str], Any]) -> Verdict:
    """cites_denied: reasoning and note -> whether the trace is to be dropped."""
    complaints = try_out(function, PAIRS, DENIALS)
    if complaints:
        return verdict(complaints)
    kept = table("traces", "traces.parquet").query("kept")
    of_run = table("cases", "cases.parquet").set_index("hadm_id")["note"]
    pairs = list(zip(kept["think"], kept["hadm_id"].map(of_run), strict=True))
    yours = [bool(call_on_run(function, *pair)) for pair in pairs]
    ours = [cites_denied(*pair) for pair in pairs]
    differing = [row for row, (a, b) in enumerate(zip(yours, ours, strict=True)) if a != b]
    if len(differing) > max(2, 0.1 * sum(ours)):
        return verdict(
            [
                f"The ten invented pairs are right. On the {len(pairs):,} kept traces of your run "
                f"it differs from ours {len(differing)} times, first in row {differing[0]}."
            ]
        )
    line = f"It would drop {sum(yours)} of the {len(pairs):,} kept traces of your run."
    if not any(yours):
        line += " This teacher reads denials right; a language model as teacher may not."
    return right(line)
