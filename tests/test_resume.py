"""Nothing lost: trainings and inference killed outright go on where they were, and end as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_course as small

pytestmark = pytest.mark.slow

# Columns of a training log that tell what was computed; the others tell time, or count from the last start.
TIMELESS = [
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "reward",
    "reward_std",
    "completions/mean_length",
    "eval_reward",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, cases, traces and the three notebooks, cut down."""
    root = tmp_path_factory.mktemp("resume") / "prepared"
    small.prepare(root)
    for name in small.CUTS:
        small.copy_notebook(root, name)
    return root


def moved(root: Path, name: str) -> Path:
    """A copy of a course: keys are made from contents, so it is up to date wherever it lies."""
    return Path(shutil.copytree(root, root.parent / name))


@pytest.fixture(scope="module")
def sft(prepared: Path) -> Path:
    """03 run to its end without a stop."""
    root = moved(prepared, "sft")
    assert "training begins at step 0" in small.run_notebook(root, "03_lora_sft")
    return root


@pytest.fixture(scope="module")
def grpo(sft: Path) -> Path:
    """04 run to its end without a stop."""
    root = moved(sft, "grpo")
    assert "training begins at step 0" in small.run_notebook(root, "04_qlora_grpo")
    return root


def assert_same_training(one: Path, other: Path) -> None:
    a, b = small.weights(one), small.weights(other)
    assert a.keys() == b.keys()
    differ = [name for name in a if not np.array_equal(a[name], b[name])]
    assert not differ, f"{len(differ)} of {len(a)} weights differ, such as {differ[0]}"
    logs = [pd.read_csv(folder / "training_log.csv") for folder in (one, other)]
    shared = [column for column in TIMELESS if column in logs[0]]
    pd.testing.assert_frame_equal(*(log[shared] for log in logs))


def half_written(work: Path, whole: str, half: str) -> None:
    """A checkpoint as a kill leaves it that comes while it is written: weights are there, the state is not."""
    shutil.copytree(work / whole, work / half)
    (work / half / "trainer_state.json").unlink()


def test_sft_killed_in_its_second_epoch_ends_with_the_same_weights(
    prepared: Path, sft: Path
) -> None:
    root = moved(prepared, "sft-killed")
    small.kill_notebook(root, "03_lora_sft", 12)
    run = small.run_folder(root)
    assert not (run / "sft").exists()
    assert [p.name for p in small.work(root, "sft").glob("checkpoint-*")] == [
        "checkpoint-10"
    ]  # of 6 steps an epoch
    half_written(small.work(root, "sft"), "checkpoint-10", "checkpoint-12")
    said = small.run_notebook(root, "03_lora_sft")
    assert (
        "sft: making it because it is not there yet; going on from where it was interrupted" in said
    )
    assert "training begins at step 10" in said
    assert_same_training(small.run_folder(sft) / "sft", run / "sft")
    assert small.record(root, "sft")["key"] == small.record(sft, "sft")["key"]


def test_grpo_killed_between_roll_outs_ends_with_the_same_weights(sft: Path, grpo: Path) -> None:
    root = moved(sft, "grpo-killed")
    run = small.run_folder(root)
    for kill, begins in ((3, 0), (5, 2)):  # twice: what went on can be killed as well
        small.kill_notebook(root, "04_qlora_grpo", kill)
        assert [p.name for p in small.work(root, "grpo").glob("checkpoint-*")] == [
            f"checkpoint-{begins + 2}"
        ]
    assert not (run / "grpo").exists()
    said = small.run_notebook(root, "04_qlora_grpo")
    assert "going on from where it was interrupted" in said and "training begins at step 4" in said
    before, after = small.weights(run / "sft"), small.weights(run / "grpo")
    assert any(not np.array_equal(before[name], after[name]) for name in before), (
        "GRPO trained nothing"
    )
    assert_same_training(small.run_folder(grpo) / "grpo", run / "grpo")


@pytest.mark.parametrize(
    ("name", "artefact", "last"), [("03_lora_sft", "sft", 14), ("04_qlora_grpo", "grpo", 6)]
)
def test_a_training_killed_after_its_last_step_makes_none_more(
    prepared: Path, sft: Path, name: str, artefact: str, last: int
) -> None:
    # With a step size that stays, since one more step at the end of a decay moves nothing.
    constant = {"lr_scheduler_type": "constant_with_warmup"}
    save = f"    training.save(trainer, {artefact}_job.part)"
    start = prepared if artefact == "sft" else sft
    whole, root = moved(start, f"{artefact}-constant"), moved(start, f"{artefact}-late")
    for place in (whole, root):
        cuts = {save: f"    hold('end')\n{save}"}
        small.copy_notebook(place, name, settings=constant, cuts=cuts)
    small.run_notebook(whole, name)
    small.kill_notebook(root, name, "end")
    run = small.run_folder(root)
    assert [p.name for p in small.work(root, artefact).glob("checkpoint-*")] == [
        f"checkpoint-{last}"
    ]
    assert f"training begins at step {last}" in small.run_notebook(root, name)
    assert_same_training(small.run_folder(whole) / artefact, run / artefact)


def test_inference_keeps_the_models_that_have_answered(grpo: Path) -> None:
    root, whole = moved(grpo, "answers-killed"), moved(grpo, "answers")
    small.run_notebook(whole, "05_inference")
    small.kill_notebook(root, "05_inference", "grpo")
    there, expected = (small.run_folder(place) / "answers" for place in (root, whole))
    times = {
        name: (there / name / "answers.parquet").stat().st_mtime_ns for name in ("base", "sft")
    }
    assert not (there / "grpo").exists()
    said = small.run_notebook(root, "05_inference")
    assert "answers of grpo\n" in said
    assert "answers of base\n" not in said and "answers of sft\n" not in said
    for name, time in times.items():
        assert (there / name / "answers.parquet").stat().st_mtime_ns == time
    names = {folder.name for folder in expected.iterdir()}
    assert {folder.name for folder in there.iterdir()} == names and "grpo-samples" in names
    for name in names - {".making"}:
        tables = [pd.read_parquet(place / name / "answers.parquet") for place in (there, expected)]
        pd.testing.assert_frame_equal(*tables, obj=name)
