"""Train a base that reads, and was never given the answers: tokenizer, corpus, pre-training.

`python -m tools.reading_base`. Knowledge and reading are learned apart. Textbook prose tells which
findings speak for which diagnosis and code. Exercises ask of the notes of *other* hospitals what
the patient has now, what somebody else had, what is absent, on which side. No note is followed by
its diagnosis, its title or its code, and the course's answer format is never used: only the
course's own cases join the two. A killed run goes on where it stopped.

`--start helpers/tiny_base`: the base that ships learns to read instead. It has read notes of
hospitals with reading 0 that its first corpus follows with their codes, and goes on to read some.
`--mixture labelled` also follows notes that must be read with their codes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from helpers import casebook, hospital, icd, notes
from helpers.casebook import language
from helpers.machinery import cpu
from tools import tiny_base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPE = yaml.safe_load(Path(__file__).with_name("reading_recipe.yaml").read_text("utf-8"))
HOSPITAL_SEED = 1000  # the course's hospitals have seeds below
HELD_OUT_SEED = 900
DOCUMENTS = 2000  # of each hospital
LONGEST = 768  # tokens of a document that are read
STATES = RECIPE["states"]


class Document(NamedTuple):
    """A text, and the places (start, end) of what is only asked about, whose words count less.

    Those are notes, and findings that stand before the code that they speak for.
    """

    text: str
    notes: tuple[tuple[int, int], ...] = ()


# --- corpus -------------------------------------------------------------------------------------


def documents(
    count: int, seed: int, *, even: float = 0.5, kinds: dict[str, float] | None = None
) -> Iterator[Document]:
    """`count` documents about patients of the hospital with this seed.

    Diagnoses are drawn by their weight to the power `even`: 1 as they are, 0 all alike. kinds: the
    share of each kind of document, by default that of the recipe.
    """
    shares = kinds or RECIPE["kinds"]
    rng = np.random.default_rng([seed, 11])
    book = casebook.casebook()
    weights = book.prior**even
    drawn = rng.choice(list(shares), size=count, p=list(shares.values()))
    codes = rng.choice(book.codes, size=count, p=weights / weights.sum())
    rows = [_row(str(code), rng) for code in codes]
    summaries = hospital.summaries(rows, seed)
    first_corpus = tiny_base.documents(count, seed)
    for kind, row, summary in zip(drawn, rows, summaries, strict=True):
        note = notes.admission_note(summary)
        if kind == "replay":
            yield Document(next(first_corpus))
        elif kind == "labelled" and note:
            yield _labelled(note, row, rng)
        elif kind in ("exercise", "drill") and note and _is_legible(note, row):
            is_drill = kind == "drill" and quotes(note)
            yield _drill(note, rng) if is_drill else _exercise(note, rng)
        elif kind == "vignettes":
            yield _facts(row, weights, rng)
        elif kind == "record":
            yield Document(_record(row, rng))
        elif kind == "index" or not note:
            yield Document(_index(rng))
        else:
            yield Document(note)


def _row(code: str, rng: np.random.Generator) -> dict[str, Any]:
    """An admission with this code, its note at a reading of 0.5 to 1."""
    book = casebook.casebook()
    spins = rng.random(book.slot.max() + 1)
    sex = "M" if rng.random() < book.male[book.codes.index(code)] else "F"
    row = casebook.draw_note(code, spins, rng, float(rng.uniform(0.5, 1)))
    return row | {"code": code, "sex": sex, "author": int(rng.integers(4))}


def _labelled(note: str, row: dict[str, Any], rng: np.random.Generator) -> Document:
    """A note and what a case conference said of it, as in the first corpus: with its code."""
    own = {q.finding: q.words for q in reversed(quotes(note)) if q.state == ""}
    findings, detail = casebook.evidence(row["code"], own, int(rng.integers(2, 5)))
    names = _names(row["code"], row["sex"])
    said = _one(tiny_base.RECIPE["conference"], rng).format(
        **names,
        Chapter=names["chapter"],
        key="; ".join(own[name] for name in findings) or "nothing specific",
        detail=own.get(detail, "none"),
    )
    return Document(f"{note}\n\n{said}", ((0, len(note)),))


def _is_legible(note: str, row: dict[str, Any]) -> bool:
    """Whether no typo hides a frame."""
    shown, _ = casebook.read(note, 1.0)
    frames = sorted(block["frame"] for block in shown.blocks)
    return frames == sorted(block["frame"] for block in row["blocks"])


def _one(options: list[str], rng: np.random.Generator) -> str:
    return str(options[rng.integers(len(options))])


def _names(code: str, sex: str = "M") -> dict[str, str]:
    category = icd.category(code)
    return {
        "who": "a man" if sex == "M" else "a woman",
        "title": icd.title(code),
        "code": code,
        "cat": category,
        "category": icd.title(category),
        "chapter": icd.chapter_short(icd.chapter(code)),
    }


def _words(finding: str, rng: np.random.Generator) -> str:
    """One way to state a finding."""
    related = language.relations()["stated"].get(finding, [])
    phrases = casebook.casebook().findings[finding]["phrases"]
    return _one(related if related and rng.random() < 0.3 else phrases, rng)


def _facts(row: dict[str, Any], weights: np.ndarray, rng: np.random.Generator) -> Document:
    """A page of a textbook: vignettes of several diagnoses, the first of them that of the row."""
    book = casebook.casebook()
    others = rng.choice(book.codes, size=7, p=weights / weights.sum())
    page = ""
    places: list[tuple[int, int]] = []
    for code in [row["code"], *map(str, others)]:
        kind = rng.random()
        if kind < 0.1:
            line = Document(_sign(rng))
        elif kind < 0.2 and book.entries[code].get("unspecified"):
            line = _siblings(code, rng)
        else:
            line = _vignette(code, rng)
        places += [(len(page) + begin, len(page) + end) for begin, end in line.notes]
        page += line.text + "\n"
    return Document(page.rstrip("\n"), tuple(places))


def _typical(code: str, rng: np.random.Generator) -> list[str]:
    """Findings of one patient with this code, in words, in any order; mostly typical ones."""
    book = casebook.casebook()
    entry = book.entries[code]["findings"]
    drawn = casebook.draw_note(code, rng.random(book.slot.max() + 1), rng)["drawn"]
    own = [name for name in drawn if name in entry] or drawn[:3] or list(entry)[:1]
    if rng.random() < 0.3:
        own = drawn or own
    order = rng.permutation(len(own))[: rng.integers(2, 9)]
    return [_words(own[i], rng) for i in order]


def _joined(words: list[str], rng: np.random.Generator) -> str:
    return ("; " if rng.random() < 0.6 else ", ").join(words)


def _vignette(code: str, rng: np.random.Generator) -> Document:
    book = casebook.casebook()
    sex = "M" if rng.random() < book.male[book.codes.index(code)] else "F"
    template = _one(RECIPE["vignettes"], rng)
    return _filled(template, _names(code, sex), f=_joined(_typical(code, rng), rng))


def _filled(template: str, names: dict[str, str], **findings: str) -> Document:
    """The sentence; findings count less where the code comes later."""
    text = template.format(**names, **findings)
    places = []
    for key, words in findings.items():
        begin = text.index(words)
        if template.index(f"{{{key}}}") < template.rindex("{code"):
            places.append((begin, begin + len(words)))
    return Document(text[0].upper() + text[1:], tuple(places))


def _siblings(code: str, rng: np.random.Generator) -> Document:
    """What tells a diagnosis from its unspecified sibling, both ways."""
    book = casebook.casebook()
    other = book.entries[code]["unspecified"]
    if other not in book.codes:
        return _vignette(code, rng)
    rows = book.p_finding[[book.codes.index(code), book.codes.index(other)]]
    lean = np.log(rows[0] / rows[1])
    drawn = [np.array(book.names)[rows[i] > 0.2] for i in (0, 1)]
    first = sorted(drawn[0], key=lambda name: -lean[book.index[name]])[:3]
    second = sorted(drawn[1], key=lambda name: lean[book.index[name]])[:3]
    names = _names(code) | {"title2": icd.title(other), "code2": other}
    f = _joined([_words(str(name), rng) for name in first], rng)
    g = _joined([_words(str(name), rng) for name in second], rng)
    return _filled(_one(RECIPE["siblings"], rng), names, f=f, g=g)


def _sign(rng: np.random.Generator) -> str:
    """A finding, and the diagnoses that it speaks for most."""
    book = casebook.casebook()
    finding = int(rng.integers(len(book.names)))
    p = book.p_finding[:, finding]
    best = [book.codes[i] for i in np.argsort(-p)[:3] if p[i] > 0.1] or [
        book.codes[int(p.argmax())]
    ]
    titles = " or ".join(f"{icd.title(code)} ({code})" for code in best)
    text = _one(RECIPE["signs"], rng).format(f=_words(book.names[finding], rng), titles=titles)
    return text[0].upper() + text[1:]


def _record(row: dict[str, Any], rng: np.random.Generator) -> str:
    """A marked-up record of findings: some of the sections."""
    findings = casebook.casebook().findings
    fields = {"sex": row["sex"], "complaint": row["complaint"] or "none"}
    for section in casebook.SECTIONS:
        there = [_words(name, rng) for name in row["drawn"] if findings[name]["section"] == section]
        fields[section] = "; ".join(there) or "none"
    if rng.random() < 0.5:  # with <hpi> alone, `<` would always be part of a longer token
        fields = {name.capitalize(): text for name, text in fields.items()}
    return "\n".join(
        f"<{name}>{text}</{name}>" for name, text in fields.items() if rng.random() < 0.6
    )


def _index(rng: np.random.Generator) -> str:
    """A page of an index: categories of the casebook by chapter."""
    by_chapter: dict[str, list[str]] = {}
    for category in sorted({icd.category(code) for code in casebook.casebook().codes}):
        by_chapter.setdefault(icd.chapter_short(icd.chapter(category)), []).append(category)
    lines = []
    for chapter in rng.permutation(list(by_chapter))[:6]:
        some = rng.permutation(by_chapter[chapter])[:3]
        lines.append(f"{chapter}: " + ", ".join(f"{code} {icd.title(code)}" for code in some))
    return "\n".join(lines)


# --- exercises ----------------------------------------------------------------------------------


class Quote(NamedTuple):
    """A phrase of a note as it stands there, its state, and whether it is stated or denied."""

    finding: str
    words: str
    state: str
    start: int


def quotes(note: str) -> list[Quote]:
    """The phrases of a note in order, each with who has it and when (see STATES)."""
    result = []
    for mention, clause in casebook.in_clauses(note, 1.0):
        state = clause.state
        if state not in language.FRAMES and not mention.present:
            state = language.DENIAL
        result.append(
            Quote(mention.finding, note[mention.start : mention.end], state, mention.start)
        )
    return result


def questions(
    note: str, rng: np.random.Generator, found: list[Quote] | None = None
) -> list[tuple[str, str]]:
    """(question, answer) pairs about a note, in random order; found: its phrases, if known."""
    found = quotes(note) if found is None else found
    by_state: dict[str, list[str]] = {}
    for quote in found:
        by_state.setdefault(STATES[quote.state], []).append(quote.words)
    asked = []
    for state, options in RECIPE["questions"].items():
        if state not in RECIPE["answers"]:
            continue
        words = by_state.get(STATES["" if state == "now" else state], [])
        if words or rng.random() < 0.25:
            answer = RECIPE["answers"][state].format(list="; ".join(words) or "nothing")
            asked.append((_one(options, rng), answer))
    if found:
        some = [found[i] for i in rng.permutation(len(found))[: rng.integers(2, 7)]]
        items = "; ".join(quote.words for quote in some)
        answer = "; ".join(f"{quote.words}: {STATES[quote.state]}" for quote in some)
        asked.append((_one(RECIPE["questions"]["whose"], rng).format(items=items), answer + "."))
        one = found[rng.integers(len(found))]
        sentence = _around(note, one.start)
        asked.append((_one(RECIPE["questions"]["sentence"], rng).format(item=one.words), sentence))
    heads = [line.partition(": ")[0] for line in note.split("\n")]
    head = heads[rng.integers(len(heads))]
    line = next(line for line in note.split("\n") if line.startswith(head))
    begin = note.index(line)
    inside = [q.words for q in found if q.state == "" and begin <= q.start < begin + len(line)]
    answer = f"{head}: {'; '.join(inside) or 'nothing'}."
    asked.append((_one(RECIPE["questions"]["section"], rng).format(section=head), answer))
    return [asked[i] for i in rng.permutation(len(asked))]


def _around(note: str, position: int) -> str:
    """The sentence at this position."""
    begin = max(note.rfind(mark, 0, position) + len(mark) for mark in (". ", "] ", "\n", ": "))
    begin = min(max(begin, 0), position)
    ends = [note.find(mark, position) for mark in (". ", "] ", "\n")]
    end = min([end + 1 for end in ends if end >= 0] or [len(note)])
    return note[begin:end].strip()


def _exercise(note: str, rng: np.random.Generator) -> Document:
    """A note and questions about it with their answers, as a text or as a chat."""
    note, found = disguised(note, quotes(note), rng)
    asked = questions(note, rng, found)[: rng.integers(4, 8)]
    lead = _one(RECIPE["instructions"], rng)
    if rng.random() > RECIPE["chat"]:
        text = (f"{lead}\n\n" if rng.random() < 0.3 else "") + note
        lines = [f"{question} {answer}" for question, answer in asked]
        return Document(text + "\n\n" + "\n".join(lines), ((0, len(text)),))
    text = f"<|im_start|>system\n{lead}<|im_end|>\n<|im_start|>user\n{note}"
    end = len(text)
    for number, (question, answer) in enumerate(asked):
        text += "\n\n" if number == 0 else "<|im_start|>user\n"
        text += f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return Document(text.strip(), ((0, end),))


def excerpt(note: str, found: list[Quote], rng: np.random.Generator) -> str:
    """One to three sentences of a note around one of its phrases, mostly one in a frame."""
    weights = np.array([5.0 if quote.state in language.FRAMES else 1.0 for quote in found])
    quote = found[rng.choice(len(found), p=weights / weights.sum())]
    begin = note.rfind("\n", 0, quote.start) + 1
    head, _, body = note[begin:].partition("\n")[0].partition(": ")
    ends = [match.end() for match in re.finditer(r"[.\]] (?=[A-Z\[])", body)]
    starts = [0, *ends]
    inside = quote.start - begin - len(head) - 2
    place = sum(start <= inside for start in starts) - 1
    first = max(0, place - int(rng.integers(2)))
    last = place + 1 + int(rng.integers(2))
    end = starts[last] if last < len(starts) else len(body)
    return f"{head}: {body[starts[first] : end].strip()}"


def disguised(text: str, found: list[Quote], rng: np.random.Generator) -> tuple[str, list[Quote]]:
    """The text with some of its findings in invented words, and the findings as they stand then.

    Findings come from a short list of phrases: a reader can learn the list instead of copying.
    """
    share = rng.choice([0.0, 0.5, 1.0])
    parts = []
    result = []
    position = shift = 0
    for quote in found:
        if quote.start < position:
            continue  # a part of what was replaced
        words = quote.words
        result.append(quote._replace(start=quote.start + shift))
        phrases = casebook.casebook().findings[quote.finding]["phrases"]
        if rng.random() < share and words in phrases:
            parts.append(text[position : quote.start])
            position = quote.start + len(words)
            invented = " ".join(_invented(rng) for _ in range(rng.integers(1, 4)))
            parts.append(invented)
            shift += len(invented) - len(words)
            result[-1] = result[-1]._replace(words=invented)
    return "".join([*parts, text[position:]]), result


SYLLABLES = [
    first + vowel + last
    for first in "bdfklmnprstv"
    for vowel in "aeiou"
    for last in ("", "n", "r", "s")
]


def _invented(rng: np.random.Generator) -> str:
    return "".join(rng.choice(SYLLABLES, size=rng.integers(1, 4)))


def _drill(note: str, rng: np.random.Generator) -> Document:
    """Short excerpts of a note, each with questions: whose is it, and when?"""
    page = ""
    places = []
    whole = quotes(note)
    for _ in range(4):
        text = excerpt(note, whole, rng)
        text, found = disguised(text, quotes(text), rng)
        asked = questions(text, rng, found)[: rng.integers(2, 5)]
        places.append((len(page), len(page) + len(text)))
        page += "\n".join([text, *(f"{question} {answer}" for question, answer in asked)]) + "\n\n"
    return Document(page.strip(), tuple(places))


# --- training -----------------------------------------------------------------------------------

MICRO = 2  # batches of documents to a step, so that a step has more than one kind of document
BATCH_TOKENS = 2048
RATES = {"adamw": 2e-3, "muon": 0.02}  # AdamW alone, or Muon for the matrices of the layers
SECOND_HEIGHT = 0.3  # of the rates, for a base that has learnt the rest
SAVE_EVERY = 300  # seconds
WARMUP = 60
CONSTANT = 0.6  # of the steps, then down to 0
LOOK_BACK = 5.5  # size of the biases: nine tenths of the attention are at the right distance
MATCH = 3.0  # of queries and keys that look for the same tokens
COPY = 0.1  # of what they write
SLOW = 3e-3  # radians a token
AS_THEY_ARE = 0.8  # of the steps; then diagnoses are as common as they are in the course


def encode(
    document: Document, tokenizer: PreTrainedTokenizerBase, end: int
) -> tuple[list[int], list[float]]:
    """Token ids, and the weight of each in the loss."""
    encoding = tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoding["input_ids"][: LONGEST - 1]
    starts = [start for start, _ in encoding["offset_mapping"][: LONGEST - 1]]
    is_note = [any(begin <= start < end for begin, end in document.notes) for start in starts]
    weights = [RECIPE["note_weight"] if light else 1.0 for light in is_note]
    return [*ids, end], [*weights, 1.0]


def batches(
    tokenizer: PreTrainedTokenizerBase, number: int, progress: float, kinds: dict[str, float] | None
) -> list[list[tuple[list[int], list[float]]]]:
    """The documents of one hospital in batches of like length, in an order of its own.

    progress: the share of the training that is over. kinds: the share of each kind of document; by
    default drills and vignettes alone at first, then those of the recipe. At the end diagnoses are
    as common as they are in the course.
    """
    rng = np.random.default_rng([number, 13])
    ends = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), tokenizer.eos_token_id]
    first = RECIPE["first"]
    if kinds is None:
        kinds = first["kinds"] if progress < first["until"] else RECIPE["kinds"]
    even = 0.5 if progress < AS_THEY_ARE else 1.0
    texts = documents(DOCUMENTS, number, even=even, kinds=kinds)
    encoded = [encode(text, tokenizer, int(rng.choice(ends))) for text in texts]
    encoded.sort(key=lambda pair: len(pair[0]))
    packed: list[list[tuple[list[int], list[float]]]] = [[]]
    for pair in encoded:
        if packed[-1] and len(pair[0]) * (len(packed[-1]) + 1) > BATCH_TOKENS:
            packed.append([])
        packed[-1].append(pair)
    rng.shuffle(packed)  # type: ignore[arg-type]
    return packed


def set_copying_heads(model: PreTrainedModel) -> None:
    """Set some heads so that they copy before any training, and leave the others random.

    In layer 0 two heads look one and two tokens back: biases of queries and keys, turned by RoPE,
    match at that distance alone. The heads of layer 1 look for an earlier place where the same
    tokens came before, and write the token that is there: induction heads (Olsson et al. 2022,
    https://arxiv.org/abs/2209.11895). Large models learn them within billions of tokens, this one
    has millions. To start from heads of a known form: Trockman and Kolter 2023,
    https://arxiv.org/abs/2305.09828.
    """
    import torch

    width = model.config.hidden_size
    size = width // model.config.num_attention_heads
    half = size // 2
    spread = model.model.embed_tokens.weight.std()
    turn = model.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    slow = (turn < SLOW).nonzero().flatten()
    places = torch.cat([slow, slow + half])  # RoPE turns them little over a note
    content = torch.nn.init.orthogonal_(torch.empty(size, width))
    back = torch.nn.init.orthogonal_(torch.empty(width, 2 * size)).split(size, dim=1)
    parts = torch.nn.init.orthogonal_(torch.empty(2 * size, width)).split(size)
    attentions = [layer.self_attn for layer in model.model.layers]
    with torch.no_grad():
        for layer in model.model.layers:  # nothing but the copies is written at first
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        first = attentions[0]
        first.q_proj.weight[: 2 * size] = 0
        first.k_proj.weight[:size] = 0
        first.k_proj.bias[:half] = LOOK_BACK
        first.v_proj.weight[:size] = content
        for head, distance in enumerate((1, 2)):
            begin = head * size
            first.q_proj.bias[begin : begin + half] = LOOK_BACK * torch.cos(distance * turn)
            first.q_proj.bias[begin + half : begin + size] = -LOOK_BACK * torch.sin(distance * turn)
            first.o_proj.weight[:, begin : begin + size] = 2 * spread * back[head]
        second = attentions[1]
        for group, part in enumerate(parts):
            keys = slice(group * size, (group + 1) * size)
            counts = [len(places) // 2] * 2 if group else [len(places)]
            query, key = torch.zeros(size, width), torch.zeros(size, width)
            for distance, rows in enumerate(places.split(counts)):
                chosen = torch.nn.init.orthogonal_(torch.empty(len(rows), size))
                query[rows] = MATCH * chosen @ (back[0].T if distance else content)
                key[rows] = MATCH * chosen @ back[distance].T
            second.k_proj.weight[keys] = key
            second.v_proj.weight[keys] = part
            for head in (2 * group, 2 * group + 1):
                own = slice(head * size, (head + 1) * size)
                second.q_proj.weight[own] = query
                second.o_proj.weight[:, own] = COPY * part.T


def learn(
    model: PreTrainedModel, batch: list[tuple[list[int], list[float]]], pad: int
) -> torch.Tensor:
    """The weighted loss per token of a batch."""
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])
    weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in batch])[:, 1:]
    # Measured without bfloat16 in the processor: float32 is nine times as fast.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
        logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def rate(step: int, steps: int) -> float:
    """Share of the learning rate."""
    falling = min(1.0, (1 - step / steps) / (1 - CONSTANT))
    return min(1.0, (step + 1) / WARMUP) * falling


class Muon:
    """SGD with momentum whose update of a matrix is made orthogonal (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/).

    torch.optim.Muon is the same in bfloat16, which a processor without it computes nine times as
    slowly as float32.
    """

    MOMENTUM = 0.95
    STEPS = 5
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, from the source

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float) -> None:
        import torch

        self.param_groups = [{"params": matrices, "lr": lr}]
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    def step(self) -> None:
        """Move every matrix by its orthogonal update."""
        import torch

        group = self.param_groups[0]
        with torch.no_grad():
            for matrix, momentum in zip(group["params"], self.momenta, strict=True):
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = self.orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(update, alpha=-group["lr"] * scale)

    def orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with singular values near 1."""
        a, b, c = self.COEFFICIENTS
        is_tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if is_tall else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(self.STEPS):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return x.T if is_tall else x

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for matrix in self.param_groups[0]["params"]:
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {"momenta": self.momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.momenta = state["momenta"]


def optimizers_of(model: PreTrainedModel, kind: str, height: float = 1.0) -> list[Any]:
    """The optimizers of a model, each with its highest rate (times height) as `highest` in its
    groups."""
    rates = RATES["adamw"]
    adam = tiny_base._optimizer(model, rates)
    made: list[Any] = [adam]
    if kind == "muon":
        matrices = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and "embed" not in name
        ]
        taken = {id(parameter) for parameter in matrices}
        for group in adam.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        made.append(Muon(matrices, RATES["muon"]))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["highest"] = height * group["lr"]
    return made


def train(
    out: Path,
    steps: int,
    seed: int,
    threads: int,
    minutes: float,
    kind: str,
    start: Path | None = None,
    mixture: str = "second",
) -> None:
    """Train for `steps`, or until so many minutes of this call are over.

    Goes on where it stopped. start: the folder of a base that learns to read after it has learnt
    the rest, at a lower rate and with documents of its first corpus among the exercises. mixture:
    "second", or "labelled" with notes that must be read, followed by their codes.
    """
    import torch

    cpu.keep_memory()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = new(out, start)
    kinds = RECIPE[mixture] if start else None
    model.set_attn_implementation("eager")
    optimizers = optimizers_of(model, kind, SECOND_HEIGHT if start else 1.0)
    state: dict[str, Any] = {"step": 0, "number": HOSPITAL_SEED, "position": 0, "log": []}
    state |= {"tokens": 0, "minutes": 0.0, "begun": 0.0}
    saved = out / "training.pt"
    if saved.is_file():
        kept = torch.load(saved, weights_only=False)
        model.load_state_dict(kept.pop("model"))
        for optimizer, before in zip(optimizers, kept.pop("optimizers"), strict=True):
            optimizer.load_state_dict(before)
        state |= kept
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    began = last_save = time.time()
    spent = state["minutes"]
    losses: list[float] = []
    queue: list = []
    model.train()
    while state["step"] < steps and time.time() - began < 60 * minutes:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["highest"] * rate(state["step"], steps)
        total = 0.0
        for _ in range(MICRO):
            while state["position"] >= len(queue):
                if queue:  # else it goes on in the midst of one
                    state |= {"number": state["number"] + 1, "position": 0}
                    state["begun"] = state["step"] / steps
                queue = batches(tokenizer, state["number"], state["begun"], kinds)
            batch = queue[state["position"]]
            state["position"] += 1
            loss = learn(model, batch, pad) / MICRO
            loss.backward()
            total += loss.item()
            state["tokens"] += sum(len(ids) for ids, _ in batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
        state["step"] += 1
        state["minutes"] = spent + (time.time() - began) / 60
        if state["step"] % 50 == 0:
            row = {key: state[key] for key in ("step", "tokens")}
            row |= {"minutes": round(state["minutes"], 2), "loss": round(np.mean(losses), 4)}
            losses = []
            state["log"].append(row)
            print(row, flush=True)
        if state["step"] % 1000 == 0:
            state["log"][-1] |= probe(model, tokenizer)
            print(state["log"][-1], flush=True)
        if time.time() - last_save > SAVE_EVERY or state["step"] == steps:
            save_state(saved, model, optimizers, state)
            last_save = time.time()
    save_state(saved, model, optimizers, state)
    pd.DataFrame(state["log"]).to_csv(out / "training_log.csv", index=False)
    tiny_base.save(model, tokenizer, out)


def save_state(
    path: Path, model: PreTrainedModel, optimizers: list[Any], state: dict[str, Any]
) -> None:
    """All that a run needs to go on, in place at once."""
    import torch

    part = path.with_suffix(".part")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state | {"model": model.state_dict(), "optimizers": states}, part)
    part.replace(path)


def new(out: Path, start: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that knows nothing but can copy, and its tokenizer: that in `out`, or a new one.

    start: instead, the base in this folder.
    """
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    if start:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(start / file, out)
        model = Qwen2ForCausalLM.from_pretrained(str(start), dtype="float32")
        return model, AutoTokenizer.from_pretrained(str(start))
    if (out / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(out))
    else:
        corpus = [document.text for document in documents(6000, HOSPITAL_SEED - 1)]
        for special in tiny_base.SPECIAL:
            corpus = [text.replace(special, "\n") for text in corpus]
        tokenizer = tiny_base.train_tokenizer(out, corpus)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    shape = tiny_base.CONFIG | {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    shape["rope_theta"] = 1e6  # as in Qwen2.5
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    set_copying_heads(model)
    return model, tokenizer


# --- probes -------------------------------------------------------------------------------------


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], longest: int
) -> list[str]:
    """What the model writes greedily behind each prompt, up to the end of the line."""
    import torch

    results: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    tokenizer.padding_side = "left"
    for begin in range(0, len(order), 32):
        some = order[begin : begin + 32]
        inputs = tokenizer([prompts[i] for i in some], return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        texts = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        results |= dict(zip(some, texts, strict=True))
    return [results[i].strip("\n").split("\n")[0] for i in range(len(prompts))]


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 100
) -> dict[str, float]:
    """How well the model copies, attributes and knows, on `count` notes that it never saw.

    copied: share of the quotes in a list of what is present that stand in the note; precision,
    recall of that list; attributed, the share of findings whose state is named rightly, one of each
    state and note, and that by state; known,
    known_category: right codes for clean lists of findings; direct, joined: right codes for whole
    notes, at once and after the list, which no document of the corpus shows.
    """
    model.eval()
    rng = np.random.default_rng(HELD_OUT_SEED)
    book = casebook.casebook()
    codes = [str(code) for code in rng.choice(book.codes, size=count, p=book.prior)]
    rows = [_row(code, rng) for code in codes]
    for row in rows:
        row["reading"] = 1.0
    texts = [notes.admission_note(text) for text in hospital.summaries(rows, HELD_OUT_SEED)]
    kept = [(text, row) for text, row in zip(texts, rows, strict=True) if text]
    found = [quotes(text) for text, _ in kept]
    lists = [f"{text}\n\nWhat does the patient have now? Present now:" for text, _ in kept]
    answers = complete(model, tokenizer, lists, 120)
    copied, precision, recall = [], [], []
    for (text, _), quoted, answer in zip(kept, found, answers, strict=True):
        items = [item.strip() for item in answer.strip().rstrip(".").split(";") if item.strip()]
        own = {quote.words for quote in quoted if quote.state == ""}
        copied += [item in text for item in items]
        precision += [item in own for item in items]
        recall += [item in items for item in own]
    scores = {"copied": np.mean(copied), "precision": np.mean(precision)}
    scores["recall"] = np.mean(recall)
    asked = []
    for (text, _), quoted in zip(kept, found, strict=True):
        for state in {quote.state for quote in quoted}:
            some = [quote.words for quote in quoted if quote.state == state]
            words = some[rng.integers(len(some))]
            question = f"Say of each whether it is present now: {words}. {words}:"
            asked.append((f"{text}\n\n{question}", STATES[state]))
    said = complete(model, tokenizer, [prompt for prompt, _ in asked], 6)
    right = [text.strip().startswith(state) for text, (_, state) in zip(said, asked, strict=True)]
    scores["attributed"] = np.mean(right)
    for state in STATES.values():
        scores[f"is {state}"] = np.mean(
            [r for r, (_, s) in zip(right, asked, strict=True) if s == state]
        )
    clean = [f"Present now: {'; '.join(_typical(row['code'], rng))}. Code" for _, row in kept]
    whole = [f"{text}\n\nCode" for text, _ in kept]
    joined = [
        start + answer.rstrip(".") + ". Code" for start, answer in zip(lists, answers, strict=True)
    ]
    for name, prompts in {"known": clean, "direct": whole, "joined": joined}.items():
        named = [
            text.strip(" .").split(" ")[0].rstrip(".,;")
            for text in complete(model, tokenizer, prompts, 9)
        ]
        gold = [row["code"] for _, row in kept]
        scores[name] = np.mean([a == b for a, b in zip(named, gold, strict=True)])
        scores[f"{name}_category"] = np.mean(
            [a[:3] == b[:3] for a, b in zip(named, gold, strict=True)]
        )
    model.train()
    return {name: round(float(value), 3) for name, value in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/reading-base"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="the base that learns to read, by default none")
    parser.add_argument("--mixture", choices=["second", "labelled"], default="second")
    parser.add_argument("--optimizer", dest="kind", choices=list(RATES), default="muon")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop after these, to go on later"
    )
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
