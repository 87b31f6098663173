"""The GPU benchmark: it runs whole where there is no GPU to measure, and says so where it was asked to measure."""

from __future__ import annotations

import subprocess
import sys
import time
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


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda p: p.name)
def test_a_shorter_step_has_the_same_peak(profile: profiles.Profile) -> None:
    short = gpu.shortened(profile)
    assert short.validate() and short.grpo_grad_accum <= profile.grpo_grad_accum
    for stage in fit.NOTEBOOK:
        assert fit.estimate(short, stage, gpu=True) == fit.estimate(profile, stage, gpu=True)


def test_nothing_of_a_cell_stays_behind() -> None:
    from bitsandbytes.optim import GlobalOptimManager
    from torch import nn

    GlobalOptimManager.get_instance().register_module_override(nn.Embedding(2, 2), "weight", {"optim_bits": 32})
    gpu.release()
    assert not GlobalOptimManager.get_instance().module_weight_config_triple


HANGING = """
import sys, time
from benchmarks import gpu

gpu.RESERVE, gpu.train = 0, lambda *_: time.sleep(600)
sys.exit(gpu.main(["--dry-run-cpu", "--minutes", "0.4", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_it_ends_in_time_whatever_hangs(tmp_path: Path, root: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and time.monotonic() - began < 26, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert set(table["cell"]) == set(gpu.CELLS) and (table["status"] == "not measured: time was up").all()
    assert "not measured" in done.stdout


@pytest.mark.slow
def test_a_dry_run_goes_through_every_cell(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run-cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert list(table.columns) == list(gpu.COLUMNS) and set(table["cell"]) == set(gpu.CELLS)
    told = table["status"].str.startswith("measured") | (table["status"] == "not measured: needs a GPU")
    assert told.all() and (table["cell"].str.contains("continuous") | (table["status"] != "not measured: needs a GPU")).all()
    trained = table[~table["cell"].str.startswith("generate")]
    assert (trained["seconds_per_step"] > 0).all() and (trained["estimate_gb"] > 0).all()
    phases = table.dropna(subset=["rewards_s"])
    assert len(phases) == 2  # GRPO twice: where its step goes adds up
    parts = phases[["generation_s", "rewards_s", "forward_backward_s"]]
    assert (parts > 0).all(axis=None) and (parts.sum(axis=1) / phases["seconds_per_step"]).between(0.95, 1.05).all()
    assert (table.loc[table["cell"].isin(["generate nf4", "generate 16-bit"]), "tokens_per_s"] > 0).all()
    assert table["reserved_gb"].isna().all()  # memory of a card is not made up on a CPU
    stamp = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in stamp] == ["# device", "# versions", "# date", "# command"]
