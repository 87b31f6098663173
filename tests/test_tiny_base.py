"""The bundled base: its manifest, its corpus, and the training that made it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers import casebook, hospital, icd, models, notes
from tests import notebook_code
from tools import tiny_base


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer("tiny")


def small_model(tokenizer: Any) -> Any:
    """One layer with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    small = {"hidden_size": 64, "intermediate_size": 64} | dict.fromkeys(names, 1)
    return Qwen2ForCausalLM(Qwen2Config(**tiny_base.CONFIG | small))


def source(count: int, seed: int, *, early: bool = False) -> Iterator[str]:
    """Six short documents that say of which hospital they are, and whether of the early mix."""
    for number in range(6):
        yield f"{number} of {seed}, {'early' if early else 'later'} " * (1 + number % 3)


def test_the_manifest_ties_the_files_together() -> None:
    manifest = models.tiny_manifest()
    for name, digest in manifest["files"].items():
        content = (models.TINY_BASE / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, f"{name} is another one"
    assert {"model.safetensors", "tokenizer.json", "config.json", "training_log.csv"} <= set(
        manifest["files"]
    )
    again = "make tiny-base"
    assert manifest["casebook_sha256"] == casebook.casebook().sha256, f"new casebook: {again}"
    assert manifest["generator_sha256"] == tiny_base.fingerprint(), f"new generator: {again}"
    assert manifest["command"].startswith(tiny_base.COMMAND)
    assert (models.TINY_BASE / "model.safetensors").stat().st_size <= 8_000_000
    assert tiny_base.OUT == models.TINY_BASE
    assert not [*models.TINY_BASE.glob("*.py")], "what trains the base is in tools/"


def test_held_out_perplexity_is_what_the_manifest_says(tokenizer: Any) -> None:
    model, _ = models.load("tiny")
    value = tiny_base.perplexity(model, tokenizer, tiny_base.held_out())
    assert value == pytest.approx(models.tiny_manifest()["held_out_perplexity"], rel=0.01)


def test_the_corpus_never_shows_the_answer_format_nor_a_patient_of_the_course() -> None:
    corpus = " ".join(tiny_base.documents(600, tiny_base.HOSPITAL_SEED))
    assert not re.search(r"</?(think|diagnosis)", corpus)
    assert not re.search(r"<\|im_start\|>", corpus)
    first = models.tiny_manifest()["first_hospital_seed"]
    assert first >= 1000, "the course's own hospitals have seeds below 100"


def test_every_token_of_the_answer_format_occurs_in_the_corpus(tokenizer: Any) -> None:
    """A token that a base never saw has an embedding that no adapter can raise above the others:
    greedy decoding may still find it, sampling does not, and GRPO then sees no usable answer."""
    corpus = tokenizer([*tiny_base.documents(3000, tiny_base.HOSPITAL_SEED)])["input_ids"]
    seen = Counter(token for ids in corpus for token in ids)
    scaffold = "Findings: \nCirculatory: \nDetail: none.\n</think>\n<diagnosis>I21.4</diagnosis>"
    for number in {icd.chapter(code) for code in casebook.casebook().codes}:
        scaffold += f"\n{icd.chapter_short(number)}: "
    tokens = set(tokenizer(scaffold)["input_ids"])
    rare = {tokenizer.decode([token]): seen[token] for token in tokens if seen[token] < 10}
    assert not rare, f"hardly ever in the corpus: {rare}"


def test_each_kind_of_document_is_in_the_corpus_and_early_ones_are_short() -> None:
    usual = [*tiny_base.documents(400, 1003)]
    early = [*tiny_base.documents(400, 1003, early=True)]
    assert len(usual) == len(early) == 400
    assert sum(map(len, early)) < 0.9 * sum(map(len, usual))
    for corpus in (usual, early):
        assert any(text.startswith("<record>") for text in corpus)
        assert any("Discharge Disposition" in text for text in corpus)
        assert any(text.startswith(("CC: ", "HPI: ")) for text in corpus)
        assert any("Findings: what is seen" in text for text in corpus), "a glossary"
        assert not any("{" in text for text in corpus), "a template was not filled"


def test_a_baseline_may_learn_from_the_labels_that_the_base_saw() -> None:
    """They start at the first hospital that the base read."""
    scope = {"hospital": hospital, "notes": notes, "icd": icd}
    texts, codes = notebook_code.function("05", "labelled_notes", **scope)(50)
    rows = hospital.draw(50, tiny_base.HOSPITAL_SEED)
    summaries = hospital.summaries(rows, tiny_base.HOSPITAL_SEED)
    known = [notes.admission_note(text) for text in summaries]
    assert texts == [text for text in known if text]
    assert len(codes) == len(texts)


def test_training_goes_on_from_its_log(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_base, "named_right", lambda *_: 0.5)
    model = small_model(tokenizer)
    arguments = (model, tokenizer, 50, 0, 1e-3, 60, tmp_path)
    first = tiny_base.train(*arguments, source=source)
    assert [row["step"] for row in first] == [50] and first[0]["named_right"] == 0.5
    kept = pd.read_csv(tmp_path / "training_log.csv").to_dict("records")
    assert kept == first
    second = tiny_base.train(*arguments, before=kept, source=source)
    assert [row["step"] for row in second] == [50, 100]
    assert second[1]["loss"] < second[0]["loss"]
    assert all(second[1][name] > second[0][name] for name in ("tokens", "documents"))


def test_only_the_beginning_of_a_first_training_is_early(tokenizer: Any, tmp_path: Path) -> None:
    asked: list[tuple[int, bool]] = []

    def asks(count: int, seed: int, *, early: bool = False) -> Iterator[str]:
        asked.append((seed, early))
        return source(count, seed, early=early)

    model = small_model(tokenizer)
    arguments = (model, tokenizer, 10, 0, 1e-3, 10_000, tmp_path)  # a batch for each hospital
    tiny_base.train(*arguments, source=asks)
    assert asked == [(1000 + step, step < 2) for step in range(10)]
    asked.clear()
    log = [{"step": 50, "minutes": 1.0, "tokens": 9, "documents": 8000, "named_right": None}]
    tiny_base.train(*arguments, before=log, source=asks)
    assert asked == [(1002 + step, False) for step in range(10)]
