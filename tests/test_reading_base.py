"""The corpus of the base that reads: what its documents ask, and that they give no answer away."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers import casebook, icd
from helpers.profiles import TINY_BASE
from tools import reading_base, tiny_base


@pytest.fixture(scope="module")
def drills() -> list[reading_base.Document]:
    documents = reading_base.documents(40, 1500, kinds={"drill": 1.0})
    return [document for document in documents if len(document.notes) > 1]


def test_the_words_of_an_excerpt_count_less_and_those_of_the_questions_do_not(drills) -> None:
    assert len(drills) > 20
    for document in drills:
        for begin, end in document.notes:
            assert re.match(r"[A-Z]+: \S", document.text[begin:end])
            assert "?" not in document.text[begin:end]
            assert document.text[end : end + 1] in ("\n", "")


def test_what_a_drill_quotes_stands_in_its_excerpt(drills) -> None:
    asked = 0
    for document in drills:
        ends = [begin for begin, _ in document.notes[1:]] + [len(document.text)]
        for (begin, end), stop in zip(document.notes, ends, strict=True):
            listed = re.findall(r"Present now: ([^?\n]*)\.$", document.text[end:stop], re.MULTILINE)
            for item in "; ".join(listed).split("; "):
                if item not in ("", "nothing"):
                    asked += 1
                    assert item in document.text[begin:end]
    assert asked > 20


def test_invented_words_take_the_place_of_findings_alone() -> None:
    text = "FAMILY: Father with vomiting and headache. Denies chest pain."
    found = reading_base.quotes(text)
    changed = set()
    for seed in range(20):
        other, quotes = reading_base.disguised(text, found, np.random.default_rng(seed))
        assert other.startswith("FAMILY: Father with ") and " and " in other
        assert [quote.state for quote in quotes] == [quote.state for quote in found]
        assert all(quote.words in other for quote in quotes)
        changed.add(other)
    assert text in changed and len(changed) > 5


def test_findings_are_where_they_are_said_to_be_after_some_are_disguised() -> None:
    notes = [
        document.text
        for document in reading_base.documents(60, 1503, kinds={"note": 1.0})
        if document.text.startswith("CC: ")
    ]
    seen = 0
    for number, note in enumerate(notes):
        rng = np.random.default_rng(number)
        text, found = reading_base.disguised(note, reading_base.quotes(note), rng)
        for quote in found:
            assert text[quote.start : quote.start + len(quote.words)] == quote.words
            seen += text != note
    assert seen > 200


def test_a_base_that_was_never_trained_copies_and_knows_nothing_else(tmp_path) -> None:
    import torch

    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_BASE / file, tmp_path)
    torch.manual_seed(3)
    model, _ = reading_base.new(tmp_path)
    twice = torch.randint(0, 2500, (8, 50)).repeat(1, 2)
    with torch.inference_mode():
        predicted = model(input_ids=twice).logits[:, :-1].argmax(-1)
    right = (predicted == twice[:, 1:]).float()
    assert right[:, 50:].mean() > 0.75
    assert right[:, :49].mean() < 0.02


def test_no_document_follows_a_note_with_a_code_or_a_title() -> None:
    titles = {icd.title(code) for code in casebook.casebook().codes}
    kinds = {"drill": 0.3, "exercise": 0.4, "record": 0.1, "note": 0.2}
    for document in reading_base.documents(300, 1501, kinds=kinds):
        if re.match(r"[A-Z][a-z &]+: [A-Z]\d[0-9A-Z] ", document.text):
            continue  # the page of an index, where a note was empty
        assert not any(title in document.text for title in titles)
        assert not re.search(r"\b[A-TV-Z]\d\d\.\d", document.text)
        assert "<diagnosis>" not in document.text


def test_in_a_vignette_only_findings_before_the_code_count_less() -> None:
    before = after = 0
    for document in reading_base.documents(60, 1502, kinds={"vignettes": 1.0}):
        for begin, end in document.notes:
            line_begin = document.text.rfind("\n", 0, begin) + 1
            line = document.text[line_begin:].partition("\nZ")[0]
            assert not re.search(r"[A-TV-Z]\d\d\.\d", document.text[begin:end])
            assert re.search(r"\b[A-Z]\d[0-9A-Z]\.?\w*", line[end - line_begin :])
            before += 1
        for match in re.finditer(r"A typical patient shows (.*)\.$", document.text, re.MULTILINE):
            assert not any(begin <= match.start(1) < end for begin, end in document.notes)
            after += 1
    assert before > 200 and after > 10


def test_what_a_base_goes_on_to_read_is_of_its_first_corpus() -> None:
    again = reading_base.documents(30, 1504, kinds={"replay": 1.0})
    assert [document.text for document in again] == list(tiny_base.documents(30, 1504))
    mixed = list(reading_base.documents(60, 1504, kinds=reading_base.RECIPE["second"]))
    first = set(tiny_base.documents(60, 1504))
    assert 5 < sum(document.text in first for document in mixed) < 30


def test_a_labelled_note_is_followed_by_its_own_findings_and_its_code() -> None:
    coded = quoted = 0
    for document in reading_base.documents(30, 1505, kinds={"labelled": 1.0}):
        ((begin, end),) = document.notes
        note, said = document.text[begin:end], document.text[end:]
        own = {quote.words for quote in reading_base.quotes(note) if quote.state == ""}
        coded += any(code in said for code in casebook.casebook().codes)
        quoted += any(words in said for words in own)
        others = {quote.words for quote in reading_base.quotes(note)} - own
        assert not any(f"; {words}" in said for words in others)
    assert coded == 30 and quoted > 25


def test_a_base_that_goes_on_starts_with_what_it_has_learnt_and_a_lower_rate(tmp_path) -> None:
    import torch
    from safetensors.torch import load_file

    model, tokenizer = reading_base.new(tmp_path, TINY_BASE)
    before = load_file(TINY_BASE / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], before[name].float()) for name in before)
    assert model.dtype == torch.float32, "half the digits would be lost, at a ninth of the speed"
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    rates = [
        [g["highest"] for o in reading_base.optimizers_of(model, "muon", h) for g in o.param_groups]
        for h in (1.0, 0.3)
    ]
    assert rates[1] == pytest.approx([0.3 * rate for rate in rates[0]])


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, TINY_BASE])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, start) -> None:
    import torch

    monkeypatch.setattr(reading_base, "DOCUMENTS", 3)
    monkeypatch.setattr(reading_base, "BATCH_TOKENS", 512)
    monkeypatch.setattr(reading_base, "WARMUP", 1)
    monkeypatch.setitem(reading_base.RECIPE["first"], "until", 0.5)

    def train(folder, stops: list[int]) -> dict:
        save = reading_base.save_state
        for stop in stops:

            def stopped(path, model, optimizers, state, stop=stop) -> None:
                save(path, model, optimizers, state)
                if state["step"] == stop:
                    raise KeyboardInterrupt

            monkeypatch.setattr(reading_base, "save_state", stopped)
            monkeypatch.setattr(reading_base, "SAVE_EVERY", 0)
            with pytest.raises(KeyboardInterrupt):
                reading_base.train(folder, 4, 0, 2, 1e9, "muon", start)
        monkeypatch.setattr(reading_base, "save_state", save)
        reading_base.train(folder, 4, 0, 2, 1e9, "muon", start)
        return torch.load(folder / "training.pt", weights_only=False)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY_BASE / file, tmp_path / name)
    whole = train(tmp_path / "whole", [])
    killed = train(tmp_path / "killed", [1, 3])
    assert killed["number"] == reading_base.HOSPITAL_SEED + 2, "it read several hospitals"
    assert {key: killed[key] for key in ("step", "tokens", "number", "position", "begun")} == {
        key: whole[key] for key in ("step", "tokens", "number", "position", "begun")
    }
    assert all(
        torch.equal(tensor, killed["model"][name]) for name, tensor in whole["model"].items()
    )
