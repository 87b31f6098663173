"""The corpus of the base that reads: what its documents ask, and that they give no answer away."""

from __future__ import annotations

import re

import numpy as np
import pytest

from helpers import casebook, icd
from tools import reading_base


@pytest.fixture(scope="module")
def drills() -> list[reading_base.Document]:
    kinds = dict(reading_base.RECIPE["kinds"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reading_base.RECIPE, "kinds", dict.fromkeys(kinds, 0.0) | {"drill": 1.0})
        return [
            document for document in reading_base.documents(40, 1500) if len(document.notes) > 1
        ]


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


def test_no_document_follows_a_note_with_a_code_or_a_title() -> None:
    titles = {icd.title(code) for code in casebook.casebook().codes}
    for document in reading_base.documents(300, 1501):
        if document.notes or document.text.startswith("CC: "):
            assert not any(title in document.text for title in titles)
            assert not re.search(r"\b[A-TV-Z]\d\d\.\d", document.text)
            assert "<diagnosis>" not in document.text
