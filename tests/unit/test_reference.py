"""The reference that Sphinx builds has every public attribute of every public class, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import attrs
import pytest

from tests.documented import ROOT
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


@pytest.mark.parametrize(
    "block",
    [
        *("open_sandbox", "open_host", "Host.open_sandbox"),
        *(f"Sandbox.{name}" for name in ("fork", "stream", "open_process", "transaction", "watch")),
    ],
)
def test_blocks_are_shown_as_blocks(built: Path, block: str) -> None:
    page = (built / "reference" / "api.html").read_text("utf-8")
    match = re.search(rf'id="trio_sandbox\.{re.escape(block)}">(.*?)</dt>', page, re.DOTALL)
    assert match is not None
    assert re.sub(r"<[^>]+>", "", match[1]).strip().startswith("async with ")


def test_examples_in_docstrings_are_code(built: Path) -> None:
    page = (built / "reference" / "api.html").read_text("utf-8")
    examples = re.findall(r'<div class="highlight-python.*?</pre>', page, re.DOTALL)
    shown = [re.sub(r"<[^>]+>", "", example).strip() for example in examples]
    assert any(example.startswith("async with sandbox.fork(4) as children:\n    for child") for example in shown)
    assert any(example.startswith("port = await nursery.start(") for example in shown)
