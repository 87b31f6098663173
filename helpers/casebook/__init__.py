"""What a synthetic patient can have, and what a perfect reader can conclude from a note.

The model of a note is naive Bayes, and known. An admission has a principal diagnosis, drawn by its
weight. Each *slot* (a finding, or a set of findings that exclude each other) takes a value with the
probability that the casebook states for this diagnosis. The author mentions a finding that is there
with probability MENTION, denies one that is absent with probability DENY, and sometimes leaves out
whole sections, whatever the diagnosis. Phrasing, style, typos, hidden ages and everything written
after admission say nothing more about the diagnosis. So P(code | what the text shows) is exact: see
`posterior`.

`reading`, from 0 to 1, is how much must be read. Above 0 a note has *blocks*: findings of somebody
else, of another time, not confirmed, or copied. They are drawn as a patient with another diagnosis,
the *mimic*, would show them, and written in the same phrases. It also denies more, and writes some
findings by a relation ("EF was 60% and is now 25%"; see `language`).

Taught in notebooks 1 and 5.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pandas as pd

from helpers import icd
from helpers.casebook import language

MENTION = 0.8  # P(the note states a finding that is there)
DENY = 0.07  # P(the note denies a finding that is absent), where the casebook has words for it
DENY_MORE = 0.13  # added to it at reading 1, for findings that are denied by their noun
DENY_RELATED = {"ed": 0.15, "hpi": 0.01}  # at reading 1, of findings denied by a relation alone
BLOCK_MENTION = 0.6  # P(a block states a finding that its mimic has)
BLOCKS = (0, 0.25, 0.5, 0.25)  # P(0, 1, 2, 3 blocks), at reading 1
# P(the mimic is a sibling, of the same chapter, any other); where there is none, the next of these
MIMICS = (0.15, 0.25, 0.6)
BACKGROUND = 0.0008  # default probability of a finding that a diagnosis does not list
LEAST_BACKGROUND = 1e-5  # no diagnosis excludes a finding
LEAST_COMPLAINT = 1e-4  # nor a complaint
SECTIONS = ("hpi", "ed", "pmh", "meds", "exam", "social", "family")
# P(section left out)
MISSING = {
    "cc": 0.03,
    "pmh": 0.05,
    "meds": 0.06,
    "exam": 0.08,
    "social": 0.4,
    "family": 0.5,
}

_HEADS = ("CC", "HPI", "PMH", "MEDS", "SOCIAL", "FAMILY", "EXAM")  # of an admission note
_WORD = re.compile(r"\w+|\S")
_MAN = re.compile(r"___\s*(?:yo |year old )?(?:M|man)\b")
_WOMAN = re.compile(r"___\s*(?:yo |year old )?(?:F|woman)\b")

Array = np.ndarray
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it holds arrays
class Casebook:
    """The casebook as arrays, for C codes, F findings, S slots and M complaints.

    codes [C] with dots; prior [C]; male [C] P(man | code); age [C, 2] mean and standard deviation;
    names [F] ids of findings, and index, their positions; p_finding [C, F] P(finding | code);
    slot [F] number of its slot; low [C, F] where its arc begins on the wheel of its slot (see
    `draw_note`); section [F]; deny, deny_more [F] P(an absent finding is denied) at reading 0, and
    what reading 1 adds; mimic [C, C] P(mimic | code);
    p_complaint [C, M] P(complaint | code); entries and findings: raw records by code and by id.
    """

    codes: tuple[str, ...]
    prior: Array
    male: Array
    age: Array
    names: tuple[str, ...]
    index: dict[str, int]
    p_finding: Array
    slot: Array
    low: Array
    section: Array
    deny: Array
    deny_more: Array
    mimic: Array
    complaints: tuple[str, ...]
    p_complaint: Array
    entries: Records
    findings: Records
    sha256: str


@dataclass(frozen=True)
class Shown:
    """What one admission note shows.

    Ids of findings stated and denied, sections left out, complaint and sex; of each block the frame
    and the ids; and how much must be read in its hospital.
    """

    present: tuple[str, ...]
    denied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    complaint: str | None = None
    sex: str | None = None
    blocks: Sequence[Block] = ()
    reading: float = 0.0


class Block(TypedDict):
    """Findings that are not the patient's own and present: in which frame, and which."""

    frame: str
    findings: Sequence[str]


class Mention(NamedTuple):
    """A phrase of the casebook in a text: which finding, stated or denied, and where."""

    finding: str
    present: bool
    start: int
    end: int


@lru_cache(maxsize=1)
def casebook() -> Casebook:
    """All `*.yaml` of this folder as arrays.

    README.md explains the fields; tests/test_casebook.py checks what stands in them.
    """
    findings, entries, sha256 = _records()
    names = tuple(findings)
    codes = tuple(sorted(entries))
    index = {name: position for position, name in enumerate(names)}
    signs = pd.DataFrame(list(findings.values()))
    slot, _ = pd.factorize(signs["slot"].fillna(pd.Series(names)))
    alone = np.bincount(slot)[slot] == 1
    background = signs["background"].fillna(BACKGROUND).clip(LEAST_BACKGROUND)
    diagnoses = pd.DataFrame([entries[code] for code in codes])
    weight = diagnoses["weight"].to_numpy(float)
    complaints = tuple(sorted(set().union(*diagnoses["complaint"])))
    p_finding = np.tile(background, (len(codes), 1))
    p_complaint = np.full((len(codes), len(complaints)), LEAST_COMPLAINT)
    for row, code in enumerate(codes):
        for name, probability in entries[code]["findings"].items():
            p_finding[row, index[name]] = probability
        for text, probability in entries[code]["complaint"].items():
            p_complaint[row, complaints.index(text)] += probability
    low = np.zeros_like(p_finding)
    for number in range(slot.max() + 1):
        members = np.flatnonzero(slot == number)
        low[:, members[1:]] = p_finding[:, members[:-1]].cumsum(axis=1)
    prior = weight / weight.sum()
    section = signs["section"].to_numpy(str)
    deniable = alone & signs["denied"].notna().to_numpy()
    by_noun = np.isin(names, list(language.RULES["nouns"]))
    related = alone & ~deniable & np.isin(names, list(language.relations()["denied"]))
    return Casebook(
        codes=codes,
        prior=prior,
        male=diagnoses["male"].to_numpy(float),
        age=np.array(diagnoses["age"].tolist(), float),
        names=names,
        index=index,
        p_finding=p_finding,
        slot=slot,
        low=low,
        section=section,
        deny=DENY * deniable,
        deny_more=DENY_MORE * by_noun + related * signs["section"].map(DENY_RELATED).fillna(0.0),
        mimic=_mimics(codes, prior),
        complaints=complaints,
        p_complaint=p_complaint / p_complaint.sum(1, keepdims=True),
        entries=entries,
        findings=findings,
        sha256=sha256,
    )


def prior_given(sex: str, age: float) -> Array:
    """P(code | sex, age), [C]."""
    book = casebook()
    mean, deviation = book.age.T
    p_sex = book.male if sex == "M" else 1 - book.male
    density = np.exp(-0.5 * ((age - mean) / deviation) ** 2)
    weight = book.prior * p_sex * density / deviation
    return weight / weight.sum()


def draw_note(
    code: str, spins: Array, rng: np.random.Generator, reading: float = 0.0
) -> dict[str, Any]:
    """Draw what a patient with this code has, and what the author writes of it.

    Each slot is a wheel of circumference 1 that is spun once; `spins` [S], uniform in [0, 1), says
    where the wheels stop. A finding owns the arc [low, low + p) of its wheel. The findings of a
    slot lie side by side on it, so at most one of them comes up; the rest of it stands for none.
    Gives complaint (None if left out), findings drawn, present and denied, and missing sections;
    with reading above 0 also reading, and blocks.
    """
    book = casebook()
    row = book.codes.index(code)
    drawn = _drawn(row, spins)
    missing = [section for section, p in MISSING.items() if rng.random() < p]
    visible = ~np.isin(book.section, missing)
    present = drawn & visible & (rng.random(len(drawn)) < MENTION)
    p_denied = book.deny + reading * book.deny_more
    denied = ~drawn & visible & (rng.random(len(drawn)) < p_denied)
    complaint = rng.choice(book.complaints, p=book.p_complaint[row])
    more = {"reading": reading, "blocks": _draw_blocks(row, reading, rng)} if reading else {}
    return more | {
        "complaint": None if "cc" in missing else str(complaint),
        "drawn": list(compress(book.names, drawn)),
        "present": list(compress(book.names, present)),
        "denied": list(compress(book.names, denied)),
        "missing": missing,
    }


def _drawn(row: int, spins: Array) -> Array:
    """Which findings come up, [F], for the code in this row."""
    book = casebook()
    low = book.low[row]
    stop = spins[book.slot]
    return (low <= stop) & (stop < low + book.p_finding[row])


def _draw_blocks(row: int, reading: float, rng: np.random.Generator) -> list[Block]:
    """Blocks of the note of a patient with the code in this row; none is empty."""
    book = casebook()
    frames = language.FRAMES
    weights = [frame["weight"] for frame in frames.values()]
    blocks = []
    for _ in range(rng.binomial(rng.choice(len(BLOCKS), p=BLOCKS), reading)):
        kind = str(rng.choice(list(frames), p=weights))
        inside = _framed(kind)
        shown = np.zeros(len(book.names), bool)
        while not shown.any():
            mimic = rng.choice(len(book.codes), p=book.mimic[row])
            drawn = _drawn(mimic, rng.random(book.slot.max() + 1))
            shown = drawn & inside & (rng.random(len(drawn)) < BLOCK_MENTION)
        names = rng.permutation(np.array(book.names)[shown])
        blocks.append(Block(frame=kind, findings=names.tolist()))
    return blocks


def posterior(shown: Shown) -> np.ndarray:
    """P(code | what the text shows), [C], exact under the generator's model.

    Naive Bayes: the log prior, plus a log-likelihood for each slot of the sections that are there,
    for the complaint, for the sex, and for each block: a sum over what it may mimic.
    """
    book = casebook()
    table = log_likelihoods(shown.reading)
    by_slot = table.silent.copy()
    for name in shown.denied:
        slot = book.slot[book.index[name]]
        by_slot[:, slot] = table.denied[:, slot]
    for name in shown.present:
        finding = book.index[name]
        by_slot[:, book.slot[finding]] = table.stated[:, finding]
    in_note = ~np.isin(table.section, shown.missing)
    log_p = np.log(book.prior) + by_slot[:, in_note].sum(axis=1)
    if shown.complaint in book.complaints:
        column = book.complaints.index(shown.complaint)
        log_p += np.log(book.p_complaint[:, column])
    if shown.sex in ("M", "F"):
        p_sex = book.male if shown.sex == "M" else 1 - book.male
        with np.errstate(divide="ignore"):  # log 0: some diagnoses are of one sex
            log_p += np.log(p_sex)
    for block in shown.blocks:
        log_p += log_block(block)
    weights = np.exp(log_p - log_p.max())
    return weights / weights.sum()


def log_block(block: Block) -> Array:
    """log P(a block of this frame shows these findings | code), [C], up to a constant."""
    book = casebook()
    table = _block_likelihoods(block["frame"])
    log_p = table.silent.sum(axis=1)
    for name in block["findings"]:
        finding = book.index[name]
        log_p = log_p + table.stated[:, finding] - table.silent[:, book.slot[finding]]
    p_given_code = book.mimic @ np.exp(log_p - log_p.max())
    p_something = 1 - book.mimic @ np.exp(table.silent.sum(axis=1))
    return np.log(p_given_code / p_something)


def evidence(code: str, spans: dict[str, str], most: int) -> tuple[list[str], str]:
    """Findings among `spans` (finding -> words) that speak for a dotted code, and the telling one.

    The first are at most `most` findings, ranked by log P(finding | code) - log P(finding); only
    what exceeds 0.5 counts. The second is the one of them that tells the code best from its
    unspecified sibling, "" if it has none.
    """
    book = casebook()
    p_finding = book.p_finding[book.codes.index(code)]
    weights = np.log(p_finding / (book.prior @ book.p_finding))
    weight = dict(zip(book.names, weights, strict=True))
    ranking = sorted(spans, key=weight.__getitem__, reverse=True)
    best = [name for name in ranking if weight[name] > 0.5][:most]
    sibling = book.entries[code].get("unspecified")
    if sibling not in book.codes:
        return best, ""
    ratios = p_finding / book.p_finding[book.codes.index(sibling)]
    ratio = dict(zip(book.names, ratios, strict=True))
    return best, max(best, key=ratio.__getitem__, default="")


def ideal_reader(data_dir: str | Path) -> pd.DataFrame:
    """Posterior argmax of every admission of a synthetic hospital, indexed by hadm_id.

    Columns per level (full, category, chapter): the argmax and, as `<level>_p`, its probability.
    The mean of a `_p` column is the expected accuracy at that level: the bound for any reader, in
    expectation. The argmax of a level sums over the codes below it, so the three need not be one
    path. Raises FileNotFoundError for a folder without truth (real MIMIC-IV), ValueError for a
    hospital of another casebook.
    """
    path = Path(data_dir) / "truth" / "findings.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: only a synthetic hospital has a known ceiling. See data/README.md."
        )
    book = casebook()
    manifest = json.loads(path.with_name("manifest.json").read_text())
    current = {"casebook_sha256": book.sha256}
    if manifest.get("reading"):
        current["language_sha256"] = language.sha256()
    if not current.items() <= manifest.items():
        raise ValueError(
            f"{path} was made from another casebook. "
            f"Delete {data_dir} and run 01_data_preparation again."
        )
    truth = pd.read_parquet(path)
    columns = [field.name for field in fields(Shown) if field.name in truth]
    shown = [Shown(**note) for note in truth[columns].to_dict("records")]
    posteriors = np.stack([posterior(note) for note in shown])
    result = pd.DataFrame(index=truth["hadm_id"])
    levels = {"full": icd.normalise, "category": icd.category, "chapter": icd.chapter}
    for level, group_of in levels.items():
        group_of_code = [group_of(code) for code in book.codes]
        groups, group = np.unique(group_of_code, return_inverse=True)
        mass = posteriors @ np.eye(len(groups))[group]
        result[level] = groups[mass.argmax(axis=1)]
        result[f"{level}_p"] = mass.max(axis=1)
    return result


def read_findings(text: str) -> list[Mention]:
    """Phrases of the casebook in a text, in order. A phrase with a typo is not found."""
    lexicon = _lexicon()
    text = text.lower()
    mentions = []
    free = 0  # where the last phrase ended
    for word in _WORD.finditer(text):
        start = word.start()
        if start < free:
            continue
        for phrase, finding, present in lexicon.get(word.group(), ()):
            end = start + len(phrase)
            runs_on = phrase[-1].isalnum() and text[end : end + 1].isalnum()
            if text.startswith(phrase, start) and not runs_on:
                mentions.append(Mention(finding, present, start, end))
                free = end
                break
    return mentions


def read(
    note: str, reading: float = 0.0, is_missed: Callable[[language.Clause], bool] | None = None
) -> tuple[Shown, dict[str, str]]:
    """What an admission note shows to a reader, and finding -> its words in the note.

    `note` has the layout of `notes.admission_note`. Of what is in a frame only `blocks` tells,
    unless the reader misses the frame (`is_missed`).
    """
    book = casebook()
    lines = dict(line.partition(": ")[::2] for line in note.split("\n"))
    missing = tuple(head.lower() for head in _HEADS if head not in lines)
    complaint = lines.get("CC", "").strip().lower() or None
    story = note.replace(f"CC: {lines['CC']}", "", 1) if complaint else note
    spans = {}
    denials = set()
    framed = defaultdict(list)  # findings by clause
    deniable = book.deny + reading * book.deny_more > 0
    for (finding, present, start, end), clause in in_clauses(story, reading):
        is_framed = clause.state in language.FRAMES
        if is_framed and not (is_missed and is_missed(clause)):
            framed[clause].append(finding)
        elif present and clause.state != language.DENIAL:
            spans.setdefault(finding, story[start:end])
        elif deniable[book.index[finding]]:
            denials.add(finding)
    sex = None
    if _MAN.search(story):
        sex = "M"
    elif _WOMAN.search(story):
        sex = "F"
    denials -= set(spans)
    blocks = [Block(frame=clause.state, findings=names) for clause, names in framed.items()]
    return Shown(tuple(spans), tuple(denials), missing, complaint, sex, blocks, reading), spans


def in_clauses(text: str, reading: float) -> list[tuple[Mention, language.Clause]]:
    """The phrases of a text, each with the clause that it stands in."""
    mentions = read_findings(text)
    parts = [language.Clause(0, len(text), "")]
    if reading:
        stated = [(mention.start, mention.end) for mention in mentions if mention.present]
        parts = language.clauses(text, stated)
    ends = [part.end for part in parts]
    return [(mention, parts[bisect_right(ends, mention.start)]) for mention in mentions]


def _mimics(codes: tuple[str, ...], prior: Array) -> Array:
    """P(mimic | code), [C, C]: a sibling, one of the same chapter, or any other, by MIMICS."""
    category = np.array([icd.category(code) for code in codes])
    chapter = np.array([icd.chapter(code) for code in codes])
    same_category = category[:, None] == category
    same_chapter = chapter[:, None] == chapter
    itself = np.eye(len(codes), dtype=bool)
    groups = (same_category & ~itself, same_chapter & ~same_category, ~same_category)
    result = np.zeros(itself.shape)
    passed_on = np.zeros(len(codes))  # the share of a group that has no member
    for share, group in zip(MIMICS, groups, strict=True):
        weights = group * prior
        total = weights.sum(axis=1)
        passed_on += share
        result += weights * (passed_on / np.where(total, total, 1))[:, None]
        passed_on = np.where(total, 0, passed_on)
    return result


def _records() -> tuple[Records, Records, str]:
    """Findings by id, diagnoses by code, and the sha256 of all files."""
    import yaml

    findings = {}
    entries = {}
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        content = path.read_bytes()
        digest.update(content)
        tables = yaml.safe_load(content)
        findings |= tables["findings"]
        entries |= tables["codes"]
    return findings, entries, digest.hexdigest()


class _LogLikelihoods(NamedTuple):
    """Of what a note can show of a slot, given the code; and the section of each slot."""

    stated: Array  # [C, F]
    silent: Array  # [C, S]
    denied: Array  # [C, S], for slots of one finding
    section: Array  # [S]


@lru_cache(maxsize=8)
def log_likelihoods(reading: float) -> _LogLikelihoods:
    """Computed once: a note then costs a few additions, not a loop over slots."""
    book = casebook()
    slot = book.slot
    _, first = np.unique(slot, return_index=True)
    p_denied = np.bincount(slot, weights=book.deny + reading * book.deny_more)
    p_any = np.stack([np.bincount(slot, weights=row) for row in book.p_finding])
    p_none = 1 - p_any
    p_silent = p_any * (1 - MENTION) + p_none * (1 - p_denied)
    return _LogLikelihoods(
        stated=np.log(book.p_finding * MENTION),
        silent=np.log(p_silent),
        denied=np.log(np.where(p_denied > 0, p_none * p_denied, p_none)),
        section=book.section[first],
    )


@lru_cache(maxsize=8)
def _block_likelihoods(kind: str) -> _LogLikelihoods:
    """The same for a block of this frame, given its mimic; nothing is denied in one."""
    book = casebook()
    inside = book.p_finding * _framed(kind)
    p_any = np.stack([np.bincount(book.slot, weights=row) for row in inside])
    silent = np.log(1 - p_any * BLOCK_MENTION)
    return _LogLikelihoods(np.log(book.p_finding * BLOCK_MENTION), silent, silent, book.section)


def _framed(kind: str) -> Array:
    """Which findings a block of this frame may hold, [F]."""
    book = casebook()
    allowed = np.isin(book.section, language.FRAMES[kind]["sections"])
    return allowed & ~np.isin(book.names, language.RULES["unframed"])


@lru_cache(maxsize=1)
def _lexicon() -> dict[str, list[tuple[str, str, bool]]]:
    """First word -> phrases (text in lower case, finding, stated or denied) that begin with it,
    longest first."""
    phrases = []
    related = language.relations()
    for name, record in casebook().findings.items():
        denials = [*record.get("denied", ()), *related["denied"].get(name, ())]
        statements = [*record["phrases"], *related["stated"].get(name, ())]
        phrases += [(text.lower(), name, False) for text in denials]
        phrases += [(text.lower(), name, True) for text in statements]
    lexicon = defaultdict(list)
    for text, name, present in sorted(phrases, key=lambda phrase: -len(phrase[0])):
        lexicon[_WORD.match(text)[0]].append((text, name, present))
    return lexicon
