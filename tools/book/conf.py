"""Settings of the web book. Its pages are put together by `python -m tools.book`.

Why Sphinx with MyST-NB and not Jupyter Book 2: that one fetches its site template at build time
(tried with 2.1.7), and no package on PyPI or npm has the template.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tools.book import hooks  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTICE = "Research and teaching only, never clinical use."

project = "DeepICD-R1, a course"
author = "deepicd-course authors"
copyright = "deepicd-course authors, MIT licence"
language = "en"

extensions = ["myst_nb"]
exclude_patterns = ["extra"]
nb_execution_mode = "off"  # the outputs are those that the notebooks hold
nb_merge_streams = True
myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"  # hooks.py: drawn by the browser, no script from elsewhere

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}
html_use_index = False
html_theme_options = {
    "announcement": NOTICE,
    "repository_url": PROJECT["urls"]["Repository"],
    "use_repository_button": True,
    "use_download_button": True,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # the search stands in the sidebar
    "extra_footer": f"<p>{NOTICE} The patients of this book are invented.</p>",
}


def setup(app: Sphinx) -> dict[str, Any]:
    app.config.html_extra_path = [str(Path(app.srcdir) / "extra")]  # the atlas, where there is one
    return hooks.setup(app)
