"""The ICD-10-CM hierarchy: chapter > block > category > ... > full code.

Shape is not validity: `I2101ZZ` has the shape of a code and exists in no release. `normalise`, `category` and
`chapter` need the shape alone, so they are fast and serve codes retired since MIMIC-IV was coded. Titles,
validity and the tree come from `simple-icd-10-cm`, loaded on the first call that needs it (2 s, 200 MB).

What is no code (None, NaN, a number, a sentence ...) gives None or False, never an exception.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

# The second character is a letter only in categories such as QA0; asking for a digit after it keeps words
# such as "tablet" from having the shape of a code.
_SHAPE = re.compile(r"([A-Z](?:[0-9][0-9AB]|A[0-9]))\.?([0-9A-Z]{0,4})\.?")
# White space, unless a word or another code follows: "I10 and", "I10 J18" are no codes.
_GAP = re.compile(r"\s+(?!(?!XX)[A-Z][0-9A-Z])")
_LONGEST_INPUT = (
    32  # a code has 7 characters; anything far beyond is refused before it is looked at
)
_X_SUBCATEGORIES = frozenset({"J09X", "M01X"})  # the two headers that really end in a placeholder

_CHAPTERS: list[list[str]] = tomllib.loads(
    Path(__file__).with_name("chapters.toml").read_text(encoding="utf-8")
)["chapters"]
# Without D and H, which two chapters share: see `chapter`.
_CHAPTER_OF_LETTER = dict(
    zip(
        "ABCEFGIJKLMNOPQRSTVWXYZU",
        (1, 1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 19, 20, 20, 20, 20, 21, 22),
        strict=True,
    )
)


class _Library(NamedTuple):
    codes: dict[str, str]  # undotted -> dotted, categories and everything below them
    block_of: dict[str, str]  # category -> block, e.g. I21 -> I20-I25


@lru_cache(maxsize=1)
def _library() -> _Library:
    import simple_icd_10_cm as cm

    codes = {c.replace(".", ""): c for c in cm.get_all_codes(True) if _SHAPE.fullmatch(c)}
    # 39 blocks bear the name of their category (B20, C50 ...), so a level is told by position, not by name.
    return _Library(codes, {c: cm.get_ancestors(c)[0] for c in codes if len(c) == 3})


def normalise(code: Any) -> str | None:
    """The undotted upper-case code, e.g. " i21.01 " -> "I2101"; None where the input lacks a code's shape.

    White space goes, also inside ("S72.001 A"); so do the dot after the third character, a final full stop
    and placeholders that only fill up a category ("I10.X" -> "I10"). Others stay ("T07.xxxa" -> "T07XXXA").
    """
    if not isinstance(code, str):
        return None
    code = code.strip()
    return _normalise(code) if len(code) <= _LONGEST_INPUT and code.isascii() else None


@lru_cache(maxsize=1 << 17)
def _normalise(text: str) -> str | None:
    match = _SHAPE.fullmatch(_GAP.sub("", text.upper()))
    if match is None:
        return None
    category, rest = match.groups()
    return category + rest if rest.strip("X") or category + rest in _X_SUBCATEGORIES else category


def is_valid(code: Any, dictionary: Collection[str] | None = None) -> bool:
    """Whether a code exists: shape first, then membership in `dictionary` (normalised codes, such as MIMIC's,
    retired ones included) or in the library. A header such as I21 exists, although nobody may bill it."""
    plain = normalise(code)
    if plain is None:
        return False
    return (dictionary is not None and plain in dictionary) or plain in _library().codes


def category(code: Any) -> str | None:
    """The three-character category, e.g. "I21" of I21.01."""
    plain = normalise(code)
    return plain and plain[:3]


def chapter(code: Any) -> int | None:
    """The chapter, 1 to 22, by range: A00-B99 is 1, D49 is 2 and D50 is 3, H59 is 7 and H60 is 8, U is 22."""
    plain = normalise(code)
    if plain is None:
        return None
    if plain[0] == "D":  # D3A, a neoplasm, sorts below D50 as well
        return 2 if plain < "D50" else 3
    if plain[0] == "H":
        return 7 if plain < "H60" else 8
    return _CHAPTER_OF_LETTER[plain[0]]


def title(code: Any) -> str | None:
    """The official title, e.g. "Essential (primary) hypertension"; None for what the library lacks."""
    plain = normalise(code)
    if plain is None or plain not in (codes := _library().codes):
        return None
    import simple_icd_10_cm as cm

    return cm.get_description(codes[plain])


def chapter_title(number: int) -> str:
    """The title of chapter 1 to 22. Raises ValueError for another number."""
    return _chapter_text(number)[1]


def chapter_short(number: int) -> str:
    """At most 16 characters, for an axis, e.g. "Circulatory". Raises ValueError for an unknown chapter."""
    return _chapter_text(number)[0]


def _chapter_text(number: int) -> list[str]:
    if number not in range(1, len(_CHAPTERS) + 1):
        raise ValueError(
            f"chapter {number!r} does not exist: ICD-10-CM has chapters 1 to {len(_CHAPTERS)}. "
            "Take the number from icd.chapter(code)."
        )
    return _CHAPTERS[int(number) - 1]


def dotted(code: Any) -> str | None:
    """The way a code is printed: "I2101" -> "I21.01", "I10" -> "I10"; None for what is no code."""
    plain = normalise(code)
    return plain and (f"{plain[:3]}.{plain[3:]}" if len(plain) > 3 else plain)


def ancestors(code: Any) -> dict[str, Any]:
    """{"chapter": 9, "block": "I20-I25", "category": "I21", "full": "I2101"}; all values None for no code.

    The block of a category that the library lacks is None.
    """
    plain = normalise(code)
    block = _library().block_of.get(plain[:3]) if plain else None
    return {"chapter": chapter(plain), "block": block, "category": category(plain), "full": plain}


@lru_cache(maxsize=1 << 16)
def _path(plain: str) -> tuple[str, ...]:
    """Nodes from chapter to code. A prefix that is no header is no node: T07XXXA hangs from T07."""
    (codes, block_of), cat = _library(), plain[:3]
    below = [plain[:n] for n in range(4, len(plain)) if plain[:n] in codes] + [plain] * (
        len(plain) > 3
    )
    return (str(chapter(plain)), f"block {block_of.get(cat, cat)}", cat, *below)


def tree_distance(a: Any, b: Any) -> int:
    """Edges between two codes in the full tree (root, chapter, block, category, each further header, code):
    depth(a) + depth(b) - 2 depth(deepest common ancestor). Raises ValueError where a or b is no code."""
    x, y = normalise(a), normalise(b)
    if x is None or y is None:
        raise ValueError(
            f"tree_distance({a!r:.40}, {b!r:.40}): one of them is not a code. "
            "Drop unusable answers first: icd.normalise gives None for them."
        )
    p, q = _path(x), _path(y)
    shared = next(
        (i for i, (m, n) in enumerate(zip(p, q, strict=False)) if m != n), min(len(p), len(q))
    )
    return len(p) + len(q) - 2 * shared


def deepest_shared(a: Any, b: Any) -> str | None:
    """The deepest of "full", "category", "chapter" on which both agree; None if on none or one is no code."""
    x, y = normalise(a), normalise(b)
    if x is None or y is None:
        return None
    if x == y:
        return "full"
    if x[:3] == y[:3]:
        return "category"
    return "chapter" if chapter(x) == chapter(y) else None
