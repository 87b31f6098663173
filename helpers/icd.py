"""The ICD-10-CM hierarchy: chapter > block > category > ... > full code.

Shape is not validity: `I2101ZZ` has the shape of a code and exists in no release. `normalise`,
`category` and `chapter` need the shape alone, so they are fast and serve codes retired since
MIMIC-IV was coded. Titles, validity and the tree come from `simple-icd-10-cm`, loaded on the first
call that needs it (2 s, 200 MB).

What is no code (None, NaN, a number, a sentence ...) gives None or False, never an exception.
The course cleans a code where it enters, in a raw file or in a completion; from there on it is a
plain undotted str. Taught in notebook 0.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect
from collections.abc import Collection
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

# The second character is a letter only in categories such as QA0; asking for a digit after it keeps
# words such as "tablet" from having the shape of a code.
_SHAPE = re.compile(r"([A-Z](?:[0-9][0-9AB]|A[0-9]))\.?([0-9A-Z]{0,4})\.?")
_WORD = re.compile(r"[A-Z][0-9A-Z]")
_LONGEST_INPUT = 32  # a code has 7 characters; what is far longer is refused before it is read
_X_SUBCATEGORIES = frozenset({"J09X", "M01X"})  # the two headers that really end in a placeholder

_CHAPTER_FILE = Path(__file__).with_name("icd_chapters.toml")
# First code, short name and title of each.
_CHAPTERS = tomllib.loads(_CHAPTER_FILE.read_text(encoding="utf-8"))["chapters"]
_CHAPTER_FROM = {first: number for number, (first, _, _) in enumerate(_CHAPTERS, 1)}
_IN_ALPHABET = sorted(_CHAPTER_FROM)


@cache
def _dotted_codes() -> dict[str, str]:
    """Undotted -> dotted: the categories of the library and everything below them."""
    import simple_icd_10_cm as cm

    return {c.replace(".", ""): c for c in cm.get_all_codes(True) if _SHAPE.fullmatch(c)}


def normalise(code: Any) -> str | None:
    """The undotted upper-case code, e.g. " i21.01 " -> "I2101"; None where the input lacks a code's
    shape.

    White space goes, also inside ("S72.001 A"); so do the dot after the third character, a final
    full stop and placeholders that only fill up a category ("I10.X" -> "I10"). Others stay
    ("T07.xxxa" -> "T07XXXA").
    """
    if not isinstance(code, str):
        return None
    code = code.strip()
    return _normalise(code) if len(code) <= _LONGEST_INPUT and code.isascii() else None


@lru_cache(maxsize=1 << 17)
def _normalise(text: str) -> str | None:
    pieces = text.upper().split()
    for piece in pieces[1:]:
        if _WORD.match(piece) and not piece.startswith("XX"):
            return None  # a word or another code follows: "I10 and", "I10 J18"
    match = _SHAPE.fullmatch("".join(pieces))
    if match is None:
        return None
    category, rest = match.groups()
    return category + rest if rest.strip("X") or category + rest in _X_SUBCATEGORIES else category


def is_valid(code: Any, dictionary: Collection[str] | None = None) -> bool:
    """Whether a code exists: shape first, then membership in `dictionary` (normalised codes, such
    as MIMIC's, retired ones included) or in the library. A header such as I21 exists, although
    nobody may bill it."""
    plain = normalise(code)
    if plain is None:
        return False
    return (dictionary is not None and plain in dictionary) or plain in _dotted_codes()


def category(code: Any) -> str | None:
    """The three-character category, e.g. "I21" of I21.01."""
    plain = normalise(code)
    return plain[:3] if plain else None


def chapter(code: Any) -> int | None:
    """The chapter, 1 to 22, by range: A00-B99 is 1, D49 is 2 and D50 is 3, H59 is 7 and H60 is 8, U
    is 22."""
    plain = normalise(code)
    if plain is None:
        return None
    return _CHAPTER_FROM[_IN_ALPHABET[bisect(_IN_ALPHABET, plain) - 1]]


def title(code: Any) -> str | None:
    """The official title, e.g. "Essential (primary) hypertension"; None for what the library
    lacks."""
    plain = normalise(code)
    if plain not in _dotted_codes():
        return None
    import simple_icd_10_cm as cm

    return cm.get_description(_dotted_codes()[plain])


def chapter_title(number: int) -> str:
    """The title of chapter 1 to 22. Raises ValueError for another number."""
    return _chapter_row(number)[2]


def chapter_short(number: int) -> str:
    """At most 16 characters, for an axis, e.g. "Circulatory". Raises ValueError for an unknown
    chapter."""
    return _chapter_row(number)[1]


def _chapter_row(number: int) -> list[str]:
    if number not in range(1, len(_CHAPTERS) + 1):
        raise ValueError(
            f"chapter {number!r} does not exist: ICD-10-CM has chapters 1 to {len(_CHAPTERS)}. "
            "Take the number from icd.chapter(code)."
        )
    return _CHAPTERS[int(number) - 1]


def dotted(code: Any) -> str | None:
    """The way a code is printed: "I2101" -> "I21.01", "I10" -> "I10"; None for what is no code."""
    plain = normalise(code)
    return f"{plain[:3]}.{plain[3:]}".rstrip(".") if plain else None


def ancestors(code: Any) -> dict[str, Any]:
    """{"chapter": 9, "block": "I20-I25", "category": "I21", "full": "I2101"}; all values None for
    no code.

    The block of a category that the library lacks is None.
    """
    plain = normalise(code)
    block = _block(plain[:3]) if plain else None
    return {"chapter": chapter(plain), "block": block, "category": category(plain), "full": plain}


def _block(category: str) -> str | None:
    """By position, not by name: 39 blocks bear the name of their category (B20, C50 ...)."""
    import simple_icd_10_cm as cm

    return cm.get_ancestors(category)[0] if category in _dotted_codes() else None


@lru_cache(maxsize=1 << 16)
def _nodes(plain: str) -> frozenset[str]:
    """The code and all nodes above it, but the root. A prefix that is no header is no node: T07XXXA
    hangs from T07."""
    prefixes = (plain[:length] for length in range(4, len(plain)))
    headers = [prefix for prefix in prefixes if prefix in _dotted_codes()]
    block = _block(plain[:3]) or plain[:3]
    return frozenset([f"chapter {chapter(plain)}", f"block {block}", plain[:3], *headers, plain])


def tree_distance(a: Any, b: Any) -> int:
    """Edges between two codes in the full tree (root, chapter, block, category, each further
    header, code): depth(a) + depth(b) - 2 depth(deepest common ancestor). Raises ValueError where a
    or b is no code."""
    x, y = normalise(a), normalise(b)
    if x is None or y is None:
        raise ValueError(
            f"tree_distance({a!r:.40}, {b!r:.40}): one of them is not a code. "
            "Drop unusable answers first: icd.normalise gives None for them."
        )
    return len(_nodes(x) ^ _nodes(y))  # one edge leads up from each node that they do not share


def deepest_shared(a: Any, b: Any) -> str | None:
    """The deepest of "full", "category", "chapter" on which both agree; None if on none or one is
    no code."""
    x, y = normalise(a), normalise(b)
    if x is None or y is None:
        return None
    if x == y:
        return "full"
    if x[:3] == y[:3]:
        return "category"
    return "chapter" if chapter(x) == chapter(y) else None
