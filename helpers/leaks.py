"""A second, cruder reader of discharge summaries: what was written later and stands in the note?

It shares no list and no function with `notes`, so that a fault there cannot hide itself here.
Taught in notebook 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from helpers import icd

SHINGLE = 8  # consecutive words
EXAMPLES = 5
NOT_IN_TITLES = ("unspecified", "nos", "other", "specified")
WORD = re.compile(r"[a-z0-9]+")
ITEM = re.compile(r"\d{1,2}[.)] *(?=\D)")  # the number of an item in a list
LATER = re.compile(
    r"\b(hospital|course|results|pertinent|procedures?|discharged?|d c|transitional|follow ?up|"
    r"diagnos[ei]s|instructions|summary|disposition|recommendations|operative|complications|"
    r"death|repeat|today|final|b ?h ?c|discussion|f u|re ?exam\w*)\b"
)
EARLIER = re.compile(
    r"^(chief|cc|reason for|history of|hpi|past|pmh|psh|social|family|allerg|home|admission|"
    r"medications? on admission|meds? on admission|(physical )?exam(ination)?$|review of)\b"
)
EXAM = re.compile(r"(physical )?(exam|examination|pe)\b")  # not the neurologic exam within one


def leak_audit(cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How often later text, or the title of the gold code, stands in the notes.

    cases: records with `note`, and `text` (the whole discharge summary) or `code` or both. To audit
    the state before extraction, pass the summary as `note` too. All in lower-case words:
    - A note holds later text if SHINGLE consecutive words of it, or a whole shorter line of two
      words and more ("Acute appendicitis"), stand below a later heading of the summary and nowhere
      above one. A passage copied from the present illness is therefore no leak.
    - A note holds the gold title if the title's words, without "unspecified" and the like, stand
      there one after the other. That is no leak by itself: the diagnosis may have been known.

    Returns {"notes", "later_text": {"checked", "count", "share", "examples"}, "gold_title": the
    same}; an example is {"hadm_id", "found"}. Examples quote notes: never commit real ones.
    """
    checks = {"later_text": ("text", _later_passage), "gold_title": ("code", _title_in)}
    hits = {kind: [] for kind in checks}
    number = 0
    for number, case in enumerate(cases, 1):
        if "note" not in case:
            columns = ", ".join(map(str, case))
            raise ValueError(
                f"leak_audit: record {number} has no 'note', only {columns}. Join the notes first."
            )
        note = _words(case["note"] if isinstance(case["note"], str) else "")
        for kind, (column, look) in checks.items():
            if isinstance(case.get(column), str):
                passage = look(note, case[column])
                hits[kind].append({"hadm_id": case.get("hadm_id"), "found": passage})
    return {"notes": number} | {kind: _summary(rows) for kind, rows in hits.items()}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    leaks = [row for row in rows if row["found"]]
    share = len(leaks) / len(rows) if rows else None
    examples = leaks[:EXAMPLES]
    return {"checked": len(rows), "count": len(leaks), "share": share, "examples": examples}


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _title_in(note: list[str], code: str) -> str:
    """The title of a code amid the words around it, "" where it does not stand in the note."""
    title = " ".join(w for w in _words(icd.title(code) or "") if w not in NOT_IN_TITLES)
    text = " ".join(note)
    place = f" {text} ".find(f" {title} ")
    if not title or place < 0:
        return ""
    return text[max(0, place - 40) : place + len(title) + 40]


def _heading(line: str) -> str:
    """The words of a line that looks like a heading, "" for another. Masks (`___`) are no words."""
    head, colon, _ = line.strip(" \t=*#~<>[](){}|•·-").partition(":")
    text = " ".join(_words(head))
    looks_so = bool(colon) or head.isupper() or head.istitle() or "hospital course" in text
    return text if looks_so and len(text.split()) <= 7 else ""


def _parts(summary: str) -> tuple[list[str], list[str]]:
    """The lines of a summary that were known at admission, and those that were written later.

    All is later from a heading with a later word, or from a second exam that does not say
    admission, to the next heading that begins like one of admission. Below a heading of an exam
    there are vital signs at most before it goes on ("Physical Exam:", "VS: ...", "EXAM:").
    """
    known = []
    after = []
    is_later = False
    exam = None  # the lines below the last heading of an exam
    for line in summary.splitlines():
        heading = _heading(line)
        is_exam = bool(EXAM.match(heading)) and "admission" not in heading
        if LATER.search(heading) or (is_exam and exam and len(exam) > 1):
            is_later = True
        elif EARLIER.search(heading):
            is_later = False
        lines = after if is_later else known
        lines.append(line)
        if is_exam:
            exam = []
        elif exam is not None and line.strip():
            exam.append(line)
    return known, after


def _shingles(words: list[str]) -> list[tuple[str, ...]]:
    """Each run of SHINGLE words, by the place where it begins."""
    return [tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]


def _later_passage(note: list[str], summary: str) -> str:
    """The longest run of words of the note that only later text has, "" if there is none."""
    known, after = _parts(summary)
    later = set(_shingles(_words("\n".join(after))))
    only_later = later.difference(_shingles(_words("\n".join(known))))
    longest = []
    begin = 0
    for i, shingle in enumerate(_shingles(note)):
        if shingle not in only_later:
            begin = i + 1
        elif i + SHINGLE - begin >= len(longest):
            longest = note[begin : i + SHINGLE]
    return " ".join(longest) or _later_line(note, known, after)


def _later_line(note: list[str], known: list[str], after: list[str]) -> str:
    """The longest whole line of two words and more that stands in the note and is later only."""
    here = f" {' '.join(note)} "
    before = f" {' '.join(_words(' '.join(known)))} "
    longest = ""
    for line in after:
        head, _, rest = line.partition(":")
        text = " ".join(_words(ITEM.sub("", rest.strip() or head.strip())))
        if " " in text and f" {text} " in here and f" {text} " not in before:
            longest = max(longest, text, key=len)
    return longest
