"""What all checkers share: a verdict in words, the call of a student's function, known mistakes.

A checker takes what the student wrote and gives a `Verdict`. It computes what is right from the run
at hand or from small invented inputs, and compares a wrong answer with *decoys*: the results of
the usual mistakes. So it can say which mistake it was. It only reads artefacts, it trains nothing,
and whatever the student wrote, `check` raises nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib
import linecache
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import pandas as pd

EMPTY, RIGHT, WRONG, ERROR, MISSING = "empty", "right", "wrong", "error", "missing"
WORDS = {
    EMPTY: "not filled in yet.",
    RIGHT: "right.",
    WRONG: "not right yet.",
    ERROR: "your code stops with an error.",
    MISSING: "cannot be checked yet.",
}
TOLERANCE = 1e-6
LONGEST_VALUE = 160  # characters of a value that is shown
# Graders count a check cell as passed unless it raises; nbgrader sets the first of these itself.
STRICT = ("NBGRADER_EXECUTION", "ICD_EXERCISES_STRICT")


@dataclass(frozen=True)
class Verdict:
    """What a checker says. `state` is one of WORDS, `lines` are sentences for the student."""

    state: str
    lines: tuple[str, ...] = ()

    def text(self, number: str) -> str:
        """The verdict as it is printed below the check cell."""
        head = f"Exercise {number}: {WORDS[self.state]}"
        if self.state == RIGHT:
            return " ".join([head, *self.lines])
        return "\n".join([head, *(f"  - {line}" for line in self.lines)])


@dataclass(frozen=True)
class Exercise:
    """One exercise of cells.yaml."""

    number: str  # notebook.exercise, such as "6.2"
    notebook: str
    after: str  # id of the cell of the notebook that it follows
    title: str
    minutes: str
    text: str  # markdown: goal and what to write
    hint: str
    stub: str  # code of the cell to fill
    answers: tuple[str, ...]  # names of the stub that the checker gets
    points: int = 1


class Stop(Exception):
    """Ends a check early with a verdict."""

    def __init__(self, state: str, *lines: str) -> None:
        super().__init__(*lines)
        self.verdict = Verdict(state, lines)


Checker = Callable[..., Verdict]
CHECKERS: dict[str, Checker] = {}


def checker(number: str) -> Callable[[Checker], Checker]:
    """Register a function as the checker of an exercise."""

    def register(function: Checker) -> Checker:
        CHECKERS[number] = function
        return function

    return register


def rows() -> list[dict[str, Any]]:
    """The rows of cells.yaml: an exercise has a number, an expectation has none."""
    path = Path(__file__).with_name("cells.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@functools.cache
def exercises() -> dict[str, Exercise]:
    """Number -> exercise, in the order of the course."""
    chosen = [row for row in rows() if "number" in row]
    listed = [Exercise(**row | {"answers": tuple(row["answers"])}) for row in chosen]
    return {exercise.number: exercise for exercise in listed}


# ------------------------------------------------------------------------------- what a cell calls


def check(number: str, *answers: Any) -> None:
    """Print what the checker says about the answers of one exercise.

    Raises AssertionError for an answer that is not right only where a grader asks for it by one of
    the environment variables STRICT.
    """
    verdict = judge(number, *answers)
    print(verdict.text(number))
    if any(os.environ.get(name) for name in STRICT) and verdict.state != RIGHT:
        raise AssertionError(verdict.text(number))


def judge(number: str, *answers: Any) -> Verdict:
    """The verdict about the answers of one exercise. Raises ValueError for an unknown number."""
    if number not in exercises():
        known = ", ".join(exercises())
        raise ValueError(f"no exercise has the number {number!r}. Known: {known}.")
    importlib.import_module(f"exercises.nb{int(number.split('.')[0]):02}")
    if any(is_empty(answer) for answer in answers):
        return Verdict(EMPTY)
    try:
        return CHECKERS[number](*answers)
    except Stop as stop:
        return stop.verdict
    except Exception as error:  # an answer of a form that the checker does not expect
        problem = f"{type(error).__name__}: {error}"
        advice = "Compare its form (numbers, names, lists) with what the exercise asks for."
        return Verdict(WRONG, (f"The checker cannot read your answer ({problem}). {advice}",))


def is_empty(value: Any) -> bool:
    """Whether an answer is still the `...` of the stub, and nothing of it is filled in."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return len(value) > 0 and all(is_empty(each) for each in value)
    return value is Ellipsis


def require_filled(value: Any, name: str) -> None:
    """Stop with a sentence where a part of the answer is still `...`."""
    parts = value if isinstance(value, Mapping) else dict(enumerate(value, 1))
    empty = [str(key) for key, part in parts.items() if has_gap(part)]
    if empty:
        raise Stop(WRONG, f"In {name}, `...` still stands at: {', '.join(empty)}.")


def has_gap(value: Any) -> bool:
    """Whether `...` stands anywhere in a value."""
    if isinstance(value, list | tuple):
        return any(has_gap(each) for each in value)
    return value is Ellipsis


# ------------------------------------------------------------------------------- verdicts


def right(*lines: str) -> Verdict:
    """The verdict for a right answer; lines add what it shows."""
    return Verdict(RIGHT, lines)


def verdict(complaints: Iterable[str], *praise: str) -> Verdict:
    """WRONG with the complaints, or RIGHT with the praise where there is none."""
    lines = tuple(complaints)
    return Verdict(WRONG, lines) if lines else right(*praise)


def shown(value: Any) -> str:
    """A value for the student's eyes, in one line and not too long."""
    if isinstance(value, float):
        value = round(value, 4)
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 2] + " …"


# ------------------------------------------------------------------------------- artefacts


def table(artefact: str, file: str) -> pd.DataFrame:
    """A table of the run at hand. Stops where the artefact is not there yet."""
    import pandas as pd

    return pd.read_parquet(folder(artefact) / file)


def folder(artefact: str) -> Path:
    """The folder of an artefact of the run at hand. Stops where it is not there yet."""
    from helpers.machinery import artefacts, places, store

    path = artefacts.path(artefact)
    if not store.is_whole(path):
        notebook = artefacts.NOTEBOOKS[artefact.split("/")[0]]
        where = places.show(path)
        raise Stop(MISSING, f"{where} is not there. Run notebook {notebook} first, then check.")
    return path


# ------------------------------------------------------------------------------- numbers


def number(value: Any, name: str) -> float:
    """A student's value as a number. Stops where it is none."""
    import numpy as np

    is_text = isinstance(value, str | bytes | bool) or value is None
    if is_text or np.ndim(value) != 0:
        raise Stop(WRONG, f"{name} must be one number, but it is {shown(value)}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        message = f"{name} must be one number, but it is {shown(value)}."
        raise Stop(WRONG, message) from None


def numbers(value: Any, count: int, name: str) -> list[float]:
    """A student's value as a list of `count` numbers. Stops where it is none."""
    import numpy as np

    if isinstance(value, str) or np.ndim(value) != 1 or len(value) != count:
        raise Stop(WRONG, f"{name} must be {count} numbers, but it is {shown(value)}.")
    return [number(each, f"{name}[{place}]") for place, each in enumerate(value)]


@dataclass(frozen=True)
class Decoy:
    """The result of a usual mistake: a value, or a function that makes it; and what to say."""

    result: Any
    message: str


def compare(
    value: Any,
    expected: Any,
    decoys: Sequence[Decoy] = (),
    *,
    name: str,
    otherwise: str,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Complaints about one value: none where it is right, the message of the decoy that it equals,
    else `otherwise`."""
    if same(value, expected, tolerance):
        return []
    for decoy in decoys:
        if same(value, decoy.result, tolerance) and not same(decoy.result, expected, tolerance):
            return [f"{name} is {shown(value)}. {decoy.message}"]
    return [f"{name} is {shown(value)}. {otherwise}"]


def same(a: Any, b: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two values are equal: numbers within the tolerance, lists place by place, sets and
    texts exactly. Lists, tuples, arrays and series are alike."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in b)
    if isinstance(a, set | frozenset) or isinstance(b, set | frozenset):
        return isinstance(a, set | frozenset) and isinstance(b, set | frozenset) and a == b
    a, b = plain(a), plain(b)
    if isinstance(a, list) or isinstance(b, list):
        is_pair = isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
        return is_pair and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if is_number(a) and is_number(b):
        both_nan = a != a and b != b
        return both_nan or abs(a - b) <= tolerance
    return type(a) is type(b) and a == b


def plain(value: Any) -> Any:
    """Arrays, series and tuples as lists, their numbers as Python's."""
    if hasattr(value, "tolist"):  # numpy and pandas, arrays and single numbers
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------- functions


@dataclass(frozen=True)
class Trial:
    """One call of a student's function: the arguments, what is right, and what a wrong result most
    often means."""

    arguments: tuple[Any, ...]
    expected: Any
    hint: str
    name: str = ""  # how the call is shown; the arguments where it is empty


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a student's function. Its arguments are copies, so it can spoil nothing.

    Stops where it is no function, where it is still the stub, and with the line where it fails.
    """
    given = ", ".join([*map(shown, arguments), *(f"{k}={shown(v)}" for k, v in named.items())])
    return _called(function, arguments, named, given, show_error=True)


def call_on_run(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `call`, with data of the run: no message shows them, and of real patients no error text,
    which may quote them."""
    from helpers.machinery import places

    given = "the data of your run"
    return _called(function, arguments, {}, given, show_error=places.is_synthetic())


def _called(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    given: str,
    *,
    show_error: bool,
) -> Any:
    if not callable(function):
        raise Stop(WRONG, f"Write a function here. Your answer is {shown(function)}.")
    try:
        result = function(*copy.deepcopy(arguments), **copy.deepcopy(named))
    except (Exception, SystemExit) as error:
        lines = explain(error, function)
        if not show_error:
            lines[0] = type(error).__name__
        raise Stop(ERROR, *lines, f"It was called with: {given}") from None
    if result is Ellipsis:
        raise Stop(EMPTY)
    return result


def explain(error: BaseException, function: Callable[..., Any] | None = None) -> list[str]:
    """An error in words: what it is, and the student's line where it happens.

    The line is the last one in the file of `function`, or in a cell where no function is given.
    """
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(function, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    own = own or [frame for frame in frames if frame.filename.startswith("<exercise")]
    lines = [f"{type(error).__name__}: {error}"]
    if isinstance(error, SyntaxError):
        lines.append(f"Line {error.lineno}: {(error.text or '').strip()}")
    elif own:
        last = own[-1]
        text = last.line or linecache.getline(last.filename, last.lineno or 0).strip()
        lines.append(f"Line {last.lineno}: {text}")
    if isinstance(error, NameError):
        lines.append(
            "A function knows its arguments and what is imported. It takes tables as arguments."
        )
    return lines


def try_out(
    function: Callable[..., Any],
    trials: Sequence[Trial],
    decoys: Sequence[Decoy] = (),
    *,
    tolerance: float = TOLERANCE,
    most: int = 3,
) -> list[str]:
    """Complaints about a function that is called with each trial.

    Where all its results are those of a decoy (a wrong function), the decoy's message. Else the
    failing trials with their hints, at most `most` of them.
    """
    results = [call(function, *trial.arguments) for trial in trials]
    failed = [
        (trial, result)
        for trial, result in zip(trials, results, strict=True)
        if not same(result, trial.expected, tolerance)
    ]
    if not failed:
        return []
    for decoy in decoys:
        wrong = [decoy.result(*copy.deepcopy(trial.arguments)) for trial in trials]
        if same(results, wrong, tolerance):
            return [decoy.message]
    complaints = []
    for trial, result in failed[:most]:
        given = trial.name or ", ".join(shown(argument) for argument in trial.arguments)
        asked = f"{given}: you give {shown(result)}, right is {shown(trial.expected)}."
        complaints.append(f"{asked} {trial.hint}")
    if len(failed) > most:
        complaints.append(f"And {len(failed) - most} more of {len(trials)} trials fail.")
    return complaints
