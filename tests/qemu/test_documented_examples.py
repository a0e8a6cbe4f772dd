"""Every Python example of the README and the documentation, run as it stands."""

from __future__ import annotations

import ast
import doctest
import functools
import inspect
import itertools
import re
import types

import pytest
import trio

import trio_sandbox
from tests._telemetry import of_its_own
from tests.documented import ROOT, Block, blocks
from trio_sandbox import Timeouts
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines._named import NamedTemplateStore

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have code that an example stops keep its state, however slow the machine is now."""
    defaults = Timeouts.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "interrupt_grace", 60.0)


def check_output(block: Block, printed: str) -> None:
    """Compare what a block printed with what its comments say."""
    expected = block.expected_output()
    if expected is not None:
        checker = doctest.OutputChecker()
        assert checker.check_output(expected, printed, doctest.ELLIPSIS), f"{block.name} printed:\n{printed}"


def is_program(block: Block) -> bool:
    """Tell whole programs from parts of one."""
    return (
        "trio.run(" in block.text
        or re.search(r"^from trio_sandbox\.(aio|blocking) ", block.text, re.MULTILINE) is not None
    )


def programs() -> list[Block]:
    """Give the whole programs; one that stands on two pages, once."""
    return list({block.text: block for block in blocks("python") if is_program(block)}.values())


def sections() -> dict[str, list[Block]]:
    """Give the parts of programs by section of the documentation: each page's in order."""
    parts = [block for block in blocks("python") if not is_program(block)]
    by_section = itertools.groupby(parts, key=lambda block: str(block.page.relative_to(ROOT).parent / ""))
    return {section: list(group) for section, group in by_section}


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in programs()])
def test_program(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    with of_its_own():
        exec(compile(block.text, block.name, "exec", dont_inherit=True), {"__name__": "__main__"})
    check_output(block, capsys.readouterr().out)


async def run_parts(parts: list[Block], capsys: pytest.CaptureFixture[str]) -> None:
    """Run the parts of a section in one sandbox, each page's with the names that the pages promise."""
    async with trio_sandbox.open_host() as host, host.open_sandbox("python") as sandbox:
        for _, page in itertools.groupby(parts, key=lambda block: block.page):
            names: dict[str, object] = {"trio": trio, "trio_sandbox": trio_sandbox, "host": host, "sandbox": sandbox}
            for block in page:
                code = compile(block.text, block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
                capsys.readouterr()
                # With `await` at its top level it is the body of a coroutine function.
                if code.co_flags & inspect.CO_COROUTINE:
                    await types.FunctionType(code, names)()
                else:
                    exec(code, names)
                check_output(block, capsys.readouterr().out)


@pytest.mark.parametrize("section", sections())
def test_parts(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Not an async test: the examples get the whole of Trio, as in a program of their own.
    saved = NamedTemplateStore(default_cache_directory())
    before = set(saved.names())
    try:
        trio.run(functools.partial(run_parts, sections()[section], capsys))
    finally:
        for name in set(saved.names()) - before:
            saved.remove(name)
