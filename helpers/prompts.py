"""Case → chat messages, completion → (reasoning, code): the one place that knows the answer format.

A well-formed answer is, from its first character to its last,

    [<think>] reasoning </think> <diagnosis>I21.01</diagnosis>

with only white space around the parts, a reasoning that is not empty, each tag once; `<think>` is
optional because the generation prompt ends with it. Any deviation is malformed; its code may still
be used:

| deviation | code used? |
|---|---|
| lower case, no dot, white space around the code, CRLF | yes, and the answer stays well-formed |
| text before, between or after the parts; no reasoning; stray tags; tags in the reasoning | yes |
| the code with its title behind it, or punctuation or markdown around it | yes |
| the same code answered twice | yes |
| two answers that differ; two codes in one answer | no: ambiguous |
| an answer left open, or inside another | no: ambiguous |
| `</think>` missing | only if the answer ends the completion: else it may be a passing thought |
| a code with a mark inside it ("I21,4", "I21-4") | no: I21 is another code |
| no answer, an empty one, one that does not begin with something of a code's shape | no |

Tags quoted in the reasoning never count: the answer is what follows the first `</think>`. The first
code needs only the shape of one; whether it exists is for `icd.is_valid`. A second code beside it
counts if it exists and is no word of the first one's title ("D51.0 Vitamin B12 deficiency anemia
..."). Time is linear in the completion.

Taught in notebooks 0 and 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import icd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = (
    "Give the principal diagnosis of this admission note as one ICD-10-CM code. "
    "Reason in <think></think>, then answer in <diagnosis></diagnosis>."
)
TAGS = ("<think>", "</think>", "<diagnosis>", "</diagnosis>")
OPEN = "<diagnosis>"
CLOSE = "</diagnosis>"
THINK = "<think>\n"  # the generation prompt ends with it
LONGEST_ANSWER = 300  # characters; a code with the longest official title fits
# Different texts of a repeated answer that are read: a flood of answers stays cheap.
MOST_SPELLINGS = 8
Turns = list[dict[str, str]]  # of a chat: role and content of each

# "I21,01" is one word, which has no code's shape: the code before the comma is another one.
_WORD = re.compile(r"[\w.]+(?:[^\w\s()\[\]]\.?\d[\w.]*)*")
_MARKUP = re.compile("<(?=[A-Za-z/|\uff5c])")  # \uff5c: the bar of some models' control tokens
_THINK_AT_END = re.compile(r"<think>\s*$")


@dataclass(frozen=True, slots=True)
class Parsed:
    """`think`: reasoning, stripped; `code`: normalised, None if unusable; `problem`: None if
    well-formed."""

    think: str
    code: str | None
    problem: str | None

    @property
    def is_well_formed(self) -> bool:
        return self.problem is None


def neutralise(note: str) -> str:
    """The note with a space after each `<` before a letter, slash or bar, so that no tag and no
    control token (`<|im_start|>`, `</s>`, `<start_of_turn>`) survives and a note opens no turn. "BP
    <90" stays as it is."""
    return _MARKUP.sub("< ", note)


def messages(note: str) -> Turns:
    """The chat for one admission note: SYSTEM, then the neutralised note alone as the user's turn.

    Raises ValueError for an empty note.
    """
    if not isinstance(note, str) or not note.strip():
        raise ValueError(
            "messages: the note is empty or no text. Drop such cases (mimic.build_cases does)."
        )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": neutralise(note)}]


def truncate_note(note: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The longest beginning of the note that ends where a token ends and has at most max_tokens
    tokens.

    Prompts are shortened here, answers never.
    """
    encoding = tokenizer(note, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoding["offset_mapping"]  # (start, end) of each token, in characters
    if len(spans) <= max_tokens:
        return note
    for _, end in reversed(spans[:max_tokens]):
        beginning = note[:end]  # cut inside a character of several tokens, it may be a few too long
        if len(tokenizer(beginning, add_special_tokens=False)["input_ids"]) <= max_tokens:
            return beginning
    return ""


def chat(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> str:
    """The text of a chat up to where the answer begins: the chat template, then what `opening`
    gives.

    A last turn of the assistant stands in place of the `<think>` that the template opens.
    """
    beginning = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
    if beginning:
        turns = turns[:-1]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not beginning:
        return text
    return _THINK_AT_END.sub("", text) + _THINK_AT_END.sub(THINK, beginning)


def opening(turns: Turns) -> str:
    """The part of the answer that a last turn of the assistant gives away, behind its `<think>`."""
    if turns[-1]["role"] != "assistant":
        return ""
    return turns[-1]["content"].rpartition("<think>")[2].lstrip()


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the chat template puts behind an answer; None if plain text follows."""
    sentinel = "0answer0"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": sentinel}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    rest = text.rpartition(sentinel)[2].lstrip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def ends(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None) -> list[int] | None:
    """Tokens at which an answer is over: a model's own, its tokenizer's, and the end of a turn.

    Many fine-tunes name in their generation config only the end of a text, and write the end of a
    turn.
    """
    tokens = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    tokens.update(own if isinstance(own, list) else [own])
    return sorted(tokens - {None}) or None


def answer(think: str, code: str) -> str:
    """The well-formed completion of reasoning and code, without the `<think>` of the generation
    prompt."""
    if icd.normalise(code) is None:
        raise ValueError(f"answer: {code!r} does not have the shape of an ICD-10-CM code.")
    if not think.strip() or any(tag in think for tag in TAGS):
        raise ValueError(
            f"answer: the reasoning is empty or holds one of {' '.join(TAGS)}; give plain text."
        )
    return f"{think}\n</think>\n<diagnosis>{icd.dotted(code)}</diagnosis>"


def parse(completion: str) -> Parsed:
    """Reasoning and code of a completion, by the table at the top. ValueError only if it is no
    string."""
    if not isinstance(completion, str):
        raise ValueError(f"parse: a completion must be text, not {type(completion).__name__}.")
    text = completion.replace("\r\n", "\n").strip().removeprefix("<think>")
    think, closed, rest = text.partition("</think>")
    if not closed:
        think, tag, rest = text.partition(OPEN)
        rest = tag + rest
    think = think.strip()
    rest = rest.strip()
    code, problem = _answer(rest)
    if not closed:
        problem = "the reasoning lacks its </think>"
        return Parsed(think, code if rest.endswith(CLOSE) else None, problem)
    if not think:
        problem = problem or "the reasoning is empty"
    elif any(tag in think for tag in TAGS):
        problem = problem or "tags inside the reasoning"
    return Parsed(think, code, problem)


def _answer(rest: str) -> tuple[str | None, str | None]:
    """(code, problem) of what follows the reasoning."""
    before, *pieces = rest.split(OPEN)
    if not pieces:
        return None, f"no {OPEN} after the reasoning"
    if not all(CLOSE in piece for piece in pieces):
        return None, f"an answer that no {CLOSE} closes, or one inside another"
    spellings = {piece.partition(CLOSE)[0].strip() for piece in pieces}
    is_flood = len(spellings) > MOST_SPELLINGS
    readings = [] if is_flood else [_code(spelling) for spelling in spellings]
    if len({code for code, _ in readings}) != 1:
        return None, "several answers that differ"
    code, problem = readings[0]
    if len(pieces) > 1:
        return code, "more than one answer"
    if before or not rest.endswith(CLOSE) or rest.count(CLOSE) > 1:
        problem = problem or "text beside the reasoning and the answer"
    return code, problem


def _code(text: str) -> tuple[str | None, str | None]:
    """(code, problem) of the text between the diagnosis tags."""
    if len(text) > LONGEST_ANSWER:
        return None, f"an answer of {len(text)} characters"
    if whole := icd.normalise(text):
        return whole, None
    if not text:
        return None, "an empty answer"
    code, *others = _codes(text) or [None]
    if code is None:
        return None, "an answer that does not begin with an ICD-10-CM code"
    rivals = {*others} - {None, code}
    if rivals and any(map(icd.is_valid, rivals.difference(_codes(icd.title(code) or "")))):
        return None, "several codes in one answer"
    return code, "text next to the code in the answer"


def _codes(text: str) -> list[str | None]:
    """Of each word the code that it has the shape of, or None."""
    return [icd.normalise(word.strip("._")) for word in _WORD.findall(text)]
