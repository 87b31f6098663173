"""Refuses what may hold patients: before each commit (pre-commit runs it), and in a test.

    python3 tools/privacy_guard.py [FILE ...]       no name: every file that git tracks

It judges the content that git would commit (the index), not what lies on the disk: the two differ
where nbstripout takes the outputs out of a notebook on its way into git. Refused are

- folders of data and runs, and MIMIC-IV's own files, whatever is in them;
- notebooks with outputs that carry no stamp, or were changed after they were stamped;
- figures, tables, pages, weights and every file that is not plain text, unless the sha256 of its
  content stands in tools/privacy_allowed.sha256;
- text with the marks of a discharge summary or with MIMIC-IV's numbers of patients and admissions.

What this cannot recognise: a few retyped words of a note, and a stamp that somebody forges. Stamps
and entries come from `python -m tools.privacy_proof`, which asks for evidence.

Exit status: 0 all may be committed, 1 something is refused, 2 it could not look. Only the standard
library, and Python 3.9 or newer: it runs without the course's environment.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED = "tools/privacy_allowed.sha256"
PROOF = "python -m tools.privacy_proof"
STAMP = "synthetic_hospital"  # the notebook's metadata that ties its outputs to the data

# --- (a) where nothing may ever be committed ------------------------------------------------------

FORBIDDEN_ROOTS = ("data", "runs", "models", "build")
FORBIDDEN_FOLDERS = (
    ".ipynb_checkpoints",
    ".making",
    "physionet.org",
    "mimiciv",
    "mimic-iv",
    "mimic-iv-note",
    "wandb",
)
PERMITTED = ("data/README.md",)
# The tables of MIMIC-IV (hosp, icu, ed, note), whatever their ending
RAW_TABLES = (
    *("admissions", "caregiver", "chartevents", "d_hcpcs", "d_icd_diagnoses", "d_icd_procedures"),
    *("d_items", "d_labitems", "datetimeevents", "diagnoses_icd", "diagnosis", "discharge"),
    *("discharge_detail", "drgcodes", "edstays", "emar", "emar_detail", "hcpcsevents", "icustays"),
    *("ingredientevents", "inputevents", "labevents", "medrecon", "microbiologyevents", "omr"),
    *("outputevents", "patients", "pharmacy", "poe", "poe_detail", "prescriptions"),
    *("procedureevents", "procedures_icd", "provider", "pyxis", "radiology", "radiology_detail"),
    *("services", "transfers", "triage", "vitalsign"),
)
RAW_ENDINGS = ("csv", "gz", "zip", "parquet", "tsv", "json", "jsonl", "feather", "bz2", "xz", "zst")

# --- (b) what people write, judged by its words ---------------------------------------------------

SOURCES = (
    *("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.js", "*.mjs", "*.css", "*.j2", "*.jinja"),
    *("*.mplstyle", "*.cfg", "*.ini", "*.sh", "*.cff", "*.bib", "Makefile", "*/Makefile"),
    *("LICENSE", ".gitignore", "*/.gitignore", ".gitattributes", ".ci/run", ALLOWED),
    *("constraints.txt", "configs/colab*.txt", "tests/setup_cell.txt"),
)
SOURCE_BYTES = 250_000  # nobody writes more into one file by hand

# The blank that stands for a name or a date in MIMIC: ___ (IV) or [**...**] (III). Patterns here
# begin with what is rare and look back afterwards: that is several times faster.
BLANK = re.compile(r"___(?!_)(?<!____)|\[\*\*[^\]\n]{0,80}\*\*\]")
FEW_BLANKS = 5  # enough to explain the blank; a discharge summary has dozens
# Files that hold invented notes: how many blanks each may have. The limits lie a little above what
# stands there now, so that a real summary (dozens of blanks) does not pass among the invented ones.
INVENTED_NOTES = {
    "helpers/hospital.py": (12, "the form of a synthetic summary"),
    "helpers/hospital_words.toml": (9, "the words of a synthetic summary"),
    "helpers/notes.py": (12, "rules that recognise the blank"),
    "helpers/notes_rules.yaml": (38, "an invented example beside each rule"),
    "tests/mimic_fixture.py": (10, "an invented summary"),
    "tests/test_notes.py": (30, "invented summaries"),
    "tests/test_notes_rules.py": (32, "invented summaries"),
}

# MIMIC-IV numbers patients 1xxxxxxx and admissions 2xxxxxxx at random. The synthetic hospital
# counts up from the lower end and never comes this far: 1 in 40 real numbers lies below it.
SYNTHETIC_IDS = 250_000
NUMBER = re.compile(r"[12](?<![\w.].)\d{7}(?!\w|\.\d)")
NAMES_IDS = re.compile(r"subject_?id|hadm_?id|note_?id|stay_?id", re.IGNORECASE)
NOTE_ID = re.compile(r"(1\d{7})(?<!\d.{8})-(?:DS|RR|AR)-\d+")
MANY_NUMBERS = 5  # that are not called ids in the same file
ENCODED = re.compile(r"[A-Za-z0-9+/]{60,}")
ENCODED_LINE = re.compile(r"^\W*[A-Za-z0-9+/]{60,}\W*(?:\\n\W*)?$", re.MULTILINE)
LONG_CODE = 2000  # characters in one piece
MANY_LINES = 40  # that hold nothing else

# --- (c) notebooks --------------------------------------------------------------------------------

DATA_LINE = re.compile(r"^data {5}(\S.*): (.*)$", re.MULTILINE)  # the set-up cell: folder, kind
SYNTHETIC = "synthetic patients"
METADATA_CHARACTERS = 1000  # of a cell, or of the notebook beside its kernel and its stamp


TAKE_OUT = "take it out of the commit: git rm --cached -- FILE (it stays on your disk)"
CLEAR = "clear its outputs (nbstripout FILE), then git add it again"
SHOW_PROOF = f"or, if it was made from the synthetic hospital: {PROOF} FILE"


@dataclass(frozen=True)
class Fault:
    """Why a file is refused, and what to do about it (FILE stands for its name)."""

    name: str
    what: str
    remedy: str = TAKE_OUT


def faults(name: str, content: bytes | None, allowed: dict[str, str]) -> list[Fault]:
    """What speaks against committing a file; [] where it may go.

    name: relative to the repository, with "/". content: None for a repository inside this one.
    allowed: sha256 -> name, as `read_allowed` gives it.
    """
    what = place_fault(name)
    if what:
        return [Fault(name, what)]
    if content is None:
        return [Fault(name, "is a repository of its own: nobody can look into it")]
    if sha256(content) in allowed:
        return []
    if name.lower().endswith(".ipynb"):
        return notebook_faults(name, content)
    text = as_text(content)
    if text is None or not is_source(name):
        is_changed = name in allowed.values()
        what = "is not plain text" if text is None else "is of a kind that programs write"
        what += (
            ", and is not the content that was allowed" if is_changed else ", and is not allowed"
        )
        return [Fault(name, what, f"{TAKE_OUT};\n       {SHOW_PROOF} --reason '...'")]
    return [Fault(name, what) for what in text_faults(name, text)]


def is_source(name: str) -> bool:
    """Whether people write files of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in SOURCES)


def sha256(content: bytes) -> str:
    """Of a file's content; of text with the line ends of Unix, so that a checkout on Windows has
    the same."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def as_text(content: bytes) -> str | None:
    """The text of a file; None where it is not UTF-8, or holds a byte that text has not."""
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def place_fault(name: str) -> str:
    """Why nothing may be committed at this place or under this name; "" where it may."""
    if name in PERMITTED:
        return ""
    *folders, file = name.lower().split("/")
    if folders and folders[0] in FORBIDDEN_ROOTS:
        return f"lies in {folders[0]}/, where data sets and runs lie"
    # A link or a file of that name
    if not folders and file in FORBIDDEN_ROOTS:
        return f"is called {file}, like the folder where data sets or runs lie"
    for folder in folders:
        if folder in FORBIDDEN_FOLDERS:
            return f"lies in {folder}/, which a download or a program fills"
    stem, *endings = file.split(".")
    # "discharge (1).csv.gz", "discharge-copy.csv": what a browser or a person makes of the name
    stem = re.sub(r"[\s(\-].*$", "", stem)
    if stem in RAW_TABLES and set(endings) & set(RAW_ENDINGS):
        return f"has the name of a table of MIMIC-IV ({stem})"
    return ""


# --- text -----------------------------------------------------------------------------------------


def text_faults(name: str, text: str) -> list[str]:
    """Marks of notes and of real patients in a text that people write, each in words."""
    found = []
    if len(text.encode()) > SOURCE_BYTES:
        found.append(f"has more than {SOURCE_BYTES:,} bytes: nobody writes that by hand")
    blanks = len(BLANK.findall(text))
    limit, _ = INVENTED_NOTES.get(name, (FEW_BLANKS, ""))
    if blanks > limit:
        found.append(
            f"has {blanks} blanks of de-identification ({'_' * 3}), as discharge summaries have; "
            f"here at most {limit} are expected (INVENTED_NOTES in tools/privacy_guard.py)"
        )
    numbers = real_numbers(text)
    if numbers:
        found.append(f"has numbers of MIMIC-IV's patients or admissions, such as {numbers[0]}")
    longest = max(map(len, ENCODED.findall(text)), default=0)
    if longest > LONG_CODE or (longest and len(ENCODED_LINE.findall(text)) > MANY_LINES):
        found.append("has a long encoded block (base64): a picture or a table may be in it")
    return found


def real_numbers(text: str) -> list[str]:
    """Numbers in the text that MIMIC-IV gives to patients and admissions and the synthetic
    hospital does not; [] where a few such numbers may be something else."""
    numbers = {number for number in NUMBER.findall(text) if _is_outside(number)}
    in_note_ids = {number for number in NOTE_ID.findall(text) if _is_outside(number)}
    enough = 1 if NAMES_IDS.search(text) else MANY_NUMBERS
    if len(numbers) < enough:
        numbers = set()
    return sorted(numbers | in_note_ids)


def _is_outside(number: str) -> bool:
    """Whether the synthetic hospital has no such number, and it is no date like 20261018 either."""
    if int(number) % 10_000_000 < SYNTHETIC_IDS:
        return False
    try:
        year = datetime.datetime.strptime(number, "%Y%m%d").year
    except ValueError:
        return True
    return not 1990 <= year <= 2050


# --- notebooks ------------------------------------------------------------------------------------


def notebook_faults(name: str, content: bytes) -> list[Fault]:
    """What speaks against a notebook: outputs without proof, hidden content, marks in its cells."""
    try:
        notebook = json.loads(content)
        cells = notebook["cells"]
        source = "\n\n".join(joined(cell["source"]) for cell in cells)
        shown = outputs(notebook)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"is no notebook that can be read ({type(error).__name__}: {error})"
        return [Fault(name, what, "save it again in JupyterLab, in nbformat 4.5")]
    found = [Fault(name, what) for what in text_faults(name, source)]
    found += [Fault(name, what, CLEAR) for what in _metadata_faults(notebook)]
    unproven = unproven_cells(notebook, shown)
    if unproven:
        few = ", ".join(unproven[:5]) + (", ..." if len(unproven) > 5 else "")
        what = f"{len(unproven)} of {len(shown)} cells show outputs without proof: {few}"
        found.append(Fault(name, what, f"{CLEAR};\n       {SHOW_PROOF}"))
        text = output_text(shown)
        numbers = real_numbers(text)
        found += [Fault(name, what, CLEAR) for what in other_data(text)]
        if numbers:
            what = f"shows numbers of MIMIC-IV's patients or admissions, such as {numbers[0]}"
            found.append(Fault(name, what, CLEAR))
    return found


def other_data(text: str) -> list[str]:
    """What a set-up cell says of data that are not synthetic, in words."""
    kinds = {kind for _, kind in DATA_LINE.findall(text) if kind != SYNTHETIC}
    return [f"was run on other data than the synthetic ({kind})" for kind in sorted(kinds)]


def outputs(notebook: dict[str, Any]) -> dict[str, Any]:
    """What a notebook shows beside its source: cell id -> outputs and attached files.

    In one form however it was saved: JupyterLab joins neighbouring streams, and numbers change with
    each execution. Widgets, which hold the state of what was shown, count as one more cell. Raises
    KeyError for a cell without id.
    """
    shown: dict[str, Any] = {}
    for cell in notebook["cells"]:
        parts: list[Any] = []
        for output in cell.get("outputs", []):
            output = {key: joined(value) for key, value in output.items()}
            output.pop("execution_count", None)
            if "data" in output:
                output["data"] = {kind: joined(value) for kind, value in output["data"].items()}
            is_stream = output.get("output_type") == "stream"
            if is_stream and parts and parts[-1].get("name") == output["name"]:
                parts[-1]["text"] += output["text"]
            else:
                parts.append(output)
        if cell.get("attachments"):
            parts.append(cell["attachments"])
        if parts:
            shown[cell["id"]] = parts
    if notebook["metadata"].get("widgets"):
        shown["widgets"] = notebook["metadata"]["widgets"]
    return shown


def joined(value: Any) -> Any:
    """A text that a notebook may hold as a list of lines; anything else as it is."""
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "".join(value) if is_lines else value


def output_text(shown: dict[str, Any]) -> str:
    """All text in outputs, pictures left out."""
    texts: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                if not key.startswith("image/") or key == "image/svg+xml":
                    collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    collect(shown)
    return "\n".join(texts)


def output_digest(hospital: str, shown: Any) -> str:
    """Ties what one cell shows to the data that it was made from (its sha256)."""
    text = json.dumps([hospital, shown], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def unproven_cells(notebook: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    """The cells that show what no stamp covers."""
    stamp = notebook["metadata"].get(STAMP) or {}
    hospital = stamp.get("sha256", "")
    proven = stamp.get("outputs", {}) if re.fullmatch("[0-9a-f]{64}", hospital) else {}
    return [cell for cell in shown if proven.get(cell) != output_digest(hospital, shown[cell])]


def _metadata_faults(notebook: dict[str, Any]) -> list[str]:
    """Places in a notebook that show nothing and may hold much."""
    usual = ("kernelspec", "language_info", "widgets", STAMP)
    rest = {key: value for key, value in notebook["metadata"].items() if key not in usual}
    places = {"the notebook": rest}
    places |= {f"cell {cell.get('id')}": cell.get("metadata") for cell in notebook["cells"]}
    large = [place for place, held in places.items() if len(json.dumps(held)) > METADATA_CHARACTERS]
    return [f"the metadata of {place} are long: content may hide in them" for place in large]


# --- what git would commit ------------------------------------------------------------------------


def git(root: Path, *arguments: str, data: bytes | None = None) -> bytes:
    """The output of a git command. Raises OSError or CalledProcessError where it fails."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=root, input=data, capture_output=True, check=True).stdout


def staged(root: Path) -> dict[str, bytes | None]:
    """Name -> content of each file in the index; None for a repository inside this one.

    A symbolic link's content is the path that it leads to.
    """
    entries = []
    for line in git(root, "ls-files", "--stage", "-z").split(b"\0"):
        if line:
            described, _, name = line.partition(b"\t")
            mode, key, _ = described.split()
            entries.append((os.fsdecode(name), mode, key))
    keys = [key for _, mode, key in entries if mode != b"160000"]
    blobs = iter(_blobs(root, keys))
    return {name: None if mode == b"160000" else next(blobs) for name, mode, _ in entries}


def _blobs(root: Path, keys: list[bytes]) -> list[bytes]:
    """The contents of git's objects, in order."""
    data = git(root, "cat-file", "--batch", data=b"".join(key + b"\n" for key in keys))
    contents = []
    position = 0
    for _ in keys:
        end = data.index(b"\n", position)
        size = int(data[position:end].split()[2])
        contents.append(data[end + 1 : end + 1 + size])
        position = end + 1 + size + 1
    return contents


def chosen(root: Path, names: list[str], index: dict[str, bytes | None]) -> dict[str, Any]:
    """The files of these names, relative to the present folder: as they stand in the index, else on
    the disk. Raises OSError where neither has one."""
    result: dict[str, bytes | None] = {}
    for given in names:
        path = Path(os.path.abspath(given))
        name = path.relative_to(root).as_posix() if root in path.parents else given
        if name in index:
            result[name] = index[name]
        elif path.is_symlink():
            result[name] = os.fsencode(os.readlink(path))
        else:
            result[name] = path.read_bytes()
    return result


def read_allowed(text: str) -> dict[str, str]:
    """sha256 -> name, of a list in the form of `sha256sum`.

    Raises ValueError for a line that is none, or has no comment above it that says why.
    """
    entries: dict[str, str] = {}
    reason = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#") or not line.strip():
            reason = line.strip("# ")
            continue
        key, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", key) or not name or not reason:
            raise ValueError(
                f"{ALLOWED}, line {number}: a sha256, two blanks and a name are expected, below a "
                f"comment that says why; {PROOF} writes such lines."
            )
        entries[key] = name
    return entries


def check(files: dict[str, bytes | None], index: dict[str, bytes | None]) -> list[Fault]:
    """What speaks against these files, in the order of their names. The index holds the list of
    what is allowed."""
    allowed = read_allowed((index.get(ALLOWED) or b"").decode("utf-8"))
    found = []
    for name in sorted(files):
        found += faults(name, files[name], allowed)
    return found


def message(found: list[Fault], looked_at: int) -> str:
    """All faults as text: the files that have one in common stand together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fault in found:
        groups.setdefault((fault.what, fault.remedy), []).append(fault.name)
    lines = []
    for (what, remedy), names in groups.items():
        lines += [f"{name}: {what}" for name in names]
        lines.append(f"    -> {remedy.replace('FILE', names[0]) if len(names) == 1 else remedy}")
    count = len({fault.name for fault in found})
    lines.append(
        f"\nprivacy guard: {count} of {looked_at} files refused. Nothing of real patients may get "
        "into git, and what is once in its history stays there. See data/README.md."
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="none: every file that git tracks")
    names = parser.parse_args(arguments).files
    try:
        root = Path(os.fsdecode(git(Path.cwd(), "rev-parse", "--show-toplevel").rstrip(b"\n")))
        index = staged(root)
        files = chosen(root, names, index) if names else index
        found = check(files, index)
    except subprocess.CalledProcessError as error:
        print(f"privacy guard: git: {error.stderr.decode().strip()}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"privacy guard: {error}", file=sys.stderr)
        return 2
    if found:
        print(message(found, len(files)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
