"""What a reader meets in a real JupyterLab in a real headless Chromium: the atlas, as notebook 6 shows it, and the box
for an expectation, as notebooks 1 to 7 show it.

Screenshots are left in build/test/screenshots, for eyes. Nothing here leaves the machine, and the test sees to it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest

from exercises import expectations
from helpers import atlas
from tests.atlas_fixture import invented_run
from tests.chromium import CHROMIUM, chromium

if TYPE_CHECKING:
    from playwright.sync_api import FrameLocator, Page

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
WAIT = 240_000  # ms: cores may be busy with a training
NOTEBOOK = [
    "from pathlib import Path\n\nfrom helpers import atlas",
    "atlas.show(Path('atlas.html'))",
]
EXPECTING = [
    "from helpers.machinery import places\n\nplaces.run_dir().mkdir(parents=True, exist_ok=True)",
    "from exercises import expectations\n\nexpectations.write('04', 'What will GRPO change?')",
    "from exercises import expectations\n\nexpectations.recall('04')",
]


@dataclass
class Lab:
    url: str
    token: str
    attempts: Path  # what a Python process of it tried to send off the machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab with its settings, page and notebook in a temporary folder."""
    if not CHROMIUM:
        pytest.skip("no browser found: install Chromium (Debian, Ubuntu: apt-get install chromium)")
    pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is missing: pip install -c constraints.txt -e '.[lab,test]'",
    )
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "work"
    work.mkdir()
    run, data = invented_run(folder, admissions=200, test=60)
    atlas.write(run, data=data, out=work / "atlas.html")
    for name, sources in (("atlas", NOTEBOOK), ("expecting", EXPECTING)):
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources]
        )
        book.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(book, work / f"{name}.ipynb")
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
    env["ICD_PROFILE"] = "tiny"
    for name in expectations.HEADLESS:  # a person watches
        env.pop(name, None)
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
        yield Lab(address(server, folder), token, folder / "sockets.txt")
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


def watch(page: Page, seen: dict[str, list[str]]) -> None:
    """Note what a page asks for."""
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: seen["requests"].append(request.url))
    page.on("websocket", lambda socket: seen["requests"].append(socket.url))
    page.on("dialog", lambda dialog: (seen["dialogs"].append(dialog.message), dialog.dismiss()))


def opened(page: Page, lab: Lab, notebook: str) -> None:
    """Open a notebook and wait for its kernel."""
    page.goto(f"{lab.url}doc/tree/{notebook}.ipynb?token={lab.token}", timeout=WAIT)
    page.locator(".jp-Notebook .jp-CodeCell").nth(1).wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that a run is lost


@pytest.fixture(scope="module")
def page(lab: Lab, seen: dict[str, list[str]]) -> Iterator[Page]:
    """The notebook opened and run in Chromium, which can resolve no name."""
    with chromium("127.0.0.1") as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        watch(page, seen)
        opened(page, lab, "atlas")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.frame_locator("iframe[title='Error atlas']").locator("body[data-ready]").wait_for()
        yield page


@pytest.fixture
def frame(page: Page) -> FrameLocator:
    return page.frame_locator("iframe[title='Error atlas']")


def test_the_page_works_inside_the_notebook(page: Page, frame: FrameLocator) -> None:
    assert frame.locator("#count").inner_text() == "all 60 cases"
    assert frame.locator("header .notice").is_visible()
    frame.locator("#tree [role=treeitem]").first.click()
    frame.locator("#chips .chip").wait_for()
    number = int(frame.locator("#count").inner_text().split(" of ")[0])
    assert 0 < number < 60
    frame.locator("body").press("m")
    frame.get_by_text("1 marked").wait_for()
    with page.expect_download() as download:
        frame.get_by_role("button", name="Save marks as CSV").click()
    assert download.value.suggested_filename == "error-atlas-synthetic-tiny.csv"
    folder = ROOT / "build" / "test" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "atlas-in-jupyterlab.png")


def test_an_expectation_is_there_again_after_the_kernel_was_restarted(
    page: Page, lab: Lab, seen: dict[str, list[str]]
) -> None:
    evil = "The codes. <img src=x onerror=alert(1)>"
    other = page.context.browser.new_page(viewport={"width": 1280, "height": 900})
    watch(other, seen)
    opened(other, lab, "expecting")

    def run_all() -> None:
        other.get_by_role("menuitem", name="Kernel", exact=True).click()
        other.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
        other.get_by_role("button", name="Confirm Kernel Restart").click()

    run_all()
    box = other.get_by_label("I expect:")
    box.wait_for()
    assert box.input_value() == ""
    other.get_by_text(expectations.NOTHING).wait_for()
    box.fill(evil)
    other.get_by_text("Not saved yet.").wait_for()
    other.get_by_role("button", name="Save", exact=True).click()
    other.get_by_text("Saved 20").wait_for()
    run_all()
    quoted = other.locator(".jp-OutputArea-output blockquote pre")
    quoted.wait_for()
    assert quoted.inner_text() == evil
    assert box.input_value() == evil
    folder = ROOT / "build" / "test" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    other.screenshot(path=folder / "expectation-in-jupyterlab.png")
    other.close()


def test_nothing_but_the_local_server_was_asked(
    page: Page, lab: Lab, seen: dict[str, list[str]]
) -> None:
    local = (lab.url, lab.url.replace("http://", "ws://", 1), "data:", "blob:", "about:")
    assert any(url.startswith(local[1]) for url in seen["requests"]), (
        "the kernel speaks through a websocket"
    )
    assert not [url for url in seen["requests"] if not url.startswith(local)]
    assert not seen["dialogs"]
    assert not lab.attempts.exists(), lab.attempts.read_text()
