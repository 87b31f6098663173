"""Gives outputs and files the proof that tools/privacy_guard.py asks for, after it looked.

    python -m tools.privacy_proof notebooks/*.ipynb
    python -m tools.privacy_proof docs/result.png --reason "figures of docs/" --vouch

For maintainers, after the synthetic hospital was used, in the same environment (ICD_DATA_DIR).
The evidence that is asked for:

1. The data folder holds, byte for byte, what helpers.hospital writes: it is written again.
2. A notebook's set-up cell says that it used this folder. Nothing says that it used another.
3. No number of a patient or admission is shown that the synthetic hospital does not have.
4. The words of the text stand in the synthetic hospital or in the course's own text. Of the first
   60 words of a real report, 11 do not (median of 500 reports of CodiEsp, 41 of a whole one). Up to
   4 others are tolerated, such as words cut off in a table; all are printed.

Then a notebook gets a stamp in its metadata: the sha256 of the data, and for each cell one of what
it shows. A cell that is executed again loses its proof. Any other file gets a line in
tools/privacy_allowed.sha256. Pictures and weights cannot be read: somebody vouches for them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import hospital
from helpers.machinery import places
from tools import privacy_guard as guard

WORD = re.compile(r"[A-Za-z]{3,}")
# What is no word: marks of HTML, sums in hexadecimal digits
MARKUP = re.compile(r"<style.*?</style>|<script.*?</script>|<[^>]*>|[0-9a-f]{32,}", re.DOTALL)
STRANGE_WORDS = 4  # cut off at the end of a table's cell, or of a library's message
HEADER = """\
# What the repository ships beside text that people write: sha256, two blanks, name. The comment
# above says what it is; tools/privacy_guard.py refuses every other figure, table, page and weight.
# Written by `python -m tools.privacy_proof FILE --reason "..."`.
"""


@dataclass(frozen=True)
class Hospital:
    """A folder of data that was proven to be synthetic."""

    folder: Path
    sha256: str  # of its tables
    command: str  # that writes it
    ids: frozenset[str]  # numbers of its patients and admissions
    words: frozenset[str]


def tables(folder: Path) -> dict[str, bytes]:
    """Name -> content of each raw table of a data folder, unpacked."""
    files = sorted([*folder.glob("hosp/*"), *folder.glob("note/*")])
    contents = {}
    for file in files:
        content = file.read_bytes()
        name = file.relative_to(folder).as_posix()
        contents[name] = gzip.decompress(content) if file.suffix == ".gz" else content
    return contents


def prove(folder: Path) -> Hospital:
    """Show that a data folder holds what helpers.hospital writes and nothing else.

    Raises ValueError where it does not, FileNotFoundError where it is no synthetic hospital at all.
    """
    manifest = folder / "truth" / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(
            f"{folder}: no synthetic hospital lies here. If ICD_DATA_DIR names real data, its "
            "outputs cannot be proven, and must not be. Else run notebook 1 first."
        )
    made = json.loads(manifest.read_text(encoding="utf-8"))
    options = {"admissions": made["admissions"], "seed": made["seed"]}
    options |= {name: made[name] for name in ("reading", "full") if made.get(name)}
    found = tables(folder)
    with tempfile.TemporaryDirectory() as scratch:
        expected = tables(hospital.write(Path(scratch) / "again", **options))
    differing = [name for name in found if found[name] != expected.get(name)]
    differing += [name for name in expected if name not in found]
    if differing:
        raise ValueError(
            f"{folder}: not what helpers.hospital writes with {options}: {', '.join(differing)}. "
            "Outputs of other data are not for git. If it was an earlier version of the course "
            "that wrote it, remove the folder and run the notebooks again."
        )
    text = b"\n".join(found.values()).decode("utf-8")
    marks = [(name, hashlib.sha256(content).hexdigest()) for name, content in found.items()]
    flags = " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in options.items()
    )
    return Hospital(
        folder=folder,
        sha256=hashlib.sha256(json.dumps(marks).encode()).hexdigest(),
        command=f"python -m helpers.hospital OUT_DIR {flags}",
        ids=frozenset(guard.NUMBER.findall(text)),
        words=words(text),
    )


def words(text: str) -> frozenset[str]:
    """The words of a text, in small letters, without MARKUP."""
    plain = html.unescape(MARKUP.sub(" ", text))
    return frozenset(word.lower() for word in WORD.findall(plain))


def course_words(root: Path) -> frozenset[str]:
    """The words of all text in the repository that people wrote, cells of notebooks included."""
    texts = []
    for name, content in guard.staged(root).items():
        text = guard.as_text(content or b"")
        if text is None:
            continue
        if name.endswith(".ipynb"):
            texts += [guard.joined(cell["source"]) for cell in json.loads(text)["cells"]]
        elif guard.is_source(name):
            texts.append(text)
    return frozenset[str]().union(*map(words, texts))


# --- the evidence ---------------------------------------------------------------------------------


def doubts(text: str, source: Hospital, known: frozenset[str]) -> tuple[list[str], list[str]]:
    """What in a text speaks against the synthetic hospital.

    Returns faults, in words, and what may have a good reason: strange words, and numbers that look
    like those of patients where the text does not call them so.
    """
    faults = guard.other_data(text)
    strange = sorted(words(text) - source.words - known)
    if guard.NAMES_IDS.search(text):
        others = sorted({n for n in guard.NUMBER.findall(text) if n not in source.ids})
        if others:
            faults.append(f"{len(others)} numbers that nobody has in {source.folder}: {others[0]}")
    else:
        strange += guard.real_numbers(text)
    return faults, strange


def notebook_doubts(
    notebook: dict[str, Any], source: Hospital, known: frozenset[str]
) -> tuple[list[str], list[str]]:
    """As `doubts`, for all that a notebook shows."""
    text = guard.output_text(guard.outputs(notebook))
    faults, strange = doubts(text, source, known)
    folders = [folder for folder, kind in guard.DATA_LINE.findall(text) if kind == guard.SYNTHETIC]
    expected = places.show(source.folder)
    if not folders:
        faults.append("no set-up cell that says which data it used: run the notebook from its top")
    faults += [
        f"the data folder {folder}, not {expected}" for folder in folders if folder != expected
    ]
    return faults, strange


# --- the proof ------------------------------------------------------------------------------------


def stamp(notebook: dict[str, Any], source: Hospital) -> None:
    """Write into a notebook's metadata what its outputs are and what they were made from."""
    shown = guard.outputs(notebook)
    notebook["metadata"][guard.STAMP] = {
        "sha256": source.sha256,
        "written_by": source.command,
        "outputs": {cell: guard.output_digest(source.sha256, shown[cell]) for cell in shown},
    }


def write_notebook(path: Path, notebook: dict[str, Any]) -> None:
    """As Jupyter writes it."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    places.write(path, text + "\n")


def allow(text: str, added: dict[str, bytes], reason: str, root: Path) -> str:
    """The list of allowed files with these added, and without those that are gone.

    reason: "" keeps that of an earlier entry. Raises ValueError where there is none.
    """
    groups: dict[str, dict[str, str]] = {}
    earlier = ""
    for line in text.removeprefix(HEADER).splitlines():
        if line.startswith("#"):
            earlier = line.strip("# ")
        elif line:
            key, name = line.split("  ", 1)
            groups.setdefault(earlier, {})[name] = key
    for name, content in added.items():
        before = next((each for each, names in groups.items() if name in names), "")
        chosen = reason or before
        if not chosen:
            raise ValueError(f'{name}: say what it is, with --reason "..."')
        if before:
            del groups[before][name]
        groups.setdefault(chosen, {})[name] = guard.sha256(content)
    blocks = []
    for each, names in groups.items():
        lines = [f"{names[name]}  {name}" for name in sorted(names) if (root / name).is_file()]
        if lines:
            blocks.append("\n".join([f"# {each}", *lines]))
    return HEADER + "\n" + "\n\n".join(blocks) + "\n"


def give(
    paths: Iterable[Path], root: Path, source: Hospital, reason: str = "", vouch: bool = False
) -> list[str]:
    """Stamp notebooks and list other files; returns those that were refused, with the reason.

    Nothing is listed where one of the other files is refused.
    """
    known = course_words(root)
    refused = []
    added: dict[str, bytes] = {}
    for path in paths:
        name = path.resolve().relative_to(root).as_posix()
        content = path.read_bytes()
        place = guard.place_fault(name)
        if place:
            refused.append(f"{name}: {place}")
            continue
        is_notebook = path.suffix == ".ipynb"
        text = guard.as_text(content)
        if is_notebook:
            notebook = json.loads(content)
            if not guard.outputs(notebook):
                print(f"{name}: shows nothing, needs no proof")
                continue
            faults, strange = notebook_doubts(notebook, source, known)
        elif text is None:
            faults, strange = [], []
            if not vouch:
                faults = ["nobody can read it: look at it, and say with --vouch that you did"]
        else:
            faults, strange = doubts(text, source, known)
        if strange:
            print(f"{name}: stands nowhere in the course: {', '.join(strange[:40])}")
        if len(strange) > STRANGE_WORDS and not vouch:
            faults.append(
                f"{len(strange)} words or numbers that stand neither in the hospital nor in the "
                "course: look where they come from, and say with --vouch that you did"
            )
        if faults:
            refused += [f"{name}: {fault}" for fault in faults]
        elif is_notebook:
            stamp(notebook, source)
            write_notebook(path, notebook)
            print(f"{name}: stamped")
        else:
            added[name] = content
    if added and not refused:
        file = root / guard.ALLOWED
        before = file.read_text(encoding="utf-8") if file.is_file() else HEADER
        places.write(file, allow(before, added, reason, root))
        print(f"{len(added)} files listed in {guard.ALLOWED}: git add it too")
    return refused


def main() -> int:
    """The command line; see the head of this file. 1 where something was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--reason", default="", help="what the files are; kept from the last time")
    parser.add_argument(
        "--vouch", action="store_true", help="you have looked at what cannot be read"
    )
    arguments = parser.parse_args()
    try:
        print(f"Writing {places.show(places.data_dir())} again, to compare it ...", flush=True)
        source = prove(places.data_dir())
        root = places.root()
        refused = give(arguments.files, root, source, arguments.reason, arguments.vouch)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if refused:
        print("\nNo proof for:", *refused, sep="\n  ", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
