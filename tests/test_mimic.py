"""Raw files to cases: labels, filters, split, scale and unfit input. The folders are written by tests/mimic_fixture.py."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import mimic, notes
from tests import mimic_fixture as fixture

ROOT = Path(__file__).parents[1]
Tables = dict[str, list[list]]


@pytest.fixture
def hospital() -> Tables:
    return fixture.tables(40, words=120)


def build(tmp_path: Path, content: Tables, **options) -> pd.DataFrame:
    return mimic.build_cases(fixture.write_folder(tmp_path / "data", content), **options)


def reasons(cases: pd.DataFrame, part: str) -> int:
    """How many rows were left out for reasons whose text holds `part`."""
    return sum(n for reason, n in cases.attrs["skipped"].items() if part in reason)


def principals(hospital: Tables) -> list[list]:
    return [row for row in hospital["hosp/diagnoses_icd"] if row[2] == 1]


def test_table_and_funnel(tmp_path: Path, hospital: Tables) -> None:
    cases = build(tmp_path, hospital)
    assert list(cases) == mimic.COLUMNS
    kinds = {name: str(kind) for name, kind in cases.dtypes.items()}
    assert {kinds[name] for name in ("subject_id", "hadm_id", "chapter", "note_words")} == {"int64"}
    assert kinds["seen_in_train"] == "bool"
    n = len(hospital["hosp/admissions"])
    assert len(cases) == n and cases["hadm_id"].is_unique
    assert list(cases.attrs["funnel"].values()) == [n] * 9
    assert cases.attrs["skipped"] == {}
    gold = {row[1]: row[3] for row in principals(hospital)}
    assert dict(zip(cases["hadm_id"], cases["code"], strict=True)) == gold
    assert (cases["category"] == cases["code"].str[:3]).all()
    assert set(cases["split"]) == set(mimic.SPLITS)
    assert not cases["note"].str.contains("later").any()
    assert (cases["note_words"] == cases["note"].str.split().str.len()).all()


def test_plain_files_command_line_and_metadata(tmp_path: Path, hospital: Tables) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital, zipped=False)
    out = tmp_path / "new" / "cases.parquet"
    command = [sys.executable, "-m", "helpers.mimic"]
    done = subprocess.run([*command, data, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = mimic.build_cases(data)
    pd.testing.assert_frame_equal(pd.read_parquet(out), cases)
    assert mimic.read_counts(out) == cases.attrs and str(len(cases)) in done.stdout
    assert [p.name for p in out.parent.iterdir()] == ["cases.parquet"]
    nowhere = [*command, tmp_path / "nowhere", out]
    failed = subprocess.run(nowhere, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_a_file_of_cases_larger_than_a_row_group(tmp_path: Path, hospital, monkeypatch) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    monkeypatch.setattr(mimic, "ROW_GROUP", 7)
    mimic.write_cases(data, tmp_path / "cases.parquet")
    cases = pd.read_parquet(tmp_path / "cases.parquet")
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))


def test_counts_are_asked_of_a_file_of_cases(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet was not written by"):
        mimic.read_counts(tmp_path / "other.parquet")


def test_failure_leaves_the_old_file_and_no_rubbish(tmp_path: Path, hospital, monkeypatch) -> None:
    out = tmp_path / "cases.parquet"
    good = fixture.write_folder(tmp_path / "good", hospital)
    mimic.write_cases(good, out)
    before = out.read_bytes()
    bad = fixture.write_folder(tmp_path / "bad", hospital)
    path = bad / "note/discharge.csv.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="end-of-stream marker"):
        mimic.write_cases(bad, out)
    monkeypatch.setattr(mimic.pq.ParquetWriter, "write_table", lambda *_: 1 / 0)  # a full disk
    with pytest.raises(ZeroDivisionError):
        mimic.write_cases(good, out)
    assert out.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"cases.parquet", "good", "bad"}


def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path: Path, hospital) -> None:
    folder = fixture.write_folder(tmp_path / "data", hospital)
    with pytest.raises(ValueError, match="is a folder. Name the file"):
        mimic.write_cases(folder, folder)


def test_many_processes_give_the_same_table(tmp_path: Path, hospital, monkeypatch) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    monkeypatch.setattr(mimic, "CHUNK", 3)
    alone = mimic.build_cases(data, workers=1)
    pd.testing.assert_frame_equal(alone, mimic.build_cases(data, workers=2))


def test_a_fault_is_reported_from_many_processes_as_well(
    tmp_path: Path, hospital, monkeypatch
) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    monkeypatch.setattr(mimic, "CHUNK", 3)
    path = data / "note/discharge.csv.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"discharge\.csv\.gz, near line \d+: .*SHA256SUMS"):
        mimic.build_cases(data, workers=2)


def test_processes_need_no_main_guard_in_the_readers_script(tmp_path: Path, hospital) -> None:
    """With spawn, a plain script without `if __name__ == "__main__":` dies."""
    data = fixture.write_folder(tmp_path / "d", hospital)
    script = tmp_path / "plain.py"
    script.write_text(
        f"from helpers import mimic\nprint(len(mimic.build_cases({str(data)!r}, workers=2)))\n"
    )
    command = [sys.executable, str(script)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(mimic.build_cases(data))


# --- labels -----------------------------------------------------------------------------------


def test_odd_codes(tmp_path: Path, hospital: Tables) -> None:
    spellings = ["I21.01", " i2101", "I2101  ", "i21.01 "]
    rows = principals(hospital)[:8]
    for i, row in enumerate(rows):
        row[2:] = [("1", " 1")[i % 2], spellings[i % 4], ("10", " 10 ")[i // 4]]
    cases = build(tmp_path, hospital).set_index("hadm_id")
    assert (cases.loc[[row[1] for row in rows], "code"] == "I2101").all()


def test_retired_code_counts_by_the_dictionary_alone(tmp_path: Path, hospital: Tables) -> None:
    rows = principals(hospital)
    rows[0][3], rows[1][3], rows[2][3] = "Z9999", "I2101ZZ", "nonsense"
    hospital["hosp/d_icd_diagnoses"].append(["Z99.99", 10, "a code retired long ago"])
    cases = build(tmp_path, hospital)
    assert cases.attrs["funnel"]["coded in ICD-10"] - cases.attrs["funnel"]["valid code"] == 2
    assert cases.set_index("hadm_id").loc[rows[0][1], ["code", "chapter"]].tolist() == ["Z9999", 21]


def test_admissions_without_an_icd10_principal_code(tmp_path: Path, hospital: Tables) -> None:
    rows = principals(hospital)
    for row in rows[:4]:
        row[3:] = ["4019", 9]
    for row in rows[4:7]:
        row[2] = 3
    funnel = build(tmp_path, hospital).attrs["funnel"]
    assert funnel["admissions"] - funnel["one principal diagnosis"] == 3
    assert funnel["one principal diagnosis"] - funnel["coded in ICD-10"] == 4


def test_duplicate_keys(tmp_path: Path, hospital: Tables) -> None:
    rows = principals(hospital)
    hospital["hosp/diagnoses_icd"] += [
        list(rows[0]),
        [*rows[1][:3], "Z515", 10],
        [*rows[2][:4], 9],
    ]
    hospital["hosp/admissions"].append(hospital["hosp/admissions"][0])
    hospital["note/discharge"].append(hospital["note/discharge"][4])
    cases = build(tmp_path, hospital)
    assert len(rows) - len(cases) == 2
    assert not {rows[1][1], rows[2][1]} & set(cases["hadm_id"])
    assert reasons(cases, "principal diagnosis stands twice") == 1
    assert reasons(cases, "one of several principal diagnoses") == 4
    assert reasons(cases, "further note") == 1


# --- filters ----------------------------------------------------------------------------------


def test_filters(tmp_path: Path, hospital: Tables) -> None:
    rows = hospital["note/discharge"]
    gone = rows.pop()[2]
    rows[0][7] = "Discharge Diagnosis:\nonly later things\n"
    rows[1][7] = (
        "Social History:\nlives alone with a cat and a dog in a house by the sea for years\n"
    )
    rows[2][7] = "Chief Complaint:\npain\n"
    rows[3][7] = rows[10][7].replace("\n", "\r\n").replace("Chief Complaint", "CHIEF COMPLAINT")
    cases = build(tmp_path, hospital)
    left = len(hospital["hosp/admissions"])
    assert list(cases.attrs["funnel"].items())[-5:] == [
        ("with a discharge summary", left - 1),
        ("admission note not empty", left - 3),
        ("at least 10 words", left - 4),
        ("no exact duplicate", left - 5),
        ("no near-duplicate of the patient", left - 5),
    ]
    assert not {gone, *(row[2] for row in rows[:3])} & set(cases["hadm_id"])


def test_near_duplicates_of_a_patient(tmp_path: Path, hospital: Tables) -> None:
    rows = hospital["note/discharge"]
    neighbours = zip(rows, rows[1:], strict=False)
    pairs = list({a[1]: (a, b) for a, b in neighbours if a[1] == b[1]}.values())[1:3]
    for a, b in pairs:
        b[7] = a[7].replace("In the ED,", "In the ED, suddenly")
    elsewhere = rows[-1]
    elsewhere[7] = rows[0][7].replace("pain", "ache", 1)  # another patient: not compared
    cases = build(tmp_path, hospital)
    left = set(cases["hadm_id"])
    assert all(a[2] in left and b[2] not in left for a, b in pairs) and elsewhere[2] in left
    assert cases.attrs["funnel"]["no exact duplicate"] - len(cases) == 2


def test_the_pipeline_calls_admission_note_and_nothing_else(
    tmp_path, hospital, monkeypatch
) -> None:
    monkeypatch.setattr(notes, "admission_note", lambda text: "ten words " * 5 + text[-40:])
    cases = build(tmp_path, hospital)
    assert cases["note"].str.startswith("ten words ten words").all()


def test_ids_that_do_not_join(tmp_path: Path, hospital: Tables) -> None:
    rows = hospital["note/discharge"]
    rows[0][2] = 99
    rows[1][1] = 77
    hospital["hosp/diagnoses_icd"] += [[5, 6, 1, "I10", 10], [77, rows[2][2], 1, "I10", 10]]
    cases = build(tmp_path, hospital)
    assert len(rows) - len(cases) == 2
    assert reasons(cases, "note/discharge: of no admission") == 2
    assert reasons(cases, "principal diagnosis of no admission") == 2
    for row in rows:
        row[2] += 10**6
    with pytest.raises(
        ValueError, match=r"no case is left.*'with a discharge summary': 0.*one rel"
    ):
        build(tmp_path, hospital)
    for row in hospital["hosp/admissions"]:
        row[1] += 10**6
    with pytest.raises(ValueError, match="no case is left.*'one principal diagnosis': 0"):
        build(tmp_path, hospital)


def test_nothing_left(tmp_path: Path, hospital: Tables) -> None:
    rows = hospital["note/discharge"]
    subject, hadm = rows[0][1:3]
    for row in rows:
        row[7] = "Discharge Diagnosis:\nlater\n"
    with pytest.raises(ValueError, match=r"no case is left.*'admission note not empty': 0"):
        build(tmp_path, hospital)
    hospital["note/discharge"] = rows[:1]
    for row in hospital["hosp/diagnoses_icd"]:
        row[4] = 9 if row[1] == hadm else 10
    with pytest.raises(ValueError, match="no case is left.*'with a discharge summary': 0"):
        build(tmp_path, hospital)
    for row in hospital["hosp/diagnoses_icd"]:
        row[4] = 9
    with pytest.raises(ValueError, match="no case is left.*'coded in ICD-10': 0"):
        build(tmp_path, hospital)


# --- of several summaries of an admission, one ------------------------------------------------


def further(
    row: list, number: int, text: str, kind: str = "DS", subject: int | None = None
) -> list:
    return [f"{row[0]}-{number}", subject or row[1], row[2], kind, number, "", "", text]


LATER = "Brief Hospital Course:\nlater\n"
SUMMARY = fixture.summary(random.Random(1))
ADDED: dict[str, Callable[[list], list[list]]] = {
    "later ones": lambda row: [further(row, 3, SUMMARY), further(row, 2, SUMMARY)],
    "an empty one before": lambda row: [further(row, 0, LATER)],
    "only sections that are no core before": lambda row: [
        further(row, 0, "Allergies:\nPenicillins\n \nSocial History:\nlives alone by the sea\n")
    ],
    "an addendum before": lambda row: [further(row, 0, SUMMARY, kind="AD")],
    "one of another patient before": lambda row: [further(row, 0, SUMMARY, subject=5)],
    "an empty one and an addendum": lambda row: [
        further(row, 0, LATER),
        further(row, -1, SUMMARY, kind="AD"),
    ],
}


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)
def test_the_case_and_the_audit_are_of_the_same_summary(
    tmp_path: Path, hospital: Tables, added: Callable[[list], list[list]], place: str
) -> None:
    rows = hospital["note/discharge"]
    row = rows[5]
    at = 0 if place == "first" else len(rows)
    rows[at:at] = added(row)
    folder = fixture.write_folder(tmp_path / "data", hospital)
    cases = mimic.build_cases(folder).set_index("hadm_id")
    assert cases.loc[row[2], "note"] == notes.admission_note(row[7])
    assert mimic.texts(folder, [row[2]]) == {row[2]: row[7]}
    assert sum(cases.attrs["skipped"].values()) == len(added(row))


def test_summaries_of_given_admissions(tmp_path: Path, hospital: Tables) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    expected = {row[2]: row[7] for row in hospital["note/discharge"][3:6]}
    assert mimic.texts(data, list(expected)) == expected
    assert mimic.texts(data, pd.Series([*expected, *expected])) == expected
    assert mimic.texts(data, [99]) == mimic.texts(data, []) == {}


# --- split ------------------------------------------------------------------------------------


def test_the_table_does_not_depend_on_the_order_of_rows(tmp_path: Path, hospital: Tables) -> None:
    cases = build(tmp_path, hospital)
    assert (cases.groupby("subject_id")["split"].nunique() == 1).all()
    rng = random.Random(3)
    for rows in hospital.values():
        rng.shuffle(rows)
    pd.testing.assert_frame_equal(cases, build(tmp_path / "again", hospital))
    assert (build(tmp_path, hospital, seed=1)["split"] != cases["split"]).any()


def test_the_splits_of_the_committed_study_stay_as_they_are() -> None:
    subjects = np.arange(24) // 2
    categories = np.array(list("AABACBADAABCDABACEABFAAB"))
    splits = mimic.split_patients(subjects, categories, seed=3)
    initials = {"train": "r", "val": "a", "test": "e"}
    assert "".join(initials[name] for name in splits) == "rrrraaeerrrrrrrrrreerrrr"


def test_seen_in_train(tmp_path: Path, hospital: Tables) -> None:
    cases = build(tmp_path, hospital, shares=(0.3, 0.1, 0.6))
    train = set(cases.loc[cases["split"] == "train", "code"])
    assert (cases["seen_in_train"] == cases["code"].isin(train)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ABCDE")), min_size=1, max_size=120),
    st.integers(0, 5),
)
def test_split_properties(rows: list[tuple[int, str]], seed: int) -> None:
    subjects, categories = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    splits = mimic.split_patients(subjects, categories, seed=seed)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = mimic.split_patients(subjects[order], categories[order], seed=seed)
    assert (shuffled == splits[order]).all()
    assert all(len(set(splits[subjects == s])) == 1 for s in set(subjects.tolist()))
    biggest = max(np.bincount(subjects))
    for name, share in zip(mimic.SPLITS, mimic.SHARES, strict=True):
        assert abs((splits == name).sum() - share * len(rows)) <= 2 * biggest + 1


def test_split_is_stratified_and_rare_codes_reach_the_test_set() -> None:
    rng = np.random.default_rng(0)
    names = ["big"] * 600 + ["middle"] * 100 + [f"rare{i}" for i in range(1000)]
    categories = np.array(names, dtype=object)
    splits = mimic.split_patients(rng.permutation(len(categories)), categories)
    for name, share in zip(mimic.SPLITS, mimic.SHARES, strict=True):
        assert (splits[:600] == name).mean() == pytest.approx(share, abs=0.005)
        assert (splits[600:700] == name).mean() == pytest.approx(share, abs=0.03)
        assert (splits[700:] == name).mean() == pytest.approx(share, abs=0.01)
    three = np.array(["a", "b", "c"])
    first = [mimic.split_patients(np.arange(3), three, seed=seed)[0] for seed in range(400)]
    assert first.count("test") / 400 == pytest.approx(0.2, abs=0.07)


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.2), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_wrong_shares(tmp_path: Path, hospital: Tables, shares) -> None:
    with pytest.raises(ValueError, match="shares must be three"):
        build(tmp_path, hospital, shares=shares)


# --- where the files lie ----------------------------------------------------------------------

TABLES = list(mimic.TABLES)


def test_the_tables_that_are_read_are_those_of_the_fixture() -> None:
    assert list(fixture.COLUMNS) == TABLES
    assert all(set(columns) <= set(fixture.COLUMNS[name]) for name, columns in mimic.TABLES.items())


@pytest.mark.parametrize("table", TABLES)
def test_missing_file(tmp_path: Path, hospital: Tables, table: str) -> None:
    del hospital[table]
    with pytest.raises(FileNotFoundError, match=rf"{table}\.csv or .*is missing.*data/README.md"):
        build(tmp_path, hospital)


def test_folder_on_another_level(tmp_path: Path, hospital: Tables) -> None:
    data = fixture.write_folder(tmp_path / "download" / "files" / "mimiciv", hospital)
    for wrong in (tmp_path, tmp_path / "download", data / "hosp", data / "note"):
        with pytest.raises(FileNotFoundError, match=rf"it lies in {data}; give the folder"):
            mimic.build_cases(wrong)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        mimic.build_cases(tmp_path / "typo")


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("table", TABLES)
def test_a_link_to_nothing_and_a_folder_are_called_so(
    tmp_path: Path, hospital: Tables, table: str, suffix: str
) -> None:
    content = hospital.pop(table)
    data = fixture.write_folder(tmp_path / "d", hospital)
    path = data / f"{table}{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "annex" / "not-fetched")
    with pytest.raises(FileNotFoundError, match=rf"{path} is a link to .*not-fetched"):
        mimic.find_table(data, table)
    other = fixture.write_table(data, table, content, zipped=suffix == ".csv")
    assert mimic.find_table(data, table) == other
    other.unlink()
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(FileNotFoundError, match="is a link"):
        mimic.find_table(data, table)
    path.unlink()
    path.mkdir()
    (path / path.name.removesuffix(".gz")).write_text("unpacked by a file manager")
    with pytest.raises(FileNotFoundError, match=rf"{path} is a folder. Move the file out"):
        mimic.find_table(data, table)


def test_a_folder_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "note").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError, match="note is a link to .*unmounted"):
        mimic.find_table(tmp_path, "note/discharge")


@pytest.mark.parametrize("table", TABLES)
def test_half_an_unpacked_file_does_not_stand_in_for_the_whole_download(
    tmp_path: Path, hospital: Tables, table: str
) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    whole = mimic.build_cases(data)
    plain = gzip.decompress((data / f"{table}.csv.gz").read_bytes())
    (data / f"{table}.csv").write_bytes(plain[: len(plain) // 3])
    pd.testing.assert_frame_equal(whole, mimic.build_cases(data))


@pytest.mark.parametrize("table", TABLES)
def test_a_file_is_unpacked_by_its_first_bytes_not_by_its_name(
    tmp_path: Path, hospital: Tables, table: str
) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    cases = mimic.build_cases(data)
    path = data / f"{table}.csv.gz"
    content = path.read_bytes()
    path.write_bytes(gzip.decompress(content))
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))
    path.unlink()
    path.with_suffix("").write_bytes(content)
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))
    assert len(mimic.read_table(data, table)) == len(hospital[table])


# --- what is in the files ---------------------------------------------------------------------


def test_the_reader_that_notebook_1_uses(tmp_path: Path, hospital: Tables) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    table = mimic.read_table(data, "hosp/diagnoses_icd")
    assert list(table) == mimic.TABLES["hosp/diagnoses_icd"]
    assert table.to_numpy().tolist() == hospital["hosp/diagnoses_icd"]
    names = ["icd_version", "long_title"]
    titles = mimic.read_table(data, "hosp/d_icd_diagnoses", names, nrows=2)
    assert list(titles) == names
    assert titles["long_title"].tolist() == ["title of I2101", "title of I214"]
    chunks = list(mimic.read_chunks(data, "hosp/diagnoses_icd", size=7))
    assert {len(chunk) for chunk in chunks[:-1]} == {7} and 0 < len(chunks[-1]) <= 7
    pd.testing.assert_frame_equal(pd.concat(chunks, ignore_index=True), table)
    assert [str(kind) for kind in table.dtypes] == ["int64", "int64", "int64", "str", "int64"]


def test_columns_in_another_order_and_more_of_them(tmp_path: Path, hospital: Tables) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    cases = mimic.build_cases(data)
    for table, columns in fixture.COLUMNS.items():
        rows = [[*row[::-1], "x"] for row in hospital[table]]
        fixture.write_table(data, table, rows, columns=[*columns[::-1], "extra"])
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))


def change(data: Path, table: str, edit: Callable[[bytes], bytes]) -> None:
    path = data / f"{table}.csv.gz"
    path.write_bytes(gzip.compress(edit(gzip.decompress(path.read_bytes()))))


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    cases = mimic.build_cases(data)
    for table in TABLES:
        change(data, table, lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))


def test_a_note_in_any_language_and_of_any_length(tmp_path: Path, hospital: Tables) -> None:
    row = hospital["note/discharge"][3]
    words = '38.5 °C, naïve, 心梗, a "quoted" word, NUL \x00, ' + "long " * 60_000
    row[7] = row[7].replace("Chief Complaint:\n", f"Chief Complaint:\n{words}")
    cases = build(tmp_path, hospital).set_index("hadm_id")
    assert cases.loc[row[2], "note"] == notes.admission_note(row[7])
    assert "心梗" in cases.loc[row[2], "note"]


def twice(raw: bytes) -> bytes:
    return raw + raw


# What may happen to any of the four files -> (what is done to its text, what the message says).
DAMAGE = {
    "empty": (lambda raw: b"", "is missing or stands twice"),
    "header only": (lambda raw: raw.split(b"\n")[0] + b"\n", "there are no records"),
    "no header": (lambda raw: raw.split(b"\n", 1)[1], "is missing or stands twice"),
    "header within": (twice, "no whole number"),
    "column renamed": (
        lambda raw: raw.replace(b"icd_version", b"version").replace(b"hadm_id", b"HADM", 1),
        "column '(hadm_id|icd_version)' is missing or stands twice",
    ),
    "column twice": (
        lambda raw: (
            raw.replace(b"long_title", b"icd_version")
            .replace(b"admittime", b"hadm_id")
            .replace(b"seq_num", b"hadm_id", 1)
            .replace(b"charttime", b"hadm_id")
        ),
        "column '(hadm_id|icd_version)' is missing or stands twice",
    ),
    "tabs": (lambda raw: raw.replace(b",", b"\t"), "is missing or stands twice"),
    "a web page": (
        lambda raw: b"<!DOCTYPE html>\n<html>401</html>\n",
        "is missing or stands twice",
    ),
    "UTF-16": (lambda raw: raw.decode().encode("utf-16"), "'utf-8' codec can't decode"),
    "a byte that is no UTF-8": (lambda raw: raw[:-9] + b"\xe9" + raw[-8:], "'utf-8' codec can't"),
    "a record cut short": (lambda raw: raw + b"1\n", r"a record has 1 fields, not \d"),
    "a record too long": (lambda raw: raw + b"1," * 30 + b"\n", r"a record has 31 fields, not \d"),
    "a quote that never closes": (lambda raw: raw + b'"1,', "unexpected end of data"),
    "text behind a quote": (lambda raw: raw + b'"1"x,2\n', "expected after"),
    "an id that is none": (
        lambda raw: raw + b",".join([b"one"] * (raw.split(b"\n")[0].count(b",") + 1)) + b"\n",
        "no whole number",
    ),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_file_is_named_with_the_line_and_what_to_do(
    tmp_path: Path, hospital: Tables, damage: str, table: str, zipped: bool
) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    edit, message = DAMAGE[damage]
    change(data, table, edit)
    path = data / f"{table}.csv.gz"
    if not zipped:
        plain = path.with_suffix("")
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
        path = plain
    with pytest.raises(ValueError, match=message) as caught:
        mimic.build_cases(data)
    text = str(caught.value)
    assert text.startswith(f"{path}, near line ") and "SHA256SUMS" in text and len(text) < 700
    assert not {"denies", "patient", "Penicillins"} & set(text.split()), "no text of a note"
    with pytest.raises(ValueError, match=message):
        mimic.read_table(data, table)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "damage", ["truncated", "half", "flipped", "rubbish behind", "other archive"]
)
def test_a_broken_archive(tmp_path: Path, hospital: Tables, table: str, damage: str) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    path = data / f"{table}.csv.gz"
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-12],
            "half": content[: len(content) // 2],
            "flipped": content[:-6] + bytes([content[-6] ^ 255]) + content[-5:],
            "rubbish behind": content + b"rubbish",
            "other archive": b"PK\x03\x04" + content,
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{path}, near line \d+: .*SHA256SUMS"):
        mimic.build_cases(data)


def test_the_line_is_that_of_the_fault(tmp_path: Path, hospital: Tables) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    rows = [list(row) for row in hospital["hosp/diagnoses_icd"]]
    rows[40].append("one more")
    fixture.write_table(data, "hosp/diagnoses_icd", rows)
    with pytest.raises(ValueError, match=r"near line 42: a record has 6 fields, not 5"):
        mimic.read_table(data, "hosp/diagnoses_icd")


TORN = {
    "a pair of quotes": lambda note: note.replace(b"Chief Complaint", b'Chief "Complaint"'),
    "with a comma": lambda note: note.replace(
        b"Chief Complaint:", b'Chief "Complaint", so called:'
    ),
    "one at the end of a line": lambda note: note.replace(b"Past Medical History:", b'Past"'),
    "one alone": lambda note: note.replace(b"patient", b'pat"ient'),
    "a note of one line": lambda note: b'"a "short" note"',
    "no quote behind": lambda note: note[:-1],
    "no quote before": lambda note: note[1:],
}


@pytest.mark.parametrize("edit", TORN.values(), ids=TORN)
def test_torn_quotes_are_never_taken_for_sound(tmp_path: Path, hospital: Tables, edit) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)

    def tear(raw: bytes) -> bytes:
        start = raw.index(b'"')
        end = raw.index(b'"', start + 1) + 1
        return raw[:start] + edit(raw[start:end]) + raw[end:]

    change(data, "note/discharge", tear)
    with pytest.raises(ValueError, match=r"discharge\.csv\.gz, near line \d+: .*SHA256SUMS"):
        mimic.build_cases(data)


@pytest.mark.parametrize("number", ["", "10.0", "ten", "-", "9" * 23])
@pytest.mark.parametrize("column", mimic.NUMBERS)
def test_a_number_that_is_none(tmp_path: Path, hospital: Tables, column: str, number: str) -> None:
    for table, columns in fixture.COLUMNS.items():
        if column in columns:
            hospital[table][3][columns.index(column)] = number
            break
    with pytest.raises(ValueError, match=rf"{table}\.csv\.gz, near line \d+: .*SHA256SUMS"):
        build(tmp_path, hospital)
