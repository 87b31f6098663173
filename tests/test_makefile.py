"""`make` in folders with awkward names: nothing outside the checkout is touched, and every command gets its paths whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = '#!/bin/sh\n{ echo "$PYTHONPATH|$ICD_RUNS_DIR|$ICD_DATA_DIR|$ICD_OFFLINE_RECORD"; } >> "$STUB_RECORD"\nexit 0\n'
AWKWARD = ["my course", "it's mine", "two  blanks", "a$HOME b", "x(y) & z", "*"]


def checkout(top: Path, name: str) -> Path:
    """A checkout of the Makefile alone, with an interpreter that only records what it is given."""
    here = top / name
    (here / ".venv" / "bin").mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, here)
    stub = here / ".venv" / "bin" / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (here / ".venv" / "ready").touch()
    return here


def environment() -> dict[str, str]:
    """That of a reader: these tests themselves run under `make test`."""
    outer = ("MAKE", "MFLAGS", "ICD_", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if not key.startswith(outer)}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("target", ["test", "test-slow", "clean", "course", "book"])
def test_make_touches_nothing_outside_and_hands_paths_over_whole(
    tmp_path: Path, name: str, target: str
) -> None:
    here = checkout(tmp_path, name)
    for word in {*name.split(), "my", "two", "a", "x(y)"} - {name}:
        (tmp_path / word).mkdir(exist_ok=True)
        (tmp_path / word / "thesis.txt").write_text("years")
    kept = sorted(tmp_path.glob("*/thesis.txt"))
    record = tmp_path / "record.txt"
    done = subprocess.run(
        ["make", target],
        cwd=here,
        capture_output=True,
        text=True,
        env=environment() | {"STUB_RECORD": str(record)},
    )
    assert done.returncode == 0, done.stderr
    assert kept and sorted(tmp_path.glob("*/thesis.txt")) == kept
    if target.startswith("test"):
        build = here / "build" / "test"
        paths = [
            here / "tests" / "offline",
            build / "runs",
            build / "synthetic",
            build / "sockets.txt",
        ]
        guarded = set(record.read_text().splitlines()) - {"|||"}  # ruff needs no guard
        assert guarded == {"|".join(map(str, paths))}


@pytest.mark.parametrize("target", ["test", "test-slow"])
def test_a_variable_from_the_command_line_says_not_what_is_removed(
    tmp_path: Path, target: str
) -> None:
    """`make test TEST=tests/test_icd.py` is how other projects run one test."""
    here = checkout(tmp_path, "course")
    file = here / "tests" / "test_icd.py"
    file.parent.mkdir()
    file.write_text("work of a week")
    done = subprocess.run(
        ["make", target, f"TEST={file.relative_to(here)}"],
        cwd=here,
        capture_output=True,
        text=True,
        env=environment() | {"STUB_RECORD": str(tmp_path / "record.txt")},
    )
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "work of a week"


def test_a_configuration_may_lie_in_a_folder_with_a_blank_in_its_name(tmp_path: Path) -> None:
    here = checkout(tmp_path, "course")
    for file in ("my configs/ddp.yaml", "notebooks/03_lora_sft.ipynb"):
        (here / file).parent.mkdir()
        (here / file).touch()
    stub = here / ".venv" / "bin" / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command = ["make", "launch", "NB=03_lora_sft", "CONFIG=my configs/ddp.yaml"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=environment())
    assert "my configs/ddp.yaml" in done.stdout.splitlines(), done.stdout + done.stderr


def test_jupyterlab_sees_the_whole_checkout(tmp_path: Path) -> None:
    # Links of the notebooks lead to ../docs: they are dead where the server begins at notebooks/.
    here = checkout(tmp_path, "my course")
    stub = here / ".venv" / "bin" / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    done = subprocess.run(
        ["make", "lab"], cwd=here, capture_output=True, text=True, env=environment()
    )
    assert done.stdout.splitlines()[:2] == ["-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={here}" in done.stdout.splitlines()
