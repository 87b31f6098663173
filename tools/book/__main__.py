"""The web book of the executed notebooks, in build/book. No network; nothing is executed.

    make book

The pages are the notebooks with the outputs that they hold, README.md, docs/ and the READMEs of
data/ and helpers/. The error atlas of the synthetic run is embedded where `make course` has left
one. Exit status 1, with a sentence, where a tool is missing or a link leads nowhere; a book that
was not finished does not take the place of build/book.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
PAGES = (
    "README.md",
    "docs/*",
    "docs/diagrams/*",
    "notebooks/*.ipynb",
    "data/README.md",
    "helpers/README.md",
    "helpers/casebook/README.md",
)
LINKED = ("LICENSE", "results/LOG.md", "results/*.csv", "exercises/*.yaml")  # what pages link to
ATLAS = ROOT / "runs" / "synthetic-tiny" / "atlas.html"
SYNTHETIC = '<meta name="data" content="synthetic">'  # as helpers.atlas writes it
TOOLS = {
    "sphinx": "sphinx",
    "docutils": "docutils",
    "myst_nb": "myst-nb",
    "sphinx_book_theme": "sphinx-book-theme",
    "bs4": "beautifulsoup4",
}
FRAME = """
<p><a class="button" href="../atlas.html">Open the atlas on a page of its own</a>
({megabytes:.1f} MB, the synthetic run)</p>
<div class="atlas"><iframe src="../atlas.html" title="Error atlas" loading="lazy"></iframe></div>

"""
NO_ATLAS = """
This book was made where no run was: `make course`, then `make book`, puts the atlas here.

![One page of the atlas](atlas.png)

"""


def missing_tools() -> list[str]:
    """Packages of the extra `book` that are not installed."""
    return [name for module, name in TOOLS.items() if not importlib.util.find_spec(module)]


def stage(root: Path, source: Path, atlas: Path) -> None:
    """Copy what the book shows from the checkout `root` to the folder `source`.

    atlas: the page to embed, left out where there is no such file. Raises ValueError for an atlas
    that is not of synthetic patients.
    """
    for pattern in (*PAGES, *LINKED):
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                copy = source / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    shutil.copy(HERE / "index.md", source)
    for path in (source / "notebooks").glob("*.ipynb"):
        _fold_setup(path)
    (source / "extra").mkdir()
    frame = NO_ATLAS
    if atlas.is_file():
        if SYNTHETIC not in atlas.read_text(encoding="utf-8")[:1000]:
            raise ValueError(f"{atlas} is not of synthetic patients: it must not get into a book.")
        shutil.copy(atlas, source / "extra" / "atlas.html")
        frame = FRAME.format(megabytes=atlas.stat().st_size / 1e6)
    page = source / "docs" / "atlas.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("\n## ", f"{frame}\n## ", 1), encoding="utf-8")


def _fold_setup(path: Path) -> None:
    """The set-up cell is the same in every notebook: the book shows it on a click."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    first = next((cell for cell in notebook.cells if cell.cell_type == "code"), None)
    if first:
        first.metadata["tags"] = ["hide-input"]
    nbformat.write(notebook, path)


def make(root: Path, book: Path, atlas: Path) -> list[str]:
    """Write the book of the checkout `root` to the folder `book`; returns links that lead nowhere.

    Beside it, `<book>-work` keeps the pages as they were read, and links.txt: the addresses of
    other sites. Raises ValueError for a wrong atlas and subprocess.CalledProcessError where Sphinx
    fails; then `book` is as it was.
    """
    from tools.book import links

    work = book.with_name(f"{book.name}-work")
    shutil.rmtree(work, ignore_errors=True)
    stage(root, work / "source", atlas)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", HERE]
    command = [*sphinx, "-d", work / "doctrees", work / "source", work / "html"]
    subprocess.run(command, cwd=root, check=True)
    broken, external = links.check(work / "html")
    (work / "links.txt").write_text("\n".join(external) + "\n", encoding="utf-8")
    shutil.rmtree(book, ignore_errors=True)
    (work / "html").rename(book)
    return broken


def changed_notebooks(root: Path) -> list[str]:
    """Notebooks that are not as they are committed: they may have been run on other data."""
    command = ["git", "status", "--porcelain", "--no-renames", "--", "notebooks"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return [] if listed.returncode else [line[3:] for line in listed.stdout.splitlines()]


def main() -> int:
    """The command line."""
    if missing := missing_tools():
        print(
            f"The book needs {', '.join(missing)}: pip install -c constraints.txt -e '.[book]'",
            file=sys.stderr,
        )
        return 1
    book = ROOT / "build" / "book"
    try:
        broken = make(ROOT, book, ATLAS)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    files = [path for path in book.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    pages = sum(path.suffix == ".html" for path in files)
    print(f"{book / 'index.html'}: {pages} pages, {size:.1f} MB")
    for name in changed_notebooks(ROOT):
        print(f"{name} is not as committed: share no book of a notebook that was run on real notes")
    for line in broken:
        print(f"leads nowhere: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
