"""Walking through single cases: what the note says, what each model made of it, and how far that is from the truth.

`case_html` renders one case as static HTML without script or style sheet, so that it shows in a notebook, on GitHub and in
report.html alike; where a viewer drops the colours, marks and words still tell. `explore` puts ipywidgets around it.
Everything that comes from a note, a model or a table is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import pandas as pd

from helpers import course, icd, plots, prompts, synthetic, traces

Reward = Callable[..., list[float]]
Find = Callable[[str, str], Sequence[str]]  # (note, gold code) -> phrases of the note that mattered
# Tables, so that cells stand side by side where styles are dropped; where they are kept, cells wrap when the window is narrow.
_TABLE = (
    '<table style="display:grid;grid-template-columns:minmax(0,1fr);width:100%;margin:6px 0 0;color:#222;font-size:13px">'
    '<tr style="display:flex;flex-wrap:wrap;gap:6px;background:#fff">'
)
_CELL = (
    '<td valign="top" style="border:1px solid #ccc;border-radius:4px;padding:8px;vertical-align:top;text-align:left;'
    "white-space:normal;box-sizing:border-box;min-width:0;max-width:none;overflow-wrap:anywhere;line-height:1.45;"
)
_PAGE = (
    '<div style="font-family:sans-serif;font-size:13px;line-height:1.45;color:#222;background:#fff;padding:8px">'
    f'<p style="color:#9C2A00;margin:2px 0"><b>{course.NOTICE}</b></p>'
)
_CITED = "background:#FCE3B6;color:#222;border-bottom:2px solid #B36B00;"
_MISSED = "background:#fff;color:#222;border:1.5px dashed #6A4C9C;padding:0 2px;box-decoration-break:clone;"
_NO_FINDING = frozenset(
    (
        "nothing",
        "findings",
        "finding",
        "evidence",
        "detail",
        "details",
        "patient",
        "diagnosis",
        "history",
    )
)
_CLAUSE = re.compile(r"[.;,:()\n]+(?:\s|$)|\s[-–]\s")


def cited_phrases(think: str, note: str) -> list[str]:
    """What the reasoning takes from the note word for word, longest first: the findings of a template rationale, whole clauses,
    and runs of three or more words. White space and case aside; a word alone counts from five letters on."""
    text = " ".join(note.lower().split())
    found = {" ".join(phrase.lower().split()) for phrase in traces.cited_findings(think)}
    for clause in _CLAUSE.split(think.lower()):
        words, i = clause.split(), 0
        if len(words) > 1 or (len(clause.strip()) > 4 and clause.strip() not in _NO_FINDING):
            found.add(" ".join(words))
        while i + 3 <= len(words):
            end = i + 3
            while end <= len(words) and " ".join(words[i:end]) in text:
                end += 1
            if end > i + 3:
                found.add(" ".join(words[i : end - 1]))
            i = max(end - 1, i + 1) if end > i + 3 else i + 1
    found = {phrase.strip(" .,;:") for phrase in found} - {""}
    return sorted(
        (p for p in found if re.search(_words(p), text)), key=lambda phrase: (-len(phrase), phrase)
    )


def _words(phrase: str) -> str:
    return r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)"


def _text(answer: Mapping[str, Any]) -> str:
    text = answer.get("completion")  # a baseline that writes nothing has none
    return text if isinstance(text, str) else ""


def telling_findings(note: str, code: str, most: int = 3) -> list[str]:
    """The phrases of a synthetic note that speak most for a code, strongest first; none for a code outside the casebook.

    Ranked by P(finding | code) / P(finding) of the casebook (`synthetic.evidence`): on real notes that means nothing.
    """
    book, dotted = synthetic.casebook(), str(icd.dotted(code))
    if dotted not in book.codes:
        return []
    spans = synthetic.read(note, book)[1]
    return [spans[name] for name in synthetic.evidence(dotted, spans, book, most)[0]]


def _finder(hadm_ids: Iterable[Any]) -> Find:
    """`telling_findings` where the data folder's synthetic hospital wrote all these cases, else one that finds nothing."""
    truth = course.data_dir() / "truth" / "findings.parquet"
    ours = truth.is_file() and set(hadm_ids) <= set(
        pd.read_parquet(truth, columns=["hadm_id"])["hadm_id"]
    )
    return telling_findings if ours else lambda note, code: ()


def mark(text: str, cited: Iterable[str] = (), missed: Iterable[str] = ()) -> str:
    """The text escaped, with cited phrases in <mark>, and missed ones in <ins> where no cited one touches them."""
    kind = [""] * len(text)
    for name, phrases in (("mark", cited), ("ins", missed)):
        for phrase in phrases:
            for match in re.finditer(_words(phrase), text, re.IGNORECASE) if phrase.strip() else ():
                if name == "mark" or not any(kind[match.start() : match.end()]):
                    kind[match.start() : match.end()] = [name] * (match.end() - match.start())
    out, start = [], 0
    for end in range(1, len(text) + 1):
        if end == len(text) or kind[end] != kind[start]:
            piece, tag = escape(text[start:end]), kind[start]
            css = _CITED if tag == "mark" else _MISSED
            piece = (
                f"<b>{piece}</b>" if tag == "mark" else piece
            )  # for viewers that drop styles and <mark>
            out.append(
                f'<{tag} style="{css}text-decoration:none">{piece}</{tag}>' if tag else piece
            )
            start = end
    return "".join(out).replace("\n", "<br>")  # GitHub drops white-space: pre-wrap


@lru_cache(maxsize=4096)
def _path(code: str | None, gold: str) -> str:
    """Chapter, block, category and code, one line each, ticked where they are those of the gold code."""
    if code is None:
        return "<div><b>✗ no usable answer</b></div>"
    mine, truth, lines = icd.ancestors(code), icd.ancestors(gold), []
    for level, value in mine.items():
        if value is None or (level == "category" and value == mine["full"] == gold):
            continue  # a category that is a code itself stands once
        name = {"chapter": lambda v: f"{v} {icd.chapter_title(v)}", "block": str}.get(
            level,
            lambda v: f"{icd.dotted(v)} {icd.title(v) or '(not in the ICD-10-CM of April 2026)'}",
        )(value)
        right = value == truth[level]
        hang = 1.3 + 0.7 * len(lines)  # a title too long for its line goes on below itself
        lines.append(
            f'<div style="padding-left:{hang:.1f}em;text-indent:-{hang:.1f}em">'
            f'<span style="color:{"#1A5E20" if right else "#9C2A00"}">{"✓" if right else "✗"}</span> '
            f"{'&nbsp;&nbsp;' * len(lines)}{'<b>' * (level == 'full')}{escape(name)}{'</b>' * (level == 'full')}</div>"
        )
    return "".join(lines)


def _answer(
    model: str, answer: Mapping[str, Any], case: tuple[str, str], rewards: Sequence[Reward]
) -> str:
    """One model's cell: reasoning with what it cites, the answer as a path, the value of each reward."""
    (note, gold), text = case, _text(answer)
    code, parsed = icd.normalise(answer["predicted"]), prompts.parse(text)
    why = f"{icd.dotted(parsed.code)} does not exist" if parsed.code else str(parsed.problem)
    distance = f"{icd.tree_distance(code, gold)} edges from the truth" if code else why
    values = [
        (r.__name__.removesuffix("_reward"), r(completions=[text], code=[gold], note=[note])[0])
        for r in rewards
        if text
    ]
    whole = '<span style="white-space:nowrap">'
    scores = (
        ", ".join(f"{whole}{escape(name)} <b>{value:+.2f}</b></span>" for name, value in values)
        or "(no text to reward)"
    )
    return (
        f'{_CELL}flex:1 1 230px;border-top:4px solid {plots.colour(model)}"><b>{escape(plots.label(model))}</b><br>'
        f'<i>reasoning</i><br><div style="white-space:pre-wrap;font-size:12px">'
        f"{mark(parsed.think, cited_phrases(parsed.think, note)) or '(none)'}</div><br>"
        f"<i>answer</i> ({escape(distance)})<br>{_path(code, gold)}<br><i>rewards</i><br>{scores}</td>"
    )


def _first(table: pd.DataFrame) -> pd.DataFrame:
    """The first sample of each case, by hadm_id."""
    return (
        (table[table["sample"] == 0] if "sample" in table else table)
        .drop_duplicates("hadm_id")
        .set_index("hadm_id")
    )


def case_html(
    case: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, Any] | pd.DataFrame],
    *,
    missed: Sequence[str] | None = None,
    rewards: Sequence[Reward] | None = None,
    focus: str | None = None,
    heading: str = "",
) -> str:
    """One case (a row of the table of cases) as static HTML; `answers` maps a model to its predictions table, or to its row.

    In the note is marked what `focus` (default: the last model) cites, and dashed what of `missed` (findings that mattered) it
    does not; by default the `telling_findings` of a case of the synthetic hospital. `rewards`
    default to those of the course and grounding. Raises ValueError without answers.
    """
    tables = {m: _first(a) if isinstance(a, pd.DataFrame) else a for m, a in answers.items()}
    answers = {
        m: a.loc[case["hadm_id"]].to_dict() if isinstance(a, pd.DataFrame) else a
        for m, a in tables.items()
        if not isinstance(a, pd.DataFrame) or case["hadm_id"] in a.index
    }
    if not answers:
        raise ValueError(
            "case_html: no model answered this case. Pass predictions that hold its hadm_id."
        )
    if rewards is None:
        from helpers import rewards as module

        rewards = (*module.DEFAULT, module.grounding_reward)
    focus = focus if focus in answers else list(answers)[-1]
    note, gold = str(case["note"]), str(icd.normalise(case["code"]))
    missed = _finder([case.get("hadm_id")])(note, gold) if missed is None else missed
    name, shown = (
        escape(plots.label(focus)),
        mark(note, cited_phrases(prompts.parse(_text(answers[focus])).think, note), missed),
    )
    legend = (
        f'<mark style="{_CITED}"><b>cited by {name}</b></mark> in its reasoning, word for word; a finding that the '
        "reasoning names without a mark does not stand in the note in these words"
    )
    if "<ins" in shown:
        legend += (
            f'; <ins style="{_MISSED}text-decoration:none">mattered, not cited</ins> speaks for the true code, and the '
            f"reasoning of {name} leaves it out"
        )
    cells = "".join(_answer(m, a, (note, gold), rewards) for m, a in answers.items())
    return (
        _PAGE
        + (
            f'<p style="margin:6px 0 2px;font-size:15px"><b>{escape(heading)}</b></p>'
            if heading
            else ""
        )
        + f'{_TABLE}{_CELL}flex:3 1 330px"><b>Admission note</b><br><span style="font-size:12px">{legend}.</span>'
        '<div style="white-space:pre-wrap;font-size:12px;line-height:1.75;max-height:340px;overflow:auto;margin-top:6px;'
        f'padding-top:4px;border-top:1px solid #ddd">{shown}</div></td>'
        f'{_CELL}flex:2 1 230px"><b>Truth</b><br>{_path(gold, gold)}</td></tr></table>'
        f"{_TABLE}{cells}</tr></table></div>"
    )


def explore(
    cases: pd.DataFrame,
    predictions: Mapping[str, pd.DataFrame],
    *,
    missed: Find | Mapping[int, Sequence[str]] | None = None,
    rewards: Sequence[Reward] | None = None,
) -> Any:
    """An ipywidgets box to page through cases by model, chapter and kind of error, each shown by `case_html`.

    `missed`: the phrases of a note that mattered, as hadm_id -> phrases or a function of note and gold code. By default
    `telling_findings` where all cases are of the synthetic hospital, else none. Raises ValueError where cases and predictions
    do not meet.
    """
    import ipywidgets as widgets

    if not predictions:
        raise ValueError(
            "explore: no predictions. Pass {model: predictions table}, e.g. those of base, sft and grpo."
        )
    kinds = {
        m: plots.outcomes(cases, table).set_index("hadm_id")["kind"]
        for m, table in predictions.items()
    }
    rows = cases.drop_duplicates("hadm_id").set_index("hadm_id", drop=False)
    firsts = {m: _first(t) for m, t in predictions.items()}
    names, answered = (
        [(plots.label(m), m) for m in predictions],
        set().union(*(k.index for k in kinds.values())),
    )
    present = sorted({int(c) for c in rows.loc[rows.index.isin(answered), "chapter"]})
    model = widgets.Dropdown(options=names, value=names[-1][1], description="Model")
    chapters = [("all chapters", 0), *((f"{c} {icd.chapter_short(c)}", c) for c in present)]
    chapter = widgets.Dropdown(options=chapters, description="Chapter")
    sorts = [
        ("any answer", "any"),
        ("any error", "error"),
        *((name, key) for key, (name, _) in plots.KINDS.items()),
    ]
    kind = widgets.Dropdown(options=sorts, description="Answer")
    page = widgets.BoundedIntText(
        value=1, min=1, max=1, description="Case", layout={"width": "160px"}
    )
    back, forth = (
        widgets.Button(description=text, layout={"width": "90px"})
        for text in ("◀ previous", "next ▶")
    )
    count, view = widgets.Label(), widgets.HTML()
    row = {"flex_flow": "row wrap"}  # a narrow window breaks the rows instead of cutting them
    pager = widgets.HBox([back, page, count, forth], layout=row)
    find = _finder(cases["hadm_id"]) if missed is None else missed
    chosen: list[int] = []

    def show(*_: Any) -> None:
        pager.layout.display = "flex" if chosen else "none"
        if not chosen:
            wanted = escape(" · ".join((model.label, chapter.label, kind.label)))
            view.value = f"{_PAGE}<p>No case fits <b>{wanted}</b>. Widen the choice.</p></div>"
            return
        back.disabled, forth.disabled = page.value == 1, page.value == len(chosen)
        hadm_id = chosen[page.value - 1]
        case = rows.loc[hadm_id].to_dict()
        mattered = (
            find(str(case["note"]), str(case["code"])) if callable(find) else find.get(hadm_id, ())
        )
        answers = {m: t.loc[hadm_id].to_dict() for m, t in firsts.items() if hadm_id in t.index}
        heading = f"Admission {hadm_id}: {plots.label(model.value)}, {plots.KINDS[kinds[model.value][hadm_id]][0]}"
        view.value = case_html(
            case, answers, missed=mattered, rewards=rewards, focus=model.value, heading=heading
        )

    def choose(*_: Any) -> None:
        of = kinds[model.value]
        of = of[
            (of != "full") if kind.value == "error" else (of == kind.value) | (kind.value == "any")
        ]
        chosen[:] = of.index[
            (rows.loc[of.index, "chapter"] == chapter.value) | (chapter.value == 0)
        ].tolist()
        page.max = max(1, len(chosen))
        count.value = f"of {len(chosen)}"
        if page.value == 1:
            show()
        else:
            page.value = 1  # its observer shows the case

    for box in (model, chapter, kind):
        box.observe(choose, "value")
    page.observe(show, "value")
    back.on_click(
        lambda _: setattr(page, "value", page.value - 1)
    )  # the box keeps itself between its bounds
    forth.on_click(lambda _: setattr(page, "value", page.value + 1))
    choose()
    return widgets.VBox([widgets.HBox([model, chapter, kind], layout=row), pager, view])
