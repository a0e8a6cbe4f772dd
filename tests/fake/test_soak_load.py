"""What the mixed load of the soak takes for wrong: a scripted sandbox lies to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import trio
import trio.testing

from tests.soak._load import Load, WrongError
from tests.soak._world import wait_for_none
from trio_sandbox import OutcomeUnknownError, RunResult, Sandbox, SandboxClosedError
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox


class Scripted:
    """A sandbox whose runs come to what a test says, one after the other."""

    def __init__(self, *outcomes: RunResult | Exception) -> None:
        self._outcomes: Iterator[RunResult | Exception] = iter(outcomes)

    async def run(self, _code: str) -> RunResult:
        await trio.lowlevel.checkpoint()
        outcome = next(self._outcomes, SandboxClosedError("it is over"))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def printed(text: object, *, kept: bool = True, restarted: bool = False) -> RunResult:
    return RunResult(
        exit_code=0 if kept else 137,
        state_kept=kept,
        restarted=restarted,
        accelerator="tcg",
        duration=0,
        stdout_bytes=f"{text}\n".encode(),
        stderr_bytes=b"",
    )


async def serve(*outcomes: RunResult | Exception, may_lose_state: bool = False) -> list[str]:
    """Have the load count for as long as there are outcomes; return what it takes for wrong."""
    load = Load(cast("Sandbox", Scripted(*outcomes)), "x", may_lose_state=may_lose_state)
    await load.serve("run")
    assert isinstance(load.failures[-1].error, SandboxClosedError)
    return [str(failure) for failure in load.failures if isinstance(failure.error, WrongError)]


async def test_what_is_counted_is_held_against_what_errors_said(autojump_clock: trio.testing.MockClock) -> None:
    unknown = OutcomeUnknownError("who knows")
    assert await serve(printed(1), printed(2), unknown, printed(3)) == []
    assert await serve(printed(1), printed(2), unknown, printed(4)) == []
    (wrong,) = await serve(printed(1), printed(2), unknown, printed(5))
    assert "it printed 5, and not one of [3, 4]" in wrong
    (wrong,) = await serve(printed(1), printed(1))
    assert "it printed 1, and not one of [2]" in wrong


async def test_an_error_that_wrongly_calls_a_retry_safe_is_found(autojump_clock: trio.testing.MockClock) -> None:
    class SafeError(OutcomeUnknownError):
        retry_safe = True

    (wrong,) = await serve(printed(1), SafeError("nothing happened"), printed(3))
    assert "it printed 3, and not one of [2]" in wrong


async def test_variables_may_be_lost_only_where_something_says_so(autojump_clock: trio.testing.MockClock) -> None:
    ended = (printed(1), printed("", kept=False), printed(1, restarted=True), printed(2))
    assert await serve(*ended, may_lose_state=True) == []
    (wrong, *_) = await serve(*ended)
    assert "its variables are lost: the run ended its interpreter" in wrong
    (wrong,) = await serve(printed(1), printed(2), printed(1), may_lose_state=True)
    assert "it printed 1" in wrong, "another interpreter, and nobody said so"


async def test_a_load_counts_what_it_does_and_stops() -> None:
    async def answer(call: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        counts.append(call.code)
        if len(counts) == 5:
            load.stop()
        return Answer(stdout=f"{len(counts)}\n")

    counts: list[str] = []
    async with open_scripted_sandbox(answer) as sandbox:
        load = Load(sandbox, "x")
        await load.serve("run")
    assert load.done == {"run": 5}
    assert load.failures == []


async def test_what_is_left_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    left = ["a", "b", "c"]

    def look() -> list[str]:
        return [left.pop()] if left else []

    assert await wait_for_none(look, 10) == []
    assert await wait_for_none(lambda: ["file x"], 0.01) == ["file x"]
