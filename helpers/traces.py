"""Reasoning traces for part of the training cases: a teacher reads the note, and each trace is checked before it is kept.

Without network and GPU the teacher is a reader that knows the casebook and fills a template: *template rationales*, not
clinical reasoning. It is not told the code. It has a habit that real coders and real teachers have: where the note says
enough for a specific code it falls back, at the rate HABIT, on the "unspecified" sibling and leaves the telling detail out.
With a GPU the teacher is any instruct model that runs locally; its answers go through the same check.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pandas as pd

from helpers import icd, prompts, synthetic

# Fixed and committed before the first GRPO run, never tuned. results/LOG.md says when, and the study also runs the rate 0.
HABIT = 0.6
MOST_CITED = 3
COLUMNS = ("hadm_id", "think", "code", "kept", "why")
_CITED = re.compile(r"Findings: (.*?)\.(?:\s|$)", re.DOTALL)


def template_teacher(note: str, key: str, *, habit: float = HABIT) -> tuple[str, str]:
    """(reasoning, code) for an admission note. `key` decides by hash whether the habit strikes: same note, same answer.

    The code is the posterior argmax given the casebook phrases found in the note. Cited are the findings that speak most
    for it: largest log P(finding | code) − log P(finding).
    """
    book = synthetic.casebook()
    shown, spans = synthetic.read(note, book)
    belief = synthetic.posterior(shown, book)
    best = int(belief.argmax())
    code = book.codes[best]
    cited, detail = synthetic.evidence(code, spans, book, MOST_CITED)
    fallback = book.entries[code].get("unspecified")
    if fallback and int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8 < habit:
        code = fallback
        cited, detail = [name for name in cited if name != detail] or cited, ""
    findings = "; ".join(spans[name] for name in cited) or "nothing specific"
    category = (
        icd.category(code) or ""
    )  # of its title the first five words: a long one costs tokens and says little more
    chapter, title = (
        icd.chapter_short(icd.chapter(code) or 22),
        " ".join((icd.title(category) or "").split()[:5]).rstrip(",;"),
    )
    return (
        f"Findings: {findings}.\n{chapter}: {category} {title}.\nDetail: {spans[detail] if detail else 'none'}.",
        code,
    )


def fallbacks() -> dict[str, str]:
    """Specific code -> the unspecified sibling that the teacher's habit falls back on (both normalised)."""
    entries = synthetic.casebook().entries
    return {
        str(icd.normalise(code)): str(icd.normalise(entry["unspecified"]))
        for code, entry in entries.items()
        if "unspecified" in entry
    }


def cited_findings(think: str) -> list[str]:
    """The spans that a reasoning in the course's template cites from the note."""
    match = _CITED.search(think)
    return (
        []
        if match is None
        else [text for text in match.group(1).split("; ") if text and text != "nothing specific"]
    )


def check(think: str, code: str | None, note: str) -> str | None:
    """None if a trace may be kept, else one line why not: format, existing code, and cites only what the note says.

    It is deliberately not compared with the label: distillation here is unsupervised, as in the paper.
    """
    if code is None or not icd.is_valid(code):
        return f"no valid code: {code!r}"
    try:
        parsed = prompts.parse(prompts.answer(think, code))
    except ValueError as error:
        return str(error)
    if parsed.problem:
        return parsed.problem
    said = " ".join(note.lower().split())
    invented = [
        text for text in cited_findings(think) if " ".join(text.lower().split()) not in said
    ]
    if invented:
        return f"cites what the note does not say: {invented[0]!r}"
    return None if cited_findings(think) or not think.startswith("Findings:") else "cites nothing"


def from_template(cases: pd.DataFrame, *, habit: float = HABIT) -> pd.DataFrame:
    """Template rationales for cases (hadm_id, note): hadm_id, think, code (normalised), kept, why (None if kept)."""
    rows = []
    for case in cases.itertuples():
        think, code = template_teacher(case.note, str(case.hadm_id), habit=habit)
        rows.append((case.hadm_id, think, icd.normalise(code), case.note))
    return checked(rows)


def checked(rows: list[tuple[int, str, str | None, str]]) -> pd.DataFrame:
    """The table of traces for rows (hadm_id, think, normalised code or None, note), each one checked."""
    table = [
        (hadm, think, code, why is None, why)
        for hadm, think, code, note in rows
        for why in [check(think, code, note)]
    ]
    return pd.DataFrame(table, columns=list(COLUMNS))


def sft_dataset(
    cases: pd.DataFrame, traces: pd.DataFrame, tokenizer: Any, max_note_tokens: int
) -> Any:
    """A `datasets.Dataset` of conversational prompt/completion rows for TRL's SFTTrainer, from the traces that were kept.

    The completion starts with `<think>`, which the template's generation prompt already holds: TRL then counts it to the prompt.
    """
    from datasets import Dataset

    from helpers import models

    kept = traces[traces["kept"]].merge(
        cases[["hadm_id", "note"]], on="hadm_id", validate="one_to_one"
    )
    rows = [
        {
            "prompt": prompts.messages(models.truncate_note(row.note, tokenizer, max_note_tokens)),
            "completion": [
                {"role": "assistant", "content": models.THINK + prompts.answer(row.think, row.code)}
            ],
        }
        for row in kept.itertuples()
    ]
    if not rows:
        raise ValueError(
            "traces: none was kept, so there is nothing to train on. See the column `why` in 02_reasoning_traces."
        )
    return Dataset.from_list(rows)


def grpo_dataset(cases: pd.DataFrame, tokenizer: Any, max_note_tokens: int) -> Any:
    """A `datasets.Dataset` of prompts with the columns that rewards read: code (gold) and note."""
    from datasets import Dataset

    from helpers import models

    notes = [models.truncate_note(note, tokenizer, max_note_tokens) for note in cases["note"]]
    return Dataset.from_list(
        [
            {"prompt": prompts.messages(note), "code": code, "note": note}
            for note, code in zip(notes, cases["code"], strict=True)
        ]
    )
