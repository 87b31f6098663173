"""What the book adds to Sphinx: formulas as MathML, terms that show their meaning, no picture from
another site.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

GLOSSARY = "docs/glossary"
LONGEST = 240  # letters of a meaning that a hover shows
NOT_INSIDE = (nodes.reference, nodes.title, nodes.literal, nodes.math, nodes.FixedTextElement)


# ------------------------------------------------------------------------------------- formulas


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """A formula inside a sentence."""
    translator.body.append(str(tex2mathml(node.astext())))
    raise nodes.SkipNode


def display_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """A formula on a line of its own."""
    translator.body.append(str(tex2mathml(node.astext(), as_block=True)))
    raise nodes.SkipNode


# ------------------------------------------------------------------------------------- pictures


def name_external_pictures(app: Sphinx, document: nodes.document) -> None:
    """A picture of another site, such as a badge, becomes its text: a page loads nothing."""
    for image in list(document.findall(nodes.image)):
        if "://" in image["uri"]:
            image.replace_self(nodes.Text(image.get("alt", image["uri"])))


# ------------------------------------------------------------------------------------- glossary


def read_glossary(app: Sphinx, document: nodes.document) -> None:
    """Keep spelling → (anchor, meaning) of the glossary's terms: its table rows, its shortest
    sections, or its paragraphs that begin in bold.
    """
    if app.env.docname != GLOSSARY:
        return
    terms: dict[str, tuple[str, str]] = {}
    for node in list(document.findall(nodes.Element)):
        term, meaning = _entry(node)
        if not (term and meaning):
            continue
        if not node["ids"]:
            node["ids"].append("term-" + nodes.make_id(term))
        for spelling in _spellings(term):
            terms.setdefault(spelling, (node["ids"][0], meaning))
    app.env.book_terms = terms  # type: ignore[attr-defined]


def _entry(node: nodes.Element) -> tuple[str, str]:
    """(term, meaning) of a node that explains a term, else two empty texts."""
    if isinstance(node, nodes.row) and not isinstance(node.parent, nodes.thead):
        cells = [cell.astext() for cell in node.children]
        return (cells[0], cells[1]) if len(cells) > 1 else ("", "")
    if isinstance(node, nodes.section) and len(node) > 1:
        paragraphs = [isinstance(child, nodes.paragraph) for child in node.children[1:]]
        return (node[0].astext(), node[1].astext()) if all(paragraphs) else ("", "")
    if isinstance(node, nodes.paragraph) and node.children and isinstance(node[0], nodes.strong):
        term = node[0].astext()
        return term.rstrip(":."), node.astext().removeprefix(term).lstrip(" :.–—-")
    return "", ""


def _spellings(term: str) -> set[str]:
    """How a text may write a term: each name of it, with a small or a capital letter, one or many.

    "SFT (supervised fine-tuning)" has two names.
    """
    names = [name for name in re.split(r"\s*[(),/]\s*", term) if name]
    capitals = {name[0].upper() + name[1:] for name in names}
    small = {name[0].lower() + name[1:] for name in names}
    one = {*names, *capitals, *small}
    return one | {f"{name}s" for name in one}


def show_terms(app: Sphinx, document: nodes.document, docname: str) -> None:
    """The first use of a term on a page, and every link to it, shows its meaning on hover."""
    terms: dict[str, tuple[str, str]] = getattr(app.env, "book_terms", {})
    if not terms or docname == GLOSSARY:
        return
    page = app.builder.get_relative_uri(docname, GLOSSARY)
    meanings = {f"{page}#{anchor}": meaning for anchor, meaning in terms.values()}
    shown: set[str] = set()
    for link in list(document.findall(nodes.reference)):
        address = link.get("refuri")
        if address in meanings:
            shown.add(address)
            link.parent.replace(link, _hover(link.children, address, meanings[address]))
    spellings = sorted(terms, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, spellings))})(?![\w-])")
    for text in list(document.findall(nodes.Text)):
        if any(isinstance(parent, NOT_INSIDE) for parent in _parents(text)):
            continue
        pieces: list[nodes.Node] = []
        for piece in pattern.split(text.astext()):
            anchor, meaning = terms.get(piece, ("", ""))
            address = f"{page}#{anchor}"
            if anchor and address not in shown:
                shown.add(address)
                pieces += _hover([nodes.Text(piece)], address, meaning)
            else:
                pieces.append(nodes.Text(piece))
        if any(isinstance(piece, nodes.raw) for piece in pieces):
            text.parent.replace(text, pieces)


def _parents(node: nodes.Node) -> list[nodes.Node]:
    above: list[nodes.Node] = []
    while node.parent is not None:
        node = node.parent
        above.append(node)
    return above


def _hover(children: list[nodes.Node], address: str, meaning: str) -> list[nodes.Node]:
    """A link whose meaning `book.css` shows under the pointer and for the keyboard."""
    if len(meaning) > LONGEST:
        meaning = meaning[:LONGEST].rsplit(" ", 1)[0] + " …"
    opening = f'<a class="term" href="{escape(address)}" data-meaning="{escape(meaning)}">'
    return [nodes.raw("", opening, format="html"), *children, nodes.raw("", "</a>", format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("doctree-read", name_external_pictures)
    app.connect("doctree-read", read_glossary)
    app.connect("doctree-resolved", show_terms)
    return {"parallel_read_safe": False}
