"""The privacy guard: what a tired student or an attacker might commit is refused, what ships passes.

Each case is built in a git repository of its own, and the guard is run there as pre-commit runs it.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from helpers import hospital
from tools import privacy_guard as guard
from tools import privacy_proof as proof

ROOT = Path(__file__).parent.parent
BLANK = "_" * 3
# Of the right form, drawn at random for this test; nobody has them.
SUBJECT, STAY = str(10_000_000 + 7_654_321), str(20_000_000 + 8_765_432)
SYNTHETIC_LINES = (
    "profile  tiny: any laptop\n"
    "data     data/synthetic: synthetic patients\n"
    "run      runs/synthetic-tiny\n"
)
REAL_LINES = SYNTHETIC_LINES.replace(
    "data/synthetic: synthetic patients", "mimic-iv: your own data"
)
NOTE = (
    f"Name:  {BLANK}    Unit No:   {BLANK}\nAdmission Date:  {BLANK}   Discharge Date:   {BLANK}\n"
    f"{BLANK}yo M w/ chest pain, seen by Dr. {BLANK} at {BLANK} on {BLANK}. Followup: {BLANK}\n"
)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with an empty list of allowed files."""
    folder = tmp_path / "course"
    (folder / "tools").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / guard.ALLOWED).write_text(proof.HEADER)
    git(folder, "add", "-A")
    return folder


def add(folder: Path, name: str, content: str | bytes | dict) -> Path:
    """Write a file and put it into the index, whatever .gitignore says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git(folder, "add", "-f", name)
    return path


def run(folder: Path, *names: str) -> tuple[int, str]:
    """Exit status and words of the guard, in a Python that sees nothing of the course."""
    command = [sys.executable, "-I", str(ROOT / "tools" / "privacy_guard.py"), *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def notebook(*cells: str, lines: str = SYNTHETIC_LINES) -> dict[str, Any]:
    """An executed notebook: the set-up cell, then one cell for each text that is shown."""
    shown = [lines, *cells]
    code = []
    for number, text in enumerate(shown):
        output = nbformat.v4.new_output("stream", name="stdout", text=text)
        cell = nbformat.v4.new_code_cell("print()", outputs=[output], execution_count=number + 1)
        code.append(cell | {"id": f"x-{number:02d}"})
    return json.loads(json.dumps(nbformat.v4.new_notebook(cells=code)))


def hospital_of(folder: Path) -> proof.Hospital:
    return proof.Hospital(folder, "a" * 64, "python -m helpers.hospital", frozenset(), frozenset())


def stamped(book: dict[str, Any]) -> dict[str, Any]:
    book = copy.deepcopy(book)
    proof.stamp(book, hospital_of(Path("data/synthetic")))
    return book


def table(write: Callable[[pd.DataFrame, Path], None], path: Path) -> bytes:
    write(pd.DataFrame({"code": ["I21.4"]}), path)
    return path.read_bytes()


# ------------------------------------------------------------------------------------ the repository


def test_everything_that_is_in_the_repository_passes() -> None:
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    status, text = run(ROOT)
    assert status == 0, text


def test_it_looks_at_all_that_git_tracks() -> None:
    index = guard.staged(ROOT)
    guard.check(index, index)
    assert len(index) > 200, "it looked at nothing"


def test_every_allowed_file_is_there_and_every_limit_is_used() -> None:
    index = guard.staged(ROOT)
    allowed = guard.read_allowed(index[guard.ALLOWED].decode())
    assert set(allowed.values()) <= set(index), "an entry of a file that is gone"
    for name, (limit, reason) in guard.INVENTED_NOTES.items():
        blanks = len(guard.BLANK.findall(index[name].decode()))
        assert guard.FEW_BLANKS < blanks <= limit < blanks + 10, f"{name}: {blanks} of {limit}"
        assert reason


# --------------------------------------------------------------- `git add -A` after a run on MIMIC-IV


@pytest.mark.parametrize(
    "name",
    [
        "data/cases.csv",
        "data/mimic-iv/hosp/patients.csv.gz",
        "Data/notes.md",
        "runs/mimic-iv-gpu24/sft/README.md",
        "runs/mimic-iv-gpu24/made_from.json",
        "models/my-adapter/README.md",
        "physionet.org/files/mimiciv/3.1/hosp/index.md",
        "notebooks/.ipynb_checkpoints/01-checkpoint.ipynb",
        "mimic/.making/sft.part/x.md",
        "wandb/latest/config.yaml",
        "discharge.csv.gz",
        "my/folder/DISCHARGE.CSV",
        "diagnoses_icd.csv",
        "notes/discharge (1).csv.gz",
        "radiology-copy.csv",
        "hosp/admissions.csv.zip",
    ],
)
def test_places_and_names_of_data_are_refused_whatever_is_in_them(
    repository: Path, name: str
) -> None:
    add(repository, name, "nothing\n")
    status, text = run(repository)
    assert status == 1 and f"{name}: " in text and "git rm --cached" in text


def test_the_allow_list_opens_no_forbidden_place(repository: Path) -> None:
    content = "a,b\n1,2\n"
    line = f"{guard.sha256(content.encode())}  data/x.csv\n"
    add(repository, guard.ALLOWED, f"# reason\n{line}")
    add(repository, "data/x.csv", content)
    add(repository, "x.csv", content)
    status, text = run(repository)
    assert status == 1 and "data/x.csv: lies in data/" in text and "\nx.csv" not in text


def test_a_whole_run_that_was_put_somewhere_else_is_refused(repository: Path) -> None:
    # ICD_RUNS_DIR=out: none of the places that git ignores
    names = ["made_from.json", "training_log.csv", "report.html", "atlas.html", "figures/f1.png"]
    for name in names:
        add(repository, f"out/mimic-iv-gpu24/{name}", b"\x89PNG\0" if "png" in name else "{}")
    status, text = run(repository)
    assert status == 1
    assert [name for name in names if f"out/mimic-iv-gpu24/{name}: " not in text] == []
    assert "5 of 6 files refused" in text


def test_a_repository_inside_this_one_is_refused(repository: Path) -> None:
    inner = repository / "notes"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "x.md").write_text("x")
    git(inner, "add", "-A")
    git(inner, "commit", "-qm", "x")
    git(repository, "add", "notes")
    status, text = run(repository)
    assert status == 1 and "notes: is a repository of its own" in text


# ------------------------------------------------------------ figures, tables, pages, adapters, archives


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("docs/f1.png", lambda p: b"\x89PNG\r\n\x1a\n\0\0"),
        ("docs/f1.PNG", lambda p: b"\x89PNG\r\n\x1a\n\0\0"),
        ("docs/f1.svg", lambda p: b"<svg>a note</svg>"),
        ("docs/atlas.html", lambda p: b"<html>cases</html>"),
        ("docs/report.pdf", lambda p: b"%PDF-1.7\n\0"),
        ("results/answers.parquet", lambda p: table(pd.DataFrame.to_parquet, p)),
        ("results/answers.csv", lambda p: b"case,answer\n1,I21.4\n"),
        ("results/answers.jsonl", lambda p: b'{"completion": "chest pain"}\n'),
        ("results/answers.tsv", lambda p: b"case\tanswer\n"),
        ("results/metrics.json", lambda p: b"{}"),
        ("results/notes.txt", lambda p: b"chest pain since this morning"),
        ("results/run.log", lambda p: b"step 1"),
        ("results/adapter/adapter_model.safetensors", lambda p: b"\x10\0\0\0\0\0\0\0{}"),
        ("results/adapter/adapter_model.bin", lambda p: b"PK\x03\x04"),
        ("results/model.gguf", lambda p: b"GGUF\x03\0\0\0"),
        ("results/model.pt", lambda p: b"\x80\x02"),
        # under another name
        ("docs/weights.md", lambda p: b"\x10\0\0\0\0\0\0\0{}"),
        ("tools/table.py", lambda p: table(pd.DataFrame.to_parquet, p)),
        ("docs/notes.md", lambda p: "chest pain".encode("utf-16")),
        ("LICENSE", lambda p: b"\x1f\x8b\x08\0"),
        ("results/run", lambda p: b"no ending at all"),
    ],
)
def test_what_programs_write_is_refused_unless_it_is_allowed(
    repository: Path, tmp_path: Path, name: str, make: Callable[[Path], bytes]
) -> None:
    content = make(tmp_path / "made")
    add(repository, name, content)
    status, text = run(repository)
    assert status == 1 and f"{name}: is " in text and "tools.privacy_proof" in text
    add(repository, guard.ALLOWED, f"# reason\n{guard.sha256(content)}  {name}\n")
    assert run(repository) == (0, "")
    add(repository, name, content + b"1")
    status, text = run(repository)
    assert status == 1 and "not the content that was allowed" in text


def test_archives_and_arrays_are_refused(repository: Path) -> None:
    with zipfile.ZipFile(repository / "x.zip", "w") as archive:
        archive.writestr("note.txt", "chest pain")
    np.savez(repository / "x.npz", a=np.zeros(2))
    git(repository, "add", "-f", "x.zip", "x.npz")
    status, text = run(repository)
    assert status == 1 and "x.zip: is not plain text" in text and "x.npz: is not plain text" in text


def test_a_list_of_allowed_files_that_says_no_reason_is_an_error(repository: Path) -> None:
    add(repository, guard.ALLOWED, f"{'a' * 64}  x.csv\n")
    status, text = run(repository)
    assert status == 2 and "line 1" in text and "says why" in text


def test_line_ends_of_windows_are_the_same_content(repository: Path) -> None:
    add(repository, guard.ALLOWED, f"# reason\n{guard.sha256(b'a,b' + bytes([10]))}  x.csv\n")
    git(repository, "config", "core.autocrlf", "false")
    add(repository, "x.csv", b"a,b\r\n")
    assert run(repository) == (0, "")


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("docs/example.md", NOTE, f"blanks of de-identification ({BLANK})"),
        ("tests/test_new.py", f'NOTE = """{NOTE}"""\n', "blanks of de-identification"),
        ("tests/test_notes.py", NOTE * 5, "blanks of de-identification"),
        ("docs/old.md", "Seen by [**First Name**] [**Last Name**] " * 4, "blanks"),
        ("docs/case.md", f"| subject_id | hadm_id |\n|--|--|\n| {SUBJECT} | {STAY} |\n", SUBJECT),
        ("tools/fix.py", f"skip = cases.hadm_id != {STAY}\n", STAY),
        ("docs/case.yaml", f"note: {SUBJECT}-DS-12\n", SUBJECT),
        ("docs/list.md", "\n".join(str(int(STAY) + 7 * n) for n in range(9)), STAY),
        ("docs/figure.md", "![f](data:image/png;base64," + "iVBORw0K" * 400 + ")", "encoded block"),
        ("tools/blob.py", "BLOB = '''\n" + ("Qk1G" * 19 + "\n") * 60 + "'''\n", "encoded block"),
        ("helpers/big.yaml", "- word\n" * 50_000, "nobody writes that by hand"),
    ],
)
def test_text_with_marks_of_real_notes_is_refused(
    repository: Path, name: str, text: str, what: str
) -> None:
    add(repository, name, text)
    status, said = run(repository)
    assert status == 1 and f"{name}: has " in said and what in said


@pytest.mark.parametrize(
    "text",
    [
        f"MIMIC writes {BLANK} in place of a name, as in 'Dr. {BLANK}'.",
        "subject_id 10004066 and hadm_id 20000010 are of the synthetic hospital",
        "subject_id is a number; the release is of 20261101, another of 2026-10-18",
        f"{21_016_918} tokens in all, then 17614.0 and 12345678.5",
        "snake___case = 1; ____ = 2  # hadm_id",
        f"sha256 {'0123456789abcdef' * 4}",
    ],
)
def test_honest_text_passes(repository: Path, text: str) -> None:
    add(repository, "docs/page.md", text)
    assert run(repository) == (0, "")


# ------------------------------------------------------------------------------------------ notebooks


def test_a_notebook_without_outputs_passes(repository: Path) -> None:
    book = notebook()
    for cell in book["cells"]:
        cell["outputs"] = []
    add(repository, "x.ipynb", book)
    assert run(repository) == (0, "")


def test_outputs_without_proof_are_refused_even_if_they_look_synthetic(repository: Path) -> None:
    add(repository, "solutions/x.ipynb", notebook("fine"))
    status, text = run(repository)
    assert status == 1 and "2 of 2 cells show outputs without proof: x-00, x-01" in text
    assert "nbstripout solutions/x.ipynb" in text and "privacy_proof solutions/x.ipynb" in text


def test_outputs_with_proof_pass(repository: Path) -> None:
    add(repository, "x.ipynb", stamped(notebook("fine")))
    assert run(repository) == (0, "")


def test_a_run_on_real_data_in_jupyterlab_is_refused_though_the_old_stamp_is_there(
    repository: Path,
) -> None:
    book = stamped(notebook("fine"))
    real = notebook(f"subject_id {SUBJECT}\n{NOTE}", lines=REAL_LINES)
    book["cells"] = real["cells"]  # JupyterLab keeps the metadata
    add(repository, "x.ipynb", book)
    status, text = run(repository)
    assert status == 1 and "without proof: x-00, x-01" in text
    assert "other data than the synthetic (your own data)" in text and SUBJECT in text


def test_one_cell_that_was_executed_again_loses_its_proof(repository: Path) -> None:
    # The set-up cell still says "synthetic patients"; a later cell set ICD_DATA_DIR
    book = stamped(notebook("fine", "also fine"))
    book["cells"][2]["outputs"][0]["text"] = "a note"
    add(repository, "x.ipynb", book)
    status, text = run(repository)
    assert status == 1 and "1 of 3 cells show outputs without proof: x-02" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda book: book["cells"][0].update(attachments={"f.png": {"image/png": "aaaa"}}),
        lambda book: book["metadata"].update(widgets={"state": {"x": {"value": "a note"}}}),
        lambda book: book["cells"][0]["metadata"].update(kept="chest pain " * 200),
        lambda book: book["metadata"].update(kept="chest pain " * 200),
        lambda book: book["metadata"][guard.STAMP].update(sha256="b" * 64),
        lambda book: book["metadata"][guard.STAMP].update(sha256=""),
        lambda book: book["cells"][0].update(source="# " + NOTE),
        lambda book: book["cells"][0].update(
            source="![x](data:image/png;base64," + base64.b64encode(bytes(3000)).decode()
        ),
    ],
)
def test_other_places_of_a_notebook_are_looked_at(
    repository: Path, change: Callable[[dict], None]
) -> None:
    book = stamped(notebook("fine"))
    change(book)
    add(repository, "x.ipynb", book)
    status, text = run(repository)
    assert status == 1 and "x.ipynb: " in text


def test_the_proof_survives_what_jupyter_does_when_it_saves(repository: Path) -> None:
    book = notebook("first\n")
    stream = book["cells"][1]["outputs"][0]
    book["cells"][1]["outputs"].append(copy.deepcopy(stream) | {"text": "second\n"})
    book = stamped(book)
    joined = copy.deepcopy(book)
    joined["cells"][1]["outputs"] = [stream | {"text": ["first\n", "second\n"]}]
    joined["cells"][1]["execution_count"] = 99
    joined["cells"][0]["metadata"] = {"tags": ["setup"]}
    joined["cells"].insert(0, {"id": "t", "cell_type": "markdown", "metadata": {}, "source": "Hi"})
    add(repository, "x.ipynb", joined)
    assert run(repository) == (0, "")


def test_what_is_no_notebook_is_refused(repository: Path) -> None:
    for number, content in enumerate(("{", "[]", '{"cells": [{}]}', '{"cells": 1}', "\xff")):
        add(repository, f"x{number}.ipynb", content)
    status, text = run(repository)
    assert status == 1 and text.count("is no notebook that can be read") == 5


# ------------------------------------------------------------------------------- the index, and names


def test_the_index_counts_and_not_the_disk(repository: Path) -> None:
    path = add(repository, "x.ipynb", notebook("a note", lines=REAL_LINES))
    path.write_text("{}")  # too late: git would commit what was added
    assert run(repository)[0] == 1
    path.unlink()
    assert run(repository)[0] == 1
    add(repository, "x.ipynb", stamped(notebook("fine")))
    path.write_text(json.dumps(notebook("a note", lines=REAL_LINES)))  # as nbstripout leaves it
    assert run(repository) == (0, "")
    assert run(repository, "x.ipynb") == (0, "")


def test_named_files_alone_are_looked_at(repository: Path) -> None:
    add(repository, "docs/f 1.png", b"\0")
    add(repository, "docs/page.md", "fine")
    assert run(repository, "docs/page.md") == (0, "")
    status, text = run(repository / "docs", "f 1.png", "page.md")
    assert status == 1 and "docs/f 1.png: " in text and "1 of 2 files refused" in text
    (repository / "new.csv").write_text("a,b\n")  # not tracked yet
    assert run(repository, "new.csv")[0] == 1
    status, text = run(repository, "nowhere.md")
    assert status == 2 and "nowhere.md" in text


def test_outside_of_git_it_does_not_say_yes(tmp_path: Path) -> None:
    status, text = run(tmp_path)
    assert status == 2 and "git" in text


# ------------------------------------------------------------------------------------------- the proof


@pytest.fixture(scope="module")
def small_hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof") / "data" / "synthetic"
    return hospital.write(folder, admissions=60, seed=1, reading=1.0)


def test_a_hospital_is_proven_by_writing_it_again(small_hospital: Path, tmp_path: Path) -> None:
    source = proof.prove(small_hospital)
    assert len(source.sha256) == 64 and "--admissions 60 --seed 1 --reading 1.0" in source.command
    assert len([n for n in source.ids if n.startswith("2")]) >= 60
    disguised = shutil.copytree(small_hospital, tmp_path / "synthetic")
    notes = pd.read_csv(disguised / "note/discharge.csv.gz")
    notes.loc[3, "text"] = NOTE
    notes.to_csv(disguised / "note/discharge.csv.gz", index=False)
    with pytest.raises(ValueError, match=r"not what helpers\.hospital writes .*note/discharge"):
        proof.prove(disguised)
    (disguised / "truth/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no synthetic hospital"):
        proof.prove(disguised)


def test_one_more_table_beside_the_synthetic_ones_is_no_synthetic_hospital(
    small_hospital: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_hospital, tmp_path / "synthetic")
    (folder / "note/radiology.csv").write_text("note_id,text\n")
    with pytest.raises(ValueError, match="note/radiology"):
        proof.prove(folder)


@pytest.fixture
def proven(repository: Path, small_hospital: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives proofs in the repository; returns what was refused."""
    source = proof.prove(small_hospital)
    shown = str(small_hospital)

    def give(name: str, **options: Any) -> list[str]:
        path = repository / name
        text = path.read_bytes().replace(b"data/synthetic:", f"{shown}:".encode())
        path.write_bytes(text)
        return proof.give([path], repository, source, **options)

    return give


def test_outputs_of_the_hospital_get_a_stamp(repository: Path, proven: Any) -> None:
    note = (
        pd.read_csv(proven.__closure__[2].cell_contents.folder / "note/discharge.csv.gz")
        if 0
        else None
    )
    assert note is None
    add(repository, "x.ipynb", notebook("Admission, discharge and chest pain"))
    add(
        repository,
        "docs/words.md",
        "profile tiny any laptop data run runs patients tmp pytest proof",
    )
    assert proven("x.ipynb") == []
    git(repository, "add", "-A")
    assert run(repository) == (0, "")


@pytest.mark.parametrize(
    ("lines", "cell", "what"),
    [
        (REAL_LINES, "fine", "other data than the synthetic"),
        ("", "fine", "no set-up cell"),
        (SYNTHETIC_LINES.replace("data/synthetic:", "elsewhere/synthetic:"), "", "elsewhere"),
        (SYNTHETIC_LINES, f"hadm_id {STAY}", "numbers that nobody has"),
        (
            SYNTHETIC_LINES,
            "zebra quokka wombat dingo numbat koala",
            "stand neither in the hospital",
        ),
    ],
)
def test_no_stamp_where_something_speaks_against_it(
    repository: Path, proven: Any, lines: str, cell: str, what: str
) -> None:
    path = add(repository, "x.ipynb", notebook(cell, lines=lines))
    refused = proven("x.ipynb")
    assert any(what in reason for reason in refused), refused
    assert guard.STAMP not in json.loads(path.read_text())["metadata"]


def test_files_are_listed_with_a_reason_and_pictures_are_vouched_for(
    repository: Path, proven: Any
) -> None:
    add(repository, "docs/f.png", b"\x89PNG\0")
    add(repository, "results/t.csv", "admission,discharge\n1,2\n")
    assert "--vouch" in proven("docs/f.png", reason="figures")[0]
    with pytest.raises(ValueError, match="--reason"):
        proven("results/t.csv")
    assert proven("docs/f.png", reason="figures", vouch=True) == []
    assert proven("results/t.csv", reason="tables") == []
    git(repository, "add", "-A")
    assert run(repository) == (0, "")
    text = (repository / guard.ALLOWED).read_text()
    assert text.startswith(proof.HEADER) and "\n# figures\n" in text and "\n# tables\n" in text
    (repository / "docs/f.png").unlink()
    add(repository, "results/t.csv", "admission,discharge\n1,3\n")
    assert proven("results/t.csv") == [], "the reason is kept from the last time"
    text = (repository / guard.ALLOWED).read_text()
    assert "figures" not in text and text.count("results/t.csv") == 1, "what is gone goes"


def test_nothing_in_a_forbidden_place_is_proven(repository: Path, proven: Any) -> None:
    add(repository, "runs/x/f.png", b"\0")
    assert "lies in runs/" in proven("runs/x/f.png", reason="x", vouch=True)[0]


# --------------------------------------------------------------------------------- the hooks themselves


def test_the_hook_runs_the_guard_over_everything_and_needs_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [each["repo"] for each in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks.values())
    own = hooks["privacy-guard"]
    assert own["always_run"] and not own["pass_filenames"]
    assert own["entry"].split()[1] == "tools/privacy_guard.py"
    assert (
        {"pre-commit", "pre-push"}
        <= set(own["stages"])
        <= set(config["default_install_hook_types"])
    )


def with_hooks(repository: Path) -> None:
    """The course's hooks, switched on in a repository."""
    pytest.importorskip("pre_commit", reason="pre-commit is not installed: make guard")
    for name in (".pre-commit-config.yaml", "pyproject.toml", "tools/privacy_guard.py"):
        add(repository, name, (ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pre_commit", "install"]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)


def commit(repository: Path) -> subprocess.CompletedProcess[str]:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "x"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of ruff
    options = {"cwd": repository, "env": os.environ | {"PATH": path}}
    return subprocess.run(command, **options, capture_output=True, text=True, check=False)


def test_a_commit_is_really_refused(repository: Path) -> None:
    with_hooks(repository)
    add(repository, "docs/f.png", b"\x89PNG\0")
    done = commit(repository)
    assert done.returncode == 1 and "docs/f.png: is not plain text" in done.stderr + done.stdout
    git(repository, "rm", "-q", "--cached", "docs/f.png")
    assert commit(repository).returncode == 0
    assert (repository / "docs/f.png").is_file(), "it stays on the disk"


def test_nbstripout_lets_a_reader_commit_without_outputs(repository: Path) -> None:
    pytest.importorskip("nbstripout", reason="nbstripout is not installed: make guard")
    with_hooks(repository)
    command = [sys.executable, "-m", "nbstripout", "--install"]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    path = add(repository, "x.ipynb", notebook("a note", lines=REAL_LINES))
    done = commit(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a note" not in git(repository, "show", "HEAD:x.ipynb")
    assert "a note" in path.read_text(), "the reader's own file keeps its outputs"
