"""Walking through single cases: what the note says, what each model made of it, and how far that is
from the truth.

`case_html` fills explorer_case.html.j2, which escapes whatever comes from a note, a model or a
table. The page is static HTML without script or style sheet, so that it shows in a notebook, on
GitHub and in report.html alike. `explore` puts ipywidgets around it.

Taught in notebook 6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from helpers import casebook, icd, metrics, plots, prompts, traces
from helpers.machinery import places

Answer = Mapping[str, Any]  # a row of a table of predictions
Reward = Callable[..., list[float]]
TEMPLATE = Environment(autoescape=True).from_string(
    Path(__file__).with_name("explorer_case.html.j2").read_text(encoding="utf-8")
)
_WORD = re.compile(r"\w+(?:[.'/-]\w+)*")
_CLAUSE = re.compile(r"[.;,:()\n]+(?:\s|$)|\s[-–]\s")


def case_html(
    case: Mapping[str, Any],
    answers: Mapping[str, Answer | pd.DataFrame],
    *,
    missed: Sequence[str] | None = None,
    rewards: Sequence[Reward] | None = None,
    focus: str | None = None,
    heading: str = "",
) -> str:
    """One case (a row of the table of cases) as HTML; `answers` maps a model to its predictions, or
    to a row of them.

    In the note is marked what `focus` (default: the last model) cites, and dashed what of `missed`
    (findings that mattered) it does not; by default the `telling_findings` of a case of the
    synthetic hospital. `rewards` default to those of the course and grounding. Raises ValueError
    without answers.
    """
    rows = {model: _row(answer, case["hadm_id"]) for model, answer in answers.items()}
    rows = {model: row for model, row in rows.items() if row is not None}
    if not rows:
        raise ValueError(
            "case_html: no model answered this case. Pass predictions that hold its hadm_id."
        )
    if rewards is None:
        from helpers.rewards import DEFAULT, grounding_reward

        rewards = [*DEFAULT, grounding_reward]
    note = str(case["note"])
    gold = str(icd.normalise(case["code"]))
    if missed is None:
        missed = telling_findings(note, gold) if _synthetic(case["hadm_id"]) else ()
    if focus not in rows:
        focus = list(rows)[-1]
    cited = cited_phrases(prompts.parse(_text(rows[focus])).think, note)
    return TEMPLATE.render(
        notice=places.NOTICE,
        heading=heading,
        focus=plots.label(focus),
        note=mark(note, cited, missed),
        truth=_path(gold, gold),
        answers=[_answer(model, row, note, gold, rewards) for model, row in rows.items()],
    )


def explore(
    cases: pd.DataFrame,
    predictions: Mapping[str, pd.DataFrame],
    *,
    rewards: Sequence[Reward] | None = None,
) -> Any:
    """Widgets to choose cases by model, chapter and kind of answer, each shown by `case_html`.

    Raises ValueError where cases and predictions do not meet.
    """
    import ipywidgets as widgets

    if not predictions:
        raise ValueError(
            "explore: no predictions. Pass {model: predictions table}, e.g. those of base, sft "
            "and grpo."
        )
    outcomes = {model: metrics.outcomes(cases, table) for model, table in predictions.items()}
    rows = cases.drop_duplicates("hadm_id").set_index("hadm_id", drop=False)
    number = widgets.BoundedIntText(min=1, description="Case")
    view = widgets.HTML()

    def show(model: str, chapter: tuple[int, ...], kind: tuple[str, ...], case: int) -> None:
        table = outcomes[model]
        table = table[table["gold"].map(icd.chapter).isin(chapter) & table["kind"].isin(kind)]
        number.max = max(1, len(table))
        number.description = f"Case of {len(table)}"
        if table.empty:
            view.value = f"<p><b>{places.NOTICE}</b></p><p>No case fits. Widen the choice.</p>"
            return
        answer = table.iloc[min(case, len(table)) - 1]
        row = rows.loc[answer["hadm_id"]]
        outcome = f"{plots.label(model)}, {plots.KINDS[answer['kind']].label}"
        view.value = case_html(
            row,
            predictions,
            rewards=rewards,
            focus=model,
            heading=f"Admission {row['hadm_id']}: {outcome}",
        )

    present = sorted({icd.chapter(gold) for table in outcomes.values() for gold in table["gold"]})
    chapters = {"all chapters": tuple(present)}
    chapters |= {f"{chapter} {icd.chapter_short(chapter)}": (chapter,) for chapter in present}
    kinds = {"any answer": tuple(metrics.KINDS), "any error": tuple(metrics.KINDS[1:])}
    kinds |= {name.label: (kind,) for kind, name in plots.KINDS.items()}
    models = [(plots.label(model), model) for model in predictions]
    controls = widgets.interactive(
        show,
        model=widgets.Dropdown(options=models, value=models[-1][1], description="Model"),
        chapter=widgets.Dropdown(options=chapters, description="Chapter"),
        kind=widgets.Dropdown(options=kinds, description="Answer"),
        case=number,
    )
    controls.update()
    return widgets.VBox([controls, view])


def cited_phrases(think: str, note: str) -> list[str]:
    """What the reasoning takes from the note word for word, longest first.

    That is findings of a template rationale, whole clauses of two words and more, and runs of three
    words and more; case, white space and punctuation aside.
    """
    words = [(match.group().lower(), match.span()) for match in _WORD.finditer(note)]
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2([word for word, _ in words])
    findings = traces.cited_findings(think)
    phrases = set()
    for clause in [*findings, *_CLAUSE.split(think)]:
        own = _WORD.findall(clause.lower())
        least = 1 if clause in findings else 2
        matcher.set_seq1(own)
        for _, start, size in matcher.get_matching_blocks():
            if size > 2 or least <= size == len(own):
                (first, _), (_, last) = words[start][1], words[start + size - 1][1]
                phrases.add(" ".join(note[first:last].lower().split()))
    return sorted(phrases, key=lambda phrase: (-len(phrase), phrase))


def telling_findings(note: str, code: str, most: int = 3) -> list[str]:
    """The phrases of a synthetic note that speak most for a code, strongest first; none for a code
    outside the casebook.

    Ranked by P(finding | code) / P(finding) of the casebook (`casebook.evidence`): on real notes
    that means nothing.
    """
    book = casebook.casebook()
    dotted = str(icd.dotted(code))
    if dotted not in book.codes:
        return []
    spans = casebook.read(note)[1]
    return [spans[name] for name in casebook.evidence(dotted, spans, most)[0]]


def mark(text: str, cited: Iterable[str], missed: Iterable[str]) -> list[tuple[str, str]]:
    """The text in pieces: ("mark", a cited phrase), ("ins", a missed one that no cited one
    touches), ("", the rest)."""
    kinds = [""] * len(text)
    for kind, phrases in (("mark", cited), ("ins", missed)):
        for phrase in phrases:
            words = r"\s+".join(map(re.escape, phrase.split()))
            for match in re.finditer(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE):
                span = slice(*match.span())
                if kind == "mark" or not any(kinds[span]):
                    kinds[span] = [kind] * len(match.group())
    pieces = groupby(zip(kinds, text, strict=True), key=lambda pair: pair[0])
    return [(kind, "".join(letter for _, letter in piece)) for kind, piece in pieces]


def _row(answer: Answer | pd.DataFrame, hadm_id: int) -> Answer | None:
    """The first sample of a case in a table of predictions."""
    if not isinstance(answer, pd.DataFrame):
        return answer
    rows = answer[answer["hadm_id"] == hadm_id]
    if "sample" in rows:
        rows = rows[rows["sample"] == 0]
    return None if rows.empty else rows.iloc[0]


def _text(row: Answer) -> str:
    text = row.get("completion")  # a baseline that writes nothing has none
    return text if isinstance(text, str) else ""


def _synthetic(hadm_id: int) -> bool:
    """Whether the hospital of the data folder wrote this case."""
    truth = places.data_dir() / "truth" / "findings.parquet"
    return truth.is_file() and hadm_id in set(
        pd.read_parquet(truth, columns=["hadm_id"])["hadm_id"]
    )


def _answer(
    model: str, row: Answer, note: str, gold: str, rewards: Sequence[Reward]
) -> dict[str, Any]:
    """What the template prints of one model: reasoning with what it cites, the answer as a path,
    the rewards."""
    text = _text(row)
    parsed = prompts.parse(text)
    code = icd.normalise(row["predicted"])
    distance = parsed.problem
    if code:
        distance = f"{icd.tree_distance(code, gold)} edges from the truth"
    elif parsed.code:
        distance = f"{icd.dotted(parsed.code)} does not exist"
    columns = {"completions": [text], "code": [gold], "note": [note]}
    return {
        "label": plots.label(model),
        "colour": plots.colour(model),
        "think": mark(parsed.think, cited_phrases(parsed.think, note), ()),
        "distance": distance,
        "path": _path(code, gold),
        "rewards": [
            (reward.__name__.removesuffix("_reward"), reward(**columns)[0])
            for reward in rewards
            if text
        ],
    }


def _path(code: str | None, gold: str) -> list[tuple[bool, str]]:
    """Chapter, block, category and code: whether each is that of the gold code, and its name."""
    truth = icd.ancestors(gold)
    steps = []
    for level, value in icd.ancestors(code).items():
        if value is None or (level == "category" and value == code == gold):
            continue  # a category that is a code itself stands once
        name = value
        if level == "chapter":
            name = f"{value} {icd.chapter_title(value)}"
        elif level != "block":
            title = icd.title(value) or "(not in the ICD-10-CM of April 2026)"
            name = f"{icd.dotted(value)} {title}"
        steps.append((value == truth[level], name))
    return steps
