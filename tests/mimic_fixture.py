"""A writer of tiny raw folders in MIMIC-IV's format, and invented discharge summaries of any length."""

from __future__ import annotations

import csv
import gzip
import io
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "hosp/admissions": ["subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag"],
    "hosp/diagnoses_icd": ["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"],
    "hosp/d_icd_diagnoses": ["icd_code", "icd_version", "long_title"],
    "note/discharge": [
        "note_id",
        "subject_id",
        "hadm_id",
        "note_type",
        "note_seq",
        "charttime",
        "storetime",
        "text",
    ],
}
PROSE = """patient pain chest fever stable denies prior daily noted given mild acute left right history mg treated plan cardiac
lung renal blood pressure normal exam cough nausea weeks days ago home clinic presented"""
WORDS = re.findall(r"\w+", PROSE)
CODES = (
    "I2101",
    "I214",
    "I5021",
    "J189",
    "A419",
    "K5730",
    "N179",
    "S72001A",
    "E1165",
    "F329",
    "G40909",
    "K7460",
)


def prose(rng: random.Random, words: int) -> str:
    """Invented sentences in lines of about 78 characters, with a blank line now and then."""
    lines = []
    for start in range(0, words, 12):
        lines.append(" ".join(rng.choices(WORDS, k=min(12, words - start))) + ".")
        if rng.random() < 0.15:
            lines.append("")
    return "\n".join(lines)


def summary(rng: random.Random, words: int = 300) -> str:
    """A discharge summary with all the usual headings; about a third of `words` were known at admission."""
    part = max(4, words // 15)
    return (
        "\nName:  ___                     Unit No:   ___\n \nAdmission Date:  ___              Discharge Date:   ___\n \n"
        "Date of Birth:  ___             Sex:   F\n \nService: MEDICINE\n \nAllergies: \nPenicillins\n \nAttending: ___.\n \n"
        f"Chief Complaint:\n{prose(rng, 4)}\n \nMajor Surgical or Invasive Procedure:\nnone later {rng.random()}\n\n \n"
        f"History of Present Illness:\n{prose(rng, 3 * part)}\n\nIn the ED, initial vitals:\n{prose(rng, part)}\n \n"
        f"Past Medical History:\n{prose(rng, part)}\n \nSocial History:\n___\nFamily History:\n{prose(rng, 6)}\n \n"
        f"Physical Exam:\nADMISSION EXAM:\n{prose(rng, part)}\n\nDISCHARGE EXAM:\nlater {prose(rng, part)}\n \n"
        f"Pertinent Results:\nlater {prose(rng, 3 * part)}\n \nBrief Hospital Course:\nlater {prose(rng, 4 * part)}\n \n"
        "Medications on Admission:\n1. Aspirin 81 mg PO DAILY\n2. Metoprolol 25 mg PO BID\n \n"
        f"Discharge Medications:\n1. later {prose(rng, part)}\n \nDischarge Disposition:\nHome later\n \nDischarge Diagnosis:\n"
        f"later {prose(rng, 5)}\n \nDischarge Condition:\nlater stable\n \nDischarge Instructions:\nlater {prose(rng, part)}\n \n"
        "Followup Instructions:\n___\n"
    )


def write_table(
    folder: Path,
    name: str,
    rows: Iterable[Sequence[Any]],
    *,
    columns: Sequence[str] | None = None,
    zipped: bool = True,
) -> Path:
    """Write one raw table, gzipped or plain."""
    path = folder / f"{name}.csv{'.gz' if zipped else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        gzip.GzipFile(path, "wb", compresslevel=1) if zipped else path.open("wb") as raw,
        io.TextIOWrapper(raw, encoding="utf-8", newline="") as handle,
    ):
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns or COLUMNS[name])
        writer.writerows(rows)
    return path


def tables(patients: int = 60, *, seed: int = 0, words: int = 300) -> dict[str, list[list[Any]]]:
    """Rows of a small sound hospital: one to three admissions for each patient, all coded in ICD-10, a note for each."""
    rng = random.Random(seed)
    found: dict[str, list[list[Any]]] = {name: [] for name in COLUMNS}
    found["hosp/d_icd_diagnoses"] = [[code, 10, f"title of {code}"] for code in CODES] + [
        ["4019", 9, "hypertension"]
    ]
    hadm = 20_000_000
    for subject in range(10_000_001, 10_000_001 + patients):
        for _ in range(rng.choice((1, 1, 2, 3))):
            hadm += 1
            found["hosp/admissions"].append(
                [subject, hadm, "2180-01-01 00:00:00", "2180-01-05 00:00:00", 0]
            )
            found["hosp/diagnoses_icd"].append(
                [subject, hadm, 1, rng.choice(CODES[: 3 + subject % 10]), 10]
            )
            found["hosp/diagnoses_icd"].append([subject, hadm, 2, "I10", 10])
            found["note/discharge"].append(
                [f"{subject}-DS-{hadm}", subject, hadm, "DS", 1, "", "", summary(rng, words)]
            )
    return found


def write_folder(folder: Path, content: dict[str, list[list[Any]]], *, zipped: bool = True) -> Path:
    """Write all tables; returns the folder."""
    for name, rows in content.items():
        write_table(folder, name, rows, zipped=zipped)
    return folder
