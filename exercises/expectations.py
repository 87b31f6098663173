"""What a student expects: written down before the result, and shown again beside it.

In a notebook, `expectations.write("04", "What will GRPO change?")` shows a question with a box and
a button, and `expectations.recall("04")` shows the student's own text beside what came out. All
texts of a run are in one file, expectations.json in the run folder, each version with its time.
Experiments of the same run (`settings["name"]`) share it.

Where no person watches (`make course`, nbmake, nbgrader) there is no box: both print plain HTML
without dates, the same each time. `cells.yaml` says where the notebooks ask; see docs/exercises.md.
"""

from __future__ import annotations

import datetime
import functools
import html
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exercises import core

if TYPE_CHECKING:
    import ipywidgets

FILE = "expectations.json"
ASK = "Write down what you expect."
NO_BOX = "An open notebook has a box here. What you save in it is shown again below the result."
NOTHING = "You wrote no expectation. The cell is above."
# Set by our runner of notebooks, by nbgrader, and by pytest, in which nbmake runs.
HEADLESS = ("ICD_HEADLESS", "NBGRADER_EXECUTION", "PYTEST_CURRENT_TEST")


@dataclass(frozen=True)
class Question:
    """One pair of cells of cells.yaml."""

    expectation: str  # its key, the number of the notebook
    notebook: str
    ask_before: str  # id of the code cell that the box stands before
    recall_after: str  # id of the code cell whose result the text is shown below
    question: str


@dataclass(frozen=True)
class Version:
    """A text as it was saved once. saved: the time, ISO 8601 with its zone."""

    text: str
    saved: str


@dataclass(frozen=True)
class Entry:
    """What a student saved for one key; the newest version is the last."""

    question: str
    versions: tuple[Version, ...]

    @property
    def text(self) -> str:
        return self.versions[-1].text

    def history(self) -> str:
        """When it was saved, in words: "2026-03-02 14:05, changed 2026-03-02 15:10"."""
        first, last = shown_time(self.versions[0]), shown_time(self.versions[-1])
        return first if len(self.versions) == 1 else f"{first}, changed {last}"


@functools.cache
def questions() -> dict[str, Question]:
    """Key -> question, in the order of the course."""
    listed = [Question(**row) for row in core.rows() if "expectation" in row]
    return {question.expectation: question for question in listed}


# ------------------------------------------------------------------------------- what a cell calls


def write(key: str, question: str) -> None:
    """Show a question and a box for its answer, with what was saved before.

    Raises ValueError where the file of the run is damaged or the key is no text.
    """
    if not _is_spoken(key):
        return
    if is_headless():
        _show(asked_html(question, read().get(key)), asked_text(question, read().get(key)))
        return
    from IPython.display import display

    area = box(key, question)  # first: a damaged file is said before anything is shown
    _show(_question_html(question), f"{ASK} {question}")
    display(area)


def recall(key: str) -> None:
    """Show what the student saved for this key. Raises ValueError as `write`."""
    if not _is_spoken(key):
        return
    entry = read().get(key)
    when = entry.history() if entry and not is_headless() else ""
    _show(recalled_html(entry, when), recalled_text(entry, when))


def is_headless() -> bool:
    """Whether no person watches: no kernel runs this, or one that a program started."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return not hasattr(shell, "kernel") or any(os.environ.get(name) for name in HEADLESS)


def box(key: str, question: str) -> ipywidgets.VBox:
    """The box, its button and a line that says what was saved. Raises ValueError as `read`."""
    import ipywidgets  # version 7 (Colab) or 8

    from helpers.machinery import places

    entry = read().get(key)
    kept = entry.text if entry else ""
    area = ipywidgets.Textarea(
        value=kept,
        description="I expect:",
        placeholder="One or two sentences, before you go on",
        rows=4,
        layout=ipywidgets.Layout(width="95%", height="auto"),
    )
    button = ipywidgets.Button(description="Save")
    state = ipywidgets.HTML(html.escape(f"Saved {entry.history()}." if entry else ""))

    def say_unsaved(_: Any) -> None:
        is_kept = area.value.strip() == kept
        state.value = "" if is_kept else "Not saved yet."

    def keep(_: Any) -> None:
        nonlocal kept
        try:
            saved = save(key, question, area.value)
        except (OSError, ValueError) as error:
            state.value = html.escape(f"Not saved. {error}")
            return
        kept = saved.text
        where = places.show(file())
        state.value = html.escape(f"Saved {saved.history()} in {where}.")

    area.observe(say_unsaved, "value")
    button.on_click(keep)
    return ipywidgets.VBox([area, ipywidgets.HBox([button, state])])


# ------------------------------------------------------------------------------- the file


def file() -> Path:
    """Where the texts of this run are."""
    from helpers.machinery import places

    return places.run_dir() / FILE


def read() -> dict[str, Entry]:
    """Key -> what was saved; empty where nothing was.

    Raises ValueError where the file cannot be read as such: what is in it is not thrown away.
    """
    from helpers.machinery import places

    path = file()
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: _entry(value) for key, value in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{places.show(path)} is damaged ({type(error).__name__}: {error}). It was left as it "
            "is. Repair it, or move it to another folder, then run this cell again."
        ) from error


def save(key: str, question: str, text: str) -> Entry:
    """Keep a text with the time, beside its earlier versions; the file is written whole.

    Raises ValueError for a blank text and as `read`, FileNotFoundError where there is no run yet,
    OSError where the file cannot be written.
    """
    from helpers.machinery import places, store

    text = text.strip()
    if not text:
        raise ValueError("The box is empty: write a sentence first.")
    path = file()
    if not path.parent.is_dir():  # else the run that ships would find the folder taken
        raise FileNotFoundError(
            f"{places.show(path.parent)} is not there: run the first cell of this notebook."
        )
    with store.lock(path):
        entries = read()
        versions = entries[key].versions if key in entries else ()
        if not versions or versions[-1].text != text:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            versions = (*versions, Version(text, now))
        entries[key] = Entry(question, versions)
        places.write(path, {name: asdict(entry) for name, entry in entries.items()})
    return entries[key]


def _entry(value: Any) -> Entry:
    versions = tuple(Version(each["text"], each["saved"]) for each in value["versions"])
    entry = Entry(value["question"], versions)
    if not versions:
        raise ValueError("an entry has no versions")
    parts = [entry.question, *(each.text for each in versions), *(each.saved for each in versions)]
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("a text was expected")
    return entry


# ------------------------------------------------------------------------------- what is shown


def asked_html(question: str, entry: Entry | None = None) -> str:
    """What stands for the box where no person watches."""
    saved = _quoted(entry.text) if entry else ""
    return f"{_question_html(question)}\n<p>{NO_BOX}</p>{saved}"


def asked_text(question: str, entry: Entry | None = None) -> str:
    """The same for a program that shows no HTML."""
    saved = f"\n{entry.text}" if entry else ""
    return f"{ASK} {question}\n{NO_BOX}{saved}"


def recalled_html(entry: Entry | None = None, when: str = "") -> str:
    """A student's text below a result. when: the time, "" to leave it out."""
    if entry is None:
        return f"<p>{NOTHING}</p>"
    time = f" (saved {html.escape(when)})" if when else ""
    question = html.escape(entry.question)
    return f"<p><b>You expected</b>{time}: {question}</p>{_quoted(entry.text)}"


def recalled_text(entry: Entry | None = None, when: str = "") -> str:
    """The same for a program that shows no HTML."""
    if entry is None:
        return NOTHING
    time = f" (saved {when})" if when else ""
    return f"You expected{time}: {entry.question}\n{entry.text}"


def shown_time(version: Version) -> str:
    """The time of a version, to the minute."""
    return version.saved[:16].replace("T", " ")


def _question_html(question: str) -> str:
    return f"<p><b>{ASK}</b> {html.escape(question)}</p>"


def _quoted(text: str) -> str:
    """A student's text, escaped, with its line ends. In <pre> a $ starts no formula."""
    style = "white-space: pre-wrap; font-family: inherit"
    return f'\n<blockquote><pre style="{style}">{html.escape(text)}</pre></blockquote>'


def _is_spoken(key: str) -> bool:
    """Whether this process speaks. Raises ValueError for a key that is no text."""
    from helpers.machinery import places

    if not isinstance(key, str) or not key.strip():
        raise ValueError(f'the key of an expectation is a text such as "04", not {key!r}.')
    return places.is_main()


def _show(page: str, text: str) -> None:
    """Show HTML below the cell; the text where nothing shows HTML."""
    if getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is None:
        print(text, flush=True)
        return
    from IPython.display import display

    display({"text/html": page, "text/plain": text}, raw=True)
