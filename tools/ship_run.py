"""Make the finished run that ships with the course: `python -m tools.ship_run`.

Copies the artefacts of the run folder of the tiny profile to results/<run>, from where a reader's
first notebook takes them. Run it after `FRESH=1 make course`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from helpers.machinery import artefacts, places, store

ORIGIN = " (it ships with the course)"
MOST_MB = 12
OTHER_FILES = ("metrics.json",)


def ship(run: Path, target: Path) -> int:
    """Copy each finished artefact of a run, experiments apart; returns the bytes.

    Raises ValueError where one is not up to date, or all are too large for the repository.
    """
    stages = [name for name in artefacts.NOTEBOOKS if (run / name / store.RECORD).is_file()]
    answers = [f"answers/{record.parent.name}" for record in run.glob(f"answers/*/{store.RECORD}")]
    names = stages + sorted(answers)
    stale = [name for name in names if artefacts.why_stale(name)]
    missing = {*artefacts.NOTEBOOKS} - {"data", "answers", *names}
    if stale or missing:
        raise ValueError(f"{run} is no finished run: {', '.join([*stale, *sorted(missing)])}.")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in names:
        folder = Path(shutil.copytree(run / name, part / name))
        _forget_places(folder)
        record = places.read(folder / store.RECORD)
        places.write(
            folder / store.RECORD, record | {"files": store._sizes(folder), "origin": ORIGIN}
        )
    for name in OTHER_FILES:
        shutil.copy(run / name, part)
    size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    if size > MOST_MB * 1e6:
        raise ValueError(f"{part} has {size / 1e6:.1f} MB, more than {MOST_MB}.")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return size


def _forget_places(folder: Path) -> None:
    """An adapter's files name the folder of its base on this machine: only the name stays."""
    base = str(places.PACKAGE / "tiny_base")
    for file in [*folder.glob("*.json"), *folder.glob("*.md")]:
        text = file.read_text(encoding="utf-8")
        if base in text:
            file.write_text(text.replace(base, "tiny_base"), encoding="utf-8")
        if json.dumps(str(places.root()))[1:-1] in file.read_text(encoding="utf-8"):
            raise ValueError(f"{file} names a folder of this machine.")


def main() -> None:
    """Ship the run of the present profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    run = places.run_dir()
    target = places.root() / "results" / run.name
    print(f"{places.show(target)}: {ship(run, target) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
