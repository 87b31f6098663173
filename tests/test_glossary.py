"""The glossary: every abbreviation that the notes and the prose use is there, each term where it says it is used."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from helpers import icd
from helpers.machinery import places

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
LINKING = ("00_start_here", "01_data_preparation", "03_lora_sft", "04_qlora_grpo")

# What counts as an abbreviation, in any of the sources:
# 1. a word with two capitals (CAD, AFib, proBNP), or with a capital and a digit (S3, SpO2);
# 2. a single capital letter (M, K), but for the words "A" and "I";
# 3. small letters without a vowel (hx, ppd, kg);
# 4. short pieces around a slash (c/o, s/p, w/);
# 5. a word of CLIPPED: everyday words that notes cut short;
# 6. a word of up to five letters in the table of headings (notes_rules.yaml) that is not in ORDINARY.
WORD = re.compile(r"[A-Za-z]+[0-9]*[A-Za-z0-9]*")
SLASHED = re.compile(r"(?<![A-Za-z/])([A-Za-z]{1,2}/[A-Za-z]{0,2})(?![A-Za-z/])")
VOWELS = set("aeiouyAEIOUY")


def listed(words: str) -> set[str]:
    """The words of a text."""
    return set(words.split())


CLIPPED = listed("yo abd bili nebs tabs temp tox trop sat satting chemo echo nitro rehab epi osm")

# Words that look like abbreviations and need no entry, by reason.
ALLOWED = {
    "names of people, products and organisations": "McBurney EpiPen DATEXIS DeepSeekMath GitHub JupyterLab OpenAI Mr Ms",
    "part of the name DeepICD-R1, explained there": "DeepICD R1",
    "part of the name MIMIC-IV, explained there": "MIMIC",
    "part of ICD-10-CM, explained there": "CM",
    "a unit in a name, read with the number before it": "B",
    "capitals for weight in prose": "BY",
    "headings in capitals: the words stand in full": "PRESENTING",
}
# In headings: English words of up to five letters that mean what they mean everywhere.
ORDINARY = listed(
    """a after all also and arms as at attic back birth bowel brief bulk by care cause chest chief code
    data date day death drug drugs ears edema event exam eyes face feet final flank floor foley foot
    for from gait given goals hands he head heart held her here his hold home in issue judge key
    known lab labs last left legs level line lines list lives log lower lung lungs lymph main major
    mood most motor mouth name nasal neck nerve new no nodes nose note of on organ other out pain
    past per plan post pre prior ray rays renal right risk sex she sign signs since skin spine start stay
    stop study stump take team test tests the their then there they this time to today tone tubes
    unit up upon upper urine use visit vital ward was were what when while why with work your"""
)
# Endings in its regular expressions, such as neuro(log(y|ic|ical))?
ENDINGS = listed(
    "atic atics c cor crine ery ia ic ical ie ies ing ivx logic med ment omen onary remit s y"
)


def entries() -> list[dict[str, Any]]:
    """Rows of the glossary: anchor, names, meaning, link ("" for an abbreviation), section."""
    rows, section = [], ""
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        section = line[3:] if line.startswith("## ") else section
        row = re.match(
            r'\| <a id="([^"]+)"></a>\*\*(.+?)\*\* \| (.+?) \|(?: \[[^\]]+\]\(([^)]+)\) \|)?$', line
        )
        if row:
            anchor, names, meaning, link = row.groups()
            names = [name.strip("` ") for name in names.split(",")]
            keys = ("anchor", "names", "meaning", "link", "section")
            values = (anchor, names, meaning, link or "", section)
            rows.append(dict(zip(keys, values, strict=True)))
    return rows


ENTRIES = entries()


def plain(text: str) -> str:
    """For comparing: small letters, one blank."""
    return " ".join(text.lower().split())


# ------------------------------------------------------------------------------------ collecting


def strings(value: Any) -> Iterator[str]:
    """All texts of a nested value, without the keys of maps."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def of_casebook() -> Iterator[str]:
    """What a note can say: phrases, denials, complaints, what came later; frames and relations."""
    for path in sorted((ROOT / "helpers" / "casebook").glob("*.yaml")):
        book = yaml.safe_load(path.read_text(encoding="utf-8"))
        for finding in book["findings"].values():
            yield from [*finding["phrases"], *finding.get("denied", [])]
        for code in book["codes"].values():
            yield from code["complaint"]
            for later in ("course", "procedure", "discharge_meds"):
                yield from strings(code.get(later))
    for path in sorted((ROOT / "helpers" / "casebook" / "reading").glob("*.yaml")):
        yield from strings(yaml.safe_load(path.read_text(encoding="utf-8")))


def of_hospital() -> Iterator[str]:
    """The words around the findings; `admission` holds fields of a table, not of a note."""
    words = tomllib.loads((ROOT / "helpers" / "hospital_words.toml").read_text(encoding="utf-8"))
    texts = list(strings({key: value for key, value in words.items() if key != "admission"}))
    written = {word for text in texts for word in WORD.findall(text)}
    for text in texts:  # "CHIEF COMPLAINT" stands in the same file as "Chief Complaint"
        in_full = [
            w for w in WORD.findall(text) if w.isupper() and {w.capitalize(), w.lower()} & written
        ]
        yield re.sub(rf"\b({'|'.join(in_full)})\b", " ", text) if in_full else text


def of_prose() -> Iterator[str]:
    """Markdown of the notebooks, without code, links and formulas."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                yield re.sub(
                    r"```.*?```|`[^`]*`|!\[.*?\]\(|\]\([^)]*\)|\$[^$]*\$|https?://\S+|[\w/]+\.(md|csv|py|png)\b",
                    " ",
                    cell.source,
                    flags=re.DOTALL,
                )


def is_short(word: str) -> bool:
    """Rules 1, 2, 3 and 5."""
    capitals = sum(letter.isupper() for letter in word)
    if len(word) == 1:
        return capitals == 1 and word not in ("A", "I")
    if capitals >= 2 or (capitals and any(letter.isdigit() for letter in word)):
        return True
    return word in CLIPPED or not (set(word) & VOWELS or any(c.isdigit() for c in word))


def abbreviations(text: str) -> set[str]:
    """The abbreviations in a text; an ICD-10-CM code is none."""
    text = re.sub(
        r"[A-Z][0-9][0-9A-Z](\.[0-9A-Z]{1,4})?\b",
        lambda m: "" if icd.normalise(m[0]) else m[0],
        text,
    )
    slashed = set(SLASHED.findall(text))
    rest = SLASHED.sub(" ", text)
    return slashed | {word for word in WORD.findall(rest) if is_short(word)}


def of_headings() -> set[str]:
    """Rule 6, and the capitals of headings that run into their text."""
    table = yaml.safe_load((ROOT / "helpers" / "notes_rules.yaml").read_text(encoding="utf-8"))
    parts = ("headings", "clear", "vague", "list", "labels", "synonyms", "filler", "run_in")
    words = set(re.findall(r"[A-Za-z]+[0-9]*", str([table[part] for part in parts])))
    return {word for word in words if len(word) <= 5 and word.lower() not in ORDINARY | ENDINGS}


def is_ratio(word: str, known: set[str]) -> bool:
    """Whether a slash stands between two abbreviations that are known, as in cc/kg."""
    parts = word.lower().split("/")
    return len(parts) == 2 and all(len(part) > 1 and part in known for part in parts)


@functools.cache
def collected() -> dict[str, str]:
    """Abbreviation -> where it stands."""
    found = {}
    sources = {
        "the casebook": of_casebook,
        "hospital_words.toml": of_hospital,
        "a notebook": of_prose,
    }
    for name, source in sources.items():
        for text in source():
            found |= dict.fromkeys(abbreviations(text), name)
    return found | dict.fromkeys(of_headings(), "notes_rules.yaml")


# ----------------------------------------------------------------------------------------- tests


def test_every_abbreviation_is_in_the_glossary() -> None:
    known = {plain(name) for entry in ENTRIES for name in entry["names"]}
    known |= {word for name in known for word in re.findall(r"[a-z0-9]+", name)}
    allowed = {word for words in ALLOWED.values() for word in words.split()}
    missing = {
        word: where
        for word, where in collected().items()
        if plain(word) not in known and word not in allowed and not is_ratio(word, known)
    }
    assert not missing, f"docs/glossary.md lacks {missing}"


def test_the_lists_of_exceptions_are_needed() -> None:
    allowed = {word for words in ALLOWED.values() for word in words.split()}
    assert allowed <= set(collected()), f"no longer used: {allowed - set(collected())}"
    text = " ".join(of_casebook()) + " ".join(strings(list(of_hospital())))
    assert all(re.search(rf"\b{word}\b", text) for word in CLIPPED)


def test_a_new_abbreviation_would_be_seen() -> None:
    assert abbreviations("pt w/ XYZ, hx of ABCfib s/p qrst; BP 82/48, S3") >= {
        "pt",
        "w/",
        "XYZ",
        "hx",
        "ABCfib",
        "s/p",
        "qrst",
        "BP",
        "S3",
    }
    assert abbreviations("I21.02 is a code of chapter 9, and A41 a category") == set()
    assert len(collected()) > 200


def test_entries_are_short_and_in_order_and_have_an_anchor_of_their_own() -> None:
    anchors = [entry["anchor"] for entry in ENTRIES]
    assert len(anchors) == len(set(anchors)) > 300
    assert all(re.fullmatch(r"[a-z0-9-]+", anchor) for anchor in anchors)
    for entry in ENTRIES:
        assert len(entry["meaning"]) <= 200, f"{entry['anchor']}: over two lines"
    for section in ("Terms", "Clinical abbreviations"):
        names = [
            re.sub(r"[^a-z0-9 ]", "", ", ".join(e["names"]).lower()).strip()
            for e in ENTRIES
            if e["section"] == section
        ]
        assert len(names) > 100 and names == sorted(names)
    rows = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line[:3] == "| <"]
    assert len(rows) == len(ENTRIES), "a row that is not read by this test"


def test_no_name_is_explained_twice_in_one_section() -> None:
    for section in ("Terms", "Clinical abbreviations"):
        names = [plain(n) for e in ENTRIES if e["section"] == section for n in e["names"]]
        assert len(names) == len(set(names)), {n for n in names if names.count(n) > 1}


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e["section"] == "Terms"], ids=lambda e: e["anchor"]
)
def test_a_term_is_used_where_the_glossary_says(entry: dict[str, Any]) -> None:
    path = (GLOSSARY.parent / entry["link"]).resolve()
    assert entry["link"] and path.is_file(), entry["link"]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = " ".join(cell.source for cell in cells)
    names = [plain(re.sub(r"\(.*", "", name)) for name in entry["names"]]
    assert any(name in plain(text) for name in names), f"{path.name} has none of {names}"


def test_the_numbers_in_the_glossary_are_those_of_the_code() -> None:
    from helpers import casebook, models, profiles, rewards, traces

    meaning = {e["anchor"]: e["meaning"] for e in ENTRIES}
    assert f"{len(casebook.casebook().codes)} codes" in meaning["casebook"]
    assert f"{traces.HABIT:.0%}".replace("%", " %") in meaning["habit"]
    tiny = profiles.get("tiny").grpo
    assert f"{tiny['num_generations']} in the course" in meaning["group"]
    assert tiny["beta"] == 0 and "0 in the course's profile" in meaning["beta"]
    paid = (rewards.EXACT, rewards.CATEGORY, rewards.CHAPTER, rewards.WRONG)
    for value in paid:
        assert f"{value:g} for" in meaning["hierarchical-reward"]
    assert f"{rewards.UNUSABLE:g} for".replace("-", "−") in meaning["hierarchical-reward"]
    assert all(name in meaning["profile"] for name in profiles.PROFILES)
    assert f"{models.tiny_manifest()['parameters'] / 1e6:.1f} million" in meaning["qwen2"]


def test_the_readme_and_the_first_notebooks_link_it() -> None:
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    for name in LINKING:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        head = nbformat.read(path, as_version=4).cells[0].source
        assert "(../docs/glossary.md)" in head, name
        assert f"({places.REPOSITORY}/blob/main/docs/glossary.md)" in head, "Colab has no docs/"


@pytest.mark.parametrize("name", ["docs/glossary.md", "docs/diagrams/README.md", "README.md"])
def test_links_to_files_and_anchors_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name}: {link}"
        if anchor:
            lines = target.read_text(encoding="utf-8").splitlines()
            titles = {
                line.lstrip("# ").lower().replace(" ", "-") for line in lines if line[:1] == "#"
            }
            assert anchor in titles or f'id="{anchor}"' in "".join(lines), f"{name}: {link}"
