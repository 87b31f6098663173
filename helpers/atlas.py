"""The error atlas: every case and every answer of a run on one page that needs no server.

    python -m helpers.atlas [RUN_FOLDER] [--with OTHER_RUN]

writes RUN_FOLDER/atlas.html. The page is one file without network: numbers as JSON that the page
turns into typed arrays, texts as JSON that it reads when a case is opened, and the sources of
atlas_page/. Whatever comes from a note, a model or a table is data in that JSON, in ASCII and
without `<`; the page puts it into text nodes alone, and its content policy lets no other script run
and nothing out.

A run whose data folder has no truth/manifest.json counts as credentialed: its page stays in the run
folder, says so on its face, is not shown inside a notebook and not linked by the report.

Taught in notebook 6.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from helpers import casebook, icd, plots, prompts, rewards
from helpers.machinery import places, store

SOURCES = Path(__file__).with_name("atlas_page")
SCRIPTS = ("data.js", "state.js", "views.js", "cases.js", "main.js")
SYNTHETIC = '<meta name="data" content="synthetic">'
UNUSABLE = -1  # in place of the leaf of an answer
NOT_ASKED = -2
MOST_MISSED = 3  # findings of a case that its page names
CHUNK = 200  # cases whose texts the page reads at a time
SCORED = {
    reward.__name__.removesuffix("_reward"): reward
    for reward in (*rewards.DEFAULT, rewards.grounding_reward, rewards.total)
}
_NAMED = re.compile(r":\s*([A-Z]\d[0-9A-Z])\b")  # the category in a reasoning of the course's form


@dataclass
class Column:
    """The answers of one model of one run.

    rows: hadm_id -> first sample. numbers: name -> a value for each case of the page, None where
    there is none: `predicted`, the leaf of the tree, UNUSABLE or NOT_ASKED; `distance`, edges of
    the tree from the truth; `named`, whether the reasoning names the category of the answer (1),
    another one (2) or none (0); and what each reward gives.
    """

    key: str
    label: str
    colour: str
    rows: dict[int, dict[str, Any]]
    numbers: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


def write(
    run: str | Path,
    other: str | Path | None = None,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the page of a run folder, with the answers of another run beside its own; returns its
    path.

    data: the data folder of the run (default: that of ICD_DATA_DIR). out: default
    RUN_FOLDER/atlas.html. Raises FileNotFoundError for what is no run folder, ValueError for
    answers that do not fit the cases, and for a page of credentialed data outside the run folder.
    """
    run = Path(run)
    data = Path(data or places.data_dir())
    out = Path(out or run / "atlas.html")
    cases = _cases(run)
    is_synthetic = _is_synthetic(data, cases)
    if not is_synthetic and not out.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"{out}: the cases of {run} are not those of a synthetic hospital in {data}, so the "
            "page holds credentialed notes and may be written inside the run folder alone. Leave "
            "--out away, or name the synthetic data folder of this run with --data."
        )
    columns = _columns(run, cases)
    if other:
        columns += _columns(Path(other), _shared(run, cases, Path(other)), f":{Path(other).name}")
    if not columns:
        raise FileNotFoundError(
            f"{run / 'answers'}: no finished answers of any model. Run 05_inference first."
        )
    ideal = _ideal(data, columns) if is_synthetic else None
    numbers, texts = _content(cases, columns, ideal)
    numbers |= {"run": run.name, "scores": places.read(run / "metrics.json").get("models", {})}
    return places.write(out, _page(numbers, texts, is_synthetic))


def show(page: Path, height: int = 900) -> Any:
    """A page as the value of a notebook cell: the page itself in a frame, which needs no server.

    Where no person watches (ICD_HEADLESS) it is a line that names the file, so that the notebook
    stays small; for credentialed data too, so that no note gets into a notebook.
    """
    from IPython.display import HTML

    text = page.read_text(encoding="utf-8")
    name = html.escape(places.show(page))
    if SYNTHETIC not in text[:1000]:
        return HTML(
            f"<p>{name} holds credentialed notes: open it in a browser of this machine.</p>"
        )
    if os.environ.get("ICD_HEADLESS"):
        size = len(text) / 1e6
        return HTML(f"<p>The atlas is {name} ({size:.1f} MB): open it in any browser.</p>")
    frame = f'<iframe title="Error atlas" width="100%" height="{height}" style="border:0" srcdoc="'
    return HTML(f'<div>{frame}{html.escape(text)}"></iframe></div>')


def telling_findings(note: str, code: str) -> list[str]:
    """The phrases of a synthetic note that speak most for a code, strongest first; none for a code
    outside the casebook.

    Ranked by P(finding | code) / P(finding) of the casebook (`casebook.evidence`): on real notes
    that means nothing.
    """
    dotted = str(icd.dotted(code))
    if dotted not in casebook.casebook().codes:
        return []
    spans = casebook.read(note)[1]
    return [spans[name] for name in casebook.evidence(dotted, spans, MOST_MISSED)[0]]


# ------------------------------------------------------------------------------- what is read


def _cases(run: Path) -> pd.DataFrame:
    file = run / "cases" / "cases.parquet"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: {run} is no run folder. Name one such as "
            "runs/synthetic-tiny, or run 01_data_preparation first."
        )
    return pd.read_parquet(file)


def _is_synthetic(data: Path, cases: pd.DataFrame) -> bool:
    """Whether the hospital of a data folder wrote all these admissions of these patients."""
    truth = data / "truth"
    if not (truth / "manifest.json").is_file():
        return False
    ids = ["subject_id", "hadm_id"]
    written = pd.read_parquet(truth / "findings.parquet", columns=ids)
    return len(cases.merge(written.drop_duplicates())) == len(cases)


def _shared(run: Path, cases: pd.DataFrame, other: Path) -> pd.DataFrame:
    """The cases of another run. Raises ValueError where they are not the same cases."""
    others = _cases(other)
    both = cases.merge(others, on="hadm_id", suffixes=("", "_other"))
    differ = (both["note"] != both["note_other"]) | (both["code"] != both["code_other"])
    if both.empty or differ.any():
        raise ValueError(
            f"{run} and {other} do not hold the same cases ({len(both)} admissions in common, "
            f"{differ.sum()} with another note or code). Two runs share a page if they were made "
            "from the same data folder."
        )
    return cases


def _columns(run: Path, cases: pd.DataFrame, suffix: str = "") -> list[Column]:
    """The finished answers of a run in the order of the course's tables, then of experiments."""
    columns = []
    for folder in [*run.glob("answers/[!.]*/"), *run.glob("experiments/[!.]*/answers/[!.]*/")]:
        experiment = "" if folder.parent.parent == run else folder.parts[-3]
        rows = _first_samples(folder, cases)
        if not rows:
            places.say(f"{places.show(folder)}: not whole, or no case answered: left out")
            continue
        key = folder.name + f"@{experiment}" * bool(experiment) + suffix
        label = " · ".join(filter(None, [plots.label(folder.name), experiment, suffix[1:]]))
        columns.append(Column(key, label, plots.colour(folder.name), rows))
    order = [plots.label(model) for model in plots.MODELS]
    columns.sort(key=lambda column: column.key)
    return sorted(columns, key=lambda column: [*order, column.label].index(column.label))


def _first_samples(folder: Path, cases: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """hadm_id -> first sample, {} where the artefact is not whole.

    Raises ValueError where a column is missing or an answer fits no case.
    """
    if not store.is_whole(folder):
        return {}
    table = pd.read_parquet(folder / "answers.parquet")
    missing = {"hadm_id", "predicted"} - set(table)
    if missing:
        raise ValueError(f"{folder}: the columns {sorted(missing)} are missing. Run 05_inference.")
    if "sample" in table:
        table = table[table["sample"] == 0]
    strangers = (~table["hadm_id"].isin(cases["hadm_id"])).sum()
    if strangers:
        raise ValueError(
            f"{folder}: {strangers} of {len(table)} answers are for admissions that are not in "
            "the table of cases. They belong to other data: run 05_inference again."
        )
    return {row["hadm_id"]: row for row in reversed(table.to_dict("records"))}


def _ideal(data: Path, columns: list[Column]) -> pd.DataFrame | None:
    """What the ideal reader says; a column of its own where the run has none."""
    try:
        ideal = casebook.ideal_reader(data)
    except ValueError as error:  # an older hospital
        places.say(f"no ideal reader on the page: {error}")
        return None
    if "ideal" not in [column.key for column in columns]:
        rows = {i: {"predicted": code} for i, code in ideal["full"].items()}
        columns.append(Column("ideal", plots.label("ideal"), plots.colour("ideal"), rows))
    return ideal


# ------------------------------------------------------------------------------- what is written


def _content(
    cases: pd.DataFrame, columns: list[Column], ideal: pd.DataFrame | None
) -> tuple[dict[str, Any], list[list[Any]]]:
    """(numbers of all cases, texts in chunks): what the page is filled with.

    Cases are those that a model answered; the ideal reader alone asks for none.
    """
    asked = set().union(*(column.rows for column in columns if column.key != "ideal"))
    table = cases[cases["hadm_id"].isin(asked)].drop_duplicates("hadm_id")
    table = table.assign(gold=table["code"].map(icd.normalise))
    codes = {icd.normalise(row["predicted"]) for column in columns for row in column.rows.values()}
    nodes, leaves = _tree({*table["gold"], *codes} - {None})
    train = cases.loc[cases["split"] == "train", "code"].map(icd.normalise).value_counts()
    texts = []
    for case in table.to_dict("records"):
        answers = [_answer(column, case, leaves) for column in columns]
        missed = [] if ideal is None else telling_findings(case["note"], case["gold"])
        texts.append([case["note"], missed, answers])
    table = table.assign(
        gold=table["gold"].map(leaves),
        words=table["note"].str.split().str.len(),
        trained=table["gold"].map(train).fillna(0).astype(int),
        sure=None if ideal is None else table["hadm_id"].map(ideal["full_p"].round(6)),
    )
    shown = ["hadm_id", "subject_id", "gold", "words", "trained", "sure"]
    numbers = {
        "nodes": nodes,
        "cases": table[shown].to_dict("list"),
        "columns": [
            {"key": column.key, "label": column.label, "colour": column.colour, **column.numbers}
            for column in columns
        ],
        "kinds": [[name.label, name.colour] for name in plots.KINDS.values()],
    }
    return numbers, [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]


def _answer(column: Column, case: dict[str, Any], leaves: dict[str, int]) -> list[Any] | None:
    """Append the numbers of one answer to its column; gives its texts: [reasoning, why it is
    unusable or malformed, the completion where the reasoning and the code are not all of it]."""
    row = column.rows.get(case["hadm_id"], {})
    code = icd.normalise(row.get("predicted"))
    text = row.get("completion")
    text = text if isinstance(text, str) else ""  # a baseline that writes nothing has none
    parsed = prompts.parse(text)
    named = _NAMED.search(parsed.think)
    numbers = {
        "predicted": leaves.get(code, UNUSABLE) if row else NOT_ASKED,
        "distance": icd.tree_distance(code, case["gold"]) if code else None,
        "named": 0,
    }
    if named:
        numbers["named"] = 1 if named.group(1) == icd.category(code) else 2
    columns = {"completions": [text], "code": [case["gold"]], "note": [case["note"]]}
    for name, reward in SCORED.items():
        numbers[name] = round(reward(**columns)[0], 3) if text else None
    for name, value in numbers.items():
        column.numbers[name].append(value)
    if not row:
        return None
    problem = parsed.problem if text else None
    if parsed.code and not code:
        problem = f"{icd.dotted(parsed.code)} does not exist"
    return [parsed.think, problem, text if problem else None]


def _tree(codes: Iterable[str]) -> tuple[list[list[Any]], dict[str, int]]:
    """(nodes [depth, parent, key, name, title] in the classification's order, code -> leaf)."""
    from simple_icd_10_cm import get_description

    nodes: list[list[Any]] = []
    known: dict[tuple, int] = {}  # (parent, key) -> place in `nodes`
    leaves = {}
    for code in sorted(codes, key=lambda code: (icd.chapter(code), code)):
        leaf = -1
        for depth, key in enumerate(icd.ancestors(code).values()):
            if (leaf, key) not in known:
                name = icd.dotted(key) or key or "–"
                title = icd.title(key)
                if depth == 0:
                    name = f"{key} {icd.chapter_short(key)}"
                    title = icd.chapter_title(key)
                elif depth == 1 and key:
                    title = get_description(key).removesuffix(f" ({key})")
                known[leaf, key] = len(nodes)
                nodes.append([depth, leaf, str(key), name, title])
            leaf = known[leaf, key]
        leaves[code] = leaf
    return nodes, leaves


def _page(numbers: dict[str, Any], texts: list[list[Any]], is_synthetic: bool) -> str:
    source = {file.name: file.read_text(encoding="utf-8") for file in SOURCES.iterdir()}
    script = "\n" + "\n".join(source[name] for name in SCRIPTS)
    template = Environment(autoescape=True).from_string(source["atlas.html.j2"])
    return template.render(
        synthetic=SYNTHETIC if is_synthetic else "",
        run=numbers["run"],
        style=source["atlas.css"],
        script=script,
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        numbers=_json(numbers),
        texts=[_json(chunk) for chunk in texts],
    )


def _json(value: Any) -> str:
    """JSON that no tag can end: ASCII alone, without `<`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.atlas")
    parser.add_argument(
        "run", nargs="?", default=places.run_dir(), help="a run folder (default: the course's)"
    )
    parser.add_argument("--with", dest="other", metavar="OTHER_RUN", help="a second run beside it")
    parser.add_argument("--data", help="the data folder of the run (default: ICD_DATA_DIR)")
    parser.add_argument("--out", help="the file to write (default: atlas.html in the run folder)")
    try:
        page = write(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{places.show(page)}: {page.stat().st_size / 1e6:.1f} MB. {places.NOTICE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
