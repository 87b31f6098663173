"""Raw files to admission notes: `helpers.mimic` against the usual way, on the same files in the
same run.

    python -m benchmarks.mimic                   3,318 and 33,179 summaries (1 % and 10 % of
    MIMIC-IV-Note 2.2) python -m benchmarks.mimic --shares 0.01 0.1 1 --out results/mimic.csv

The usual way loads every table into pandas and then runs one regular expression per section over
each note. Both ways get the same job (ICD-10 principal diagnosis, join, admission note, parquet),
each in a process of its own. Peak memory is the largest sum of the proportional set sizes (PSS,
/proc/*/smaps_rollup) of the process and its children, sampled every 50 ms. Files are invented by
tests/mimic_fixture.py: summaries of about 1,500 words, 37 % of the admissions coded in ICD-10.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTES = 331_794  # discharge summaries in MIMIC-IV-Note 2.2
ICD10 = 122_317 / NOTES  # share of them that belong to admissions coded in ICD-10
ROOT = Path(__file__).parents[1]


def write_files(folder: Path, notes: int, seed: int = 0) -> None:
    """A data folder with `notes` summaries of about 1,500 words (gzip, as PhysioNet ships them),
    streamed to disk."""
    from tests import mimic_fixture as fixture

    rng = random.Random(seed)
    pool = [fixture.summary(rng, 1500) for _ in range(400)]

    def rows() -> Iterator[list[Any]]:
        for i in range(notes):
            # each note is two halves of different pool notes and a number, so that no two are
            # duplicates
            a, b = rng.choice(pool), rng.choice(pool)
            text = a[: a.index("Past Medical")] + b[b.index("Past Medical") :]
            yield [
                f"{i}-DS-1",
                10_000_000 + i // 2,
                20_000_000 + i,
                "DS",
                1,
                "",
                "",
                text.replace("patient", f"patient {i}", 3),
            ]

    def diagnoses() -> Iterator[list[Any]]:
        for i in range(notes):
            code, version = (rng.choice(fixture.CODES), 10) if rng.random() < ICD10 else ("4019", 9)
            for seq in range(1, 12):
                yield [
                    10_000_000 + i // 2,
                    20_000_000 + i,
                    seq,
                    code if seq == 1 else "I10",
                    version,
                ]

    fixture.write_table(folder, "note/discharge", rows())
    fixture.write_table(folder, "hosp/diagnoses_icd", diagnoses())
    fixture.write_table(
        folder,
        "hosp/admissions",
        ([10_000_000 + i // 2, 20_000_000 + i, "", "", 0] for i in range(notes)),
    )
    fixture.write_table(folder, "hosp/d_icd_diagnoses", ([c, 10, "title"] for c in fixture.CODES))


def usual_way(data: Path, out: Path) -> int:
    """Everything into pandas, one regular expression per section."""
    import pandas as pd

    titles = {
        "CHIEF COMPLAINT": "chief complaint",
        "PRESENT ILLNESS": "history of present illness",
        "MEDICAL HISTORY": "past medical history",
        "MEDICATION ON ADMISSION": "medications on admission",
        "ALLERGIES": "allergies",
        "PHYSICAL EXAM": "physical exam",
        "FAMILY HISTORY": "family history",
        "SOCIAL HISTORY": "social history",
    }
    diagnoses = pd.read_csv(data / "hosp/diagnoses_icd.csv.gz", dtype={"icd_code": str})
    diagnoses = diagnoses[(diagnoses["seq_num"] == 1) & (diagnoses["icd_version"] == 10)]
    notes = pd.read_csv(data / "note/discharge.csv.gz")
    cases = notes.merge(diagnoses[["hadm_id", "icd_code"]], on="hadm_id")
    for name, heading in titles.items():
        pattern = re.compile(rf"{heading}:\n?(.*?)\n\s*\n+[^\n]*?:", re.I | re.S)
        cases[name] = cases["text"].map(
            lambda text, p=pattern: found[1] if (found := p.search(text)) else ""
        )
    cases["note"] = cases[list(titles)].apply(
        lambda row: "\n".join(f"{k}: {v}" for k, v in row.items() if v), axis=1
    )
    cases[["subject_id", "hadm_id", "note", "icd_code"]].to_parquet(out)
    return len(cases)


def this_way(data: Path, out: Path) -> int:
    from helpers import mimic

    return list(mimic.write_cases(data, out).values())[-1]


def _family_pss() -> int:
    """Bytes of proportional memory of this process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.findall(r"Pss:\s+(\d+)", rollup)[0]) * 1024
        except (OSError, IndexError):  # the process has just ended
            continue
    return total


def measure(way: str, data: Path) -> None:
    """Child process: run one way, print seconds, peak memory and cases as JSON."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], _family_pss())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with tempfile.TemporaryDirectory(dir=data) as folder:
        start = time.perf_counter()
        cases = {"this": this_way, "usual": usual_way}[way](data, Path(folder) / "out.parquet")
        seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(
        json.dumps(
            {"seconds": round(seconds, 2), "peak_mib": round(peak[0] / 2**20), "cases": cases}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Speed and memory of helpers.mimic against the usual way."
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.01, 0.1],
        help="of the 331,794 summaries, 1 for all",
    )
    parser.add_argument("--ways", nargs="+", default=["usual", "this"], choices=["usual", "this"])
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the files go (the full size needs about 1 GB)"
    )
    parser.add_argument("--out", type=Path, default=None, help="write the table as CSV")
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
        return
    table, load = [], os.getloadavg()[0]  # what else keeps the machine busy
    print(f"{'notes':>9} {'way':>6} {'s':>8} {'notes/s':>8} {'peak MiB':>9}")
    for share in args.shares:
        count = round(NOTES * share)
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            write_files(Path(folder), count)
            pair = {}
            for way in args.ways:
                command = [sys.executable, "-m", "benchmarks.mimic", "--measure", way, folder]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    print(
                        f"{count:>9,} {way:>6} failed ({done.returncode}): "
                        f"{done.stderr.strip().splitlines()[-1:]}"
                    )
                    continue
                pair[way] = json.loads(done.stdout.splitlines()[-1])
                row = {
                    "notes": count,
                    "way": way,
                    **pair[way],
                    "notes_per_s": round(count / pair[way]["seconds"]),
                }
                table.append(row)
                print(
                    f"{count:>9,} {way:>6} {row['seconds']:>8} {row['notes_per_s']:>8,} "
                    f"{row['peak_mib']:>9,}"
                )
        if len(pair) == 2:
            speed = pair["usual"]["seconds"] / pair["this"]["seconds"]
            memory = pair["this"]["peak_mib"] / pair["usual"]["peak_mib"]
            print(f"{'':>9} ratio: {speed:.2f} x the speed, {memory:.2f} x the peak memory")
    if args.out:
        command = "python -m benchmarks.mimic --shares " + " ".join(
            f"{share:g}" for share in args.shares
        )
        made = {
            "command": command,
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "made": time.strftime("%Y-%m-%d"),
            "load": round(load, 1),
        }
        with args.out.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, [*table[0], *made], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | made for row in table)


if __name__ == "__main__":
    main()
