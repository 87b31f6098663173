"""The synthetic hospital: files in MIMIC-IV's format, whole or not at all, and no shortcut."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import hospital, icd, notes
from tests import notebook_code

COLUMNS = {
    "hosp/patients": "subject_id gender anchor_age anchor_year anchor_year_group dod",
    "hosp/admissions": "subject_id hadm_id admittime dischtime deathtime admission_type "
    "admit_provider_id admission_location discharge_location insurance language marital_status "
    "race edregtime edouttime hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id hadm_id seq_num icd_code icd_version",
    "hosp/d_icd_diagnoses": "icd_code icd_version long_title",
    "note/discharge": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
}
FROZEN = "6e235e723892f342c2a4def846415840650c1466bac8e9c56b3fd85125d637c5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospital.write(tmp_path_factory.mktemp("h") / "hospital", admissions=1500, seed=3)


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv.gz", dtype={"icd_code": str})


def content(folder: Path) -> bytes:
    return b"".join(gzip.open(path).read() for path in sorted(folder.rglob("*.csv.gz")))


@pytest.mark.parametrize("name", COLUMNS)
def test_files_have_the_columns_of_mimic(folder: Path, name: str) -> None:
    assert list(table(folder, name)) == COLUMNS[name].split()


def test_files_have_the_disorder_of_the_real_thing(folder: Path) -> None:
    diagnoses, discharge = table(folder, "hosp/diagnoses_icd"), table(folder, "note/discharge")
    stays = table(folder, "hosp/admissions")
    assert set(diagnoses["icd_version"]) == {9, 10}
    assert diagnoses["seq_num"].max() > 1
    assert diagnoses["icd_code"].str.contains(" ").any(), "some codes are space-padded"
    assert diagnoses.groupby("hadm_id")["seq_num"].min().max() == 2, "some lack a principal one"
    assert stays["subject_id"].duplicated().any()
    assert not set(stays["hadm_id"]) <= set(discharge["hadm_id"]), "some admissions have no note"
    assert discharge["hadm_id"].duplicated().any(), "some have several"
    assert discharge["text"].str.endswith("No change.\n").any()
    assert discharge["text"].str.startswith("Discharge Disposition").any()
    assert discharge["text"].str.contains("seen here before").any(), "some are copied forward"
    assert discharge["text"].str.contains("___").all()


def test_every_code_has_a_title_in_the_dictionary(folder: Path) -> None:
    diagnoses, dictionary = (
        table(folder, f"hosp/{name}") for name in ("diagnoses_icd", "d_icd_diagnoses")
    )
    diagnoses["icd_code"] = diagnoses["icd_code"].str.strip()
    joined = diagnoses.merge(dictionary, on=["icd_code", "icd_version"], how="left")
    assert joined["long_title"].notna().all() and len(joined) == len(diagnoses)


def test_the_hospital_is_the_frozen_one(tmp_path: Path) -> None:
    """The base weights and the study's results belong to it, whatever the packing of the bytes."""
    out = hospital.write(tmp_path / "h", admissions=60, seed=5)
    assert hashlib.sha256(content(out)).hexdigest() == FROZEN


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_hospital(
    tmp_path: Path,
) -> None:
    seeds = {"a": 5, "b": 5, "c": 6}
    a, b, c = (
        hospital.write(tmp_path / name, admissions=60, seed=seed) for name, seed in seeds.items()
    )
    for name in ("hosp/diagnoses_icd.csv.gz", "note/discharge.csv.gz", "hosp/patients.csv.gz"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
        assert (a / name).read_bytes() != (c / name).read_bytes()


@pytest.mark.parametrize("fate", hospital.FATES)
def test_one_admission_is_a_hospital_whatever_becomes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    monkeypatch.setattr(hospital, "FATES", {fate: 1.0})
    out = hospital.write(tmp_path / "h", admissions=1)
    for name, columns in COLUMNS.items():
        assert list(table(out, name)) == columns.split()
    assert len(table(out, "hosp/admissions")) == 1
    expected = {"no note": 0, "addendum": 2}.get(fate, 1)
    assert len(table(out, "note/discharge")) == expected


def test_a_note_that_is_copied_shows_what_the_earlier_admission_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hospital, "FATES", {"copied with a remark": 1.0})
    out = hospital.write(tmp_path / "h", admissions=60, seed=4)
    stays = table(out, "note/discharge").merge(pd.read_parquet(out / "truth/findings.parquet"))
    again = stays[stays["subject_id"].duplicated()]
    assert len(again) > 5
    for stay in again.itertuples():
        first = stays[stays["subject_id"] == stay.subject_id].iloc[0]
        assert stay.text.count("seen here before") > 0
        assert stay.text.replace(" seen here before", "") == first["text"]
        assert (stay.code, list(stay.present)) == (first["code"], list(first["present"]))


def test_full_notes_are_about_as_long_as_mimics() -> None:
    rows = hospital.draw(60, 31)
    words = np.mean([len(text.split()) for text in hospital.summaries(rows, 31, full=True)])
    assert 1200 < words < 1800
    compact = np.mean([len(text.split()) for text in hospital.summaries(rows, 31)])
    assert compact < 300


def test_labelled_notes_have_a_note_and_a_normalised_code_each() -> None:
    scope = {"hospital": hospital, "notes": notes, "icd": icd}
    labelled_notes = notebook_code.function("05", "labelled_notes", **scope)
    texts, codes = labelled_notes(80, 1001)
    assert len(texts) == len(codes) <= 80 and all(texts)
    assert all(code == icd.normalise(code) for code in codes)
    rows = hospital.draw(80, 1001)
    known = [notes.admission_note(text) for text in hospital.summaries(rows, 1001)]
    pairs = {(note, icd.normalise(row["code"])) for note, row in zip(known, rows, strict=True)}
    assert set(zip(texts, codes, strict=True)) == {pair for pair in pairs if pair[0]}
    assert labelled_notes(0) == ([], [])


def test_a_folder_with_other_files_is_never_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "mimic" / "hosp"
    precious.mkdir(parents=True)
    (precious / "patients.csv").write_text("do not lose me")
    with pytest.raises(ValueError, match="nothing was overwritten"):
        hospital.write(tmp_path / "mimic", admissions=5)
    assert (precious / "patients.csv").read_text() == "do not lose me"
    assert [path.name for path in tmp_path.iterdir()] == ["mimic"], "refused before any work"


def test_an_empty_folder_and_an_older_hospital_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    for seed in (1, 2):
        out = hospital.write(tmp_path / "h", admissions=5, seed=seed)
        assert out == tmp_path / "h"
    other = hospital.write(tmp_path / "other", admissions=5, seed=2)
    assert content(out) == content(other)


def test_a_hospital_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hospital.write(tmp_path / "x", admissions=0)


@pytest.mark.parametrize(
    "step", ["pandas.DataFrame.to_csv", "pandas.DataFrame.to_parquet", "pathlib.Path.write_text"]
)
def test_nothing_half_written_is_left_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    older = hospital.write(tmp_path / "older", admissions=5)
    before = content(older)
    monkeypatch.setattr(step, fails)
    for out in (tmp_path / "h", older):
        with pytest.raises(OSError, match="disk full"):
            hospital.write(out, admissions=20)
    assert not (tmp_path / "h").exists() and content(older) == before


def test_the_command_writes_what_the_function_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tmp_path / "a"), "--admissions", "7", "--seed", "2", "--full"]
    monkeypatch.setattr(sys, "argv", ["hospital", *arguments])
    hospital.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "a")
    other = hospital.write(tmp_path / "b", admissions=7, seed=2, full=True)
    assert content(tmp_path / "a") == content(other)


@pytest.mark.slow
def test_no_shortcut_exists() -> None:
    """Length, section presence, style and boilerplate alone must not tell the code: within 2 points
    of the majority class."""
    from sklearn.ensemble import RandomForestClassifier

    heads = ("CC", "HPI", "PMH", "MEDS", "ALLERGIES", "SOCIAL", "FAMILY", "EXAM")
    stock = ("NKDA", "None", "unremarkable", "lives with family", "non-contributory")
    gains = []
    for seed in (21, 22, 23):
        rows = hospital.draw(6000, seed)
        features = []
        for row, text in zip(rows, hospital.summaries(rows, seed), strict=True):
            note = notes.admission_note(text)
            lengths = [len(note), note.count(","), note.count("\n"), row["author"]]
            present = [phrase in note for phrase in stock]
            headed = [f"\n{head}:" in "\n" + note for head in heads]
            features.append([*lengths, *present, *headed])
        x = np.array(features, dtype=float)
        codes = np.array([row["code"] for row in rows])
        forest = RandomForestClassifier(200, min_samples_leaf=20, random_state=0, n_jobs=1)
        forest.fit(x[:4000], codes[:4000])
        majority = (codes[4000:] == pd.Series(codes[:4000]).mode()[0]).mean()
        gains.append((forest.predict(x[4000:]) == codes[4000:]).mean() - majority)
    assert np.mean(gains) < 0.02, gains
