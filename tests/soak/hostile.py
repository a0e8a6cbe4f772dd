"""The part `hostile`: agents that were replaced, and what a neighbour of them and the event loop notice.

Each operation is one behaviour of `tests/_hostile_agent.py`, in a sandbox of its own. Its request must end in the right error, the
neighbour's runs may take twice as long as without it, and no turn of the event loop longer than 5 ms of processor time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import final

import attrs
import trio

from tests._hostile_agent import BEHAVIOURS, Behaviour, replaced_agent
from trio_sandbox import Host, Sandbox, SandboxConfig, SandboxError, Timeouts, open_host

from ._report import Budget, Gauge, Report
from ._watch import bounded
from ._world import World, open_world, wait_for_none

#: Seconds for one behaviour, on the slowest machine, and for what must be gone after the last.
_PATIENCE, _CLEAN_BOUND = 60.0, 10.0
#: Seconds that the neighbour is watched, without anything and with each behaviour: all of them fit into three minutes. A request may end before that.
_WATCHED = 3.0
#: Milliseconds that a turn of the event loop may take, and that a slower neighbour may add to what is twice as long.
_LONGEST_TURN, _ALLOWANCE = 5.0, 2.0
#: How often a behaviour is met when the neighbour was slow: other programs make it slow, too, but not each time.
_MEETINGS = 3
_TIMEOUTS = Timeouts(kill=5, agent_silence=3)


@final
class Turns(trio.abc.Instrument):
    """How long the longest turns of tasks were, in milliseconds of this thread's processor time."""

    def __init__(self) -> None:
        self.longest: float = 0.0
        self.whose = ""
        self._began = time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Look at the clock."""
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note what is longer than any before."""
        took = (time.thread_time() - self._began) * 1000
        if took > self.longest:
            self.longest, self.whose = took, task.name


@attrs.define
class Watch:
    """What a neighbour noticed."""

    runs: list[float] = attrs.field(factory=list[float])
    """Milliseconds of each of its runs."""
    turns: Turns = attrs.field(factory=Turns)


@asynccontextmanager
async def watched(neighbour: Sandbox) -> AsyncGenerator[Watch]:
    """Measure a neighbour's runs, one right after the other, and the loop's turns, during the block."""
    watch = Watch()

    async def use() -> None:
        while True:
            started = time.perf_counter()
            assert (await neighbour.run("print(x)")).stdout == "7\n"
            watch.runs.append((time.perf_counter() - started) * 1000)

    trio.lowlevel.add_instrument(watch.turns)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            yield watch
            nursery.cancel_scope.cancel(reason="it was watched for long enough")
    finally:
        trio.lowlevel.remove_instrument(watch.turns)


async def soak(budget: Budget, report: Report) -> None:
    """Soak replaced agents."""
    rng = random.Random(budget.seed)
    async with open_world() as world:
        while budget.is_left(report.operations.total()) and not report.is_hopeless:
            for behaviour in rng.sample(BEHAVIOURS, len(BEHAVIOURS)):
                if not budget.is_left(report.operations.total()):
                    break
                report.operations[behaviour.name] += 1
                try:
                    for meeting in range(1, _MEETINGS + 1):
                        gauges = await _meet(world, behaviour, report)
                        if all(gauge.is_flat for gauge in gauges.values()) or meeting == _MEETINGS:
                            _note(report, gauges)
                            break
                except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
                    report.fail(f"an agent that {behaviour.name}: {exc!r}")
        for what in await wait_for_none(world.left, _CLEAN_BOUND):
            report.fail(f"left: {what}")


async def _meet(world: World, behaviour: Behaviour, report: Report) -> dict[str, Gauge]:
    """Meet one in a host of its own, with a neighbour; return what that noticed."""
    async with open_host(world.config(timeouts=_TIMEOUTS)) as host, host.open_sandbox() as neighbour:
        await neighbour.run("x = 7")
        for _ in range(50):
            await neighbour.run("print(x)")
        config = SandboxConfig(max_output_bytes=2**18)
        async with host.open_sandbox(config=config) as sandbox:
            async with watched(neighbour) as without:
                await trio.sleep(_WATCHED)
            async with replaced_agent(sandbox, behaviour) as ask:
                async with watched(neighbour) as beside:
                    started = time.monotonic()

                    async def request() -> None:
                        try:
                            await ask()
                        except (SandboxError, OSError) as exc:
                            if not isinstance(exc, behaviour.raises):
                                raise
                        else:
                            raise AssertionError("its request was answered")

                    await bounded("its request", request, _PATIENCE, by_deadline=False)
                    report.slowest = max(report.slowest, round(time.monotonic() - started, 1))
                    await trio.sleep(max(0.0, _WATCHED - (time.monotonic() - started)))
        await _open_another(host)
    if beside.turns.longest > _LONGEST_TURN:
        report.notes.append(f"{behaviour.name}: {beside.turns.longest:.1f} ms in a turn of {beside.turns.whose}")
    return _compare(behaviour.name, without, beside)


async def _open_another(host: Host) -> None:
    async with host.open_sandbox() as sandbox:
        assert (await sandbox.run("print(1)")).stdout == "1\n"


def _compare(name: str, without: Watch, beside: Watch) -> dict[str, Gauge]:
    median, before = statistics.median(beside.runs), statistics.median(without.runs)
    gauges = {
        f"a neighbour's run, median, {name}": Gauge(before, median, before + _ALLOWANCE, "ms"),
        f"a neighbour's run, longest, {name}": Gauge(max(without.runs), max(beside.runs), float("inf"), "ms"),
        f"longest turn, {name}": Gauge(
            without.turns.longest, beside.turns.longest, max(0.0, _LONGEST_TURN - without.turns.longest), "ms"
        ),
    }
    for gauge in gauges.values():
        gauge.first, gauge.last = round(gauge.first, 2), round(gauge.last, 2)
    return gauges


def _note(report: Report, gauges: dict[str, Gauge]) -> None:
    """Put the figures into the report; of several rounds the worst."""
    for label, gauge in gauges.items():
        if label not in report.gauges or gauge.last > report.gauges[label].last:
            report.gauges[label] = gauge
