"""Writes a synthetic hospital: patients of the casebook as raw files in MIMIC-IV's format.

`python -m helpers.hospital OUT_DIR --admissions N --seed S --reading R`

Taught in notebook 1.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import icd
from helpers.casebook import casebook, draw_note, language, prior_given

TYPO = 0.004  # per word
# What becomes of the records of an admission, and of how many: the disorder of the real thing.
FATES = {
    "coded in ICD-9": 0.05,
    "no principal diagnosis": 0.005,
    "no note": 0.03,
    "only later sections": 0.005,
    "addendum": 0.01,
    "usual": 0.87,
    "copied forward": 0.015,  # the note of the patient's last admission, if there was one
    "copied with a remark": 0.015,
}

_WORDS = tomllib.loads(Path(__file__).with_name("hospital_words.toml").read_text(encoding="utf-8"))
OPENING = _WORDS["opening"]
ARRIVAL = _WORDS["arrival"]
FILLER = _WORDS["filler"]
HEADINGS = _WORDS["headings"]
NOTHING = _WORDS["nothing"]
INSTRUCTIONS = _WORDS["instructions"]
PERSON = _WORDS["person"]
ICD9 = _WORDS["icd9"]
ADMISSION = _WORDS["admission"]
NO_RESULTS = "labs within normal limits"
# Sections of a summary in their order, up to the discharge
LAYOUT = (
    "cc",
    "procedure",
    "hpi",
    "pmh",
    "social",
    "family",
    "exam",
    "exam_later",
    "results",
    "course",
    "meds",
    "meds_later",
)
# What a note was written from: it goes with a note that is copied
NOTED = ["code", "sex", "complaint", "drawn", "present", "denied", "missing", "author"]
READ = ["blocks", "reading"]  # and with reading above 0
STAY = ["subject_id", "hadm_id", "admittime", "dischtime"]
NOTE_COLUMNS = [
    "note_id",
    "subject_id",
    "hadm_id",
    "note_type",
    "note_seq",
    "charttime",
    "storetime",
    "text",
]
_PATIENT = re.compile(r"___ ?(?:yo |year old )?(?:M|F|man|woman)\b")

Row = dict[str, Any]


def write(
    out_dir: str | Path,
    *,
    admissions: int = 6000,
    seed: int = 0,
    reading: float = 0.0,
    full: bool = False,
) -> Path:
    """Write a hospital as raw MIMIC-IV files (`hosp/`, `note/`, gzip) with `truth/` beside them.

    The same seed gives the same bytes. The records have the disorder of the real thing: FATES.
    `reading`, from 0 to 1: how much must be read, not only counted (see `casebook`).
    Written aside and renamed when whole. Raises ValueError for a folder that holds anything else.
    """
    if not 0 <= reading <= 1:
        raise ValueError(f"reading must be from 0 to 1, not {reading}.")
    if admissions < 1:
        raise ValueError(f"admissions must be at least 1, not {admissions}.")
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()) and not (out / "truth/manifest.json").is_file():
        raise ValueError(
            f"{out} holds files that are no synthetic hospital: choose another folder, "
            "nothing was overwritten."
        )
    rows = draw(admissions, seed, reading)
    texts = summaries(rows, seed, full=full)
    stays = _stays(rows, texts, np.random.default_rng([seed, 3]))
    diagnoses = _diagnoses(stays)
    tables = {
        "hosp/patients": _patients(stays),
        "hosp/admissions": stays[STAY].assign(**ADMISSION),
        "hosp/diagnoses_icd": diagnoses,
        "hosp/d_icd_diagnoses": _dictionary(diagnoses),
        "note/discharge": _discharge(stays),
    }
    manifest = {
        "admissions": admissions,
        "seed": seed,
        "full": full,
        "reading": reading,
        "casebook_sha256": casebook().sha256,
        "language_sha256": language.sha256(),
    }
    part = out.with_name(out.name + ".part")
    for folder in ("hosp", "note", "truth"):
        (part / folder).mkdir(parents=True, exist_ok=True)
    compression = {"method": "gzip", "compresslevel": 3, "mtime": 0}  # no time of day in the bytes
    for name, table in tables.items():
        path = part / f"{name}.csv.gz"
        table.to_csv(path, index=False, lineterminator="\n", compression=compression)
    truth = stays[["subject_id", "hadm_id", *NOTED, *(READ if reading else ())]]
    truth.to_parquet(part / "truth/findings.parquet", index=False)
    (part / "truth/manifest.json").write_text(json.dumps(manifest, indent=1))
    if out.exists():
        shutil.rmtree(out)
    return part.rename(out)


def draw(admissions: int, seed: int, reading: float = 0.0) -> list[Row]:
    """Draw patients and their admissions, what they have, and what the author writes of it.

    Dicts of subject_id, hadm_id, code (dotted), sex, age, author (0 to 3), and what
    `casebook.draw_note` gives.
    """
    rng = np.random.default_rng([seed, 1])
    rows = _draw_admissions(admissions, rng)
    spins = rng.random((len(rows), casebook().slot.max() + 1))
    for row, spin in zip(rows, spins, strict=True):
        row |= draw_note(row["code"], spin, rng, reading)
        row["author"] = rng.integers(4)
    return rows


def summaries(rows: list[Row], seed: int, *, full: bool = False) -> list[str]:
    """The discharge summaries of drawn admissions, in order.

    `full` writes about 1,500 words each, as long as MIMIC-IV's; else about 150.
    """
    rng = random.Random(1_000_003 * seed + 2)
    return [_summary(row, rng, full) for row in rows]


def _draw_admissions(admissions: int, rng: np.random.Generator) -> list[Row]:
    """Patients and their admissions: ids, code, sex and age."""
    book = casebook()
    rows = []
    subject = 10_000_000 + 1000 * rng.integers(0, 9)
    hadm = 20_000_000
    while len(rows) < admissions:
        subject += rng.integers(1, 40)
        visits = 1 + (rng.random() < 0.25) + (rng.random() < 0.08)
        code = rng.choice(len(book.codes), p=book.prior)
        sex = "M" if rng.random() < book.male[code] else "F"
        age = np.clip(rng.normal(*book.age[code]), 18, 95)
        for visit in range(min(visits, admissions - len(rows))):
            if visit > 0:
                code = rng.choice(len(book.codes), p=prior_given(sex, age))
            hadm += rng.integers(1, 30)
            row = {"subject_id": subject, "hadm_id": hadm, "code": book.codes[code]}
            rows.append(row | {"sex": sex, "age": age})
    return rows


def _summary(row: Row, rng: random.Random, full: bool) -> str:
    """One discharge summary as text."""
    book = casebook()
    entry = book.entries[row["code"]]
    author = row["author"]
    title = icd.title(row["code"])
    events = " ".join(event.rstrip(".") + "." for event in entry["course"])
    bodies = _told(row, rng) if row.get("reading") else _enumerated(row, rng)
    bodies |= {
        "cc": row["complaint"] or "",
        "exam_later": "VS stable, feeling better, ambulating",
        "course": f"Patient was admitted with {title[0].lower()}{title[1:]}. {events}",
        "meds_later": _numbered(entry["discharge_meds"]),
        "instructions": INSTRUCTIONS.format(**PERSON[row["sex"]]),
    }
    if full:
        filler = _filler(rng)
        bodies["hpi"] += f"\n\n{filler}"
        bodies["results"] += f"\n{filler}"
        bodies["course"] += f"\n\n{filler}\n\n{filler}"
        bodies["instructions"] += f"\n{filler}\n\n{filler}"
    bodies["procedure"] = rng.choice(entry["procedure"] or ["None"])
    gap = "\n " if author % 2 else ""  # half of the authors leave a line free below a heading
    parts = [
        "",
        "Name:  ___                     Unit No:   ___",
        "Admission Date:  ___              Discharge Date:   ___",
        f"Date of Birth:  ___             Sex:   {row['sex']}",
        "Service: MEDICINE",
        "Allergies: \n" + rng.choice(["NKDA", "___", "___"]),
        "Attending: ___.",
    ]
    for section in LAYOUT:
        if section not in row["missing"]:
            parts.append(f"{HEADINGS[section][author]}{gap}\n{bodies[section]}")
    parts += [
        "Discharge Disposition:\nHome",
        f"{HEADINGS['diagnosis'][author]}{gap}\n{title}",
        "Discharge Condition:\nStable.",
        f"Discharge Instructions:\n{bodies['instructions']}",
        "Followup Instructions:\n___",
    ]
    return _typos("\n \n".join(parts), rng) + "\n"


def _enumerated(row: Row, rng: random.Random) -> dict[str, str]:
    """The sections of a note that lists its findings, and the results."""
    book = casebook()
    phrases = defaultdict(list)  # by section
    for name in rng.sample(row["present"], len(row["present"])):
        finding = book.findings[name]
        phrases[finding["section"]].append(rng.choice(finding["phrases"]))
    denials = ", ".join(rng.choice(book.findings[name]["denied"]) for name in row["denied"])
    story = _opening(row, ", ".join(phrases["hpi"]))
    if denials:
        story += f" {denials[0].upper()}{denials[1:]}."
    if phrases["ed"]:
        story += ARRIVAL[row["author"]].format(findings=", ".join(phrases["ed"]))
    results = "; ".join(phrases["ed"]) or NO_RESULTS
    bodies = {section: _listed(section, phrases[section], row["author"]) for section in NOTHING}
    return bodies | {"hpi": story, "results": results}


def _opening(row: Row, findings: str) -> str:
    """Who comes with what."""
    findings = findings or row["complaint"] or "feeling unwell"
    return OPENING[row["author"]].format(findings=findings, **PERSON[row["sex"]])


def _told(row: Row, rng: random.Random) -> dict[str, str]:
    """The sections of a note that must be read, and the results."""
    told = language.sentences(row, casebook().findings, rng)
    opening = _opening(row, " and ".join(told.pop("opening")))
    results = " ".join(told["ed"]) or NO_RESULTS
    told["hpi"] = [opening, *told["hpi"], *told.pop("ed")]
    bodies = {section: " ".join(texts) or NOTHING[section] for section, texts in told.items()}
    return bodies | {"results": results}


def _listed(section: str, phrases: list[str], author: int) -> str:
    if not phrases:
        return NOTHING[section]
    if author == 0 and section in ("pmh", "meds"):
        return _numbered(phrases)
    return ", ".join(phrases)


def _numbered(items: list[str]) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def _filler(rng: random.Random) -> str:
    """Three paragraphs of eight sentences that say nothing."""
    paragraphs = [" ".join(rng.choice(FILLER) for _ in range(8)) for _ in range(3)]
    return "\n\n".join(paragraphs)


def _typos(text: str, rng: random.Random) -> str:
    """The text with two neighbouring letters swapped in a few words."""
    words = text.split(" ")
    for _ in range(int(rng.expovariate(1) * TYPO * len(words) + rng.random())):
        i = rng.randrange(len(words))
        word = words[i]
        if len(word) > 4 and word.isalpha():
            j = rng.randint(1, len(word) - 3)
            words[i] = word[:j] + word[j + 1] + word[j] + word[j + 2 :]
    return " ".join(words)


def _stays(rows: list[Row], texts: list[str], rng: np.random.Generator) -> pd.DataFrame:
    """The admissions as a table: with fate, dates, codes, and the summary as it was filed."""
    fates = rng.choice(list(FATES), len(rows), p=list(FATES.values()))
    previous = {"subject_id": None}
    for number, (row, text, fate) in enumerate(zip(rows, texts, fates, strict=True)):
        if row["subject_id"] == previous["subject_id"] and fate.startswith("copied"):
            row |= {key: previous[key] for key in [*NOTED, *READ] if key in previous}
            text = previous["text"]
            if fate == "copied with a remark":
                text = _PATIENT.sub(r"\g<0> seen here before", text, count=1)
        previous = row | {"text": text}
        if fate == "only later sections":
            text = text[text.find("Discharge Disposition") :]
        year = 2150 + row["subject_id"] % 40 + rng.integers(0, 3)
        day = rng.integers(1, 28)
        month = f"{year}-{rng.integers(1, 13):02d}"
        row["fate"] = fate
        row["text"] = text
        row["admittime"] = f"{month}-{day:02d} {rng.integers(24):02d}:15:00"
        row["dischtime"] = f"{month}-{min(28, day + 4):02d} 13:00:00"
        if fate == "coded in ICD-9":
            row["icd_code"] = rng.choice(list(ICD9), 2, replace=False)
        else:
            codes = [row["code"], *casebook().entries[row["code"]]["secondary"]]
            width = 7 if number % 50 == 0 else 0  # some are padded, as CHAR(7) may be
            row["icd_code"] = [code.replace(".", "").ljust(width) for code in codes]
    return pd.DataFrame(rows)


def _patients(stays: pd.DataFrame) -> pd.DataFrame:
    patients = stays.drop_duplicates("subject_id")
    return patients[["subject_id"]].assign(
        gender=patients["sex"],
        anchor_age=patients["age"].round().astype(int),
        anchor_year=2150 + patients["subject_id"] % 40,
        anchor_year_group="2017 - 2019",
        dod="",
    )


def _diagnoses(stays: pd.DataFrame) -> pd.DataFrame:
    codes = stays.explode("icd_code")
    first = np.where(codes["fate"] == "no principal diagnosis", 2, 1)
    return codes[["subject_id", "hadm_id"]].assign(
        seq_num=first + codes.groupby("hadm_id").cumcount(),
        icd_code=codes["icd_code"],
        icd_version=np.where(codes["fate"] == "coded in ICD-9", 9, 10),
    )


def _dictionary(diagnoses: pd.DataFrame) -> pd.DataFrame:
    """Titles of all codes of ICD-9 in use, and of those of ICD-10 that a patient has."""
    in_icd10 = diagnoses.query("icd_version == 10")["icd_code"].str.strip()
    titles = [(code, 9, title) for code, title in ICD9.items()]
    titles += [(code, 10, icd.title(code)) for code in in_icd10.unique()]
    return pd.DataFrame(sorted(titles), columns=["icd_code", "icd_version", "long_title"])


def _discharge(stays: pd.DataFrame) -> pd.DataFrame:
    summaries = stays.query("fate != 'no note'").assign(note_seq=1)
    addenda = stays.query("fate == 'addendum'").assign(note_seq=2)
    addenda["text"] += "\nAddendum:\nNo change.\n"
    notes = pd.concat([summaries, addenda]).sort_index(kind="stable")
    notes["note_id"] = [f"{note.subject_id}-DS-{note.note_seq}" for note in notes.itertuples()]
    notes["note_type"] = "DS"
    notes["charttime"] = notes["admittime"]
    notes["storetime"] = notes["admittime"]
    return notes[NOTE_COLUMNS]


def main() -> None:
    """`python -m helpers.hospital OUT_DIR --admissions N --seed S [--full]`"""
    parser = argparse.ArgumentParser(
        description="Write a synthetic hospital in MIMIC-IV's file format."
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--admissions", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reading", type=float, default=0.0, help="0: count words; 1: read")
    parser.add_argument("--full", action="store_true", help="notes of about 1,500 words")
    options = parser.parse_args()
    print(write(**vars(options)))


if __name__ == "__main__":
    main()
