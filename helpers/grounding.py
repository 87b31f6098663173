"""How much of the reasoning the note states: the words behind `rewards.grounding_reward`.

A text is read into sentences, a sentence into clauses of content words: `_KINDS` says what kind a
token is, and `_clauses`, with an example, what each kind does. A clause of the reasoning cites a
finding unless it concludes ("suggests", "likely", a code). The note states it if all its numbers,
and over half of the pairs of its neighbouring words, stand close together in one sentence of the
note under the same negation. This compares words, not meanings: a note's "myocardial infarction"
does not state "MI".

Taught in notebook 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import groupby, pairwise

from helpers import icd

ENOUGH = 2  # so many stated findings earn the whole share
COPY_LIMIT = 0.5  # the share of the note's word pairs that may be repeated without loss

STATED = (False,)  # the possible readings of a word: is it negated?
DENIED = (True,)
EITHER = (False, True)


def score(think: str, note: str) -> float:
    """The share of the cited findings that the note states, less a penalty for copying the note.

    score = share · min(1, stated / ENOUGH) − excess, where excess goes from 0 to 1 while the share
    of the note's word pairs that the reasoning repeats goes from COPY_LIMIT to 1. Within −1 and 1;
    at most 0 if the reasoning cites nothing.

    >>> note = "Crushing chest pain and sweating. Denies fever."
    >>> score("crushing chest pain; no fever", note), score("crushing chest pain; fever", note)
    (1.0, 0.25)
    """
    facts, note_pairs = _facts(note)
    tokens = _TOKEN.findall(think.lower())
    clauses = [clause for sentence in _sentences(tokens) for clause in _clauses(sentence, {})]
    cited = {tuple(clause) for clause in clauses if clause}
    stated = sum(_is_stated(clause, facts) for clause in cited)
    share = stated / max(1, len(cited)) * min(1.0, stated / ENOUGH)
    copied = len(note_pairs & _word_pairs(tokens)) / max(1, len(note_pairs))
    return share - max(0.0, (copied - COPY_LIMIT) / (1 - COPY_LIMIT))


def _clauses(sentence: Iterable[str], others: Mapping[str, str]) -> list[list[tuple]]:
    """The clauses of a sentence: content words, each with its readings.

    `others` maps a kind of token to the kind that it is treated like.
    """
    clauses = [[]]
    readings = STATED
    for token in sentence:
        kind = _kind(token)
        match others.get(kind, kind):
            case "word":  # "chest pain": two content words
                clauses[-1].append((token, readings))
            case "not":  # "no fever": the fever is denied
                readings = DENIED
            case "comma":  # "denies fever, cough": the cough may be denied or not
                readings = STATED if readings == STATED else EITHER
                clauses.append([])
            case "contrast":  # "no fever but cough": the cough is stated
                readings = STATED
                clauses.append([])
            case "colon":  # "Findings: chest pain": the heading is no finding
                readings = STATED if readings == STATED else EITHER
                clauses[-1] = []
            case "conclusion":  # "sweating, pain suggests infarction": cites the sweating alone
                return clauses[:-1]
            case "empty":  # "the patient reports": says nothing about the patient
                pass
    return clauses


# In a note a heading and a conclusion are part of what it states.
_IN_A_NOTE = {"colon": "comma", "conclusion": "word"}

# A token is of the first kind whose pattern fits; a code is a conclusion, any other token a word.
_KINDS = {
    "stop": r"[.;!?\n]",
    "comma": r"[,()]",
    "colon": r":",
    "not": r"no|not|nor|den(?:ies|ied|ying)|without|neg|negative|never|absent",
    "contrast": r"but|however|although|except|yet",
    "empty": (
        r"an?|and|are|as|at|by|for|from|ha[ds]|have|s?he|hers?|his|i[nst]|its|o[fnr]|that|the|their"
        r"|there|these|they|this|to|was|were|which|who|with|patient|pt|present(?:s|ed|ing)|reports"
        r"|states|history|hx|findings?|noted?|shows|none|nothing|specific"
    ),
    "conclusion": (
        r"(?:suggest|indicat|support|favou?r|diagnos|probabl)\w*|consistent|point(?:s|ing)|likely"
        r"|therefore|thus|hence|fits|coded?"
    ),
}
# A word, a mark, or the end of a line before a list item or an empty line.
_TOKEN = re.compile(r"[^\W_]+(?:[./'][^\W_]+)*|[,:();.!?]|\n(?=[ \t\r]*+[-*•\n])")


@lru_cache(maxsize=1 << 15)
def _kind(token: str) -> str:
    for kind, pattern in _KINDS.items():
        if re.fullmatch(pattern, token):
            return kind
    return "conclusion" if icd.normalise(token) else "word"


def _sentences(tokens: Iterable[str]) -> Iterator[Iterable[str]]:
    for is_stop, sentence in groupby(tokens, lambda token: _kind(token) == "stop"):
        if not is_stop:
            yield sentence


@lru_cache(maxsize=256)  # the completions of a prompt share their note
def _facts(note: str) -> tuple[set[tuple], set[tuple[str, str]]]:
    """What a note states, and its word pairs.

    It states (word, negated) and, for words up to three apart in a sentence, (word, word, negated).
    """
    facts = set()
    tokens = _TOKEN.findall(note.lower())
    for sentence in _sentences(tokens):
        words = [word for clause in _clauses(sentence, _IN_A_NOTE) for word in clause]
        for i, (word, readings) in enumerate(words):
            for negated in readings:
                facts.add((word, negated))
                facts.update((near, word, negated) for near, _ in words[max(0, i - 3) : i])
    return facts, _word_pairs(tokens)


def _is_stated(clause: tuple, facts: set[tuple]) -> bool:
    words = [(word, readings[0]) for word, readings in clause]
    if len(words) == 1:
        return words[0] in facts
    if any(word[0].isdigit() and (word, negated) not in facts for word, negated in words):
        return False
    close = sum(
        (a, b, b_negated) in facts or (b, a, a_negated) in facts
        for (a, a_negated), (b, b_negated) in pairwise(words)
    )
    return 2 * close > len(words) - 1


def _word_pairs(tokens: Iterable[str]) -> set[tuple[str, str]]:
    return set(pairwise(token for token in tokens if token[0].isalnum()))
