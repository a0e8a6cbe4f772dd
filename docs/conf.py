"""How Sphinx builds these pages: `nox -s docs`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import trio_sandbox

project = "trio-sandbox"
copyright = "the trio-sandbox contributors"
release = trio_sandbox.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "sphinxcontrib_trio",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]
# Quotes in our docstrings are code more often than prose.
smartquotes = False
html_title = f"trio-sandbox {release}"

# What is copied from a console is what can be typed.
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# sphinxcontrib-trio extends these documenters: they write ``async with`` where it belongs.
autodoc_use_legacy_class_based = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_display_short_literal_types = True

# `name` in our docstrings is code; where it is the name of something documented here it is a link, too.
default_role = "any"
suppress_warnings = ["ref.any"]
# What a type in a signature refers to must exist, as far as it is ours and public.
nitpick_ignore_regex = [("py:.*", r"(?!trio_sandbox\.).*"), ("py:.*", r"trio_sandbox\.(.*\._|wire\.).*")]


def repository() -> str | None:
    """Return the address of the sources, as pyproject.toml has it; None where it has none."""
    for url in importlib.metadata.metadata("trio-sandbox").get_all("Project-URL") or []:
        label, _, address = url.partition(", ")
        if label == "Repository":
            return address
    return None


if address := repository():
    html_theme_options = {"source_repository": address, "source_branch": "main", "source_directory": "docs/"}

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
    lines[:] = mark_examples(lines)
    if what not in ("attribute", "data", "property"):
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()


def mark_examples(lines: list[str]) -> list[str]:
    """Make code of what is indented by four behind a paragraph of a docstring; sections indent by two."""
    marked: list[str] = []
    paragraph = True
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        begins = indented and paragraph and number > 0 and not lines[number - 1].strip()
        if begins and not marked[-2].startswith(".. "):
            language = "text" if any("──" in drawn for drawn in lines[number:]) else "python"
            marked += [f".. code-block:: {language}", ""]
        if line.strip():
            paragraph = not line.startswith(" ") and not line.endswith("::")
        marked.append(line)
    return marked


def find_attribute_docstrings(public: str) -> None:
    """Have autodoc find the docstrings of attributes where they are written.

    It looks into the module that a class says it is of, and ours say the public one, where there is only an import.
    """
    module = importlib.import_module(public)
    found = ModuleAnalyzer.for_module(public)
    found.analyze()
    for name in dir(module):
        value = getattr(module, name)
        if not isinstance(value, type) or value.__module__ != public:
            continue
        for part in [part for part in sys.modules if part.startswith("trio_sandbox.") and part not in PUBLIC]:
            if getattr(sys.modules[part], name, None) is not value:
                continue
            written = ModuleAnalyzer.for_module(part)
            written.analyze()
            if name not in written.tags:
                continue  # it is imported there as well
            # A base class of its own module may have some of them.
            found.attr_docs.update(written.attr_docs)
            found.annotations.update(written.annotations)
            found.finals += written.finals
            found.tagorder.update({tag: len(found.tagorder) + order for tag, order in written.tagorder.items()})


PUBLIC = (
    "trio_sandbox",
    "trio_sandbox.aio",
    "trio_sandbox.blocking",
    "trio_sandbox.fleet",
    "trio_sandbox.qemu",
    "trio_sandbox.sessions",
    "trio_sandbox.testing",
)


def setup(app: Sphinx) -> None:
    for public in PUBLIC:
        find_attribute_docstrings(public)
    app.connect("autodoc-process-docstring", read_google_style)
