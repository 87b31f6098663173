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
CHUNK = 200  # cases whose texts the page reads at a time
SCORED = (*rewards.DEFAULT, rewards.grounding_reward)
_NAMED = re.compile(r":\s*([A-Z]\d[0-9A-Z])\b")  # the category in a reasoning of the course's form


@dataclass
class Column:
    """The answers of one model of one run, a value for each case of the page.

    rows: hadm_id -> first sample. predicted: leaf of the tree, UNUSABLE or NOT_ASKED. distance:
    edges of the tree from the truth. named: whether the reasoning names the category of the answer
    (1), another one (2) or none (0). rewards: name -> values. None is what does not exist.
    """

    key: str
    label: str
    colour: str
    rows: dict[int, dict[str, Any]] = field(repr=False)
    predicted: list[int] = field(default_factory=list)
    distance: list[int | None] = field(default_factory=list)
    named: list[int | None] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)


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
    asked = set().union(*(column.rows for column in columns))
    test = cases[cases["hadm_id"].isin(asked)].drop_duplicates("hadm_id")
    ideal = _ideal(data) if is_synthetic else None
    numbers, texts = _content(cases, test.to_dict("records"), columns, ideal)
    numbers |= {"run": run.name, "synthetic": is_synthetic}
    numbers["scores"] = places.read(run / "metrics.json").get("models", {})
    return places.write(out, _page(numbers, texts))


def show(page: Path, height: int = 900) -> Any:
    """A page as the value of a notebook cell: the page itself inside a frame, which JupyterLab,
    Colab and VS Code show without a server.

    Where no person watches (ICD_HEADLESS) it is a line that names the file, so that the notebook
    stays small; for credentialed data too, so that no note gets into a notebook.
    """
    from IPython.display import HTML

    text = page.read_text(encoding="utf-8")
    name = html.escape(places.show(page))
    if SYNTHETIC not in text[:1000]:
        return HTML(f"<p>{name} holds credentialed notes: open it in a browser of this machine.</p>")
    if os.environ.get("ICD_HEADLESS"):
        size = len(text) / 1e6
        return HTML(f"<p>The atlas is {name} ({size:.1f} MB): open it in any browser.</p>")
    frame = f'<iframe title="Error atlas" width="100%" height="{height}" style="border:0" srcdoc="'
    return HTML(f'<div>{frame}{html.escape(text)}"></iframe></div>')


def telling_findings(note: str, code: str, most: int = 3) -> list[str]:
    """The phrases of a synthetic note that speak most for a code, strongest first; none for a code
    outside the casebook.

    Ranked by P(finding | code) / P(finding) of the casebook (`casebook.evidence`): on real notes
    that means nothing.
    """
    dotted = str(icd.dotted(code))
    if dotted not in casebook.casebook().codes:
        return []
    spans = casebook.read(note)[1]
    return [spans[name] for name in casebook.evidence(dotted, spans, most)[0]]


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
    return len(cases[ids].merge(written.drop_duplicates(), on=ids)) == len(cases)


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
    """The finished answers of a run and of its experiments, in the order of the course's tables."""
    columns = []
    folders = [*run.glob("answers/[!.]*/"), *run.glob("experiments/*/answers/[!.]*/")]
    known = list(plots.MODELS)
    for folder in folders:
        model = folder.name
        experiment = folder.parts[-3] if folder.parent.parent != run else ""
        key = f"{model}@{experiment}{suffix}" if experiment else model + suffix
        if not store.is_whole(folder):
            places.say(f"{places.show(folder)}: not whole, left out")
            continue
        rows = _first_samples(folder / "answers.parquet", cases)
        if not rows:
            places.say(f"{places.show(folder)}: answers none of the cases, left out")
            continue
        label = " · ".join(filter(None, [plots.label(model), experiment, suffix[1:]]))
        columns.append(Column(key, label, plots.colour(model), rows))
    rank = {model: place for place, model in enumerate(known)}
    return sorted(columns, key=lambda column: ("@" in column.key, rank.get(column.key, 99)))


def _first_samples(file: Path, cases: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """hadm_id -> first sample. Raises ValueError where a column is missing or few fit the cases."""
    table = pd.read_parquet(file)
    missing = {"hadm_id", "predicted"} - set(table)
    if missing:
        raise ValueError(f"{file}: the columns {sorted(missing)} are missing. Run 05_inference.")
    if "sample" in table:
        table = table[table["sample"] == 0]
    fits = table["hadm_id"].isin(cases["hadm_id"])
    if not fits.all():
        raise ValueError(
            f"{file}: {(~fits).sum()} of {len(fits)} answers are for admissions that are not in "
            "the table of cases. They belong to other data: run 05_inference again."
        )
    table = table.drop_duplicates("hadm_id")
    return dict(zip(table["hadm_id"], table.to_dict("records"), strict=True))


def _ideal(data: Path) -> pd.DataFrame | None:
    try:
        return casebook.ideal_reader(data)
    except ValueError as error:  # an older hospital
        places.say(f"no ideal reader on the page: {error}")
        return None


# ------------------------------------------------------------------------------- what is written


def _content(
    cases: pd.DataFrame,
    test: list[dict[str, Any]],
    columns: list[Column],
    ideal: pd.DataFrame | None,
) -> tuple[dict[str, Any], list[list[Any]]]:
    """(numbers of all cases, texts in chunks): what the page is filled with."""
    gold = [str(icd.normalise(case["code"])) for case in test]
    ids = [int(case["hadm_id"]) for case in test]
    if ideal is not None and "ideal" not in [column.key for column in columns]:
        answers = {i: {"predicted": code} for i, code in ideal["full"].items()}
        columns.append(Column("ideal", plots.label("ideal"), plots.colour("ideal"), answers))
    codes = {icd.normalise(row["predicted"]) for column in columns for row in column.rows.values()}
    nodes, leaves = _tree({*gold, *codes} - {None})
    trained = cases.loc[cases["split"] == "train", "code"].map(icd.normalise).value_counts()
    texts = []
    for start in range(0, len(test), CHUNK):
        chunk = []
        for case, code in zip(test[start : start + CHUNK], gold[start : start + CHUNK], strict=True):
            answers = [_answer(column, case, code, leaves) for column in columns]
            missed = [] if ideal is None else telling_findings(case["note"], code)
            chunk.append([case["note"], missed, answers])
        texts.append(chunk)
    numbers = {
        "nodes": nodes,
        "cases": {
            "id": ids,
            "patient": [int(case["subject_id"]) for case in test],
            "gold": [leaves[code] for code in gold],
            "words": [len(case["note"].split()) for case in test],
            "trained": [int(trained.get(code, 0)) for code in gold],
            "sure": None if ideal is None else ideal["full_p"].reindex(ids).round(3).tolist(),
        },
        "columns": [
            {name: value for name, value in vars(column).items() if name != "rows"}
            for column in columns
        ],
        "kinds": [[name.label, name.colour] for name in plots.KINDS.values()],
    }
    return numbers, texts


def _answer(column: Column, case: dict[str, Any], gold: str, leaves: dict[str, int]) -> Any:
    """Append the numbers of one answer to its column; gives its texts: [reasoning, why it is
    unusable or malformed, the completion where the reasoning and the code are not all of it]."""
    row = column.rows.get(case["hadm_id"])
    code = icd.normalise(row["predicted"]) if row else None
    text = row.get("completion") if row else None
    text = text if isinstance(text, str) else ""  # a baseline that writes nothing has none
    column.predicted.append(leaves.get(code, UNUSABLE) if row else NOT_ASKED)
    column.distance.append(icd.tree_distance(code, gold) if code else None)
    columns = {"completions": [text], "code": [gold], "note": [case["note"]]}
    values = {reward.__name__: reward(**columns)[0] for reward in SCORED} if text else {}
    if text:
        values["total"] = rewards.total(**columns)[0]
    for name in [*(reward.__name__ for reward in SCORED), "total"]:
        value = round(values[name], 3) if text else None
        column.rewards.setdefault(name.removesuffix("_reward"), []).append(value)
    parsed = prompts.parse(text)
    named = _NAMED.search(parsed.think)
    is_other = named and code and named.group(1) != icd.category(code)
    column.named.append(None if not text else int(bool(named)) + int(bool(is_other)))
    if not row:
        return None
    problem = parsed.problem if text else None
    if code is None and parsed.code:
        problem = f"{icd.dotted(parsed.code)} does not exist"
    return [parsed.think, problem, text if problem else None]


def _tree(codes: Iterable[str]) -> tuple[list[list[Any]], dict[str, int]]:
    """(nodes [depth, parent, key, name, title] in the order of the classification, code -> leaf)."""
    import simple_icd_10_cm as cm

    nodes: list[list[Any]] = []
    places_of: dict[tuple, int] = {}
    leaves = {}
    for code in sorted(codes, key=lambda code: (icd.chapter(code), code)):
        parent = -1
        path: tuple = ()
        for depth, (level, value) in enumerate(icd.ancestors(code).items()):
            path += (value,)
            if path not in places_of:
                name = icd.dotted(value) or value or "–"
                title = icd.title(value) if level != "block" else None
                if level == "chapter":
                    name = f"{value} {icd.chapter_short(value)}"
                    title = icd.chapter_title(value)
                elif level == "block" and value:
                    title = cm.get_description(value).removesuffix(f" ({value})")
                places_of[path] = len(nodes)
                nodes.append([depth, parent, str(value), name, title])
            parent = places_of[path]
        leaves[code] = parent
    return nodes, leaves


def _page(numbers: dict[str, Any], texts: list[list[Any]]) -> str:
    source = {file.name: file.read_text(encoding="utf-8") for file in SOURCES.iterdir()}
    script = "\n" + "\n".join(source[name] for name in SCRIPTS)
    template = Environment(autoescape=True).from_string(source["atlas.html.j2"])
    return template.render(
        synthetic=SYNTHETIC if numbers["synthetic"] else "",
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
    parser.add_argument("run", nargs="?", help="a run folder (default: that of the course)")
    parser.add_argument("--with", dest="other", metavar="OTHER_RUN", help="a second run beside it")
    parser.add_argument("--data", help="the data folder of the run (default: ICD_DATA_DIR)")
    parser.add_argument("--out", help="the file to write (default: atlas.html in the run folder)")
    chosen = parser.parse_args(arguments)
    try:
        page = write(
            chosen.run or places.run_dir(), chosen.other, data=chosen.data, out=chosen.out
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{places.show(page)}: {page.stat().st_size / 1e6:.1f} MB. {places.NOTICE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
