"""The one store of what is made: an artefact is a folder, and a folder that is there is whole.

It holds `made_from.json`: the inputs it was made from, their key, and the size of each file. It is
written aside, in `.making/<name>.part`, and moved into place by one rename. Checkpoints lie beside
it in `.making/<name>.<key>`: the same inputs find them again after an interruption, other inputs
cannot. Not needed to follow the course.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.machinery import places

RECORD = "made_from.json"
KEY = 12  # hexadecimal digits of the key in the name of a folder of checkpoints


@dataclass
class Artefact:
    """What somebody is about to load or to make.

    path: the folder where it stands when it is whole. part: an empty folder to write into. work:
    for checkpoints. why: the reason for making it, in words; "" where it is up to date.
    """

    path: Path
    part: Path
    work: Path
    why: str = ""
    label: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    lock: Any = None

    def finish(self) -> Path:
        """Move what was written to `part` into its place and return the place; checkpoints go.

        Of several processes the main one does it, and the others wait. Raises FileNotFoundError
        where nothing was written, OSError where the disk is full.
        """
        if places.is_main():
            try:
                self._move()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                remedy = (
                    "Free some room and run the notebook again: it goes on from its last checkpoint"
                )
                raise OSError(f"{self.path}: the disk is full. {remedy}.") from error
        else:
            shutil.rmtree(self.part, ignore_errors=True)
        self.why = _from_main("")
        if self.lock:
            self.lock.release(force=True)
        return self.path

    def _move(self) -> None:
        if not self.part.is_dir() or not any(self.part.iterdir()):
            raise FileNotFoundError(
                f"{self.path.name}: nothing was written to {self.part} before finish()."
            )
        record = {"key": digest(self.inputs), "inputs": self.inputs, "files": _sizes(self.part)}
        places.write(self.part / RECORD, record)
        before = self.part.with_suffix(".old")
        shutil.rmtree(before, ignore_errors=True)
        if self.path.exists():
            self.path.rename(before)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part.rename(self.path)
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


def artefact(
    path: Path,
    inputs: dict[str, Any],
    *,
    label: str = "",
    fresh: bool = False,
    wait: bool = True,
) -> Artefact | None:
    """Look whether a folder was made from these inputs; if not, prepare to make it, and say why.

    label: its name in messages. fresh: make it anew in any case. One process at a time makes it: a
    second one waits and then loads, or with `wait=False` gets None. The processes of a launch make
    it together.
    """
    inputs = json.loads(json.dumps(inputs, default=str))
    making = path.parent / ".making"
    work = making / f"{path.name}.{digest(inputs)[:KEY]}"
    result = Artefact(path, making / f"{path.name}.part", work, "", label or path.name, inputs)
    if fresh or why_stale(path, inputs):
        if places.is_main():
            places.check_room(path.parent)
            result.lock = _locked(making / f"{path.name}.lock", wait)
            if result.lock is None:
                return None
        result.why = why_stale(path, inputs)  # again: another process may have made it meanwhile
        if fresh and not result.why:
            result.why = "FRESH asks for it"
    if places.is_main():
        _prepare(result, fresh)
    result.why = _from_main(result.why)  # the others go by it, once everything is in its place
    if result.why and not places.is_main():
        result.part = Path(tempfile.mkdtemp(prefix="icd-"))  # what they write is thrown away
    return result


def _prepare(result: Artefact, fresh: bool) -> None:
    name = result.label
    if not result.why:
        if result.lock:
            result.lock.release()
        origin = places.read(result.path / RECORD).get("origin", "")  # of what ships
        places.say(f"{name}: {places.show(result.path)} is up to date, loaded{origin}")
        return
    before = result.part.with_suffix(".old")
    if before.is_dir() and not result.path.exists():
        before.rename(result.path)  # a kill came between the two renames of `finish`
    shutil.rmtree(result.part, ignore_errors=True)
    result.part.mkdir(parents=True)
    if fresh:
        shutil.rmtree(result.work, ignore_errors=True)
    drop_half(result.work)
    ending = "; going on from where it was interrupted" if _has_state(result.work) else ""
    pattern = f"{glob.escape(result.path.name)}.{'[0-9a-f]' * KEY}/"
    works = [folder for folder in result.work.parent.glob(pattern) if folder != result.work]
    others = [folder for folder in works if _has_state(folder)]
    if others:
        kept = places.show(others[0].parent)
        places.say(
            f"{name}: {len(others)} interrupted with other settings or inputs, kept in {kept}"
        )
    result.work.mkdir(parents=True, exist_ok=True)
    places.say(f"{name}: making it because {result.why}{ending}")


def _has_state(work: Path) -> bool:
    return any(file.name != "README.md" for file in work.glob("*"))  # a trainer's card is no state


def is_whole(path: Path) -> bool:
    """Whether an artefact is there, with every file as it was written."""
    return not _damage(path, places.read(path / RECORD))


def key(path: Path) -> str | None:
    """The key of a finished artefact: a digest of all that it was made from."""
    return places.read(path / RECORD).get("key")


def inputs_of(path: Path) -> dict[str, Any]:
    """What a finished artefact was made from; {} where there is none."""
    return places.read(path / RECORD).get("inputs", {})


def why_stale(path: Path, inputs: dict[str, Any]) -> str:
    """Why an artefact is to be made (anew) from these inputs, in words; "" where it is whole and up
    to date."""
    record = places.read(path / RECORD)
    damage = _damage(path, record)
    if damage:
        return damage
    names = _changes(record["inputs"], inputs)
    return f"{', '.join(names)} changed" if names else ""


def _changes(before: Any, now: Any) -> list[str]:
    """Names of the entries that differ, of nested dicts the innermost."""
    names = {}  # in their order, each once
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            names |= dict.fromkeys(_changes(old, new))
        elif old != new:
            names[name] = None
    return [*names]


def _damage(path: Path, record: dict[str, Any]) -> str:
    if not path.is_dir():
        return "it is not there yet"
    if "inputs" not in record:
        return f"it holds no {RECORD}"
    lost = [name for name, _ in record["files"].items() - _sizes(path).items()]
    return f"it was changed since ({', '.join(sorted(lost))})" if lost else ""


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != RECORD
    }


def digest(value: object) -> str:
    """sha256 of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def drop_half(work: Path) -> None:
    """Remove the checkpoints that a kill or a power cut left half written, and say so: those
    without their state, which a trainer writes last, or with a part that is missing or cut off."""
    for checkpoint in sorted(work.glob("checkpoint-*/")):
        if not _is_readable(checkpoint):
            places.say(f"{checkpoint.name} is not whole, and is left out")
            shutil.rmtree(checkpoint)


def _is_readable(checkpoint: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    if "global_step" not in places.read(checkpoint / "trainer_state.json"):
        return False
    is_deepspeed = any(checkpoint.glob("global_step*"))
    patterns = () if is_deepspeed else ("*model*", "optimizer*", "scheduler.pt")
    if not all(any(checkpoint.glob(pattern)) for pattern in patterns):
        return False
    pickles = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    try:
        for file in checkpoint.glob("*.safetensors"):
            safe_open(file, framework="np")
    except SafetensorError:
        return False
    return all(zipfile.is_zipfile(file) for file in pickles)


def lock(path: Path) -> Any:
    """A lock on a file that several processes of this machine change in turn; `with` waits for
    it."""
    from filelock import FileLock

    name = f"icd-{digest(str(path.absolute()))[:16]}.lock"
    return FileLock(Path(tempfile.gettempdir()) / name, is_singleton=True)


def _locked(path: Path, wait: bool) -> Any:
    """Hold a lock, or None where another process does and `wait` is False; it goes when the process
    ends, however it ends."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path, is_singleton=True, fallback_to_soft=False)
    seconds = 0
    while True:
        try:
            held.acquire(timeout=seconds)
            return held
        except Timeout:
            if not wait:
                return None
            seconds = 60
            places.say(
                f"{path.stem}: another process is making it, waiting (to take over, end that one)"
            )
        except OSError:  # a mounted drive without locks: then among the processes of this machine
            held = lock(path)


def _from_main(value: Any) -> Any:
    """What the main process of a launch found, in each process once all have come here; alone, the
    value itself."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return value
    from torch import distributed

    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]
