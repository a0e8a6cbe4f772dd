"""What is told, and what the documentation says of it; and how the end of a block is put into a word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.lowlevel

import trio_sandbox
from tests.documented import ROOT
from trio_sandbox._observe import outcome_of
from trio_sandbox._otel import INSTRUMENTS

PACKAGE = Path(trio_sandbox.__file__).parent
PAGE = (ROOT / "docs" / "howto" / "observe.md").read_text("utf-8")


def told(*functions: str) -> Iterator[tuple[str, list[str]]]:
    """Give the name, and the names of the attributes, of everything that the library tells by one of *functions*."""
    for path in PACKAGE.rglob("*.py"):
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in functions and node.args:
                for name in ast.walk(node.args[0]):
                    if isinstance(name, ast.Constant) and isinstance(name.value, str):
                        yield name.value, [keyword.arg for keyword in node.keywords if keyword.arg]


def test_every_span_is_documented_with_its_attributes() -> None:
    names = dict(told("span", "add_span", "operation", "_begin"))
    assert {"sandbox", "start", "restore", "boot", "first_output", "network", "fork", "teardown"} <= names.keys()
    missing = [name for name in names if f"trio_sandbox.{name}" not in PAGE and f"`{name}`" not in PAGE]
    assert missing == []
    assert [each for attributes in names.values() for each in attributes if f"`{each}`" not in PAGE] == []


def test_every_number_is_told_and_documented_with_its_attributes() -> None:
    names = dict(told("measure"))
    assert names.keys() == INSTRUMENTS.keys()
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for name, attributes in names.items():
        (row,) = [line for line in rows if line.startswith(f"| `{name}` ")]
        assert [each for each in attributes if f"`{each}`" not in row] == []


async def a_cancelled() -> BaseException:
    caught: list[BaseException] = []
    with trio.CancelScope() as scope:
        scope.cancel(reason="a test")
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as exc:
            caught.append(exc)
            raise
    return caught[0]


async def test_the_end_of_a_block_has_a_word() -> None:
    cancelled = await a_cancelled()
    assert outcome_of(None) == "ok"
    assert outcome_of(cancelled) == "cancelled"
    assert outcome_of(GeneratorExit()) == "cancelled"
    assert outcome_of(BaseExceptionGroup("", [cancelled, BaseExceptionGroup("", [cancelled])])) == "cancelled"
    assert outcome_of(BaseExceptionGroup("", [cancelled, ValueError()])) == "error"
    assert outcome_of(KeyboardInterrupt()) == "error"


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_numbers_kind_fits_its_unit(name: str) -> None:
    assert (INSTRUMENTS[name].kind == "histogram") == (INSTRUMENTS[name].unit == "s")
