"""Real reports without a credential: the archive's layout, the rule that cuts, the score against several codes, the notebook.

Every report in this file is invented.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import small_course as small

from helpers.machinery import notebooks

NOTEBOOK = small.ROOT / "notebooks" / "08_real_notes.ipynb"
CELLS = nbformat.read(NOTEBOOK, as_version=4).cells
SOURCES = {cell.id: cell.source for cell in CELLS}
READER: dict[str, Any] = {}  # what the cells of the loader and of the rule define
for source in (SOURCES["08-04b"], SOURCES["08-06b"].rpartition("\n\n\n")[0]):
    exec(
        "import re\nimport pandas as pd\nfrom pathlib import Path\nfrom helpers import icd", READER
    )
    exec(source, READER)
admission_note = READER["admission_note"]


def read(folder: str | Path, part: str = "train") -> pd.DataFrame:
    cases = READER["read_reports"](folder, part)
    return cases.assign(note=cases["text"].map(admission_note))


REPORTS = {
    "S0000-1": (
        "A 61-year-old woman came with chest pain.\n"
        "She had been treated for hypertension years ago.\n"
        "The ECG showed ST depression.\n\n"
        "Coronary surgery was performed.\n"
        "She was discharged after a week.\n",
        ["i21.4", "r07.9", "i10"],
    ),
    "S0000-2": (
        "We present a man with a diagnosis of pneumonia.\n"
        "He had fever.\n"
        "He improved with antibiotics.\n",
        ["j18.9"],
    ),
    "S0000-3": ("A boy fell from a tree.\n", ["s72.001a", "r52"]),
}


def archive(folder: Path, part: str = "train") -> Path:
    """An archive in the published layout, with what the loader does not read beside."""
    texts = folder / part / "text_files_en"
    texts.mkdir(parents=True)
    (folder / part / "text_files").mkdir()
    lines = []
    for name, (text, codes) in REPORTS.items():
        (texts / f"{name}.txt").write_text(text, encoding="utf-8")
        (folder / part / "text_files" / f"{name}.txt").write_text("texto", encoding="utf-8")
        lines += [f"{name}\t{code}\n" for code in codes]
    (folder / part / f"{part}D.tsv").write_text("".join(lines), encoding="utf-8")
    (folder / part / f"{part}P.tsv").write_text("S0000-1\t02703ZZ\n", encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("part", ["train", "dev"])
def test_an_archive_is_read_as_cases_with_their_codes(tmp_path: Path, part: str) -> None:
    cases = read(archive(tmp_path, part), part)
    assert list(cases["hadm_id"]) == list(cases["subject_id"]) == list(REPORTS)
    assert list(cases["codes"]) == [["I214", "R079", "I10"], ["J189"], ["S72001A", "R52"]]
    assert cases["note"].iloc[0].splitlines() == [
        "A 61-year-old woman came with chest pain.",
        "She had been treated for hypertension years ago.",
        "The ECG showed ST depression.",
    ]
    assert all(text.startswith(note) for text, note in zip(cases.text, cases.note, strict=True))


def test_the_rule_cuts_at_the_first_later_sentence_that_is_not_about_the_past() -> None:
    for text, kept in (
        ("A.\nBiopsy showed B.\nC.", 1),
        ("A.\nA previous biopsy showed B.\nC.", 3),
        ("A man died.", 1),
        ("A.\n\n \nC.\nThe patient UNDERWENT a scan.", 2),
        ("A.\nNo pathological finding.\nPathology showed B.", 2),
        ("A.\r\nB.\r\nHe was followed up.", 2),
    ):
        note = admission_note(text)
        assert len(note.splitlines()) == kept, text
        assert (
            note.splitlines() == [line.strip() for line in text.splitlines() if line.strip()][:kept]
        )


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def break_nothing_there(root: Path) -> None:
    shutil.rmtree(root / "train")


def break_no_table(root: Path) -> None:
    (root / "train" / "trainD.tsv").unlink()


def break_no_english(root: Path) -> None:
    shutil.rmtree(root / "train" / "text_files_en")


def break_text_missing(root: Path) -> None:
    (root / "train" / "text_files_en" / "S0000-2.txt").unlink()


def break_text_empty(root: Path) -> None:
    (root / "train" / "text_files_en" / "S0000-2.txt").write_text(" \n")


def break_table_cut_off(root: Path) -> None:
    table = root / "train" / "trainD.tsv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:4]))


def break_table_empty(root: Path) -> None:
    (root / "train" / "trainD.tsv").write_text("")


def break_line_without_code(root: Path) -> None:
    rewrite(root / "train" / "trainD.tsv", "S0000-2\tj18.9", "S0000-2")


def break_line_with_procedure(root: Path) -> None:
    rewrite(root / "train" / "trainD.tsv", "j18.9", "bw03zzz")


def break_three_columns(root: Path) -> None:
    rewrite(root / "train" / "trainD.tsv", "j18.9", "j18.9\tpneumonia")


def break_not_utf8(root: Path) -> None:
    (root / "train" / "text_files_en" / "S0000-2.txt").write_bytes(
        "fiebre de 38 \xba".encode("latin-1")
    )


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (break_nothing_there, FileNotFoundError, r"train: no trainD.tsv.*Zenodo, record 3837305"),
        (break_no_table, FileNotFoundError, r"train: no trainD.tsv"),
        (break_no_english, FileNotFoundError, r"text_files_en/"),
        (break_text_missing, ValueError, r"1 cases without a text .*S0000-2.*Unpack"),
        (break_text_empty, ValueError, r"1 cases without a text .*S0000-2"),
        (break_table_cut_off, ValueError, r"1 cases without .*S0000-3"),
        (break_table_empty, ValueError, r"3 cases without"),
        (break_line_without_code, ValueError, r"trainD.tsv, line 4: .*'S0000-2'"),
        (break_line_with_procedure, ValueError, r"trainD.tsv, line 4: .*bw03zzz"),
        (break_three_columns, ValueError, r"trainD.tsv, line 4: .*pneumonia"),
        (break_not_utf8, ValueError, r"S0000-2.txt: not UTF-8"),
    ],
)
def test_a_broken_archive_is_refused_with_the_place(
    tmp_path: Path, damage: Any, kind: type[Exception], says: str
) -> None:
    root = archive(tmp_path)
    read(root)
    damage(root)
    with pytest.raises(kind, match=says):
        read(root)


# -------------------------------------------------------------------------------------------------- the notebook


def defined() -> dict[str, Any]:
    """What the notebook's scoring cell defines, with the imports that it asks for."""
    from helpers import icd

    names = {"pd": pd, "icd": icd}
    cells = [c.source for c in CELLS if c.cell_type == "code"]
    for start in ("LEVELS =", "def hits"):
        (source,) = [source for source in cells if source.startswith(start)]
        if start == "LEVELS =":
            source = source.split("\n\n\n")[0]  # the levels alone
        exec(source, names)
    return names


def test_an_answer_is_right_where_it_is_one_of_the_codes() -> None:
    hits = defined()["hits"]
    codes = [["I214", "R079"], ["I2102"], ["J189"], ["A419", "R52"], ["I10"]]
    right = hits(["i21.4", "I21.4", None, "R52", "nonsense"], codes)
    assert right["full"].tolist() == [True, False, False, True, False]
    assert right["category"].tolist() == [True, True, False, True, False]
    assert right["chapter"].tolist() == [True, True, False, True, False]
    with pytest.raises(ValueError):
        hits(["I10"], codes)


def test_no_constant_answer_beats_the_best_one() -> None:
    names = defined()
    codes = [["I214", "I10"], ["I2102", "I10", "I214"], ["J189", "I10"], ["A419", "J441"]]
    best = names["best_constant"](codes)
    assert best["full"] == ("I10", 0.75) and best["chapter"] == (9, 0.75)
    for code in {code for given in codes for code in given} | {"Z000"}:
        shares = names["hits"]([code] * len(codes), codes).mean()
        assert all(shares[level] <= best[level][1] for level in best)


def test_the_notebook_is_optional_says_so_and_holds_no_report() -> None:
    head = CELLS[0].source
    assert "**Optional.**" in head.splitlines()[4] and "you download yourself" in head
    assert any("Creative Commons Attribution 4.0" in cell.source for cell in CELLS)
    assert not any(cell.get("outputs") for cell in CELLS)
    assert NOTEBOOK.stem not in notebooks.names()
    every = sorted(path.stem for path in NOTEBOOK.parent.glob("*.ipynb"))
    assert [*notebooks.names(), NOTEBOOK.stem] == every, "a notebook is never run"
    assert notebooks.names(NOTEBOOK.stem) == [NOTEBOOK.stem]
    makefile = (small.ROOT / "Makefile").read_text()
    assert f"$(if $(ICD_CODIESP_DIR),,--ignore=notebooks/{NOTEBOOK.name})" in makefile


def test_without_the_archive_the_notebook_stops_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICD_CODIESP_DIR", str(tmp_path / "none"))
    cells = [c.source for c in CELLS if c.cell_type == "code"]
    place, loader, reading = cells[1:4]
    names: dict[str, Any] = {}
    exec(place, names)
    exec(loader, names)
    with pytest.raises(FileNotFoundError, match="none/train: no trainD.tsv.*Download CodiEsp"):
        exec(reading, names)
    assert "cases" not in names, "nothing is made before"


@pytest.mark.slow
def test_the_notebook_runs_on_an_archive_of_this_layout(tmp_path: Path) -> None:
    """After trainings of a few steps; the models answer at random, which is enough to go through."""
    root = tmp_path / "course"
    small.prepare(root)
    for name in ("03_lora_sft", "04_qlora_grpo"):
        small.copy_notebook(root, name)
        small.course(root, "run", "--only", name)
    shutil.copy(NOTEBOOK, root / "notebooks")
    place = str(archive(tmp_path / "codiesp"))
    said = small.course(root, "run", "--only", NOTEBOOK.stem, ICD_CODIESP_DIR=place)
    run = small.run_folder(root)
    for name in ("tiny sft", "tiny grpo"):
        answers = pd.read_parquet(run / "real_notes" / name / "answers.parquet")
        assert list(answers["hadm_id"]) == list(REPORTS), said
    executed = nbformat.read(run / "notebooks" / NOTEBOOK.name, as_version=4)
    text = "".join(
        out.get("text", "") for cell in executed.cells for out in cell.get("outputs", [])
    )
    assert "notebook 8: all checks passed" in text and "3 reports, 2.0 codes each" in text


def test_the_training_part_of_the_real_archive_is_read_whole() -> None:
    place = os.environ.get("ICD_CODIESP_DIR")
    if not place:
        pytest.skip("ICD_CODIESP_DIR names no archive of CodiEsp, which a reader downloads himself")
    cases = read(place)
    assert len(cases) == 500 and cases["codes"].map(len).mean() > 10
    shares = cases["note"].map(len) / cases["text"].map(len)
    assert shares.median() < 0.5 and cases["note"].map(len).min() > 0
