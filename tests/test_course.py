"""What a notebook says to the machinery: set up, artefact, need, experiments beside the baseline, compare."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from helpers import course, profiles
from helpers.machinery import artefacts, places, store

TABLES = ("hosp/admissions", "hosp/diagnoses_icd", "hosp/d_icd_diagnoses", "note/discharge")
SETUP_CELL = (Path(__file__).parent / "setup_cell.txt").read_text(encoding="utf-8")
SETUP_CELL = SETUP_CELL.replace("{repository}", places.REPOSITORY)


def write_tables(folder: Path, text: str = "a\n1\n") -> None:
    for name in TABLES:
        file = folder / f"{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def make(name: str, settings: dict | None = None, needs: list[str] = (), text: str = "x") -> Path:
    job = course.artefact(name, settings, needs)
    if job.why:
        if name == "data":
            write_tables(job.part, text)
        else:
            (job.part / "a.txt").write_text(text)
        job.finish()
    return job.path


def make_all() -> None:
    make("data", {"admissions": 5})
    make("cases", {}, ["data"])
    make("traces", {"share": 0.5}, ["cases"])
    make("sft", {"learning_rate": 1}, ["cases", "traces"])
    make("grpo", {"beta": 0}, ["cases", "sft@baseline"])


# ------------------------------------------------------------------------------ what makes what stale


def test_what_lies_upstream_makes_the_rest_stale(places: Path) -> None:
    make_all()
    assert not course.why_stale("grpo")
    make("traces", {"share": 0.1}, ["cases"])
    assert course.why_stale("sft") == "traces changed"
    assert course.why_stale("grpo") == "sft is not up to date"
    (course.data_dir() / "hosp" / "admissions.csv").write_text("longer\n")
    assert course.why_stale("data").startswith("it was changed since")
    assert course.why_stale("traces") == "cases is not up to date"


def test_each_input_is_looked_at_once(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_all()
    for model in ("base", "sft", "grpo", "ideal"):
        make(f"answers/{model}", {"seed": 0}, ["cases", "sft", "grpo"])
    make("metrics", {}, ["cases", *(f"answers/{m}" for m in ("base", "sft", "grpo", "ideal"))])
    looked = []
    real = store.why_stale
    monkeypatch.setattr(
        store, "why_stale", lambda path, now: looked.append(path) or real(path, now)
    )
    assert not course.why_stale("metrics")
    assert len(looked) == len(set(looked)) <= 11
    looked.clear()
    assert not course.why_stale("answers/base", "answers/sft", "metrics")
    assert len(looked) == len(set(looked)) <= 11, "of several, too"


def test_the_stage_settings_of_a_profile_touch_their_own_stage_alone(
    places: Path, monkeypatch
) -> None:
    make_all()
    tiny = profiles.get("tiny")
    monkeypatch.setattr(profiles, "current", lambda: tiny.replace(grpo={"learning_rate": 5.0}))
    assert not course.why_stale("sft")
    assert course.why_stale("grpo") == "learning_rate changed"
    other_base = tiny.replace(base="Qwen/Qwen2.5-7B-Instruct", max_new_tokens=200)
    monkeypatch.setattr(profiles, "current", lambda: other_base)
    assert not course.why_stale("cases") and not course.why_stale("traces")
    assert course.why_stale("sft") == "base, max_new_tokens changed"


def test_what_changes_no_result_makes_nothing_stale(places: Path, monkeypatch) -> None:
    make("sft", {"learning_rate": 1, "save_steps": 50})
    assert not course.artefact("sft", {"learning_rate": 1, "save_steps": 10}).why
    tiny = profiles.get("tiny")
    slower = tiny.replace(sft={"save_steps": 5}, minutes={"03_lora_sft": 99.0})
    monkeypatch.setattr(profiles, "current", lambda: slower)
    assert not course.why_stale("sft")


def test_another_version_of_the_course_is_named(places: Path, monkeypatch) -> None:
    make("sft")
    monkeypatch.setattr(artefacts, "__version__", "9.9")
    assert course.why_stale("sft") == "version of the course changed"


@pytest.mark.parametrize(
    ("fresh", "stale"),
    [
        ("1", {"sft", "grpo"}),
        ("True", {"sft", "grpo"}),
        ("sft", {"sft"}),
        (" SFT ,cases", {"sft"}),
        ("0", set()),
        ("", set()),
    ],
)
def test_fresh_makes_anew_and_need_does_not(
    places: Path, monkeypatch, fresh: str, stale: set[str]
) -> None:
    make("sft")
    make("grpo")
    monkeypatch.setenv("FRESH", fresh)
    assert {name for name in ("sft", "grpo") if course.artefact(name).why} == stale
    assert course.need("sft").is_dir()


@pytest.mark.parametrize("fresh", ["stf", "sft,grop", "03_lora_sft", "2", "sft grpo"])
def test_fresh_for_a_stage_that_there_is_not_is_an_error(
    places: Path, monkeypatch, fresh: str
) -> None:
    make("sft")
    monkeypatch.setenv("FRESH", fresh)
    with pytest.raises(ValueError, match=r"no such stage. There are data, cases, traces, sft"):
        course.artefact("sft")


@pytest.mark.parametrize("fresh", ["submit", "sft@small_r", "answers/My-Model,0", "all"])
def test_fresh_takes_what_can_be_made(places: Path, monkeypatch, fresh: str) -> None:
    monkeypatch.setenv("FRESH", fresh)
    assert course.artefact("cases").why


def test_fresh_answers_means_those_of_every_model(places: Path, monkeypatch) -> None:
    make("answers/sft")
    make("answers/My-Model")
    monkeypatch.setenv("FRESH", "answers")
    assert course.artefact("answers/sft").why
    monkeypatch.setenv("FRESH", "answers/My-Model")
    assert course.artefact("answers/My-Model").why and not course.artefact("answers/sft").why


# ----------------------------------------------------------------------------------- the reader's data


def test_the_readers_own_data_is_never_written_to(places: Path, monkeypatch) -> None:
    own = places / "mimic"
    write_tables(own)
    monkeypatch.setenv("ICD_DATA_DIR", str(own))
    monkeypatch.setenv("FRESH", "1")
    assert not course.artefact("data", {"admissions": 5}).why
    monkeypatch.setenv("FRESH", "")
    make("cases", {}, ["data"])
    assert not course.why_stale("cases")
    (own / "hosp" / "admissions.csv").write_text("a\n2\n")
    assert course.why_stale("cases") == "data changed"
    assert sorted(path.name for path in own.iterdir()) == ["hosp", "note"]


def test_what_nothing_reads_makes_nothing_stale(places: Path, monkeypatch) -> None:
    own = places / "mimic"
    write_tables(own)
    monkeypatch.setenv("ICD_DATA_DIR", str(own))
    make("cases", {}, ["data"])
    (own / "hosp" / "labevents.csv.gz").symlink_to(places / "annex" / "not-fetched")
    (own / "hosp" / "patients.csv").write_text("a\n1\n")
    (own / "note" / "radiology.csv.gz").write_bytes(b"")
    assert not course.why_stale("cases")


def test_missing_data_names_the_folder_and_the_way_out(places: Path, monkeypatch) -> None:
    monkeypatch.setenv("ICD_DATA_DIR", str(places / "mimic-iv"))
    says = r"mimic-iv: no hosp/ and note/.*ICD_DATA_DIR.*data/README.md"
    with pytest.raises(FileNotFoundError, match=says):
        course.artefact("data")


def test_runs_that_share_the_data_share_its_lock(places: Path, monkeypatch) -> None:
    locks = {}
    for run in ("one", "two"):
        monkeypatch.setenv("ICD_RUNS_DIR", str(places / run))
        for name in ("data", "sft"):
            job = course.artefact(name)
            assert job.why and job.lock.is_locked
            locks[run, name] = job.lock.lock_file
            job.lock.release(force=True)
    assert locks["one", "data"] == locks["two", "data"]
    assert locks["one", "sft"] != locks["two", "sft"]


# --------------------------------------------------------------------------------------- experiments


def test_an_experiment_stands_beside_the_baseline(places: Path) -> None:
    make_all()
    experiment = make("sft", {"name": "small_r", "learning_rate": 2}, ["cases", "traces"], "small")
    assert experiment == course.run_dir() / "experiments" / "small_r" / "sft"
    assert (course.need("sft") / "a.txt").read_text() == "x"
    assert (course.need("sft", "small_r") / "a.txt").read_text() == "small"
    assert not course.why_stale("grpo"), "the baseline's GRPO still stands on the baseline's SFT"
    make("grpo", {"name": "on_small", "start": "small_r"}, ["cases", "sft@small_r"])
    assert course.experiments() == ["on_small", "small_r"]
    make("sft", {"name": "small_r", "learning_rate": 3}, ["cases", "traces"])
    assert course.why_stale("grpo@on_small") == "sft@small_r changed"


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "", "a\nb", "x@y", "\\"])
def test_a_name_that_no_folder_can_have_is_refused(places: Path, name: str) -> None:
    if name == "":
        assert course.artefact("sft", {"name": name}).path == course.run_dir() / "sft"
        return
    with pytest.raises(ValueError, match="cannot name an artefact"):
        course.artefact("sft", {"name": name})


def test_a_missing_experiment_says_how_it_is_made(places: Path) -> None:
    with pytest.raises(RuntimeError, match=r"03_lora_sft with settings\[\"name\"\] = 'small_r'"):
        course.need("sft", "small_r")


def invented_run() -> pd.DataFrame:
    """Cases, two trainings and their answers, without any model."""
    n = 40
    codes = ["I2101", "J189", "A419", "I10"] * (n // 4)
    cases = pd.DataFrame({"subject_id": range(n), "hadm_id": range(100, 100 + n), "code": codes})
    job = course.artefact("cases")
    cases.to_parquet(job.part / "cases.parquet")
    job.finish()
    for experiment, wrong in (("baseline", 20), ("small_r", 8)):
        settings = {"name": experiment, "r": 32 if experiment == "baseline" else 8}
        job = course.artefact("sft", settings, ["cases"])
        log = pd.DataFrame({"step": range(10), "loss": [1 / (1 + s) for s in range(10)]})
        log.to_csv(job.part / "training_log.csv", index=False)
        job.finish()
        job = course.artefact("answers/sft", {"name": experiment}, ["cases", f"sft@{experiment}"])
        table = cases[["subject_id", "hadm_id"]].assign(sample=0, completion="", think="")
        table["predicted"] = ["I219"] * wrong + codes[wrong:]
        table.to_parquet(job.part / "answers.parquet")
        job.finish()
    return cases


def test_compare_shows_two_trainings_with_paired_intervals(places: Path, monkeypatch) -> None:
    invented_run()
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    table = course.compare("baseline", "small_r", n_boot=200)
    row = table.loc[("sft", "full")]
    assert row["accuracy, baseline"] == 0.5 and row["accuracy, small_r"] == 0.8
    assert row["accuracy, small_r − baseline"].startswith("+0.300 [+")
    assert list(table.index) == [("sft", level) for level in ("chapter", "category", "full")]
    assert len(shown) == 1, "one figure with both training curves"
    assert "[+nan, +nan]" in course.compare("baseline", "small_r", n_boot=0).iloc[0, 2]
    backwards = course.compare("small_r", "baseline", n_boot=200)
    assert backwards.loc[("sft", "full"), "accuracy, baseline − small_r"].startswith("-0.300 [-")
    with pytest.raises(RuntimeError, match="no finished training in common.*baseline, small_r"):
        course.compare("baseline", "nothing")


# ---------------------------------------------------------------------------------------------- set-up


def test_no_room_or_no_right_to_write_stops_before_any_work(places: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(places)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(OSError, match="only 1 MB free.*ICD_RUNS_DIR"):
        course.setup()
    (places / "file").write_text("")
    monkeypatch.setenv("ICD_RUNS_DIR", str(places / "file"))
    with pytest.raises(OSError, match="cannot be written.*ICD_RUNS_DIR"):
        course.setup()


def test_setup_switches_off_what_calls_home_and_says_where_things_are(places: Path) -> None:
    code = (
        "import os, sys\nfrom helpers import course\nprofile, run = course.setup()\n"
        "assert run.is_dir() and profile.name == 'tiny' and 'torch' not in sys.modules\n"
        "for v in ('HF_HUB_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK'):\n"
        "    assert os.environ[v] == '1', v"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and "synthetic" in done.stdout
    assert "Research and teaching only" in done.stdout


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

    code = TransformerManager().transform_cell(SETUP_CELL)
    names: dict = {"get_ipython": lambda: SimpleNamespace(run_line_magic=magic)}
    exec(compile(code, "setup", "exec"), names)
    assert asked == [
        f"pip install -q -c keep.txt -c {{pins}} git+{artefacts.places.REPOSITORY}",
        "pip uninstall -q -y torchao",
    ]
    assert names["pins"] == f"{artefacts.places.REPOSITORY}/raw/main/configs/colab.txt"
    kept = dict(line.split("==") for line in (places / "keep.txt").read_text().splitlines())
    assert list(kept) == ["torch", "numpy", "pandas", "ipywidgets"]
    assert kept["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert names["profile"].name == "tiny" and names["run"] == course.run_dir()
    exec(compile(code, "setup", "exec"), {})  # installed: nothing to do
    assert len(asked) == 2  # and not a second time


@pytest.mark.parametrize(
    ("installs", "newer", "message"),
    [
        (True, True, "Restart: Runtime > Restart session"),
        (False, False, "pip could not install"),
    ],
)
def test_the_setup_cell_says_when_pip_failed_or_a_restart_is_due(
    places: Path, monkeypatch, installs: bool, newer: bool, message: str
) -> None:
    import importlib.metadata
    from types import SimpleNamespace

    import pyarrow  # noqa: F401  a cell above has imported pandas
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.chdir(places)
    real = sys.modules["helpers"]
    monkeypatch.setitem(sys.modules, "helpers", None)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    version = importlib.metadata.version

    def magic(name: str, line: str) -> None:
        if installs:
            sys.modules["helpers"] = real
        if newer:
            monkeypatch.setattr(
                importlib.metadata, "version", lambda name: version(name) + ".post1"
            )
            names["version"] = importlib.metadata.version

    names: dict = {"get_ipython": lambda: SimpleNamespace(run_line_magic=magic)}
    code = compile(TransformerManager().transform_cell(SETUP_CELL), "setup", "exec")
    with pytest.raises(RuntimeError, match=message):
        exec(code, names)


COLAB = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
import os
from helpers import course, profiles
profiles.gpu_gb = lambda: 14.6
profile, run = course.setup()
print(profile.name)
os.environ["ICD_PROFILE"] = "t4"
try:
    course.setup()
except RuntimeError as error:
    print(error)
os.environ["ICD_PROFILE"] = "tiny"
print(course.setup()[0].name)
"""


def test_on_colab_the_tiny_profile_is_chosen_and_another_one_asks_for_a_restart(
    places: Path, monkeypatch
) -> None:
    monkeypatch.delenv("ICD_PROFILE")
    done = subprocess.run([sys.executable, "-c", COLAB], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "%env ICD_PROFILE=t4" in done.stdout and "\ntiny\n" in done.stdout
    assert "set up for the profile 'tiny': 't4' would take effect only in part" in done.stdout
    assert done.stdout.endswith("tiny\n")


def test_beside_colab_the_setup_cell_installs_nothing_and_says_what_to_do(monkeypatch) -> None:
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.setitem(sys.modules, "helpers", None)
    code = compile(TransformerManager().transform_cell(SETUP_CELL), "setup", "exec")
    says = r"helpers.*choose the kernel of \.venv, or install the course"
    with pytest.raises(ModuleNotFoundError, match=says):
        exec(code, {"get_ipython": None})


def test_the_setup_cell_passes_the_linter(root: Path) -> None:
    cell = nbformat.v4.new_code_cell(SETUP_CELL + "\nprint(profile, run)")
    source = nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "notebooks/00.ipynb", "-"]
    done = subprocess.run(command, cwd=root, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_files_of_the_reader_in_the_synthetic_folder_are_not_deleted(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("data", {"admissions": 5})
    download = course.data_dir() / "hosp" / "admissions.csv"
    download.write_text("a download of the reader's\n")
    for fresh in ("", "1"):
        monkeypatch.setenv("FRESH", fresh)
        with pytest.raises(ValueError, match="it was changed since.*a folder of their own"):
            course.artefact("data", {"admissions": 5})
    assert download.read_text() == "a download of the reader's\n"


def test_blanks_around_a_folder_in_the_environment_do_not_count(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICD_RUNS_DIR", f" {places / 'runs'}\r")
    assert course.run_dir() == places / "runs" / "synthetic-tiny"
    monkeypatch.setenv("ICD_RUNS_DIR", " ")
    assert course.run_dir().parent.name == "runs"
