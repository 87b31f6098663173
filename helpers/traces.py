"""Reasoning traces for part of the training cases: a teacher reads the note, each trace is checked.

Without network and GPU the teacher is a reader that knows the casebook and fills a template:
*template rationales*, not clinical reasoning. It is not told the code. It has a habit that real
coders and real teachers have: where the note says enough for a specific code it falls back, at the
rate HABIT, on the "unspecified" sibling and leaves the telling detail out. With a GPU the teacher
is any instruct model that runs locally; its answers go through the same check.

Taught in notebook 2; the data sets for TRL in notebooks 3 and 4.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers import casebook, icd, prompts

if TYPE_CHECKING:
    from datasets import Dataset

# Fixed and committed before the first GRPO run, never tuned. results/LOG.md says when, and the
# study also runs the rate 0.
HABIT = 0.6
MISREAD = 0.3  # of the frames, where there are any (reading above 0)
MOST_CITED = 3
NOTHING = "nothing specific"  # what a trace cites where the note holds no telling finding
COLUMNS = ("hadm_id", "think", "code", "kept", "why")

_QUOTE = re.compile('["\u201c]([^"\u201c\u201d]+)["\u201d]')
_LIST_MARK = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)\d+(?:[.,]\d+)*")  # none of I21.02 or COVID-19
# Stems of the international names (WHO), and some common names that have none.
_DRUG = re.compile(
    r"\b(?:\w+(?:pril|sartan|olol|dipine|statin|azole|cillin|mycin|micin|floxacin|cycline|parin"
    r"|xaban|grel|gliptin|gliflozin|glutide|formin|semide|thiazide|tidine|setron|triptan|azepam"
    r"|azolam|caine|mab|nib|vir|oxetine|apine|idone|sone|solone|profen|codone|phylline|terol)"
    r"|aspirin|acetaminophen|amiodarone|ceftriaxone|digoxin|fentanyl|heparin|insulin|levothyroxine"
    r"|lithium|morphine|naloxone|nitroglycerin|phenytoin|vancomycin|warfarin)\b"
)


def template_teacher(
    note: str, key: str, *, habit: float = HABIT, reading: float = 0.0, misread: float = MISREAD
) -> tuple[str, str]:
    """(reasoning, dotted code) for an admission note; `key` decides where the habit strikes, and
    which frames are misread.

    The code is the posterior argmax given the casebook phrases found in the note. Cited are the
    findings that speak most for it (`casebook.evidence`). reading: of the note's hospital.
    misread: the rate at which what stands in a frame is taken for the patient's own.
    """
    shown, spans = casebook.read(
        note, reading, lambda clause: struck(f"{key} at {clause.start}", misread)
    )
    book = casebook.casebook()
    code = book.codes[casebook.posterior(shown).argmax()]
    names, detail = casebook.evidence(code, spans, MOST_CITED)
    sibling = book.entries[code].get("unspecified")
    if sibling and struck(key, habit):
        code = sibling
        names = [name for name in names if name != detail] or names
        detail = ""
    findings = "; ".join(spans[name] for name in names) or NOTHING
    chapter = icd.chapter_short(icd.chapter(code))
    category = icd.category(code)
    # Of the title five words: a long one costs tokens and says little more.
    title = " ".join(icd.title(category).split()[:5]).rstrip(",;")
    think = f"Findings: {findings}.\n{chapter}: {category} {title}.\n"
    return think + f"Detail: {spans.get(detail, 'none')}.", code


def struck(key: str, habit: float) -> bool:
    """Whether the habit strikes, at the rate `habit`: by a hash, so always the same for a key."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8 < habit


def fallbacks() -> dict[str, str]:
    """Specific code -> the sibling that the habit falls back on, both normalised."""
    siblings = {}
    for code, entry in casebook.casebook().entries.items():
        if "unspecified" in entry:
            siblings[icd.normalise(code)] = icd.normalise(entry["unspecified"])
    return siblings


def cited_findings(think: str) -> list[str]:
    """The findings that a reasoning in the course's template quotes from the note."""
    match = re.search(r"Findings: (.*?)\.\s*(?:\n|$)", think, re.DOTALL)
    quotes = match.group(1).split("; ") if match else []
    return [quote for quote in quotes if quote not in ("", NOTHING)]


def unstated(think: str, note: str) -> list[str]:
    """What a reasoning in free text states and the note does not: quotations in double quotes,
    numbers, and words that look like a drug's name.

    Nothing else is looked at. What a reasoning says in its own words may be wrong and is kept.

    >>> unstated('"Chest pain" since 3 days, on warfarin.', "CC: chest pain for 2 days")
    ['3', 'warfarin']
    """
    text = " ".join(note.lower().split())
    numbers = {*re.findall(r"\d+(?:[.,]\d+)*", text)}
    quotes = [part for quote in _QUOTE.findall(think) for part in re.split(r"\.{3}|…", quote)]
    quotes = [" ".join(quote.lower().split()).strip(" .,;:") for quote in quotes]
    own = _LIST_MARK.sub("", _QUOTE.sub(" ", think))
    drugs = _DRUG.findall(own.lower())
    return [
        *(quote for quote in quotes if quote not in text),
        *(number for number in _NUMBER.findall(own) if number not in numbers),
        *(drug for drug in drugs if drug not in text),
    ]


def check_trace(
    think: str, code: str | None, note: str, dictionary: set[str] | None = None
) -> str | None:
    """Why a trace is dropped, in one line; None if it is kept.

    Its code exists (in ICD-10-CM or in MIMIC's `dictionary`), its format parses, and it cites only
    what the note says: all findings of the course's template, and of free text what `unstated` can
    find. It is deliberately not compared with the label.
    """
    if not icd.is_valid(code, dictionary):
        return f"no valid code: {code!r}"
    try:
        problem = prompts.parse(prompts.answer(think, code)).problem
    except ValueError as error:
        problem = str(error)
    if problem:
        return problem
    quotes = cited_findings(think)
    if think.startswith("Findings:") and not quotes:
        return "cites nothing"
    text = " ".join(note.lower().split())
    for quote in quotes:
        if " ".join(quote.lower().split()) not in text:
            return f"cites what the note does not say: {quote!r}"
    if not think.startswith("Findings:"):
        for fact in unstated(think, note):
            return f"states what the note does not say: {fact!r}"
    return None


def from_template(cases: pd.DataFrame, **options: float) -> pd.DataFrame:
    """Template rationales for cases (hadm_id, note), as the table that `checked` gives; options: of
    `template_teacher`."""
    rows = []
    for case in cases.itertuples():
        think, code = template_teacher(case.note, str(case.hadm_id), **options)
        rows.append((case.hadm_id, think, icd.normalise(code), case.note))
    return checked(rows)


def checked(
    rows: list[tuple[int, str, str | None, str]], dictionary: set[str] | None = None
) -> pd.DataFrame:
    """The table of traces for rows (hadm_id, think, normalised code or None, note).

    Columns hadm_id, think, code, kept, and why (missing where the trace is kept).
    """
    table = []
    for hadm_id, think, code, note in rows:
        why = check_trace(think, code, note, dictionary)
        table.append((hadm_id, think, code, why is None, why))
    return pd.DataFrame(table, columns=COLUMNS)


def sft_dataset(
    cases: pd.DataFrame, traces: pd.DataFrame, tokenizer: Any, max_note_tokens: int
) -> Dataset:
    """Conversational prompt/completion rows for TRL's SFTTrainer, from the traces that were kept.

    The completion starts with `<think>`, which the template's generation prompt already holds: TRL
    then counts it to the prompt. Raises ValueError where no trace was kept.
    """
    from datasets import Dataset

    notes = cases[["hadm_id", "note"]]
    lessons = traces[traces["kept"]].merge(notes, on="hadm_id", validate="many_to_one")
    if lessons.empty:
        raise ValueError(
            "traces: none was kept, so there is nothing to train on. "
            "See the column `why` in 02_reasoning_traces."
        )
    rows = []
    for trace in lessons.itertuples():
        note = prompts.truncate_note(trace.note, tokenizer, max_note_tokens)
        answer = prompts.THINK + prompts.answer(trace.think, trace.code)
        completion = [{"role": "assistant", "content": answer}]
        rows.append({"prompt": prompts.messages(note), "completion": completion})
    return Dataset.from_list(rows)


def grpo_dataset(cases: pd.DataFrame, tokenizer: Any, max_note_tokens: int) -> Dataset:
    """Prompts for TRL's GRPOTrainer, with the columns that rewards read: code (gold) and note."""
    from datasets import Dataset

    rows = []
    for case in cases.itertuples():
        note = prompts.truncate_note(case.note, tokenizer, max_note_tokens)
        rows.append({"prompt": prompts.messages(note), "code": case.code, "note": note})
    return Dataset.from_list(rows)
