"""How a note speaks of who has a finding, when and whether: a grammar, written and read back.

`reading/frames.yaml` says how a note speaks of findings that are not the patient's own and present,
and how it denies. `reading/relations.yaml` has the findings that two words or two numbers state by
their order. What is written here `clauses` reads back.

Taught in notebook 1.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).with_name("reading")
RULES = yaml.safe_load((FOLDER / "frames.yaml").read_bytes())
FRAMES = RULES["frames"]
DENIAL = "denied"  # the state of a clause that denies
RELATED = 0.5  # P(a finding is written by a relation, where there is one), at reading 1
TURNED = 0.3  # P(the sentence turns to a finding of the patient's own)
LONGEST = {"hpi": 3, "ed": 4, "exam": 3}  # findings in a sentence; elsewhere 5

_SENTENCE = re.compile(r"(?<=[.\]])\s+|\n+")
_TURN = re.compile("|".join(map(re.escape, RULES["turns"])))
_HEAD = r"(?:\w+: )?"  # of a section, before its first sentence


class Clause(NamedTuple):
    """A part of a text, and its state: a frame, DENIAL, or "" for the patient's own and present."""

    start: int
    end: int
    state: str


def sha256() -> str:
    """Of the grammar's files."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.yaml")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def relations() -> dict[str, dict[str, list[str]]]:
    """`stated` and `denied` -> finding -> phrases."""
    path = FOLDER / "relations.yaml"
    phrases = {"stated": defaultdict(list), "denied": defaultdict(list)}
    for relation in yaml.safe_load(path.read_bytes()):
        for polarity, table in phrases.items():
            for finding, pairs in relation.get(polarity, {}).items():
                for a, b in pairs:
                    for template in relation["templates"]:
                        table[finding].append(template.format(a=a, b=b))
    return phrases


def sentences(
    row: dict[str, Any], findings: dict[str, Any], rng: random.Random
) -> dict[str, list[str]]:
    """The sentences of an admission by section, and in `opening` the findings to begin with.

    `row` holds present, denied, blocks, missing and reading, as drawn; `findings` the raw records.
    """
    own = defaultdict(list)  # what the patient has, by section
    for name in rng.sample(row["present"], len(row["present"])):
        own[findings[name]["section"]].append(_stated(name, findings, row["reading"], rng))
    opening = [own["hpi"].pop() for _ in range(min(2, len(own["hpi"])))]
    others = defaultdict(list)  # sentences of all else
    absent = []
    for name in row["denied"]:
        related = relations()["denied"].get(name)
        section = findings[name]["section"]
        if name in RULES["nouns"]:
            absent.append(RULES["nouns"][name])
        else:
            place = own if section == "ed" else others
            place[section].append(rng.choice(related or findings[name]["denied"]))
    for group in _groups(absent, 6, rng):
        sentence = rng.choice(RULES["denials"]).format(list=listed(group, rng, "or"))
        others["hpi"].append(_turned(sentence, own["hpi"], rng))
    for block in row["blocks"]:
        phrases = [_stated(name, findings, row["reading"], rng) for name in block["findings"]]
        words = {key: rng.choice(options) for key, options in RULES["words"].items()}
        frame = FRAMES[block["frame"]]
        sentence = rng.choice(frame["sentences"]).format(list=listed(phrases, rng), **words)
        place = rng.choice(frame["places"])
        place = "hpi" if place in row["missing"] else place
        others[place].append(_turned(sentence, own["hpi"], rng) if place == "hpi" else sentence)
    told = {}
    for section, leads in RULES["leads"].items():
        groups = _groups(own[section], LONGEST.get(section, 5), rng)
        templates = rng.sample(leads, len(leads)) * len(groups)
        texts = [
            lead.format(list=listed(group, rng))
            for lead, group in zip(templates, groups, strict=False)
        ]
        for sentence in others[section]:
            texts.insert(rng.randint(0, len(texts)), sentence)
        told[section] = [_sentence(text) for text in texts]
    return told | {"opening": opening}


def clauses(text: str, spans: list[tuple[int, int]]) -> list[Clause]:
    """The clauses of a text in order; `spans` [start, end) of its phrases, which hide no cue."""
    masked = text.lower()
    for start, end in spans:
        masked = masked[:start] + "#" * (end - start) + masked[end:]
    result = []
    ends = [match.span() for match in _SENTENCE.finditer(masked)] + [(len(text), len(text))]
    begin = 0
    for end, after in ends:
        start = begin
        for turn in [*_TURN.finditer(masked, begin, end), None]:
            stop = turn.start() if turn else end
            result.append(Clause(start, stop, _state(masked[start:stop])))
            start = turn.end() if turn else end
        begin = after
    return result


def listed(phrases: list[str], rng: random.Random, last: str = "and") -> str:
    """A, B and C; in one of three ways."""
    *first, final = phrases
    if not first:
        return final
    joint = rng.choice([f" {last} ", f", {last} ", ", "]) if len(first) > 1 else f" {last} "
    return ", ".join(first) + joint + final


def _stated(name: str, findings: dict[str, Any], reading: float, rng: random.Random) -> str:
    related = relations()["stated"].get(name)
    if related and rng.random() < RELATED * reading:
        return rng.choice(related)
    return rng.choice(findings[name]["phrases"])


def _groups(items: list[str], longest: int, rng: random.Random) -> list[list[str]]:
    groups = []
    while items:
        size = rng.randint(1, longest)
        groups.append(items[:size])
        items = items[size:]
    return groups


def _turned(sentence: str, own: list[str], rng: random.Random) -> str:
    if not own or sentence.endswith("]") or rng.random() > TURNED:
        return sentence
    return sentence + rng.choice(RULES["turns"]) + own.pop()


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "]")) else text + "."


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """State -> what a clause of it looks like."""
    patterns = []
    templates = {kind: frame["sentences"] for kind, frame in FRAMES.items()}
    for state, texts in (templates | {DENIAL: RULES["denials"]}).items():
        for text in texts:
            pattern = re.escape(text).replace(r"\{list\}", ".+")
            for key, options in RULES["words"].items():
                pattern = pattern.replace(rf"\{{{key}\}}", f"(?:{'|'.join(options)})")
            patterns.append((state, re.compile(_HEAD + pattern + r"\.?", re.IGNORECASE)))
    return patterns


def _state(clause: str) -> str:
    for state, pattern in _patterns():
        if pattern.fullmatch(clause.strip()):
            return state
    return ""
