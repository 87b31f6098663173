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
    "B.H.C.:",
    "3- Hospital Course:",
    "3: Hospital Course:",
    "4 - Discharge Diagnosis",
    "II) Hospital course",
    "Section 5: Hospital Course",
    "Part II: Hospital Course",
    "Brief Hosp Course",
    "Post-discharge plan",
    "HD3:",
    "AT DISCHARGE",
    "Re-examination:",
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


# --- no text below a later heading reaches the note ---------------------------------------------

BLOCKS = {
    "cc": "Chief Complaint:\nleg swelling\n \n",
    "hpi": (
        "History of Present Illness:\n___ yo M with swelling.\n\nIn the ED, initial vitals: 98 80.\n"
        "Labs notable for: WBC 20\n \n"
    ),
    "pmh": "Past Medical History:\n1. CAD\n2. DM\n \n",
    "family": "Social History:\n___\nFamily History:\nFather with MI.\n \n",
    "allergies": "Allergies: \nPenicillins\n \n",
    "meds": "Medications on Admission:\n1. Lisinopril 10 mg\n2. ASA\n \n",
    "exam": "Physical Exam:\nVS: 98 80\nGEN: comfortable\nEXT: calf warm\n \n",
}
ORDERS = [
    "cc",
    "cc hpi",
    "cc hpi pmh",
    "cc hpi family",
    "cc hpi pmh allergies",
    "cc hpi meds exam",
    "cc exam meds",
]
HEADINGS = """Brief Hospital Course|Hospital Course|Pertinent Results|Discharge Diagnosis|Main Diagnosis
Discharge Condition|Discharge Instructions|Discharge Disposition|Discharge Medications|Final Diagnosis
Followup Instructions|Transitional Issues|Major Surgical or Invasive Procedure|Secondary Diagnoses|Dx
Medications on Discharge|Recommendations after Discharge|Discharge Exam|Exam on Discharge|Results
Exam at time of death|Death Exam|Repeat Exam|Exam today|Exam upon transfer|Exam prior to discharge
Final exam|Second exam|Most recent exam|Neuro exam at discharge|Follow up exam|Addendum|Plan|Expired
Discharge Labs|Assessment and Plan|Active Issues|ICU Course|Course in Hospital|Cause of Death
Death Summary|Recommendations|Medication Changes|Prescriptions|Disposition|Facility|Procedures
Condition on Discharge|Hospitalization""".replace("\n", "|").split("|")
FORMS = [
    "{}:\n{}",
    "{}: {}",
    "{}:\n \n{}",
    "{}\n\n{}",
    "1. {}:\n{}",
    "**{}**\n{}",
    "=== {} ===\n{}",
    "{} - {}",
]
THROMBUS = "An occlusive thrombus was found.\n"


def without_one_word(heading: str) -> list[str]:
    words = heading.split()
    long = [i for i, word in enumerate(words) if len(words) > 1 and len(word) > 3]
    return [" ".join([*words[:i], "___", *words[i + 1 :]]) for i in long]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_below_a_later_heading(order: str, form: str) -> None:
    before = "".join(BLOCKS[name] for name in order.split())
    for heading in HEADINGS:
        for case in (str, str.upper, str.title):
            text = before + form.format(case(heading), THROMBUS)
            for layout in (text, text.replace("\n \n", "\n"), text.replace("\n", "\r\n")):
                assert "thrombus" not in notes.admission_note(layout), layout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [str, str.upper])
def test_nothing_below_a_later_heading_of_which_a_word_is_masked(order: str, case) -> None:
    before = "".join(BLOCKS[name] for name in order.split())
    for heading in [masked for whole in HEADINGS for masked in without_one_word(whole)]:
        text = f"{before}{case(heading)}:\n{THROMBUS}"
        assert "thrombus" not in notes.admission_note(text), text


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_behind_a_later_heading_in_one_line(order: str) -> None:
    before = " ".join("".join(BLOCKS[name] for name in order.split()).split())
    for heading in HEADINGS:
        for case in (str, str.upper, str.title):
            text = f"{before} {case(heading)}: {THROMBUS}"
            assert "thrombus" not in notes.admission_note(text), text


@pytest.mark.parametrize("number", range(len(RULES)))
def test_every_rule_is_needed_by_its_example(number: int, monkeypatch) -> None:
    rules = [*notes._RULES[:number], *notes._RULES[number + 1 :], ("text", {})]
    monkeypatch.setattr(notes, "_RULES", rules)
    notes._decide.cache_clear()
    sections = notes.sections(lines(RULES[number]["example"]))
    notes._decide.cache_clear()
    known = {name: text for name, text in sections.items() if name in notes.ADMISSION and text}
    assert known != {name: lines(text) for name, text in RULES[number]["keeps"].items()}


def test_a_long_exam_is_kept_whole() -> None:
    exam = (
        "VS: T 98.2 BP 130/80\nGeneral: NAD\nHEENT: EOMI\nVaricosities: none\nDRE: guaiac negative\n"
        "Neurologic:\n-Mental Status: alert\n-Cranial Nerves:\nIII, IV, VI: EOMI\n"
        "-Fund of knowledge: full\nCognition:\nMood: sad"
    )
    text = f"CC:\npain\n\nPhysical Exam:\n{exam}\n\nPertinent Results:\nx\n"
    assert notes.sections(text)["exam"] == exam


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("Chief ___:", "chief_complaint"),
        ("___ of Present Illness:", "present_illness"),
        ("History of ___ Illness:", "present_illness"),
        ("Past Medical ___:", "medical_history"),
        ("Past ___ History:", "medical_history"),
        ("Social ___:", "social_history"),
        ("Family ___:", "family_history"),
        ("Physical ___:", "exam"),
    ],
)
def test_masked_headings_of_admission_are_read_by_what_is_left(heading: str, section: str) -> None:
    assert notes.sections(f"Service: MEDICINE\n\n{heading}\nhere\n")[section] == "here"


@pytest.mark.parametrize(
    "heading", ["Medications on ___:", "Exam on ___:", "___ Exam:", "___ Medications:"]
)
def test_masked_headings_that_may_be_later_are_later(heading: str) -> None:
    assert "later" not in notes.admission_note(f"CC:\npain\n\n{heading}\nlater\n")


@pytest.mark.parametrize(
    "line",
    [
        "BHC: later",
        "Discussion: later",
        "F/U: later",
        "ECHOCARDIOGRAM: later",
        "BCx: later",
        "HD3: later",
        "Reexamination: later",
        "3- Hospital Course: later",
        "3: Discharge Diagnosis: later",
    ],
)
def test_a_later_heading_with_its_text_on_the_same_line_ends_the_exam(line: str) -> None:
    assert "later" not in notes.admission_note(BEFORE + line + "\n")


@pytest.mark.parametrize(
    ("open_section", "line"),
    [
        ("HPI", "AT DISCHARGE"),
        ("HPI", "Hospital Course by System"),
        ("PMH", "3- Hospital Course"),
        ("PMH", "Post-discharge plan"),
        ("HPI", "V. hospital course"),
        ("HPI", "XI) hospital course"),
        ("PMH", "Section 5: Hospital Course"),
        ("PMH", "PART II: HOSPITAL COURSE"),
    ],
)
def test_a_later_heading_without_a_colon_ends_a_story(open_section: str, line: str) -> None:
    assert "later" not in notes.admission_note(f"{open_section}:\nfever\n\n{line}\nlater\n")


@pytest.mark.parametrize(
    "line",
    [
        "2 - 3 pillows",
        "12: normal",
        "1- CAD: stable",
        "post nasal drip",
        "HD on MWF",
        "V. tach in 2019",
        "X. ray was clear",
        "IV. iron each month",
        "part II of a trial",
    ],
)
def test_numbers_and_everyday_words_of_a_history_are_no_headings(line: str) -> None:
    assert notes.sections(f"PMH:\nCAD\n{line}\nstroke\n") == {
        "medical_history": f"CAD\n{line}\nstroke"
    }
