"""Runs that are cancelled, at every point there is: the interpreter keeps its state, and the next run is served."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import trio

from tests._leaks import cancel_at_every_step
from trio_sandbox import RunResult
from trio_sandbox.sandbox import Sandbox

from ._sandbox import open_local_sandbox

#: Long enough to be cancelled in the middle, and short enough to be waited for where no step is left to be cancelled at.
CODE = "import time; time.sleep(0.03)"
#: More than fits into the header of a request's stream.
LONG_CODE = f"{CODE}\n#{'x' * 70_000}"


async def _stream(sandbox: Sandbox) -> None:
    async with sandbox.stream(f"{CODE}; print(1)") as events:
        async for _ in events:
            pass


async def _stream_with_input(sandbox: Sandbox) -> None:
    async with sandbox.stream("print(input())", stdin=True) as events:
        assert events.stdin is not None
        await events.stdin.send_all(b"hello\n")
        async for _ in events:
            pass


async def _leave_stream(sandbox: Sandbox) -> None:
    async with sandbox.stream(f"for i in range(50): print('x' * 1000)\n{CODE}") as events:
        async for _ in events:
            break


async def _run_before_deadline(sandbox: Sandbox) -> None:
    with trio.fail_after(60):
        await sandbox.run(CODE)


async def _refused(sandbox: Sandbox) -> None:
    with pytest.raises(Exception, match="nowhere"):
        await sandbox.run(CODE, cwd="/nowhere")


OPERATIONS: dict[str, Callable[[Sandbox], Awaitable[object]]] = {
    "run": lambda sandbox: sandbox.run(CODE),
    "run with input": lambda sandbox: sandbox.run(CODE, stdin=b"hello\n"),
    "run with more input than a pipe holds": lambda sandbox: sandbox.run(CODE, stdin=b"x" * 300_000),
    "run with variables": lambda sandbox: sandbox.run(CODE, env={"A": "b"}, cwd="/"),
    "long run": lambda sandbox: sandbox.run(LONG_CODE),
    "long run with input": lambda sandbox: sandbox.run(LONG_CODE, stdin=b"hello\n"),
    "run that prints": lambda sandbox: sandbox.run(f"{CODE}; print('x' * 200_000)"),
    "run that is refused": _refused,
    "run before a deadline": _run_before_deadline,
    "stream": _stream,
    "stream with input": _stream_with_input,
    "stream that is left": _leave_stream,
}


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        await sandbox.run("x = 12345")
        yield sandbox


@pytest.mark.parametrize("every_task", [False, True], ids=["own steps", "all steps"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_run_cancelled_at_any_point_leaves_the_state_as_it_is(
    sandbox: Sandbox, name: str, every_task: bool
) -> None:
    results: list[RunResult] = []

    async def look() -> None:
        # At once, and not refused either.
        results.append(await sandbox.run("print(x)"))

    runs = await cancel_at_every_step(lambda: OPERATIONS[name](sandbox), check=look, every_task=every_task)
    assert [(result.stdout, result.restarted) for result in results] == [("12345\n", False)] * runs
