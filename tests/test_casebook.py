"""The casebook: sound data, a known law, an exact posterior, and a reader of phrases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import casebook, hospital, icd, notes
from helpers.casebook import Shown

BOOK = casebook.casebook()
FOLDER = Path(casebook.__file__).parent
FIELDS = {
    "weight",
    "age",
    "male",
    "complaint",
    "findings",
    "course",
    "procedure",
    "discharge_meds",
    "secondary",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospital.write(tmp_path_factory.mktemp("h") / "hospital", admissions=1500, seed=3)


# --- the data -----------------------------------------------------------------------------------


class Strict(yaml.SafeLoader):
    """YAML in which a key that stands twice in one map is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"'{key}' stands twice in one map")
        return super().construct_mapping(node, deep)


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a casebook: file, entry and fault."""
    tables: dict[str, dict[str, Any]] = {"findings": {}, "codes": {}}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Strict)
        except ValueError as error:
            yield f"{path.name}: {error}"
            continue
        for kind, table in tables.items():
            for key, record in content[kind].items():
                if key in table:
                    yield f"{path.name}: '{key}' stands in the casebook twice"
                table[key] = record | {"file": path.name}
    findings = tables["findings"]
    sections: dict[str, str] = {}
    for name, record in findings.items():
        where = f"{record['file']}: finding '{name}'"
        if record["section"] not in casebook.SECTIONS:
            yield f"{where}: section '{record['section']}' is unknown"
        if sections.setdefault(record.get("slot", name), record["section"]) != record["section"]:
            yield f"{where}: a slot stands in one section"
        if not 0 <= record.get("background", 0) < 1:
            yield f"{where}: background {record['background']} is outside [0, 1)"
        if not record["phrases"]:
            yield f"{where}: there are no words for it"
    for code, entry in tables["codes"].items():
        where = f"{entry['file']}: {code}"
        if lacking := FIELDS - set(entry):
            yield f"{where}: {', '.join(sorted(lacking))} is missing"
            continue
        for name, p in entry["findings"].items():
            if name not in findings:
                yield f"{where}: finding '{name}' is unknown"
            if not 0 < p < 1:
                yield f"{where}: finding '{name}': {p} is outside (0, 1)"
        if not 0 <= entry["male"] <= 1 or entry["weight"] <= 0 or entry["age"][1] <= 0:
            yield f"{where}: male, weight or age is impossible"
        if sum(entry["complaint"].values()) != pytest.approx(1):
            yield f"{where}: the complaints do not sum to 1"
        if code in entry["secondary"] or not all(map(icd.is_valid, [code, *entry["secondary"]])):
            yield f"{where}: the secondary codes hold its own, or one that does not exist"


FINDING = "findings: {a: {section: %s, phrases: [x]}}\n"
CODE = (
    "codes: {I21.4: {weight: 1, age: [60, 9], male: 0.5, complaint: {p: 1}, findings: {%s},"
    " course: [x], procedure: [], discharge_meds: [x], secondary: [I10]}}"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FINDING % "hpi" + CODE % "nope: 0.5", "nope"),
        (FINDING % "hpi" + CODE % "a: 1.5", "outside"),
        (FINDING % "hpi" + CODE % "a: 0", "outside"),
        (FINDING % "hpi" + CODE % "a: 0.5, a: 0.6", "'a' stands twice in one map"),
        (FINDING % "somewhere" + CODE % "a: 0.5", "section"),
        (FINDING % "hpi" + (CODE % "a: 0.5").replace("[I10]", "[I21.4]"), "its own"),
        (FINDING % "hpi" + (CODE % "a: 0.5").replace("p: 1}", "p: 0.9}"), "sum to 1"),
        (FINDING % "hpi" + (CODE % "a: 0.5").replace("male: 0.5,", ""), "male is missing"),
    ],
)
def test_a_faulty_casebook_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "faulty.yaml").write_text(text)
    (fault,) = faults(tmp_path)
    assert message in fault and "faulty.yaml" in fault


def test_what_stands_in_two_files_is_named(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(FINDING % "hpi" + CODE % "a: 0.5")
    assert [fault.partition("'")[0] for fault in faults(tmp_path)] == ["b.yaml: ", "b.yaml: "]


def test_the_casebook_has_no_fault() -> None:
    assert not [*faults(FOLDER)]
    total = np.stack([np.bincount(BOOK.slot, weights=row) for row in BOOK.p_finding])
    assert total.max() < 1, "a slot of this diagnosis is fuller than a wheel"


def test_the_casebook_is_rich_and_made_of_real_billable_codes() -> None:
    import simple_icd_10_cm as library

    assert len(BOOK.codes) >= 120
    assert len({icd.category(c) for c in BOOK.codes}) >= 50
    assert len({icd.chapter(c) for c in BOOK.codes}) >= 18
    assert all(library.is_leaf(c) for c in BOOK.codes)
    assert BOOK.prior.min() >= 0.003
    assert BOOK.prior.sum() == pytest.approx(1)


def test_unspecified_siblings_stand_in_the_same_category() -> None:
    entries = BOOK.entries.items()
    pairs = [(code, entry["unspecified"]) for code, entry in entries if "unspecified" in entry]
    assert len(pairs) >= 20
    for code, sibling in pairs:
        assert icd.category(code) == icd.category(sibling)
        assert icd.is_valid(sibling)
        assert sibling != code


def test_the_casebook_is_the_frozen_one() -> None:
    """The base weights and the study's results belong to it: a change means new ones of both."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\*\*Version (\d+)\*\*.*?sha256 of its files `([0-9a-f]{64})`", text, re.S)
    manifest = json.loads((FOLDER.parent / "tiny_base/manifest.json").read_text())
    assert stated and stated[2] == BOOK.sha256 == manifest["casebook_sha256"]


# --- the law ------------------------------------------------------------------------------------


def test_drawn_findings_follow_the_casebook() -> None:
    rows = hospital.draw(4000, 11)
    seen, expected = np.zeros(len(BOOK.names)), np.zeros(len(BOOK.names))
    for row in rows:
        seen[[BOOK.index[name] for name in row["drawn"]]] += 1
        expected += BOOK.p_finding[BOOK.codes.index(row["code"])]
    common = expected > 20
    z = (seen - expected)[common] / np.sqrt(expected[common])
    assert np.abs(z).max() < 4.5
    assert abs(z.mean()) < 0.3


def test_findings_of_one_slot_exclude_each_other() -> None:
    for row in hospital.draw(800, 12):
        taken = [BOOK.slot[BOOK.index[name]] for name in row["drawn"]]
        assert len(taken) == len(set(taken))


def test_the_arcs_of_a_slot_lie_side_by_side_on_its_wheel() -> None:
    for slot in range(BOOK.slot.max() + 1):
        members = np.flatnonzero(BOOK.slot == slot)
        begin, end = BOOK.low[:, members], (BOOK.low + BOOK.p_finding)[:, members]
        assert (begin[:, 0] == 0).all() and (end[:, -1] < 1).all()
        np.testing.assert_array_equal(begin[:, 1:], end[:, :-1])


def test_what_a_wheel_shows_is_the_finding_on_whose_arc_it_stops() -> None:
    code = BOOK.codes[7]
    shared = np.flatnonzero(np.bincount(BOOK.slot) > 1)
    first, second = np.flatnonzero(BOOK.slot == shared[0])[:2]
    spins = np.full(BOOK.slot.max() + 1, 1 - 1e-9)  # beyond all arcs
    nothing = casebook.draw_note(code, spins, np.random.default_rng(0))
    assert nothing["drawn"] == nothing["present"] == []
    for stop, names in ((0.0, [first]), (BOOK.low[7, second], [second])):
        spins[shared[0]] = stop
        note = casebook.draw_note(code, spins, np.random.default_rng(0))
        assert note["drawn"] == [BOOK.names[i] for i in names]


def test_readmissions_keep_the_sex_and_stay_near_the_age() -> None:
    for sex, age in (("M", 30.0), ("F", 88.0)):
        prior = casebook.prior_given(sex, age)
        impossible = BOOK.male == (0 if sex == "M" else 1)
        assert prior.sum() == pytest.approx(1) and (prior[impossible] == 0).all()
        assert abs(prior @ BOOK.age[:, 0] - age) < abs(BOOK.prior @ BOOK.age[:, 0] - age)


# --- what follows from a text -------------------------------------------------------------------


def test_posterior_agrees_with_a_plain_loop_over_bayes_rule() -> None:
    """Another way to the same number: one slot after the other, straight from the definition."""
    slots = [np.flatnonzero(BOOK.slot == s) for s in range(BOOK.slot.max() + 1)]
    for row in hospital.draw(4, 13):
        shown = Shown(
            tuple(row["present"]),
            tuple(row["denied"]),
            tuple(row["missing"]),
            row["complaint"],
            row["sex"],
        )
        weight = np.zeros(len(BOOK.codes))
        for c in range(len(BOOK.codes)):
            p = BOOK.prior[c] * (BOOK.male[c] if row["sex"] == "M" else 1 - BOOK.male[c])
            if row["complaint"] is not None:
                p *= BOOK.p_complaint[c, BOOK.complaints.index(row["complaint"])]
            for members in slots:
                if BOOK.section[members[0]] in row["missing"]:
                    continue
                there = BOOK.p_finding[c, members].sum()
                stated = [j for j in members if BOOK.names[j] in row["present"]]
                deny = BOOK.deny[members].sum()
                if stated:
                    p *= BOOK.p_finding[c, stated[0]] * casebook.MENTION
                elif BOOK.names[members[0]] in row["denied"]:
                    p *= (1 - there) * deny
                else:
                    p *= there * (1 - casebook.MENTION) + (1 - there) * (1 - deny)
            weight[c] = p
        expected = weight / weight.sum()
        np.testing.assert_allclose(casebook.posterior(shown), expected, rtol=1e-6, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(BOOK.names), max_size=12, unique=True),
    st.sampled_from(["M", "F", None]),
)
def test_a_posterior_is_a_distribution_whatever_is_shown(
    present: list[str], sex: str | None
) -> None:
    belief = casebook.posterior(Shown(tuple(present), sex=sex))
    assert belief.shape == (len(BOOK.codes),)
    assert np.isfinite(belief).all()
    assert belief.sum() == pytest.approx(1)
    assert (belief >= 0).all()


def test_evidence_is_what_the_code_makes_likelier_than_it_is_anyway() -> None:
    code = next(code for code, entry in BOOK.entries.items() if "unspecified" in entry)
    spans = dict.fromkeys(BOOK.names, "x")
    row = BOOK.p_finding[BOOK.codes.index(code)]
    lift = dict(zip(BOOK.names, np.log(row / (BOOK.prior @ BOOK.p_finding)), strict=True))
    cited, detail = casebook.evidence(code, spans, 5)
    assert len(cited) == 5 and detail in cited
    assert [lift[name] for name in cited] == sorted(lift.values(), reverse=True)[:5]
    everything, _ = casebook.evidence(code, spans, len(spans))
    assert set(everything) == {name for name, value in lift.items() if value > 0.5}
    assert casebook.evidence(code, {}, 5) == ([], "")
    alone = next(code for code, entry in BOOK.entries.items() if "unspecified" not in entry)
    assert casebook.evidence(alone, spans, 5)[1] == ""


def test_phrases_can_be_read_back_unambiguously() -> None:
    owner: dict[str, str] = {}
    for name, record in BOOK.findings.items():
        for phrase in (*record["phrases"], *record.get("denied", ())):
            other = owner.setdefault(phrase.lower(), name)
            assert other == name, f"{phrase!r} belongs to two findings"
        for phrase in record["phrases"]:
            mentions = casebook.read_findings(phrase)
            assert [(m.finding, m.present) for m in mentions] == [(name, True)], phrase
            assert not set(phrase) & set(",;"), f"{phrase!r} would be split in a rationale"


def test_what_can_be_read_in_the_note_is_what_the_truth_says(folder: Path) -> None:
    truth = pd.read_parquet(folder / "truth" / "findings.parquet").set_index("hadm_id")
    discharge = pd.read_csv(folder / "note/discharge.csv.gz").drop_duplicates("hadm_id")
    right = there = wrong = 0
    for row in discharge.head(400).itertuples():
        note = notes.admission_note(row.text)
        if not note:
            continue
        shown, spans = casebook.read(note)
        expected = set(truth.loc[row.hadm_id, "present"])
        right += len(expected & set(shown.present))
        wrong += len(set(shown.present) - expected)
        there += len(expected)
        assert all(words in note for words in spans.values())
    assert right / there > 0.98, "typos hide a few findings, not many"
    assert wrong / there < 0.01


# --- the ideal reader ---------------------------------------------------------------------------


def test_the_ideal_reader_is_as_accurate_as_it_expects_to_be(folder: Path) -> None:
    ideal = casebook.ideal_reader(folder)
    truth = pd.read_parquet(folder / "truth" / "findings.parquet").set_index("hadm_id")
    gold = truth.loc[ideal.index, "code"].map(icd.normalise)
    for level, label in (
        ("full", gold),
        ("category", gold.map(icd.category)),
        ("chapter", gold.map(icd.chapter)),
    ):
        right, expected = (ideal[level] == label).mean(), ideal[f"{level}_p"].mean()
        error = np.sqrt((ideal[f"{level}_p"] * (1 - ideal[f"{level}_p"])).sum()) / len(ideal)
        assert abs(right - expected) < 4 * error, level
    assert ideal["full_p"].mean() < ideal["category_p"].mean() < ideal["chapter_p"].mean() < 1


def test_the_ideal_reader_says_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="only a synthetic hospital"):
        casebook.ideal_reader(tmp_path)
    out = hospital.write(tmp_path / "h", admissions=5)
    manifest = out / "truth" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"casebook_sha256": "other"}))
    with pytest.raises(ValueError, match="another casebook"):
        casebook.ideal_reader(out)


def test_the_ideal_reader_reads_what_is_there_now(tmp_path: Path) -> None:
    """It was kept by the folder's name: a hospital written anew got the old answers."""
    out = hospital.write(tmp_path / "h", admissions=20, seed=1)
    first = casebook.ideal_reader(out)
    first["full"] = "spoiled by a caller"
    assert not (casebook.ideal_reader(out)["full"] == "spoiled by a caller").any()
    hospital.write(out, admissions=25, seed=2)
    assert len(casebook.ideal_reader(out)) == 25
