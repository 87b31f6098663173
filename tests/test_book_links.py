"""Every page that a page links to is put into the web book. No tool of the book is needed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

from tools.book import __main__ as book

ROOT = Path(__file__).parent.parent
# Links in Markdown, and in HTML inside of it; those to other sites and inside a page are left out.
LINK = re.compile(r"(?:\]\(|(?:href|src)=\")(?!https?:|mailto:|#)([^)#\s\"]+)")


def pages(source: Path) -> dict[Path, str]:
    """The Markdown of every page, by its path."""
    texts = {path: path.read_text(encoding="utf-8") for path in source.rglob("*.md")}
    for path in source.rglob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        texts[path] = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return texts


def test_the_book_holds_what_its_pages_link_to(tmp_path: Path) -> None:
    book.stage(ROOT, tmp_path, tmp_path / "no-atlas.html")
    (tmp_path / "docs" / "atlas.html").touch()  # what the frame of the atlas page names
    texts = pages(tmp_path)
    missing = [
        f"{path.relative_to(tmp_path)}: {link}"
        for path, text in texts.items()
        for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text))
        if not (path.parent / link).exists()
    ]
    assert len(texts) > 20
    assert not missing


def test_every_page_is_in_the_table_of_contents(tmp_path: Path) -> None:
    book.stage(ROOT, tmp_path, tmp_path / "no-atlas.html")
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(?:.*<)?([\w./*-]+)>?$", index, re.MULTILINE)
    listed = {
        path.relative_to(tmp_path).with_suffix("")
        for entry in entries
        for path in tmp_path.glob(f"{entry}.*")
    }
    written = {path.relative_to(tmp_path).with_suffix("") for path in pages(tmp_path)}
    assert written - listed == {Path("index")}
