"""Every link of a folder of HTML pages: those that stay inside must lead to a file and an anchor.

python -m tools.book.links build/book
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from bs4 import BeautifulSoup

ATTRIBUTES = ("href", "src")


def check(folder: Path) -> tuple[list[str], list[str]]:
    """(links that lead nowhere, as "page: link"; addresses of other sites, sorted).

    The addresses of other sites are not asked. A page that is not part of the book's own, such as
    the atlas, builds its anchors as it runs: links into it need its file alone.
    """
    anchors: dict[Path, set[str]] = {}
    links: list[tuple[Path, str]] = []
    for path in sorted(folder.rglob("*.html")):
        if "_static" in path.parts:
            continue  # templates of the theme, no pages
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        named = page.find_all(attrs={"id": True}) + page.find_all("a", attrs={"name": True})
        anchors[path.resolve()] = {tag.get("id") or tag.get("name") for tag in named}
        for attribute in ATTRIBUTES:
            tags = page.find_all(attrs={attribute: True})
            links.extend((path, str(tag[attribute])) for tag in tags)

    broken: set[str] = set()
    external: set[str] = set()
    for path, link in links:
        address, anchor = urldefrag(link)
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            if parts.scheme != "data":
                external.add(link)
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
        in_folder = target.is_relative_to(folder.resolve())
        anchor_is_there = not anchor or unquote(anchor) in anchors.get(target, {unquote(anchor)})
        if not (in_folder and target.is_file() and anchor_is_there):
            broken.add(f"{path.relative_to(folder)}: {link}")
    return sorted(broken), sorted(external)


if __name__ == "__main__":
    broken, external = check(Path(sys.argv[1]))
    print("\n".join(broken) or f"every link leads somewhere; {len(external)} go to other sites")
    sys.exit(bool(broken))
