"""Teachers that are language models: who writes the traces where no casebook knows the answer.

| teacher | who writes | is told the code |
|---|---|---|
| template | the casebook's reader (`traces`), for notes of the synthetic hospital alone | no |
| unsupervised | a model on this machine, in 4 bits; by default the profile's own base | no |
| oracle | the same | yes: it gives the reasons, the code is appended |
| server, server-oracle | a model behind a server with the OpenAI API | no, yes |

Each reads what the student will read, the note cut to the profile's length. Taught in notebook 2.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import icd, inference, models, prompts, traces
from helpers.machinery import places, servers
from helpers.profiles import TEACHERS, Profile

READ = "Read this admission note as an experienced physician. "
REASON = (
    "In five sentences at most, weigh the findings that decide. Quote each of them from the note, "
    "word for word, in double quotes. Use no finding, number or drug that the note does not state. "
)
UNSUPERVISED = (
    f"{READ}Find the principal diagnosis. {REASON}Then close with </think> and give one ICD-10-CM "
    "code, as specific as the note allows: <diagnosis>CODE</diagnosis>"
)
ORACLE = (
    f"{READ}Its first line gives the principal diagnosis that was found later. Explain how the "
    f"note leads there. {REASON}Do not mention the diagnosis given, its code, or that you know it. "
    "Close with </think>."
)
TEMPERATURE = 0.7
ANSWER_ROOM = 24  # tokens of </think> and the answer, which are appended to an oracle's reasoning

_CODE_WORDS = re.compile(r"\b(?:icd|code[sd]?|coding)\b", re.IGNORECASE)


def check_teacher(teacher: str) -> None:
    """Raises ValueError for an unknown teacher, and for the template on notes that the synthetic
    hospital did not write: it knows 146 codes and the phrases of that hospital, nothing else."""
    if teacher not in TEACHERS:
        raise ValueError(f"there is no teacher {teacher!r}. Known: {', '.join(TEACHERS)}.")
    is_ours = (places.data_dir() / "truth" / "manifest.json").is_file()
    if teacher == "template" and not is_ours:
        raise ValueError(
            "The template teacher knows the synthetic hospital alone, and "
            f"{places.show(places.data_dir())} is not of its writing (no truth/manifest.json): its "
            "traces would be nonsense. Choose a model as teacher, by ICD_TEACHER or in the "
            "settings of notebook 2: unsupervised (not told the code), oracle (told the code, "
            "writes the reasons), server or server-oracle (the same behind an OpenAI-compatible "
            "server on this machine)."
        )


def write(
    cases: pd.DataFrame,
    teacher: str,
    profile: Profile,
    keep: Path,
    *,
    habit: float = traces.HABIT,
    model: str | None = None,
    url: str = servers.URL,
    allow_remote: bool = False,
    dictionary: set[str] | None = None,
) -> pd.DataFrame:
    """The table of traces (`traces.checked`) of a teacher for cases (subject_id, hadm_id, note,
    code).

    keep: a folder for what is finished; the same call goes on after it. habit: the template's.
    model: a folder, a hub id, or the server's name for it; None: the profile's base, or the first
    model that the server has. url, allow_remote: of the server. An oracle alone is told the code,
    and a trace of its that names it is dropped.

    Raises ValueError as `check_teacher`, and for a server on another machine unless allow_remote;
    RuntimeError where the server fails.
    """
    check_teacher(teacher)
    if teacher == "template":
        manifest = places.read(places.data_dir() / "truth" / "manifest.json")
        return traces.from_template(cases, habit=habit, reading=manifest.get("reading", 0.0))
    is_oracle = teacher.endswith("oracle")
    student = models.load_tokenizer(profile.base)
    cut = partial(prompts.truncate_note, tokenizer=student, max_tokens=profile.max_note_tokens)
    seen = cases.assign(note=cases["note"].map(cut))
    asked = seen
    if is_oracle:
        first = seen["code"].map(lambda code: f"{icd.dotted(code)} {icd.title(code) or ''}\n\n")
        asked = seen.assign(note=first + seen["note"])
    limit = profile.max_new_tokens - ANSWER_ROOM
    to_messages = partial(_messages, ORACLE if is_oracle else UNSUPERVISED)
    if teacher.startswith("server"):
        server = servers.client(url, allow_remote=allow_remote, timeout=600)
        dialogues = dict(zip(asked["hadm_id"], map(to_messages, asked["note"]), strict=True))
        completions = _from_server(server, model, dialogues, limit, keep)
    else:
        loaded = models.load(model or profile, four_bit=True)
        options = {
            "temperature": TEMPERATURE,
            "seed": 0,
            "max_new_tokens": limit,
            "to_messages": to_messages,
            "label": "teacher",
            "keep": keep,
        }
        completions = inference.predict(*loaded, asked, profile, **options)["completion"]
    answers = [prompts.parse(completion) for completion in completions]
    codes = seen["code"] if is_oracle else [answer.code for answer in answers]
    thinks = [answer.think for answer in answers]
    rows = [*zip(seen["hadm_id"], thinks, codes, seen["note"], strict=True)]
    table = traces.checked(rows, dictionary)
    for i in table.index[table["kept"] & is_oracle]:
        table.at[i, "why"] = betrayal(*rows[i][1:])
    return table.assign(kept=table["why"].isna())


def _messages(instruction: str, note: str) -> prompts.Turns:
    system, user = prompts.messages(note)
    return [system | {"content": instruction}, user]


def _from_server(
    server: Any, model: str | None, dialogues: dict[int, list], limit: int, keep: Path
) -> list[str]:
    """The completion for each dialogue (by hadm_id); each is kept once it is there."""

    def reply(hadm_id: int, turns: list) -> str:
        path = keep / f"{hadm_id}.json"
        record = places.read(path)
        if not record:
            answer = server.chat.completions.create(
                model=name, messages=turns, temperature=TEMPERATURE, max_tokens=limit
            )
            record = {"completion": answer.choices[0].message.content or ""}
            places.write(path, record)
        return record["completion"]

    try:
        name = model or server.models.list().data[0].id
        with ThreadPoolExecutor(8) as pool:
            return [*places.progress(pool.map(reply, dialogues, dialogues.values()), "teacher")]
    except Exception as error:  # its own text may quote a note
        raise RuntimeError(
            f"teacher: the server at {server.base_url} failed ({type(error).__name__}). What it "
            "wrote is kept: start it and run this notebook again."
        ) from None


def betrayal(think: str, code: str, note: str) -> str | None:
    """How a reasoning betrays the code that its writer was told; None if it does not.

    It names a code of the same category, the title of the code or of its category (unless the note
    says these words itself), or it speaks of codes. Or it is cut off before it ends.
    """
    category = icd.category(code)
    words = re.findall(r"\w[\w.]*", think)
    text, known = (" ".join(part.lower().split()) for part in (think, note))
    titles = [title.lower() for title in map(icd.title, (code, category)) if title]
    if category in map(icd.category, words) or _CODE_WORDS.search(think):
        return "names the code that it was told, or speaks of one"
    if any(title in text and title not in known for title in titles):
        return "names the title that it was told"
    return None if think.endswith((".", "!", "?", '"')) else "is cut off"
