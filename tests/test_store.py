"""The store of artefacts: a folder that is there is whole, whatever was killed, cut off or made at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from helpers.machinery import places as where
from helpers.machinery import store

INPUTS = {"settings": {"learning_rate": 1}, "needs": {"cases": "k"}}


def make(path: Path, inputs: dict | None = None, text: str = "weights") -> store.Artefact:
    job = store.artefact(path, INPUTS if inputs is None else inputs)
    if job.why:
        (job.part / "a.txt").write_text(text)
        job.finish()
    return job


@pytest.fixture
def path(places: Path) -> Path:
    return places / "run" / "sft"


def test_an_artefact_is_made_once_and_then_loaded(path: Path, capsys) -> None:
    job = make(path)
    assert "sft: making it because it is not there yet" in capsys.readouterr().out
    assert sorted(file.name for file in path.iterdir()) == ["a.txt", "made_from.json"]
    assert not job.part.exists() and not job.work.exists() and not job.why
    assert not store.artefact(path, INPUTS).why
    assert "up to date, loaded" in capsys.readouterr().out
    assert store.is_whole(path) and store.key(path) == store.digest(INPUTS)
    assert store.inputs_of(path) == INPUTS


def test_the_reason_names_the_innermost_entries_that_changed(path: Path) -> None:
    make(path)
    changed = {"settings": {"learning_rate": 2, "r": 8}, "needs": {"cases": "other"}}
    assert store.why_stale(path, changed) == "learning_rate, r, cases changed"
    assert store.why_stale(path, {"needs": INPUTS["needs"]}) == "settings changed"


def test_tuples_paths_and_numbers_come_back_from_json_as_they_went(path: Path) -> None:
    inputs = {"shares": (0.7, 0.1, 0.2), "file": Path("x"), "cases": None}
    make(path, inputs)
    assert not store.artefact(path, inputs).why


def test_nothing_half_written_counts(path: Path) -> None:
    job = store.artefact(path, INPUTS)
    (job.part / "a.txt").write_text("half")
    assert store.why_stale(path, INPUTS) == "it is not there yet"
    job.lock.release(force=True)
    again = store.artefact(path, INPUTS)
    assert list(again.part.iterdir()) == []


@pytest.mark.parametrize("stop", range(2))
def test_a_kill_at_either_rename_leaves_the_old_or_a_way_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    make(path, text="old")
    job = store.artefact(path, INPUTS | {"new": 1})
    (job.part / "a.txt").write_text("new")
    (job.work / "checkpoint").write_text("state")
    real = Path.rename
    renames = []

    def dies(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == stop + 1:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        job.finish()
    monkeypatch.setattr(Path, "rename", real)
    job.lock.release(force=True)
    again = store.artefact(path, INPUTS | {"new": 1})
    assert again.why and (again.work / "checkpoint").is_file()
    assert (path / "a.txt").read_text() == "old", "the old one is back until the new one is whole"


@pytest.mark.parametrize("harm", ["cut", "lose", "unlabel", "garble"])
def test_a_damaged_artefact_is_made_anew(path: Path, harm: str) -> None:
    make(path)
    if harm == "cut":
        (path / "a.txt").write_text("w")
    elif harm == "lose":
        (path / "a.txt").unlink()
    elif harm == "unlabel":
        (path / "made_from.json").unlink()
    else:
        (path / "made_from.json").write_text('{"key": ')
    assert store.artefact(path, INPUTS).why
    assert not store.is_whole(path)


def checkpoint(work: Path, step: int) -> None:
    folder = work / f"checkpoint-{step}"
    where.write(folder / "trainer_state.json", {"global_step": step})
    where.write(folder / "adapter_model.bin", "weights")
    for name in ("optimizer.pt", "scheduler.pt"):
        zipfile.ZipFile(folder / name, "w").close()


def test_checkpoints_are_found_by_the_same_inputs_alone_and_lost_by_none(
    path: Path, capsys
) -> None:
    job = store.artefact(path, {"lr": 1})
    checkpoint(job.work, 5)
    where.write(job.work / "checkpoint-10" / "trainer_state.json", '{"global_st')  # killed
    (job.work / "checkpoint-15").mkdir()
    job.lock.release(force=True)
    other = store.artefact(path, {"lr": 2})
    assert list(other.work.iterdir()) == []
    assert "1 interrupted with other settings" in capsys.readouterr().out
    other.lock.release(force=True)
    again = store.artefact(path, {"lr": 1})
    assert [folder.name for folder in again.work.iterdir()] == ["checkpoint-5"]
    assert "going on from where it was interrupted" in capsys.readouterr().out


def test_names_that_begin_alike_do_not_touch_each_other(places: Path) -> None:
    one = store.artefact(places / "answers" / "gpt2", {})
    (one.work / "0.json").write_text("{}")
    other = store.artefact(places / "answers" / "gpt2.5", {})
    (other.work / "0.json").write_text("{}")
    (one.part / "x").write_text("x")
    one.finish()
    assert (other.work / "0.json").is_file() and other.part.is_dir()


def test_fresh_makes_anew_from_nothing(path: Path) -> None:
    make(path)
    job = store.artefact(path, INPUTS, fresh=True)
    assert job.why == "FRESH asks for it" and list(job.work.iterdir()) == []
    assert (path / "a.txt").is_file(), "the old one stays until the new one is finished"


def test_nothing_made_is_an_error(path: Path) -> None:
    job = store.artefact(path, INPUTS)
    with pytest.raises(FileNotFoundError, match="nothing was written to"):
        job.finish()


def test_a_full_disk_says_how_to_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = store.artefact(path, INPUTS)
    (job.part / "a.txt").write_text("x")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk is full.*goes on from its last checkpoint"):
        job.finish()


def test_what_a_full_disk_cut_off_takes_no_room(places: Path, monkeypatch) -> None:
    file = where.write(places / "table.json", {"edition": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        where.write(file, {"edition": 2})
    assert where.read(file) == {"edition": 1} and not list(places.glob(".table*"))


HOLDER = """
import sys, time
from pathlib import Path
from helpers.machinery import store
job = store.artefact(Path(sys.argv[1]), {"a": 1})
print("held", bool(job.why), flush=True)
time.sleep(float(sys.argv[2]))
if job.why:
    (job.part / "w").write_text("w")
    job.finish()
"""


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path), str(seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any("held True" in line for line in child.stdout or ())
    return child


def test_a_killed_process_lets_go_of_its_artefact(path: Path) -> None:
    child = holder(path, 60)
    assert store.artefact(path, {"a": 1}, wait=False) is None
    child.kill()
    child.wait()
    assert store.artefact(path, {"a": 1}).why  # at once, without waiting for a dead one


def test_of_two_processes_one_makes_and_the_other_loads(path: Path) -> None:
    child = holder(path, 1.5)
    assert not store.artefact(path, {"a": 1}).why
    assert child.wait() == 0


def test_a_drive_without_locks_is_no_reason_to_wait_or_to_fail(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if "run" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(38, "Function not implemented")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(places))
    for _ in range(2):  # a machine that is gone leaves no lock behind that the next would wait for
        job = store.artefact(places / "run" / "sft", {})
        assert job.why and job.lock.is_locked
        job.lock.release(force=True)
    assert list(places.glob("icd-*.lock"))


def test_processes_beside_the_first_neither_write_nor_speak(
    path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "1")
    job = store.artefact(path, INPUTS)
    (job.part / "a.txt").write_text("thrown away")
    job.finish()
    assert not capsys.readouterr().out and not path.parent.exists() and not job.part.exists()


FILES = [
    "trainer_state.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("left", [None, 0, 0.5, 1])
def test_a_checkpoint_that_was_cut_off_is_left_out_and_named(
    places: Path, capsys, file: str, left: float
) -> None:
    import torch
    from safetensors.torch import save_file

    for step in (10, 20):
        folder = places / "work" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("optimizer.pt", "rng_state.pth"):
            torch.save({"state": torch.randn(100)}, folder / name)
        save_file({"weights": torch.randn(100)}, folder / "adapter_model.safetensors")
        torch.save({}, folder / "scheduler.pt")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    damaged = folder / file
    damaged.write_bytes(damaged.read_bytes()[: int((left or 0) * damaged.stat().st_size)])
    if left is None and file != "rng_state.pth":  # which costs an exact end, and no more
        damaged.unlink()
    store.drop_half(places / "work")
    kept = sorted(folder.name for folder in (places / "work").iterdir())
    assert kept == ["checkpoint-10", "checkpoint-20"][: 2 if left == 1 else 1]
    assert ("checkpoint-20 is not whole" in capsys.readouterr().out) == (left != 1)
