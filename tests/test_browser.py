"""The explorer as a reader meets it: a real JupyterLab in a real headless Chromium, clicked through and photographed.

Screenshots are left in build/test/screenshots, for eyes. Nothing here leaves the machine, and the test sees to it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pandas as pd
import pytest

from helpers import explorer, hospital, icd, notes, prompts
from helpers.machinery import places

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
NOT_SEEN_TO_PASS = pytest.mark.skip(
    reason="rewritten with the explorer and not yet seen to pass in a browser: run it by hand, then unmark it"
)
WAIT = 240_000  # ms: cores may be busy with a training
HOSTILE = (
    '<script>window.owned = 1; alert(1)</script><img src=x onerror="window.owned = 2; alert(2)">'
)
NUMBERS = {9: 7, 10: 6, 11: 4}  # chapter -> cases: 17 in all
NOTEBOOK = [
    """import pandas as pd
from IPython.display import HTML

from helpers import explorer

cases = pd.read_parquet("cases.parquet")
answers = {name: pd.read_parquet(f"{name}.parquet") for name in ("base", "sft", "grpo")}""",
    "explorer.explore(cases, answers)",
    "HTML(explorer.case_html(cases.iloc[1], answers))",
]


@dataclass
class Lab:
    url: str
    token: str
    folder: Path
    cases: pd.DataFrame
    attempts: Path  # what a Python process of it tried to send off the machine


def invented() -> pd.DataFrame:
    """Cases of a synthetic hospital whose notes hold at least two findings that tell, by chapter."""
    rows = hospital.draw(1200, seed=5)
    found: dict[int, list[dict[str, Any]]] = {chapter: [] for chapter in NUMBERS}
    for row in rows:
        chapter = icd.chapter(row["code"])
        if len(found.get(chapter, range(99))) >= NUMBERS.get(chapter, 0):
            continue
        note = notes.admission_note(hospital.summaries([row], seed=5)[0])
        if len(set(explorer.telling_findings(note, row["code"]))) > 1:
            ids = {name: row[name] for name in ("subject_id", "hadm_id")}
            found[chapter].append(
                {
                    **ids,
                    "note": note,
                    "code": icd.normalise(row["code"]),
                    "chapter": chapter,
                    "split": "test",
                }
            )
    cases = pd.DataFrame([case for part in found.values() for case in part])
    cases.loc[1, "note"] += f" {HOSTILE}"
    return cases


def predictions(cases: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """base says nothing usable; sft is right on even rows and else silent on the code; grpo takes each third for another
    chapter, and cites the first telling finding alone."""
    tables: dict[str, list[dict[str, Any]]] = {"base": [], "sft": [], "grpo": []}
    for i, case in enumerate(cases.itertuples()):
        other = "I10" if case.chapter != 9 else "J18.9"
        said = {
            "base": None,
            "sft": case.code if i % 2 == 0 else None,
            "grpo": case.code if i % 3 else other,
        }
        first = explorer.telling_findings(case.note, case.code)[0]
        think = {
            "sft": "It is what it is.",
            "grpo": f"Findings: {first}. {HOSTILE if i == 1 else ''}",
        }
        for name, code in said.items():
            text = prompts.answer(think[name], code) if code else "the the the"
            tables[name].append(
                {
                    "hadm_id": case.hadm_id,
                    "sample": 0,
                    "completion": text,
                    "predicted": icd.normalise(code),
                }
            )
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    return invented()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, cases: pd.DataFrame) -> Iterator[Lab]:
    """A JupyterLab with its settings, data and notebook in a temporary folder."""
    if not CHROMIUM:
        pytest.skip("no browser found: install Chromium (Debian, Ubuntu: apt-get install chromium)")
    pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is missing: pip install -c constraints.txt -e '.[lab,test]'",
    )
    folder = tmp_path_factory.mktemp("lab")
    work, truth = folder / "work", folder / "data" / "truth"
    work.mkdir(), truth.mkdir(parents=True)
    cases.to_parquet(work / "cases.parquet")
    cases[["hadm_id"]].to_parquet(
        truth / "findings.parquet"
    )  # these are cases of the synthetic hospital
    for name, table in predictions(cases).items():
        table.to_parquet(work / f"{name}.parquet")
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    )
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(book, work / "explorer.ipynb")
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "share",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "ICD_DATA_DIR": "data",
        "ICD_RUNS_DIR": "runs",
        "ICD_OFFLINE_RECORD": "sockets.txt",
    }
    quiet = (
        folder
        / "settings"
        / "@jupyterlab"
        / "apputils-extension"
        / "notification.jupyterlab-settings"
    )
    quiet.parent.mkdir(parents=True)
    quiet.write_text(
        '{"fetchNews": "false"}'
    )  # no question about news in front of what is to be seen
    env = {**os.environ, **{name: str(folder / place) for name, place in places.items()}}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT)])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = "only-for-this-test"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={work}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=work)
    try:
        yield Lab(address(server, folder), token, folder, cases, folder / "sockets.txt")
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def address(server: subprocess.Popen[bytes], folder: Path) -> str:
    """The address the server listens on: it may have moved on from a port that was taken."""
    until = time.monotonic() + WAIT / 1000
    while time.monotonic() < until and server.poll() is None:
        if found := list((folder / "runtime").glob("jpserver-*.json")):
            try:
                return str(json.loads(found[0].read_text())["url"])
            except json.JSONDecodeError:
                pass  # half written
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'log.txt').read_text()[-3000:]}")


@pytest.fixture(scope="module")
def seen() -> dict[str, list[str]]:
    return {"requests": [], "dialogs": []}


@pytest.fixture(scope="module")
def page(lab: Lab, seen: dict[str, list[str]]) -> Iterator[Page]:
    """The notebook opened and run in Chromium, which can resolve no name."""
    from playwright import sync_api

    args = ["--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    args += (
        ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    )  # root, as in a container, has no sandbox
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=args, timeout=WAIT)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on("websocket", lambda socket: seen["requests"].append(socket.url))
        page.on("dialog", lambda dialog: (seen["dialogs"].append(dialog.message), dialog.dismiss()))
        page.goto(f"{lab.url}doc/tree/explorer.ipynb?token={lab.token}", timeout=WAIT)
        page.locator(".jp-Notebook .jp-CodeCell").nth(2).wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.locator(".widget-dropdown select").nth(2).wait_for()
        page.locator(".jp-RenderedHTML table").first.wait_for()
        yield page
        browser.close()


@dataclass
class Explorer:
    """The widgets, by what a reader sees of them."""

    page: Page

    @property
    def view(self) -> Locator:
        return self.page.locator(".widget-html-content")

    def choose(self, what: str, label: str) -> None:
        self.page.get_by_label(what, exact=True).select_option(label=label)

    def turn(self, number: int) -> None:
        box = self.page.locator("input[type=number]")
        box.fill(str(number))
        box.press("Enter")

    def shows(self, *texts: str) -> None:
        """Waits until the view holds all the texts."""
        for text in texts:
            self.view.filter(has_text=text).wait_for()

    def stands_at(self, place: str) -> None:
        """Waits until the number of the case and the number of cases are those of "1 of 17"."""
        shown = ""
        for _ in range(300):
            label = self.page.locator(".widget-label", has_text="Case of ").inner_text()
            number = self.page.locator("input[type=number]").input_value()
            shown = f"{number} {label.removeprefix('Case ')}"
            if shown == place:
                return
            self.page.wait_for_timeout(200)
        raise AssertionError(f"{shown} and not {place}")

    def marks(self) -> tuple[list[str], list[str]]:
        """Marked and dashed phrases of the note, without the legend."""
        note = self.view.locator("table").first.locator("td div")
        return note.locator("mark").all_inner_texts(), note.locator("ins").all_inner_texts()

    def cell(self, model: str) -> str:
        return self.view.locator("table").nth(1).locator("td", has_text=model).inner_text()


@pytest.fixture
def box(page: Page) -> Explorer:
    """The explorer at its start: GRPO, all chapters, any answer, first case."""
    page.set_viewport_size({"width": 1280, "height": 1500})
    box = Explorer(page)
    for what, label in (("Model", "GRPO"), ("Chapter", "all chapters"), ("Answer", "any answer")):
        box.choose(what, label)
    page.locator(".widget-label", has_text="of 17").wait_for()
    box.turn(1)
    return box


def shot(page: Page, name: str) -> None:
    folder = ROOT / "build" / "test" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def test_a_case_shows_heading_paths_rewards_and_marks(box: Explorer, lab: Lab) -> None:
    case = lab.cases.iloc[0]
    box.shows(f"Admission {case['hadm_id']}: GRPO, wrong chapter", places.NOTICE)
    box.stands_at("1 of 17")
    truth = box.view.locator("table").first.locator("td").nth(1).inner_text()
    assert icd.dotted(case["code"]) in truth and truth.count("✓") >= 3 and "✗" not in truth
    assert "J18.9" in box.cell("GRPO") and "✓" not in box.cell("GRPO")
    assert icd.dotted(case["code"]) in box.cell("SFT") and "0 edges from the truth" in box.cell(
        "SFT"
    )
    assert "hierarchical +1.00" in box.cell("SFT") and "hierarchical +1.00" not in box.cell("GRPO")
    assert "no usable answer" in box.cell("Base")
    first, *rest = explorer.telling_findings(case["note"], case["code"])
    marked, dashed = box.marks()
    assert first in marked and set(dashed) == set(rest) - {first}
    shot(box.page, "explorer-1280")


def test_the_model_decides_what_is_marked_and_dashed(box: Explorer, lab: Lab) -> None:
    case = lab.cases.iloc[0]
    box.choose("Model", "SFT")
    box.shows(
        f"Admission {case['hadm_id']}: SFT, right code",
        "cited by SFT",
        "the reasoning of SFT leaves it out",
    )
    marked, dashed = box.marks()
    assert not marked and set(dashed) == set(explorer.telling_findings(case["note"], case["code"]))
    box.choose("Model", "Base")
    box.shows(f"Admission {case['hadm_id']}: Base, unusable")


@NOT_SEEN_TO_PASS
def test_filters_and_pages(box: Explorer, lab: Lab) -> None:
    ids = [*lab.cases["hadm_id"]]
    box.turn(3)
    box.shows(f"Admission {ids[2]}: GRPO, right code")
    box.stands_at("3 of 17")
    box.turn(1)
    box.choose("Answer", "any error")  # each third row
    box.shows(f"Admission {ids[0]}: GRPO, wrong chapter")
    box.stands_at("1 of 6")
    box.turn(2)
    box.shows(f"Admission {ids[3]}: GRPO, wrong chapter")
    box.choose("Chapter", f"10 {icd.chapter_short(10)}")  # rows 7 to 12 of 17
    box.shows(f"Admission {ids[12]}: GRPO, wrong chapter", "I10 Essential")
    box.stands_at("2 of 2")
    box.turn(1)
    box.shows(f"Admission {ids[9]}: GRPO, wrong chapter")
    box.choose("Answer", "right category")
    box.shows("No case fits")
    shot(box.page, "explorer-none")
    box.choose("Model", "SFT")
    box.choose("Answer", "unusable")
    box.shows(f"Admission {ids[7]}: SFT, unusable")
    box.stands_at("1 of 3")


@NOT_SEEN_TO_PASS
def test_what_others_wrote_is_shown_and_does_not_act(
    box: Explorer, lab: Lab, seen: dict[str, list[str]]
) -> None:
    box.turn(2)
    box.shows(f"Admission {lab.cases['hadm_id'][1]}: GRPO", HOSTILE)
    static = box.page.locator(".jp-RenderedHTML", has_text="Admission note")
    assert static.inner_text().count(HOSTILE) == 2, (
        "the static twin shows the same case, in note and reasoning"
    )
    box.page.wait_for_timeout(500)  # an image that fails to load would have fired by now
    assert box.page.evaluate("window.owned") is None and not seen["dialogs"]
    assert not box.view.locator("img, script").count() and not static.locator("img, script").count()
    static.scroll_into_view_if_needed()
    shot(box.page, "static-1280")


@NOT_SEEN_TO_PASS
def test_a_narrow_window_cuts_nothing(box: Explorer) -> None:
    box.page.set_viewport_size({"width": 560, "height": 2400})
    box.page.wait_for_timeout(500)
    shot(box.page, "explorer-560")
    for part in (box.view, box.page.locator(".jp-RenderedHTML", has_text="Admission note")):
        assert part.evaluate("e => e.scrollWidth <= e.clientWidth"), (
            "it would have to be scrolled sideways"
        )
        boxes = [cell.bounding_box() for cell in part.locator("td").all()]
        assert all(b and b["width"] > 200 and b["x"] + b["width"] <= 560 for b in boxes), boxes
    right = [e.bounding_box() for e in box.page.locator(".widget-dropdown").all()]
    assert all(b and b["x"] + b["width"] <= 560 for b in right), right


@NOT_SEEN_TO_PASS
def test_nothing_but_the_local_server_was_asked(
    box: Explorer, lab: Lab, seen: dict[str, list[str]]
) -> None:
    local = (lab.url, lab.url.replace("http://", "ws://", 1), "data:", "blob:")
    assert any(url.startswith(local[1]) for url in seen["requests"]), (
        "the kernel speaks through a websocket"
    )
    assert not [url for url in seen["requests"] if not url.startswith(local)]
    assert not lab.attempts.exists(), lab.attempts.read_text()
