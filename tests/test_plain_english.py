"""The prose is plain English: short sentences, common words, no idiom and no archaism.

The measure is Flesch's reading ease (R. Flesch, "A new readability yardstick", 1948):
206.835 − 1.015 · words per sentence − 84.6 · syllables per word. It is a guard, not a goal: a text
can pass and still be hard. No library is used: textstat from 0.7.9 on loads a dictionary from the
network at run time. A label in bold ("**Were you right?**") is part of the sentence after it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PAGES = (
    "README.md",
    "data/README.md",
    "helpers/README.md",
    "docs/atlas.md",
    "docs/exercises.md",
    "docs/glossary.md",
    "docs/metrics.md",
    "docs/mimic-on-one-gpu.md",
    "docs/results.md",
    "docs/running.md",
    "docs/scaling.md",
    "docs/teaching.md",
)
EXERCISES = "exercises/cells.yaml"  # tools/insert_exercises.py puts its cells into the notebooks
SOURCES = (*NOTEBOOKS, *PAGES, EXERCISES)

LEAST_EASE = 55
MOST_WORDS = 20  # per sentence, in the mean

# ------------------------------------------------------------------------------ reading the prose

# What is no prose, and what takes its place. The order matters.
_REMOVED = [
    (r"^(`{3,}).*?^\1", "\n\n"),  # code
    (r"<!--.*?-->", " "),
    (r"\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?", " "),  # pictures, also as links
    (r"\[([^\]]*)\]\([^)]*\)", r"\1"),  # the address of a link
    (r"<https?:[^>]*>|https?://\S+|[\w./-]+\.(?:md|ipynb|html|csv|json|yaml)\b", " Q "),
    (r"`[^`]*`", " Q "),
    (r"\$\$.*?\$\$|\$[^$\n]*\$", " Q "),  # formulas
    (r"</?[a-z][^>]*>", " "),  # tags
    (r"^#+ [^\n]*$", "\n"),  # headings
    (r"^ *\|[^\n]*$", "\n"),  # tables
]
_ICD_CODE = re.compile(r"\b[A-Z]\d[0-9A-Z](?:\.[0-9A-Z]{1,4})?\b")
_LIST_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+", re.MULTILINE)
_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][)\"”*]))\s+(?=[\"“(*]*[A-Z0-9−-])")
_WORD = re.compile(r"[A-Za-zÀ-ÿ]+(?:'[a-z]+)?|\d[\d.,]*")


def _without_indented_code(text: str) -> str:
    """Empties the lines that Markdown shows as code: four blanks in, after an empty line."""
    lines: list[str] = []
    margin = 0  # that of the list item above
    in_code, after_empty = False, True
    for line in text.splitlines():
        item = _LIST_ITEM.match(line)
        if item:
            margin = item.end()
        elif line[:1].strip():
            margin = 0
        is_indented = line.startswith(" " * (margin + 4)) and bool(line.strip())
        in_code = is_indented and (in_code or after_empty)
        after_empty = not line.strip()
        lines.append("" if in_code else line)
    return "\n".join(lines)


def sentences(markdown: str) -> list[str]:
    """The sentences of the prose in a text of Markdown. Code and formulas become the word Q."""
    text = _without_indented_code(markdown)
    for pattern, replacement in _REMOVED:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL | re.MULTILINE)
    text = _ICD_CODE.sub("Q", text)
    text = text.replace("et al.", "and others").replace("e.g.", "such as").replace("i.e.", "so")
    text = re.sub(r"^> ?", "", text, flags=re.MULTILINE)
    text = _LIST_ITEM.sub("\n\n", text)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _END.split(" ".join(paragraph.split())):
            if _WORD.search(sentence):
                found.append(sentence)
    return found


# --------------------------------------------------------------------------- counting syllables

_IRREGULAR = {
    "area": 3,
    "create": 2,
    "creates": 2,
    "element": 3,
    "every": 2,
    "everything": 3,
    "hundred": 2,
    "idea": 3,
    "ideas": 3,
    "people": 2,
    "posterior": 4,
    "something": 2,
    "sometimes": 2,
    "science": 2,
    "therefore": 2,
    "whole": 1,
}
# Neighbours that are two vowels, pairs that are one, and an e that is silent.
_TWO = re.compile(
    r"i[ao](?!u)|viou|iu|[^tc]ien|eo(?!u)|[^gq]ua[^y]|uou|[aeu]i?ying|[^aeiou]ying|[^c]ier|iest"
    r"|ay[eo]|oing|being|crea"
)
_ONE = re.compile(r"[tscgx]io(?:n|u)|llion|[ct]ia[ln]|eopl|crea(?=m|s)|frien")
_SILENT = re.compile(
    r"[^aeiouyl]e$|[aeiouy]le$|[^aeiouyscxzghl]es$|thes$|[aeiouy]les$|[^aeiouytd]ed$"
    r"|[^aeiouy]e(?=(?:ly|ful|less|ness|ment|book|where|line|body|hand)s?$)"
)


def syllables(word: str) -> int:
    """The syllables of an English word, by rule.

    Compared once with the CMU Pronouncing Dictionary: of the 1,635 different words in this prose
    that are in it, 1,607 have the same count.
    """
    word = word.lower().replace("’", "'")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = word.split("'")[0]
    count = len(re.findall(r"[aeiouy]+", word))
    count += len(_TWO.findall(word)) - len(_ONE.findall(word))
    count -= len(_SILENT.findall(word))
    return max(1, count)


class Measure(NamedTuple):
    """How a text reads: words per sentence, and Flesch's reading ease."""

    mean_length: float
    ease: float


def is_english(word: str) -> bool:
    """No number, abbreviation or placeholder: these are words of a sentence without syllables."""
    return word.isalpha() and sum(map(str.isupper, word)) < 2 and word != "Q" or "'" in word


def measure(found: list[str]) -> Measure:
    """Reading ease of sentences.

    Raises ValueError where no sentence is left.
    """
    words = [word for sentence in found for word in _WORD.findall(sentence)]
    english = [word for word in words if is_english(word)]
    if not english:
        raise ValueError("no prose is left to measure")
    length = len(words) / len(found)
    per_word = sum(map(syllables, english)) / len(english)
    return Measure(length, 206.835 - 1.015 * length - 84.6 * per_word)


# ---------------------------------------------------------------------------------- words to avoid

# A regular expression of words, and what is plain.
BANNED = {
    # archaisms, and words of another century's textbook
    r"nought": "zero",
    r"anew": "again",
    r"hence|whence|thence": "so",
    r"whoever|whosoever": "if you",
    r"upon": "on",
    r"thereof|therein|thereby|herein": "of it, in it, by it",
    r"likewise": "also",
    r"albeit": "although",
    r"ere|lest": "before, so that not",
    r"shall": "will",
    r"commonest": "most frequent",
    r"likeliest|likelier": "most probable, more probable",
    r"rightly|wrongly": "correctly, incorrectly",
    r"strewn": "added at random",
    r"mend(?:s|ed|ing)?": "repair, fix",
    r"spoil(?:s|ed|t|ing)?": "break",
    r"in force": "active",
    r"beside": "next to",
    r"(?:is|are|was|were) to be had": "is available",
    # verbs of place for "is"
    r"stands?|stood": "is, are",
    r"lies? (?:in|on|at|near|beside|between|above|below|outside|there)": "is, are",
    # idioms
    r"by heart": "knows all of it",
    r"bears? out|borne out": "supported",
    r"tell (?:them|it|the two)? ?(?:apart|from chance)|told from chance": "distinguish",
    r"luck|lucky": "chance, training randomness (seed)",
    r"all but": "almost",
    r"flip(?:s|ping)? a coin": "choose at random",
    r"smuggl\w+": "get past, fool",
    r"flatter(?:s|ed|ing)?": "make look too good",
    r"take(?:s)? a stand": "decide",
    r"(?:no|a) knob": "a setting",
    r"pupils?": "student, model",
    r"sceptics?": "the control that uses all labels",
    r"of the trade": "terms",
    r"tells? its own": "reveals",
    r"for nothing|in vain": "without result",
    r"the whole way": "every step",
    r"speaks? of": "says something about",
    r"let alone": "nor",
    r"part company|parts? ways": "diverge",
    r"yardsticks?": "measure",
    r"rut": "the same error",
    r"dull reason": "trivial reason",
    r"trust is good": "test it",
    r"a look": "exploratory",
    r"what bad (?:looks|would look) like": "warning sign",
    r"in the committed run": "(notebook 0 says it once)",
    # one word for one thing
    r"roll-?outs?|rolls? out": "completion",
    r"gut infection|disease of the gut": "infection of the intestine",
}


# The page that explains a word may say it.
EXPLAINED = {"docs/glossary.md": {"rollout", "roll-out", "pupils"}}
_NO_PROSE = re.compile(r"^(`{3,}).*?^\1|`[^`]*`|(?<=\])\([^)]*\)", re.DOTALL | re.MULTILINE)


def banned(markdown: str) -> dict[str, str]:
    """The words of BANNED in a text, tables and headings included: small letters -> what is plain.
    Code and the addresses of links do not count."""
    text = " ".join(_NO_PROSE.sub(" ", markdown).split())
    return {
        match.group().lower(): plain
        for pattern, plain in BANNED.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
    }


# ------------------------------------------------------------------------------------------- tests


@cache
def cells(name: str) -> tuple[Any, ...]:
    """The Markdown cells of a notebook."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return tuple(cell for cell in notebook.cells if cell.cell_type == "markdown")


@cache
def prose(source: str) -> str:
    """The Markdown of a notebook without its exercises, of all exercises, or of a page."""
    if source == EXERCISES:
        texts = [c.source for name in NOTEBOOKS for c in cells(name) if c.id[:8] == "exercise"]
        return "\n\n".join(dict.fromkeys(texts))
    if source in NOTEBOOKS:
        return "\n\n".join(c.source for c in cells(source) if c.id[:8] != "exercise")
    return (ROOT / source).read_text(encoding="utf-8")


@pytest.mark.parametrize("source", SOURCES)
def test_the_sentences_are_short_and_the_words_common(source: str) -> None:
    found = sentences(prose(source))
    mean_length, ease = measure(found)
    longest = sorted(found, key=lambda sentence: -len(_WORD.findall(sentence)))[:3]
    assert mean_length <= MOST_WORDS, f"{mean_length:.1f} words a sentence. Cut: {longest}"
    assert ease >= LEAST_EASE, f"reading ease {ease:.0f}. Cut, or take common words: {longest}"


@pytest.mark.parametrize("source", SOURCES)
def test_no_idiom_and_no_archaism(source: str) -> None:
    found = banned(prose(source))
    for word in EXPLAINED.get(source, ()):
        del found[word]
    assert not found, f"{source}: write what is plain: {found}"


def test_what_is_no_prose_is_left_out() -> None:
    text = """# A heading of five words

See [the page](https://example.org/a_b) and `code.py`: $x_1 + 2$ is I21.02. A second one!

| a | table. |
|---|---|

```python
print("Nothing. At. All.")
```

- One item, without a full stop
- Another item.

  It has a second paragraph. (It is read.)

      but.this(is_code)

Outside the list:

    indented = "code. Too."

[![A picture. Not read.](https://example.org/p.png)](p.svg)

<details><summary>Answer</summary>

Miranda et al. 2020 say *so.* Then **more.** End of README.md.

</details>
"""
    assert sentences(text) == [
        "See the page and Q : Q is Q.",
        "A second one!",
        "One item, without a full stop",
        "Another item.",
        "It has a second paragraph.",
        "(It is read.)",
        "Outside the list:",
        "Answer",
        "Miranda and others 2020 say *so.*",
        "Then **more.** End of Q .",
    ]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "the note tree whole rates named asked breathes through you years judged"),
        (2, "table samples notebook layer create being likely changes hundred every trial fifty"),
        (3, "animal created however probable radio area completely element everything union"),
        (4, "category experience immediate appropriate perplexity television impossible"),
        (5, "hierarchical university curiosity vocabulary electricity"),
    ],
)
def test_syllables(count: int, words: str) -> None:
    assert {word: syllables(word) for word in words.split()} == dict.fromkeys(words.split(), count)


def test_reading_ease_is_flesch_s_formula() -> None:
    # 6 words in 1 sentence, 6 syllables; then 4 words with 11 syllables
    easy = measure(sentences("The cat sat on the mat."))
    assert easy == (6, pytest.approx(206.835 - 1.015 * 6 - 84.6 * 6 / 6))
    hard = measure(sentences("Hierarchical categories require experience."))
    assert hard == (4, pytest.approx(206.835 - 1.015 * 4 - 84.6 * 15 / 4))
    # code, numbers and abbreviations lengthen a sentence and have no syllables
    mixed = measure(sentences("The cat sat on `mats`, 12 of the GRPO."))
    assert mixed == (9, pytest.approx(206.835 - 1.015 * 9 - 84.6))
    with pytest.raises(ValueError, match="no prose"):
        measure(sentences("`code`"))


def test_a_hard_text_and_a_banned_word_would_be_seen() -> None:
    hard = (
        "Notwithstanding considerable heterogeneity, the aforementioned hierarchical evaluation"
        " methodology demonstrates unequivocally superior generalisation characteristics."
    )
    assert measure(sentences(hard)).ease < 0
    assert banned("Macro-F1 stands\nbeside `anew`, in [a page](docs/luck.md).") == {
        "stands": "is, are",
        "beside": "next to",
    }
    assert banned("| Whoever lies in wait | has luck |").keys() == {"whoever", "lies in", "luck"}
    assert not banned("Underlies, standard, besides, pluck")
