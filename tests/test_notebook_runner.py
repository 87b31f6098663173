"""The notebooks run headless, the table and the report: small invented notebooks stand in for the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from helpers import course
from helpers.machinery import notebooks
from helpers.machinery.places import NOTICE

Write = Callable[..., Path]
COMMAND = [sys.executable, "-m", "helpers.machinery.notebooks"]
SETUP_CELL = "from helpers import course\n\nprofile, run = course.setup()"


@pytest.fixture
def write(places: Path) -> Write:
    """Write an invented notebook: one cell per argument, a set-up cell first."""

    def notebook(name: str, *cells: str) -> Path:
        nb = nbformat.v4.new_notebook()
        nb.cells = [nbformat.v4.new_code_cell(source) for source in (SETUP_CELL, *cells)]
        path = places / "notebooks" / f"{name}.ipynb"
        nbformat.write(nb, path)
        return path

    return notebook


def cli(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


MAKE_DATA = """
job = course.artefact("data", {"seed": 1})
if job.why:
    for name in ("hosp/admissions", "hosp/diagnoses_icd", "hosp/d_icd_diagnoses", "note/discharge"):
        file = job.part / f"{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a")
    job.finish()
job = course.artefact("cases", {}, ["data"])
if job.why:
    (job.part / "cases.parquet").write_text("cases")
    job.finish()
"""
MAKE_TRACES = """
course.need("cases")
job = course.artefact("traces", {"share": 0.5}, ["cases"])
if job.why:
    (job.part / "t").write_text("traces")
    job.finish()
"""


def test_need_runs_the_notebooks_that_are_missing_and_says_so(write: Write, capsys) -> None:
    write("01_data_preparation", MAKE_DATA)
    write("02_reasoning_traces", MAKE_TRACES)
    assert (course.need("traces") / "t").read_text() == "traces"
    out = capsys.readouterr().out
    assert "traces: it is not there yet. Running 02_reasoning_traces first" in out
    assert "01_data_preparation: done" in out or not course.why_stale("cases")
    with pytest.raises(ValueError, match="no artefact is called 'sff'. Known: data, cases"):
        course.need("sff")


def test_need_fails_with_the_message_of_the_notebook(write: Write, capsys) -> None:
    write("03_lora_sft", "learning_rate = 1 / 0")
    with pytest.raises(RuntimeError, match="03_lora_sft did not run to its end"):
        course.need("sft")
    out = capsys.readouterr().out
    assert "learning_rate = 1 / 0" in out and "ZeroDivisionError" in out


def test_a_notebook_that_asks_for_its_own_work_is_told(write: Write, capsys) -> None:
    write("03_lora_sft", "course.need('sft')")
    with pytest.raises(RuntimeError):
        course.need("sft")
    assert "03_lora_sft asks for sft, which it makes itself" in capsys.readouterr().out


def test_run_executes_once_then_finds_everything_up_to_date(write: Write, places: Path) -> None:
    write(
        "00_start_here",
        "from helpers.machinery import places\n"
        "for _ in places.progress(range(3), 'looking around'):\n    import time; time.sleep(0.6)",
    )
    write("01_data_preparation", MAKE_DATA)
    write("02_reasoning_traces", MAKE_TRACES)
    write(
        "06_hierarchical_f1_analysis", f"(run / 'metrics.json').write_text({json.dumps(METRICS)!r})"
    )
    first = cli("run", ICD_PROGRESS_EVERY="0.2")
    assert first.returncode == 0, first.stdout
    assert "[1/4] 00_start_here  looking around" in first.stdout and " s\n" in first.stdout
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
    child = subprocess.Popen([*COMMAND, "run"], text=True, stdout=subprocess.PIPE)
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
import time
from helpers.machinery import places
job = course.artefact("sft", {"lr": 1})
if job.why:
    done = len(list(job.work.iterdir()))
    for step in places.progress(range(done, 30), "training"):
        (job.work / f"checkpoint-{step:02}").write_text(str(time.time()))
        time.sleep(0.2)
    (job.part / "w").write_text("".join(sorted(p.name for p in job.work.iterdir())) + f" from {done}")
    job.finish()
""",
    )
    for _ in range(2):
        before = set((course.run_dir() / ".making").glob("sft.*/checkpoint-*"))
        child = subprocess.Popen([*COMMAND, "run", "--only", "03_lora_sft"])
        deadline = time.monotonic() + 300
        while len(set((course.run_dir() / ".making").glob("sft.*/checkpoint-*"))) < len(before) + 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.kill()
        child.wait()
        assert course.why_stale("sft") == "it is not there yet"
        time.sleep(3)  # its kernel notices and ends too
    last = cli("run", "--only", "03_lora_sft")
    assert last.returncode == 0, last.stdout
    text = (course.need("sft") / "w").read_text()
    assert text.startswith("checkpoint-00checkpoint-01") and "checkpoint-29 from" in text
    assert int(text.split()[-1]) >= 10
    executed = nbformat.read(course.run_dir() / "notebooks" / "03_lora_sft.ipynb", 4)
    assert "going on from where it was interrupted" in executed.cells[1].outputs[0].text


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
    header, rows = notebooks.table(METRICS)
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
    assert notebooks.table({**METRICS, "models": models})[1][-1][1].startswith("0.800 [")
    assert len(notebooks.table({**METRICS, "ceiling": None})[1]) == 3
    odd = {
        "models": {
            "sft": {"usable": 1, "full": _level(0.5, 7)},
            "base": {"usable": 1, "full": _level(0.5, 8)},
        }
    }
    assert notebooks.table(odd)[1][0][3].endswith("(8 classes)")


def test_a_score_of_one_patient_has_no_interval() -> None:
    entry = {"f1_gold": 0.5, "ci": [None, None], "n_classes": 1}
    row = notebooks.table({"models": {"sft": {"usable": 1.0, "full": entry}}})[1][0]
    assert row[3] == "0.500"


def test_the_report_needs_no_other_file(places: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure()
    fig.subplots()
    assert course.save_figure(fig, "06_confusion") is fig
    (course.run_dir() / "metrics.json").write_text(json.dumps(METRICS))
    done = cli("report")
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html")
    page = (course.run_dir() / "report.html").read_text()
    assert NOTICE in page and "data:image/png;base64,iVBOR" in page and "2.13.0 &lt;cpu&gt;" in page
    assert 'src="http' not in page and 'href="http' not in page
    assert "0.800 [0.750, 0.850]" in cli("table").stdout


def test_without_results_the_table_says_what_to_run(places: Path) -> None:
    none = cli("table")
    assert none.returncode == 1 and "make course" in none.stdout


@pytest.mark.parametrize("fault", ["no interpreter", "no kernel"])
def test_a_kernel_that_cannot_start_is_not_laid_to_memory(
    write: Write, places: Path, fault: str
) -> None:
    write("00_start_here", "1")
    spec = places / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = ["/opt/gone/bin/python", "-f", "{connection_file}"]
    if fault == "no kernel":
        argv = [sys.executable, "-c", "raise SystemExit(3)"]
    kernel = {"argv": argv, "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    done = cli("run", "--only", "00_start_here", JUPYTER_PATH=str(places / "jupyter"))
    if done.returncode:
        assert "memory" not in done.stdout and "could not be run" in done.stdout
        assert fault == "no kernel" or "/opt/gone" in done.stdout


def test_progress_is_taken_from_the_bar_and_kept_out_of_the_notebook(write: Write) -> None:
    write(
        "00_start_here",
        "from helpers.machinery import places\nfor _ in places.progress(range(3), 'looking'):\n    pass\n"
        "import sys\nprint('a warning', file=sys.stderr)",
    )
    assert cli("run", "--only", "00_start_here").returncode == 0
    executed = nbformat.read(course.run_dir() / "notebooks" / "00_start_here.ipynb", 4)
    text = "".join(out.get("text", "") for out in executed.cells[-1].outputs)
    assert "a warning" in text and "looking" not in text


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("\rSFT:  43%|####     | 120/280 [00:20<00:26,  6.01it/s]", "SFT 120/280"),
        ("\rSFT: 1%| | 1/280 [00:01<?]\rSFT: 2%| | 5/280 [00:02<01:30,  3.0it/s]", "SFT 5/280"),
        ("\rsteps: 7it [00:01,  5.0it/s]", ""),
        ("\ranything else", ""),
    ],
)
def test_the_last_state_of_a_bar_is_read(text: str, step: str) -> None:
    assert notebooks._step(text) == step
