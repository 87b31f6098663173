"""The admission note: what is kept, what never enters. All notes are invented; text marked LATER must not come through."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import leaks, notes

SUMMARY = """
Name:  ___                     Unit No:   ___
 
Admission Date:  ___              Discharge Date:   ___
 
Date of Birth:  ___             Sex:   F
 
Service: MEDICINE
 
Allergies: 
Penicillins / shellfish
 
Attending: ___.
 
Chief Complaint:
Chest pain
 
Major Surgical or Invasive Procedure:
LATER cardiac catheterization

 
History of Present Illness:
___ year old woman with CAD who presents with two hours of chest pain.

In the ED, initial vitals:
97.8 88 140/90 18 98% RA
Labs were notable for: troponin 0.4
EKG: ST depressions

On the floor, she is pain free.

REVIEW OF SYSTEMS: negative for fever.
 
Past Medical History:
1. CAD
2. PE in the past
 
Social History:
___
Family History:
Father with MI at 60.
 
Physical Exam:
ADMISSION PHYSICAL EXAM:
VS: 98.2 130/80
GENERAL: comfortable
HEENT: no nasal
discharge, EOMI
LUNGS: crackles

DISCHARGE PHYSICAL EXAM:
VS: LATER 98.0
GENERAL: LATER well

Pertinent Results:
LATER ADMISSION LABS:
LATER WBC 7
 
Brief Hospital Course:
LATER She had an NSTEMI.

# Chest pain: LATER heparin
 
Medications on Admission:
The Preadmission Medication list is accurate and complete.
1. Aspirin 81 mg PO DAILY
2. Atorvastatin 40 mg PO QPM

 
Discharge Medications:
1. LATER Clopidogrel 75 mg PO DAILY
 
Discharge Disposition:
LATER Home
 
Discharge Diagnosis:
LATER NSTEMI
 
Discharge Condition:
LATER Mental Status: Clear and coherent.
 
Discharge Instructions:
LATER Dear Ms. ___,
You were LATER admitted.
 
Followup Instructions:
LATER ___
"""  # noqa: W291, W293


def test_whole_summary() -> None:
    assert notes.admission_note(SUMMARY) == (
        "CC: Chest pain\n"
        "HPI: ___ year old woman with CAD who presents with two hours of chest pain. In the ED, initial vitals: "
        "9"
        "7.8 88 140/90 18 98% RA Labs were notable for: troponin 0.4 EKG: ST depressions On the floor, she is pain free. "
        "REVIEW OF SYSTEMS: negative for fever.\n"
        "PMH: 1. CAD 2. PE in the past\n"
        "MEDS: 1. Aspirin 81 mg PO DAILY 2. Atorvastatin 40 mg PO QPM\n"
        "ALLERGIES: Penicillins / shellfish\n"
        "FAMILY: Father with MI at 60.\n"
        "EXAM: VS: 98.2 130/80 GENERAL: comfortable HEENT: no nasal discharge, EOMI LUNGS: crackles"
    )


def test_sections_hold_everything_else_too() -> None:
    found = notes.sections(SUMMARY)
    for name in (
        "procedure",
        "exam_discharge",
        "results",
        "hospital_course",
        "discharge_medications",
        "discharge_diagnosis",
        "discharge_disposition",
        "discharge_instructions",
    ):
        assert "LATER" in found[name], name


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n", " \t\n", "\u00a0\n", "\x0b\n", "\u2028"])
def test_line_ends_and_white_space(end: str) -> None:
    assert notes.admission_note(SUMMARY.replace("\n", end)) == notes.admission_note(SUMMARY)


@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase])
def test_case_of_the_headings_does_not_matter(change) -> None:
    text = "\n".join(
        change(line) if line.rstrip().endswith(":") else line for line in SUMMARY.split("\n")
    )
    note = notes.admission_note(text)
    assert note.lower() == notes.admission_note(SUMMARY).lower()


def test_headings_without_colon() -> None:
    text = "\n".join(
        line.rstrip(" :") if line.rstrip().endswith(":") else line for line in SUMMARY.split("\n")
    )
    note = notes.admission_note(text)
    assert "LATER" not in note
    assert [line.split(":")[0] for line in note.split("\n")] == [
        "CC",
        "HPI",
        "PMH",
        "MEDS",
        "ALLERGIES",
        "FAMILY",
        "EXAM",
    ]


@pytest.mark.parametrize(
    "mark", ["**{}**", "=== {} ===", "# {}", "<{}>", "- {}", "\t{}", "1. {}", "[{}]", "•\u00a0{}"]
)
def test_decorated_headings(mark: str) -> None:
    text = "\n".join(
        mark.format(line.strip()) if line.rstrip().endswith(":") else line
        for line in SUMMARY.split("\n")
    )
    note = notes.admission_note(text)
    assert "LATER" not in note
    assert (
        note.startswith("CC: Chest pain\nHPI: ___ year old")
        and "crackles" in note
        and "Aspirin" in note
    )


# --- the ten failures of the usual regular expressions ----------------------------------------------------------------


def test_1_present_illness_is_not_cut_at_a_blank_line_and_a_colon() -> None:
    text = (
        "HPI:\nFirst part.\n\nIn the ED, initial vitals:\n98.6 80\n\nLabs: WBC 20\n\n"
        "Exam: RUQ tender\n\nPast Medical History:\nCAD\n\nPhysical Exam:\nsoft\n"
    )
    assert notes.sections(text)["present_illness"].split("\n") == [
        "First part.",
        "In the ED, initial vitals:",
        "98.6 80",
        "Labs: WBC 20",
        "Exam: RUQ tender",
    ]
    assert notes.sections(text)["exam"] == "soft"


@pytest.mark.parametrize(
    "heading",
    [
        "Exam on admission:",
        "ADMISSION EXAM",
        "PE on admit:",
        "Exam at presentation:",
        "Admission physical:",
        "Physical Examination on Admission",
        "PHYSICAL EXAM (ADMISSION):",
        "Initial exam:",
    ],
)
def test_2_exam_on_admission(heading: str) -> None:
    text = f"CC: pain\n\n{heading}\ntender\n\nBrief Hospital Course:\nLATER\n\nPhysical Exam:\nLATER soft\n"
    found = notes.sections(text)
    assert found["exam"] == "tender"
    assert "LATER" not in notes.admission_note(text)


LATER_EXAMS = [
    "DISCHARGE EXAM",
    "Discharge Exam:",
    "discharge exam:",
    "DISCHARGE PHYSICAL EXAM:",
    "Physical exam on discharge:",
    "PE on d/c:",
    "Exam at discharge",
    "On discharge:",
    "At discharge:",
    "Upon discharge:",
    "DISCHARGE:",
    "D/C EXAM:",
    "DC exam:",
    "Discharge PE:",
    "Exam on day of discharge:",
    "PHYSICAL EXAM ON DISCHARGE ___:",
    "==== DISCHARGE ====",
    "[Discharge exam]",
    "Discharge vitals:",
    "VS on discharge:",
    "Vitals prior to discharge:",
    "Exam prior to discharge:",
    "Pre-discharge exam:",
    "Physical Exam (discharge):",
    "Physical Exam - Discharge:",
    "At the time of discharge:",
    "Exam on transfer:",
    "* Discharge exam *",
    "Last exam before discharge:",
]


@pytest.mark.parametrize("heading", LATER_EXAMS)
@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("gap", ["\n", "\n\n"])
def test_3_discharge_exam_however_marked(heading: str, inline: bool, gap: str) -> None:
    colon = heading if not inline or heading.endswith(":") else heading + ":"
    text = (
        "CC: pain\n\nPhysical Exam:\nVS 98\n"
        f"tender belly{gap}{colon}{' ' if inline else chr(10)}LATER soft\nLATER legs fine\n"
    )
    found = notes.sections(text)
    assert found["exam"] == "VS 98\ntender belly"
    assert found["exam_discharge"].count("LATER") == 2


@pytest.mark.parametrize(
    "line",
    [
        "DISCHARGE EXAM VS LATER 98",
        "Discharge exam was LATER normal",
        "On discharge she LATER looks well",
        "At discharge VS LATER stable",
        "Exam on discharge LATER normal",
    ],
)
def test_3_discharge_exam_without_any_punctuation(line: str) -> None:
    assert "LATER" not in notes.admission_note(
        f"CC: pain\n\nPhysical Exam:\nVS 98\ntender belly.\n{line}\nLATER more\n"
    )


def test_3_discharge_exam_on_the_line_of_the_admission_exam() -> None:
    note = notes.admission_note(
        "CC: pain\nPhysical Exam: Admission: VS 98, tender. Discharge: LATER soft.\nLATER\n"
    )
    assert note == "CC: pain\nEXAM: VS 98, tender."


def test_3_unmarked_second_exam() -> None:
    text = (
        "CC: pain\n\nPhysical Exam:\nVS: 98\nGENERAL: ill\nHEENT: dry\n\nVS: LATER\n"
        "GENERAL: LATER well\nHEENT: LATER\n"
    )
    assert notes.sections(text)["exam"] == "VS: 98\nGENERAL: ill\nHEENT: dry"
    again = (
        "CC: pain\n\nPhysical Exam:\ntender\n\nPertinent Results:\nLATER\n\nPhysical Exam:\nLATER\n"
    )
    assert "LATER" not in notes.admission_note(again)


def test_3_wound_discharge_is_no_heading() -> None:
    exam = "VS 98\nEYES: no\ndischarge, EOMI\nWound with purulent\ndischarge from the left side\nNo discharge"
    assert notes.sections(f"CC: pain\n\nPhysical Exam:\n{exam}\n")["exam"] == exam


def test_4_empty_chief_complaint() -> None:
    text = (
        "Chief Complaint:\n \nMajor Surgical or Invasive Procedure:\nLATER cholecystectomy\n \n"
        "History of Present Illness:\nRUQ pain.\n"
    )
    assert notes.admission_note(text) == "HPI: RUQ pain."


@pytest.mark.parametrize(
    "text",
    [
        "a man with past medical history: CAD, DM who has fever.",
        "a man with\npast medical history: CAD, DM, who has fever.",
        "an old man, known for a long\npast medical history: CAD, DM,\nsocial history: smoker.",
    ],
)
def test_5_history_within_the_present_illness(text: str) -> None:
    found = notes.sections(f"History of Present Illness:\n{text}\n\nPast Medical History:\nCOPD\n")
    assert found == {"present_illness": text, "medical_history": "COPD"}


def test_6_abbreviations() -> None:
    text = (
        "CC: pain\nHPI: since today\nPMH: CAD\nPSH: appendectomy\nMEDS: aspirin\nALL: NKDA\n"
        "SH: smoker\nFH: MI\nPE: tender\nLABS: LATER\n"
    )
    assert notes.admission_note(text) == (
        "CC: pain\nHPI: since today\nPMH: CAD PSH: appendectomy\nMEDS: aspirin\nALLERGIES: NKDA\n"
        "SOCIAL: smoker\nFAMILY: MI\nEXAM: tender"
    )
    assert (
        notes.admission_note(text.lower().replace("later", "LATER")).lower()
        == notes.admission_note(text).lower()
    )
    bare = text.replace(": ", "\n\n", 1).replace(": ", "\n").replace("\n", "\n\n")
    assert notes.admission_note(bare.replace("LABS\n", "LABS:\n")).startswith(
        "CC: pain\nHPI: since today\nPMH: CAD"
    )


def test_6_diseases_that_look_like_headings() -> None:
    text = "PMH:\nCAD\nPE\nALL\nPE: 2015, on warfarin\nMI\n\nPhysical Exam:\ntender\n"
    assert notes.sections(text) == {
        "medical_history": "CAD\nPE\nALL\nPE: 2015, on warfarin\nMI",
        "exam": "tender",
    }


def test_7_crlf() -> None:
    found = notes.sections("Social History:\r\nsmoker\r\nFamily History:\r\nMI\r\n")
    assert found == {"social_history": "smoker", "family_history": "MI"}


@pytest.mark.parametrize(
    "later",
    [
        "Discharge Disposition:\nLATER Home",
        "Facility:\nLATER",
        "1. Aspirin LATER\n2. LATER",
        "Disposition: LATER",
        "Discharge Meds: LATER",
        "MEDICATIONS ON DISCHARGE:\n1. LATER",
        "New Medications:\nLATER",
        "D/C meds\nLATER",
        "Followup Instructions:\nLATER",
        "3. Insulin LATER\nRX *insulin LATER Disp #*30 Refills:*0",
        "Discharge diagnoses\nLATER",
        "Primary Diagnosis:\nLATER",
        "Medications at the time of discharge:\nLATER",
        "DISCHARGE CONDITION - LATER",
        "Medication changes:\nLATER",
        "Discharge:\nLATER",
        "Transitional issues:\nLATER",
        "Discharge labs\nLATER",
    ],
)
def test_8_admission_medications_end(later: str) -> None:
    text = f"CC: pain\n\nMedications on Admission:\n1. Aspirin 81 mg\n2. Metoprolol\n\n{later}\n"
    assert notes.sections(text)["medications"] == "1. Aspirin 81 mg\n2. Metoprolol"


@pytest.mark.parametrize(
    "heading",
    [
        "Medications on Admission:",
        "Home Medications:",
        "HOME MEDS",
        "Admission medications:",
        "Outpatient Medications:",
        "Meds on admission -",
        "Medications prior to admission:",
        "Preadmission medications:",
        "Medications:",
        "Current medications",
        "Meds:",
        "MEDICATIONS AT HOME:",
        "PTA meds:",
    ],
)
def test_8_names_of_admission_medications(heading: str) -> None:
    text = f"CC: pain\n\n{heading}\naspirin\n\nDischarge Medications:\nLATER\n"
    assert notes.admission_note(text) == "CC: pain\nMEDS: aspirin"


def test_8_unqualified_medications_after_the_course_are_later() -> None:
    assert "LATER" not in notes.admission_note(
        "CC: pain\n\nHospital Course:\nLATER\n\nMedications:\nLATER\n"
    )
    assert "LATER" not in notes.admission_note(
        "CC: pain\n\nMeds:\naspirin\n\nHospital Course:\nLATER\n\nMeds:\nLATER\n"
    )


@pytest.mark.parametrize(
    "heading",
    [
        "Chief Complaint:",
        "HPI:",
        "PMH:",
        "Family History:",
        "Physical Exam:",
        "Medications on Admission:",
    ],
)
def test_9_last_section(heading: str) -> None:
    for end in ("", "\n", "\n \n"):
        assert "all there" in notes.admission_note(f"CC: pain\n\n{heading}\nall there{end}")


@pytest.mark.parametrize(
    "paragraph",
    [
        "word word word:\n\n",
        "\n \n",
        "past medical history: x\n\n",
        ". ",
        "Discharge ",
        "1. \n",
        "discharge: \n",
        "a",
        " ",
        "=",
    ],
)
def test_10_linear_time(paragraph: str) -> None:
    def seconds(size: int) -> float:
        text = "HPI:\n" + paragraph * (size // len(paragraph))
        start = time.process_time()
        notes.admission_note(text)
        return time.process_time() - start

    small = min(seconds(500_000) for _ in range(3))
    assert seconds(5_000_000) < max(
        1.0, 40 * small
    )  # ten times the text: quadratic would be a hundred times the time


@pytest.mark.parametrize(
    "typo", ["Dicsharge", "Dischrage", "Discarge", "Dischargee", "Discharhe", "DISCAHRGE"]
)
def test_slips_of_the_pen_in_headings(typo: str) -> None:
    text = (
        f"CC: pain\n\nPhyscial Exam:\ntender\n\n{typo} exam:\nLATER\n\nMedcations on Admision:\n"
        f"aspirin\n\n{typo} Medications:\nLATER\n"
    )
    assert notes.admission_note(text) == "CC: pain\nMEDS: aspirin\nEXAM: tender"


def test_slips_of_the_pen_are_mended_alike_in_every_process() -> None:
    program = """
import hashlib
from helpers import notes
slips = []
for word in ("physical exam", "hospital course", "discharge medications", "past medical history"):
    for i in range(len(word)):
        slips += [word[:i] + extra + word[i + cut:] for extra, cut in (("", 1), ("q", 0), ("q", 1))]
read = [sorted(notes.sections(f"HPI: pain\\n\\n{slip}:\\nx")) for slip in slips]
print(hashlib.sha256(repr(read).encode()).hexdigest())
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}
    command = [sys.executable, "-c", program]
    found = {
        subprocess.run(
            command, env=env | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3", "4")
    }
    assert len(found) == 1 and len(found.pop()) == 65


def test_list_of_prescriptions_under_the_wrong_heading() -> None:
    text = (
        "CC: pain\n\nMedications on Admission:\n1. LATER aspirin\n"
        "RX *aspirin 81 mg LATER Disp #*30 Refills:*0\n2. LATER\n"
    )
    assert notes.admission_note(text) == "CC: pain"


# --- more -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heading",
    [
        "History of Present Illness",
        "HISTORY OF PRESENTING ILLNESS",
        "History of the Present Illness",
        "HPI",
        "Present illness",
        "HISTORY OF PRESENTING COMPLAINT",
        "Hx of Present Illness",
        "H.P.I.",
    ],
)
@pytest.mark.parametrize("form", ["{}:\n{}", "{}: {}", "{}\n{}", "{} - {}", "{} :{}", "{}:\n\n{}"])
def test_names_of_the_present_illness(heading: str, form: str) -> None:
    assert (
        notes.admission_note("CC:\npain\n\n" + form.format(heading, "Since today."))
        == "CC: pain\nHPI: Since today."
    )


def test_unusual_order() -> None:
    text = (
        "Discharge Diagnosis:\nLATER\n\nMedications on discharge:\nLATER\n\nPMH:\nCAD\n\nHPI:\n"
        "First.\n\nSecond.\n\nDischarge exam:\nLATER\n\n"
        "Admission exam:\ntender\n\nCC:\npain\n\nHome meds:\naspirin\n"
    )
    assert (
        notes.admission_note(text)
        == "CC: pain\nHPI: First. Second.\nPMH: CAD\nMEDS: aspirin\nEXAM: tender"
    )


def test_repeated_sections_before_and_after() -> None:
    text = (
        "HPI:\nOne.\n\nPMH:\nCAD\n\nHPI:\nTwo.\n\nBrief Hospital Course:\nLATER\n\nHPI:\nLATER\n\n"
        "PMH: LATER\n\nAllergies: none\nknown\n\nLATER again\n"
    )
    assert notes.admission_note(text) == "HPI: One. Two.\nPMH: CAD\nALLERGIES: none known"


def test_remarks_in_the_hospital_course_do_not_open_sections() -> None:
    text = (
        "CC:\npain\n\nPhysical Exam:\ntender\n\nHospital Course:\nLATER\n# CAD: LATER\n"
        "Exam: LATER improved\nMeds: LATER heparin\n"
        "Labs: LATER\nFamily history: MI\n\nLATER\n"
    )
    assert notes.admission_note(text) == "CC: pain\nFAMILY: MI\nEXAM: tender"


def test_later_heading_in_the_middle_of_a_line() -> None:
    note = notes.admission_note(
        "CC: pain\nMeds: aspirin, insulin. Discharge medications: LATER warfarin\nLATER\n"
    )
    assert note == "CC: pain\nMEDS: aspirin, insulin."


def test_transfer_vitals_within_the_present_illness_stay() -> None:
    text = (
        "HPI:\nFever.\nVitals on transfer: 98 80\nOn transfer,\nPrior to transfer:\n"
        "given cefepime\n\nOn arrival to the MICU:\nawake\n"
    )
    assert "given cefepime" in notes.admission_note(text) and "awake" in notes.admission_note(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "\x00",
        "No heading at all, just words.\nAnd more.",
        "Discharge Diagnosis:\nLATER",
        "CC: ___\nHPI:\n___\n\nPMH:\n",
    ],
)
def test_nothing_known(text: str) -> None:
    assert notes.admission_note(text) == ""


def test_blanks_within_text_stay() -> None:
    assert notes.admission_note("CC: ___ fell on ___\nPMH: ___") == "CC: ___ fell on ___"


PIECES = st.sampled_from(
    [
        "HPI:",
        "CC",
        "Physical Exam:",
        "DISCHARGE EXAM",
        "Brief Hospital Course:",
        "Meds:",
        "Discharge Medications:",
        "PMH: x",
        "",
        "on discharge",
        "1. a",
        "text: more",
        "RX *x",
        "Vitals:",
        "Labs:",
        "\u00a0",
        "x" * 100,
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.text(max_size=30), max_size=40))
def test_never_fails_and_invents_nothing(pieces: list[str]) -> None:
    text = "\n".join(pieces)
    note = notes.admission_note(text)
    assert isinstance(note, str)
    for line in note.split("\n"):
        heading, _, body = line.partition(": ")
        assert not line or (heading in notes.ADMISSION.values() and body == " ".join(body.split()))


@settings(max_examples=100, deadline=None)
@given(
    st.permutations(
        [
            "CC:\npain",
            "HPI:\nsince today\n\nIn the ED:\nvitals",
            "PMH:\nCAD",
            "Discharge Diagnosis:\nLATER",
            "Admission exam:\ntender",
            "Discharge exam:\nLATER",
            "Brief Hospital Course:\nLATER\n\nLATER: LATER",
            "Home meds:\naspirin",
            "Discharge meds:\nLATER",
            "Pertinent Results:\nLATER",
            "Procedures:\nLATER",
            "Followup Instructions:\nLATER",
        ]
    )
)
def test_any_order(blocks: list[str]) -> None:
    assert notes.admission_note("\n\n".join(blocks)) == (
        "CC: pain\nHPI: since today In the ED: vitals\nPMH: CAD\nMEDS: aspirin\nEXAM: tender"
    )


# --- headings that are in no list --------------------------------------------------------------------------------------

UNLISTED = """Interim labs:|Labs/Studies on admission:|PERTINENT LABS/IMAGING:|RADIOLOGIC STUDIES:|X-RAYS:|Test results:
Laboratory values|NEUROIMAGING:|PATHOLOGY:|CT ABDOMEN/PELVIS WITH CONTRAST:|ECHO (___):|Cardiac cath:
CARDIAC STUDIES|24 HR DATA (___)|SUMMARY STATEMENT:|Clinical course:|In-hospital course:|ACUTE MEDICAL ISSUES
CHRONIC/STABLE PROBLEMS:|Hospital course and treatment:|Transfer summary:|Death summary:
HOSPITAL COURSE/ASSESSMENT:|FICU COURSE|OVERNIGHT EVENTS:|Consults:|Medical Decision Making:
Operative findings:|Morning of discharge:|Impression and plan:|Final Diagnosis|Cause of death:""".replace(
    "\n", "|"
).split("|")


@pytest.mark.parametrize("heading", UNLISTED)
def test_unlisted_heading_ends_the_exam(heading: str) -> None:
    text = f"CC: pain\n\nPhysical Exam:\nVS 98\nSkin: no issues\n\n{heading}\nLATER\nMore: LATER\n\nHome Meds:\naspirin\n"
    assert notes.admission_note(text) == "CC: pain\nMEDS: aspirin\nEXAM: VS 98 Skin: no issues"


UNLISTED_MEDICATIONS = """Updated medications:|CONTINUE:|STOP taking:|CHANGE how you take:|Medications prescribed:|START
Medications given at discharge:|Post-discharge medications:|Current inpatient medications:|Medications to stop:|Expired:"""


@pytest.mark.parametrize("heading", UNLISTED_MEDICATIONS.replace("\n", "|").split("|"))
def test_unlisted_heading_ends_the_home_medications(heading: str) -> None:
    text = f"CC: pain\n\nMedications on Admission:\n1. aspirin\n2. new inhaler\n\n{heading}\nLATER\n\nFH:\nMI\n"
    assert notes.admission_note(text) == "CC: pain\nMEDS: 1. aspirin 2. new inhaler\nFAMILY: MI"


@pytest.mark.parametrize(
    "heading",
    ["Transfer summary:", "HOSPITALIZATION SUMMARY:", "Principal Problem:", "Final Diagnoses"],
)
def test_unlisted_heading_ends_the_present_illness(heading: str) -> None:
    assert (
        notes.admission_note(f"HPI:\nfever\n\n{heading}\nLATER\n\nPMH:\nCAD\n")
        == "HPI: fever\nPMH: CAD"
    )


def test_what_came_before_admission_stays_in_the_present_illness() -> None:
    text = (
        "HPI:\nfever\n\nED course:\nfluids\nOutside hospital course: intubated\nImaging showed: oedema\nConsults: cardiology\n"
        "Labs on arrival: WBC 20\nSince last discharge: well\n"
    )
    note = notes.admission_note(text + "\nLABS ON ADMISSION:\nLATER\n\nPMH:\nCAD\n")
    assert note == f"HPI: {' '.join(text[5:].split())}\nPMH: CAD"


def test_what_a_wound_discharges_stays_in_the_exam() -> None:
    exam = "VS 98\nVaginal discharge: none\nWound: purulent discharge"
    assert notes.sections(f"CC: pain\n\nPE:\n{exam}\n")["exam"] == exam


def test_home_medications_in_the_course_neither_leak_nor_hide_the_list() -> None:
    course = "Brief Hospital Course:\nACUTE ISSUES:\n# Sepsis LATER\nHome medications: LATER held\n# HTN: LATER\n\n"
    for listed in (
        "Medications on Admission:\n1. aspirin",
        "Meds on admission: 1. aspirin",
        "HOME MEDS: 1. aspirin",
    ):
        assert (
            notes.admission_note(f"CC: pain\n\n{course}{listed}\n") == "CC: pain\nMEDS: 1. aspirin"
        )


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("Chief Complaint/Reason for Admission", "chief_complaint"),
        ("Reason for hospitalization", "chief_complaint"),
        ("HPI (per admitting resident)", "present_illness"),
        ("History of presenting problem", "present_illness"),
        ("Pertinent past medical history", "medical_history"),
        ("Past Ob/Gyn History", "medical_history"),
        ("Social History/Habits", "social_history"),
        ("Allergies/ADRs", "allergies"),
        ("Known drug allergies", "allergies"),
        ("Confirmed home medications", "medications"),
        ("Medications PTA", "medications"),
        ("O/E", "exam"),
        ("Neurologic exam", "exam"),
    ],
)
@pytest.mark.parametrize("form", ["{}:\n{}", "{}: {}"])
def test_more_names_of_admission_sections(heading: str, section: str, form: str) -> None:
    text = f"Service: MEDICINE\n\n{form.format(heading, 'here it is')}\n\nBrief Hospital Course:\nLATER\n"
    assert notes.sections(text).get(section) == "here it is"


DENSE = (
    ("CC", "pain"),
    ("HPI", "65M with pain"),
    ("PMH", "CAD"),
    ("SH", "no tobacco"),
    ("FH", "cancer"),
    ("PE", "VS 98.2"),
)


@pytest.mark.parametrize("form", ["{}:\n{}", "{}\n{}", "{}: {}", "{} - {}", "{}- {}", "{}-\n{}"])
@pytest.mark.parametrize("end", ["", "."])
def test_abbreviations_need_no_blank_line(form: str, end: str) -> None:
    lines = [form.format(head, body + end) for head, body in DENSE]
    found = notes.admission_note("\n".join([*lines, "Brief Hospital Course:", "LATER"]))
    heads = ("CC", "HPI", "PMH", "SOCIAL", "FAMILY", "EXAM")
    assert found == "\n".join(
        f"{head}: {body}{end}" for head, (_, body) in zip(heads, DENSE, strict=True)
    )


def test_lower_case_headings_without_colon_or_blank_line() -> None:
    heads = (
        "chief complaint",
        "hpi",
        "past medical history",
        "shx",
        "family history",
        "physical exam",
    )
    lines = [f"{head}\n{body}" for head, (_, body) in zip(heads, DENSE, strict=True)]
    found = notes.sections("\n".join([*lines, "discharge exam", "LATER"]))
    assert not any("LATER" in found[name] for name in notes.ADMISSION if name in found)
    assert [*found.values()] == [*(body for _, body in DENSE), "LATER"]


@pytest.mark.parametrize("disease", ["PE", "ALL"])
def test_a_disease_in_a_list_is_no_heading(disease: str) -> None:
    text = f"PMH:\nCAD\n{disease}\nDVT\n\nSocial History:\nnone\n"
    assert notes.admission_note(text) == f"PMH: CAD {disease} DVT\nSOCIAL: none"


LATER_HEADINGS = [
    "Summary of hospital course by issue",
    "Concise summary of hospital course by issue/system:",
    "Lab Results",
    "Procedures this admission:",
    "Operations and procedures",
    "Discharge status",
    "Discharge destination",
    "List of discharge diagnoses:",
    "Follow-up plans:",
    "Hospital stay:",
    "EGD:",
    "Complications:",
    "Tests:",
    "Medications started this admission:",
    "PE - discharge",
    "Physical Exam: Discharge",
    "PE, discharge:",
    "Disch exam:",
    "DSCH PE:",
    "D.C. exam:",
    "FINAL EXAM:",
    "Most recent exam:",
    "Final medications:",
]


@pytest.mark.parametrize("heading", LATER_HEADINGS)
def test_more_headings_that_end_what_was_known(heading: str) -> None:
    known = "CC: pain\n\nMedications on Admission:\naspirin\n\nPhysical Exam:\ntender\n\n"
    found = notes.admission_note(f"{known}{heading}\nLATER and later\n")
    assert found == "CC: pain\nMEDS: aspirin\nEXAM: tender"


@pytest.mark.parametrize("heading", ["FINAL EXAM:", "Final medications:"])
def test_a_final_exam_or_list_is_a_later_one_even_where_it_is_the_only_one(heading: str) -> None:
    assert (
        notes.admission_note(f"CC: pain\n\nHPI:\nstory\n\n{heading}\nLATER\n")
        == "CC: pain\nHPI: story"
    )


def test_a_list_on_the_line_of_its_heading_stands_although_a_later_list_has_one_of_its_own() -> (
    None
):
    text = "CC: pain\nFH: MI\nPE: VS 98, tender\nHospital Course:\nLATER\n\nMedications on Admission: aspirin\n\n"
    text += "Discharge Medications:\n1. LATER\nDischarge Exam:\nLATER\n"
    assert notes.admission_note(text) == "CC: pain\nMEDS: aspirin\nFAMILY: MI\nEXAM: VS 98, tender"


def test_boilerplate_of_two_lines() -> None:
    text = "CC: pain\n\nMedications on Admission:\nThe Preadmission Medication list may be inaccurate and requires\n"
    assert (
        notes.admission_note(text + "futher investigation.\n1. aspirin\n")
        == "CC: pain\nMEDS: 1. aspirin"
    )


def test_framed_headings_need_no_blank_line() -> None:
    text = "CC:\npain\n**Procedure**\nLATER\n[PSH]\nappendectomy\nALL\n-----\nNKDA\nDischarge disposition\nLATER\n"
    assert notes.admission_note(text) == "CC: pain\nPMH: appendectomy\nALLERGIES: NKDA"


# --- leak audit -------------------------------------------------------------------------------------------------------

COURSE = "LATER she went to the cath laboratory where a stent was placed into the proximal vessel"


def test_audit_before_and_after_extraction() -> None:
    text = SUMMARY.replace("LATER She had an NSTEMI.", COURSE)
    before = leaks.leak_audit([{"hadm_id": 1, "note": text, "text": text, "code": "I214"}])
    after = leaks.leak_audit(
        [{"hadm_id": 1, "note": notes.admission_note(text), "text": text, "code": "I214"}]
    )
    assert before["later_text"]["count"] == 1 and before["later_text"]["share"] == 1.0
    assert COURSE.lower() in before["later_text"]["examples"][0]["found"]
    assert after["later_text"]["count"] == 0 and after["later_text"]["examples"] == []


def test_audit_finds_what_a_bad_extraction_leaves_in() -> None:
    text = f"HPI:\nchest pain\nPhysical Exam:\nVS 98\nDISCHARGE EXAM\n{COURSE}\n"
    found = leaks.leak_audit([{"note": f"EXAM: VS 98 {COURSE}", "text": text}])["later_text"]
    assert found["examples"] == [{"hadm_id": None, "found": COURSE.lower()}]


def test_audit_ignores_text_copied_from_the_present_illness() -> None:
    copied = "woman with known disease who presents today with two hours of substernal pain"
    text = f"HPI:\n{copied}\n\nBrief Hospital Course:\n{copied} and more\n"
    assert (
        leaks.leak_audit([{"note": notes.admission_note(text), "text": text}])["later_text"][
            "count"
        ]
        == 0
    )


def test_audit_of_titles() -> None:
    cases = [
        {"note": "HPI: admitted for Acute  Kidney Failure, again", "code": "N179"},
        {"note": "HPI: oliguria", "code": "N179"},
    ]
    found = leaks.leak_audit(cases)
    assert found["gold_title"] | {"examples": 0} == {
        "checked": 2,
        "count": 1,
        "share": 0.5,
        "examples": 0,
    }
    assert "acute kidney failure" in found["gold_title"]["examples"][0]["found"]
    assert found["later_text"]["checked"] == 0 and found["later_text"]["share"] is None


def test_audit_finds_short_lines_of_later_sections() -> None:
    text = "HPI:\nchest pain\n\nDischarge Diagnosis:\nAcute anterior STEMI\n"
    leaked, clean = (
        {"note": "HPI: chest pain acute anterior STEMI", "text": text},
        {"note": "HPI: chest pain", "text": text},
    )
    assert leaks.leak_audit([leaked])["later_text"]["examples"] == [
        {"hadm_id": None, "found": "acute anterior stemi"}
    ]
    assert leaks.leak_audit([clean])["later_text"]["count"] == 0
    known = {
        "note": "HPI: acute anterior STEMI",
        "text": text.replace("chest pain", "Acute anterior STEMI"),
    }
    assert leaks.leak_audit([known])["later_text"]["count"] == 0


@pytest.mark.parametrize(
    "heading",
    [
        "Summary of hospital course by issue",
        "Procedures this admission:",
        "Lab Results",
        "PE, discharge:",
    ],
)
def test_audit_knows_headings_that_begin_with_other_words(heading: str) -> None:
    text = f"HPI:\nchest pain\n\nPhysical Exam:\nno nasal discharge\n\n{heading}\n{COURSE}\n"
    leaked = {"note": f"HPI: chest pain EXAM: no nasal discharge {COURSE}", "text": text}
    assert leaks.leak_audit([leaked])["later_text"]["count"] == 1
    assert (
        leaks.leak_audit([leaked | {"note": notes.admission_note(text)}])["later_text"]["count"]
        == 0
    )


def test_audit_of_records_without_note() -> None:
    assert (
        leaks.leak_audit([{"note": float("nan"), "text": SUMMARY, "code": "I214"}])["gold_title"][
            "count"
        ]
        == 0
    )
    with pytest.raises(ValueError, match="record 1 has no 'note'"):
        leaks.leak_audit([{"text": SUMMARY}])


@pytest.mark.parametrize("part", ["Neurologic exam:", "VITAL SIGNS: 98 80\n\nEXAM:"])
def test_audit_takes_no_part_of_the_first_exam_for_a_second(part: str) -> None:
    exam = "alert and oriented to person place and time with fluent speech"
    text = f"HPI:\nchest pain\n\nPhysical Exam:\n{part}\n{exam}\n"
    found = leaks.leak_audit([{"note": notes.admission_note(text), "text": text}])["later_text"]
    assert found["count"] == 0 and exam in notes.admission_note(text)


@pytest.mark.parametrize("heading", ["Physical Exam:", "Exam:", "Repeat exam:", "Exam on ___:"])
def test_audit_sees_a_second_exam(heading: str) -> None:
    text = f"HPI:\nchest pain\n\nPhysical Exam:\nVS 98\ntender belly\n\n{heading}\n{COURSE}\n"
    leaked = {"note": f"HPI: chest pain EXAM: VS 98 tender belly {COURSE}", "text": text}
    assert leaks.leak_audit([leaked])["later_text"]["count"] == 1


@pytest.mark.parametrize("heading", ["# Social: lives with son.", "Social history:", "SH: smoker"])
def test_a_masked_section_does_not_let_the_course_in(heading: str) -> None:
    """In MIMIC's summaries the social history is `___`; a problem list may speak of it again."""
    course = (
        f"She was admitted.\n{heading}\n# DVT: LATER an occlusive thrombus was found\nShe did well."
    )
    text = SUMMARY.replace("LATER She had an NSTEMI.", course)
    assert text != SUMMARY
    note = notes.admission_note(text)
    assert "LATER" not in note and "did well" not in note
