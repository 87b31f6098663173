"""Real case reports without a credential: the English texts of CodiEsp, cut to what was known at
admission.

CodiEsp (Zenodo, record 3837305; CC BY 4.0): reports machine-translated from Spanish, one sentence a
line, each with the codes that expert coders gave, several and in no order. The reader downloads it.
Explained in notebook 8.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from helpers import icd

# A sentence of what happens later, unless it speaks of the past.
LATER = re.compile(
    r"diagnos|treat|surg|operat|biops|pathology|histolog|discharg|underw|therap|follow|resect"
    r"|died|death|evolution|excis|remov|confirm|improve|decided",
    re.IGNORECASE,
)
PAST = re.compile(r"histor|previous|ago\b|background|antecedent|known|allerg", re.IGNORECASE)


def read(folder: str | Path, part: str = "train") -> pd.DataFrame:
    """The cases of one part of the archive: hadm_id and subject_id (the report's name), text, note,
    codes (a list, normalised).

    Raises FileNotFoundError for files that are missing, ValueError for what is broken, with the
    place.
    """
    place = Path(folder) / part
    table = place / f"{part}D.tsv"
    if not table.is_file() or not (place / "text_files_en").is_dir():
        raise FileNotFoundError(
            f"{place}: no {table.name} and text_files_en/. Download CodiEsp (Zenodo, record "
            "3837305), unpack it, and give the folder that holds train/, dev/ and test/."
        )
    codes: dict[str, list[str]] = {}
    for number, line in enumerate(_text(table).splitlines(), 1):
        name, *rest = line.split("\t")
        code = icd.normalise(rest[0]) if len(rest) == 1 else None
        if code is None:
            raise ValueError(f"{table}, line {number}: not a case, a tab and a code: {line!r}")
        codes.setdefault(name, []).append(code)
    texts = {path.stem: _text(path).strip() for path in (place / "text_files_en").glob("*.txt")}
    broken = sorted(codes.keys() ^ texts.keys()) or [name for name in texts if not texts[name]]
    if broken or not codes:
        raise ValueError(
            f"{place}: {len(broken)} cases without a text or without a code ({broken[:3]}). "
            "Unpack the archive again."
        )
    rows = [(name, name, texts[name], admission_note(texts[name]), codes[name]) for name in codes]
    return pd.DataFrame(rows, columns=["hadm_id", "subject_id", "text", "note", "codes"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Unpack the archive again.") from error


def admission_note(text: str) -> str:
    """The first sentence, and those after it up to the first that tells what came later (LATER) and
    does not speak of the past (PAST)."""
    first, *sentences = [line.strip() for line in text.splitlines() if line.strip()]
    known = [first]
    for sentence in sentences:
        if LATER.search(sentence) and not PAST.search(sentence):
            break
        known.append(sentence)
    return "\n".join(known)
