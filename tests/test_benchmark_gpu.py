"""The GPU benchmark: it runs whole where there is no GPU to measure, and says so where it was asked to measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import gpu
from helpers import fit, profiles


def test_without_cuda_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert "no CUDA device" in said.err and said.err.count("\n") == 1 and not said.out


def test_every_size_has_dimensions_and_batches() -> None:
    for size, name in gpu.SIZES.items():
        assert fit.config(f"Qwen/Qwen2.5-{size}-Instruct") and profiles.get(name).base != "tiny"
    for p in profiles.PROFILES.values():
        gpu.trl_defaults(p).validate()


@pytest.mark.slow
def test_a_dry_run_goes_through_every_cell(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run-cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert list(table.columns) == list(gpu.COLUMNS) and set(table["cell"]) == set(gpu.CELLS)
    assert table["status"].str.startswith("measured").all(), table[["cell", "status"]]
    trained = table[~table["cell"].str.startswith("generate")]
    assert (trained["seconds_per_step"] > 0).all() and (trained["estimate_gb"] > 0).all()
    phases = table.dropna(subset=["rewards_s"])
    assert len(phases) == 2  # GRPO twice: where its step goes adds up
    parts = phases[["generation_s", "rewards_s", "forward_backward_s"]]
    assert (parts > 0).all(axis=None) and (parts.sum(axis=1) / phases["seconds_per_step"]).between(0.95, 1.05).all()
    assert (table.loc[table["cell"].str.startswith("generate"), "tokens_per_s"] > 0).all()
    assert table["reserved_gb"].isna().all()  # memory of a card is not made up on a CPU
    stamp = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in stamp] == ["# device", "# versions", "# date", "# command"]
