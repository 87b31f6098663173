"""What a notebook shows in full is what the package runs: the same syntax tree, so that the two cannot drift apart."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^# As in helpers/([\w/]+\.py)")
# What the course is about, and the notebook that shows it.
SUBJECTS = {
    "check_trace": "02_reasoning_traces",
    "hierarchical_reward": "04_qlora_grpo",
    "posterior": "05_inference",
    "macro_f1": "06_hierarchical_f1_analysis",
    "half_samples": "06_hierarchical_f1_analysis",
}


def body(function: ast.FunctionDef) -> str:
    """A function's tree without docstring, decorators and annotations."""
    statements = function.body
    if ast.get_docstring(function) is not None:
        statements = statements[1:]
    arguments = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    return f"{function.name}({arguments}) " + "".join(ast.dump(line) for line in statements)


def shown() -> list[tuple[str, str, ast.FunctionDef, str]]:
    rows = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            mark = MARK.match(cell.source) if cell.cell_type == "code" else None
            if mark:
                functions = ast.parse(cell.source).body
                rows += [
                    (path.stem, mark[1], node, cell.source)
                    for node in functions
                    if isinstance(node, ast.FunctionDef)
                ]
    return rows


SHOWN = shown()


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_subject_is_shown_in_full(name: str) -> None:
    assert (SUBJECTS[name], name) in {(notebook, node.name) for notebook, _, node, _ in SHOWN}


@pytest.mark.parametrize(
    ("notebook", "module", "node", "source"), SHOWN, ids=[f"{r[0][:2]}-{r[2].name}" for r in SHOWN]
)
def test_a_notebook_shows_what_the_package_runs(
    notebook: str, module: str, node: ast.FunctionDef, source: str
) -> None:
    tree = ast.parse((ROOT / "helpers" / module).read_text(encoding="utf-8"))
    own = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    assert node.name in own, f"helpers/{module} has no {node.name}"
    assert body(node) == body(own[node.name]), f"{notebook} shows another {node.name}"
