"""Raw files to cases: labels, filters, split, scale and unfit input. The folders are written by tests/mimic_fixture.py."""

from __future__ import annotations

import csv
import gzip
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import mimic
from tests import mimic_fixture as fixture

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hospital() -> dict[str, list[list]]:
    return fixture.tables(40, words=120)


def build(tmp_path: Path, content, **options) -> pd.DataFrame:
    return mimic.build_cases(fixture.write_folder(tmp_path / "data", content), **options)


def reasons(cases: pd.DataFrame, part: str) -> int:
    """How many rows were left out for reasons whose text holds `part`."""
    return sum(n for reason, n in cases.attrs["skipped"].items() if part in reason)


def test_table_and_funnel(tmp_path: Path, hospital) -> None:
    cases = build(tmp_path, hospital)
    assert list(cases) == [
        "subject_id",
        "hadm_id",
        "note",
        "code",
        "category",
        "chapter",
        "split",
        "seen_in_train",
        "note_words",
    ]
    assert [
        str(cases[c].dtype)
        for c in ("subject_id", "hadm_id", "chapter", "seen_in_train", "note_words")
    ] == [
        "int64",
        "int64",
        "int64",
        "bool",
        "int64",
    ]
    n = len(hospital["hosp/admissions"])
    assert len(cases) == n and cases["hadm_id"].is_unique
    assert list(cases.attrs["funnel"].values()) == [n] * 9 and not any(
        cases.attrs["skipped"].values()
    )
    gold = {row[1]: row[3] for row in hospital["hosp/diagnoses_icd"] if row[2] == 1}
    assert dict(zip(cases["hadm_id"], cases["code"], strict=True)) == gold
    assert (cases["category"] == cases["code"].str[:3]).all() and set(cases["split"]) == {
        "train",
        "val",
        "test",
    }
    assert (
        not cases["note"].str.contains("later").any()
        and (cases["note_words"] == cases["note"].str.split().str.len()).all()
    )


def test_plain_files_command_line_and_metadata(tmp_path: Path, hospital) -> None:
    data, out = (
        fixture.write_folder(tmp_path / "d", hospital, zipped=False),
        tmp_path / "new" / "cases.parquet",
    )
    done = subprocess.run(
        [sys.executable, "-m", "helpers.mimic", data, out], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cases = mimic.build_cases(data)
    pd.testing.assert_frame_equal(pd.read_parquet(out), cases)
    assert mimic.read_funnel(out) == cases.attrs["funnel"] and str(len(cases)) in done.stdout
    assert [p.name for p in out.parent.iterdir()] == ["cases.parquet"]
    failed = subprocess.run(
        [sys.executable, "-m", "helpers.mimic", tmp_path / "nowhere", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        failed.returncode == 1
        and failed.stderr.startswith("error: ")
        and "Traceback" not in failed.stderr
    )


def test_failure_leaves_the_old_file_and_no_rubbish(tmp_path: Path, hospital) -> None:
    out = tmp_path / "cases.parquet"
    mimic.write_cases(fixture.write_folder(tmp_path / "good", hospital), out)
    before = out.read_bytes()
    bad = fixture.write_folder(tmp_path / "bad", hospital)
    path = bad / "note/discharge.csv.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="truncated"):
        mimic.write_cases(bad, out)
    assert out.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {
        "cases.parquet",
        "good",
        "bad",
    }


def test_many_processes_give_the_same_table(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    alone = mimic.build_cases(data, workers=1)
    pd.testing.assert_frame_equal(alone, mimic.build_cases(data, workers=2, chunk=3))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_odd_codes_and_versions(tmp_path: Path, hospital) -> None:
    spellings = ["I21.01", " i2101", "I2101  ", "i21.01 "]
    versions = [10, "10", "10.0", " 10 "]
    first = [row for row in hospital["hosp/diagnoses_icd"] if row[2] == 1][:16]
    for i, row in enumerate(first):
        row[2:] = [("1", "1.0", " 1", 1)[i % 4], spellings[i % 4], versions[i // 4]]
    cases = build(tmp_path, hospital).set_index("hadm_id")
    assert (cases.loc[[row[1] for row in first], "code"] == "I2101").all()


def test_retired_code_counts_by_the_dictionary_alone(tmp_path: Path, hospital) -> None:
    rows = [row for row in hospital["hosp/diagnoses_icd"] if row[2] == 1]
    rows[0][3], rows[1][3], rows[2][3] = "Z9999", "I2101ZZ", "nonsense"
    hospital["hosp/d_icd_diagnoses"].append(["Z99.99", "10.0", "a code retired long ago"])
    cases = build(tmp_path, hospital)
    assert cases.attrs["funnel"]["coded in ICD-10"] - cases.attrs["funnel"]["valid code"] == 2
    assert cases.set_index("hadm_id").loc[rows[0][1], ["code", "chapter"]].tolist() == ["Z9999", 21]


def test_admissions_without_an_icd10_principal_code(tmp_path: Path, hospital) -> None:
    rows = [row for row in hospital["hosp/diagnoses_icd"] if row[2] == 1]
    for row in rows[:4]:
        row[3:] = ["4019", 9]
    for row in rows[4:7]:
        row[2] = 3
    funnel = build(tmp_path, hospital).attrs["funnel"]
    assert funnel["admissions"] - funnel["one principal diagnosis"] == 3
    assert funnel["one principal diagnosis"] - funnel["coded in ICD-10"] == 4


# --- filters ----------------------------------------------------------------------------------------------------------


def test_filters(tmp_path: Path, hospital) -> None:
    rows = hospital["note/discharge"]
    gone = rows.pop()[2]
    rows[0][7] = "Discharge Diagnosis:\nonly later things\n"
    rows[1][7] = "Social History:\nlives alone with a cat and a dog in a house by the sea\n"
    rows[2][7] = "Chief Complaint:\npain\n"
    rows[3][7] = rows[10][7].replace("\n", "\r\n").replace("Chief Complaint", "CHIEF COMPLAINT")
    cases = build(tmp_path, hospital)
    funnel = cases.attrs["funnel"]
    left = len(hospital["hosp/admissions"])
    assert list(funnel.items())[-5:] == [
        ("with a discharge summary", left - 1),
        ("admission note not empty", left - 3),
        ("at least 10 words", left - 4),
        ("no exact duplicate", left - 5),
        ("no near-duplicate of the patient", left - 5),
    ]
    assert not {gone, *(row[2] for row in rows[:3])} & set(cases["hadm_id"])


def test_near_duplicates_of_a_patient(tmp_path: Path, hospital) -> None:
    rows = hospital["note/discharge"]
    pairs = list(
        {a[1]: (a, b) for a, b in zip(rows, rows[1:], strict=False) if a[1] == b[1]}.values()
    )[1:3]
    for a, b in pairs:
        b[7] = a[7].replace("In the ED,", "In the ED, suddenly")
    elsewhere = rows[-1]
    elsewhere[7] = rows[0][7].replace("pain", "ache", 1)  # another patient: not compared
    cases = build(tmp_path, hospital)
    kept = set(cases["hadm_id"])
    assert all(a[2] in kept and b[2] not in kept for a, b in pairs) and elsewhere[2] in kept
    assert cases.attrs["funnel"]["no exact duplicate"] - len(cases) == 2


def test_first_note_of_an_admission_wherever_it_stands(tmp_path: Path, hospital) -> None:
    rng, rows = random.Random(1), hospital["note/discharge"]
    row = rows[5]
    rows.insert(0, [row[0] + "b", *row[1:4], 2, *row[5:7], fixture.summary(rng)])
    rows.append([row[0] + "c", *row[1:4], 3, *row[5:7], fixture.summary(rng)])
    rows.append([row[0] + "d", *row[1:3], "AD", 0, *row[5:7], fixture.summary(rng)])
    cases = build(tmp_path, hospital)
    from helpers import notes

    assert cases.set_index("hadm_id").loc[row[2], "note"] == notes.admission_note(row[7])
    assert reasons(cases, "further note") == 2 and reasons(cases, "addendum") == 1


def test_of_several_notes_an_empty_one_does_not_cost_the_admission(
    tmp_path: Path, hospital
) -> None:
    rows = hospital["note/discharge"]
    row = rows[5]
    rows.insert(0, [row[0] + "b", *row[1:4], 0, *row[5:7], "Brief Hospital Course:\nlater\n"])
    cases = build(tmp_path, hospital)
    assert row[2] in set(cases["hadm_id"]) and reasons(cases, "further note") == 1


def test_the_audit_reads_the_note_that_the_case_was_made_of(tmp_path: Path, hospital) -> None:
    rows = hospital["note/discharge"]
    row = rows[5]
    rows.append([row[0] + "b", *row[1:4], 2, *row[5:7], "another note"])
    folder = fixture.write_folder(tmp_path / "data", hospital)
    assert [*mimic.texts(folder, [row[2]])] == [(row[2], row[7])]


# --- split ------------------------------------------------------------------------------------------------------------


def test_split_is_by_patient_and_does_not_depend_on_the_order_of_rows(
    tmp_path: Path, hospital
) -> None:
    cases = build(tmp_path, hospital)
    assert (cases.groupby("subject_id")["split"].nunique() == 1).all()
    rng = random.Random(3)
    for rows in hospital.values():
        rng.shuffle(rows)
    shuffled = build(tmp_path / "again", hospital)
    pd.testing.assert_frame_equal(cases, shuffled)
    assert (build(tmp_path, hospital, seed=1)["split"] != cases["split"]).any()


def test_seen_in_train(tmp_path: Path, hospital) -> None:
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
    found = mimic.split_patients(subjects, categories, seed=seed)
    order = np.random.default_rng(0).permutation(len(rows))
    assert (
        mimic.split_patients(subjects[order], categories[order], seed=seed) == found[order]
    ).all()
    assert all(len(set(found[subjects == s])) == 1 for s in set(subjects.tolist()))
    biggest = max(np.bincount(subjects))
    for name, share in zip(mimic.SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert abs((found == name).sum() - share * len(rows)) <= 2 * biggest + 1


def test_split_is_stratified_and_rare_codes_reach_the_test_set() -> None:
    rng = np.random.default_rng(0)
    categories = np.array(
        ["big"] * 600 + ["middle"] * 100 + [f"rare{i}" for i in range(1000)], dtype=object
    )
    found = mimic.split_patients(rng.permutation(len(categories)), categories)
    for name, share in zip(mimic.SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert (found[:600] == name).mean() == pytest.approx(share, abs=0.005)
        assert (found[600:700] == name).mean() == pytest.approx(share, abs=0.03)
        assert (found[700:] == name).mean() == pytest.approx(share, abs=0.01)
    seeds = [
        mimic.split_patients(np.arange(3), np.array(["a", "b", "c"]), seed=s)[0] for s in range(400)
    ]
    assert seeds.count("test") / 400 == pytest.approx(0.2, abs=0.07)


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.2), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_wrong_shares(tmp_path: Path, hospital, shares) -> None:
    with pytest.raises(ValueError, match="shares must be three"):
        build(tmp_path, hospital, shares=shares)


# --- unfit input ------------------------------------------------------------------------------------------------------

TABLES = list(fixture.COLUMNS)


@pytest.mark.parametrize("table", TABLES)
def test_missing_file(tmp_path: Path, hospital, table: str) -> None:
    del hospital[table]
    with pytest.raises(
        FileNotFoundError, match=rf"{table}\.csv or .*is missing.*See data/README.md"
    ):
        build(tmp_path, hospital)


def test_folder_one_level_off(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "download" / "mimiciv", hospital)
    with pytest.raises(FileNotFoundError, match=r"lies deeper, in .*download/mimiciv"):
        mimic.build_cases(tmp_path / "download")
    with pytest.raises(FileNotFoundError, match=r"this is hosp/ itself; give the folder above it"):
        mimic.build_cases(data / "hosp")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        mimic.build_cases(tmp_path / "typo")


@pytest.mark.parametrize("table", TABLES)
def test_renamed_column(tmp_path: Path, hospital, table: str) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    columns = [
        "HADM"
        if c == "hadm_id"
        else "version"
        if c == "icd_version" and table == "hosp/d_icd_diagnoses"
        else c
        for c in fixture.COLUMNS[table]
    ]
    fixture.write_table(data, table, hospital[table], columns=columns)
    with pytest.raises(
        ValueError,
        match=rf"{table}\.csv\.gz: column '(hadm_id|icd_version)' is missing \(found: .*\). See data/README.md",
    ):
        mimic.build_cases(data)


def test_columns_in_another_order_and_more_of_them(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    cases = mimic.build_cases(data)
    for table, columns in fixture.COLUMNS.items():
        fixture.write_table(
            data,
            table,
            [[*row[::-1], "x"] for row in hospital[table]],
            columns=[*columns[::-1], "extra"],
        )
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))


@pytest.mark.parametrize("table", TABLES)
def test_half_an_unpacked_file_does_not_stand_in_for_the_whole_download(
    tmp_path: Path, hospital, table: str
) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    whole = mimic.build_cases(data)
    plain = gzip.decompress((data / f"{table}.csv.gz").read_bytes())
    (data / f"{table}.csv").write_bytes(plain[: len(plain) // 3])
    pd.testing.assert_frame_equal(whole, mimic.build_cases(data))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "no gzip", "empty", "empty plain", "header only"]
)
def test_damaged_file(tmp_path: Path, hospital, table: str, damage: str) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    path = data / f"{table}.csv.gz"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-12])
    elif damage == "flipped":
        path.write_bytes(content[:-6] + bytes([content[-6] ^ 255]) + content[-5:])
    elif damage == "no gzip":
        path.write_bytes(gzip.decompress(content))
    elif damage == "empty":
        path.write_bytes(gzip.compress(b""))
    elif damage == "empty plain":
        path.unlink()
        path.with_suffix("").write_bytes(b"")
    else:
        fixture.write_table(data, table, [])
    message = {
        "truncated": "truncated or damaged",
        "flipped": "truncated or damaged",
        "no gzip": "no gzip file",
        "header only": "no records",
    }
    with pytest.raises(
        ValueError, match=rf"{table}\.csv.*{message.get(damage, 'is empty')}.*See data/README.md"
    ):
        mimic.build_cases(data)


def rewrite(data: Path, change) -> None:
    path = data / "note/discharge.csv.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def test_a_note_that_a_stray_quote_ends_early_is_not_taken_for_whole(
    tmp_path: Path, hospital
) -> None:
    folder = fixture.write_folder(tmp_path / "data", hospital, zipped=False)
    path = folder / "note" / "discharge.csv"
    whole = mimic.build_cases(folder)
    torn = hospital["note/discharge"][7]
    text = path.read_text()
    at = text.index("Past Medical", text.index(str(torn[2])))
    end = text.index("\n", at)
    path.write_text(text[:end] + '"' + text[end:])
    cases = mimic.build_cases(folder)
    assert set(whole["hadm_id"]) - set(cases["hadm_id"]) == {torn[2]}
    assert reasons(cases, "cannot be read") == 2  # the torn record, and the rest of its text


def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path: Path, hospital) -> None:
    folder = fixture.write_folder(tmp_path / "data", hospital)
    with pytest.raises(ValueError, match="is a folder. Name the file"):
        mimic.write_cases(folder, folder)


def test_what_a_killed_run_left_behind_is_cleared_away(tmp_path: Path, hospital) -> None:
    folder, out = (
        fixture.write_folder(tmp_path / "data", hospital),
        tmp_path / "out" / "cases.parquet",
    )
    for name, age in (("old", 7200), ("of-another-process", 60)):
        left = out.parent / f".cases.parquet.{name}" / "notes.parquet"
        left.parent.mkdir(parents=True)
        left.write_text("notes")
        for path in (left, left.parent):
            os.utime(path, (time.time() - age,) * 2)
    mimic.write_cases(folder, out)
    assert sorted(path.name for path in out.parent.iterdir()) == [
        ".cases.parquet.of-another-process",
        "cases.parquet",
    ]


def test_broken_quoting_costs_the_note_not_the_file(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    whole = mimic.build_cases(data)
    rewrite(data, lambda raw: raw.replace(b"Chief Complaint:", b'Chief "Complaint", so called:', 1))
    cases = mimic.build_cases(data)
    assert (
        len(cases) == len(whole) - 1 and reasons(cases, "cannot be read (the first near line") == 1
    )
    columns = ["hadm_id", "note", "code"]
    pd.testing.assert_frame_equal(
        cases[columns],
        whole[whole["hadm_id"].isin(cases["hadm_id"])][columns].reset_index(drop=True),
    )


def test_quote_that_never_closes(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    rewrite(data, lambda raw: raw[:-2])
    assert reasons(mimic.build_cases(data), "cannot be read") == 1
    rewrite(data, lambda raw: raw.replace(b'"\n1', b"\n1", 1))
    cases = mimic.build_cases(data)
    assert 1 <= len(hospital["note/discharge"]) - len(cases) <= 3


def test_broken_throughout(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    rewrite(data, lambda raw: raw.replace(b"Chief", b'"Chief"'))
    with pytest.raises(
        ValueError,
        match=r"note/discharge\.csv\.gz: \d+ of \d+ records cannot be read; the first near line \d+, broken quoting",
    ):
        mimic.build_cases(data)


def test_wrong_encoding(tmp_path: Path, hospital) -> None:
    hospital["note/discharge"][3][7] = hospital["note/discharge"][3][7].replace(
        "Chief Complaint:\n", "Chief Complaint:\n38.5 °C "
    )
    data = fixture.write_folder(tmp_path / "d", hospital)
    assert mimic.build_cases(data)["note"].str.contains("°C").sum() == 1
    rewrite(data, lambda raw: raw.decode().encode("latin-1"))
    cases = mimic.build_cases(data)
    assert reasons(cases, "not UTF-8") == 1 and hospital["note/discharge"][3][2] not in set(
        cases["hadm_id"]
    )
    rewrite(data, lambda raw: raw.replace(b"patient", b"pati\xe9nt"))
    with pytest.raises(ValueError, match="not UTF-8.*iconv"):
        mimic.build_cases(data)
    rewrite(data, lambda raw: raw.decode("latin-1").encode("utf-16"))
    with pytest.raises(ValueError, match="not UTF-8"):
        mimic.build_cases(data)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    cases = mimic.build_cases(data)
    rewrite(data, lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(cases, mimic.build_cases(data))


def test_ids_that_do_not_join(tmp_path: Path, hospital) -> None:
    rows = hospital["note/discharge"]
    rows[0][2], rows[1][1], rows[2][2] = 99, 77, ""
    hospital["hosp/diagnoses_icd"].append([5, 6, 1, "I10", 10])
    cases = build(tmp_path, hospital)
    assert len(rows) - len(cases) == 3
    assert (
        reasons(cases, "hadm_id is not in hosp/admissions")
        == reasons(cases, "subject_id is not that")
        == reasons(cases, "is no number")
        == 1
    )
    assert reasons(cases, "of no admission") == 1
    for row in rows:
        row[2] = int(row[2] or 0) + 10**6
    with pytest.raises(ValueError, match="note/discharge: no hadm_id is in hosp/admissions"):
        build(tmp_path, hospital)
    for row in hospital["hosp/admissions"]:
        row[1] += 1000000
    with pytest.raises(ValueError, match="no row with seq_num 1 joins"):
        build(tmp_path, hospital)


def test_duplicate_keys(tmp_path: Path, hospital) -> None:
    principal = [row for row in hospital["hosp/diagnoses_icd"] if row[2] == 1]
    hospital["hosp/diagnoses_icd"] += [
        list(principal[0]),
        [*principal[1][:3], "Z515", 10],
        [*principal[1][:3], "Z515", 10],
    ]
    hospital["hosp/admissions"].append(hospital["hosp/admissions"][0])
    hospital["note/discharge"].append(hospital["note/discharge"][4])
    cases = build(tmp_path, hospital)
    assert len(principal) - len(cases) == 1 and principal[1][1] not in set(cases["hadm_id"])
    assert (
        reasons(cases, "stands twice") == 2
        and reasons(cases, "two different") == 1
        and reasons(cases, "further note") == 1
    )


def test_nothing_left(tmp_path: Path, hospital) -> None:
    for row in hospital["note/discharge"]:
        row[7] = "Discharge Diagnosis:\nlater\n"
    with pytest.raises(
        ValueError, match=r"no case is left \(admissions \d+.*admission note not empty 0"
    ):
        build(tmp_path, hospital)
    for row in hospital["hosp/diagnoses_icd"]:
        row[4] = 9
    with pytest.raises(ValueError, match="no admission has a valid ICD-10-CM principal diagnosis"):
        build(tmp_path, hospital)


def test_notes_of_other_admissions_only(tmp_path: Path, hospital) -> None:
    subject, hadm = hospital["note/discharge"][0][1:3]
    for row in hospital["hosp/diagnoses_icd"]:
        row[4] = 9 if row[1] == hadm else row[4]
    hospital["note/discharge"] = hospital["note/discharge"][:1]
    with pytest.raises(ValueError, match="no case is left"):
        build(tmp_path, hospital)


def test_field_size_limit_is_put_back(tmp_path: Path, hospital) -> None:
    before = csv.field_size_limit()
    build(tmp_path, hospital)
    assert csv.field_size_limit() == before


def test_summaries_of_given_admissions(tmp_path: Path, hospital) -> None:
    data = fixture.write_folder(tmp_path / "d", hospital)
    wanted = [row[2] for row in hospital["note/discharge"][3:6]]
    assert dict(mimic.texts(data, wanted)) == {
        row[2]: row[7] for row in hospital["note/discharge"][3:6]
    }


def test_processes_need_no_main_guard_in_the_readers_script(tmp_path: Path) -> None:
    """With spawn, a plain script without `if __name__ == "__main__":` died on anything but a small hospital."""
    import subprocess
    import sys

    from helpers import synthetic

    hospital = synthetic.write_hospital(tmp_path / "hospital", admissions=300, seed=2)
    script = tmp_path / "plain.py"
    script.write_text(
        f"from helpers import mimic\nprint(len(mimic.build_cases({str(hospital)!r}, workers=2, chunk=20)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(mimic.build_cases(hospital, workers=1))


def test_errors_name_the_fault_they_met(tmp_path: Path, hospital) -> None:
    rows = [row for row in hospital["hosp/diagnoses_icd"] if row[2] == 1]
    for row in rows:
        row[4] = "ten"
    with pytest.raises(
        ValueError, match=rf"joins hosp/admissions \({len(rows)} x .*icd_version cannot be read\)"
    ):
        build(tmp_path, hospital)
    for row in rows:
        row[4] = "10 CM"
    data = fixture.write_folder(tmp_path / "data", hospital)
    whole = mimic.build_cases(data)
    path = data / "hosp/admissions.csv.gz"
    content = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(content).replace(b",", b"\t")))
    with pytest.raises(ValueError, match="not separated by commas"):
        mimic.build_cases(data)
    path.write_bytes(content + b"rubbish")
    with pytest.raises(ValueError, match=r"truncated or damaged \(after \d+ records"):
        mimic.build_cases(data)
    path.unlink()
    path.with_suffix("").write_bytes(content)  # still packed, whatever its name says
    pd.testing.assert_frame_equal(whole, mimic.build_cases(data))


def test_ids_too_long_for_any_table(tmp_path: Path, hospital) -> None:
    hospital["note/discharge"][0][4] = hospital["note/discharge"][1][2] = "9" * 23
    cases = build(tmp_path, hospital)
    assert len(hospital["note/discharge"]) - len(cases) == 2 and reasons(cases, "is no number") == 2
