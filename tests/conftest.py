"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import settings

# A slow or busy machine is no fault of what is tested.
settings.register_profile("course", deadline=None)
settings.load_profile("course")

# No test asks a hub, whichever is collected first. The library reads its variable once, when it is
# imported; the variable itself stays unset, for a kernel or a process must shut the hub by itself.
constants.HF_HUB_OFFLINE = True

ROOT = Path(__file__).parent.parent

# Tests begin with an empty run folder; only the notebooks stage of `make test` takes what ships.
os.environ.setdefault("ICD_SHIPPED_DIR", str(ROOT / "build" / "nothing-ships"))


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, runs and notebooks of a test in a folder of its own, with the tiny profile."""
    for name in ("FRESH", "ICD_BASE", "ICD_MAKING", "ICD_HEADLESS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ICD_PROFILE", "tiny")
    monkeypatch.setenv("ICD_DATA_DIR", str(tmp_path / "synthetic"))
    monkeypatch.setenv("ICD_RUNS_DIR", str(tmp_path / "runs"))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("ICD_NOTEBOOKS_DIR", str(tmp_path / "notebooks"))
    return tmp_path
