"""Runs one right after the other: what one leaves to be done is never taken for the next one's."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncGenerator

import pytest
import trio
import trio.testing

from trio_sandbox.guest.agent.attendant import Attendant
from trio_sandbox.guest.agent.interpreter import Interpreter
from trio_sandbox.guest.agent.run import Run
from trio_sandbox.wire import RecordStream, StreamResetError

from ._agent import Host, Ran, let_short_runs_end, open_agent
from ._wire import open_pair

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


# --- Runs that are not wanted any more before they have begun ---


@pytest.fixture
async def agent() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


@pytest.fixture
async def stopped(agent: Host) -> tuple[Host, int]:
    """An agent whose interpreter, with a variable in it, was interrupted and stands still: the next run has to wait."""
    pid = int((await agent.run("import os, time; x = 12345; print(os.getpid())")).stdout)
    async with agent.open_run("print('go', flush=True); time.sleep(60)") as run:
        await run.until(b"go\n")
        await run.interrupt()
        assert (await run.finish()).exit_code == 128 + signal.SIGINT
    os.kill(pid, signal.SIGSTOP)
    return agent, pid


async def assert_untouched(host: Host, pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
    assert await host.run("print(x)") == ran("12345\n")


async def test_a_run_given_up_before_it_has_begun_costs_nothing(stopped: tuple[Host, int]) -> None:
    host, pid = stopped
    for _ in range(3):
        async with host.open_run("x = 1"):
            pass
    async with host.open_run("x = 1", stdin=(pipe := host.open_pipe()).id):
        pipe.close()
    await assert_untouched(host, pid)


@pytest.mark.parametrize(("request_", "exit_code"), [("interrupt", 130), ("kill", 137)])
async def test_a_run_stopped_before_it_has_begun_costs_nothing(
    stopped: tuple[Host, int], request_: str, exit_code: int
) -> None:
    host, pid = stopped
    async with host.open_run("x = 1") as run:
        await run.records.send_json({request_: True})
        assert await run.finish() == Ran("", "", exit_code, restarted=False, state_kept=True)
    await assert_untouched(host, pid)


async def test_a_run_whose_deadline_passes_before_it_has_begun_costs_nothing(stopped: tuple[Host, int]) -> None:
    host, pid = stopped
    async with host.open_run("x = 1", deadline=0, grace=1) as run:
        assert await run.finish() == Ran("", "", 130, restarted=False, state_kept=True)
        assert run.end is not None
        assert run.end["finished"]["expired"]
    await assert_untouched(host, pid)


async def test_a_machine_that_stood_still_costs_no_interpreter(
    mock_clock: trio.testing.MockClock, stopped: tuple[Host, int]
) -> None:
    host, pid = stopped
    async with host.open_run("print(x)") as run:
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(12)  # more than the worker has to answer; it could not
        await trio.testing.wait_all_tasks_blocked(0.05)
        os.kill(pid, signal.SIGCONT)
        assert await run.finish() == ran("12345\n")


async def test_a_run_that_waits_goes_on_in_its_turn(stopped: tuple[Host, int]) -> None:
    host, pid = stopped
    async with host.open_run("x += int(input())", stdin=(pipe := host.open_pipe()).id) as run:
        await pipe.send_all(b"1\n")
        os.kill(pid, signal.SIGCONT)
        assert await run.finish() == ran("")
    assert await host.run("print(x)") == ran("12346\n")


async def test_what_a_host_asks_of_a_run_that_has_ended_reaches_nobody() -> None:
    def find(_: Run) -> None:
        """An interpreter is through with the run, whose output has yet to be taken. It may have another."""

    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        run = Run(RecordStream(other), "", None, None, 0, trio.current_time(), 0)
        attendant = Attendant(run, find, waits=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attendant.obey)
            records = RecordStream(stream)
            for request in ({"interrupt": True}, {"kill": True}, {"deadline": 0}):
                await records.send_json(request)
                await trio.testing.wait_all_tasks_blocked()
            await records.send_eof()
            await trio.testing.wait_all_tasks_blocked()
            run.over.set()
    assert not run.expired
    assert not run.interrupted
    assert run.stopped == 0


async def test_a_deadline_that_no_host_sends_ends_the_run_and_not_the_agent(agent: Host) -> None:
    async with agent.open_run("print('go', flush=True); import time; time.sleep(60)") as run:
        await run.until(b"go\n")
        await run.records.send_json({"deadline": 10**400})
        with pytest.raises(StreamResetError, match="deadline is out of range"):
            await run.finish()
    assert (await agent.run("print(1)")).stdout == "1\n"
