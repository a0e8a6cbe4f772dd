"""Runs one right after the other: what one leaves to be done is never taken for the next one's."""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator

import pytest
import trio

from trio_sandbox.guest.agent.interpreter import Interpreter
from trio_sandbox.guest.agent.run import Run

from ._agent import Host, Ran, let_short_runs_end, open_agent

#: Code whose end the agent can't send in the turn that it starts the run in, and what it prints.
LONG_ENDS = {
    "more than is left to the channel": ("print('x' * 20_000)", "x" * 20_000 + "\n"),
    "as much as a pipe holds": ("print('x' * 65_535)", "x" * 65_535 + "\n"),
    "more than a pipe holds": ("print('x' * 200_000)", "x" * 200_000 + "\n"),
    "a pipe that is left open": ("import os; print(os.dup(1) > 0)", "True\n"),
}


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Host]:
    """An agent whose runs are over as soon as it has started them, so that there is an end to be sent by then."""
    let_short_runs_end(monkeypatch)
    async with open_agent() as host:
        yield host


@pytest.fixture
def slow_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep whoever has sent the end of a run from going on until the next run was started."""
    started = trio.Event()
    send, start = Run.send, Interpreter.start

    async def send_and_wait(self: Run, output: list[tuple[bytes, bytes]], *, end: bool = False) -> None:
        waiting = started
        await send(self, output, end=end)
        if end:
            await waiting.wait()

    def start_and_tell(self: Interpreter, run: Run) -> bool:
        nonlocal started
        result = start(self, run)
        started.set()
        started = trio.Event()
        return result

    monkeypatch.setattr(Run, "send", send_and_wait)
    monkeypatch.setattr(Interpreter, "start", start_and_tell)


def ran(stdout: str) -> Ran:
    return Ran(stdout, "", 0, restarted=False, state_kept=True)


@pytest.mark.usefixtures("slow_sender")
@pytest.mark.parametrize("name", LONG_ENDS)
async def test_a_run_starts_while_the_end_of_the_last_is_being_sent(host: Host, name: str) -> None:
    code, output = LONG_ENDS[name]
    # Which of the two tasks goes on first is up to Trio, so that one round proves nothing.
    for _ in range(12):
        assert await host.run(code) == ran(output)
    assert await host.run("print(1)") == ran("1\n")


@pytest.mark.usefixtures("slow_sender")
async def test_a_run_starts_while_the_refusal_of_the_last_is_being_sent(host: Host) -> None:
    for _ in range(12):
        async with host.open_run("print(1)", cwd="/nowhere") as run:
            assert (await run.failure())["errno"] == errno.ENOENT
    assert await host.run("print(1)") == ran("1\n")
