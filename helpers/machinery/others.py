"""Prompt files of others (columns role and content, `{note}` where the note goes).

Not needed to follow the course.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from helpers import prompts

ROLES = ("system", "user", "assistant")
FAULTS = {
    UnicodeDecodeError: "this is not UTF-8 ({}). Save the file as UTF-8.",
    csv.Error: "this is no CSV ({}). Put text in double quotes, and double those in it.",
    ValueError: "{}",
}


def read_prompt_file(path: str | Path) -> Callable[[str], prompts.Turns]:
    """The `prompts.messages` of a prompt file in the released format.

    A last turn of the assistant that only opens the reasoning is left out: the chat template opens
    it (models.load_tokenizer). One that says more stays, and is where the answer goes on
    (prompts.chat). Raises ValueError that names the file: for other columns or roles, for text that
    is no CSV or not UTF-8, and unless `{note}` stands in it exactly once.
    """
    try:
        turns = _turns(Path(path).read_bytes().decode("utf-8-sig"))
    except tuple(FAULTS) as error:
        fault = FAULTS[type(error)].format(error)
        raise ValueError(f"{path}: {fault}") from error

    def messages(note: str) -> prompts.Turns:
        text = prompts.messages(note)[-1]["content"]  # checked and neutralised
        return [turn | {"content": turn["content"].replace("{note}", text)} for turn in turns]

    return messages


def _turns(text: str) -> prompts.Turns:
    lines = io.StringIO(text, newline=None)  # with every kind of line end as a line feed
    rows = csv.DictReader(lines, skipinitialspace=True, strict=True)
    columns = [name.strip().lower() for name in rows.fieldnames or []]
    rows.fieldnames = columns
    turns = []
    is_complete = {"role", "content"} <= {*columns}
    for number, row in enumerate(rows if is_complete else [], 1):
        if None in row or None in row.values():  # too many fields, or too few
            raise ValueError(
                f"turn {number} has not {len(columns)} fields. Put text with commas or line breaks "
                'between double quotes: user,"A note, {note}"'
            )
        role = row["role"].strip().lower()
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}.")
        turns.append({"role": role, "content": row["content"]})
    if not turns:
        names = ", ".join(columns) or "nothing"
        raise ValueError(f"the columns role and content are needed, and a row (found: {names}).")
    if turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() in ("", "<think>"):
        turns.pop()
    count = sum(turn["content"].count("{note}") for turn in turns if turn["role"] != "assistant")
    if count != 1:
        raise ValueError(f"{{note}} stands in it {count} times. It must stand once, for the note.")
    return turns
