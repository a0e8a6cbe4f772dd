"""The soak, with an agent in this process; and that it finds what is wrong, with sandboxes in which nothing is right."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.soak import _steps, runs
from tests.soak._report import FAILURE_LIMIT, Budget, Report
from tests.soak._steps import MAX_OUTPUT, Step
from tests.soak._watch import HungError, bounded
from trio_sandbox import Sandbox, SandboxConfig, Timeouts
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

from ._sandbox import open_local_sandbox


@asynccontextmanager
async def open_local() -> AsyncGenerator[Sandbox]:
    config = SandboxConfig(max_output_bytes=MAX_OUTPUT)
    async with open_local_sandbox(config, Timeouts(interrupt_grace=20)) as (sandbox, _):
        yield sandbox


def local_steps(seed: int) -> Iterator[Step]:
    """Yield the steps that need no virtual machine, nor Node.js."""
    for step in _steps.steps(seed):
        if step.kind != "is forked" and step.language != "javascript":
            yield step


async def test_a_soak_of_an_agent_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "steps", local_steps)
    monkeypatch.setattr(runs, "_WARM_UP", 40)
    report = Report("runs", 5)
    await runs.soak(Budget(5, 160, None), report, opener=open_local)
    assert report.failures == []
    assert set(report.gauges) == {"tasks", "descriptors", "memory"}
    assert report.gauges["tasks"].is_flat
    assert sum(report.operations.values()) >= 160


async def _nothing(call: Call) -> Answer:
    """A guest that prints no more than this, whatever is run."""
    return Answer(stdout="?")


async def _losing(call: Call) -> Answer:
    """A guest that loses a byte of what is printed."""
    printed = re.search(r"write\('(.)' \* (\d+)\)", call.code)
    return Answer(stdout=printed[1] * (int(printed[2]) - 1) if printed else "1\n")


async def _forgetful(call: Call) -> Answer:
    """A guest that prints all, and does not know the state."""
    return Answer(stdout="aaaaaaaaa" if "write" in call.code else "2\n")


async def _ending(call: Call) -> Answer:
    """A guest whose interpreter ends with each run."""
    return Answer(stdout="aaaaaaaaa", state_kept=False)


async def _never(call: Call) -> Answer:
    """A guest that never comes back."""
    await trio.sleep_forever()
    raise AssertionError


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (_losing, "stdout is 8 bytes of"),
        (_forgetful, "the state is '2"),
        (_ending, "state_kept=False"),
        (_never, "was not back"),
    ],
)
async def test_what_is_wrong_is_found(
    answer: Callable[[Call], Awaitable[Answer]], text: str, autojump_clock: trio.testing.MockClock
) -> None:
    step = Step(1, "prints", "python", "import sys; _ = sys.stdout.write('a' * 9)", letter="a", stdout=9)
    async with open_scripted_sandbox(answer) as sandbox:
        soaker = runs.Soaker(sandbox, Report("runs", 1), states={"python": 1})
        with pytest.raises((HungError, runs.WrongError)) as raised:
            await soaker.do(step)
    assert text in str(raised.value)


async def test_a_part_is_given_up_when_all_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Sandbox] = []

    @asynccontextmanager
    async def open_scripted() -> AsyncGenerator[Sandbox]:
        async with open_scripted_sandbox(_nothing) as sandbox:
            opened.append(sandbox)
            yield sandbox

    report = Report("runs", 1)
    await runs.soak(Budget(1, 10_000, None), report, opener=open_scripted)
    # Another sandbox after each: nothing is known of one in which something went wrong.
    assert len(report.failures) == len(opened) == FAILURE_LIMIT
    assert not report.holds


@pytest.mark.parametrize("by_deadline", [False, True])
async def test_what_hangs_is_told_with_where_it_waits(
    by_deadline: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def hang() -> None:
        await trio.sleep_forever()

    async def come_back() -> None:
        await trio.sleep(9)

    await bounded("this", come_back, 10, by_deadline=by_deadline)
    with pytest.raises(HungError, match=r"(?s)this was not back after 10 s.*hang:\d+ > sleep_forever"):
        await bounded("this", hang, 10, by_deadline=by_deadline)
