"""The synthetic hospital: files in MIMIC-IV's format, a known law, an exact posterior, and no shortcut."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import icd, notes, synthetic
from helpers.synthetic import Shown

BOOK = synthetic.casebook()
COLUMNS_OF_PATIENTS = [
    "subject_id",
    "gender",
    "anchor_age",
    "anchor_year",
    "anchor_year_group",
    "dod",
]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_hospital(
        tmp_path_factory.mktemp("h") / "hospital", admissions=1500, seed=3
    )


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv.gz", dtype={"icd_code": str})


def test_the_casebook_is_rich_and_made_of_real_billable_codes() -> None:
    import simple_icd_10_cm as library

    assert len(BOOK.codes) >= 120
    assert len({icd.category(c) for c in BOOK.codes}) >= 50
    assert len({icd.chapter(c) for c in BOOK.codes}) >= 18
    assert all(library.is_leaf(c) for c in BOOK.codes)
    assert BOOK.prior.min() >= 0.003
    assert BOOK.prior.sum() == pytest.approx(1)


def test_phrases_can_be_read_back_unambiguously() -> None:
    owner: dict[str, str] = {}
    for name, record in BOOK.findings.items():
        for phrase in (*record["phrases"], *record.get("denied", ())):
            assert owner.setdefault(phrase.lower(), name) == name, (
                f"{phrase!r} belongs to two findings"
            )
        for phrase in record["phrases"]:
            assert [(f, present) for f, present, _, _ in synthetic.read_findings(phrase)] == [
                (name, True)
            ], phrase
            assert not set(phrase) & set(",;"), f"{phrase!r} would be split in a rationale"


def test_unspecified_siblings_stand_in_the_same_category() -> None:
    pairs = [
        (code, entry["unspecified"])
        for code, entry in BOOK.entries.items()
        if "unspecified" in entry
    ]
    assert len(pairs) >= 20
    for code, sibling in pairs:
        assert icd.category(code) == icd.category(sibling)
        assert icd.is_valid(sibling)
        assert sibling != code


def test_files_have_the_columns_of_mimic_and_the_disorder_of_the_real_thing(hospital: Path) -> None:
    assert list(table(hospital, "hosp/diagnoses_icd")) == [
        "subject_id",
        "hadm_id",
        "seq_num",
        "icd_code",
        "icd_version",
    ]
    assert list(table(hospital, "note/discharge")) == [
        "note_id",
        "subject_id",
        "hadm_id",
        "note_type",
        "note_seq",
        "charttime",
        "storetime",
        "text",
    ]
    assert list(table(hospital, "hosp/d_icd_diagnoses")) == [
        "icd_code",
        "icd_version",
        "long_title",
    ]
    assert list(table(hospital, "hosp/patients")) == COLUMNS_OF_PATIENTS
    diagnoses, discharge = table(hospital, "hosp/diagnoses_icd"), table(hospital, "note/discharge")
    stays = table(hospital, "hosp/admissions")
    assert set(diagnoses["icd_version"]) == {9, 10}
    assert diagnoses["seq_num"].max() > 1
    assert diagnoses["icd_code"].str.contains(" ").any(), (
        "some codes are space-padded, as in MIMIC-IV"
    )
    assert stays["subject_id"].duplicated().any()
    assert not set(stays["hadm_id"]) <= set(discharge["hadm_id"]), "some admissions have no note"
    assert discharge["hadm_id"].duplicated().any(), "some have several"
    assert discharge["text"].str.contains("___").all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_hospital(
    tmp_path: Path,
) -> None:
    a, b, c = (
        synthetic.write_hospital(tmp_path / name, admissions=60, seed=seed)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    for name in ("hosp/diagnoses_icd.csv.gz", "note/discharge.csv.gz", "hosp/patients.csv.gz"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
        assert (a / name).read_bytes() != (c / name).read_bytes()


def test_drawn_findings_follow_the_casebook() -> None:
    rows = synthetic.draw(4000, 11)
    index = {name: i for i, name in enumerate(BOOK.names)}
    seen, expected = np.zeros(len(BOOK.names)), np.zeros(len(BOOK.names))
    for row in rows:
        seen[[index[name] for name in row["drawn"]]] += 1
        expected += BOOK.p_finding[BOOK.codes.index(row["code"])]
    common = expected > 20
    z = (seen - expected)[common] / np.sqrt(expected[common])
    assert np.abs(z).max() < 4.5
    assert abs(z.mean()) < 0.3


def test_findings_of_one_slot_exclude_each_other() -> None:
    slot = dict(zip(BOOK.names, BOOK.slot, strict=True))
    for row in synthetic.draw(800, 12):
        taken = [slot[name] for name in row["drawn"]]
        assert len(taken) == len(set(taken))


def test_posterior_agrees_with_a_plain_loop_over_bayes_rule() -> None:
    """Another way to the same number: one slot after the other, straight from the definition."""
    for row in synthetic.draw(12, 13):
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
            for s in range(BOOK.slot.max() + 1):
                members = np.flatnonzero(BOOK.slot == s)
                if BOOK.section[members[0]] in row["missing"]:
                    continue
                there = BOOK.p_finding[c, members].sum()
                stated = [j for j in members if BOOK.names[j] in row["present"]]
                deny = synthetic.DENY if BOOK.deniable[members].any() else 0.0
                if stated:
                    p *= BOOK.p_finding[c, stated[0]] * synthetic.MENTION
                elif BOOK.names[members[0]] in row["denied"]:
                    p *= (1 - there) * deny
                else:
                    p *= there * (1 - synthetic.MENTION) + (1 - there) * (1 - deny)
            weight[c] = p
        np.testing.assert_allclose(
            synthetic.posterior(shown), weight / weight.sum(), rtol=1e-6, atol=1e-12
        )


def test_the_ideal_reader_is_as_accurate_as_it_expects_to_be(hospital: Path) -> None:
    ideal = synthetic.ideal_reader(hospital)
    truth = pd.read_parquet(hospital / "truth" / "findings.parquet").set_index("hadm_id")
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


def test_what_can_be_read_in_the_note_is_what_the_truth_says(hospital: Path) -> None:
    truth = pd.read_parquet(hospital / "truth" / "findings.parquet").set_index("hadm_id")
    discharge = table(hospital, "note/discharge").drop_duplicates("hadm_id")
    found = there = wrong = 0
    for row in discharge.head(400).itertuples():
        note = notes.admission_note(row.text)
        if not note:
            continue
        shown, _ = synthetic.read(note)
        expected = set(truth.loc[row.hadm_id, "present"])
        found, there, wrong = (
            found + len(expected & set(shown.present)),
            there + len(expected),
            wrong + len(set(shown.present) - expected),
        )
    assert found / there > 0.98, "typos hide a few findings, not many"
    assert wrong / there < 0.01


@pytest.mark.slow
def test_no_shortcut_exists(tmp_path: Path) -> None:
    """Length, section presence, style and boilerplate alone must not tell the code: within 2 points of the majority class."""
    from sklearn.ensemble import RandomForestClassifier

    heads = ("CC", "HPI", "PMH", "MEDS", "ALLERGIES", "SOCIAL", "FAMILY", "EXAM")
    stock = ("NKDA", "None", "unremarkable", "lives with family", "non-contributory")
    gains = []
    for seed in (21, 22, 23):
        rows = synthetic.draw(6000, seed)
        admission = [notes.admission_note(text) for text in synthetic.summaries(rows, seed)]
        features = np.array(
            [
                [
                    len(note),
                    note.count(","),
                    note.count("\n"),
                    row["author"],
                    *(s in note for s in stock),
                    *(f"\n{h}:" in "\n" + note for h in heads),
                ]
                for note, row in zip(admission, rows, strict=True)
            ],
            dtype=float,
        )
        codes = np.array([row["code"] for row in rows])
        forest = RandomForestClassifier(200, min_samples_leaf=20, random_state=0, n_jobs=1).fit(
            features[:4000], codes[:4000]
        )
        majority = (codes[4000:] == pd.Series(codes[:4000]).mode()[0]).mean()
        gains.append((forest.predict(features[4000:]) == codes[4000:]).mean() - majority)
    assert np.mean(gains) < 0.02, gains


def test_full_notes_are_about_as_long_as_mimics() -> None:
    rows = synthetic.draw(60, 31)
    words = np.mean([len(text.split()) for text in synthetic.summaries(rows, 31, full=True)])
    assert 1200 < words < 1800
    compact = np.mean([len(text.split()) for text in synthetic.summaries(rows, 31)])
    assert compact < 300


def test_a_folder_with_other_files_is_never_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "mimic" / "hosp"
    precious.mkdir(parents=True)
    (precious / "patients.csv").write_text("do not lose me")
    with pytest.raises(ValueError, match="nothing was overwritten"):
        synthetic.write_hospital(tmp_path / "mimic", admissions=5)
    assert (precious / "patients.csv").read_text() == "do not lose me"


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        synthetic.write_hospital(tmp_path / "x", admissions=0)
    with pytest.raises(FileNotFoundError, match="only a synthetic hospital"):
        synthetic.ideal_reader(tmp_path)
    hospital = synthetic.write_hospital(tmp_path / "h", admissions=5)
    manifest = hospital / "truth" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"casebook_sha256": "other"}))
    with pytest.raises(ValueError, match="another casebook"):
        synthetic.ideal_reader(hospital)


FINDING = "findings: {a: {section: %s, phrases: [x]}}\n"
CODE = "codes: {I21.4: {weight: 1, age: [60, 9], male: 0.5, complaint: {p: 1}, findings: {%s}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FINDING % "hpi" + CODE % "nope: 0.5", "nope"),
        (FINDING % "hpi" + CODE % "a: 1.5", "outside"),
        (FINDING % "somewhere" + CODE % "a: 0.5", "section"),
    ],
)
def test_a_faulty_casebook_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "faulty.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        synthetic.casebook(tmp_path)
    assert "faulty.yaml" in str(error.value)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(BOOK.names), max_size=12, unique=True),
    st.sampled_from(["M", "F", None]),
)
def test_a_posterior_is_a_distribution_whatever_is_shown(
    present: list[str], sex: str | None
) -> None:
    belief = synthetic.posterior(Shown(tuple(present), sex=sex))
    assert belief.shape == (len(BOOK.codes),)
    assert np.isfinite(belief).all()
    assert belief.sum() == pytest.approx(1)
    assert (belief >= 0).all()


def test_nothing_half_written_is_left_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(gzip, "GzipFile", fails)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_hospital(tmp_path / "h", admissions=20)
    assert not (tmp_path / "h").exists()


def test_the_casebook_is_the_frozen_one() -> None:
    """The base weights and the study's results belong to it: a change is a new version, new weights and new results."""
    folder = Path(synthetic.__file__).parent
    said = (folder / "casebook" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\*\*Version (\d+)\*\*.*?sha256 of its files `([0-9a-f]{64})`", said, re.S)
    manifest = json.loads((folder / "tiny_base/manifest.json").read_text())
    assert found and found[2] == synthetic.casebook().sha256 == manifest["casebook_sha256"]
