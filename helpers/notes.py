"""Discharge summary in, what was known at admission out.

`sections` is a line-anchored scanner: each line is looked at once, a line that *is* (or begins with) a known heading
opens a section, every other line belongs to the section that is open. Unknown headings ("In the ED, initial vitals:")
therefore never end a section, and a blank line never does. Where it cannot be told whether text was written at admission
or later, it counts as later: a lost sentence costs a little, a leaked one makes every result worthless.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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
_WORDS = tomllib.loads(Path(__file__).with_name("headings.toml").read_text(encoding="utf-8"))
_HEADINGS = {alias: name for name, aliases in _WORDS["sections"].items() for alias in aliases}
_SYNONYMS: dict[str, str] = _WORDS["synonyms"]
_BEFORE, _AFTER, _FILLER, _AMBIGUOUS, _ALONE, _AGAIN, _PROSE = (
    frozenset(_WORDS["words"][kind])
    for kind in ("before", "after", "filler", "ambiguous", "alone", "again", "prose")
)
_SPLIT, _LATER_LINE, _LATER_WORD, _EARLIER_LINE = (
    re.compile(_WORDS["patterns"][kind], re.I)
    for kind in ("split", "later_line", "later_word", "earlier_line")
)
_CUES = {kind: frozenset(words) for kind, words in _WORDS["cues"].items()}
_ONLY_WITH = ("report", "elsewhere", "fluid")  # cues that say nothing alone
_TRIGGERS = {"discharge", "discharged"}.union(
    *(words for kind, words in _CUES.items() if kind not in _ONLY_WITH)
)
_LATER = frozenset(_WORDS["sections"]) - set(ADMISSION) - {"header", "vitals", "tests"} | {
    "exam_discharge"
}
_FIRST = {a.split()[0] for a in _HEADINGS} | _SYNONYMS.keys() | _BEFORE | _AFTER | _FILLER | {"d"}
_KNOWN = {w for alias in _HEADINGS for w in alias.split()} | _BEFORE | _AFTER | _FILLER
_TRANSLATE = (
    dict.fromkeys([9, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
    | {0xFF1A: ":"}
    | dict.fromkeys([0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029], "\n")
    | dict.fromkeys([0x200B, 0xFEFF], "")
)
_MARKS = " =*#~<>[](){}|•·-–—+\"'`."  # what people put around a heading
_NUMBER = re.compile(r"(\d{1,2})[.)] *(?=\D)")  # of an item in a list
_BEGIN = re.compile(
    rf"[{re.escape(_MARKS)}]*+(?:({_NUMBER.pattern})[{re.escape(_MARKS)}]*+)?(?P<first>[A-Za-z]{{1,24}})"
)
_WORD = re.compile(r"[a-z0-9]+")
_DASH = re.compile(r"(?: |\b)[-–—]+ ")
_COMPOUND = re.compile(r" *(?:[/(&+]| and )", re.I)
_BRACKETS = re.compile(r"\([^)]*\)?")
_UNFINISHED = re.compile(rf"(?:,|\b(?:{'|'.join(_WORDS['words']['unfinished'])}))$", re.I)
_FRAMED = re.compile(r"[\[<=]|\*\*|[#*-]{3}")  # a heading that needs no blank line before it
_RULE = re.compile(r"[=*#~_–—-]{3,}$")
_RX = re.compile(r"^RX \*|\bDisp ?[:#*]|\bRefills? ?:", re.I)
_ORGAN = re.compile(r"(vs|vitals?|gen|general|heent)\b", re.I)
_BOILERPLATE, _BOILERPLATE_END = (
    "The Preadmission Medication list ",
    "futher investigation.",
)  # as MIMIC-IV spells it


class _Heading(NamedTuple):
    name: str  # a section, "mark" for a bare "On admission:", or the cue of a heading that is in no list ("?course")
    when: str  # "", "before" or "after": what the heading says about the time
    head: str
    rest: str  # what follows on the same line
    colon: bool
    printed: bool  # "Home Meds", not "Home meds"
    clear: bool = True  # False: only a heading where an exam is open ("On discharge she looks well"), or below a blank line


def _shortened(word: str) -> list[str]:
    return [word, *(word[:i] + word[i + 1 :] for i in range(len(word)))]


# sorted, and of two words that share a shortened form the shorter ("medication"): a set would decide anew in every process
_LONG = sorted(
    (word for word in _KNOWN | _SYNONYMS.keys() if len(word) > 5),
    key=lambda word: (-len(word), word),
)
_SHORTENED = {short: word for word in _LONG for short in _shortened(word)}


@lru_cache(maxsize=1 << 15)
def _spelled(word: str) -> str:
    """The word, or the long word of a heading that it is with a slip of the pen ("dicsharge"): a leak hangs on it."""
    if len(word) < 6 or word in _KNOWN or word in _SYNONYMS:
        return word
    return next((_SHORTENED[short] for short in _shortened(word) if short in _SHORTENED), word)


@lru_cache(maxsize=1 << 15)
def _terms(token: str) -> tuple[str, ...]:
    """What stands between two spaces, as words of headings: spelling mended, short forms spelled out, numbers dropped."""
    words: list[str] = []
    for word in map(
        _spelled,
        _WORD.findall(token.lower().replace("d/c", "discharge").replace("d.c.", "discharge")),
    ):
        words += _SYNONYMS[word].split() if word in _SYNONYMS else () if word.isdigit() else (word,)
    return tuple(words)


@lru_cache(maxsize=1 << 14)
def _classify(head: str, printed: bool = False) -> tuple[str, str] | None:
    """Section and time named by a heading, or None if it names none; printed: it looks like one, so its first part may do."""
    words: list[str] = []
    for token in head.split(" "):
        words += (terms := _terms(token))
        if not (printed or _KNOWN.issuperset(terms)):
            return None  # most lines of text end here
    said = set(words)
    when = "after" if _AFTER & said else "before" if _BEFORE & said else ""
    if said <= _KNOWN:
        for drop in (frozenset(), _FILLER - {"date"}, _FILLER, _FILLER | _AFTER | _BEFORE):
            kept = " ".join([w for w in words if w not in drop])
            if kept in _HEADINGS:
                return _HEADINGS[kept], when
        if not kept:
            return ("mark", when) if when else None
    if not printed:
        return None
    part = _COMPOUND.split(head, maxsplit=1)[
        0
    ]  # "Chief Complaint/Reason for visit", "HPI (per admitting resident)"
    if part != head and part.lower() not in _AMBIGUOUS and (found := _classify(part)):
        return found[0], when or found[1]
    return (
        ("discharge_disposition", when) if words[:1] == ["discharge"] and len(words) <= 5 else None
    )


def _printed(head: str) -> bool:
    """Whether words stand there as a heading does: all in capitals, or each long one with a capital."""
    return head.isupper() or all(
        w[0].isupper() or len(w) < 4 for w in re.findall(r"[A-Za-z]+", head)
    )


def _heading(line: str) -> _Heading | None:
    """The heading that a (stripped) line begins with: one of the lists, or one of other words that is known by a cue."""
    return _listed(line) or _cued(line)


def _cued(line: str) -> _Heading | None:
    """A heading of unknown words of which one shows that what follows was not known at admission."""
    end = line.find(":", 0, 64)
    course = "hospital course" in line.lower() and line[-1] not in ".,;"
    if end < 0 and len(line) > 64:
        return None
    words = _WORD.findall((line[:end] if end > 0 else line).lower().replace("d/c", "discharge"))
    if len(words) > 12 or _TRIGGERS.isdisjoint(words):
        return None
    bare = line.lstrip(_MARKS)
    end = bare.find(":", 0, 60)
    head = _BRACKETS.sub("", bare[:end] if end > 0 else bare[:61]).strip(_MARKS)
    if not head or len(head) > 60 or head[0].islower():
        return None
    words = _WORD.findall(head.lower().replace("d/c", "discharge"))
    said = set(words)
    if not course and (
        len(words) > 7 or (end < 0 and ("," in head or (len(words) > 4 and not _printed(head))))
    ):
        return None
    found = next((kind for kind in ("course", "results", "medications") if _CUES[kind] & said), "")
    if "discharge" in said or "discharged" in said:
        found = (
            ""
            if _CUES["fluid"] & said
            else "diagnosis"
            if said & {"diagnosis", "diagnoses"}
            else "mark"
        )
    elif all(_CUES[kind] & said for kind in ("stay", "report")) and not _CUES["elsewhere"] & said:
        found = "stay"
    elif not found and len(words) > 1 and words[0] in _CUES["scans"]:
        found = "results"
    if not found or (
        found == "medications"
        and ((end < 0 and not head.isupper()) or _NUMBER.match(bare) or _RX.search(bare))
    ):
        return None
    name, when = {"mark": ("mark", "after"), "diagnosis": ("discharge_diagnosis", "after")}.get(
        found, (f"?{found}", "")
    )
    rest = bare[end + 1 :].strip() if end > 0 else ""
    return _Heading(
        name, when, head.lower(), rest, end > 0, _printed(head), end > 0 or head.isupper()
    )


def _listed(line: str) -> _Heading | None:
    if not (begin := _BEGIN.match(line)):
        return None
    first = begin["first"].lower()
    if first not in _FIRST and (len(first) < 6 or (first := _spelled(first)) not in _FIRST):
        return None
    if begin[1] and len(first) < 5 and first in _AMBIGUOUS:  # "2. PE" is an item of a list
        return None
    bare = line[begin.start("first") :]
    end = bare.find(":", 0, 80)
    if end < 0 and (dash := _DASH.search(bare, 0, 80)):
        end = dash.start()
    head, rest = (bare[:end], bare[end + 1 :].lstrip(_MARKS[:-1])) if end > 0 else (bare, "")
    found = (
        _classify(head, end > 0 or (len(head) < 50 and _printed(head))) if len(head) <= 80 else None
    )
    if found and found[0] in ("exam", "medications") and 0 < len(rest) < 40:
        mark = _classify(rest.strip(_MARKS + ":"))
        found, rest = (
            ((found[0], mark[1]), "") if mark and mark[0] == "mark" else (found, rest)
        )  # "PE - discharge"
    if found:
        return _Heading(*found, head.strip(_MARKS).lower(), rest, end > 0, _printed(head))
    timed = first in ("on", "at", "upon", "prior", "before", "day")
    if not (bare[0].isupper() or timed or first in ("discharge", "exam", "vs", "d")):
        return None
    words = bare[:90].split(" ")[:7]
    known = next(
        (n for n, word in enumerate(words[:-1]) if not _KNOWN.issuperset(_terms(word))),
        len(words) - 1,
    )
    for n in range(known, 0, -1):  # no colon: "HPI 65M with ...", "DISCHARGE EXAM VS 98.2 ..."
        head = " ".join(words[:n])
        if not (found := _classify(head)):
            continue
        said = [w for w in words[:n] if w and w not in _FILLER]
        titled = len(said) > 1 and found[0] != "mark" and all(w[0].isupper() for w in said)
        clear = (titled or (head.isupper() and head.lower() not in _AMBIGUOUS)) and words[
            n
        ].lower() not in _PROSE
        if clear or (n > 1 and found[1] == "after" and (timed or found[0] in ("exam", "vitals"))):
            return _Heading(
                *found, head.strip(_MARKS).lower(), bare[len(head) :].strip(), False, titled, clear
            )
    return None


def _opens(
    h: _Heading, state: str, filled: set[str], past: bool, strong: bool, blank: bool, wrapped: bool
) -> str | None:
    """The section that a heading opens while `state` is open, or None if the line is text.

    filled: sections with text; past: a later section has come since the admission exam or medications; strong: the same
    heading comes again, alone on its line; blank: an empty line stands before; wrapped: the line continues a sentence.
    """
    name, when = h.name, h.when
    hpi, in_exam, later = (
        state == "present_illness",
        state in ("exam", "exam_discharge"),
        state in _LATER,
    )
    told = state in (
        "hospital_course",
        "discharge_instructions",
    )  # a narrative: "Home medications: held" is a remark
    discharge, bare, first = "transfer" not in h.head, not h.colon and not h.rest, h.head.split()[0]
    if name[0] == "?":
        if not (h.clear or blank) or later or state not in ADMISSION:
            return (
                "hospital_course" if state in ("results", "procedure") and name == "?stay" else None
            )
        if name == "?medications":
            return "discharge_medications" if state == "medications" else None
        if (name == "?results" and state in CORE) or (name == "?course" and state in CORE[1:]):
            return None
        return "results" if name == "?results" else "hospital_course"
    if (not h.clear and not in_exam) or (
        bare and not blank and (h.head in _AMBIGUOUS or (name == "mark" and wrapped))
    ):
        return None
    if (
        bare
        and not when
        and len(first) < 4
        and first in _AMBIGUOUS
        and first != "lab"
        and h.head != first
    ):  # "PE in the past"
        return None
    prose = (
        h.head.startswith("discharge") if name == "mark" else name not in _LATER and when != "after"
    )
    if wrapped and prose and (h.rest or not h.colon or name == "mark"):
        return None
    if name == "mark":
        if in_exam:
            return "exam_discharge" if when == "after" else "exam"
        if when == "after" and state == "medications":
            return "discharge_medications"
        return (
            "discharge_disposition"
            if when == "after" and discharge and not hpi and not later and state != "header"
            else None
        )
    if name in ("exam", "vitals"):
        if when == "after":
            return None if hpi and name == "vitals" and not discharge else "exam_discharge"
        if name == "vitals" and (hpi or later or state == "exam"):
            return "exam" if when and state == "exam_discharge" else None
        name = "exam"
    if name == "tests":
        alone = not h.rest and (
            blank or (when and h.printed) or (h.colon and state == "medical_history")
        )  # "LABS ON ADMISSION:"
        headed = not later and (alone or when) if not hpi else alone and when
        return "results" if when == "after" or headed or not (later or state in CORE) else None
    if name in ("exam", "medications"):
        if (
            not when
            and _AGAIN.intersection(said := h.head.split())
            and (name in filled or "final" in said)
        ):
            when = "after"
        after = "exam_discharge" if name == "exam" else "discharge_medications"
        if when == "after":
            return after
        if not when:
            if state in (name, after):
                return None if h.rest or state == after else state
            if state == "hospital_course" and h.rest:
                return None
            if (past and name in filled) or state in _LATER - {"results", "procedure"}:
                return after
        elif later and name in filled and state != after:
            return None
    if name in ADMISSION:
        again = later and name in filled and (told or h.rest or h.head in filled)
        again = again or (strong and h.rest and (hpi or told or (not blank and state in ADMISSION)))
        if told and name == "medications" and h.rest:
            listed = _NUMBER.match(h.rest) or h.rest.startswith(_BOILERPLATE)
            again = again or not (
                when and (listed or (blank and (h.printed or "admission" in h.head)))
            )
        same = (
            name == state and h.rest and name != "exam"
        )  # "Surgical history: ..." below the medical one keeps its label
        return None if again or same else "discharge_disposition" if when == "after" else name
    return None if name == "header" and (later or not h.colon) else name


def sections(text: str) -> dict[str, str]:
    """Section -> its text, in order of first appearance; lines kept, "" for a heading with nothing below it.

    Keys: those of `ADMISSION`, and exam_discharge, results, procedure, hospital_course, discharge_medications,
    discharge_diagnosis, discharge_disposition, discharge_instructions, header; "preamble" for what stands before any heading.
    Time is linear in the length of the text.
    """
    lines = _SPLIT.sub(r"\1\n", text.replace("\r\n", "\n").translate(_TRANSLATE)).split("\n")
    lines = [line.strip() for line in lines]
    heads = {i: h for i, line in enumerate(lines) if line and (h := _heading(line))}
    last_alone = {h.name: i for i, h in heads.items() if not h.rest and h.when != "after"}
    found: dict[str, list[str]] = {}
    filled: set[str] = set()
    state, resume, previous, past = "preamble", "", "", False
    for i, line in enumerate(lines):
        if not line:
            state, resume, previous = resume or state, "", ""
            continue
        h, nested = heads.get(i), False
        while h:
            ended = (
                not previous
                or previous[-1] in ".:;?!"
                or (i - 1 in heads and not _UNFINISHED.search(previous))
            )
            following = lines[i + 1] if i + 1 < len(lines) else ""
            blank = not previous or bool(_FRAMED.match(lines[i]) or _RULE.match(following))
            if (
                not (blank or nested or state in _LATER or h.rest) and lines[i][0].isupper()
            ):  # "SH", "PE" above "VS 98.2"
                blank = h.head in _ALONE or (h.head == "pe" and bool(_ORGAN.match(following)))
            short = (
                not h.rest and len(previous) < 45 and not _UNFINISHED.search(previous)
            )  # no line is broken so early
            wrapped = not nested and not ended and line[0].islower() and not short
            target = _opens(h, state, filled, past, last_alone.get(h.name, -1) > i, blank, wrapped)
            if not target:
                break
            # Inside a narrative, "Family history: ..." is a remark: it ends with its paragraph, not with the next heading.
            quarantine = (
                state in ("hospital_course", "discharge_instructions")
                and target in ADMISSION
                and h.rest
            )
            resume = (resume or state) if quarantine else ""
            state, line, nested = target, h.rest, True
            past = (past or state in _LATER - {"procedure"}) and not (
                state in ("exam", "medications") and state not in filled
            )
            found.setdefault(state, [])
            filled.add(h.head)
            h = _heading(line) if line else None
            if h and not (
                h.name == "mark"
                or h.name in _LATER
                or (h.when and h.name in ("exam", "vitals", "medications"))
            ):
                h = None
        if line:
            found.setdefault(state, []).append(line)
            if line.strip("_ ."):
                filled.add(state)
        previous = lines[i]
    for name, cut in (("medications", _end_of_home_list), ("exam", _end_of_first_exam)):
        if (end := cut(found.get(name, []), "discharge_medications" in found)) is not None:
            found.setdefault(
                {"exam": "exam_discharge"}.get(name, "discharge_medications"), []
            ).extend(found[name][end:])
            del found[name][end:]
    return {name: "\n".join(body) for name, body in found.items()}


def _end_of_home_list(lines: list[str], has_discharge_list: bool) -> int | None:
    """Where prescriptions (RX, Disp:, Refills:) or, without a discharge list of its own, a second numbered list begin."""
    item: int | None = None
    for i, line in enumerate(lines):
        if number := _NUMBER.match(line):
            if item is not None and number[1] == "1" and not has_discharge_list:
                return i
            item = i
        if _RX.search(line):
            return i if item is None else item
    return None


def _end_of_first_exam(lines: list[str], _: bool) -> int | None:
    """Where an exam starts afresh (general appearance or head a second time): an unmarked discharge exam."""
    seen: set[str] = set()
    vitals = None
    for i, line in enumerate(lines):
        if label := _ORGAN.match(line.lstrip(_MARKS)):
            organ = label.group().lower()[:3]
            if organ in ("vs", "vit"):
                vitals = i if seen - {"vs", "vit"} else None
            elif organ in seen:
                return vitals or i
            seen.add(organ)
    return None


def admission_note(text: str) -> str:
    """What was known at admission, one section to a line under short headings ("CC: ..."); "" if there is nothing.

    White space is normalised; sections that are empty or hold only `___` are left out.
    """
    return assemble(sections(text))


def assemble(found: Mapping[str, str]) -> str:
    """The admission note from the dict that `sections` returns."""
    lines = []
    for name, heading in ADMISSION.items():
        body = [
            line
            for line in found.get(name, "").split("\n")
            if not line.startswith((_BOILERPLATE, _BOILERPLATE_END))
        ]
        if body := [line for line in body if line.strip("_,;" + _MARKS)]:
            lines.append(f"{heading}: {' '.join(' '.join(body).split())}")
    return "\n".join(lines)


# --- leak audit -------------------------------------------------------------------------------------------------------


def leak_audit(
    cases: Iterable[Mapping[str, Any]], *, shingle: int = 8, examples: int = 5
) -> dict[str, Any]:
    """How often text that was written after admission, or the title of the gold code, stands in the notes.

    `cases`: records (`df.to_dict("records")`) with `note`, and `text` (the whole discharge summary) or `code` or both; to
    audit the state before extraction, pass the summary as `note` too. Definitions, on lower-case words of letters and digits:
    - Later text is found by a second, cruder reader than `sections`, so that a fault of the scanner cannot hide itself: all
      lines from one that begins with a later heading (results, hospital course, procedure, discharge ..., follow-up) to the
      next that begins with one known at admission. A note holds later text if `shingle` consecutive words of it, or a whole
      shorter line of two words and more ("Acute appendicitis"), stand in the note and nowhere in the summary's other lines;
      a passage copied from the present illness is therefore no leak.
    - A note holds the gold title if the title's words, without "unspecified" and the like, stand there one after the other.
      That is no leak by itself: the diagnosis may have been known before. Read the examples.
    Returns {"notes", "later_text": {"checked", "count", "share", "examples"}, "gold_title": the same}; an example is
    {"hadm_id", "found"}, the longest passage or the title amid its words. Examples quote notes: never commit those of real ones.
    """
    from helpers import icd

    tables: dict[str, dict[str, Any]]
    tables = {
        k: {"checked": 0, "count": 0, "share": None, "examples": []}
        for k in ("later_text", "gold_title")
    }
    notes = 0
    for case in cases:
        notes += 1
        if "note" not in case:
            raise ValueError(
                f"leak_audit: record {notes} has no 'note', only {', '.join(map(str, case))}. Join the notes first."
            )
        words = _words(case["note"]) if isinstance(case["note"], str) else []
        for kind, value in (("later_text", case.get("text")), ("gold_title", case.get("code"))):
            if not isinstance(value, str):
                continue
            if kind == "later_text":
                hit = _later_passage(words, value, shingle)
            else:
                title = [
                    w
                    for w in _words(icd.title(value) or "")
                    if w not in ("unspecified", "nos", "other", "specified")
                ]
                at = f" {' '.join(words)} ".find(f" {' '.join(title)} ") if title else -1
                hit = (
                    " ".join(words)[max(0, at - 40) : at + len(" ".join(title)) + 40]
                    if at >= 0
                    else ""
                )
            table = tables[kind]
            table["checked"] += 1
            table["count"] += bool(hit)
            if hit and len(table["examples"]) < examples:
                table["examples"].append({"hadm_id": case.get("hadm_id"), "found": hit})
    for table in tables.values():
        table["share"] = table["count"] / table["checked"] if table["checked"] else None
    return {"notes": notes, **tables}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _later_passage(note: list[str], summary: str, k: int) -> str:
    """The longest run of words of the note made of shingles that only later text has, "" if there is none."""
    parts: tuple[list[str], list[str]] = ([], [])
    later = False
    for line in summary.replace("\r\n", "\n").translate(_TRANSLATE).split("\n"):
        head = " ".join(map(_spelled, _words(line[:60])))
        wrapped = line.lstrip()[:1].islower() and ":" not in line  # "no nasal | discharge, EOMI"
        ending = line.rstrip(" =*-_")[-1:]
        title = ending == ":" or (
            ending not in ".," and (_printed(line) or "hospital course" in head)
        )
        named = title and len(head.split()) < 10 and _LATER_WORD.search(head)
        later = bool(not wrapped and (named or _LATER_LINE.match(head))) or (
            later and not _EARLIER_LINE.match(head)
        )
        parts[later].append(line)
    known, after = (
        {tuple(w[i : i + k]) for i in range(len(w) - k + 1)}
        for w in (_words("\n".join(part)) for part in parts)
    )
    only_later = after - known
    best, start, end = (0, 0), -1, -1
    for i in range(len(note) - k + 1):
        if tuple(note[i : i + k]) in only_later:
            start = i if i != end + 1 or start < 0 else start
            end = i
            best = max(best, (end + k - start, start))
    if best[0]:
        return " ".join(note[best[1] : best[1] + best[0]])
    told, here = (f" {' '.join(w)} " for w in (_words("\n".join(parts[0])), note))
    lines = (
        " ".join(_words(_NUMBER.sub("", line.strip().partition(":")[2].strip() or line.strip())))
        for line in parts[1]
    )
    return max(
        (line for line in lines if " " in line and f" {line} " in here and f" {line} " not in told),
        key=len,
        default="",
    )
