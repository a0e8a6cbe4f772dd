"""Functions of the host that code in a real guest calls, in both languages that can."""

from __future__ import annotations

import runpy
from collections.abc import Callable

import pytest
import trio

from tests.documented import ROOT
from trio_sandbox import HostConfig, Sandbox, Timeouts, open_host

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "node_image", "system_disk")]


def search(text: str, limit: int = 2) -> list[str]:
    return [text] * limit


def fail() -> None:
    raise LookupError("why")


CALLS = {
    "python": "[search('a'), *(await asyncio.gather(*(search.aio(str(n), limit=1) for n in range(40))))][-1]",
    "javascript": "(await Promise.all(Array.from({length: 40}, (_, n) => search(`${n}`, 1)))).at(-1)",
}
FAILS = {"python": "fail()", "javascript": "await fail()"}
WAITS = {"python": "x = 5; wait()", "javascript": "x = 5; await wait()"}
BEFORE = {"python": "import asyncio", "javascript": "1"}


async def check(sandbox: Sandbox) -> None:
    language = sandbox.language
    called = trio.Event()

    async def wait() -> None:
        called.set()
        await trio.sleep_forever()

    functions: dict[str, Callable[..., object]] = {"search": search, "fail": fail, "wait": wait}
    await sandbox.run(BEFORE[language], check=True)
    result = await sandbox.run(CALLS[language], functions=functions, check=True)
    assert result.value in ("['39']", "[ '39' ]")
    result = await sandbox.run(FAILS[language], functions=functions)
    assert "HostFunctionError: LookupError: why" in result.stderr
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await sandbox.run(WAITS[language], functions=functions)

        nursery.start_soon(run)
        await called.wait()
        nursery.cancel_scope.cancel()
    result = await sandbox.run("x")
    assert (result.value, result.restarted) == ("5", False)
    # A checkpoint goes on without them, and with those of its own.
    checkpoint = await sandbox.checkpoint()
    await sandbox.revert(checkpoint)
    assert "search" in (await sandbox.run("search")).stderr
    again = await sandbox.run(CALLS[language], functions=functions, check=True)
    assert again.value in ("['39']", "[ '39' ]")


async def test_code_calls_functions_in_both_languages() -> None:
    # Of a busy machine's guest an interrupt may take a while.
    async with open_host(HostConfig(timeouts=Timeouts(interrupt_grace=30))) as host:
        async with host.open_sandbox("python") as sandbox:
            await check(sandbox)
            example = runpy.run_path(str(ROOT / "docs" / "examples" / "agent_tools.py"))
            assert await example["answer"](sandbox, example["CODE"]) == "ada 9.0\nbob 2.5\n"
        async with host.open_sandbox("node") as sandbox:
            await check(sandbox)
