"""Artefacts and their stamps, and the notebooks run headless: small invented notebooks stand in for the real ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from helpers import course, profiles, runner

Write = Callable[..., Path]


@pytest.fixture
def write(places: Path) -> Write:
    """Write an invented notebook: one cell per argument, the setup cell first."""

    def notebook(name: str, *cells: str) -> Path:
        nb = nbformat.v4.new_notebook()
        nb.cells = [nbformat.v4.new_code_cell(source) for source in (course.SETUP_CELL, *cells)]
        path = places / "notebooks" / f"{name}.ipynb"
        nbformat.write(nb, path)
        return path

    return notebook


def make(name: str, settings: dict | None = None, text: str = "x") -> course.Artefact:
    job = course.artefact(name, settings)
    if job.stale:
        made = job.tmp / (Path(course.ARTEFACTS[name].file).name or "data")
        if made.suffix:
            made.write_text(text)
        else:
            made.mkdir()
            for sub in ("hosp", "note") if name == "data" else (".",):
                (made / sub).mkdir(exist_ok=True)
                (made / sub / "a.csv").write_text(text)
        job.commit(made)
    return job


def make_all(*names: str) -> None:
    for name in names:
        make(name)


def cli(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helpers.course", *arguments],
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


MAKE_DATA = """
job = course.artefact("data", {"seed": 1})
if job.stale:
    for sub in ("hosp", "note"):
        (job.tmp / sub).mkdir()
        (job.tmp / sub / "a.csv").write_text("a")
    job.commit()
job = course.artefact("cases")
if job.stale:
    (job.tmp / "cases.parquet").write_text("cases")
    job.commit(job.tmp / "cases.parquet")
"""
MAKE_TRACES = """
course.need("cases")
job = course.artefact("traces", {"share": 0.5})
if job.stale:
    (job.tmp / "t").write_text("traces")
    job.commit(job.tmp / "t")
"""


# --------------------------------------------------------------------------------------------- artefacts


def test_an_artefact_is_made_once_and_then_loaded(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("base", {"size": 1}).path.is_dir()
    assert "base: making it because it is not there yet" in capsys.readouterr().out
    assert not course.artefact("base", {"size": 1}).stale
    assert "up to date, loaded" in capsys.readouterr().out
    assert course.need("base") == course.run_dir() / "base"


def test_the_reason_names_what_changed(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("base", {"size": 1, "seed": 0})
    assert course.why_stale("base", {"size": 2, "seed": 0}) == "size changed"
    monkeypatch.setattr(course, "__version__", "9.9")
    assert "made by version" in course.why_stale("base")


def test_another_profile_is_named(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    make("base")
    other = dataclasses.replace(profiles.get("tiny"), max_new_tokens=80)
    monkeypatch.setattr(profiles, "current", lambda: other)
    assert course.why_stale("base") == "max_new_tokens of the profile changed"


def test_what_lies_upstream_makes_the_rest_stale(places: Path) -> None:
    make_all("data", "cases", "base", "traces", "sft")
    assert not course.why_stale("sft")
    make("traces", {"share": 0.1})
    assert course.why_stale("sft") == "traces changed"
    (course.data_dir() / "hosp" / "a.csv").write_text("longer")
    assert course.why_stale("data").startswith("it was changed since")
    assert course.why_stale("traces") == "cases is not up to date"
    assert not course.why_stale("base")


def test_the_stage_settings_of_a_profile_touch_their_own_stage_alone(
    places: Path, monkeypatch
) -> None:
    import dataclasses

    make_all("data", "cases", "base", "traces", "sft", "grpo")
    other = dataclasses.replace(profiles.get("tiny"), grpo_steps=5)
    monkeypatch.setattr(profiles, "current", lambda: other)
    assert not course.why_stale("sft")
    assert course.why_stale("grpo") == "grpo_steps of the profile changed"


def test_nothing_half_written_counts(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = course.artefact("base")
    (job.tmp / "weights").write_text("half")
    assert course.why_stale("base") == "it is not there yet"  # killed before commit
    real, calls = os.replace, []

    def dies(a: Path, b: Path) -> None:
        calls.append(b)
        if Path(b) == job.path:
            raise KeyboardInterrupt  # killed between the stamp and the move
        real(a, b)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        job.commit()
    monkeypatch.setattr(os, "replace", real)
    assert course.why_stale("base") == "it is not there yet"
    assert make("base").path.is_dir()
    assert not course.why_stale("base")
    course._stamp("base").unlink()
    assert course.why_stale("base") == "it was never finished"


@pytest.mark.parametrize("harm", ["cut", "lose"])
def test_a_damaged_artefact_is_made_anew(places: Path, harm: str) -> None:
    path = make("base", text="weights").path / "a.csv"
    path.write_text("w") if harm == "cut" else path.unlink()
    assert course.why_stale("base") == "it was changed since (a.csv)"


def test_checkpoints_survive_an_interruption_and_not_a_change(places: Path, capsys) -> None:
    work = course.artefact("base", {"lr": 1}).work
    course.write(work / "checkpoint-5" / "trainer_state.json", {"global_step": 5})
    course.write(work / "checkpoint-5" / "adapter_model.bin", "weights")
    for name in ("optimizer.pt", "scheduler.pt"):
        zipfile.ZipFile(work / "checkpoint-5" / name, "w").close()
    course.write(
        work / "checkpoint-10" / "trainer_state.json", '{"global_st'
    )  # killed while it was written
    (work / "checkpoint-15").mkdir()
    again = course.artefact("base", {"lr": 1})
    assert [p.name for p in again.work.iterdir()] == ["checkpoint-5"]
    assert "going on from the last checkpoint" in capsys.readouterr().out
    other = course.artefact("base", {"lr": 2})
    assert other.work.is_dir() and not any(other.work.iterdir())
    assert "had done is not used (other settings" in capsys.readouterr().out
    other.commit()
    assert not other.work.exists() and not other.tmp.exists()


@pytest.mark.parametrize(
    ("fresh", "stale"), [("1", {"base", "sft"}), ("sft", {"sft"}), ("", set())]
)
def test_fresh_makes_anew_and_need_does_not(
    places: Path, monkeypatch, fresh: str, stale: set[str]
) -> None:
    make_all("data", "cases", "base", "traces", "sft")
    monkeypatch.setenv("FRESH", fresh)
    assert {n for n in ("base", "sft") if course.artefact(n).stale} == stale
    assert course.need("base").is_dir()


def test_nothing_made_is_an_error(places: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Write it there before commit"):
        course.artefact("base").commit(places / "nowhere")


def test_a_full_disk_says_how_to_go_on(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = course.artefact("base")
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="disk is full.*goes on from its last checkpoint"):
        job.commit()


CELL = """
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell("from helpers import course; course.setup(); course.setup()")
for cell in ("raise KeyboardInterrupt", "raise OSError(28, 'No space left on device')", "1 / 1"):
    shell.run_cell(cell)
"""


def test_an_open_notebook_says_how_to_go_on_after_a_stop(places: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CELL], text=True, capture_output=True)
    assert done.stdout.count("Nothing that was finished is lost") == 2, done.stdout + done.stderr
    assert "goes on, a training from its last checkpoint" in done.stdout


def test_runs_that_share_the_data_share_its_lock(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two first runs of different profiles write the same folder: one of them used to delete what the other was writing."""
    monkeypatch.delenv("ICD_DATA_DIR", raising=False)
    monkeypatch.setattr(course, "data_dir", lambda: places / "data" / "synthetic")
    locks = {}
    for run in ("one", "two"):
        monkeypatch.setenv("ICD_RUNS_DIR", str(places / run))
        for name in ("data", "base"):
            job = course.artefact(name)
            assert job.stale and job.lock.is_locked
            locks[run, name] = job.lock.lock_file
            job.lock.release(force=True)
    assert (
        locks["one", "data"] == locks["two", "data"]
        and locks["one", "base"] != locks["two", "base"]
    )


def test_a_drive_without_locks_is_no_reason_to_wait_or_to_fail(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if "runs" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(38, "Function not implemented")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(places))
    for _ in range(
        2
    ):  # a machine that is gone leaves no lock behind that the next one would wait for
        job = course.artefact("base")
        assert job.stale and job.lock.is_locked
        job.lock.release(force=True)
    assert list(places.glob("icd-*-base.lock")) and not list(
        (course.run_dir() / ".stamps").glob("*soft*")
    )


def test_what_a_full_disk_cut_off_takes_no_room(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = course.write(places / "table.json", {"edition": 1})
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        course.write(path, {"edition": 2})
    assert course.read(path) == {"edition": 1} and not list(places.glob(".table*"))


def test_no_room_or_no_right_to_write_stops_before_any_work(places: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(places)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(OSError, match="only 1 MB free.*ICD_RUNS_DIR"):
        course.setup()
    (places / "file").write_text("")
    monkeypatch.setenv("ICD_RUNS_DIR", str(places / "file"))
    with pytest.raises(OSError, match="cannot be written.*ICD_RUNS_DIR"):
        course.setup()


def test_the_readers_own_data_is_never_written_to(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sub in ("hosp", "note"):
        (places / "mimic" / sub).mkdir(parents=True)
        (places / "mimic" / sub / "a.csv.gz").write_bytes(b"1")
    monkeypatch.setenv("ICD_DATA_DIR", str(places / "mimic"))
    monkeypatch.setenv("FRESH", "1")
    assert not course.artefact("data", {"admissions": 5}).stale
    monkeypatch.setenv("FRESH", "")
    make("cases")
    assert not course.why_stale("cases")
    (places / "mimic" / "hosp" / "a.csv.gz").write_bytes(b"2")
    assert course.why_stale("cases") == "data changed"
    assert sorted(p.name for p in (places / "mimic").iterdir()) == ["hosp", "note"]


def test_missing_data_names_the_folder_and_the_way_out(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICD_DATA_DIR", str(places / "mimic-iv"))
    with pytest.raises(
        FileNotFoundError, match=r"mimic-iv: no hosp/ and note/.*ICD_DATA_DIR.*data/README.md"
    ):
        course.artefact("data")


HOLDER = """
import sys, time
from helpers import course
job = course.artefact("base")
print("held", job.stale, flush=True)
time.sleep(float(sys.argv[1]))
if job.stale:
    (job.tmp / "w").write_text("w")
    job.commit()
"""


def test_a_killed_process_lets_go_of_its_artefact(places: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "60"], stdout=subprocess.PIPE, text=True
    )
    assert any("held True" in line for line in holder.stdout or ())
    holder.kill()
    holder.wait()
    assert course.artefact("base").stale  # at once, without waiting for a dead one


def test_of_two_processes_one_makes_and_the_other_loads(places: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "1.5"], stdout=subprocess.PIPE, text=True
    )
    assert any("held True" in line for line in first.stdout or ())
    assert not course.artefact("base").stale
    assert first.wait() == 0


def test_processes_beside_the_first_neither_write_nor_speak(
    places: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "1")
    course.setup()
    job = course.artefact("base")
    assert job.stale and not capsys.readouterr().out
    job.commit()
    assert not job.path.exists()


# ---------------------------------------------------------------------------------------------- notebooks


def test_need_runs_the_notebooks_that_are_missing_and_says_so(write: Write, capsys) -> None:
    write("01_data_preparation", MAKE_DATA)
    write("02_reasoning_traces", MAKE_TRACES)
    assert course.need("traces").read_text() == "traces"
    out = capsys.readouterr().out
    assert "traces: it is not there yet. Running 02_reasoning_traces first" in out
    assert "01_data_preparation: done" in out or not course.why_stale("cases")
    with pytest.raises(ValueError, match="no artefact is called 'sff'. Known: data, cases"):
        course.need("sff")


def test_need_fails_with_the_message_of_the_notebook(write: Write, capsys) -> None:
    write("03_lora_sft", "learning_rate = 1 / 0")
    with pytest.raises(RuntimeError, match="03_lora_sft did not run to its end"):
        course.need("base")
    out = capsys.readouterr().out
    assert "learning_rate = 1 / 0" in out and "ZeroDivisionError" in out


def test_a_notebook_that_asks_for_its_own_work_is_told(write: Write, capsys) -> None:
    write("03_lora_sft", "course.need('base')")
    with pytest.raises(RuntimeError):
        course.need("base")
    assert "03_lora_sft asks for base, which it makes itself" in capsys.readouterr().out


def test_run_executes_once_then_finds_everything_up_to_date(write: Write, places: Path) -> None:
    write(
        "00_start_here",
        "for _ in course.progress(range(3), 'looking around'):\n    import time; time.sleep(0.6)",
    )
    write("01_data_preparation", MAKE_DATA)
    write("02_reasoning_traces", MAKE_TRACES)
    write(
        "06_hierarchical_f1_analysis", f"(run / 'metrics.json').write_text({json.dumps(METRICS)!r})"
    )
    first = cli("run", ICD_PROGRESS_EVERY="0.2")
    assert first.returncode == 0, first.stdout
    assert "[1/4] 00_start_here  looking around" in first.stdout and "min left" in first.stdout
    assert "GRPO" in first.stdout and "report.html" in first.stdout
    run = course.run_dir()
    executed = nbformat.read(run / "notebooks" / "01_data_preparation.ipynb", 4)
    assert executed.cells[-1].execution_count
    assert not list((places / "notebooks").glob("*.failed.ipynb"))
    # metrics.json was written past artefact(): 06 is not up to date, the others are.
    second = cli("run")
    assert (
        "00_start_here: up to date" in second.stdout
        and "02_reasoning_traces: up to date" in second.stdout
    )
    write("02_reasoning_traces", "# another comment", MAKE_TRACES)
    third = cli("run")
    assert (
        "01_data_preparation: up to date" in third.stdout
        and "02_reasoning_traces: done" in third.stdout
    )
    fourth = cli("run", FRESH="traces")
    assert (
        "01_data_preparation: up to date" in fourth.stdout
        and "02_reasoning_traces: done" in fourth.stdout
    )


def test_a_failing_cell_is_shown_and_the_next_run_goes_on(write: Write) -> None:
    write("01_data_preparation", MAKE_DATA)
    write("02_reasoning_traces", "print('so far so good')", "share = {}['traces']", "never = 1")
    failed = cli("run")
    assert failed.returncode == 1
    assert (
        "02_reasoning_traces failed in cell 3:" in failed.stdout
        and "share = {}['traces']" in failed.stdout
    )
    assert "KeyError" in failed.stdout and "the same command goes on" in failed.stdout
    kept = nbformat.read(course.run_dir() / "notebooks" / "02_reasoning_traces.failed.ipynb", 4)
    assert "so far so good" in kept.cells[1].outputs[0].text
    assert not (course.run_dir() / "notebooks" / "02_reasoning_traces.ipynb").exists()
    write("02_reasoning_traces", MAKE_TRACES)
    mended = cli("run", "--only", "02_reasoning_traces")
    assert mended.returncode == 0 and not course.why_stale("traces")
    assert not list((course.run_dir() / "notebooks").glob("*.failed.ipynb"))


def test_a_kernel_that_dies_is_told_apart(write: Write) -> None:
    write("00_start_here", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    died = cli("run")
    assert died.returncode == 1 and "memory ran out" in died.stdout and "os.kill" in died.stdout


def test_ctrl_c_keeps_what_ran(write: Write, places: Path) -> None:
    write(
        "00_start_here", "print('begun')", "open('begun', 'w').close()\nimport time\ntime.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "helpers.course", "run"], text=True, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while not (places / "notebooks" / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=240)
    assert child.returncode == 130 and "was interrupted in cell 3" in out and "goes on" in out
    kept = nbformat.read(course.run_dir() / "notebooks" / "00_start_here.failed.ipynb", 4)
    assert "begun" in kept.cells[1].outputs[0].text


@pytest.mark.slow
def test_a_run_killed_outright_goes_on_from_its_checkpoint(write: Write, places: Path) -> None:
    write(
        "03_lora_sft",
        """
import pathlib, time
job = course.artefact("base", {"lr": 1})
if job.stale:
    done = len(list(job.work.iterdir()))
    for step in course.progress(range(done, 30), "training"):
        (job.work / f"checkpoint-{step:02}").write_text(str(time.time()))
        time.sleep(0.2)
    (job.tmp / "w").write_text("".join(sorted(p.name for p in job.work.iterdir())) + f" from {done}")
    job.commit(job.tmp)
""",
    )
    for _ in range(2):
        before = set((course.run_dir() / ".work" / "base").glob("checkpoint-*"))
        child = subprocess.Popen(
            [sys.executable, "-m", "helpers.course", "run", "--only", "03_lora_sft"]
        )
        deadline = time.monotonic() + 300
        while (
            len(set((course.run_dir() / ".work" / "base").glob("checkpoint-*"))) < len(before) + 5
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.kill()
        child.wait()
        assert course.why_stale("base") == "it is not there yet"
        time.sleep(3)  # its kernel notices and ends too
    last = cli("run", "--only", "03_lora_sft")
    assert last.returncode == 0, last.stdout
    text = (course.need("base") / "w").read_text()
    assert text.startswith("checkpoint-00checkpoint-01") and "checkpoint-29 from" in text
    assert int(text.split()[-1]) >= 10
    executed = nbformat.read(course.run_dir() / "notebooks" / "03_lora_sft.ipynb", 4)
    assert "going on from the last checkpoint" in executed.cells[1].outputs[0].text


def test_an_unknown_notebook_names_the_known(write: Write) -> None:
    write("00_start_here", "1")
    unknown = cli("run", "--only", "09_nothing")
    assert unknown.returncode == 1 and "There are: 00_start_here" in unknown.stdout


# --------------------------------------------------------------------------------------- table and report


def _level(x: float, k: int = 20) -> dict:
    return {"f1_gold": x, "ci": [x - 0.05, x + 0.05], "n_classes": k, "accuracy": x}


METRICS = {
    "models": {
        "grpo": {
            "usable": 0.995,
            "chapter": _level(0.8, 9),
            "category": _level(0.7),
            "full": _level(0.6, 30),
        },
        "majority": {
            "usable": 1.0,
            "chapter": _level(0.1, 9),
            "category": _level(0.05),
            "full": _level(0.06, 30),
        },
        "mine": {
            "usable": 0.5,
            "chapter": _level(0.3, 9),
            "category": _level(0.2),
            "full": {"f1_gold": None},
        },
    },
    "ceiling": {
        level: {"accuracy": 0.9, "f1_gold": 0.91} for level in ("chapter", "category", "full")
    },
    "environment": {"torch": "2.13.0 <cpu>"},
}


def test_the_table_goes_from_majority_to_ceiling(places: Path) -> None:
    header, rows = runner.table(METRICS)
    assert header[1:] == [
        "chapter (9 classes)",
        "category (20 classes)",
        "full code (30 classes)",
        "usable answers",
    ]
    assert [r[0] for r in rows] == ["majority class", "GRPO", "mine", "ideal reader (ceiling)"]
    assert rows[1][1:] == [
        "0.800 [0.750, 0.850]",
        "0.700 [0.650, 0.750]",
        "0.600 [0.550, 0.650]",
        "99.5%",
    ]
    assert rows[2][3] == "–" and rows[3][1] == "0.910" and rows[3][4] == "–"
    models = {**METRICS["models"], "ideal": METRICS["models"]["grpo"]}
    assert runner.table({**METRICS, "models": models})[1][-1][1].startswith("0.800 [")
    assert len(runner.table({**METRICS, "ceiling": None})[1]) == 3
    odd = {
        "models": {
            "sft": {"usable": 1, "full": _level(0.5, 7)},
            "base": {"usable": 1, "full": _level(0.5, 8)},
        }
    }
    assert runner.table(odd)[1][0][3].endswith("(8 classes)")


def test_the_report_needs_no_other_file(places: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure()
    fig.subplots()
    assert course.save_figure(fig, "06_confusion") is fig
    (course.run_dir() / "metrics.json").write_text(json.dumps(METRICS))
    done = cli("report")
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html")
    page = (course.run_dir() / "report.html").read_text()
    assert (
        course.NOTICE in page
        and "data:image/png;base64,iVBOR" in page
        and "2.13.0 &lt;cpu&gt;" in page
    )
    assert 'src="http' not in page and 'href="http' not in page
    assert "0.800 [0.750, 0.850]" in cli("table").stdout


def test_without_results_the_table_says_what_to_run(places: Path) -> None:
    none = cli("table")
    assert none.returncode == 1 and "make course" in none.stdout


# ------------------------------------------------------------------------------------- setup and progress


@pytest.mark.parametrize(
    "file",
    [
        "trainer_state.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ],
)
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
    course.drop_half(places / "work")
    kept = sorted(path.name for path in (places / "work").iterdir())
    assert kept == ["checkpoint-10", "checkpoint-20"][: 2 if left == 1 else 1]
    assert ("checkpoint-20 is not whole" in capsys.readouterr().out) == (left != 1)


def test_setup_switches_off_what_calls_home_and_says_where_things_are(places: Path) -> None:
    code = (
        "import os, sys\nfrom helpers import course\nprofile, run = course.setup()\n"
        "assert run.is_dir() and profile.name == 'tiny' and 'torch' not in sys.modules\n"
        "for v in ('HF_HUB_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK'):\n    assert os.environ[v] == '1', v"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (
        len(done.stdout.splitlines()) == 4
        and course.NOTICE in done.stdout
        and "synthetic" in done.stdout
    )


def test_setup_names_what_another_version_made(places: Path, monkeypatch, capsys) -> None:
    course.setup()
    make("base")
    monkeypatch.setattr(course, "__version__", "9.9")
    capsys.readouterr()
    course.setup()
    assert "Made by version 0" in (out := capsys.readouterr().out) and "base" in out


def test_progress_reports_to_the_file(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICD_PROGRESS", str(places / "log"))
    assert list(course.progress("abc", "letters")) == ["a", "b", "c"]
    with course.progress(10, "steps") as bar:
        bar.update(4)
        bar.update(6)
    lines = [json.loads(line) for line in (places / "log").read_text().splitlines()]
    assert lines[-1] == {"label": "steps", "n": 10, "total": 10}
    assert {"label": "letters", "n": 3, "total": 3} in lines


def test_trainer_progress_counts_the_steps_of_a_trainer(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setenv("ICD_PROGRESS", str(places / "log"))
    steps = course.TrainerProgress("SFT")
    state = SimpleNamespace(max_steps=30, global_step=20)
    steps.on_train_begin(None, state, None)  # resumed at step 20
    for state.global_step in range(21, 31):
        steps.on_step_end(None, state, None)
    steps.on_train_end(None, state, None)
    assert json.loads((places / "log").read_text().splitlines()[-1]) == {
        "label": "SFT",
        "n": 30,
        "total": 30,
    }


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_second_training_in_a_process_can_load_a_checkpoint_too(
    places: Path, monkeypatch, processes: str
) -> None:
    import torch

    monkeypatch.setenv("WORLD_SIZE", processes)
    for label in ("sft", "grpo", "sft"):
        course.TrainerProgress(label)
    torch.save({"state": torch.ones(2)}, places / "optimizer.pt")
    if processes == "2":  # there a CPU is called so
        assert (
            torch.load(places / "optimizer.pt", map_location=torch.device("cpu:0"))["state"].sum()
            == 2
        )


def test_the_setup_cell_installs_with_the_torch_that_is_there(places: Path, monkeypatch) -> None:
    from types import SimpleNamespace

    import torch
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.chdir(places)
    real = sys.modules["helpers"]
    monkeypatch.setitem(sys.modules, "helpers", None)  # as if the course were not installed
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    asked: list[str] = []

    def magic(name: str, line: str) -> None:
        asked.append(f"{name} {line}")
        sys.modules["helpers"] = real

    code = TransformerManager().transform_cell(course.SETUP_CELL)
    names: dict = {"get_ipython": lambda: SimpleNamespace(run_line_magic=magic)}
    exec(compile(code, "setup", "exec"), names)
    assert asked == [
        f"pip install -q -c keep-torch.txt git+{course.REPOSITORY}",  # and never constraints.txt
        "pip uninstall -q -y torchao",
    ]
    assert (places / "keep-torch.txt").read_text() == f"torch=={torch.__version__}\n"
    assert names["profile"].name == "tiny" and names["run"] == course.run_dir()
    exec(compile(code, "setup", "exec"), {})  # installed: nothing to do
    assert len(asked) == 2  # and not a second time


def test_beside_colab_the_setup_cell_installs_nothing_and_says_what_to_do(monkeypatch) -> None:
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.setitem(sys.modules, "helpers", None)
    code = compile(TransformerManager().transform_cell(course.SETUP_CELL), "setup", "exec")
    with pytest.raises(
        ModuleNotFoundError, match=r"helpers.*choose the kernel of \.venv, or install the course"
    ):
        exec(code, {"get_ipython": None})


def test_the_setup_cell_passes_the_linter(root: Path) -> None:
    cell = nbformat.v4.new_code_cell(course.SETUP_CELL + "\nprint(profile, run)")
    source = nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "notebooks/00.ipynb", "-"]
    done = subprocess.run(command, cwd=root, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
