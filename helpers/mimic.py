"""Raw MIMIC-IV tables in, the table of cases out: admission note, principal diagnosis, split.

`read_chunks` and `read_table` read a raw table, here and in notebook 1. `build_cases` takes three
steps:
1. the small tables of `hosp/` say which admissions have an ICD-10-CM principal diagnosis;
2. the discharge summaries stream past, and what was known at admission is kept;
3. filters, duplicates and the split follow.

    python -m helpers.mimic DATA_DIR OUT.parquet

Taught in notebook 1.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import signal
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from helpers import icd, notes

# The raw tables that are read, and their columns.
TABLES = {
    "hosp/admissions": ["subject_id", "hadm_id"],
    "hosp/diagnoses_icd": ["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"],
    "hosp/d_icd_diagnoses": ["icd_code", "icd_version"],
    "note/discharge": ["subject_id", "hadm_id", "note_type", "note_seq", "text"],
}
NUMBERS = ("subject_id", "hadm_id", "seq_num", "icd_version", "note_seq")  # the others are text
COLUMNS = [
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
SPLITS = ("train", "val", "test")
SHARES = (0.7, 0.1, 0.2)
MIN_WORDS = 10  # an admission note below this says nothing
SAME = 0.85  # share of word triples from which two notes of a patient are near-duplicates
CHUNK = 200  # summaries sent to a process at once
SMALL_FILE = 16 << 20  # bytes; below, starting processes takes longer than the work
ROW_GROUP = 4000  # cases whose notes are unpacked at once while the file is written
_AGAIN = "Download it again and compare it with SHA256SUMS.txt. See data/README.md."
_SEE = "See data/README.md."
_MIX = np.random.default_rng(20261101).integers(1, 2**32, (2, 64), np.uint32) | np.uint32(1)

Counts = dict[str, int]

csv.field_size_limit(16 << 20)  # a longer "note" is a quote that never closes


# --- reading raw files ------------------------------------------------------------------------


def find_table(data_dir: str | Path, name: str) -> Path:
    """Path of a raw table such as "hosp/admissions": `.csv.gz` if it is there, else `.csv`.

    Raises FileNotFoundError that says what is there instead: a link to nothing, a folder, another
    level.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. It should hold hosp/ and note/. {_SEE}")
    paths = [root / f"{name}.csv.gz", root / f"{name}.csv"]  # an unpacked file may be half a file
    for path in paths:
        if path.is_file():
            return path
    for path in (*paths, paths[0].parent):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(
                f"{path} is a link to {path.readlink()}, where nothing is. "
                f"Mount the disk or fetch the file (git annex get). {_SEE}"
            )
        if path.is_dir() and path in paths:
            raise FileNotFoundError(f"{path} is a folder. Move the file out of it. {_SEE}")
    raise FileNotFoundError(
        f"{name}.csv or {name}.csv.gz is missing in {root} ({_nearby(root, name)}). {_SEE}"
    )


def _nearby(root: Path, name: str) -> str:
    for level in ("..", "*", "*/*", "*/*/*", "*/*/*/*"):
        for path in root.glob(f"{level}/{name}.csv*"):
            folder = path.resolve().parents[1]
            return f"it lies in {folder}; give the folder that holds both hosp/ and note/"
    files = sorted(path.name for path in (root / name).parent.glob("*"))
    return f"found there: {', '.join(files[:12]) or 'nothing'}"


def _open(path: Path) -> IO[str]:
    """Unpacks by the first two bytes, not by the name: some browsers unpack and keep the name."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_gzip else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_chunks(
    data_dir: str | Path, name: str, columns: Sequence[str] = (), size: int = 20_000
) -> Iterator[pd.DataFrame]:
    """Stream a raw table in frames of `size` records: NUMBERS as int64, the rest as str.

    columns: those in TABLES unless others are given.
    Raises ValueError with file and line where the file is truncated, empty, not UTF-8, lacks a
    column or holds a record that cannot be read. No text of a record is in the message.
    """
    path = find_table(data_dir, name)
    columns = list(columns) or TABLES[name]
    numbers = {column: "int64" for column in columns if column in NUMBERS}
    with _open(path) as text:
        # Not pandas or pyarrow: they take a stray quote, and pandas a short record, for sound.
        reader = csv.reader(text, strict=True)
        records = _records(reader, columns)
        try:
            rows = list(islice(records, size))
            if not rows:
                raise ValueError("there are no records")
            while rows:
                yield pd.DataFrame(rows, columns=columns).astype(numbers)
                rows = list(islice(records, size))
        except (
            csv.Error,
            zlib.error,
            gzip.BadGzipFile,
            EOFError,
            ValueError,
            OverflowError,
        ) as error:
            raise ValueError(f"{path}, near line {reader.line_num}: {error}. {_AGAIN}") from None


def _records(reader: Iterator[list[str]], columns: list[str]) -> Iterator[list[Any]]:
    header = next(reader, [])
    names = [name for name in header if name.isidentifier()]  # a first row may be a record
    for column in columns:
        if header.count(column) != 1:
            raise ValueError(f"column '{column}' is missing or stands twice (found: {names})")
    places = [(header.index(column), column in NUMBERS) for column in columns]
    for row in filter(None, reader):
        if len(row) != len(header):
            raise ValueError(f"a record has {len(row)} fields, not {len(header)}")
        try:
            yield [int(row[place]) if number else row[place] for place, number in places]
        except ValueError:
            raise ValueError("an id or a number is no whole number") from None


def read_table(
    data_dir: str | Path, name: str, columns: Sequence[str] = (), nrows: int | None = None
) -> pd.DataFrame:
    """A raw table, or its first `nrows` records, in one frame; columns, types and errors as in
    `read_chunks`."""
    if nrows:
        return next(read_chunks(data_dir, name, columns, nrows))
    return pd.concat(read_chunks(data_dir, name, columns), ignore_index=True)


def dictionary(data_dir: str | Path) -> set[str]:
    """The ICD-10-CM codes (normalised) of the data set's own `d_icd_diagnoses`, retired ones
    included."""
    table = read_table(data_dir, "hosp/d_icd_diagnoses")
    return set(table.loc[table["icd_version"] == 10, "icd_code"].map(icd.normalise).dropna())


def texts(data_dir: str | Path, hadm_ids: Collection[int]) -> dict[int, str]:
    """hadm_id -> whole discharge summary, the one that the case was made of; for the leak audit."""
    labels = pd.Series("", pd.Index(hadm_ids).unique())
    chunks = _candidates(data_dir, _patients(data_dir), labels)
    summaries = pd.concat(chunks, ignore_index=True)
    chosen = _one_each(_extract([summaries], workers=1))
    return dict(zip(chosen["hadm_id"], summaries["text"][chosen.index], strict=True))


# --- the table of cases -----------------------------------------------------------------------


def build_cases(data_dir: str | Path, **options: Any) -> pd.DataFrame:
    """The table of cases, sorted by patient and admission.

    Columns: subject_id, hadm_id int64, note str, code (normalised), category str, chapter int64,
    split (train, val, test), seen_in_train bool (the full code occurs in train), note_words int64.
    `.attrs["funnel"]`: step -> admissions left; `.attrs["skipped"]`: fault -> rows left out.

    Options: seed=0 and shares=(0.7, 0.1, 0.2) of the split into train, val and test; workers=None,
    processes, by default one for each core; progress=False, whether a bar is shown.
    Raises FileNotFoundError or ValueError for files that are missing or unfit, saying which and
    what to do.
    """
    return _unpack(_packed_cases(data_dir, **options))


def write_cases(data_dir: str | Path, out: str | Path, **options: Any) -> Counts:
    """`build_cases` into the parquet file `out`, whole or not at all. Returns the funnel."""
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder. Name the file, such as {out / 'cases.parquet'}.")
    cases = _packed_cases(data_dir, **options)
    schema = pa.Schema.from_pandas(_unpack(cases[:1]))
    schema = schema.with_metadata({"counts": json.dumps(cases.attrs)})
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for start in range(0, len(cases), ROW_GROUP):
                rows = _unpack(cases[start : start + ROW_GROUP])
                writer.write_table(pa.Table.from_pandas(rows, schema))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return cases.attrs["funnel"]


def read_counts(path: str | Path) -> dict[str, Counts]:
    """What `write_cases` noted in the parquet file: "funnel", step -> admissions left after it, in
    order; "skipped", fault -> rows left out because of it."""
    metadata = pq.read_schema(path).metadata or {}
    if b"counts" not in metadata:
        raise ValueError(f"{path} was not written by `python -m helpers.mimic`. Make it again.")
    return json.loads(metadata[b"counts"])


def _packed_cases(
    data_dir: str | Path,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The table of cases with packed notes, which take a fifth of a gigabyte of MIMIC-IV instead of
    a half."""
    paths = [find_table(data_dir, name) for name in TABLES]  # a missing file is reported at once
    split_patients(np.array([]), np.array([]), shares=shares)  # and so are wrong shares
    patients = _patients(data_dir)
    labels, funnel, skipped = _labels(data_dir, patients)
    chunks = _candidates(data_dir, patients, labels)
    if progress:
        from helpers.machinery import places

        chunks = places.progress(chunks, f"chunks of {CHUNK} discharge summaries")
    if workers is None:
        workers = joblib.cpu_count() if paths[-1].stat().st_size > SMALL_FILE else 1
    cases, steps, faults = _filter(_extract(chunks, workers))
    if not len(cases):
        raise ValueError(
            f"{data_dir}: no case is left ({funnel | steps}; left out: {skipped | faults}). "
            f"Are the files of one release, and unabridged? {_SEE}"
        )
    cases["category"] = cases["code"].map(icd.category)
    cases["chapter"] = cases["code"].map(icd.chapter)
    subjects = cases["subject_id"].to_numpy()
    categories = cases["category"].to_numpy()
    cases["split"] = split_patients(subjects, categories, seed=seed, shares=shares)
    train = cases.loc[cases["split"] == "train", "code"]
    cases["seen_in_train"] = cases["code"].isin(train)
    cases = cases[COLUMNS].reset_index(drop=True)
    cases.attrs = {"funnel": funnel | steps, "skipped": skipped | faults}
    return cases


def _unpack(cases: pd.DataFrame) -> pd.DataFrame:
    return cases.assign(note=[zlib.decompress(note).decode() for note in cases["note"]])


def _patients(data_dir: str | Path) -> pd.Series:
    """hadm_id -> subject_id."""
    admissions = read_table(data_dir, "hosp/admissions").drop_duplicates("hadm_id")
    return admissions.set_index("hadm_id")["subject_id"]


def _labels(data_dir: str | Path, patients: pd.Series) -> tuple[pd.Series, Counts, Counts]:
    """hadm_id -> principal ICD-10-CM code; the first steps of the funnel; the rows left out."""
    chunks = read_chunks(data_dir, "hosp/diagnoses_icd")
    rows = pd.concat(chunk[chunk["seq_num"] == 1] for chunk in chunks)
    rows["code"] = rows["icd_code"].map(lambda raw: icd.normalise(raw) or raw)
    joined = rows[_are_of(patients, rows)]
    unique = joined.drop_duplicates(["hadm_id", "icd_version", "code"])
    single = unique.drop_duplicates("hadm_id", keep=False).set_index("hadm_id")
    in_icd10 = single.loc[single["icd_version"] == 10, "code"]
    own_codes = dictionary(data_dir)
    valid = [code for code in in_icd10.unique() if icd.is_valid(code, own_codes)]
    labels = in_icd10[in_icd10.isin(valid)]
    funnel = {
        "admissions": len(patients),
        "one principal diagnosis": len(single),
        "coded in ICD-10": len(in_icd10),
        "valid code": len(labels),
    }
    skipped = {
        "principal diagnosis of no admission in hosp/admissions": len(rows) - len(joined),
        "principal diagnosis stands twice": len(joined) - len(unique),
        "one of several principal diagnoses": len(unique) - len(single),
    }
    return labels, funnel, _named("hosp/diagnoses_icd", skipped)


def _are_of(patients: pd.Series, rows: pd.DataFrame) -> pd.Series:
    """Whether subject_id and hadm_id of each row stand together in hosp/admissions."""
    return rows["subject_id"] == patients.reindex(rows["hadm_id"]).to_numpy()


def _named(table: str, faults: Counts) -> Counts:
    return {f"{table}: {fault}": n for fault, n in faults.items() if n}


def _candidates(
    data_dir: str | Path, patients: pd.Series, labels: pd.Series
) -> Iterator[pd.DataFrame]:
    """The summaries of labelled admissions; and, without their text, those with a `fault`."""
    for chunk in read_chunks(data_dir, "note/discharge", size=CHUNK):
        chunk["fault"] = np.where(
            _are_of(patients, chunk), "", "of no admission in hosp/admissions"
        )
        chunk.loc[chunk["note_type"] == "AD", "fault"] = "addendum"
        chunk.loc[chunk["fault"] != "", "text"] = ""
        chunk["code"] = labels.reindex(chunk["hadm_id"]).array
        yield chunk[chunk["code"].notna() | (chunk["fault"] != "")]


def _extract(chunks: Iterable[pd.DataFrame], workers: int) -> pd.DataFrame:
    """`note` (packed) in the place of `text`, with its number of words and a digest of them."""

    def extract(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        note = [notes.admission_note(text) for text in columns.pop("text")]
        words = [text.lower().split() for text in note]
        return columns | {
            "note": [zlib.compress(text.encode(), level=1) for text in note],
            "note_words": [len(one) for one in words],
            "digest": [hashlib.md5(" ".join(one).encode()).hexdigest() for one in words],
        }

    # joblib's own processes: no fork of a notebook with torch's threads, no main guard in a script.
    # It sends a nested function by value: with plain lists, a process imports `notes` and not
    # pandas.
    pool = joblib.Parallel(n_jobs=workers, return_as="generator")
    parts = pool(joblib.delayed(extract)(chunk.to_dict("list")) for chunk in chunks)
    return pd.concat(map(pd.DataFrame, parts), ignore_index=True)


def _one_each(summaries: pd.DataFrame) -> pd.DataFrame:
    """Of each admission the first summary that holds an admission note, sorted by patient."""
    sound = summaries[summaries["fault"] == ""]
    order = ["subject_id", "hadm_id", "empty", "note_seq", "digest"]
    ordered = sound.assign(empty=sound["note_words"] == 0).sort_values(order)
    return ordered.drop_duplicates("hadm_id")


def _filter(summaries: pd.DataFrame) -> tuple[pd.DataFrame, Counts, Counts]:
    """The summaries that become cases; the last steps of the funnel; the summaries left out."""
    first = _one_each(summaries)
    full = first[first["note_words"] > 0]
    long = full[full["note_words"] >= MIN_WORDS]
    unique = long.drop_duplicates("digest")
    cases = unique.drop(_near_duplicates(unique))
    funnel = {
        "with a discharge summary": len(first),
        "admission note not empty": len(full),
        f"at least {MIN_WORDS} words": len(long),
        "no exact duplicate": len(unique),
        "no near-duplicate of the patient": len(cases),
    }
    faults = summaries["fault"].value_counts().to_dict()
    faults["further note of an admission"] = faults.pop("", 0) - len(first)
    return cases, funnel, _named("note/discharge", faults)


def _near_duplicates(cases: pd.DataFrame) -> list[int]:
    """Rows whose note shares nearly all word triples with an earlier one of the patient."""
    repeated = cases[cases["subject_id"].duplicated(keep=False)]
    earlier = defaultdict(list)
    near = []
    for row, subject, note in repeated[["subject_id", "note"]].itertuples():
        minima = _minhash(zlib.decompress(note).decode().lower().split())
        if any((minima == other).mean() >= SAME for other in earlier[subject]):
            near.append(row)
        else:
            earlier[subject].append(minima)
    return near


def _minhash(words: list[str]) -> np.ndarray:
    """Minima of 64 hash functions over the word triples: two notes agree in about their Jaccard
    index of them.

    Exact sets would be as fast; but where the index is near SAME they decide otherwise than these
    minima, and the committed study (results/study) rests on the cases that these leave.
    """
    hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint32)
    triples = np.zeros(len(words) - 2, np.uint32)
    for start in range(3):
        triples = (triples ^ hashes[start : start + len(triples)]) * np.uint32(0x9E3779B1)
        triples ^= triples >> np.uint32(15)
    mixed = (triples[:, None] ^ _MIX[0]) * _MIX[1]
    return (mixed ^ (mixed >> np.uint32(16))).min(axis=0)


def split_patients(
    subjects: np.ndarray, categories: np.ndarray, *, seed: int = 0, shares: Sequence[float] = SHARES
) -> np.ndarray:
    """Split for each case [n], by patient and stratified by category, whatever the order of the
    rows.

    Patients stand in a queue: by their rarest category, in an order that a hash of the seed fixes.
    Each goes to the split that is furthest below its share so far. So every category, and the
    whole, is divided close to `shares` (train, val, test), and the patients of rare codes fall in
    the test split as often as others do.
    """
    # Not scikit-learn's StratifiedGroupKFold: other splits would make the committed study
    # (results/study) void.
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            "shares must be three shares of train, val and test that sum to 1, not "
            f"{tuple(shares)}."
        )
    shares = np.array(shares)
    count = Counter(categories.tolist())
    rarest = {}  # patient -> (cases of the category, the category)
    cases = Counter()
    for subject, category in zip(subjects.tolist(), categories.tolist(), strict=True):
        rarest[subject] = min(rarest.get(subject, (sys.maxsize, "")), (count[category], category))
        cases[subject] += 1

    def drawn(value: object) -> bytes:
        return hashlib.blake2b(f"{seed}/{value}".encode(), digest_size=8).digest()

    owed = shares * (int.from_bytes(drawn("start"), "big") / 2**64)
    owed = np.roll(owed, int(drawn("turn")[0]) % 3) * (shares > 0)
    target = {}
    for subject in sorted(rarest, key=lambda s: (drawn(rarest[s][1]), drawn(s), s)):
        owed += shares * cases[subject]
        target[subject] = int(owed.argmax())
        owed[target[subject]] -= cases[subject]
    return np.array([SPLITS[target[s]] for s in subjects.tolist()], dtype=object)


def main() -> None:
    """`python -m helpers.mimic DATA_DIR OUT.parquet`: build the table of cases, print the
    funnel."""
    parser = argparse.ArgumentParser(description="Raw MIMIC-IV files to the table of cases.")
    parser.add_argument("data_dir", type=Path, help="folder that holds hosp/ and note/")
    parser.add_argument("out", type=Path, help="parquet file")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end as well
    try:
        write_cases(args.data_dir, args.out, seed=args.seed, progress=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    counts = read_counts(args.out)
    for step, n in counts["funnel"].items():
        print(f"{n:>9,}  {step}")
    for fault, n in counts["skipped"].items():
        print(f"left out {n:,}: {fault}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
