"""Where runs live, and what each notebook needs and makes. `python -m helpers.course run|table|report` is in `runner`.

An artefact counts only with its stamp, written last: half-written work is never taken for whole. Environment:
ICD_PROFILE, ICD_DATA_DIR, ICD_RUNS_DIR choose; FRESH=1 (or FRESH=sft,grpo) makes artefacts anew.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import tomllib
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import __version__, profiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tqdm import tqdm
    from transformers import TrainerCallback

REPOSITORY = (
    "https://github.com/deepicd-course/deepicd-course"  # a test keeps it equal to pyproject.toml
)
NOTICE = "Research and teaching only: never for diagnosis, decision support, triage or unsupervised coding."
LEAST_FREE_MB = 500
SETUP_CELL = (
    Path(__file__)
    .with_name("setup_cell.txt")
    .read_text(encoding="utf-8")
    .replace("{repository}", REPOSITORY)
)


class Spec(NamedTuple):
    file: str  # inside the run folder; the data folder stands apart
    needs: tuple[str, ...]
    notebook: str


_TABLE = tomllib.loads(Path(__file__).with_name("artefacts.toml").read_text(encoding="utf-8"))
ARTEFACTS = {
    name: Spec(row["file"], tuple(row["needs"]), row["notebook"]) for name, row in _TABLE.items()
}

# ------------------------------------------------------------------------------------------------ places


def _place(variable: str, *default: str) -> Path:
    checkout = Path(__file__).parent.parent
    root = (
        checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    )  # pip installed: beside the reader
    return Path(os.environ.get(variable) or root.joinpath(*default)).expanduser().absolute()


def notebooks_dir() -> Path:
    """The notebooks: beside the package in a checkout, inside it where pip installed the course."""
    beside, inside = _place("ICD_NOTEBOOKS_DIR", "notebooks"), Path(__file__).parent / "_notebooks"
    return inside if inside.is_dir() and not beside.is_dir() else beside


def data_dir() -> Path:
    """ICD_DATA_DIR, else data/synthetic, which 01_data_preparation makes."""
    return _place("ICD_DATA_DIR", "data", "synthetic")


def run_dir() -> Path:
    """The folder `<data>-<profile>` of this run, below ICD_RUNS_DIR or runs/."""
    return _place("ICD_RUNS_DIR", "runs") / f"{data_dir().name}-{profiles.current().name}"


def show(path: Path) -> str:
    """A path for the reader's eyes, short where it lies inside the course."""
    root = _place("")
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def is_main() -> bool:
    """Whether this is the first process of a launch: it alone writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def _from_main(value: Any) -> Any:
    """What the main process of a launch found, in each process once all have come here; alone, the value itself."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return value
    from torch import distributed

    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


def per_device(batch: int, accumulate: int) -> tuple[int, int]:
    """Batch and accumulation of each process of a launch: a step sees the same number of rows as on one device.

    Raises ValueError where batch x accumulate rows cannot be shared out evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    each, rest = divmod(batch * accumulate, processes)
    if rest:
        raise ValueError(
            f"{batch * accumulate} rows per step cannot be shared among {processes} processes: "
            f"launch on a divisor of {batch * accumulate}, or change the batch."
        )
    batch = max(b for b in range(1, batch + 1) if each % b == 0)
    return batch, each // batch


def say(text: str) -> None:
    """Print at once, in the main process."""
    if is_main():
        print(text, flush=True)


def check_room(folder: Path) -> None:
    """Raises OSError where `folder` cannot be written or the disk is nearly full, before any work is done."""
    move = "Set ICD_RUNS_DIR to a folder with room that you may write to"
    try:
        write(folder / f".probe-{os.getpid()}", "").unlink()
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}). {move}.") from error
    free = shutil.disk_usage(folder).free / 1e6
    if free < LEAST_FREE_MB:
        raise OSError(
            f"{folder}: only {free:.0f} MB free, {LEAST_FREE_MB} MB are needed. {move}, or free some."
        )


def setup() -> tuple[profiles.Profile, Path]:
    """Environment switches, then the profile in force and its run folder; prints both, the data and the notice."""
    if "LOCAL_RANK" not in os.environ:  # without a launcher the trainers refuse more than one card
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    profile, run = profiles.current(), run_dir()
    unused = profiles.unusable_card()
    quiet = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_DISABLED": "true",
        "WANDB_MODE": "disabled",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if (
        profile.base == "tiny"
    ):  # nothing to download, so nothing may try; small matrices gain nothing from many cores
        quiet |= dict.fromkeys(
            ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # the figures of the course are a CPU's, and old small cards fail
        )
        quiet["OMP_NUM_THREADS"] = str(
            min(4, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 4)
        )
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings(
            "ignore", category=kind, module="transformers|trl|peft|torch|bitsandbytes|accelerate"
        )
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # a faster kernel that need not be there
    check_room(run)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if (
        shell
        and not os.environ.get("ICD_PROGRESS")
        and _how_to_go_on not in shell.events.callbacks["post_run_cell"]
    ):
        shell.events.register("post_run_cell", _how_to_go_on)  # headless, the runner says it
    synthetic = _ours(data_dir()) or (data_dir() / "truth").exists()
    say(
        f"profile  {profile.name}: {profile.about} (ICD_PROFILE changes it)\n"
        f"data     {show(data_dir())}: {'synthetic patients' if synthetic else 'your own data'}\n"
        f"run      {show(run)}\n{NOTICE}"
    )
    if unused:
        say(
            "There is an NVIDIA driver, but torch finds no card it can use: compare nvidia-smi with torch.version.cuda."
        )
    made_by = {
        name: read(_stamp(name)).get("inputs", {}).get("version", __version__) for name in ARTEFACTS
    }
    if old := [name for name, version in made_by.items() if version != __version__]:
        say(
            f"Made by version {made_by[old[0]]} of the course, which is now {__version__}: {', '.join(old)} and what "
            "follows from them will be made anew when needed."
        )
    return profile, run


def _how_to_go_on(result: Any) -> None:
    """After a cell that failed or was interrupted in a notebook that a reader has open."""
    if result.error_in_exec is not None:
        say(
            f"Nothing that was finished is lost: it lies in {show(run_dir())}. Mend what the error names (on a full disk, free "
            "some room) and run this notebook again from its first cell: it goes on, a training from its last checkpoint."
        )


def save_figure(fig: Figure, name: str) -> Figure:
    """Save a figure as figures/<name>.png of the run, for the report; returns it to be shown."""
    if is_main():
        (run_dir() / "figures").mkdir(parents=True, exist_ok=True)
        fig.savefig(run_dir() / "figures" / f"{name}.png", dpi=150, bbox_inches="tight")
    return fig


# --------------------------------------------------------------------------------------------- artefacts


def read(path: Path) -> dict[str, Any]:
    """A JSON file, {} where it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def write(path: Path, content: str | dict[str, Any]) -> Path:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as out:
            out.write(
                content if isinstance(content, str) else json.dumps(content, indent=1, default=str)
            )
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # a full disk needs the room
    return path


def digest(value: object) -> str:
    """sha256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def key(name: str) -> str | None:
    """Identity of a finished artefact, by what it was made from; of the data, by the raw files themselves."""
    if name != "data":
        return read(_stamp(name)).get("key")
    files = sorted(p for sub in ("hosp", "note") for p in (data_dir() / sub).glob("*.csv*"))
    return digest(
        [
            (
                p.name,
                p.stat().st_size,
                int(p.stat().st_mtime)
                if p.stat().st_size > 64e6
                else hashlib.sha256(p.read_bytes()).hexdigest(),
            )
            for p in files
        ]
    )


def fresh(*names: str) -> bool:
    """Whether FRESH asks for one of these to be made anew."""
    return bool(
        {word.strip() for word in os.environ.get("FRESH", "").split(",")} & {"1", "all", *names}
    )


def _path(name: str) -> Path:
    return data_dir() if name == "data" else run_dir() / ARTEFACTS[name].file


def _stamp(name: str) -> Path:
    return data_dir() / ".stamp.json" if name == "data" else run_dir() / ".stamps" / f"{name}.json"


def _ours(folder: Path) -> bool:
    """Whether the data folder is (to be) the synthetic one that 01 writes: no other is ever written to."""
    return (folder / ".stamp.json").is_file() or (
        folder.name == "synthetic" and not folder.exists()
    )


def _files(path: Path) -> dict[str, int]:
    inside = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".stamp.json")
    return (
        {"": path.stat().st_size}
        if path.is_file()
        else {str(p.relative_to(path)): p.stat().st_size for p in inside}
    )


def _inputs(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All that an artefact is made from; its digest is the artefact's key."""
    inputs: dict[str, Any] = {"version": __version__, "settings": settings}
    if name != "data":  # one synthetic hospital serves every profile
        inputs |= {
            "profile": profiles.current().record(name),
            "upstream": {up: key(up) for up in ARTEFACTS[name].needs},
        }
    return json.loads(json.dumps(inputs, default=str))


def why_stale(name: str, settings: dict[str, Any] | None = None) -> str:
    """Why an artefact is to be made (anew), upstream included; "" where it is whole and up to date.

    Without `settings` those it was made with count. Raises FileNotFoundError where ICD_DATA_DIR names no data.
    """
    path, stamp = _path(name), read(_stamp(name))
    if name == "data" and not _ours(path):
        if (path / "hosp").is_dir() and (path / "note").is_dir():
            return ""  # the reader's own, used as it is
        raise FileNotFoundError(
            f"{path}: no hosp/ and note/ with MIMIC-IV's files. Correct ICD_DATA_DIR, or unset it "
            "for the synthetic patients; see data/README.md."
        )
    if not path.exists() or not stamp:
        return "it was never finished" if path.exists() else "it is not there yet"
    there = _files(path)
    if lost := [
        file or path.name for file, size in stamp["files"].items() if there.get(file) != size
    ]:
        return f"it was changed since ({', '.join(sorted(lost))})"
    if late := [up for up in ARTEFACTS[name].needs if why_stale(up)]:
        return f"{late[0]} is not up to date"
    then = stamp["inputs"]
    now = _inputs(name, then["settings"] if settings is None else settings)
    if then["version"] != now["version"]:
        return f"it was made by version {then['version']} of the course"
    changed = {
        part: sorted(
            k for k in {**then[part], **now[part]} if then[part].get(k) != now[part].get(k)
        )
        for part in now
        if part != "version"
    }
    words = [
        *changed["settings"],
        *(f"{k} of the profile" for k in changed.get("profile", ())),
        *changed.get("upstream", ()),
    ]
    return f"{', '.join(words)} changed" if words else ""


@dataclass
class Artefact:
    """What a notebook is about to load or to make. `tmp` takes the result, `work` the checkpoints."""

    name: str
    path: Path
    tmp: Path
    work: Path
    stale: bool = False
    reason: str = ""
    inputs: dict[str, Any] = field(default_factory=dict, repr=False)
    lock: Any = field(default=None, repr=False)

    def commit(self, made: Path | str | None = None) -> Path:
        """Put what was made (by default `tmp` itself) in its place, stamp it and return the place.

        Of several processes the main one does it, and the others wait. Raises FileNotFoundError where nothing was made,
        OSError where the disk is full.
        """
        made, aside = Path(made or self.tmp), self.path.with_name(f".{self.path.name}.old")
        if not is_main():
            shutil.rmtree(self.tmp, ignore_errors=True)
            self.stale = _from_main(False)
            return self.path
        if not made.exists():
            raise FileNotFoundError(
                f"{self.name}: nothing at {made}. Write it there before commit()."
            )
        stamp = {"key": digest(self.inputs), "inputs": self.inputs, "files": _files(made)}
        try:
            if self.name == "data":
                write(made / ".stamp.json", stamp)
            else:
                _stamp(self.name).unlink(missing_ok=True)
            _remove(aside)
            if self.path.exists():
                os.rename(self.path, aside)
            if (
                self.name != "data"
            ):  # before the move, which is one act: killed on either side of it, nothing is lost
                write(_stamp(self.name), stamp)
            os.replace(made, self.path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"{self.path}: the disk is full. Free some room and run the notebook again: it goes on from "
                "its last checkpoint."
            ) from error
        for left in (aside, self.tmp, self.work):
            _remove(left)
        self.stale = _from_main(False)
        self.lock.release(force=True)
        return self.path


def artefact(name: str, settings: dict[str, Any] | None = None) -> Artefact:
    """Look whether an artefact is up to date for these settings; if not, prepare to make it, and say why.

    One process at a time makes it: a second one waits and then loads; those of a launch make it together. `work` keeps
    what an interrupted attempt with the very same inputs left, and is empty otherwise.
    """
    path, run, settings = _path(name), run_dir(), settings or {}
    job = Artefact(name, path, path.with_name(f".{path.name}.tmp"), run / ".work" / name)
    anew = "FRESH asks for it" if fresh(name) and (name != "data" or _ours(path)) else ""
    if why_stale(name, settings) or anew:
        check_room(run)
        if is_main():
            job.lock = _lock(
                path.parent if name == "data" else run, name
            )  # profiles share the data, each has its own run
        job.reason = (
            why_stale(name, settings) or anew
        )  # again: another process may have made it meanwhile
    if not job.reason:
        if job.lock:
            job.lock.release()
        say(f"{name}: {show(path)} is up to date, loaded")
    elif is_main():
        job.inputs = _inputs(name, settings)
        mark, now = run / ".work" / f"{name}.key", digest(job.inputs)
        drop_half(job.work)
        held = any(
            path.name != "README.md" for path in job.work.glob("*")
        )  # a trainer's card is no state
        goes_on = held and mark.is_file() and mark.read_text() == now and not anew
        if held and not goes_on:
            say(
                f"{name}: what an interrupted run had done is not used (other settings or inputs, or FRESH)"
            )
        for left in (job.tmp, *(() if goes_on else (job.work,))):
            shutil.rmtree(left, ignore_errors=True)
        job.tmp.mkdir(parents=True)
        job.work.mkdir(parents=True, exist_ok=True)
        write(mark, now)
        say(
            f"{name}: making it because {job.reason}"
            + "; going on from the last checkpoint" * goes_on
        )
    job.reason = _from_main(job.reason)  # the others go by it, once everything is in its place
    job.stale = bool(job.reason)
    if job.stale and not is_main():
        job.tmp = Path(tempfile.mkdtemp(prefix="icd-"))  # what they write is thrown away
    return job


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _lock(run: Path, name: str) -> Any:
    """Hold the lock of an artefact; the system lets go of it when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    (run / ".stamps").mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".stamps" / f"{name}.lock", is_singleton=True, fallback_to_soft=False)
    for wait in itertools.chain([0], itertools.repeat(60)):
        try:
            lock.acquire(timeout=wait)
            break
        except Timeout:
            say(
                f"{name}: another process is making it, waiting for that one (to take over, close its notebook)"
            )
        except OSError:  # a mounted drive without locks: then among the processes of this machine
            lock = FileLock(
                Path(tempfile.gettempdir(), f"icd-{digest(str(run))[:16]}-{name}.lock"),
                is_singleton=True,
            )
    return lock


def need(name: str) -> Path:
    """The path of an artefact; where it is missing or stale, the notebook that makes it is run first.

    Raises RuntimeError where that notebook fails, ValueError for an unknown name.
    """
    if name not in ARTEFACTS:
        raise ValueError(f"no artefact is called {name!r}. Known: {', '.join(ARTEFACTS)}.")
    while not is_main() and why_stale(name):
        time.sleep(2)  # the main process sees to it
    if reason := why_stale(name):
        from helpers import runner

        notebook = ARTEFACTS[name].notebook
        if notebook in os.environ.get("ICD_MAKING", "").split(","):
            raise RuntimeError(
                f"{notebook} asks for {name}, which it makes itself: {name} is missing because "
                f"{reason}. Run {notebook} from its first cell."
            )
        say(
            f"{name}: {reason}. Running {notebook} first ({profiles.current().expected(notebook)}) ..."
        )
        runner.run_in_subprocess(notebook)
        if reason := why_stale(name):
            raise RuntimeError(
                f"{notebook} has run, but {name} is not whole: {reason}. Open that notebook and run it."
            )
    return _path(name)


# ---------------------------------------------------------------------------------------------- progress


def progress(items: Iterable[Any] | int, label: str) -> tqdm:
    """A tqdm bar over items or up to a total; headless, it reports to the file that `make course` shows."""
    from tqdm import tqdm as plain
    from tqdm.auto import tqdm

    class Reporting(plain):
        def display(self, *args: Any, **kwargs: Any) -> None:
            with open(os.environ["ICD_PROGRESS"], "a", encoding="utf-8") as out:
                out.write(json.dumps({"label": self.desc, "n": self.n, "total": self.total}) + "\n")

    what = {"total": items} if isinstance(items, int) else {"iterable": items}
    if os.environ.get("ICD_PROGRESS"):
        return Reporting(
            **what, desc=label, disable=not is_main(), mininterval=0.5, file=io.StringIO()
        )
    return tqdm(**what, desc=label, disable=not is_main())


@functools.cache  # torch takes it once
def _know_cpu_by_number() -> None:
    """Let torch load a checkpoint to "cpu:0", which is what a launched process without a GPU calls its device."""
    from torch.serialization import register_package

    register_package(
        15, lambda obj: None, lambda obj, place: obj if place.startswith("cpu:") else None
    )


def TrainerProgress(label: str) -> TrainerCallback:
    """A callback for a Hugging Face trainer that shows its steps as `progress` does.

    It also makes the order of the rows depend on seed and epoch alone: a training that goes on sees what it would have seen,
    and every process of a launch deals from the same deck. Trainers draw it from the state that the epochs before left. And a
    training that goes on from its very last step makes none more, as trainers would.
    """
    import torch
    from transformers import TrainerCallback

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _know_cpu_by_number()

    class Steps(TrainerCallback):
        def on_epoch_begin(
            self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
        ) -> None:
            rows = train_dataloader.batch_sampler
            while hasattr(
                rows, "batch_sampler"
            ):  # accelerate's, which deals them out to the processes
                rows = rows.batch_sampler
            if (
                state.global_step >= state.max_steps
            ):  # killed between its last checkpoint and its end: no step more
                rows.sampler = ()
            else:
                rows.sampler.generator = torch.Generator().manual_seed(
                    args.seed + int(state.epoch or 0)
                )

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if getattr(args, "gradient_checkpointing", False) and hasattr(model, "get_base_model"):
                # TRL switches it on anew after every generation, and each time transformers adds one more hook for good
                model.get_base_model().enable_input_require_grads = lambda: None
            self.bar = progress(state.max_steps, label)
            self.bar.update(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Steps()


def drop_half(work: Path) -> None:
    """Remove the checkpoints in a folder that a kill or a power cut left half written, and say so: those without their state,
    which a trainer writes last, or with a part that is missing or cut off."""
    from safetensors import SafetensorError, safe_open

    for checkpoint in sorted(work.glob("checkpoint-*/")):
        whole = all(map(zipfile.is_zipfile, [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]))
        parts = (
            ["*model*", "optimizer*", "scheduler.pt"]
            if not any(checkpoint.glob("global_step*"))
            else []
        )  # else DeepSpeed's
        whole &= "global_step" in read(checkpoint / "trainer_state.json") and all(
            any(checkpoint.glob(part)) for part in parts
        )
        try:
            for path in checkpoint.glob("*.safetensors"):
                safe_open(path, framework="np")
        except SafetensorError:
            whole = False
        if not whole:
            say(f"{checkpoint.name} is not whole, and is left out")
            shutil.rmtree(checkpoint)


def HeldOut(
    every: int, measure: Callable[[], float], show: Callable[[dict[str, float]], Any] | None = None
) -> TrainerCallback:
    """A callback that puts `measure()`, a reward on notes that are not trained on, into the trainer's log as `eval_reward`.

    At the start, every so many steps and at the end; once for each step, also where a training goes on. `show` gets the row too.
    """
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not any(
                row["step"] == state.global_step and "eval_reward" in row
                for row in state.log_history
            ):
                row = {"step": state.global_step, "eval_reward": measure()}
                state.log_history.append(row)  # saved with each checkpoint
                if show:
                    show(row)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.on_train_begin(args, state, control)

    return Watching()


if __name__ == "__main__":
    from helpers import runner

    sys.exit(runner.main())
