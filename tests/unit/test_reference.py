"""The pages that Sphinx builds: the reference has all that is public and nothing else, and no link, picture or example is broken."""

from __future__ import annotations

import ast
import html
import html.parser
import importlib
import inspect
import re
import subprocess
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

import trio_sandbox
from tests.documented import ROOT, pages as documented_pages
from tests.unit.test_exports import PUBLIC


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, as ``nox -s docs`` builds them."""
    target = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html", "docs", str(target)]
    subprocess.run(command, cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def inventory(built: Path) -> set[str]:
    """The Python names that it documents."""
    _, _, _, _, body = (built / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split()[0] for line in zlib.decompress(body).decode().splitlines() if " py:" in line}


def attributes(kind: type) -> set[str]:
    """Give the names of the public attributes that a class of ours has, by itself or of a base of ours."""
    names: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("trio_sandbox"):
            continue
        names |= {*vars(base), *inspect.get_annotations(base)}
        if attrs.has(base):
            names |= {field.name for field in attrs.fields(base)}
        elif isinstance(init := vars(base).get("__init__"), types.FunctionType):
            names |= set(re.findall(r"^\s+self\.([a-z]\w*)(?:: [^=]+)? = ", inspect.getsource(init), re.MULTILINE))
    return {name for name in names if not name.startswith("_")}


def public_names() -> list[str]:
    """Give every public name, and those of its attributes."""
    found: list[str] = []
    for module, names in PUBLIC.items():
        for name in names.split():
            found.append(f"{module}.{name}")
            value: object = getattr(importlib.import_module(module), name)
            # Of a TypedDict the keys are the fields of the class that they make.
            if isinstance(value, type) and not issubclass(value, dict):
                kind: type = value  # pyright: ignore[reportUnknownVariableType] - of what, nobody knows
                inherited = {
                    each for base in kind.__mro__[1:] if base.__name__ in names.split() for each in attributes(base)
                }
                own = {each for each in attributes(kind) if each not in inherited or each in vars(kind)}
                found += [f"{module}.{name}.{attribute}" for attribute in own]
    return found


def test_everything_public_is_in_the_reference(inventory: set[str]) -> None:
    names = public_names()
    assert len(names) > 350
    assert sorted(set(names) - inventory) == []


def test_nothing_private_is_in_the_reference(inventory: set[str]) -> None:
    assert [name for name in sorted(inventory) if any(part.startswith("_") for part in name.split("."))] == []


def test_of_what_users_hold_nothing_else_is_in_the_reference(inventory: set[str]) -> None:
    public = {*public_names(), *PUBLIC, "trio_sandbox.qemu"}
    ours = {
        name for name in inventory if name.startswith("trio_sandbox.") and not name.startswith("trio_sandbox.qemu.")
    }
    assert sorted(ours - public) == []


def blocks() -> Iterator[tuple[str, str]]:
    """Give every public function and method that opens a block, and how that is written."""
    for module in ("trio_sandbox", "trio_sandbox.testing"):
        names = PUBLIC[module].split()
        for name in names:
            value: object = getattr(importlib.import_module(module), name)
            members = {name: value} | (
                {f"{name}.{key}": member for key, member in inspect.getmembers(value) if not key.startswith("_")}
                if isinstance(value, type)
                else {}
            )
            for path, member in members.items():
                inner = getattr(member, "__wrapped__", None)
                if inspect.isasyncgenfunction(inner):
                    yield f"{module}.{path}", "async with"
                elif inspect.isgeneratorfunction(inner):
                    yield f"{module}.{path}", "with"
                elif inspect.iscoroutinefunction(member):
                    yield f"{module}.{path}", "await"


def shown(markup: str) -> str:
    """Give the text of some HTML."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def test_signatures_say_how_to_call(built: Path, inventory: set[str]) -> None:
    pages = "".join(page.read_text("utf-8") for page in (built / "reference").glob("*.html"))
    signatures = {
        match[1]: shown(match[2]).strip()
        for match in re.finditer(r'<dt[^>]* id="([\w.]+)">(.*?)</dt>', pages, re.DOTALL)
    }
    expected = {name: how for name, how in blocks() if name in inventory}
    assert expected["trio_sandbox.Sandbox.fork"] == "async with"
    assert len(expected) > 60
    wrong = [
        f"{signatures[name][:40]} ({how})" for name, how in expected.items() if not signatures[name].startswith(how)
    ]
    assert wrong == []


def test_errors_are_in_the_signatures_page_by_page(built: Path) -> None:
    """What a function raises is a list of types that one can click."""
    page = (built / "reference" / "sandboxes.html").read_text("utf-8")
    run = page[page.index('id="trio_sandbox.Sandbox.run"') : page.index('id="trio_sandbox.Sandbox.run_process"')]
    assert "Raises" in run
    assert 'href="errors.html#trio_sandbox.OutputLimitError"' in run


def test_examples_in_docstrings_are_code_and_can_be_pasted(built: Path) -> None:
    pages = "".join(page.read_text("utf-8") for page in (built / "reference").glob("*.html"))
    examples = [
        shown(example).strip()
        for example in re.findall(r'<div class="highlight-python.*?<pre>(.*?)</pre>', pages, re.DOTALL)
    ]
    assert any(example.startswith("async with sandbox.fork(4) as children:\n    for child") for example in examples)
    assert any(example.startswith("port = await nursery.start(") for example in examples)
    for example in examples:
        compile(example, "<example>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


class Page(html.parser.HTMLParser):
    """What one page has in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if identifier := named.get("id"):
            self.ids.append(identifier)
        if tag == "a" and (target := named.get("href")):
            self.links.append(target)
        if tag == "img":
            self.pictures.append(named)


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[Path, Page]:
    """Give the pages that were made of ours, without the index and the search."""
    folder = ROOT / "docs"
    sources = [path.relative_to(folder) for path in documented_pages() if path.is_relative_to(folder)]
    ours = [built / path.with_suffix(".html") for path in sources if path.parts[0] != "_build"]
    return {path: Page(path.read_text("utf-8")) for path in ours}


def test_every_page_is_made_and_can_be_found(built: Path, pages: dict[Path, Page]) -> None:
    linked = {
        (path.parent / link.partition("#")[0]).resolve()
        for path, page in pages.items()
        for link in page.links
        if "://" not in link
    }
    assert len(pages) > 50
    assert [path for path in pages if path.resolve() not in linked] == []


def test_no_page_has_an_id_twice(pages: dict[Path, Page]) -> None:
    twice = {
        path.name: sorted({identifier for identifier in page.ids if page.ids.count(identifier) > 1})
        for path, page in pages.items()
    }
    assert {name: ids for name, ids in twice.items() if ids} == {}


def test_links_lead_somewhere(built: Path, pages: dict[Path, Page]) -> None:
    broken: list[str] = []
    for path, page in pages.items():
        for link in page.links:
            if link.startswith("https://"):
                continue
            name, _, fragment = link.partition("#")
            target = (path.parent / name).resolve() if name else path.resolve()
            known = {each.resolve(): one for each, one in pages.items()}
            if not target.is_file() or (fragment and target in known and fragment not in known[target].ids):
                broken.append(f"{path.relative_to(built)}: {link}")
    assert broken == []


def test_pictures_are_there_and_say_what_they_show(pages: dict[Path, Page]) -> None:
    pictures = [(path, picture) for path, page in pages.items() for picture in page.pictures]
    assert {Path(str(picture["src"])).name for _, picture in pictures} >= {
        f"{name}.svg" for name in ("concepts", "layers", "ownership", "run", "terminal")
    }
    for path, picture in pictures:
        assert (path.parent / str(picture["src"])).resolve().is_file()
        assert len(picture.get("alt") or "") > 40, picture


def test_the_version_is_on_every_page(built: Path, pages: dict[Path, Page]) -> None:
    for path in pages:
        assert f"trio-sandbox {trio_sandbox.__version__}" in path.read_text("utf-8")


def test_examples_can_be_copied(built: Path) -> None:
    page = (built / "tutorial.html").read_text("utf-8")
    assert "copybutton.js" in page
