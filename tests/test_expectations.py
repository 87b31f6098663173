"""What a student expects: kept as it was written, shown again, and harmless whatever it is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from exercises import core, expectations, sheet
from helpers.machinery import places as where
from tools import insert_exercises

ROOT = Path(__file__).parent.parent
QUESTION = "What will GRPO change?"
EVIL = "<script>alert('gone')</script> & <img src=x onerror=alert(1)></pre>\n$x$ é 😀"
KEYS = list(expectations.questions())


@pytest.fixture
def run(places: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run folder."""
    for name in core.STRICT:
        monkeypatch.delenv(name, raising=False)
    folder = where.run_dir()
    folder.mkdir(parents=True)
    return folder


def parts(box: Any) -> tuple[Any, Any, Any]:
    """The text area, the button and the line of state of a box."""
    area, row = box.children
    button, state = row.children
    return area, button, state


def shown(capsys: pytest.CaptureFixture[str], call: Callable[..., None], *arguments: str) -> str:
    """What a call prints where no kernel runs."""
    call(*arguments)
    return capsys.readouterr().out


# ------------------------------------------------------------------------------- the box


def test_what_is_saved_is_in_the_box_and_beside_the_result_again(run: Path, capsys) -> None:
    area, button, state = parts(expectations.box("04", QUESTION))
    assert (area.value, state.value) == ("", "")
    area.value = "The codes.\nThe format stays."
    assert state.value == "Not saved yet."
    assert not expectations.file().exists()
    button.click()
    assert state.value.startswith("Saved 2") and str(expectations.FILE) in state.value
    again, _, state = parts(expectations.box("04", QUESTION))
    assert again.value == "The codes.\nThe format stays." and state.value.startswith("Saved 2")
    text = shown(capsys, expectations.recall, "04")
    assert text == f"You expected: {QUESTION}\nThe codes.\nThe format stays.\n"
    other, _, _ = parts(expectations.box("05", "And the trie?"))
    assert other.value == ""


def test_every_version_is_kept_with_its_time(run: Path) -> None:
    area, button, _ = parts(expectations.box("04", QUESTION))
    for text in ("first", "second", "second"):
        area.value = text
        button.click()
    expectations.save("05", "And the trie?", "nothing")
    entries = expectations.read()
    assert [version.text for version in entries["04"].versions] == ["first", "second"]
    assert entries["04"].text == "second" and entries["05"].text == "nothing"
    moment = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"
    assert all(re.fullmatch(moment, each.saved) for each in entries["04"].versions)
    minute = r"20\d\d-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(f"{minute}, changed {minute}", entries["04"].history())
    assert re.fullmatch(minute, entries["05"].history())
    assert [each.name for each in run.iterdir()] == [expectations.FILE], "half a file was left"


def test_an_empty_box_saves_nothing_and_loses_nothing(run: Path) -> None:
    area, button, state = parts(expectations.box("04", QUESTION))
    area.value = " \n"
    button.click()
    assert "The box is empty" in state.value and not expectations.file().exists()
    area.value = "more"
    button.click()
    area.value = ""
    button.click()
    assert "The box is empty" in state.value and expectations.read()["04"].text == "more"


def test_one_set_of_expectations_for_a_run_folder(run: Path, monkeypatch) -> None:
    expectations.save("04", QUESTION, "here")
    monkeypatch.setenv("ICD_RUNS_DIR", str(run.parent / "others"))
    assert expectations.read() == {}
    with pytest.raises(FileNotFoundError, match="run the first cell"):
        expectations.save("04", QUESTION, "there")
    assert not where.run_dir().exists(), "the run that ships would not be taken any more"


def test_a_failed_save_is_said_in_the_notebook(run: Path, monkeypatch) -> None:
    area, button, state = parts(expectations.box("04", QUESTION))
    area.value = "more"

    def full(path: Path, content: Any) -> Path:
        raise OSError(28, "No space <left> on device")

    monkeypatch.setattr(where, "write", full)
    button.click()
    assert state.value.startswith("Not saved.") and "No space &lt;left&gt;" in state.value


@pytest.mark.parametrize("key", ["", " ", 4, None])
def test_a_key_is_a_text(run: Path, key: object) -> None:
    for call in (lambda: expectations.write(key, QUESTION), lambda: expectations.recall(key)):
        with pytest.raises(ValueError, match='a text such as "04"'):
            call()


def test_only_the_first_process_of_a_launch_speaks(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(capsys, expectations.write, "04", QUESTION) == ""
    assert shown(capsys, expectations.recall, "04") == ""


# ------------------------------------------------------------------------------- what a student may write


def test_no_text_does_harm(run: Path) -> None:
    area, button, state = parts(expectations.box("04", EVIL))
    area.value = EVIL
    button.click()
    entry = expectations.read()["04"]
    assert entry.text == EVIL and entry.question == EVIL
    pages = [
        expectations.asked_html(EVIL, entry),
        expectations.recalled_html(entry, "<b>when</b>"),
        state.value,
    ]
    for page in pages:
        assert not re.search(r"<(script|img)|</pre>\n", page), page
    for page in pages[:2]:
        assert "&lt;script&gt;" in page and "$x$ é 😀</pre>" in page
    lines = "\n".join(sheet.expected())
    outside = re.sub(r"```text.*?```", "", lines, flags=re.S)
    assert "<script" not in outside and EVIL in lines


def test_a_fence_in_a_text_does_not_end_the_fence_around_it(run: Path) -> None:
    expectations.save("04", QUESTION, "```\n# not a heading\n```")
    assert "````text\n```\n# not a heading\n```\n````" in "\n".join(sheet.expected())


DAMAGE = {
    "cut off": b'{"04": {"question": "What',
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "no versions": b'{"04": {"question": "q", "versions": []}}',
    "no question": b'{"04": {"versions": [{"text": "t", "saved": "s"}]}}',
    "a number": b'{"04": {"question": "q", "versions": [{"text": 4, "saved": "s"}]}}',
    "null": b"null",
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_stays_as_it_is(run: Path, content: bytes) -> None:
    area, button, state = parts(expectations.box("04", QUESTION))
    expectations.file().write_bytes(content)
    for call in (
        lambda: expectations.write("04", QUESTION),
        lambda: expectations.box("04", QUESTION),
        lambda: expectations.recall("05"),
        lambda: expectations.save("05", QUESTION, "text"),
    ):
        with pytest.raises(ValueError, match=r"expectations\.json is damaged .* left as it is"):
            call()
    area.value = "more"
    button.click()
    assert state.value.startswith("Not saved.") and "is damaged" in state.value
    assert "is damaged" in "\n".join(sheet.expected()), "the sheet says so and goes on"
    assert expectations.file().read_bytes() == content


# ------------------------------------------------------------------------------- where no person watches

SOURCES = [
    f"from exercises import expectations\n\nexpectations.write('04', {QUESTION!r})",
    "from exercises import expectations\n\nexpectations.recall('04')",
]


def executed(sources: list[str]) -> tuple[list[list[Any]], bool]:
    """The outputs of these cells in a kernel, and whether the notebook holds widgets."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    return [cell.outputs for cell in notebook.cells], "widgets" in notebook.metadata


def test_headless_the_outputs_are_those_that_the_notebooks_hold(run: Path, monkeypatch) -> None:
    monkeypatch.setenv("ICD_HEADLESS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    question = expectations.Question("04", "04_qlora_grpo", "a", "b", QUESTION)
    known = [cell.outputs for cell in insert_exercises.pair_of(question, {})]
    saving = f"saved = expectations.save('04', {QUESTION!r}, '<b>more</b>')"
    outputs, has_widgets = executed([*SOURCES, saving, *SOURCES])
    assert outputs[:2] == known and not has_widgets
    pages = [cell[0]["data"]["text/html"] for cell in outputs[3:]]
    texts = [cell[0]["data"]["text/plain"] for cell in outputs[3:]]
    assert all("&lt;b&gt;more&lt;/b&gt;" in page for page in pages)
    assert all("<b>more</b>" in text for text in texts)
    for text in (*pages, *texts):
        assert not re.search(r"20\d\d|\d:\d\d", text) and str(run.parent) not in text


def test_with_a_person_the_box_is_a_widget_and_blocks_nothing(run: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in expectations.HEADLESS:
        monkeypatch.delenv(name, raising=False)
    (asked, recalled), has_widgets = executed(SOURCES)
    assert has_widgets
    kinds = [[*output["data"]] for output in asked]
    assert kinds[0] == ["text/html", "text/plain"] and QUESTION in asked[0]["data"]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in kinds[1]
    assert recalled[0]["data"]["text/plain"] == expectations.NOTHING


def test_without_a_kernel_there_is_no_box(run: Path, capsys, monkeypatch) -> None:
    for name in expectations.HEADLESS:
        monkeypatch.delenv(name, raising=False)
    text = shown(capsys, expectations.write, "04", QUESTION)
    assert QUESTION in text and expectations.NO_BOX in text
    assert shown(capsys, expectations.recall, "04") == f"{expectations.NOTHING}\n"


# ------------------------------------------------------------------------------- the sheet


def test_the_sheet_lists_what_was_expected_and_what_was_not(run: Path) -> None:
    expectations.save("04", QUESTION, "The codes, by a tenth.")
    expectations.save("mine", "And my own?", "Yes.")
    text = sheet.page([], "Ada", "runs/x", sheet.expected())
    assert text.count("## What you expected") == 1
    assert f"**04** · {QUESTION} (saved 20" in text and "The codes, by a tenth." in text
    assert "**mine** · And my own?" in text
    missing = ", ".join(key for key in KEYS if key != "04")
    assert text.endswith(f"Not written down: {missing}.\n")


# ------------------------------------------------------------------------------- the cells in the notebooks


def test_each_of_the_notebooks_1_to_7_asks_once() -> None:
    assert [f"{number:02}" for number in range(1, 8)] == KEYS
    for key, question in expectations.questions().items():
        assert question.notebook.startswith(f"{key}_") and question.question.endswith("?")
        assert not re.search(r"\d", question.question), "a digit would be a figure of the notebook"


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """The notebooks of the course with their cells inserted."""
    folder = tmp_path / "copies"
    folder.mkdir()
    for path in (ROOT / "notebooks").glob("0[0-7]_*.ipynb"):
        (folder / path.name).write_bytes(path.read_bytes())
    insert_exercises.main(["--folder", str(folder)])
    return folder


def call_in(source: str) -> tuple[str, ...]:
    """The call that is the last line of a cell: the function and its arguments."""
    call = ast.parse(source).body[-1].value
    return (call.func.attr, *(ast.literal_eval(each) for each in call.args))


def test_the_pair_stands_around_its_result_and_inserting_again_changes_nothing(
    notebooks: Path,
) -> None:
    before = {path.name: path.read_bytes() for path in notebooks.iterdir()}
    insert_exercises.main(["--folder", str(notebooks)])
    assert {path.name: path.read_bytes() for path in notebooks.iterdir()} == before
    for key, question in expectations.questions().items():
        cells = nbformat.read(notebooks / f"{question.notebook}.ipynb", 4).cells
        ids = [cell["id"] for cell in cells]
        ask, again = (ids.index(f"expectation-{key}-{role}") for role in ("write", "recall"))
        assert ids[ask + 1] == question.ask_before and ids[again - 1] == question.recall_after
        assert ask < again
        assert [ids[i] for i in (ask, again)] == [i for i in ids if i.startswith("expectation-")]
        calls = [call_in(cells[place].source) for place in (ask, again)]
        assert calls == [("write", key, question.question), ("recall", key)]
        text = json.dumps([cells[ask].outputs, cells[again].outputs])
        assert "widget" not in text and "/" not in re.sub(r"text/(html|plain)|</\w+>", "", text)


def test_a_cell_that_was_run_stays_so_and_all_other_cells_stay(notebooks: Path) -> None:
    path = notebooks / "02_reasoning_traces.ipynb"
    notebook = nbformat.read(path, 4)
    cells = {cell["id"]: cell for cell in notebook.cells}
    cells["expectation-02-write"].execution_count = 9
    cells["expectation-02-recall"].source += "  # mine"
    cells["expectation-02-recall"].execution_count = 10
    others = [cell for cell in notebook.cells if not insert_exercises.is_ours(cell)]
    nbformat.write(notebook, path)
    insert_exercises.main(["--folder", str(notebooks)])
    after = nbformat.read(path, 4).cells
    counts = {c["id"]: c.execution_count for c in after if c["id"].startswith("expectation-")}
    assert counts == {"expectation-02-write": 9, "expectation-02-recall": None}
    assert [cell for cell in after if not insert_exercises.is_ours(cell)] == others


@pytest.mark.parametrize("lost", ["02-10", "02-14"])
def test_a_missing_place_is_named(lost: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "02_reasoning_traces.ipynb", 4)
    notebook.cells = [cell for cell in notebook.cells if cell["id"] != lost]
    question = expectations.questions()["02"]
    message = f"expectation 02 stands beside the code cell '{lost}', which 02_reasoning_traces"
    with pytest.raises(ValueError, match=message):
        insert_exercises.inserted(notebook, [], False, [question])
