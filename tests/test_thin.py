"""The package stays thin and readable: weight in tokens of code, width, length of functions, one direction of imports."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "helpers").rglob("*.py"))
NOT_FOR_STUDENTS = ("machinery", "study")
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
DECISIONS = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.Assert,
    ast.comprehension,
    ast.match_case,
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def weight(path: Path) -> Counter[int]:
    """Tokens of code for each line; docstrings and comments weigh nothing."""
    source = path.read_text(encoding="utf-8")
    quiet: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            quiet |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = [token.start[0] for token in tokens if token.type not in LAYOUT]
    return Counter(line for line in lines if line not in quiet)


WEIGHTS = {path.relative_to(ROOT / "helpers"): weight(path) for path in MODULES}


def test_the_package_is_light() -> None:
    tokens = {path: lines.total() for path, lines in WEIGHTS.items()}
    for_students = {p: n for p, n in tokens.items() if p.parts[0] not in NOT_FOR_STUDENTS}
    assert sum(for_students.values()) <= 40_000, for_students
    assert sum(tokens.values()) <= 52_000, tokens


def test_lines_are_not_packed() -> None:
    lines = sum((list(weights.values()) for weights in WEIGHTS.values()), [])
    assert sum(lines) / len(lines) <= 9.5
    widths = []
    for path, weights in WEIGHTS.items():
        text = (ROOT / "helpers" / path).read_text(encoding="utf-8").splitlines()
        widths += [len(text[number - 1]) for number in weights]
    assert sorted(widths)[int(0.9 * len(widths))] <= 92 and max(widths) <= 100


def functions() -> list[tuple[str, ast.FunctionDef, Counter[int]]]:
    rows = []
    for path in MODULES:
        weights = WEIGHTS[path.relative_to(ROOT / "helpers")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                rows.append((f"{path.stem}.{node.name}", node, weights))
    return rows


def test_a_function_fits_on_a_screen() -> None:
    for name, node, weights in functions():
        lines = sum(node.lineno <= line <= node.end_lineno for line in weights)
        assert lines <= 60, f"{name}: {lines} lines"
        decisions = sum(isinstance(inner, DECISIONS) for inner in ast.walk(node))
        choices = [inner for inner in ast.walk(node) if isinstance(inner, ast.BoolOp)]
        decisions += sum(len(choice.values) - 1 for choice in choices)
        assert decisions <= 20, f"{name}: {decisions} decisions"


@pytest.mark.parametrize("folder", ["helpers", "tools", "benchmarks", "tests"])
def test_no_line_is_exempt_from_the_formatter(folder: str) -> None:
    exempt = re.compile(r"# fmt: (skip" + r"|off)")
    assert not [
        p for p in (ROOT / folder).rglob("*.py") if exempt.search(p.read_text(encoding="utf-8"))
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, inside functions too."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in targets if name in NAMES} - {module_name(path), "helpers"}


GRAPH = {module_name(path): imports(path) for path in MODULES}


def test_imports_go_one_way() -> None:
    waiting = dict(GRAPH)
    while waiting:
        free = [name for name, targets in waiting.items() if not targets & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_the_readme_lists_every_module_in_reading_order() -> None:
    """Reading order is import order: a module imports only what stands above it, and machinery."""
    readme = (ROOT / "helpers" / "README.md").read_text(encoding="utf-8")
    order = re.findall(r"^\| `(\w+)`", readme, re.M)
    top = {path.parts[0].removesuffix(".py") for path in WEIGHTS} - {"__init__", "machinery"}
    assert set(order) == top and len(order) == len(top)
    for position, name in enumerate(order):
        for module, targets in GRAPH.items():
            if module.split(".")[1:2] != [name]:
                continue
            used = {target.split(".")[1] for target in targets} - {"machinery", name}
            assert used <= set(order[:position]), f"{module} imports {used - set(order[:position])}"


def test_each_module_names_its_notebook() -> None:
    for path in MODULES:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name != "__init__.py" or path.parent.name in ("casebook", "profiles"):
            assert re.search(r"notebook|Not needed to follow the course", doc), path
