"""How Sphinx builds these pages: `nox -s docs`."""

from __future__ import annotations

import os

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

import trio_sandbox

project = "trio-sandbox"
copyright = "the trio-sandbox contributors"
release = trio_sandbox.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinxcontrib_trio",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "trio-sandbox"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_display_short_literal_types = True

# `name` in our docstrings is code; where it is the name of something documented here it is a link, too.
default_role = "any"
suppress_warnings = ["ref.any"]
# What a type in a signature refers to must exist, as far as it is ours and public.
nitpick_ignore_regex = [("py:.*", r"(?!trio_sandbox\.).*"), ("py:.*", r"trio_sandbox\.(.*\._|wire\.).*")]

# Links to other projects' documentation need the network; a build must not.
if os.environ.get("DOCS_LINK_OTHERS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
        "attrs": ("https://www.attrs.org/en/stable", None),
    }


def read_google_style(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the sections of a docstring into fields, as sphinx.ext.napoleon does.

    Not for attributes and properties, where that would take the words before a colon for a type.
    """
    if what not in ("attribute", "data", "property"):
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_google_style)
