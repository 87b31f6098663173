"""Discharge summary in, what was known at admission out.

A scanner looks at each line once. A line that begins with a heading may open a section; every other
line belongs to the section that is open. What a heading does is decided by a table of rules,
`notes_rules.yaml`: the first rule that fits decides, and an example stands beside each. One
principle is behind them: a line that looks like a heading and is not known to be of admission
closes the admission part. A lost sentence costs a little, a leaked one makes every result
worthless. Taught in notebook 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import NamedTuple

import yaml

#: sections known at admission -> the short headings of the admission note, in its order
ADMISSION = {
    "chief_complaint": "CC",
    "present_illness": "HPI",
    "medical_history": "PMH",
    "medications": "MEDS",
    "allergies": "ALLERGIES",
    "social_history": "SOCIAL",
    "family_history": "FAMILY",
    "exam": "EXAM",
}
#: the usual rule: a summary in which all three are empty describes no admission
CORE = ("chief_complaint", "present_illness", "medical_history")

_SECTION = {"vitals": "exam", "organ_exam": "exam"}
#: what is opened in the place of a section that is not of admission
_LATER = dict.fromkeys([*ADMISSION, "unknown"], "later") | {
    "exam": "exam_discharge",
    "medications": "discharge_medications",
}
_TABLE = yaml.safe_load(Path(__file__).with_name("notes_rules.yaml").read_bytes())


def _set(phrases: str) -> frozenset[str]:
    return frozenset(phrases.split(", "))


def _any_of(phrases: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\S)(?:{phrases.replace(', ', '|')})(?!\S)")


def _words_of(*parts: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", str([_TABLE[part] for part in parts])))


_FILLER = _set(_TABLE["filler"])
_EVERYDAY = re.compile(_TABLE["everyday"].replace(", ", "|"))
_ALIASES = {alias: name for name, aliases in _TABLE["headings"].items() for alias in _set(aliases)}
_TIMES = {time: _set(words) for time, words in _TABLE["times"].items()}
_TIME_WORDS = frozenset().union(*_TIMES.values())
_CLUES = [
    (name, clue, _any_of(phrases))
    for clue in ("elsewhere", "clear", "vague", "list")
    for name, phrases in _TABLE[clue].items()
]
_LABELS = {name: _any_of(phrases) for name, phrases in _TABLE["labels"].items()}
_NO_DISCHARGE = _any_of(f"({_TABLE['no_discharge'].replace(', ', '|')}) discharge")
_LATER_WORDS = _words_of("clear", "vague", "with_clues", "times", "filler") | {"___"}
_VOCABULARY = _LATER_WORDS | _words_of("headings", "labels", "list", "synonyms")

_CHARACTERS = {0x200B: None, 0xFEFF: None, 0xFF1A: ":"}
_MARKS = " =*#~<>[](){}|•·-–—+\"'`."  # what people put around a heading
_ITEM = re.compile(  # of a list
    r"(?:(?:\d{1,2}|[IVX]{1,4})[.)]|\d{1,2} ?[-–:](?= )|[-–•·#*+] ?(?=\w)"
    r"|(?i:section|part) (?:\d{1,2}|[IVX]{1,4})(?:[.)]|:(?= ))) *(?=\D)"
)
_INITIALS = re.compile(r"\b([a-z])[./& ]+(?=[a-z]\b)")  # "H.P.I.", "A/P", "d/c"
_LETTER = re.compile(r"[^\W\d]")
_WORD = re.compile(r"[a-z0-9]+|(?<!\()___")
# a long word without a capital, which is no sign of a heading ("Exam at discharge" is one)
_SMALL = re.compile(r"(?<![A-Za-z])(?!(?<=\w )discharge)[a-z][A-Za-z]{3}")
_FEW_WORDS = re.compile(r"(?:\S++ ?){1,8}")  # ++: a word is not taken apart, which would cost time
_TITLE = re.compile(r"(?!\d+\W+\d)(?:[^\s,]++ ?){1,8}(?<![.;])")
# the end of a heading, but not of the first in "Physical Exam: Admission: VS 98"
_SPLIT = re.compile(
    r"(?::(?!\d\d\b)|(?<!\d):|(?: |\b)[-–—]+(?: |$))"
    r"(?! *(?:(?:on|at) )?(?:admission|discharge|transfer|d/c) *(?::|$))",
    re.I,
)
_RUN_IN = re.compile(rf"(?:{_TABLE['run_in'].replace(', ', '|')})(?= )")
_COMPOUND = re.compile(r" *(?:[/(&+]| and )", re.I)
_FRAMED = re.compile(r"[\[<=]|\*\*|[#*-]{3}")  # as good as a colon
_RULE = re.compile(r"[=*#~_–—-]{3,}$")
_CONTINUES = re.compile(  # in the next line, where that begins with a small letter
    rf"[^.:;?!]$(?<=.{{45}})|(?:,|\b(?:{_TABLE['unfinished'].replace(', ', '|')}))$", re.I
)
_SMALL_WORDS = rf"(?:(?:{_TABLE['filler'].replace(', ', '|')}) )*"
_WITHIN = re.compile(
    r"(?<![\w/'&])(?<!\w-)"
    rf"(?:(?<!: )(?:___ {_SMALL_WORDS})?[A-Z][\w/'&-]*"
    rf"(?: {_SMALL_WORDS}(?:[A-Z][\w/'&-]*|___)){{0,6}}"
    rf"|(?i:{_TABLE['within'].replace(', ', '|')})) ?:"
    r"|(?<=[.;] )[A-Za-z][^.;:]{2,50}:"
)
_BEGINNING = re.compile(
    r"\s*(?:(\d{1,2})[.)] |\W*(?:(v)(?:s|itals?)|(g)en(?:eral)?|(h)eent)\b)", re.I
)
_PRESCRIPTION = re.compile(r"\bRX \*|\bDisp ?[:#*]|\bRefills? ?:", re.I)
_BOILERPLATE = ("The Preadmission Medication list ", "futher investigation.")  # MIMIC-IV spells so


# --- what a heading names
# ---------------------------------------------------------------------------------------------


def _slips(word: str) -> list[tuple[str, str, str]]:
    """The word, and the word without one of its letters, between its first and its last letter."""
    return [(word[0], word[:i] + word[i + 1 :], word[-1]) for i in range(len(word), -1, -1)]


# Of two words that share a form the shorter one counts; sorted, because a set has another order in
# each process.
_SPELLING = {
    slip: word
    for word in sorted(_VOCABULARY, key=lambda word: (-len(word), word))
    if len(word) > 5
    for slip in _slips(word)
}


@lru_cache(maxsize=1 << 15)
def _spelled(word: str) -> str:
    """The word, or the long word of a heading that it is with a slip of the pen ("dicsharge")."""
    if len(word) < 6 or word in _VOCABULARY:
        return word
    return next((_SPELLING[slip] for slip in _slips(word) if slip in _SPELLING), word)


class _Name(NamedTuple):
    heading: str  # the section that it names, "time" or "unknown"
    time: str  # discharge, transfer, again, masked, admission or none
    clue: str  # why: listed, elsewhere, clear, vague, list or none
    exact: bool  # all its words are words of headings
    text: str


def _text(head: str) -> str:
    """The words of a heading as the table has them: spelling mended, short forms written out,
    numbers left out."""
    words = map(_spelled, _WORD.findall(_INITIALS.sub(r"\1", head.lower())))
    known = [_TABLE["synonyms"].get(word, word) for word in words if not word.isdigit()]
    return _NO_DISCHARGE.sub(r"\1", " ".join(known))


@lru_cache(maxsize=1 << 15)
def _name(head: str) -> _Name:
    """What a heading names."""
    text = _text(head)
    words = text.split()
    time = next((time for time, known in _TIMES.items() if not known.isdisjoint(words)), "none")
    core = [word for word in words if word not in _FILLER]
    rest = [word for word in core if word not in _TIME_WORDS and word != "___"]
    for kind in (words, core, rest):
        if name := _ALIASES.get(" ".join(kind)):
            masked = kind is rest and "___" in core and time != "discharge"
            return _Name(name, "masked" if masked else time, "listed", True, text)
    found = ((name, clue) for name, clue, phrases in _CLUES if phrases.search(text))
    name, clue = next(found, ("unknown", "none"))
    part = _COMPOUND.split(head, maxsplit=1)[0]
    if clue == "none" and time != "none" and not rest and "___" not in core:
        name, clue = "time", "listed"
    elif time == "discharge":
        clue = "clear"
    elif part not in (head, "PE", "ALL") and clue != "clear" and _name(part).clue == "listed":
        return _name(part)._replace(text=text)  # "HPI (by phone)"
    return _Name(name, time, clue, clue != "none" and _LATER_WORDS.issuperset(words), text)


# --- what a line begins with
# ------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What the conditions of a rule can be about: the heading."""

    heading: str
    time: str
    clue: str
    form: str  # alone, inline, bare or run-in
    item: bool  # of a list
    masked: bool
    printed: bool  # "Home Meds", not "Home meds"
    sure: bool  # all its words are words of headings, or in capitals
    everyday: bool  # also an everyday word or a disease
    listed: bool  # a list begins behind it


class _Heading(NamedTuple):
    kind: _Kind
    section: str
    inside: frozenset[str]  # sections that it may be a part of
    rest: str  # what follows on the same line


def _is_title(head: str, name: _Name, marked: bool, split: bool) -> bool:
    """Whether words stand there as those of a heading do."""
    if len(head) > 60 or name.exact:
        return len(head) <= 60
    looks = _FEW_WORDS if marked and name.clue != "none" else _TITLE
    if not looks.fullmatch(head):
        return False
    return marked or not (split or _SMALL.search(head))


@lru_cache(maxsize=1 << 15)
def _heading(line: str) -> _Heading | None:
    """What a line begins with, if it looks like a heading."""
    item = _ITEM.match(line)
    bare = line[item.end() if item else 0 :].lstrip(_MARKS)
    split = _SPLIT.search(bare, 0, 81)
    framed = _FRAMED.match(line)
    form = "alone" if split or framed else "bare"
    head = bare[: split.start() if split else 61].rstrip(_MARKS[:-1])
    name = _name(head)
    is_marked = bool(framed or (split and split[0] == ":"))
    if not _is_title(head, name, is_marked, bool(split)):
        split = _RUN_IN.match(bare)
        if not split:
            return None
        head, form = split[0], "run-in"
        name = _name(head)
    rest = bare[split.end() :].lstrip(_MARKS[:-1]) if split else ""
    kind = _Kind(
        *name[:3],
        form="inline" if rest and form == "alone" else form,
        item=bool(item),
        masked="___" in name.text,
        printed=not _SMALL.search(head),
        sure=name.exact or (head.isupper() and (name.clue != "none" or " " in head)),
        everyday=bool(_EVERYDAY.fullmatch(head)),
        listed=bool(_ITEM.match(rest)),
    )
    inside = frozenset(part for part, labels in _LABELS.items() if labels.search(name.text))
    return _Heading(kind, _SECTION.get(name.heading, name.heading), inside, rest)


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Lines, cut where a heading may stand within, and what stands before: a line break or a
    blank."""
    for line in text.translate(_CHARACTERS).splitlines():
        line = " ".join(line.split())
        start, before = 0, "\n"
        for match in _WITHIN.finditer(line) if ":" in line else ():
            if _LETTER.search(line, start, match.start()):
                yield line[start : match.start()].strip(), before
                start, before = match.start(), " "
        if not line.startswith(_BOILERPLATE):
            yield line[start:], before


# --- what a heading does
# ----------------------------------------------------------------------------------------------


class _Context(NamedTuple):
    """What the conditions of a rule can be about: where the heading stands."""

    open: str  # the section that is open
    filled: bool  # the section named, or else the open one, has text
    same: bool  # the section named is open
    label: bool  # known to be a part of the open section
    repeated: bool  # a heading of the same section follows, alone on its line
    blank: bool  # an empty line stands before
    wrapped: bool  # the line continues a sentence


_RULES = [
    (
        rule["then"],
        {
            key: Template(str(value)).substitute(_TABLE["groups"]).split("|")
            for key, value in rule["if"].items()
        },
    )
    for rule in _TABLE["rules"]
]


@lru_cache(maxsize=1 << 15)
def _decide(kind: _Kind, context: _Context) -> str:
    """text, open, remark or later: what the first rule says whose conditions all hold."""
    facts = kind._asdict() | context._asdict()
    return next(
        then
        for then, conditions in _RULES
        if all(str(facts[key]) in values for key, values in conditions.items())
    )


def sections(text: str) -> dict[str, str]:
    """Section -> its text, in order of first appearance; lines kept, "" for a heading with nothing
    below it.

    Keys: those of `ADMISSION`, and exam_discharge, results, procedure, hospital_course,
    discharge_medications, discharge_diagnosis, discharge_disposition, discharge_instructions,
    header; "later" for what stands below a heading that is not known, "preamble" for what stands
    before any heading. Time is linear in the length of the text.
    """
    pieces = [*_pieces(text), ("", "\n")]
    headings = [_heading(line) for line, _ in pieces]
    alone = _last_alone(headings)
    body = {}
    filled = set()
    section = resume = "preamble"
    for i, (line, before) in enumerate(pieces):
        heading = headings[i]
        if line[:1] in ("", "#"):  # a remark ends
            section = resume
        if not line:
            continue
        if heading:
            target = heading.section
            if target == "time":  # of the section that is open
                target = section.removesuffix("_discharge")
            previous = pieces[i - 1][0]
            context = _Context(
                open=section,
                filled=(target if target in ADMISSION else section) in filled,
                same=target == section,
                label=section in heading.inside,
                repeated=alone.get(target, -1) > i,
                blank=not previous or bool(_RULE.match(pieces[i + 1][0])),
                wrapped=line[0].islower() and bool(_CONTINUES.search(previous)),
            )
            then = _decide(heading.kind, context)
            if then == "later" or (then != "text" and (context.same or before == "\n")):
                section = _LATER.get(target, target) if then == "later" else target
                resume = resume if then == "remark" else section
                line, before = heading.rest, "\n"
        body.setdefault(section, []).append(before + line if line else "")
        if line and not (heading and heading.kind.heading == "vitals"):
            filled.add(section)
    _move_later_parts(body)
    return {name: "".join(parts).strip() for name, parts in body.items()}


def _last_alone(headings: list[_Heading | None]) -> dict[str, int]:
    """Section -> the last line that is nothing but a heading of it, as of admission."""
    places = {}
    for i, heading in enumerate(headings):
        if heading and not heading.rest and heading.kind.time in ("admission", "none"):
            places[heading.section] = i
    return places


def _move_later_parts(body: dict[str, list[str]]) -> None:
    for name in ("medications", "exam"):
        parts = body.get(name, [])
        if later := parts[_end(parts) :]:
            body.setdefault(_LATER[name], []).extend(later)
            del parts[-len(later) :]


def _end(lines: list[str]) -> int:
    """Where an exam (vital signs, general appearance or head) or a numbered list starts afresh, or
    prescriptions begin."""
    begun = {}
    item = len(lines)
    for i, line in enumerate(lines):
        beginning = _BEGINNING.match(line)
        key = beginning[beginning.lastindex or 0].lower() if beginning else ""
        if key.isdigit():
            item = i
        if _PRESCRIPTION.search(line):
            return min(item, i)
        if begun.setdefault(key, i) < i and key:
            return i
    return len(lines)


def admission_note(text: str) -> str:
    """What was known at admission, one section to a line under short headings ("CC: ...").

    White space is normalised; sections that are empty or hold only `___` are left out. "" where the
    sections of `CORE` are all empty: such a summary describes no admission.
    """
    body = sections(text)
    if not any(body.get(name, "").strip("_ .\n") for name in CORE):
        return ""
    note = []
    for name, heading in ADMISSION.items():
        lines = body.get(name, "").splitlines()
        lines = [line for line in lines if line.strip("_,;" + _MARKS)]
        if lines:
            note.append(f"{heading}: {' '.join(lines)}")
    return "\n".join(note)
