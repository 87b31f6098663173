"""A synthetic hospital: casebook -> raw files in MIMIC-IV's format, and the exact posterior of each note.

The model of a note is a naive Bayes one, and known: an admission has a principal diagnosis c ~ weight; each *slot* (a
finding, or a set of findings that exclude each other) takes a value with a probability that the casebook states for c;
the author mentions a finding that is there with probability MENTION, denies one that is absent with probability DENY,
and leaves out whole sections now and then, whatever the diagnosis. Phrasing, style, typos, hidden ages and everything
written after admission carry no further information about c, so P(c | what the text shows) is exact: see `posterior`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

MENTION = 0.8  # P(the note states a finding that is there)
DENY = 0.07  # P(the note denies a finding that is absent), where the casebook has words for it
BACKGROUND = 0.0008  # default probability of a finding that a diagnosis does not list
MISSING = {
    "cc": 0.03,
    "pmh": 0.05,
    "meds": 0.06,
    "exam": 0.08,
    "social": 0.4,
    "family": 0.5,
}  # P(section left out)
TYPO = 0.004  # per word
SECTIONS = ("hpi", "ed", "pmh", "meds", "exam", "social", "family")
CASEBOOK_DIR = Path(__file__).parent / "casebook"
_WORDS = tomllib.loads(Path(__file__).with_name("hospital.toml").read_text(encoding="utf-8"))
ICD9, HEADINGS, OPENING, ARRIVAL, NOTHING, FILLER = (
    _WORDS[kind] for kind in ("icd9", "headings", "opening", "arrival", "nothing", "filler")
)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it holds arrays
class Casebook:
    """The casebook as arrays: C codes, F findings, S slots, M complaints.

    codes [C] dotted; prior [C]; male [C]; p_finding [C, F] P(finding | code); slot [F] index of its slot;
    p_complaint [C, M]; entries: code -> its raw record; findings: id -> its raw record.
    """

    codes: tuple[str, ...]
    prior: np.ndarray
    male: np.ndarray
    age: np.ndarray
    names: tuple[str, ...]
    p_finding: np.ndarray
    slot: np.ndarray
    section: tuple[str, ...]
    deniable: np.ndarray
    complaints: tuple[str, ...]
    p_complaint: np.ndarray
    entries: dict[str, dict[str, Any]]
    findings: dict[str, dict[str, Any]]
    sha256: str


@lru_cache(maxsize=4)
def casebook(folder: Path = CASEBOOK_DIR) -> Casebook:
    """Read and check all `*.yaml` of the casebook. Raises ValueError naming file, entry and fault."""
    import yaml

    findings: dict[str, dict[str, Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.yaml")):
        digest.update(path.read_bytes())
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for kind, table in (("findings", findings), ("codes", entries)):
            for key, record in (content.get(kind) or {}).items():
                if key in table:
                    raise ValueError(
                        f"{path.name}: {kind} entry '{key}' stands in the casebook twice. Rename one."
                    )
                table[key] = record | {"file": path.name}
    names, codes = tuple(findings), tuple(sorted(entries))
    slots = {name: findings[name].get("slot", name) for name in names}
    slot_names = list(dict.fromkeys(slots.values()))
    slot = np.array([slot_names.index(slots[name]) for name in names])
    alone = np.bincount(slot) == 1
    background = np.array([float(findings[name].get("background", BACKGROUND)) for name in names])
    p_finding = np.tile(np.maximum(background, 1e-5), (len(codes), 1))
    complaints = tuple(sorted({text for entry in entries.values() for text in entry["complaint"]}))
    p_complaint = np.full((len(codes), len(complaints)), 1e-4)
    for row, code in enumerate(codes):
        entry = entries[code]
        for name, probability in entry["findings"].items():
            if name not in findings or not 0 < probability < 1:
                raise ValueError(
                    f"{entry['file']}: {code}: finding '{name}': {probability} is unknown or outside (0, 1)."
                )
            p_finding[row, names.index(name)] = probability
        for text, probability in entry["complaint"].items():
            p_complaint[row, complaints.index(text)] += probability
        total = np.bincount(slot, weights=p_finding[row])
        if (total >= 1).any():
            raise ValueError(
                f"{entry['file']}: {code}: slot '{slot_names[int(total.argmax())]}' sums to {total.max():.3f}, not < 1."
            )
    for name in names:
        if findings[name]["section"] not in SECTIONS:
            raise ValueError(
                f"{findings[name]['file']}: finding '{name}': section is none of {', '.join(SECTIONS)}."
            )
    return Casebook(
        codes=codes,
        prior=_normal(np.array([float(entries[code]["weight"]) for code in codes])),
        male=np.clip([float(entries[code]["male"]) for code in codes], 0.0, 1.0),
        age=np.array([entries[code]["age"] for code in codes], dtype=float),
        names=names,
        p_finding=p_finding,
        slot=slot,
        section=tuple(findings[name]["section"] for name in names),
        deniable=np.array(
            [bool(findings[name].get("denied")) and alone[slot[i]] for i, name in enumerate(names)]
        ),
        complaints=complaints,
        p_complaint=p_complaint / p_complaint.sum(1, keepdims=True),
        entries=entries,
        findings=findings,
        sha256=digest.hexdigest(),
    )


def _normal(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(axis=-1, keepdims=True)


# --- what a text shows, and what follows from it ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What the text of one admission note shows: ids of findings stated and denied, sections left out, complaint, sex."""

    present: tuple[str, ...]
    denied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    complaint: str | None = None
    sex: str | None = None


@lru_cache(maxsize=4)
def _likelihoods(book: Casebook) -> dict[str, Any]:
    """Log-likelihood ratios of each visible state, [C, F] each: a note then costs a few additions, not a loop over slots."""
    stated = np.log(book.p_finding * MENTION)
    n_slots = int(book.slot.max()) + 1
    any_value = np.stack(
        [np.bincount(book.slot, weights=row, minlength=n_slots) for row in book.p_finding]
    )
    deniable = np.zeros(n_slots, bool)
    deniable[book.slot[book.deniable]] = True
    deny = np.where(deniable, DENY, 0.0)
    silent = np.log(any_value * (1 - MENTION) + (1 - any_value) * (1 - deny))
    denied = np.log((1 - any_value) * np.where(deniable, DENY, 1.0))
    section = np.array([book.section[int(np.argmax(book.slot == s))] for s in range(n_slots)])
    return {
        "stated": stated,
        "silent": silent,
        "denied": denied,
        "section": section,
        "index": {name: i for i, name in enumerate(book.names)},
    }


def posterior(shown: Shown, book: Casebook | None = None) -> np.ndarray:
    """P(code | what the text shows), [C], exact under the generator's model (naive Bayes over slots, complaint and sex)."""
    book = book or casebook()
    table = _likelihoods(book)
    log_p = np.log(book.prior)
    slot_sum = table["silent"].copy()
    for name in shown.denied:
        s = book.slot[table["index"][name]]
        slot_sum[:, s] = table["denied"][:, s]
    for name in shown.present:
        i = table["index"][name]
        slot_sum[:, book.slot[i]] = table["stated"][:, i]
    log_p = log_p + slot_sum[:, ~np.isin(table["section"], shown.missing)].sum(1)
    if shown.complaint in book.complaints:
        log_p = log_p + np.log(book.p_complaint[:, book.complaints.index(shown.complaint)])
    if shown.sex in ("M", "F"):
        with np.errstate(divide="ignore"):
            log_p = log_p + np.log(book.male if shown.sex == "M" else 1 - book.male)
    weights = np.exp(log_p - log_p.max())
    return weights / weights.sum()


def evidence(code: str, spans: dict[str, str], book: Casebook, most: int) -> tuple[list[str], str]:
    """The findings among `spans` (id -> words) that speak most for a dotted code, and the one that tells it from its
    unspecified sibling ("" if it has none).

    Ranked by log P(finding | code) - log P(finding), where that exceeds 0.5; at most `most` of them.
    """
    row, index = book.codes.index(code), _likelihoods(book)["index"]
    marginal = book.prior @ book.p_finding
    weight = {
        name: float(np.log(book.p_finding[row, index[name]] / marginal[index[name]]))
        for name in spans
    }
    cited = sorted(
        (name for name in spans if weight[name] > 0.5), key=weight.__getitem__, reverse=True
    )[:most]
    sibling = book.entries[code].get("unspecified")
    if sibling not in book.codes:
        return cited, ""
    other = book.codes.index(sibling)
    ratio = {
        name: book.p_finding[row, index[name]] / book.p_finding[other, index[name]]
        for name in cited
    }
    return cited, max(ratio, key=ratio.__getitem__, default="")


@lru_cache(maxsize=4)
def ideal_reader(data_dir: str | Path) -> pd.DataFrame:
    """Posterior argmax of every admission of a synthetic hospital, indexed by hadm_id.

    Columns per level (full, category, chapter): the argmax and, as `<level>_p`, its probability. The mean of a `_p` column
    is the expected accuracy at that level: the bound for any reader, in expectation. The argmax of a level sums over the
    codes below it, so the three need not be one path. Raises FileNotFoundError for a folder without truth (real MIMIC-IV).
    """
    from helpers import icd

    path = Path(data_dir) / "truth" / "findings.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: only a synthetic hospital has a known ceiling. See data/README.md."
        )
    book = casebook()
    written = json.loads((path.parent / "manifest.json").read_text())
    if written["casebook_sha256"] != book.sha256:
        raise ValueError(
            f"{path} was made from another casebook. Delete {Path(data_dir)} and run 01_data_preparation again."
        )
    truth = pd.read_parquet(path)
    groups = {"full": [icd.normalise(code) for code in book.codes]}
    groups["category"] = [icd.category(code) for code in book.codes]
    groups["chapter"] = [icd.chapter(code) for code in book.codes]
    posteriors = np.stack(
        [
            posterior(
                Shown(
                    tuple(row.present),
                    tuple(row.denied),
                    tuple(row.missing),
                    row.complaint,
                    row.sex,
                ),
                book,
            )
            for row in truth.itertuples()
        ]
    )
    result = pd.DataFrame(index=pd.Index(truth["hadm_id"], name="hadm_id"))
    for level, labels in groups.items():
        values, inverse = np.unique(np.array(labels), return_inverse=True)
        mass = posteriors @ np.eye(len(values))[inverse]
        result[level], result[f"{level}_p"] = values[mass.argmax(1)], mass.max(1)
    return result


@lru_cache(maxsize=4)
def _lexicon(book: Casebook) -> dict[str, list[tuple[str, str, bool]]]:
    """First word -> phrases that begin with it, longest first: (phrase, finding, present or denied)."""
    words: dict[str, list[tuple[str, str, bool]]] = {}
    for name, record in book.findings.items():
        for texts, present in ((record.get("denied", ()), False), (record["phrases"], True)):
            for text in texts:
                words.setdefault(_FIRST_WORD.match(text.lower()).group(), []).append(
                    (text.lower(), name, present)
                )  # type: ignore[union-attr]
    return {first: sorted(phrases, key=lambda p: -len(p[0])) for first, phrases in words.items()}


_FIRST_WORD = re.compile(r"\w+|\S")


def read_findings(note: str, book: Casebook | None = None) -> list[tuple[str, bool, int, int]]:
    """Casebook phrases in a text, in order: (finding, present or denied, start, end). A phrase with a typo is not found."""
    lexicon, text, found, free = _lexicon(book or casebook()), note.lower(), [], 0
    for match in _FIRST_WORD.finditer(text):
        start = match.start()
        for phrase, name, present in lexicon.get(match.group(), ()) if start >= free else ():
            end = start + len(phrase)
            if text.startswith(phrase, start) and not (
                text[end : end + 1].isalnum() and phrase[-1].isalnum()
            ):
                found.append((name, present, start, end))
                free = end
                break
    return found


_HEADED = {
    "CC": "cc",
    "HPI": "hpi",
    "PMH": "pmh",
    "MEDS": "meds",
    "SOCIAL": "social",
    "FAMILY": "family",
    "EXAM": "exam",
}


def read(note: str, book: Casebook | None = None) -> tuple[Shown, dict[str, str]]:
    """What an admission note (`notes.admission_note`) shows to a reader of phrases, and finding -> its span in the note."""
    book = book or casebook()
    lines = {line.partition(": ")[0]: line.partition(": ")[2] for line in note.split("\n")}
    missing = tuple(name for head, name in _HEADED.items() if head not in lines)
    complaint = lines.get("CC", "").strip().lower() or None
    story = note.replace(f"CC: {lines.get('CC')}", "", 1) if complaint else note
    spans: dict[str, str] = {}
    denied: list[str] = []
    for name, present, start, end in read_findings(story, book):
        if present:
            spans.setdefault(name, story[start:end])
        elif book.deniable[book.names.index(name)]:
            denied.append(name)
    man, woman = (
        re.search(rf"___\s*(?:yo |year old )?(?:{words})\b", story)
        for words in ("M|man", "F|woman")
    )
    sex = "M" if man else "F" if woman else None
    return Shown(tuple(spans), tuple(set(denied) - set(spans)), missing, complaint, sex), spans


# --- writing the hospital ---------------------------------------------------------------------------------------------


def _typos(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(int(rng.expovariate(1) * TYPO * len(words) + rng.random())):
        i = rng.randrange(len(words))
        if len(words[i]) > 4 and words[i].isalpha():
            j, word = rng.randint(1, len(words[i]) - 3), words[i]
            words[i] = word[:j] + word[j + 1] + word[j] + word[j + 2 :]
    return " ".join(words)


def _summary(
    book: Casebook, row: dict[str, Any], rng: random.Random, title: str, full: bool
) -> str:
    """One discharge summary as text, from what was drawn."""
    entry, author, male = book.entries[row["code"]], row["author"], row["sex"] == "M"
    said: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for name in rng.sample(row["present"], len(row["present"])):
        said[book.findings[name]["section"]].append(rng.choice(book.findings[name]["phrases"]))
    no = ", ".join(rng.choice(book.findings[name]["denied"]) for name in row["denied"])
    more = (
        "\n\n".join(" ".join(rng.choice(FILLER) for _ in range(8)) for _ in range(3))
        if full
        else ""
    )
    hpi = ", ".join(said["hpi"]) or row["complaint"] or "feeling unwell"
    text = OPENING[author].format(
        s="M" if male else "F", w="man" if male else "woman", t="Mr." if male else "Ms.", f=hpi
    )
    text += f" {no[0].upper()}{no[1:]}." if no else ""
    if said["ed"]:
        text += ("\n\n" if author == 1 else " ") + ARRIVAL[author].format(f=", ".join(said["ed"]))
    body = {"cc": row["complaint"] or "", "hpi": text + (f"\n\n{more}" if full else "")}
    body["procedure"] = rng.choice(entry.get("procedure") or ["None"])
    for name, nothing in NOTHING.items():
        numbered = author == 0 and name in ("pmh", "meds") and said[name]
        body[name] = (
            "\n".join(f"{i}. {t}" for i, t in enumerate(said[name], 1))
            if numbered
            else ", ".join(said[name]) or nothing
        )
    head = {key: names[author] + ("\n " if author % 2 else "") for key, names in HEADINGS.items()}
    out = [
        "",
        "Name:  ___                     Unit No:   ___",
        "Admission Date:  ___              Discharge Date:   ___",
        f"Date of Birth:  ___             Sex:   {row['sex']}",
        "Service: MEDICINE",
        "Allergies: \n" + rng.choice(["NKDA", "___", "___"]),
        "Attending: ___.",
    ]
    shown = ("cc", "procedure", "hpi", "pmh", "social", "family", "exam")
    out += [f"{head[name]}\n{body[name]}" for name in shown if name not in row["missing"]]
    out += [
        head["exam_later"] + "\nVS stable, feeling better, ambulating",
        head["results"]
        + "\n"
        + ("; ".join(said["ed"]) or "labs within normal limits")
        + (f"\n{more}" if full else ""),
        head["course"]
        + f"\nPatient was admitted with {title[0].lower()}{title[1:]}. "
        + " ".join(t.rstrip(".") + "." for t in entry["course"])
        + (f"\n\n{more}\n\n{more}" if full else ""),
    ]
    if "meds" not in row["missing"]:
        out.append(f"{head['meds']}\n{body['meds']}")
    later = entry.get("discharge_meds") or ["Acetaminophen"]
    out += [
        head["meds_later"] + "\n" + "\n".join(f"{i}. {m}" for i, m in enumerate(later, 1)),
        "Discharge Disposition:\nHome",
        f"{head['diagnosis']}\n{title}",
        "Discharge Condition:\nStable.",
        f"Discharge Instructions:\nDear {'Mr.' if male else 'Ms.'} ___,\nPlease take your medications as prescribed."
        + (f"\n{more}\n\n{more}" if full else ""),
        "Followup Instructions:\n___",
    ]
    return _typos("\n \n".join(out), rng) + "\n"


def draw(admissions: int, seed: int, book: Casebook | None = None) -> list[dict[str, Any]]:
    """Draw patients and admissions: dicts of ids, code, sex, age, complaint, findings drawn, present and denied, and more."""
    book = book or casebook()
    rng = np.random.default_rng([seed, 1])
    rows: list[dict[str, Any]] = []
    n_slots = int(book.slot.max()) + 1
    in_section = np.array(book.section)
    subject, hadm = 10_000_000 + int(rng.integers(0, 9)) * 1000, 20_000_000
    while len(rows) < admissions:
        subject += int(rng.integers(1, 40))
        visits = 1 + int(rng.random() < 0.25) + int(rng.random() < 0.08)
        c = int(rng.choice(len(book.codes), p=book.prior))
        sex = "M" if rng.random() < book.male[c] else "F"
        age = float(np.clip(rng.normal(*book.age[c]), 18, 95))
        # A further admission is drawn given sex and age: each single admission then has the joint law of (code, sex).
        fit = book.prior * (book.male if sex == "M" else 1 - book.male)
        fit = fit * np.exp(-0.5 * ((age - book.age[:, 0]) / book.age[:, 1]) ** 2) / book.age[:, 1]
        for visit in range(min(visits, admissions - len(rows))):
            c = c if visit == 0 else int(rng.choice(len(book.codes), p=_normal(fit)))
            hadm += int(rng.integers(1, 30))
            rows.append(
                {
                    "subject_id": subject,
                    "hadm_id": hadm,
                    "c": c,
                    "code": book.codes[c],
                    "sex": sex,
                    "age": age,
                }
            )
    start, u_slot = np.zeros(len(book.names), int), rng.random((len(rows), n_slots))
    first = np.r_[True, np.diff(np.sort(book.slot)) > 0]
    order = np.argsort(book.slot, kind="stable")
    start[order] = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    total = np.cumsum(book.p_finding[:, order], axis=1)
    before = np.concatenate([np.zeros((len(book.codes), 1)), total], axis=1)
    low = np.empty_like(book.p_finding)
    low[:, order] = before[:, :-1] - np.take_along_axis(
        before, start[order][None, :].repeat(len(book.codes), 0), 1
    )
    for i, row in enumerate(rows):
        c, u = row.pop("c"), u_slot[i][book.slot]
        drawn = (u >= low[c]) & (u < low[c] + book.p_finding[c])
        left_out = [name for name, p in MISSING.items() if rng.random() < p]
        visible = ~np.isin(in_section, left_out)
        present = drawn & visible & (rng.random(len(drawn)) < MENTION)
        denied = book.deniable & ~drawn & visible & (rng.random(len(drawn)) < DENY)
        complaint = book.complaints[int(rng.choice(len(book.complaints), p=book.p_complaint[c]))]
        row |= {
            "complaint": None if "cc" in left_out else complaint,
            "drawn": [book.names[j] for j in np.flatnonzero(drawn)],
            "present": [book.names[j] for j in np.flatnonzero(present)],
            "denied": [book.names[j] for j in np.flatnonzero(denied)],
            "missing": left_out,
            "author": int(rng.integers(4)),
        }
    return rows


def summaries(
    rows: list[dict[str, Any]], seed: int, *, full: bool = False, book: Casebook | None = None
) -> list[str]:
    """The discharge summaries of drawn admissions, in order. `full` writes about 1,500 words each, else about 150."""
    from helpers import icd

    book = book or casebook()
    titles = {code: icd.title(code) or code for code in book.codes}
    rng = random.Random(1_000_003 * seed + 2)
    return [_summary(book, row, rng, titles[row["code"]], full) for row in rows]


def write_hospital(
    out_dir: str | Path, *, admissions: int = 6000, seed: int = 0, full: bool = False
) -> Path:
    """Write a hospital as raw MIMIC-IV files (`hosp/`, `note/`, gzip) with `truth/` beside; deterministic by seed.

    With the disorder of the real thing: admissions coded in ICD-9, without note or principal diagnosis, addenda,
    notes copied forward at a readmission, summaries without any admission section. Written aside and renamed when whole.
    """
    if admissions < 1:
        raise ValueError(f"admissions must be at least 1, not {admissions}.")
    from helpers import icd

    out, book = Path(out_dir), casebook()
    part = out.with_name(out.name + ".part")
    for name in ("hosp", "note", "truth"):
        (part / name).mkdir(parents=True, exist_ok=True)
    rows = draw(admissions, seed, book)
    rng = np.random.default_rng([seed, 3])
    texts = summaries(rows, seed, full=full, book=book)
    fate = rng.random(len(rows))
    patients, stays, diagnoses, notes = [], [], [], []
    used: dict[tuple[str, int], str] = {(code, 9): title for code, title in ICD9.items()}
    last: dict[int, tuple[str, dict[str, Any]]] = {}
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        subject, hadm = row["subject_id"], row["hadm_id"]
        if subject not in last:
            patients.append(
                [subject, row["sex"], round(row["age"]), 2150 + subject % 40, "2017 - 2019", ""]
            )
        elif (
            fate[i] > 0.97
        ):  # a note copied forward: near-duplicate, and what it shows is the earlier admission
            earlier = last[subject][1]
            again = r"\1 seen here before" if fate[i] > 0.985 else r"\1"
            text = re.sub(
                r"(___ ?(?:yo |year old )?(?:M|F|man|woman)\b)", again, last[subject][0], count=1
            )
            row |= {
                k: earlier[k]
                for k in ("code", "complaint", "drawn", "present", "denied", "missing", "author")
            }
        last[subject] = (text, row)
        year, day = 2150 + subject % 40 + int(rng.integers(0, 3)), int(rng.integers(1, 28))
        admit = f"{year}-{int(rng.integers(1, 13)):02d}-{day:02d} {int(rng.integers(24)):02d}:15:00"
        stays.append(
            [
                subject,
                hadm,
                admit,
                admit[:8] + f"{min(28, day + 4):02d} 13:00:00",
                "",
                "EW EMER.",
                "",
                "EMERGENCY ROOM",
                "HOME",
                "Medicare",
                "English",
                "MARRIED",
                "UNKNOWN",
                "",
                "",
                0,
            ]
        )
        entry, code = book.entries[row["code"]], row["code"].replace(".", "")
        secondary = [str(c).replace(".", "") for c in entry.get("secondary", ())]
        if fate[i] < 0.05:
            for seq, code9 in enumerate(rng.choice(list(ICD9), 2, replace=False), 1):
                diagnoses.append([subject, hadm, seq, code9, 9])
        else:
            codes = [code, *[c for c in secondary if c != code]]
            first = 2 if fate[i] < 0.055 else 1  # a few admissions have no principal diagnosis
            diagnoses += [
                [subject, hadm, seq, c.ljust(7) if i % 50 == 0 else c, 10]
                for seq, c in enumerate(codes, first)
            ]
            used |= {(c, 10): icd.title(c) or c for c in codes}
        if 0.055 <= fate[i] < 0.085:
            continue
        if 0.085 <= fate[i] < 0.09:
            text = text[text.find("Discharge Disposition") :]
        notes.append([f"{subject}-DS-1", subject, hadm, "DS", 1, admit, admit, text])
        if 0.09 <= fate[i] < 0.1:
            notes.append(
                [
                    f"{subject}-DS-2",
                    subject,
                    hadm,
                    "DS",
                    2,
                    admit,
                    admit,
                    text + "\nAddendum:\nNo change.\n",
                ]
            )
    tables = {
        "hosp/patients": (
            "subject_id gender anchor_age anchor_year anchor_year_group dod",
            patients,
        ),
        "hosp/admissions": (
            "subject_id hadm_id admittime dischtime deathtime admission_type admit_provider_id admission_location "
            "discharge_location insurance language marital_status race edregtime edouttime hospital_expire_flag",
            stays,
        ),
        "hosp/diagnoses_icd": ("subject_id hadm_id seq_num icd_code icd_version", diagnoses),
        "hosp/d_icd_diagnoses": (
            "icd_code icd_version long_title",
            [[c, v, t] for (c, v), t in sorted(used.items())],
        ),
        "note/discharge": (
            "note_id subject_id hadm_id note_type note_seq charttime storetime text",
            notes,
        ),
    }
    for name, (columns, table) in tables.items():
        # mtime=0: the same seed gives the same bytes
        raw = gzip.GzipFile(part / f"{name}.csv.gz", "wb", compresslevel=3, mtime=0)
        with raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(columns.split())
            writer.writerows(table)
    keep = [
        "subject_id",
        "hadm_id",
        "code",
        "sex",
        "complaint",
        "drawn",
        "present",
        "denied",
        "missing",
        "author",
    ]
    pd.DataFrame(rows)[keep].to_parquet(part / "truth" / "findings.parquet", index=False)
    manifest = {
        "admissions": admissions,
        "seed": seed,
        "full": full,
        "casebook_sha256": book.sha256,
    }
    (part / "truth" / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if out.exists():
        if not (out / "truth" / "manifest.json").is_file() and any(out.iterdir()):
            raise ValueError(
                f"{out} holds files that are no synthetic hospital: choose another folder, nothing was overwritten."
            )
        shutil.rmtree(out)
    part.rename(out)
    return out


def main() -> None:
    """`python -m helpers.synthetic OUT_DIR --admissions N --seed S [--full]`"""
    parser = argparse.ArgumentParser(
        description="Write a synthetic hospital in MIMIC-IV's file format."
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--admissions", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="notes of about 1,500 words")
    args = parser.parse_args()
    print(write_hospital(args.out_dir, admissions=args.admissions, seed=args.seed, full=args.full))


if __name__ == "__main__":
    main()
