"""Every rule of helpers/notes_rules.yaml has an example beside it, and does there what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers import notes

FILE = Path(notes.__file__).with_name("notes_rules.yaml")
RULES = yaml.safe_load(FILE.read_text(encoding="utf-8"))["rules"]


def lines(text: str) -> str:
    """A slash ends a line, two slashes leave a blank one."""
    return str(text).replace(" / / ", "\n\n").replace(" / ", "\n")


def test_every_rule_has_an_example() -> None:
    assert len(RULES) > 10 and all("example" in rule and "keeps" in rule for rule in RULES)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["example"])[:60])
def test_the_example_of_a_rule_keeps_what_it_says(rule: dict, ends: str) -> None:
    sections = notes.sections(lines(rule["example"]).replace("\n", ends))
    known = {name: text for name, text in sections.items() if name in notes.ADMISSION and text}
    assert known == {name: lines(text) for name, text in (rule["keeps"] or {}).items()}


MASKED = [
    "Brief Hospital ___:",
    "Pertinent ___:",
    "___ Diagnosis:",
    "MAIN DIAGNOSIS:",
    "RECOMMENDATIONS AFTER DISCHARGE:",
    "___ Course:",
    "Discharge ___:",
    "___ Instructions:",
    "Transitional ___:",
    "FINAL ___:",
    "Follow-up ___:",
    "___ Disposition:",
    "Exam at time of death:",
    "Death exam:",
    "Repeat exam:",
    "Exam today:",
    "___ exam at discharge:",
    "Something that nobody knows:",
    "WHAT HAPPENED LATER",
]
BEFORE = (
    "Chief Complaint:\nleg swelling\n \nHistory of Present Illness:\n___ yo M with leg swelling.\n \n"
    "Medications on Admission:\n1. Lisinopril 10 mg\n \n"
    "Physical Exam:\nGEN: comfortable\nEXT: calf warm\n \n"
)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("case", [str, str.upper])
@pytest.mark.parametrize("heading", MASKED)
def test_what_stands_below_a_masked_or_unknown_heading_is_later(heading, case, ends) -> None:
    text = f"{BEFORE}{case(heading)}\nAn occlusive thrombus of the femoral vein was found.\n"
    note = notes.admission_note(text.replace("\n", ends))
    assert "thrombus" not in note and "calf warm" in note


@pytest.mark.parametrize(
    "heading", ["Pertinent Results:", "Brief Hospital Course:", "Discharge Exam:"]
)
def test_a_note_in_one_line_is_not_taken_whole(heading: str) -> None:
    text = (
        "Chief Complaint: cough History of Present Illness: ___ yo F with cough "
        f"Physical Exam: LUNGS: crackles {heading} sputum grew pneumococcus"
    )
    assert "pneumococcus" not in notes.admission_note(text)
