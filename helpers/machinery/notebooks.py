"""Runs the notebooks headless, in order, with progress; prints the table and writes the report.

`python -m helpers.machinery.notebooks run|script|table|report`, behind `make course`. Not needed to
follow the course.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import __version__, profiles
from helpers.machinery import artefacts, memory, places, store, switches

# Environment variables of a distributed launch, which a notebook that is started from within it
# must not see.
LAUNCH = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
)
OPTIONAL = ("08_real_notes",)  # needs data that the reader downloads
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def names(only: str | None = None) -> list[str]:
    """The notebooks of the course in order, without optional ones, or the one. Raises ValueError
    where it is unknown."""
    folder = places.notebooks_dir()
    stems = sorted(path.stem for path in folder.glob("[0-9]*_*.ipynb"))
    if not stems or (only and only not in stems):
        known = ", ".join(stems) or "none"
        raise ValueError(f"{folder}: no notebook {only or ''}. There are: {known}.")
    return [only] if only else [stem for stem in stems if stem not in OPTIONAL]


def makes(notebook: str) -> list[str]:
    """The artefacts of the run that a notebook makes: those that are there, and those that must
    be."""
    stages = [name for name, maker in artefacts.NOTEBOOKS.items() if maker == notebook]
    answers = [f"answers/{folder.name}" for folder in (places.run_dir() / "answers").glob("[!.]*/")]
    return [name for name in stages if name != "answers"] + (answers if "answers" in stages else [])


def _inputs(notebook: str) -> dict[str, str]:
    """What the executed notebook depends on: its cells, the profile, the artefacts of the notebooks
    before it."""
    file = places.notebooks_dir() / f"{notebook}.ipynb"
    cells = json.loads(file.read_bytes())["cells"]
    stages = [name for name, maker in artefacts.NOTEBOOKS.items() if maker == notebook]
    before = [name for each in names() if each < notebook for name in makes(each)]
    return {
        artefacts.VERSION: __version__,
        "cells": store.digest(["".join(cell["source"]) for cell in cells]),
        "profile": store.digest([profiles.current().record(stage) for stage in stages]),
        "needs": store.digest([artefacts.key(name) for name in before]),
    }


def up_to_date(notebook: str) -> bool:
    """Whether the executed notebook is there, made from the same cells and inputs, and its
    artefacts are whole."""
    if artefacts.is_fresh(*makes(notebook)):
        return False
    executed = places.run_dir() / "notebooks" / f"{notebook}.ipynb"
    record = places.read(executed.with_name(f".{notebook}.json"))
    if not executed.is_file() or record.get("inputs") != _inputs(notebook):
        return False
    return not artefacts.why_stale(*makes(notebook))


class Display:
    """Which notebook, which step, for how long: a line that is renewed now and then."""

    def __init__(self, todo: list[str]) -> None:
        self.todo = todo
        self.text = ""
        self.time = time.monotonic()
        self.every = float(os.environ.get("ICD_PROGRESS_EVERY", "20"))

    def show(self, notebook: str, step: str, seconds: float) -> None:
        """Show that a notebook is at a step after so many seconds."""
        text = f"[{self.todo.index(notebook) + 1}/{len(self.todo)}] {notebook}  {step}"
        if time.monotonic() - self.time > self.every and text != self.text:
            self.text = text
            self.time = time.monotonic()
            print(f"{text}  {seconds:.0f} s", flush=True)


class Execution:
    """One notebook in a kernel of its own: what it is at, what came of it."""

    def __init__(self, notebook: str) -> None:
        import nbformat
        from nbclient import NotebookClient

        self.notebook = notebook
        self.cell = 0
        self.step = ""
        self.problem: BaseException | None = None
        self.interrupted = False
        self.over = threading.Event()
        path = places.notebooks_dir() / f"{notebook}.ipynb"
        self.content = nbformat.read(path, as_version=4)
        execution = self

        class Client(NotebookClient):
            def output(self, outs, msg, display_id, cell_index):
                text = msg["content"].get("text", "") if msg["msg_type"] == "stream" else ""
                if msg["content"].get("name") == "stderr" and "\r" in text:  # a progress bar
                    execution.step = _step(text) or execution.step
                    return None
                return super().output(outs, msg, display_id, cell_index)

        self.client = Client(
            self.content,
            timeout=None,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=50"],
            resources={"metadata": {"path": str(places.notebooks_dir())}},
            on_cell_start=self._at,
        )

    def _at(self, cell: Any, cell_index: int) -> None:
        self.cell = cell_index
        self.step = ""

    def _work(self) -> None:
        try:
            self.client.execute(env=_environment(self.notebook))
        except BaseException as error:
            self.problem = error
        finally:
            self.over.set()

    def run(self, display: Display) -> float:
        """Run to the end, a failure or Ctrl-C; returns the seconds it took."""
        started = time.monotonic()
        # In a thread of its own, so that Ctrl-C reaches this one: it interrupts the kernel, and
        # what ran is saved. Waited for by an event: a Ctrl-C inside join() would make Python take
        # the thread for ended.
        threading.Thread(target=self._work, daemon=True).start()
        while not self.over.is_set():
            try:
                self.over.wait(0.3)
                step = self.step or f"cell {self.cell + 1}/{len(self.content.cells)}"
                display.show(self.notebook, step, time.monotonic() - started)
            except KeyboardInterrupt:
                self._interrupt()
        return time.monotonic() - started

    def _interrupt(self) -> None:
        kernel = getattr(getattr(self.client.km, "provisioner", None), "pid", None)
        if kernel:
            os.kill(kernel, signal.SIGKILL if self.interrupted else signal.SIGINT)
        self.interrupted = True

    def explanation(self) -> str:
        """The cell that failed, and why."""
        from nbclient.exceptions import CellExecutionError, DeadKernelError

        cell = self.content.cells[self.cell]
        verb = "was interrupted" if self.interrupted else "failed"
        text = f"\n{self.notebook} {verb} in cell {self.cell + 1}:\n\n"
        text += textwrap.indent(cell.source, "    ") + "\n"
        if self.interrupted:
            return text
        errors = [out for out in cell.get("outputs", []) if out.output_type == "error"]
        if errors and isinstance(self.problem, CellExecutionError):
            return text + "\n" + ANSI.sub("", "\n".join(errors[0].traceback)) + "\n"
        if isinstance(self.problem, DeadKernelError):
            return text + (
                "\nThe kernel ended by itself, most often because memory ran out. "
                "Close other programs, "
                "or choose a smaller profile (ICD_PROFILE).\n"
            )
        return (
            f"\n{self.notebook} could not be run: {type(self.problem).__name__}: {self.problem}\n"
        )


def _step(text: str) -> str:
    """The last state of a progress bar as `SFT 120/250`."""
    bars = re.findall(r"\r([^\r:]+): +[^\r]*?(\d+(?:/\d+)?) \[", text)
    return " ".join(bars[-1]) if bars else ""


def execute(notebook: str, display: Display) -> None:
    """Run one notebook and keep the executed copy in the run folder.

    Raises SystemExit (1, or 130 after Ctrl-C) where a cell fails, having shown it, its error and
    how to go on.
    """
    import nbformat

    inputs = _inputs(notebook)
    execution = Execution(notebook)
    seconds = execution.run(display)
    executed = places.run_dir() / "notebooks" / f"{notebook}.ipynb"
    failed = executed.with_suffix(".failed.ipynb")
    if execution.problem is None:
        places.write(executed, nbformat.writes(execution.content))
        failed.unlink(missing_ok=True)
        record = {"inputs": inputs, "seconds": round(seconds, 1)}
        places.write(executed.with_name(f".{notebook}.json"), record)
        print(f"{notebook}: done in {seconds:.0f} s", flush=True)
        return
    print(execution.explanation())
    try:
        places.write(failed, nbformat.writes(execution.content))
        print(f"What ran is kept in {places.show(failed)}.", end=" ")
    except OSError as error:  # a full disk, say: it must not hide the rest
        print(f"What ran could not be kept ({error}).", end=" ")
    print(
        "Nothing that was finished is lost: the same command goes on from here and, where "
        "training was under way, from its last checkpoint.",
        flush=True,
    )
    raise SystemExit(130 if execution.interrupted else 1)


def _environment(notebook: str = "") -> dict[str, str]:
    """Environment of a kernel: the same places wherever it starts, and no trace of a distributed
    launch."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH)}
    env.pop("MPLBACKEND", None)
    return env | {
        "ICD_DATA_DIR": str(places.data_dir()),
        "ICD_RUNS_DIR": str(places.run_dir().parent),
        "ICD_NOTEBOOKS_DIR": str(places.notebooks_dir()),
        "ICD_PROFILE": profiles.current().name,
        "ICD_MAKING": f"{env.get('ICD_MAKING', '')},{notebook}",
        "ICD_HEADLESS": "1",
    }


def run_in_subprocess(notebook: str) -> None:
    """Run one notebook headless from within another, passing its lines on. Raises RuntimeError if
    it fails."""
    command = [sys.executable, "-u", "-m", "helpers.machinery.notebooks", "run", "--only", notebook]
    with subprocess.Popen(
        command,
        env=_environment() | {"FRESH": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            for line in child.stdout or ():
                print(f"  {line.rstrip()}", flush=True)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)  # leaving the block waits for it
            raise
    if child.returncode:
        raise RuntimeError(
            f"{notebook} did not run to its end: its message stands above. Open that notebook, "
            "correct the cell named there, and run this one again."
        )


def script(notebook: str) -> None:
    """Run the code cells of a notebook in this process, one of those that `accelerate launch`
    started; the first speaks.

    Figures are saved and not shown. Raises ValueError for an unknown notebook, SystemExit where a
    cell fails.
    """
    names(notebook)
    os.environ["MPLBACKEND"] = "agg"
    os.environ["ICD_HEADLESS"] = "1"
    os.environ["ICD_MAKING"] = f"{os.environ.get('ICD_MAKING', '')},{notebook}"
    with contextlib.redirect_stdout(io.StringIO()):
        switches.setup()  # its switches go before the first import of a library that reads them
    import torch
    from accelerate import PartialState
    from IPython.core.interactiveshell import InteractiveShell

    if memory.processes() > 1:
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        # the others wait while the first makes what is needed
        PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))
    shell = InteractiveShell.instance(colors="NoColor")
    file = places.notebooks_dir() / f"{notebook}.ipynb"
    cells = json.loads(file.read_bytes())["cells"]
    silent = contextlib.redirect_stdout(io.StringIO())
    with contextlib.nullcontext() if places.is_main() else silent:
        for number, cell in enumerate(cells, 1):
            if cell["cell_type"] != "code":
                continue
            result = shell.run_cell("".join(cell["source"]))
            if not result.success:
                print(f"{notebook} failed in cell {number}", file=sys.stderr)
                raise SystemExit(1)
    PartialState().destroy_process_group()


def run(only: str | None = None) -> None:
    """Execute what is not up to date, in order; then print the table and write the report."""
    todo = names(only)
    switches.take_shipped()
    places.check_room(places.run_dir())
    if not only:
        folder = places.show(places.run_dir())
        print(
            f"profile {profiles.current().name}, run folder {folder}\n{places.NOTICE}", flush=True
        )
    display = Display(todo)
    for name in todo:
        if up_to_date(name):
            print(f"{name}: up to date", flush=True)
        else:
            execute(name, display)
    if not only:
        print_table()
        print(f"\nReport: {write_report()}\nExecuted notebooks: {places.run_dir() / 'notebooks'}")


# ---------------------------------------------------------------------------------- table and
# report


def results() -> dict[str, Any]:
    """The content of metrics.json. Raises FileNotFoundError where there is none yet."""
    file = places.run_dir() / "metrics.json"
    content = places.read(file)
    if not content:
        raise FileNotFoundError(f"{file}: no results yet. `make course` makes them.")
    return content


def table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the result: per level macro-F1 with its 95 % interval, and the share of
    usable answers.

    `content` is that of metrics.json. Where the ideal reader is none of its models, the ceiling
    stands in.
    """
    from helpers import plots

    models = {"ideal": content.get("ceiling")} | content["models"]
    known = [name for name in plots.MODELS if name != "ideal"]
    others = [name for name in content["models"] if name not in plots.MODELS]
    order = [name for name in (*known, *others, "ideal") if models.get(name)]
    header = ["macro-F1 [95 % interval]"]
    columns = [[plots.long_label(name) for name in order]]
    for level, text in plots.LEVELS.items():
        entries = [models[name].get(level) or {} for name in order]
        sizes = {entry["n_classes"] for entry in entries if "n_classes" in entry}
        is_same = len(sizes) == 1
        header.append(f"{text.lower()} ({min(sizes)} classes)" if is_same else text.lower())
        columns.append([_score(entry, len(sizes) > 1) for entry in entries])
    usable = [models[name].get("usable") for name in order]
    columns.append(["–" if share is None else f"{share:.1%}" for share in usable])
    return [*header, "usable answers"], [*map(list, zip(*columns, strict=True))]


def _score(entry: dict[str, Any], with_classes: bool) -> str:
    if entry.get("f1_gold") is None:
        return "–"
    text = f"{entry['f1_gold']:.3f}"
    if entry.get("ci", [None])[0] is not None:
        text += " [{:.3f}, {:.3f}]".format(*entry["ci"])
    return f"{text} ({entry['n_classes']} classes)" if with_classes else text


def print_table(content: dict[str, Any] | None = None) -> None:
    """Print the table of the run, or of a content like that of its metrics.json."""
    header, rows = table(results() if content is None else content)
    print(pd.DataFrame(rows, columns=header).to_string(index=False))


def write_report() -> Path:
    """Write report.html, one file with everything in it, and return its path."""
    from jinja2 import Environment

    content = results()
    folder = places.run_dir()
    profile = profiles.current()
    header, rows = table(content)
    figures = {}
    for path in sorted((folder / "figures").glob("*.png")):
        figures[path.stem.replace("_", " ")] = base64.b64encode(path.read_bytes()).decode()
    atlas = places.is_synthetic() and (folder / "atlas.html").is_file()
    about = f"Profile {profile.name}: {profile.about}, base model {profile.base}."
    if places.is_synthetic():
        about += " Patients and notes are synthetic."
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    text = page.render(
        run=folder.name,
        notice=places.NOTICE,
        header=header,
        rows=rows,
        figures=figures,
        atlas=atlas,  # one of credentialed notes is never linked
        about=about,
        environment={"course": __version__, **content.get("environment", {})},
    )
    return places.write(folder / "report.html", text)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.machinery.notebooks")
    parser.add_argument("command", choices=["run", "script", "table", "report"])
    parser.add_argument("notebook", nargs="?", help="of script: run in this process")
    parser.add_argument("--only", metavar="NOTEBOOK", help="run this one alone")
    chosen = parser.parse_args(arguments)
    for name in (signal.SIGINT, signal.SIGTERM):  # a shell starts a background job without SIGINT
        signal.signal(name, signal.default_int_handler)
    commands = {
        "run": lambda: run(chosen.only),
        "script": lambda: script(chosen.notebook),
        "table": print_table,
        "report": lambda: print(write_report()),
    }
    try:
        commands[chosen.command]()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
