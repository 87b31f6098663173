"""`python -m helpers.course run|script|table|report`: the notebooks in order with progress, then the table and the report."""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import datetime
import io
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from helpers import __version__, course, profiles

MODELS = {
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "base": "base, not adapted",
    "sft": "SFT",
    "grpo": "GRPO",
    "ideal": "ideal reader (ceiling)",
}
LEVELS = {"chapter": "chapter", "category": "category", "full": "full code"}
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

# ---------------------------------------------------------------------------------------------- notebooks


def makes(notebook: str) -> list[str]:
    """The artefacts that a notebook makes."""
    return [name for name, spec in course.ARTEFACTS.items() if spec.notebook == notebook]


def _inputs(notebook: str) -> dict[str, str]:
    """What the executed notebook depends on: its cells, the profile, the artefacts of the notebooks before it."""
    cells = json.loads((course.notebooks_dir() / f"{notebook}.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    before = [name for name, spec in course.ARTEFACTS.items() if spec.notebook < notebook]
    return {
        "version": __version__,
        "cells": course.digest(["".join(cell["source"]) for cell in cells]),
        "profile": course.digest(
            [profiles.current().record(name) for name in [*makes(notebook), ""]]
        ),
        "upstream": course.digest([course.key(name) for name in before]),
    }


def _stamp(notebook: str) -> Path:
    return course.run_dir() / ".stamps" / f"notebook-{notebook}.json"


def up_to_date(notebook: str) -> bool:
    """Whether the executed notebook is there, made from the same cells and inputs, and its artefacts are whole."""
    return (
        not course.fresh(*makes(notebook))
        and course.read(_stamp(notebook)).get("inputs") == _inputs(notebook)
        and (course.run_dir() / "notebooks" / f"{notebook}.ipynb").is_file()
        and not any(course.why_stale(name) for name in makes(notebook))
    )


class _Display:
    """Which notebook, which step, how much is left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, todo: list[str]) -> None:
        from tqdm import tqdm

        minutes = profiles.current().minutes
        self.todo, self.spent, self.done, self.said = todo, 0.0, 0.0, ("", time.monotonic())
        self.expected = {
            n: course.read(_stamp(n)).get("seconds") or minutes.get(n, 0) * 60 for n in todo
        }
        self.known, self.every = (
            all(self.expected.values()),
            float(os.environ.get("ICD_PROGRESS_EVERY", "20")),
        )
        self.bar = tqdm(
            total=1000,
            disable=not sys.stdout.isatty(),
            leave=False,
            file=sys.stdout,
            bar_format="{desc}  {percentage:3.0f}% {bar:20}  {elapsed}{postfix}",
        )

    def show(self, notebook: str, step: str, seconds: float) -> None:
        total = sum(self.expected.values()) or 1
        pace = min(max(self.spent / self.done, 0.2), 10) if self.done > 20 else 1.0
        gone = self.done + min(seconds / pace, 0.95 * self.expected[notebook])
        left = (
            f"about {max(1, round(pace * (total - gone) / 60))} min left"
            if self.known
            else "time left not measured"
        )
        text = f"[{self.todo.index(notebook) + 1}/{len(self.todo)}] {notebook}  {step}"
        self.bar.n = round(1000 * gone / total)
        self.bar.set_description_str(text, refresh=False)
        self.bar.set_postfix_str(left)
        if (
            self.bar.disable
            and time.monotonic() - self.said[1] > self.every
            and text != self.said[0]
        ):
            self.said = text, time.monotonic()
            print(f"{text}  {seconds:.0f} s, {left}", flush=True)

    def finish(self, notebook: str, text: str, seconds: float = 0.0, expected: float = 0.0) -> None:
        self.spent, self.done, self.expected[notebook] = (
            self.spent + seconds,
            self.done + expected,
            expected,
        )
        self.bar.write(f"{notebook}: {text}", file=sys.stdout)
        sys.stdout.flush()


def _newest(log: Path) -> str:
    """The last whole line of the progress file as `training 120/250`."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace")[-2000:].splitlines()):
        try:
            step = json.loads(line)
            return f"{step['label']} {step['n']}" + (f"/{step['total']}" if step["total"] else "")
        except ValueError:
            continue  # the kernel is just writing it
    return ""


def execute(notebook: str, display: _Display) -> None:
    """Run one notebook in a kernel of its own and keep the executed copy in the run folder.

    Raises SystemExit (1, or 130 after Ctrl-C) where a cell fails, having shown it, its error and how to go on.
    """
    import nbformat
    from nbclient import NotebookClient

    kept = course.run_dir() / "notebooks" / f"{notebook}.ipynb"
    nb = nbformat.read(course.notebooks_dir() / kept.name, as_version=4)
    inputs, started, at = _inputs(notebook), time.monotonic(), {"cell": 0}
    handle, name = tempfile.mkstemp(suffix=".progress")
    os.close(handle)
    log, over, problem = Path(name), threading.Event(), []
    env = {**_environment(notebook), "ICD_PROGRESS": name}
    client = NotebookClient(
        nb,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=50"],
        resources={"metadata": {"path": str(course.notebooks_dir())}},
        on_cell_start=lambda cell, cell_index: (at.update(cell=cell_index), log.write_text("")),
    )

    def work() -> None:
        try:
            client.execute(env=env)
        except BaseException as error:
            problem.append(error)
        finally:
            over.set()

    # In a thread of its own, so that Ctrl-C reaches this one: it interrupts the kernel, and what ran is saved.
    # Waited for by an event: a Ctrl-C inside join() would make Python take the thread for ended.
    threading.Thread(target=work, daemon=True).start()
    interrupted = False
    while not over.is_set():
        try:
            over.wait(0.3)
            display.show(
                notebook,
                _newest(log) or f"cell {at['cell'] + 1}/{len(nb.cells)}",
                time.monotonic() - started,
            )
        except KeyboardInterrupt:
            if kernel := getattr(getattr(client.km, "provisioner", None), "pid", None):
                os.kill(kernel, signal.SIGKILL if interrupted else signal.SIGINT)
            interrupted = True
    log.unlink()
    seconds, failed = time.monotonic() - started, kept.with_suffix(".failed.ipynb")
    if not problem:
        course.write(kept, nbformat.writes(nb))
        failed.unlink(missing_ok=True)
        # Loading what is up to date takes no time: that says nothing about how long making it does.
        longest = max(seconds, course.read(_stamp(notebook)).get("seconds", 0))
        course.write(_stamp(notebook), {"inputs": inputs, "seconds": round(longest, 1)})
        return display.finish(
            notebook, f"done in {seconds:.0f} s", seconds, display.expected[notebook]
        )
    display.bar.close()
    cell = nb.cells[at["cell"]]
    errors = [out for out in cell.get("outputs", []) if out.output_type == "error"]
    print(
        f"\n{notebook} {'was interrupted' if interrupted else 'failed'} in cell {at['cell'] + 1}:\n\n"
        f"{textwrap.indent(cell.source, '    ')}\n"
    )
    if not interrupted:
        ended = (
            f"{type(problem[0]).__name__}: the kernel ended by itself, most often because memory ran out. Close "
            "other programmes, or choose a smaller profile (ICD_PROFILE)."
        )
        print(
            re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(errors[0].traceback)) if errors else ended, "\n"
        )
    try:
        course.write(failed, nbformat.writes(nb))
        print(f"What ran is kept in {course.show(failed)}.", end=" ")
    except OSError as error:  # a full disk, say: it must not hide the rest
        print(f"What ran could not be kept ({error}).", end=" ")
    print(
        "Nothing that was finished is lost: the same command goes on from here and, where training was under way, from its "
        "last checkpoint.",
        flush=True,
    )
    raise SystemExit(130 if interrupted else 1)


def _environment(notebook: str = "") -> dict[str, str]:
    """Environment of a kernel: the same places wherever it starts, and no trace of a distributed launch."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCH) and k != "MPLBACKEND"}
    return env | {
        "ICD_DATA_DIR": str(course.data_dir()),
        "ICD_RUNS_DIR": str(course.run_dir().parent),
        "ICD_NOTEBOOKS_DIR": str(course.notebooks_dir()),
        "ICD_PROFILE": profiles.current().name,
        "ICD_MAKING": f"{env.get('ICD_MAKING', '')},{notebook}",
    }


def run_in_subprocess(notebook: str) -> None:
    """Run one notebook headless from within another, passing its lines on. Raises RuntimeError if it fails."""
    command = [sys.executable, "-u", "-m", "helpers.course", "run", "--only", notebook]
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
            f"{notebook} did not run to its end: its message stands above. Open that notebook, mend "
            "the cell named there, and run this one again."
        )


def _names(only: str | None) -> list[str]:
    names = sorted(path.stem for path in course.notebooks_dir().glob("[0-9][0-9]_*.ipynb"))
    if not names or (only and only not in names):
        raise ValueError(
            f"{course.notebooks_dir()}: no notebook {only or ''}. There are: {', '.join(names) or 'none'}."
        )
    return names


def script(notebook: str) -> None:
    """Run the code cells of a notebook in this process, one of those that `accelerate launch` started; the first one speaks.

    Figures are saved and not shown. Raises ValueError for an unknown notebook, SystemExit where a cell fails.
    """
    _names(notebook)
    os.environ |= {
        "MPLBACKEND": "agg",
        "ICD_MAKING": f"{os.environ.get('ICD_MAKING', '')},{notebook}",
    }
    with contextlib.redirect_stdout(io.StringIO()):
        course.setup()  # its switches go before the first import of a library that reads them
    import torch
    from accelerate import PartialState
    from IPython.core.inputtransformer2 import TransformerManager

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if cpu := not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState(
            cpu=cpu, timeout=datetime.timedelta(days=1)
        )  # the others wait while the first makes what is needed
    cells = json.loads((course.notebooks_dir() / f"{notebook}.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    names: dict[str, Any] = {"__name__": "__main__"}
    with (
        contextlib.nullcontext() if course.is_main() else contextlib.redirect_stdout(io.StringIO())
    ):
        for number, cell in enumerate(cells, 1):
            if cell["cell_type"] != "code":
                continue
            source, name = (
                TransformerManager().transform_cell("".join(cell["source"])),
                f"{notebook}, cell {number}",
            )
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
            lines = ast.parse(source).body
            value = (
                [lines.pop()] if lines and isinstance(lines[-1], ast.Expr) else []
            )  # shown, as a notebook does
            parts = ((ast.Module(lines, []), "exec"), (ast.Interactive(value), "single"))
            try:
                for part, mode in parts:
                    exec(compile(part, name, mode, dont_inherit=True), names)
            except Exception:
                traceback.print_exc()
                raise SystemExit(1) from None
    PartialState().destroy_process_group()


def run(only: str | None = None) -> None:
    """Execute what is not up to date, in order; then print the table and write the report."""
    names = _names(only)
    course.check_room(course.run_dir())
    if not only:
        about = f"profile {profiles.current().name}, run folder {course.show(course.run_dir())}"
        print(f"{about}\n{course.NOTICE}", flush=True)
    todo = [only] if only else names
    display = _Display(todo)
    for name in todo:
        if up_to_date(name):
            display.finish(name, "up to date")
        else:
            execute(name, display)
    display.bar.close()
    if not only:
        print_table()
        print(f"\nReport: {write_report()}\nExecuted notebooks: {course.run_dir() / 'notebooks'}")


# --------------------------------------------------------------------------------------- table and report


def results() -> dict[str, Any]:
    """The content of metrics.json. Raises FileNotFoundError where there is none yet."""
    if metrics := course.read(course.run_dir() / "metrics.json"):
        return metrics
    raise FileNotFoundError(
        f"{course.run_dir() / 'metrics.json'}: no results yet. `make course` makes them."
    )


def table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the result: per level macro-F1 with its 95 % interval, and the share of usable answers.

    `metrics` is the content of metrics.json. Where the ideal reader is none of its models, the ceiling stands in.
    """
    models = ({"ideal": metrics["ceiling"]} if metrics.get("ceiling") else {}) | metrics["models"]
    order = [*list(MODELS)[:-1], *(m for m in models if m not in MODELS), "ideal"]
    sizes = {
        lv: {at[lv]["n_classes"] for at in models.values() if "n_classes" in at.get(lv, ())}
        for lv in LEVELS
    }
    header = [
        f"{text} ({min(sizes[lv])} classes)" if len(sizes[lv]) == 1 else text
        for lv, text in LEVELS.items()
    ]
    rows = []
    for m in (m for m in order if m in models):
        row = [MODELS.get(m, m)]
        for level in LEVELS:
            at = models[m].get(level) or {}
            row.append(
                "–"
                if at.get("f1_gold") is None
                else f"{at['f1_gold']:.3f}"
                + (" [{:.3f}, {:.3f}]".format(*at["ci"]) if at.get("ci") else "")
                + (f" ({at.get('n_classes', '?')} classes)" if len(sizes[level]) > 1 else "")
            )
        usable = models[m].get("usable")
        rows.append([*row, "–" if usable is None else f"{usable:.1%}"])
    return ["macro-F1 [95 % interval]", *header, "usable answers"], rows


def print_table() -> None:
    """Print the table of the run."""
    from rich.console import Console
    from rich.table import Table

    header, rows = table(results())
    shown = Table(header[0])
    for text in header[1:]:
        shown.add_column(text, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(shown)


def write_report() -> Path:
    """Write report.html, one file with everything in it, and return its path."""
    from jinja2 import Environment

    metrics, folder, profile = results(), course.run_dir(), profiles.current()
    header, rows = table(metrics)
    figures = {
        path.stem.replace("_", " "): base64.b64encode(path.read_bytes()).decode()
        for path in sorted((folder / "figures").glob("*.png"))
    }
    cases = folder / "case.html"
    synthetic = (
        " Patients and notes are synthetic." if (course.data_dir() / "truth").exists() else ""
    )
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    return course.write(
        folder / "report.html",
        Environment(autoescape=True)
        .from_string(template)
        .render(
            run=folder.name,
            notice=course.NOTICE,
            header=header,
            rows=rows,
            figures=figures,
            cases=cases.read_text(encoding="utf-8") if cases.is_file() else "",
            about=f"Profile {profile.name}: {profile.about}, base model {profile.base}.{synthetic}",
            environment={"course": __version__, **metrics.get("environment", {})},
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run what is not up to date").add_argument(
        "--only", metavar="NOTEBOOK"
    )
    commands.add_parser(
        "script", help="run one in this process, under accelerate launch"
    ).add_argument("notebook")
    commands.add_parser("table", help="print the table of the run")
    commands.add_parser("report", help="write report.html")
    chosen = parser.parse_args(arguments)
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a shell starts what it puts in the background with SIGINT ignored
        signal.signal(name, signal.default_int_handler)
    try:
        if chosen.command == "run":
            run(chosen.only)
        elif chosen.command == "script":
            script(chosen.notebook)
        elif chosen.command == "table":
            print_table()
        else:
            print(write_report())
        return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
