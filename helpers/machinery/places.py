"""Where data, runs and notebooks lie, who speaks in a launch of several processes, and how a file
is written whole.

Environment: ICD_DATA_DIR, ICD_RUNS_DIR, ICD_NOTEBOOKS_DIR choose the folders. Not needed to follow
the course.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import profiles

if TYPE_CHECKING:
    from tqdm import tqdm

# A test keeps it equal to pyproject.toml.
REPOSITORY = "https://github.com/deepicd-course/deepicd-course"
NOTICE = (
    "Research and teaching only: never for diagnosis, decision support, triage "
    "or unsupervised coding."
)
LEAST_FREE_MB = 500
PACKAGE = Path(__file__).parent.parent


def root() -> Path:
    """The checkout; where pip installed the course, the reader's own folder."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def _place(variable: str, *default: str) -> Path:
    chosen = os.environ.get(variable, "").strip()
    return Path(chosen or root().joinpath(*default)).expanduser().absolute()


def notebooks_dir() -> Path:
    """The notebooks: beside the package in a checkout, inside it where pip installed the course."""
    beside = _place("ICD_NOTEBOOKS_DIR", "notebooks")
    inside = PACKAGE / "_notebooks"
    return inside if inside.is_dir() and not beside.is_dir() else beside


def data_dir() -> Path:
    """ICD_DATA_DIR, else data/synthetic, which notebook 1 makes."""
    return _place("ICD_DATA_DIR", "data", "synthetic")


def run_dir() -> Path:
    """The folder `<data>-<profile>` of this run, below ICD_RUNS_DIR or runs/."""
    return _place("ICD_RUNS_DIR", "runs") / f"{data_dir().name}-{profiles.current().name}"


def results_dir() -> Path:
    """What was found and is kept: results/ of a checkout, inside the package where pip installed
    the course."""
    inside = PACKAGE / "_results"
    return inside if inside.is_dir() else PACKAGE.parent / "results"


def is_synthetic() -> bool:
    """Whether the data folder holds (or will hold) patients that the course wrote itself."""
    folder = data_dir()
    return (folder / "truth" / "manifest.json").is_file() or (
        folder.name == "synthetic" and not folder.exists()
    )


def show(path: Path) -> str:
    """A path for the reader's eyes, short where it lies inside the course."""
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)


def is_main() -> bool:
    """Whether this is the first process of a launch: it alone writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print at once, in the main process."""
    if is_main():
        print(text, flush=True)


def progress(items: Iterable[Any] | int, label: str) -> tqdm:
    """A progress bar over items or up to a total; plain text where no person watches
    (ICD_HEADLESS), none without a label."""
    if os.environ.get("ICD_HEADLESS"):
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    subject = {"total": items} if isinstance(items, int) else {"iterable": items}
    return tqdm(**subject, desc=label, disable=not label or not is_main(), mininterval=0.5)


def read(path: Path) -> dict[str, Any]:
    """A JSON file, {} where it is missing or broken."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: str | bytes | dict[str, Any]) -> Path:
    """Write a file whole or not at all; a dict as JSON."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1, default=str)
    if isinstance(content, str):
        content = content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # a full disk needs the room
    return path


def check_room(folder: Path) -> None:
    """Raises OSError where `folder` cannot be written or the disk is nearly full, before any work
    is done."""
    remedy = "Set ICD_RUNS_DIR to a folder with room that you may write to"
    try:
        write(folder / f".probe-{os.getpid()}", "").unlink()
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}). {remedy}.") from error
    free = shutil.disk_usage(folder).free / 1e6
    if free < LEAST_FREE_MB:
        raise OSError(
            f"{folder}: only {free:.0f} MB free, {LEAST_FREE_MB} MB are needed. {remedy}, or free "
            "some."
        )
