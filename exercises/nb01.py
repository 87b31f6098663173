"""Checkers of notebook 1: leaks in a discharge summary, and splits that know the patients."""

from __future__ import annotations

import re
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
    call_on_run,
    checker,
    require_filled,
    right,
    shown,
    table,
    try_out,
    verdict,
)
from helpers import notes

# section -> (known at admission, why)
SECTIONS = {
    "chief_complaint": (True, "It is what the patient says at the door."),
    "procedure": (
        False,
        "It stands early in the summary, but what was done during the stay is written at its end. "
        "It tells what was found.",
    ),
    "medical_history": (True, "Old diseases are known before the stay."),
    "medications": (
        True,
        "The patient took these at home. They may hint at a disease, but they were known at "
        "admission: that is no leak.",
    ),
    "exam": (True, "This is the exam on arrival; the later one is exam_discharge."),
    "exam_discharge": (False, "It describes the patient after the treatment."),
    "results": (
        False,
        "Pertinent results are chosen at the end, by somebody who knows the diagnosis. Results "
        "that were there at admission also stand in the story.",
    ),
    "hospital_course": (False, "It names the diagnosis and the treatment."),
    "discharge_medications": (False, "What is prescribed at the end tells what was found."),
}


@checker("1.1")
def known(known_at_admission: Any) -> Verdict:
    """known_at_admission: {section: True or False}."""
    require_filled(known_at_admission, "known_at_admission")
    complaints = []
    for section, (expected, why) in SECTIONS.items():
        if section not in known_at_admission:
            raise Stop(WRONG, f"{section!r} is missing. Keep the names of the cell.")
        value = known_at_admission[section]
        if not isinstance(value, bool | np.bool_):
            complaints.append(f"{section}: write True or False, not {shown(value)}.")
        elif value != expected:
            complaints.append(f"{section} is {value}. {why}")
    return verdict(
        complaints, "The place in the summary does not decide, but the time when it was written."
    )


# ------------------------------------------------------------------------------- 1.2


def share_known(cases: pd.DataFrame, split: Sequence[str]) -> float:
    """The share of test cases whose patient has a case in training."""
    split = np.asarray(split)
    known = set(cases["subject_id"][split == "train"])
    return float(cases["subject_id"][split == "test"].isin(known).mean())


def _of_patients(cases: pd.DataFrame, split: Sequence[str]) -> float:
    split = np.asarray(split)
    test = set(cases["subject_id"][split == "test"])
    return len(test & set(cases["subject_id"][split == "train"])) / len(test)


def _with_validation(cases: pd.DataFrame, split: Sequence[str]) -> float:
    split = np.asarray(split)
    known = set(cases["subject_id"][split != "test"])
    return float(cases["subject_id"][split == "test"].isin(known).mean())


def _of_training(cases: pd.DataFrame, split: Sequence[str]) -> float:
    split = np.asarray(split)
    test = set(cases["subject_id"][split == "test"])
    return float(cases["subject_id"][split == "train"].isin(test).mean())


def _of_all(cases: pd.DataFrame, split: Sequence[str]) -> float:
    return share_known(cases, split) * float((np.asarray(split) == "test").mean())


SHARES = (
    Decoy(
        _of_patients, "You count patients. Count test cases: a patient with three counts thrice."
    ),
    Decoy(
        _with_validation,
        "You take everything outside the test split for training. Nothing is trained on the "
        "validation cases.",
    ),
    Decoy(
        _of_training, "You count the training cases. Ask of each test case: is its patient known?"
    ),
    Decoy(_of_all, "You divide by all cases. Divide by the test cases."),
)
PATIENTS = {  # invented: the splits of the cases of each patient
    1: "train test test test",
    2: "val test",
    3: "test test",
    4: "train train train",
    5: "test train",
}
SMALL = pd.DataFrame(
    [(patient, split) for patient, splits in PATIENTS.items() for split in splits.split()],
    columns=["subject_id", "split"],
)
SMALL["hadm_id"] = 100 + SMALL.index


def made_cases(patients: int = 500) -> pd.DataFrame:
    """Invented cases, two for each patient, next to each other as in MIMIC-IV's files."""
    ids = np.repeat(np.arange(patients), 2)
    return pd.DataFrame({"subject_id": ids, "hadm_id": 20_000_000 + np.arange(2 * patients)})


def split_of(function: Callable, cases: pd.DataFrame, seed: int) -> np.ndarray:
    """The student's split of these cases, one of three words for each. Stops where it is not."""
    split = call_on_run(function, cases, seed)
    if isinstance(split, pd.DataFrame) or np.ndim(split) != 1 or len(split) != len(cases):
        raise Stop(WRONG, f"split_by_case must give one word for each of the {len(cases)} cases.")
    split = np.asarray(split, dtype=object)
    if strange := {*split} - {"train", "val", "test"}:
        raise Stop(WRONG, f"A case goes to 'train', 'val' or 'test', not to {shown(strange)}.")
    return split


def complaints_about_split(function: Callable) -> list[str]:
    cases = made_cases()
    split = split_of(function, cases, 0)
    wanted = {"train": 0.7, "val": 0.1, "test": 0.2}
    complaints = []
    for name, share in wanted.items():
        if abs((split == name).mean() - share) > 0.05:
            given = (split == name).mean()
            complaints.append(f"{given:.0%} of 1,000 cases are '{name}', asked are {share:.0%}.")
    if complaints:
        return complaints
    if (split_of(function, cases, 0) != split).any():
        return ["The same seed gives another split. Use np.random.default_rng(seed)."]
    if (split[1:] != split[:-1]).sum() < 100:
        return [
            "You cut the file into three pieces. Cases of one patient stand next to each other, so "
            "most patients stay in one piece. Shuffle the rows first."
        ]
    if share_known(cases, split) == 0:
        return ["You split by patient, as the course does. Here every case goes its own way."]
    if (split_of(function, cases, 1) == split).all():
        return ["Another seed gives the same split. Pass the seed on to the random generator."]
    return []


@checker("1.2")
def split_wrong(split_by_case: Callable, known_share: Callable) -> Verdict:
    """split_by_case(cases, seed) and known_share(cases, split)."""
    small, split = SMALL[["subject_id", "hadm_id"]], SMALL["split"].to_numpy()
    hint = "13 invented cases: of 7 test cases 4 have a patient with a case in training."
    trials = [Trial((small, split), share_known(small, split), hint, "known_share")]
    other = np.where(split == "val", "train", split)
    trials.append(Trial((small, other), share_known(small, other), hint, "without validation"))
    complaints = complaints_about_split(split_by_case) + try_out(known_share, trials, SHARES)
    if complaints:
        return verdict(complaints)
    cases = table("cases", "cases.parquet").reset_index(drop=True)
    course = share_known(cases, cases["split"])
    yours = share_known(cases, split_of(split_by_case, cases[["subject_id", "hadm_id"]], 0))
    return right(
        f"On your {len(cases):,} cases: with your split {yours:.0%} of the test cases have a "
        f"patient whom training knows, with the course's split {course:.0%}."
    )


# ------------------------------------------------------------------------------- 1.3

USUAL = re.compile(r"Physical Exam:\n(.*?)\n\n", re.DOTALL)  # as in the notebook
FROM_THE_NOTEBOOK = ("removal of the clot", "Strength full")


@checker("1.3")
def broken_extractor(summary: Any, secret: Any) -> Verdict:
    """summary: an invented discharge summary; secret: a phrase in it that was written later."""
    for name, value in {"summary": summary, "secret": secret}.items():
        if not isinstance(value, str) or not value.strip():
            raise Stop(WRONG, f"{name} must be a text, but it is {shown(value)}.")
    if any(phrase in secret or secret in phrase for phrase in FROM_THE_NOTEBOOK):
        raise Stop(WRONG, "This secret is the notebook's own. Invent another summary.")
    count = summary.count(secret)
    if count != 1:
        why = "It is not there" if count == 0 else f"It is there {count} times"
        raise Stop(WRONG, f"The secret must stand in the summary exactly once. {why}.")
    usual = USUAL.search(summary)
    if usual is None:
        raise Stop(
            WRONG,
            "The usual expression finds no exam. It needs a line 'Physical Exam:' with nothing "
            "behind the colon, and a blank line somewhere after it.",
        )
    if secret not in usual[1]:
        cut = usual[1].strip().splitlines()[-1:] or [""]
        raise Stop(
            WRONG,
            f"The usual expression stops before the secret: it stops at the first blank line, "
            f"after {shown(cut[0])}. What must not stand between the exam and the secret?",
        )
    ours = notes.admission_note(summary)
    if not ours:
        raise Stop(WRONG, "notes.admission_note finds nothing at all. Add a chief complaint.")
    if " ".join(secret.split()) in " ".join(ours.split()):
        raise Stop(
            WRONG,
            "notes.admission_note keeps the secret too. Is there a heading above it that says "
            "'later', such as a discharge exam or the hospital course? If there is, you have found "
            "a leak of the course: send it to us as an issue.",
        )
    return right(
        "The usual expression takes your secret for a part of the exam, notes.admission_note does "
        "not. It knows headings; the expression knows blank lines only."
    )
