"""What a notebook defines: its functions can be tested without running it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def function(notebook: str, name: str, **scope: Any) -> Callable[..., Any]:
    """The function of this name that a cell of the notebook defines, in a scope of these names."""
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or f"def {name}(" not in cell.source:
            continue
        nodes = [node for node in ast.parse(cell.source).body if getattr(node, "name", "") == name]
        exec(compile(ast.Module(nodes, []), f"{path.name}, {cell.id}", "exec"), scope)
        return scope[name]
    raise KeyError(f"{path.name} defines no {name}")
