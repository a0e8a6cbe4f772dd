"""A sandbox's block that is left while other tasks wait for requests: each gets one error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
import trio

from tests.fake._sandbox import open_local_sandbox
from trio_sandbox import OutcomeUnknownError, Sandbox

MEGABYTES = bytes(2**22)

Request = Callable[[Sandbox, Callable[[], object]], Awaitable[object]]


async def stream(sandbox: Sandbox, begun: Callable[[], object]) -> None:
    async with sandbox.stream("input()", stdin=True) as events:
        begun()
        async for _ in events:
            pass


async def wait(sandbox: Sandbox, begun: Callable[[], object]) -> None:
    async with sandbox.open_process(["sleep", "60"]) as process:
        begun()
        await process.wait()


async def wait_in_function(sandbox: Sandbox, begun: Callable[[], object]) -> None:
    async def wait() -> None:
        begun()
        await trio.sleep_forever()

    await sandbox.run("wait()", functions={"wait": wait})


async def run_process(sandbox: Sandbox, begun: Callable[[], object], **options: Any) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(sandbox.run_process, ["sleep", "60"], **options))
        begun()


REQUESTS: dict[str, Request] = {
    "functions": lambda sandbox, begun: sandbox.run("begun()\nwhile True: pass", functions={"begun": begun}),
    "a function": wait_in_function,
    "input": lambda sandbox, begun: sandbox.run(
        "begun()\nwhile True: pass", functions={"begun": begun}, stdin=MEGABYTES
    ),
    "stream": stream,
    "process": wait,
    "run_process": lambda sandbox, begun: run_process(sandbox, begun, stdin=MEGABYTES, capture_stdout=True),
    "run_process, not captured": run_process,
    "run_process, with a terminal": lambda sandbox, begun: run_process(sandbox, begun, pty=True),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_who_waits_gets_one_error(name: str) -> None:
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        sandbox, _ = await stack.enter_async_context(open_local_sandbox())
        begun, told = trio.Event(), trio.Event()

        async def ask() -> None:
            one_error = pytest.RaisesExc(OutcomeUnknownError)
            # The nursery around `run_process` is the test's.
            with pytest.RaisesGroup(one_error) if name.startswith("run_process") else one_error:
                await REQUESTS[name](sandbox, begun.set)
            told.set()

        nursery.start_soon(ask)
        await begun.wait()
        await stack.aclose()
        await told.wait()
