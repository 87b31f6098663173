"""The hierarchy against the library's own tree, and against everything that is no code."""

from __future__ import annotations

import math
import string
import subprocess
import sys
import time

import numpy as np
import pytest
import simple_icd_10_cm as cm
from hypothesis import given
from hypothesis import strategies as st

from helpers import icd

LEAVES = [c for c in cm.get_all_codes(True) if cm.is_leaf(c) and "-" not in c]
GARBAGE = [
    "",
    " ",
    ".",
    "NIL",
    "Sepsis",
    "410.71",
    "4280",
    "V4581X2Z9",
    "I21.01ZZ",
    "I2101ZZ",
    "tablet",
    "sada",
    "I10 and J18.9",
    "I10 J18",
    "I10, J18.9",
    "I10/I11",
    "I21..01",
    "I2.101",
    "I21.0.1",
    "I20-I25",
    "9",
    "I",
    "I2",
    "The patient has I21.01",
    "I21.01 STEMI",
    "I10 AND",
    "I21.01234",
    "I21.01\x00",
    "I21_01",
    "-I10",
    "A" * 1_000_000,
    "I" + "1" * 1_000_000,
    " " * 1_000_000,
    "Ⅰ21.01",
    "І21.01",
    "Ι10",
    "ı10",
    "I１0",
    "Ｉ21",
    "٣٤",
    "心梗",
    "I²1",
    "ß10",
    None,
    math.nan,
    float("inf"),
    0,
    21,
    41071,
    4.5,
    True,
    b"I10",
    [],
    ["I10"],
    {},
    ("I10",),
    np.nan,
    np.int64(5),
]


@pytest.mark.parametrize("junk", GARBAGE, ids=lambda junk: repr(junk)[:25])
def test_garbage_is_never_a_code(junk: object) -> None:
    assert icd.is_valid(junk) is False
    assert icd.title(junk) is None
    if not str(junk).endswith("ZZ"):  # the one kind that has the shape of a code
        assert icd.deepest_shared(junk, "I10") is icd.deepest_shared("I10", junk) is None
        assert (
            icd.normalise(junk)
            is icd.category(junk)
            is icd.chapter(junk)
            is icd.dotted(junk)
            is None
        )
        assert set(icd.ancestors(junk).values()) == {None}
        with pytest.raises(ValueError, match="not a code"):
            icd.tree_distance(junk, "I10")


ALMOST = st.text(string.ascii_letters + string.digits + ". ", max_size=9)


@given(st.text() | st.floats() | st.integers() | st.none() | ALMOST)
def test_nothing_raises_and_normalising_twice_changes_nothing(thing: object) -> None:
    plain = icd.normalise(thing)
    icd.is_valid(thing), icd.title(thing), icd.ancestors(thing)
    assert plain == icd.normalise(plain) == icd.normalise(icd.dotted(plain))
    assert (plain is None) == (icd.chapter(thing) is None) == (icd.category(thing) is None)
    if plain is not None:
        assert (
            icd.chapter(plain) in range(1, 23)
            and icd.category(plain) == plain[:3]
            and plain.isascii()
        )


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("I21.01", "I2101"),
        ("i21.01", "I2101"),
        (" I2101 ", "I2101"),
        ("I2101\n", "I2101"),
        ("I10   ", "I10"),
        ("I10\xa0", "I10"),
        ("I 21.01", "I2101"),
        ("I21 .01", "I2101"),
        ("S72.001 A", "S72001A"),
        ("I10.", "I10"),
        ("I10.X", "I10"),
        ("i10x", "I10"),
        ("t07.xxxa", "T07XXXA"),
        ("J09.X1", "J09X1"),
        ("J09.X", "J09X"),
        ("c7a.010", "C7A010"),
        ("QA0.0101", "QA00101"),
        (np.str_("I21.01"), "I2101"),
    ],
)
def test_normalise(written: str, plain: str) -> None:
    assert icd.normalise(written) == plain
    assert icd.is_valid(written)


def test_every_leaf_agrees_with_the_tree_of_the_library() -> None:
    assert 74_000 < len(LEAVES) < 76_000
    for code in LEAVES:
        above = cm.get_ancestors(code)
        plain = code.replace(".", "")
        assert icd.normalise(code) == icd.normalise(plain.lower()) == plain
        assert icd.dotted(plain) == code and icd.is_valid(plain)
        assert icd.chapter(code) == int(above[-1]), code
        assert icd.category(code) == next(
            (a for a in above if len(a) == 3 and not a.isdigit()), code
        ), code
        assert icd.ancestors(code)["block"] == above[-2], code


def test_every_header_survives_normalising() -> None:
    headers = {
        c for c in cm.get_all_codes(True) if not cm.is_leaf(c) and "-" not in c and not c.isdigit()
    }
    assert all(icd.dotted(c) == c and icd.is_valid(c) for c in headers)


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("A00", 1),
        ("B99", 1),
        ("C00", 2),
        ("C7A.010", 2),
        ("D3A.00", 2),
        ("D49.9", 2),
        ("D50", 3),
        ("D89.9", 3),
        ("H59.9", 7),
        ("H60", 8),
        ("O9A.2", 15),
        ("QA0", 17),
        ("S00", 19),
        ("T88.9", 19),
        ("V00", 20),
        ("W19.XXXA", 20),
        ("X58", 20),
        ("Y99", 20),
        ("Z99", 21),
        ("U07.1", 22),
        ("G20", 6),
        ("I47.1", 9),
        ("K56.69", 11),
        ("M54.5", 13),
        ("C79.11X", 2),
    ],
)
def test_chapter_by_range_also_for_retired_codes(code: str, number: int) -> None:
    assert icd.chapter(code) == number


def test_a_dictionary_adds_codes_and_takes_none_away() -> None:
    assert not icd.is_valid("I21.09Z9") and icd.is_valid("i21.09z9", {"I2109Z9"})
    assert icd.is_valid("I21.09Z9", {"I2109Z9": "a title"})
    assert icd.is_valid("I21.01", set()) and not icd.is_valid("Sepsis", {"SEPSIS", "Sepsis"})
    assert icd.is_valid("I21") and icd.is_valid("I21.0")  # headers exist, but are not the full code
    assert icd.deepest_shared("I21", "I21.01") == "category"


def test_titles_and_levels() -> None:
    assert icd.title("i10") == "Essential (primary) hypertension"
    assert "initial encounter" in (icd.title("S72.001A") or "") and icd.title("I2101ZZ") is None
    assert icd.ancestors("i21.01") == {
        "chapter": 9,
        "block": "I20-I25",
        "category": "I21",
        "full": "I2101",
    }
    assert icd.ancestors("K99.9")["block"] is None and icd.ancestors("K99.9")["chapter"] == 11
    for n in range(1, 23):
        assert cm.get_description(str(n)).lower().startswith(icd.chapter_title(n).lower())
        assert len(icd.chapter_short(n)) <= 16
    assert len({icd.chapter_short(n) for n in range(1, 23)}) == 22
    for n in (0, 23, None, "9"):
        with pytest.raises(ValueError, match="chapters 1 to 22"):
            icd.chapter_title(n)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "b", "level", "edges"),
    [
        ("I21.01", "i2101", "full", 0),
        ("I21.02", "I21.01", "category", 2),
        ("I50.21", "I50.9", "category", 3),
        ("J18.9", "A41.9", None, 8),
        ("S72.001A", "S72.001D", "category", 2),
        ("H65.00", "H54.0", None, 9),
        ("A41.9", "B34.9", "chapter", 6),
        ("T07.XXXA", "T07", "category", 1),
        ("I21", "I22", "chapter", 2),
        ("I21.01", "I21.01ZZ", "category", 1),
        ("K99.9", "K92.9", "chapter", 6),
    ],
)
def test_shared_level_and_distance(a: str, b: str, level: str | None, edges: int) -> None:
    assert icd.deepest_shared(a, b) == icd.deepest_shared(b, a) == level
    assert icd.tree_distance(a, b) == icd.tree_distance(b, a) == edges


CODES = st.sampled_from(LEAVES)


@given(CODES, CODES, CODES)
def test_distance_is_the_metric_of_the_tree_of_the_library(a: str, b: str, c: str) -> None:
    up, down = [a, *cm.get_ancestors(a)][::-1], [b, *cm.get_ancestors(b)][::-1]
    # Blocks may be named like their category; the position keeps them apart.
    pairs = enumerate(zip(up, down, strict=False))
    shared = next((i for i, (x, y) in pairs if x != y), min(len(up), len(down)))
    assert icd.tree_distance(a, b) == len(up) + len(down) - 2 * shared
    assert icd.tree_distance(a, b) <= icd.tree_distance(a, c) + icd.tree_distance(c, b)
    assert (icd.tree_distance(a, b) == 0) == (a == b)


def test_the_library_is_loaded_only_when_it_is_needed() -> None:
    code = """
import sys
from helpers import icd
icd.normalise("I21.01"), icd.category("I10"), icd.chapter("D50"), icd.dotted("I2101"), icd.chapter_title(3)
icd.deepest_shared("I10", "I11")
assert "simple_icd_10_cm" not in sys.modules
icd.title("I10")
assert "simple_icd_10_cm" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tens_of_thousands_per_second() -> None:
    codes = [f" {c.lower()} " for c in LEAVES[:20_000]]
    icd.is_valid("I10")
    start = time.perf_counter()
    for code in codes:
        icd.normalise(code), icd.category(code), icd.chapter(code), icd.is_valid(code)
    assert time.perf_counter() - start < 1
