"""The project as a whole: one truth about versions and addresses, nothing of a machine, imports that stay light."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import __version__
from helpers.machinery import places

ROOT = Path(__file__).parent.parent
SETUP_CELL = (ROOT / "tests" / "setup_cell.txt").read_text(encoding="utf-8")
SETUP_CELL = SETUP_CELL.replace("{repository}", places.REPOSITORY)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def tracked() -> list[Path]:
    """Files that are, or would be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [p for p in (ROOT / line for line in listed.stdout.splitlines()) if p.is_file()]


def texts() -> list[tuple[Path, str]]:
    binary = (".png", ".safetensors", ".parquet", ".gz")
    return [(p, p.read_text(encoding="utf-8")) for p in tracked() if p.suffix not in binary]


# ------------------------------------------------------------------------------------------------ versions


def test_constraints_are_exact_and_torch_comes_first() -> None:
    pins = constraints()
    assert next(iter(pins)) == "torch"
    assert all(
        name == canonicalize_name(name) and Version(v).local is None for name, v in pins.items()
    )


def test_every_dependency_is_pinned_inside_its_range_with_a_reason() -> None:
    pins, lines = constraints(), (ROOT / "constraints.txt").read_text().splitlines()
    extras = PROJECT["optional-dependencies"]
    listed = [*extras["lab"], *extras["test"], *extras["small"], *extras["dev"], *extras["book"]]
    for text in [*PROJECT["dependencies"], *listed]:
        need = Requirement(text)
        name = canonicalize_name(need.name)
        assert need.specifier and need.specifier.contains(pins[name]), (
            f"{text}: constraints.txt has {pins[name]}"
        )
        assert lines[lines.index(f"{name}=={pins[name]}") - 1].startswith("# "), (
            f"{name}: say why it is there"
        )


@pytest.mark.parametrize("name", ["colab.txt", "colab-2026-08.txt"])
def test_colab_gets_the_tested_versions_inside_the_ranges(name: str) -> None:
    lines = (ROOT / "configs" / name).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    needs = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    for package, version in pins.items():
        if name == "colab.txt":
            assert constraints()[package] == version
        if package in needs:
            assert needs[package].specifier.contains(version), package
    assert "ipywidgets" not in pins or pins["ipywidgets"] == "7.7.1"


def test_conda_gives_the_same_environment() -> None:
    # Checked statically: conda itself is not run here.
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    *names, pip = conda["dependencies"]
    assert conda["name"] == PROJECT["name"]
    python = next(n for n in names if n.startswith("python=")).removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert {n.split("=")[0] for n in names} == {
        "python",
        "pip",
    }  # one resolver, one list of versions
    assert pip["pip"] == [
        "-c constraints.txt",
        f"torch=={constraints()['torch']}",
        "-e .[lab,test]",
    ]


def test_the_makefile_installs_what_the_project_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("-c constraints.txt") == makefile.count("pip install")
    assert "-e '.[lab,test]'" in makefile
    assert {"lab", "test", "gpu"} <= set(PROJECT["optional-dependencies"])
    for target in (
        "course",
        "test",
        "test-slow",
        "guard",
        "drift",
        "lab",
        "book",
        "small-base",
        "tiny-base",
        "clean",
        "help",
    ):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_wheel_holds_what_colab_needs(tmp_path: Path) -> None:
    import zipfile

    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]  # offline too
    subprocess.run([*pip, "-w", str(tmp_path), str(ROOT)], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert __version__ in wheel.name
    assert {f"helpers/_notebooks/{p.name}" for p in NOTEBOOKS} <= names
    assert "helpers/_results/study/predictions.csv" in names, (
        "notebook 7 has nothing to read on Colab"
    )
    ships = [p for p in tracked() if p.is_relative_to(ROOT / "results" / "synthetic-tiny")]
    assert {f"helpers/_{p.relative_to(ROOT)}" for p in ships} <= names, "nothing ships to Colab"
    package = {str(p.relative_to(ROOT)) for p in tracked() if p.is_relative_to(ROOT / "helpers")}
    assert package <= names, f"left out: {package - names}"
    assert "exercises/cells.yaml" in names and "exercises/nb00.py" in names
    own = ("helpers/", "exercises/", "deepicd_course-")
    assert not [n for n in names if not n.startswith(own)]


# ---------------------------------------------------------------------------------------- one address


def test_the_repository_has_one_address() -> None:
    address = PROJECT["urls"]["Repository"]
    assert address == places.REPOSITORY and f"git+{address}" in SETUP_CELL
    owner_repo = address.removeprefix("https://github.com/")
    for path, text in texts():
        for found in re.findall(
            r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob", text
        ):
            assert found == owner_repo, f"{path}: badge of {found}"
        for found in re.findall(r"git\+https://github\.com/[\w.-]+/[\w.-]+", text):
            assert found == f"git+{address}", f"{path}: {found}"


def badge(notebook: str) -> str:
    """Markdown of the Open-in-Colab badge of a notebook."""
    where = f"{places.REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{notebook}.ipynb"
    colab = "https://colab.research.google.com"
    return f"[![Open In Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{where})"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_has_its_badge_and_the_common_setup_cell(path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert badge(path.stem) in nb.cells[0].source, f"first cell: add {badge(path.stem)}"
    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    assert code[0] == SETUP_CELL, "the first code cell is not tests/setup_cell.txt"
    assert nb.metadata.kernelspec.name == "python3"
    assert "Research" in "".join(c.source for c in nb.cells) or "research" in "".join(
        c.source for c in nb.cells
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_that_a_cell_saves_is_shown(path: Path) -> None:
    cells = [
        c
        for c in nbformat.read(path, as_version=4).cells
        if c.cell_type == "code" and "save_figure(" in c.source
    ]
    hidden = [
        c.id
        for c in cells
        if not any("image/png" in output.get("data", {}) for output in c.outputs)
    ]
    assert not hidden, (
        f"{hidden}: was the figure closed after it was saved, or the notebook not run?"
    )


# ----------------------------------------------------------------------------------- what must not be there


def test_the_answers_quoted_in_notebook_0_are_those_of_notebook_5() -> None:
    cells = {p.stem[:2]: nbformat.read(p, as_version=4).cells for p in NOTEBOOKS}
    quote = next(cell.source for cell in cells["00"] if cell.id == "00-07a")
    quoted = re.findall(r"```text\n(.*?)```", quote, re.S)
    said = "".join(
        out.get("text", "")
        for cell in cells["05"]
        if cell.cell_type == "code"
        for out in cell.outputs
    )
    said = "\n".join(line.rstrip() for line in said.splitlines() if line.strip())
    assert len(quoted) == 2
    for block in quoted:
        assert "\n".join(line for line in block.splitlines() if line.strip()) in said


def test_nothing_of_a_machine_stands_in_the_repository() -> None:
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|workspace|mnt)/[\w.-]+/|[A-Z]:\\Users\\")
    found = [
        f"{p.relative_to(ROOT)}: {m.group()}" for p, text in texts() for m in home.finditer(text)
    ]
    found += [str(p.relative_to(ROOT)) for p, text in texts() if f"{ROOT}/" in text]
    assert not found


def test_no_foreign_code_no_pickles_no_data() -> None:
    own = Path(__file__).name
    assert not [
        p
        for p, text in texts()
        if re.search(r"trust_remote_code\s*=\s*True", text) and p.name != own
    ]
    ships = ROOT / "results" / "synthetic-tiny"  # test_shipped.py looks at it
    assert not [
        p
        for p in tracked()
        if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".parquet", ".gz")
        and not (p.suffix == ".parquet" and ships in p.parents)
    ]
    large = {
        str(p.relative_to(ROOT)): p.stat().st_size
        for p in tracked()
        if p.stat().st_size > 8 * 2**20
    }
    assert not large, f"over 8 MiB: {large}"


# -------------------------------------------------------------------------------------------------- imports


def test_importing_the_course_is_light() -> None:
    modules = sorted(p.stem for p in (ROOT / "helpers").glob("*.py") if p.stem != "__init__")
    code = (
        "import importlib, sys, time\nfrom helpers import course\n"
        "assert not {'pandas', 'numpy', 'matplotlib'} & set(sys.modules), 'course is heavy'\n"
        f"for name in {modules}:\n    importlib.import_module('helpers.' + name)\n"
        "    heavy = {'torch', 'transformers', 'simple_icd_10_cm', 'sklearn'} & set(sys.modules)\n"
        "    assert not heavy, f'helpers.{name} imports {heavy}: import inside the function'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_helpers_takes_less_than_a_second() -> None:
    code = "import time; t = time.process_time(); import helpers, helpers.course; print(time.process_time() - t)"
    spent = min(
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(2)
    )
    assert spent < 1
