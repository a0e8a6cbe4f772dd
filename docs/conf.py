"""How Sphinx builds these pages: `nox -s docs`."""

from __future__ import annotations

import os

import trio_sandbox

project = "trio-sandbox"
copyright = "the trio-sandbox contributors"
release = trio_sandbox.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
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
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# `name` in our docstrings is code, or the name of something documented here.
default_role = "any"
python_display_short_literal_types = True

# Links to other projects' documentation need the network; a build must not.
if os.environ.get("DOCS_LINK_OTHERS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
        "attrs": ("https://www.attrs.org/en/stable", None),
    }
