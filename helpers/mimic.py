"""Raw MIMIC-IV files in, the table of cases out: one admission, its admission note, its principal diagnosis, its split.

Three steps, so that memory stays bounded however long `discharge.csv` is:
1. the small tables of `hosp/` say which admissions have an ICD-10-CM principal diagnosis;
2. the summaries stream past: the parent reads, workers on the other cores extract, results go to a file beside the output;
3. from a few numbers per note (no text) the winners, duplicates and splits follow; the file is copied, filtered, row group
   by row group.

    python -m helpers.mimic DATA_DIR OUT.parquet
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from helpers import notes

if TYPE_CHECKING:
    import pandas as pd

SPLITS, SHARES = ("train", "val", "test"), (0.7, 0.1, 0.2)
MIN_WORDS = 10  # an admission note below this says nothing
HASHES, BAND, SHINGLE, SAME = (
    64,
    4,
    3,
    0.85,
)  # minhash size, values to a band, words to a shingle, Jaccard of near-duplicates
CHUNK = 500  # notes sent to a worker at once, and the least that a row group holds
_ALONE = 8  # below as many chunks, one process does the work alone
_BROKEN_SHARE = 0.05  # more unreadable records than this: the file, not the record, is at fault
_LONGEST_FIELD = 16 << 20  # bytes; a longer "note" is a quote that never closes
_ESCAPED = re.compile(
    "[\udc80-\udcff]"
)  # bytes that were no UTF-8, as `surrogateescape` leaves them
_NUMBERS = ("subject_id", "hadm_id", "note_seq")
_AGAIN = "Download it again and compare its checksum. See data/README.md."
_SEE = "See data/README.md."


# --- reading raw files ------------------------------------------------------------------------------------------------


def find_table(data_dir: str | Path, name: str) -> Path:
    """Path of a raw table such as "hosp/admissions": `.csv.gz` if it is there, else `.csv`, which may be half unpacked.

    Raises FileNotFoundError that says what is there instead, e.g. where the folder given is one level too high or too low.
    """
    root, folder = Path(data_dir), name.partition("/")[0]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. It should hold hosp/ and note/. {_SEE}")
    for path in (root / f"{name}.csv.gz", root / f"{name}.csv"):
        if path.is_file():
            return path
    hint = f"found in {folder}/: {', '.join(sorted(p.name for p in (root / folder).glob('*'))[:12]) or 'nothing'}"
    if root.name in ("hosp", "note") and not (root / folder).is_dir():
        hint = f"this is {root.name}/ itself; give the folder above it, {root.parent}"
    elif inner := sorted(
        {str(p.parent) for depth in ("*/", "*/*/") for p in root.glob(depth + folder) if p.is_dir()}
    ):
        hint = f"{folder}/ lies deeper, in {', '.join(inner[:3])}; give the folder that holds hosp/ and note/"
    raise FileNotFoundError(f"{name}.csv or {name}.csv.gz is missing in {root} ({hint}). {_SEE}")


def read_rows(
    path: Path,
    columns: Sequence[str],
    skipped: Counter[str] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Iterator[list[str]]:
    """Stream the given columns of a raw table as strings; `tick` gets the position in the file, in bytes.

    A record that cannot be read (broken quoting, wrong number of fields, not UTF-8) is skipped and counted in `skipped`.
    Raises ValueError, with file and line, for an empty or truncated file, missing columns, or more than 5 % unreadable records.
    """
    skipped = Counter() if skipped is None else skipped
    name = "/".join(path.parts[-2:])
    limit = csv.field_size_limit(_LONGEST_FIELD)
    good = broken = line = 0
    first_fault, held = "", []  # a record is given on when the next one has shown that it was whole
    try:
        with path.open("rb") as raw, _text(raw, path) as lines:
            reader = csv.reader(lines, strict=True)
            header = [c.strip() for c in next(reader, [])]
            if not header:
                raise ValueError(f"{name} is empty. {_AGAIN}")
            if missing := [c for c in columns if c not in header]:
                hint = "" if all(map(str.isprintable, header)) else " The file is not UTF-8 text."
                if len(header) == 1 and re.search(r"\w[;\t|]\w", header[0]):
                    hint = " The fields are not separated by commas."
                listed, found = (
                    ", ".join(f"'{c}'" for c in missing),
                    ascii(", ".join(header)[:300])[1:-1],
                )
                raise ValueError(
                    f"{name}: column {listed} is missing (found: {found}).{hint} {_SEE}"
                )
            at = [header.index(c) for c in columns]
            while True:
                row, why = [], ""
                try:
                    row = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    why = f"broken quoting: {error}"
                if row and not why:
                    if len(row) != len(header):
                        why = (
                            f"broken quoting or a field lost: {len(row)} fields, not {len(header)}"
                        )
                    elif not (joined := "".join(row)).isascii() and _ESCAPED.search(joined):
                        why = "not UTF-8"
                if why:
                    broken += 1
                    first_fault = first_fault or f"near line {line + reader.line_num}, {why}"
                    if why != "not UTF-8" and header[0] != "text" and "text" in header:
                        line += (
                            reader.line_num
                        )  # in the middle of a torn note: go on where a record begins
                        before = header[: header.index("text")]
                        fields = [
                            r'"?\d*(?:\.0)?"?,' if c in _NUMBERS else r'"?[^",\n]*"?,'
                            for c in before
                        ]
                        begins = re.compile("".join(fields)).match
                        if held and row and not re.match("".join(fields[:3]), ",".join(row) + ","):
                            held, good, broken = (
                                [],
                                good - 1,
                                broken + 1,
                            )  # the rest of a note that a stray quote ended early
                        reader = csv.reader(
                            dropwhile(lambda text, begins=begins: not begins(text), lines),
                            strict=True,
                        )
                elif row:
                    good += 1
                    if tick and not good % 256:
                        tick(raw.tell())
                    if held:
                        yield held
                    held = [row[i] for i in at]
            if held:
                yield held
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = (
            "is no gzip file"
            if path.open("rb").read(2) not in (b"", b"\x1f", b"\x1f\x8b")
            else "is truncated or damaged"
        )
        raise ValueError(f"{name} {what} (after {good} records: {error}). {_AGAIN}") from error
    finally:
        csv.field_size_limit(limit)
    if broken:
        skipped[f"{name}: records that cannot be read (the first {first_fault})"] += broken
    if broken > max(1, _BROKEN_SHARE * (good + broken)) or (broken and not good):
        advice = (
            "Convert it: iconv -f latin1 -t utf8."
            if "UTF-8" in first_fault
            else "Was it edited? Take the original file."
        )
        raise ValueError(
            f"{name}: {broken} of {good + broken} records cannot be read; the first {first_fault}. {advice} {_SEE}"
        )
    if not good:
        raise ValueError(f"{name} has a header and no records. {_AGAIN}")


def _text(raw: IO[bytes], path: Path) -> IO[str]:
    zipped = path.suffix == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]  # some browsers unpack by name only
    binary = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if zipped else raw
    # surrogateescape: one wrong byte then spoils one record, not the whole file
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[arg-type]


def _integer(field: str) -> int | None:
    """A whole number of at most 18 digits however it was written ("10", "10.0", "ICD-10-CM"), None if it is none."""
    if field.isdecimal() and len(field) <= 18:
        return int(field)
    found = re.fullmatch(r"(?:ICD|v)?[-_ ]?(\d{1,18})(?:\.0*)?(?:[-_ ]?CM)?", field.strip(), re.I)
    return int(found[1]) if found else None


def texts(data_dir: str | Path, hadm_ids: Collection[int]) -> Iterator[tuple[int, str]]:
    """(hadm_id, whole discharge summary) of the given admissions, of several the first: for the leak audit and for reading."""
    wanted, best = {str(h) for h in hadm_ids}, {}
    for hadm, kind, seq, text in read_rows(
        find_table(data_dir, "note/discharge"), ("hadm_id", "note_type", "note_seq", "text")
    ):
        if kind.strip() != "AD" and (hadm in wanted or str(_integer(hadm)) in wanted):
            written, key = _integer(seq) or 0, int(_integer(hadm) or 0)
            if key not in best or written < best[key][0]:
                best[key] = written, text
    yield from ((key, text) for key, (_, text) in best.items())


def dictionary(data_dir: str | Path, skipped: Counter[str] | None = None) -> set[str]:
    """The ICD-10-CM codes (normalised) of the data set's own `d_icd_diagnoses`, retired ones included."""
    from helpers import icd

    rows = read_rows(
        find_table(data_dir, "hosp/d_icd_diagnoses"), ("icd_code", "icd_version"), skipped
    )
    return {
        code for raw, version in rows if _integer(version) == 10 and (code := icd.normalise(raw))
    }


# --- step 1: labels ---------------------------------------------------------------------------------------------------


def _labels(
    data_dir: Path, funnel: dict[str, int], skipped: Counter[str]
) -> tuple[dict[int, tuple[int, str]], set[int]]:
    """hadm_id -> (subject_id, principal ICD-10-CM code); and all admissions. Fills the first rows of the funnel."""
    from helpers import icd

    own_codes = dictionary(data_dir, skipped)
    admissions: dict[int, int] = {}
    for row in read_rows(
        find_table(data_dir, "hosp/admissions"), ("subject_id", "hadm_id"), skipped
    ):
        subject, hadm = map(_integer, row)
        if subject is None or hadm is None:
            skipped["hosp/admissions: subject_id or hadm_id is no number"] += 1
        elif hadm in admissions:
            skipped["hosp/admissions: hadm_id stands twice"] += 1
        else:
            admissions[hadm] = subject
    principal: dict[int, tuple[int, str] | None] = {}
    columns = ("subject_id", "hadm_id", "seq_num", "icd_code", "icd_version")
    for *ids, raw, written in read_rows(
        find_table(data_dir, "hosp/diagnoses_icd"), columns, skipped
    ):
        if ids[2].strip() not in ("1", "1.0", "01"):
            continue
        (subject, hadm, _), version = map(_integer, ids), _integer(written)
        if subject is None or hadm is None or version not in (9, 10):
            skipped["hosp/diagnoses_icd: an id or icd_version cannot be read"] += 1
        elif admissions.get(hadm) != subject:
            skipped[
                "hosp/diagnoses_icd: principal diagnosis of no admission in hosp/admissions"
            ] += 1
        else:
            code = (icd.normalise(raw) or raw) if version == 10 else raw
            value = (version, sys.intern(code))
            if hadm not in principal:
                principal[hadm] = value
            elif principal[hadm] == value:
                skipped["hosp/diagnoses_icd: principal diagnosis stands twice"] += 1
            else:
                skipped["hosp/diagnoses_icd: two different principal diagnoses"] += (
                    principal[hadm] is not None
                )
                principal[hadm] = None
    if not principal:
        faults = "; ".join(
            f"{n} x {fault}" for fault, n in skipped.items() if fault.startswith("hosp/")
        )
        raise ValueError(
            f"hosp/diagnoses_icd: no row with seq_num 1 joins hosp/admissions ({faults or 'no row has seq_num 1'}). "
            f"Are both of one release? {_SEE}"
        )
    known = {hadm: value for hadm, value in principal.items() if value}
    tens = {hadm: code for hadm, (version, code) in known.items() if version == 10}
    valid = {code for code in set(tens.values()) if icd.is_valid(code, own_codes)}
    funnel["admissions"] = len(admissions)
    funnel["one principal diagnosis"] = len(known)
    funnel["coded in ICD-10"] = len(tens)
    labels = {hadm: (admissions[hadm], code) for hadm, code in tens.items() if code in valid}
    funnel["valid code"] = len(labels)
    if not labels:
        raise ValueError(
            f"hosp/diagnoses_icd: no admission has a valid ICD-10-CM principal diagnosis (icd_version 10). {_SEE}"
        )
    return labels, set(admissions)


# --- step 2: notes ----------------------------------------------------------------------------------------------------

_MIX = np.random.default_rng(20261101).integers(1, 2**32, (2, HASHES), dtype=np.uint32) | np.uint32(
    1
)  # constants


def _extract(chunk: list[tuple[int, int, int, str]]) -> list[tuple[Any, ...]]:
    """Worker: (subject, hadm, note_seq, text) -> the same ids, admission note or "", its words, digest, minhash."""
    out = []
    for subject, hadm, seq, text in chunk:
        found = notes.sections(text)
        note = (
            notes.assemble(found)
            if any(found.get(name, "").strip("_ .\n") for name in notes.CORE)
            else ""
        )
        words = note.lower().split()
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
        out.append((subject, hadm, seq, note, len(note.split()), digest, _minhash(words).tobytes()))
    return out


def _minhash(words: list[str]) -> np.ndarray:
    """Minima of HASHES functions over the shingles, uint32: two notes agree in about their Jaccard index of them."""
    coded = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint32, len(words))
    coded = np.pad(coded, (0, max(0, SHINGLE - len(words))))
    shingle = np.zeros(len(coded) - SHINGLE + 1, np.uint32)
    for i in range(SHINGLE):
        shingle = (shingle ^ coded[i : i + len(shingle)]) * np.uint32(0x9E3779B1)
        shingle ^= shingle >> np.uint32(15)
    mixed = (shingle[:, None] ^ _MIX[0]) * _MIX[1]
    return (mixed ^ (mixed >> np.uint32(16))).min(axis=0)


def _candidates(
    data_dir: Path,
    labels: dict[int, tuple[int, str]],
    admissions: set[int],
    skipped: Counter[str],
    chunk: int,
    tick: Callable[[int], None] | None,
) -> Iterator[list[tuple[int, int, int, str]]]:
    """Summaries of labelled admissions, in chunks."""
    batch: list[tuple[int, int, int, str]] = []
    joined = False
    columns = ("subject_id", "hadm_id", "note_type", "note_seq", "text")
    for *ids, kind, written, text in read_rows(
        find_table(data_dir, "note/discharge"), columns, skipped, tick
    ):
        subject, hadm = map(_integer, ids)
        seq = _integer(written)
        if subject is None or hadm is None or seq is None:
            skipped["note/discharge: subject_id, hadm_id or note_seq is no number"] += 1
        elif kind.strip() == "AD":
            skipped["note/discharge: addendum"] += 1
        elif hadm not in admissions:
            skipped["note/discharge: hadm_id is not in hosp/admissions"] += 1
        else:
            joined = True
            if hadm in labels and labels[hadm][0] != subject:
                skipped["note/discharge: subject_id is not that of hosp/admissions"] += 1
            elif hadm in labels:
                batch.append((subject, hadm, seq, text))
                if len(batch) == chunk:
                    yield batch
                    batch = []
    if not joined:
        raise ValueError(
            f"note/discharge: no hadm_id is in hosp/admissions. Do hosp/ and note/ belong together? {_SEE}"
        )
    yield batch


def _in_order(chunks: Iterable[list[Any]], workers: int) -> Iterator[list[tuple[Any, ...]]]:
    """`_extract` over chunks, in order, on `workers` processes; never more than a few chunks under way."""
    iterator = iter(chunks)
    first = list(islice(iterator, _ALONE))
    if (
        workers < 2 or len(first) < _ALONE
    ):  # few notes: starting processes would take longer than the work
        yield from map(_extract, chain(first, iterator))
        return
    from joblib import Parallel, delayed

    # joblib's own processes: no fork of a notebook with torch's threads, and no main guard asked of a script
    pool = Parallel(n_jobs=workers, return_as="generator", batch_size=1, pre_dispatch="2*n_jobs")
    yield from pool(delayed(_extract)(chunk) for chunk in chain(first, iterator))


# --- step 3: winners, duplicates, splits ------------------------------------------------------------------------------


def split_patients(
    subjects: np.ndarray, categories: np.ndarray, *, seed: int = 0, shares: Sequence[float] = SHARES
) -> np.ndarray:
    """Split for each case [n], by patient and stratified by category, whatever the order of the rows.

    Patients stand in a queue: by their rarest category, in an order that a hash of the seed fixes. Each goes to the split that
    is furthest below its share so far. So every category, and the whole, is divided close to `shares` (train, val, test), and
    the patients of rare codes fall in the test split as often as others do.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"shares must be three shares of train, val and test that sum to 1, not {tuple(shares)}."
        )
    count = Counter(categories.tolist())
    rarest: dict[int, tuple[int, str]] = {}
    cases: Counter[int] = Counter()
    for subject, category in zip(subjects.tolist(), categories.tolist(), strict=True):
        rarest[subject] = min(rarest.get(subject, (sys.maxsize, "")), (count[category], category))
        cases[subject] += 1

    def drawn(value: object) -> bytes:
        return hashlib.blake2b(f"{seed}/{value}".encode(), digest_size=8).digest()

    owed = np.array(shares) * (int.from_bytes(drawn("start"), "big") / 2**64)
    owed = np.roll(owed, int(drawn("turn")[0]) % 3) * (np.array(shares) > 0)
    target = {}
    for subject in sorted(rarest, key=lambda s: (drawn(rarest[s][1]), drawn(s), s)):
        owed += np.array(shares) * cases[subject]
        target[subject] = int(owed.argmax())
        owed[target[subject]] -= cases[subject]
    return np.array([SPLITS[target[s]] for s in subjects.tolist()], dtype=object)


def _keep(
    ids: dict[str, np.ndarray], funnel: dict[str, int], skipped: Counter[str], min_words: int
) -> np.ndarray:
    """Row numbers to keep, from columns without text: one note per admission, not empty, long enough, no duplicate."""
    order = np.lexsort(
        (ids["digest"], ids["note_seq"], ids["words"] == 0, ids["hadm_id"], ids["subject_id"])
    )
    hadm = ids["hadm_id"][order]
    first = np.r_[True, hadm[1:] != hadm[:-1]][: len(order)]
    skipped["note/discharge: further note of an admission"] += int((~first).sum())
    order = order[first]
    funnel["with a discharge summary"] = len(order)
    order = order[ids["words"][order] > 0]
    funnel["admission note not empty"] = len(order)
    order = order[ids["words"][order] >= min_words]
    funnel[f"at least {min_words} words"] = len(order)
    _, index = np.unique(ids["digest"][order], return_index=True)
    order = order[np.sort(index)]
    funnel["no exact duplicate"] = len(order)
    kept, patient, buckets = [], None, {}
    minhash = ids["minhash"]
    for row in order:  # sorted by patient, so the buckets of one patient are all that is in memory
        if ids["subject_id"][row] != patient:
            patient, buckets = ids["subject_id"][row], {}
        keys = [(i, minhash[row, i : i + BAND].tobytes()) for i in range(0, HASHES, BAND)]
        rivals = {buckets[key] for key in keys if key in buckets}
        if not any((minhash[row] == minhash[rival]).mean() >= SAME for rival in rivals):
            kept.append(row)
            for key in keys:
                buckets.setdefault(key, row)
    funnel["no near-duplicate of the patient"] = len(kept)
    return np.array(kept, dtype=np.int64)


def write_cases(
    data_dir: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    min_words: int = MIN_WORDS,
    workers: int | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
) -> dict[str, int]:
    """Stream the raw files of `data_dir` into the table of cases `out` (parquet, written whole or not at all).

    Columns: subject_id, hadm_id int64, note str, code (normalised), category str, chapter int64, split (train, val, test),
    seen_in_train bool (the full code occurs in train), note_words int64; sorted by no column: in the order of the notes' file.
    shares: of cases in train, val, test; workers: processes, default one for each core. Returns the funnel, step -> admissions
    left. Raises FileNotFoundError or ValueError for files that are missing or unfit, saying which and what to do.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from joblib import cpu_count  # those that this process may use
    from tqdm.auto import tqdm

    data_dir, out = Path(data_dir), Path(out)
    if out.is_dir():
        raise ValueError(
            f"{out} is a folder. Name the file that the cases go into, such as {out / 'cases.parquet'}."
        )
    for table in (
        "hosp/admissions",
        "hosp/diagnoses_icd",
        "hosp/d_icd_diagnoses",
        "note/discharge",
    ):
        source = find_table(data_dir, table)  # a missing file is told now, not after an hour
    split_patients(np.array([]), np.array([]), shares=shares)
    funnel: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    labels, admissions = _labels(data_dir, funnel, skipped)
    kinds = {"note": pa.large_string(), "digest": pa.binary(8), "minhash": pa.binary(4 * HASHES)}
    names = ("subject_id", "hadm_id", "note_seq", "note", "words", "digest", "minhash")
    schema = pa.schema([(name, kinds.get(name, pa.int64())) for name in names])
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(
        f".{out.name}.*"
    ):  # notes that a killed run left behind, once nobody writes there any more
        if (
            left.is_dir()
            and time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > 3600
        ):
            shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
        tqdm(
            total=source.stat().st_size,
            desc=source.name,
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        aside, whole = Path(folder) / "notes.parquet", Path(folder) / "cases.parquet"
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            chunks = _candidates(
                data_dir, labels, admissions, skipped, chunk, lambda at: bar.update(at - bar.n)
            )
            for rows in _in_order(chunks, workers or cpu_count()):
                if rows:
                    writer.write_table(
                        pa.table(
                            [list(column) for column in zip(*rows, strict=True)], schema=schema
                        )
                    )
        small = pq.read_table(aside, columns=[n for n in schema.names if n != "note"])
        ids = {n: small[n].to_numpy() for n in ("subject_id", "hadm_id", "note_seq", "words")}
        ids |= {
            n: np.frombuffer(b"".join(small[n].to_pylist()), t)
            for n, t in (("digest", "<u8"), ("minhash", "<u4"))
        }
        ids["minhash"] = ids["minhash"].reshape(-1, HASHES)
        kept = _keep(ids, funnel, skipped, min_words)
        if not len(kept):
            steps = ", ".join(f"{step} {n}" for step, n in funnel.items())
            raise ValueError(
                f"{data_dir}: no case is left ({steps}). Are the files of one release and unabridged? {_SEE}"
            )
        cases = _cases(ids, kept, labels, seed, shares)
        meta = {"funnel": json.dumps(funnel), "skipped": json.dumps(skipped), "seed": str(seed)}
        _copy(aside, whole, cases, meta)
        os.replace(whole, out)
    return funnel


def _cases(
    ids: dict[str, np.ndarray],
    kept: np.ndarray,
    labels: dict[int, tuple[int, str]],
    seed: int,
    shares: Sequence[float],
) -> pd.DataFrame:
    """The table of cases without its notes, indexed by the row of the file that holds them."""
    import pandas as pd

    from helpers import icd

    codes = [labels[h][1] for h in ids["hadm_id"][kept].tolist()]
    cases = pd.DataFrame(
        {"subject_id": ids["subject_id"][kept], "hadm_id": ids["hadm_id"][kept], "code": codes},
        index=kept,
    )
    cases["category"], cases["chapter"] = (
        cases["code"].map(icd.category),
        cases["code"].map(icd.chapter).astype("int64"),
    )
    cases["split"] = split_patients(
        cases["subject_id"].to_numpy(), cases["category"].to_numpy(), seed=seed, shares=shares
    )
    cases["seen_in_train"] = cases["code"].isin(set(cases.loc[cases["split"] == "train", "code"]))
    cases["note_words"] = ids["words"][kept]
    return cases.sort_index()


def _copy(aside: Path, whole: Path, cases: pd.DataFrame, meta: dict[str, str]) -> None:
    """Write the cases with their notes, one row group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.large_string(), pa.int64()
    kinds = {
        "subject_id": number,
        "hadm_id": number,
        "note": text,
        "code": text,
        "category": text,
        "chapter": number,
        "split": text,
        "seen_in_train": pa.bool_(),
        "note_words": number,
    }
    schema = pa.schema(kinds.items(), metadata=meta)
    source, start = pq.ParquetFile(aside), 0
    with source, pq.ParquetWriter(whole, schema, compression="zstd") as writer:
        for batch in source.iter_batches(8 * CHUNK, columns=["note"]):
            part = cases.loc[start : start + len(batch) - 1]
            found = batch.column(0).take(pa.array(part.index.to_numpy() - start))
            columns = [
                found if name == "note" else pa.array(part[name], kind)
                for name, kind in kinds.items()
            ]
            writer.write_table(pa.table(columns, schema=schema))
            start += len(batch)


def build_cases(data_dir: str | Path, *, seed: int = 0, **options: Any) -> pd.DataFrame:
    """The table of cases in memory: `write_cases` (which see for columns, options and errors), read back, sorted by patient.

    `.attrs["funnel"]`: step -> admissions left; `.attrs["skipped"]`: fault -> rows left out.
    """
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.parquet"
        funnel = write_cases(data_dir, path, seed=seed, **options)
        cases = pd.read_parquet(path).sort_values(["subject_id", "hadm_id"], ignore_index=True)
        cases.attrs |= {"funnel": funnel, "skipped": read_skipped(path)}
    return cases


def read_funnel(path: str | Path) -> dict[str, int]:
    """Step -> admissions left after it, in order, as `write_cases` noted it in the parquet file."""
    return _read_meta(path, "funnel")


def read_skipped(path: str | Path) -> dict[str, int]:
    """Fault -> rows or notes left out because of it, as `write_cases` noted it in the parquet file."""
    return _read_meta(path, "skipped")


def _read_meta(path: str | Path, key: str) -> dict[str, int]:
    import pyarrow.parquet as pq

    meta = pq.read_schema(path).metadata or {}
    if key.encode() not in meta:
        raise ValueError(
            f"{path} holds no {key}: it was not written by `python -m helpers.mimic`. Make it again."
        )
    return json.loads(meta[key.encode()])


def main() -> None:
    """`python -m helpers.mimic DATA_DIR OUT.parquet`: build the table of cases, print the funnel."""
    parser = argparse.ArgumentParser(
        description="Raw MIMIC-IV files to the table of cases (parquet)."
    )
    parser.add_argument("data_dir", type=Path, help="folder that holds hosp/ and note/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=None, help="processes (default: one for each core)"
    )
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that what is half done is cleared away
    try:
        funnel = write_cases(
            args.data_dir, args.out, seed=args.seed, workers=args.workers, progress=True
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    for step, n in funnel.items():
        print(f"{n:>9,}  {step}")
    for fault, n in read_skipped(args.out).items():
        print(f"left out {n:,}: {fault}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
