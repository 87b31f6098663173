"""What a run folder holds: where each artefact lies, which notebook makes it, and whether it is up
to date.

`<run>/<name>` is the course's own, `<run>/experiments/<experiment>/<name>` one of the reader's; a
reference in text is "sft" or "sft@small_r". Not needed to follow the course.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import __version__, profiles
from helpers.machinery import places, store

BASELINE = "baseline"
NOTEBOOKS = {  # artefact -> the notebook that makes it, in the order of the course
    "data": "01_data_preparation",
    "cases": "01_data_preparation",
    "traces": "02_reasoning_traces",
    "sft": "03_lora_sft",
    "grpo": "04_qlora_grpo",
    "answers": "05_inference",
    "metrics": "06_hierarchical_f1_analysis",
}
EVERY = ("1", "all", "true")  # FRESH for every stage
VERSION = "version of the course"
WITHOUT_EFFECT = ("name", "save_steps", "save_total_limit", "logging_steps")  # on any result


def artefact(
    name: str, settings: dict[str, Any] | None = None, needs: Sequence[str] = ()
) -> store.Artefact:
    """Look whether an artefact is up to date for these settings and for what it is made from; if
    not, prepare to make it.

    name: data, cases, traces, sft, grpo, answers/<model>, metrics. settings["name"] other than
    "baseline" is an experiment of the reader's, which stands beside the baseline. needs: the
    artefacts that it is made from, of an experiment as "sft@small_r".
    """
    settings = settings or {}
    experiment = settings.get("name", BASELINE)
    folder = path(f"{name}@{experiment}")
    if name == "data" and is_readers_own(folder):
        why_stale(name)  # raises where nothing is there
        return store.Artefact(folder, folder, folder)
    inputs = {
        VERSION: __version__,
        "settings": _with_effect(settings),
        "profile": _with_effect(profiles.current().record(name.split("/")[0])),
        "needs": {need.removesuffix(f"@{BASELINE}"): key(need) for need in needs},
    }
    # What notebook 1 did not write would be deleted where it writes anew.
    if name == "data" and "it was changed since" in (why := store.why_stale(folder, inputs)):
        raise ValueError(
            f"{folder}: {why}. Move files of yours to a folder of their own, name it with "
            "ICD_DATA_DIR, and delete this one."
        )
    return store.artefact(folder, inputs, fresh=is_fresh(name), label=name)


def is_fresh(*names: str) -> bool:
    """Whether FRESH asks for one of these to be made anew.

    Raises ValueError for a stage that there is not.
    """
    words = {word.strip() for word in os.environ.get("FRESH", "").lower().split(",")}
    stages = {word.split("/")[0].split("@")[0] for word in words}
    if unknown := stages - {*NOTEBOOKS, *EVERY, "", "0", "submit"}:
        raise ValueError(f"FRESH={min(unknown)}: no such stage. There are {', '.join(NOTEBOOKS)}.")
    named = {*names, *(name.split("/")[0] for name in names)}
    return bool(words & {*EVERY, *(name.lower() for name in named)})


def why_stale(*references: str) -> str:
    """Why the first of these artefacts that is stale cannot be loaded as it is, in words; "" where
    all are whole and all that they are made from is unchanged.

    Its settings are those it was made with. Raises FileNotFoundError where ICD_DATA_DIR names no
    data.
    """
    why = functools.cache(lambda each: _why_stale(each, why))  # each artefact is looked at once
    reasons = (why(each.removesuffix(f"@{BASELINE}")) for each in references)
    return next(filter(None, reasons), "")


def _why_stale(reference: str, why: Callable[[str], str]) -> str:
    """`why` says it of what the artefact is made from."""
    folder = path(reference)
    name = reference.partition("@")[0]
    if name == "data" and is_readers_own(folder):
        if (folder / "hosp").is_dir() and (folder / "note").is_dir():
            return ""  # the reader's own, used as it is
        raise FileNotFoundError(
            f"{folder}: no hosp/ and note/ with MIMIC-IV's files. Correct ICD_DATA_DIR, or unset "
            "it for the synthetic patients; see data/README.md."
        )
    inputs = store.inputs_of(folder)
    upstream = inputs.get("needs", {})
    for need in upstream:
        if why(need):
            return f"{need} is not up to date"
    profile = _with_effect(profiles.current().record(name.split("/")[0]))
    now = inputs | {
        VERSION: __version__,
        "profile": json.loads(json.dumps(profile)),
        "needs": {need: key(need) for need in upstream},
    }
    return store.why_stale(folder, now)


def _with_effect(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that change no result."""
    return {
        name: _with_effect(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in WITHOUT_EFFECT
    }


def path(reference: str) -> Path:
    """The folder of an artefact. Raises ValueError for an experiment that no folder can be called
    after."""
    name, _, experiment = reference.partition("@")
    if name == "data":
        return places.data_dir()
    experiment = experiment or BASELINE
    if not all(re.fullmatch(r"\w[\w .+=-]*", part) for part in (*name.split("/"), experiment)):
        raise ValueError(f"{reference!r} cannot name an artefact: a folder is called after it.")
    if experiment == BASELINE:
        return places.run_dir() / name
    return places.run_dir() / "experiments" / experiment / name


def key(reference: str) -> str | None:
    if reference != "data":
        return store.key(path(reference))
    return data_key() if places.data_dir().is_dir() else None


def data_key() -> str:
    """A digest of the four tables that are read; of a large one by size and time. What else lies
    there does not count."""
    from helpers import mimic

    marks = []
    for name in mimic.TABLES:
        file = mimic.find_table(places.data_dir(), name)
        status = file.stat()
        content = int(status.st_mtime)
        if status.st_size <= 64e6:
            content = _sha256(file, status.st_mtime_ns)
        marks.append((file.name, status.st_size, content))
    return store.digest(marks)


@functools.cache
def _sha256(file: Path, changed: int) -> str:
    """Of a file that was last changed at this time (ns): within one process it is read once."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_readers_own(folder: Path) -> bool:
    """Whether the data folder is not (to be) the synthetic one that notebook 1 writes: no other is
    ever written to."""
    is_ours = (folder / store.RECORD).is_file()
    is_to_be_ours = folder.name == "synthetic" and not folder.exists()
    return not (is_ours or is_to_be_ours)


def experiments() -> list[str]:
    """The names of the reader's own experiments in this run."""
    return [folder.name for folder in sorted((places.run_dir() / "experiments").glob("[!.]*/"))]
