"""Case → chat messages, completion → (reasoning, code): the one place that knows the answer format.

A well-formed answer is, from its first character to its last,

    [<think>] reasoning </think> <diagnosis>I21.01</diagnosis>

with only white space around the parts, a reasoning that is not empty, each tag once; `<think>` is optional
because the generation prompt ends with it. Any deviation is malformed; its code may still be used:

| deviation | code used? |
|---|---|
| lower case, no dot, white space around the code, CRLF | yes, and the answer stays well-formed |
| text before, between or after the parts; empty reasoning; stray tags; tags quoted in the reasoning | yes |
| the code followed by its title; punctuation or markdown around it; the same code answered twice | yes |
| two answers that differ; two codes in one answer; an answer left open, or inside another | no: ambiguous |
| `</think>` missing | only if the answer ends the completion: else it may be a passing thought |
| no answer, an empty one, one that does not begin with something of a code's shape | no |

Tags quoted in the reasoning never count: the answer is what follows the first `</think>`. Only shape matters
here; whether a code exists is for `icd.is_valid`. Time is linear in the completion.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import icd

SYSTEM = (
    "Give the principal diagnosis of this admission note as one ICD-10-CM code. "  # short: tokens cost
    "Reason in <think></think>, then answer in <diagnosis></diagnosis>."
)
TAGS = ("<think>", "</think>", "<diagnosis>", "</diagnosis>")
OPEN, CLOSE = TAGS[2:]
LONGEST_ANSWER = 300  # characters; a code with the longest official title fits
MOST_SPELLINGS = (
    8  # different texts of a repeated answer that are read, which keeps a flood of answers cheap
)

_WORD = re.compile(r"[\w.]+")
_MARKUP = re.compile(
    "<(?=[A-Za-z/|\uff5c])"
)  # the last is the full-width bar of some models' control tokens


@dataclass(frozen=True, slots=True)
class Parsed:
    """`think`: reasoning, stripped; `code`: normalised, None if unusable; `problem`: None if well-formed."""

    think: str
    code: str | None
    problem: str | None
    is_well_formed = property(lambda self: self.problem is None)


def neutralise(note: str) -> str:
    """The note with a space after each `<` before a letter, slash or bar, so that no tag and no control token
    (`<|im_start|>`, `</s>`, `<start_of_turn>`) survives and a note opens no turn. "BP <90" stays as it is."""
    return _MARKUP.sub("< ", note)


def messages(note: str) -> list[dict[str, str]]:
    """The chat for one admission note: SYSTEM, then the neutralised note alone as the user's turn."""
    if not isinstance(note, str) or not note.strip():
        raise ValueError(
            "messages: the note is empty or no text. Drop such cases (mimic.build_cases does)."
        )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": neutralise(note)}]


def read_template(path: str | Path) -> Callable[[str], list[dict[str, str]]]:
    """`messages` of a prompt file in the released format: CSV with the columns role and content, `{note}` where the note goes.

    A last turn of the assistant that only opens the reasoning is left out: the chat template opens it (models.load_tokenizer).
    One that says more stays, and is where the answer goes on (`chat`). Raises ValueError, with the file, for other columns or
    roles, for text that is not UTF-8, or unless exactly one turn has exactly one `{note}`.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        table = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
        table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
        rows = list(table)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: this is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{path}: this is no CSV ({error}). Put text in double quotes, and double those in it."
        ) from error
    if not rows or not {"role", "content"} <= set(table.fieldnames):
        found = ", ".join(table.fieldnames) or "nothing"
        raise ValueError(
            f"{path}: the columns role and content are needed, and a row (found: {found})."
        )
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}: turn {number} has not {len(table.fieldnames)} fields. Put text with commas or line breaks "
                'between double quotes: user,"A note, {note}"'
            )
    turns = [{"role": row["role"].strip().lower(), "content": row["content"]} for row in rows]
    if wrong := sorted({turn["role"] for turn in turns} - {"system", "user", "assistant"}):
        raise ValueError(
            f"{path}: role {', '.join(map(repr, wrong))} is none of system, user, assistant."
        )
    if turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() in ("", "<think>"):
        turns.pop()
    if (
        found := sum(
            turn["content"].count("{note}") for turn in turns if turn["role"] != "assistant"
        )
    ) != 1:
        raise ValueError(
            f"{path}: {{note}} stands in it {found} times. It must stand once, where the note goes."
        )

    def fill(note: str) -> list[dict[str, str]]:
        clean = messages(note)[-1][
            "content"
        ]  # checked and neutralised as with the course's own prompt
        return [turn | {"content": turn["content"].replace("{note}", clean)} for turn in turns]

    return fill


def chat(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """The text of a chat up to where the answer begins.

    A last turn of the assistant is how the answer begins, in place of the `<think>` of the chat template. Where the template
    refuses a system turn, its text begins the user's first one.
    """
    from jinja2 import TemplateError

    opening = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
    turns, written = (
        turns if opening is None else turns[:-1],
        {"tokenize": False, "add_generation_prompt": True},
    )
    try:
        text = tokenizer.apply_chat_template(turns, **written)
    except TemplateError:
        if turns[0]["role"] != "system":
            raise
        system, first, *rest = turns
        first = first | {"content": f"{system['content']}\n\n{first['content']}"}
        text = tokenizer.apply_chat_template([first, *rest], **written)
    if opening is None:
        return text
    return re.sub(r"<think>\s*$", "", text) + re.sub(r"<think>\s*$", "<think>\n", opening)


def ends(tokenizer: Any, own: int | list[int] | None) -> list[int] | None:
    """Tokens at which an answer is over: a model's own, its tokenizer's, and the one that the chat template puts behind an
    answer. Many fine-tunes name in their generation config only the end of a text, and write the end of a turn."""
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
    behind = tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False).rpartition("answer")[2],
        add_special_tokens=False,
    )
    closing = [
        i
        for i in behind["input_ids"][:1]
        if getattr(tokenizer.added_tokens_decoder.get(i), "special", False)
    ]
    return (
        sorted(
            {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *closing} - {None}
        )
        or None
    )


def answer(think: str, code: str) -> str:
    """The well-formed completion of reasoning and code, without the `<think>` of the generation prompt."""
    if icd.normalise(code) is None:
        raise ValueError(f"answer: {code!r} does not have the shape of an ICD-10-CM code.")
    if not think.strip() or any(tag in think for tag in TAGS):
        raise ValueError(
            f"answer: the reasoning is empty or holds one of {' '.join(TAGS)}; give plain text."
        )
    return f"{think}\n</think>\n<diagnosis>{icd.dotted(code)}</diagnosis>"


def parse(completion: str) -> Parsed:
    """Reasoning and code of a completion, by the table at the top. ValueError only if it is no string."""
    if not isinstance(completion, str):
        raise ValueError(f"parse: a completion must be text, not {type(completion).__name__}.")
    text = completion.replace("\r\n", "\n").strip().removeprefix("<think>")
    think, closed, rest = text.partition("</think>")
    if not closed:
        think, tag, rest = text.partition(OPEN)
        rest = tag + rest
    think, rest = think.strip(), rest.strip()
    code, problem = _answer(rest)
    if not closed:
        return Parsed(
            think, code if rest.endswith(CLOSE) else None, "the reasoning lacks its </think>"
        )
    if problem is None and (not think or any(tag in think for tag in TAGS)):
        problem = "tags inside the reasoning" if think else "the reasoning is empty"
    return Parsed(think, code, problem)


def _answer(rest: str) -> tuple[str | None, str | None]:
    """(code, problem) of what follows the reasoning."""
    before, *pieces = rest.split(OPEN)
    if not pieces:
        return None, f"no {OPEN} after the reasoning"
    if not all(CLOSE in piece for piece in pieces):
        return None, f"an answer that no {CLOSE} closes, or one inside another"
    spellings = {piece.partition(CLOSE)[0].strip() for piece in pieces}
    readings = (
        [_code(spelling) for spelling in spellings] if len(spellings) <= MOST_SPELLINGS else []
    )
    if len({code for code, _ in readings}) != 1:
        return None, "several answers that differ"
    if len(pieces) > 1:
        return readings[0][0], "more than one answer"
    code, problem = readings[0]
    if before or not rest.endswith(CLOSE) or rest.count(CLOSE) > 1:
        problem = problem or "text beside the reasoning and the answer"
    return code, problem


def _code(text: str) -> tuple[str | None, str | None]:
    """(code, problem) of the text between the diagnosis tags."""
    if len(text) > LONGEST_ANSWER:
        return None, f"an answer of {len(text)} characters"
    if whole := icd.normalise(text):
        return whole, None
    words = [word.strip(".") for word in _WORD.findall(text)]
    code = icd.normalise(words[0]) if words else None
    if code is None:
        return (
            None,
            "an answer that does not begin with an ICD-10-CM code" if text else "an empty answer",
        )
    if any(icd.normalise(word) not in (None, code) for word in words):
        return None, "several codes in one answer"
    return code, "text beside the code in the answer"
