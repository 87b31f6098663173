"""A fork's address, put in by one command on a copy of the project."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tools import address

FORK = "someone/my.course"
OLD = "deepicd-course/deepicd-course"


@pytest.fixture
def copy(tmp_path: Path, root: Path) -> Path:
    """A copy of all files that hold the address, in a git repository of its own."""
    listed = subprocess.run(
        ["git", "grep", "-lI", OLD], cwd=root, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    for name in (*listed, "LICENSE"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / name).read_bytes())
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe" + OLD.encode())
    (tmp_path / "other.md").write_text(f"https://github.com/{OLD}-extra and my-{OLD}\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_badges_setup_cells_and_metadata_name_the_fork(copy: Path) -> None:
    changed = address.move(copy, FORK)
    assert "pyproject.toml" in changed and "helpers/machinery/places.py" in changed
    notebooks = sorted((copy / "notebooks").glob("*.ipynb"))
    assert len(notebooks) >= 8 and {f"notebooks/{p.name}" for p in notebooks} <= set(changed)
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        text = "".join("".join(cell["source"]) for cell in cells)
        badge = f"colab/github/{FORK}/blob/main/notebooks/{path.name}"
        assert badge.replace("colab/", "colab.research.google.com/") in text
        assert f"git+https://github.com/{FORK}\n" in text
        assert f"https://github.com/{FORK}/raw/main/configs/colab.txt" in text
        assert OLD not in text
    pictures = (copy / "notebooks" / "00_start_here.ipynb").read_text()
    assert f"https://raw.githubusercontent.com/{FORK}/main/docs/diagrams/icd_tree.png" in pictures
    assert f"https://github.com/{FORK}/blob/main/docs/glossary.md" in pictures
    assert (copy / "weights.bin").read_bytes().endswith(OLD.encode())
    assert (copy / "other.md").read_text().count(OLD) == 2, "another repository's name"
    assert "LICENSE" not in changed
    assert address.move(copy, FORK) == []
    back = address.move(copy, OLD)
    assert back == changed


@pytest.mark.parametrize(
    "name", ["", "owner", "owner/name/more", "https://github.com/a/b", "a b/c"]
)
def test_what_is_no_owner_and_name_is_refused(copy: Path, name: str) -> None:
    before = (copy / "pyproject.toml").read_text()
    with pytest.raises(ValueError, match="must be owner/name"):
        address.move(copy, name)
    assert (copy / "pyproject.toml").read_text() == before
