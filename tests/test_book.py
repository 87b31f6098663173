"""The web book: whole pages, links that lead somewhere, meanings on hover; and the book in a browser.

Screenshots are left in build/test/screenshots, for eyes. The browser can resolve no name.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from tests.chromium import chromium
from tools import book as package
from tools.book import __main__ as book

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parent.parent
NOTICE = "Research and teaching only, never clinical use."
WAIT = 120_000  # ms: cores may be busy with a training
pytestmark = pytest.mark.slow

GLOSSARY = """# Glossary

| term | meaning |
|---|---|
| SFT (supervised fine-tuning) | training on *written* answers |

## Rollout

A completion that the model draws in training, a "sample".
"""


def soup(path: Path) -> BeautifulSoup:
    from bs4 import BeautifulSoup

    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if missing := book.missing_tools():
        pytest.skip(f"{', '.join(missing)} missing: `make book` installs the tools of the web book")


def checkout(folder: Path, page: str) -> Path:
    """A course of one notebook, whose text is `page`."""
    texts = {
        "README.md": "# Overview\n\n[start](notebooks/00_start_here.ipynb)\n",
        "docs/atlas.md": "# The error atlas\n\nOne page.\n\n## Make it\n\nBy hand.\n",
        "docs/glossary.md": GLOSSARY,
        "docs/metrics.md": "# Metrics\n\nNothing.\n",
        "data/README.md": "# Data\n\nNone.\n",
        "helpers/README.md": "# Helpers\n\nNone.\n",
        "results/LOG.md": "# Log\n\nNothing.\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for picture in ("atlas.png", "result.png"):
        shutil.copy(ROOT / "docs" / picture, folder / "docs")
    output = nbformat.v4.new_output("stream", text="kept as it is\n")
    cells = [
        nbformat.v4.new_markdown_cell(page),
        nbformat.v4.new_code_cell("setup = 1"),
        nbformat.v4.new_code_cell("print(1 / 0)", outputs=[output], execution_count=1),
    ]
    (folder / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, folder / "notebooks" / "00_start_here.ipynb")
    return folder


# ------------------------------------------------------------------------------------ a small book

PAGE = """# 0 · Start

[![Open In Colab](https://colab.example/badge.svg)](https://colab.example/00)

After SFT comes a rollout; SFT again, `SFT` in code, [a link](../docs/glossary.md#rollout) and $\\frac{a}{b}$.

[gone](#nowhere-at-all) [lost](../docs/none.md)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(the folder of a small book with an atlas, its links that lead nowhere)"""
    folder = tmp_path_factory.mktemp("small")
    root = checkout(folder / "course", PAGE)
    atlas = folder / "atlas.html"
    atlas.write_text(f"<html><head>{book.SYNTHETIC}</head><body>all cases</body></html>")
    return folder / "book", book.make(root, folder / "book", atlas)


def test_links_that_lead_nowhere_are_named_with_their_page(small: tuple[Path, list[str]]) -> None:
    folder, broken = small
    assert any(
        line.startswith("notebooks/00_start_here.html") and "nowhere" in line for line in broken
    )
    assert any(
        line.startswith("notebooks/00_start_here.html") and "none" in line for line in broken
    )
    assert all(line.startswith("notebooks/00_start_here.html") for line in broken)
    external = folder.with_name("book-work") / "links.txt"
    assert "https://colab.example/00" in external.read_text().splitlines()


def test_outputs_are_kept_nothing_is_run_and_the_setup_is_folded(
    small: tuple[Path, list[str]],
) -> None:
    page = soup(small[0] / "notebooks" / "00_start_here.html")
    cells = page.select("div.cell")
    assert "kept as it is" in cells[1].text and "ZeroDivisionError" not in page.text
    assert cells[0].find("details") and not cells[1].find("details")


def test_a_term_shows_its_meaning_once_a_page_and_at_every_link(
    small: tuple[Path, list[str]],
) -> None:
    page = soup(small[0] / "notebooks" / "00_start_here.html")
    terms = [(tag.text, tag["data-meaning"]) for tag in page.select("a.term")]
    rollout = "A completion that the model draws in training, a “sample”."
    assert terms == [("SFT", "training on written answers"), ("a link", rollout)]
    target = page.select_one("a.term")["href"]
    glossary = soup(small[0] / "docs" / "glossary.html")
    assert target.startswith("../docs/glossary.html#")
    assert "supervised" in glossary.find(id=target.split("#")[1]).text
    assert not glossary.select("a.term")


def test_formulas_need_no_script_and_pictures_of_other_sites_become_text(
    small: tuple[Path, list[str]],
) -> None:
    page = soup(small[0] / "notebooks" / "00_start_here.html")
    assert page.select_one("math mfrac")
    assert page.find("a", href="https://colab.example/00").text == "Open In Colab"
    assert not page.find("img", src=lambda source: "://" in source)


def test_the_atlas_is_embedded_and_only_a_synthetic_one(
    small: tuple[Path, list[str]], tmp_path: Path
) -> None:
    page = soup(small[0] / "docs" / "atlas.html")
    assert page.find("iframe")["src"] == "../atlas.html"
    assert "all cases" in (small[0] / "atlas.html").read_text()
    other = tmp_path / "atlas.html"
    other.write_text("<html><head></head><body>real notes</body></html>")
    with pytest.raises(ValueError, match="not of synthetic patients"):
        book.make(checkout(tmp_path / "course", PAGE), tmp_path / "book", other)
    assert not (tmp_path / "book").exists()


def test_notebooks_that_are_not_as_committed_are_named(tmp_path: Path) -> None:
    root = checkout(tmp_path / "course", PAGE)
    assert book.changed_notebooks(root) == []  # no git checkout: nothing can be said
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@example"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert book.changed_notebooks(root) == []
    notebook = root / "notebooks" / "00_start_here.ipynb"
    notebook.write_text(notebook.read_text().replace("kept as it is", "a real note"))
    assert book.changed_notebooks(root) == ["notebooks/00_start_here.ipynb"]


def test_the_marker_of_a_synthetic_atlas_is_the_one_that_is_written() -> None:
    from helpers import atlas

    assert book.SYNTHETIC == atlas.SYNTHETIC


# ---------------------------------------------------------------------------------- the whole book


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(the folder of the course's book, its links that lead nowhere)"""
    folder = tmp_path_factory.mktemp("whole") / "book"
    return folder, book.make(ROOT, folder, ROOT / "no" / "atlas.html")


def own_pages(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.html") if "_static" not in path.parts]


def test_every_link_of_the_book_leads_somewhere(whole: tuple[Path, list[str]]) -> None:
    assert whole[1] == []


def test_a_book_without_a_run_says_how_to_get_the_atlas(whole: tuple[Path, list[str]]) -> None:
    page = soup(whole[0] / "docs" / "atlas.html")
    assert "make course" in page.text and not page.find("iframe")
    assert page.find("img", src=lambda source: source.endswith("/atlas.png"))


def test_every_notebook_and_text_is_a_page_that_the_navigation_names(
    whole: tuple[Path, list[str]],
) -> None:
    folder = whole[0]
    sources = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("docs/*.md")]
    named = {tag["href"] for tag in soup(folder / "index.html").select("nav.bd-links a")}
    assert len(sources) > 10
    for source in sources:
        page = source.relative_to(ROOT).with_suffix(".html")
        assert (folder / page).is_file() and page.as_posix() in named


def test_every_page_says_what_it_is_not_for_and_loads_nothing_from_elsewhere(
    whole: tuple[Path, list[str]],
) -> None:
    for path in own_pages(whole[0]):
        page = soup(path)
        assert NOTICE in page.select_one(".bd-header-announcement").text, path
        tags = page.find_all(["script", "img", "iframe"], src=True)
        tags += page.find_all("link", rel=["stylesheet", "preload", "icon"])
        loaded = [tag.get("src") or tag["href"] for tag in tags]
        assert loaded and not [address for address in loaded if "//" in address], path


def test_the_workflow_installs_the_tools_of_the_extra_and_needs_no_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "book.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["book"]["steps"]
    install = next(step["run"] for step in steps if "pip install" in step.get("run", ""))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {Requirement(line).name for line in project["optional-dependencies"]["book"]}
    assert set(install.split()[4:]) == extra and "-c constraints.txt" in install
    assert any(step.get("run") == f"python -m {package.__name__}" for step in steps)
    assert "secrets." not in text
    assert all(step["uses"].rpartition("@v")[2].isdigit() for step in steps if "uses" in step)


# ------------------------------------------------------------------------------------- in a browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that tells nothing of what it is asked."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(whole: tuple[Path, list[str]]) -> Iterator[str]:
    """The address of the book on a server of this machine."""
    handler = functools.partial(Quiet, directory=whole[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium("127.0.0.1") as browser:
        yield browser


def keep_picture(page: Page, name: str) -> None:
    folder = ROOT / "build" / "test" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"book-{name}.png")


@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize(
    "path", ["index", "README", "notebooks/04_qlora_grpo", "docs/metrics", "docs/atlas"]
)
def test_no_page_is_wider_than_the_screen_and_none_asks_elsewhere(
    browser: Browser, site: str, path: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 850})
    page.set_default_timeout(WAIT)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{site}/{path}.html")
    page.evaluate("document.fonts.ready.then(() => true)")
    keep_picture(page, f"{path.replace('/', '-')}-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_text(NOTICE, exact=True).first.is_visible()
    assert not errors
    assert not [address for address in asked if not address.startswith((site, "data:"))]
    page.close()


@pytest.mark.parametrize("width", [390, 1300])
def test_the_embedded_atlas_keeps_inside_its_page_and_a_phone_gets_the_link(
    browser: Browser, small: tuple[Path, list[str]], width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 850})
    page.set_default_timeout(WAIT)
    page.goto((small[0] / "docs" / "atlas.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("iframe").is_visible() == (width > 1000)
    assert page.get_by_role("link", name="Open the atlas on a page of its own").is_visible()
    page.close()


def test_the_search_finds_the_notebook_and_opens_it(browser: Browser, site: str) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 850})
    page.set_default_timeout(WAIT)
    page.goto(f"{site}/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("importance ratio")
    page.keyboard.press("Enter")
    result = page.locator("ul.search li a", has_text="GRPO").first
    result.wait_for()
    page.locator("ul.search li p.context").first.wait_for()  # the words around it
    keep_picture(page, "search")
    result.click()
    page.wait_for_url("**/notebooks/04_qlora_grpo.html*")
    assert "importance ratio" in page.locator("article").inner_text()
    page.close()


def test_a_meaning_opens_under_the_pointer_and_for_the_keyboard(
    browser: Browser, small: tuple[Path, list[str]]
) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 850})
    page.set_default_timeout(WAIT)
    page.goto((small[0] / "notebooks" / "00_start_here.html").as_uri())
    content = "tag => getComputedStyle(tag, '::after').content"
    term = page.locator("a.term", has_text="SFT")
    assert "written" not in term.evaluate(content)
    term.hover()
    assert "training on written answers" in term.evaluate(content)
    keep_picture(page, "hover")
    page.mouse.move(0, 0)
    page.keyboard.press("Tab")
    while not term.evaluate("tag => tag === document.activeElement"):
        page.keyboard.press("Tab")
    assert "training on written answers" in term.evaluate(content)
    page.close()
