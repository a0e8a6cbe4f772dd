"""The part `cancel`: every operation there is, cancelled at the k-th step, for every k.

First k counts the steps of the operation's own task, and takes every value in turn; then it counts those of all tasks, and is drawn
from the seed. After each the sandbox has its variable and its files, of what was to be made all is there or nothing, and
nothing has been left: see `tests/_stage.py`. When the host is closed nothing is left of that either.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import attrs

from tests._leaks import cancel_at_step
from tests._operations import Operation
from tests._stage import Stage, prepare
from trio_sandbox import Host, open_host

from ._machine_operations import MACHINE_OPERATIONS, TUNNEL_OPERATIONS
from ._report import Budget, Report
from ._watch import bounded
from ._world import open_world, wait_for_none

#: Seconds for one operation with its cancellation, on the slowest machine, and for what must be gone after the last.
_PATIENCE, _CLEAN_BOUND = 180.0, 10.0
_ENDLESS = 10**9


async def soak(budget: Budget, report: Report) -> None:
    """Soak cancellations."""
    with tempfile.TemporaryDirectory(prefix="trio-sandbox-soak-") as directory:
        async with open_world() as world:
            async with open_host(world.config()) as host, AsyncExitStack() as stack:
                await _sweep_host(host, Path(directory), stack, budget, report)
            for what in await wait_for_none(world.left, _CLEAN_BOUND):
                report.fail(f"left: {what}")


async def _sweep_host(host: Host, here: Path, stack: AsyncExitStack, budget: Budget, report: Report) -> None:
    stages: list[tuple[Stage, Mapping[str, Operation]]] = []
    for name, operations in (("plain", MACHINE_OPERATIONS), ("serving", TUNNEL_OPERATIONS)):
        sandbox = await stack.enter_async_context(host.open_sandbox())
        (here / name).mkdir()
        await sandbox.path("stage").mkdir()
        there = str(await sandbox.path("stage").absolute())
        stages.append((await prepare(sandbox, here / name, there, host=host, serves=name == "serving"), operations))
    for stage, _ in stages:
        stage.neighbours = tuple(other.sandbox for other, _ in stages if other is not stage)
    await sweep(stages, budget, report)


@attrs.define
class _Sweep:
    """How far the cancellations of one operation are."""

    name: str
    operation: Operation
    stage: Stage
    own_steps: int = 0
    all_steps: int = 0
    done: int = 0

    async def count(self) -> None:
        """Do it undisturbed, and count its steps."""
        await self.operation.do(self.stage)
        await self.stage.tidy()
        self.own_steps = _ENDLESS - await cancel_at_step(self._do, _ENDLESS)
        await self.stage.tidy()
        self.all_steps = _ENDLESS - await cancel_at_step(self._do, _ENDLESS, every_task=True)
        await self.stage.tidy()

    async def _do(self) -> None:
        await self.operation.do(self.stage)

    def points(self, rng: random.Random) -> Iterator[tuple[int, bool]]:
        """Yield steps, and whether they are of all tasks, without end."""
        for step in range(1, self.own_steps + 2):
            yield step, False
        while True:
            yield rng.randint(1, self.all_steps + 1), True

    async def cancel(self, step: int, every_task: bool) -> None:
        """Do it, cancelled then, and check what is there."""
        await cancel_at_step(self._do, step, every_task=every_task)
        await self.operation.check(self.stage)


async def sweep(stages: list[tuple[Stage, Mapping[str, Operation]]], budget: Budget, report: Report) -> None:
    """Cancel all operations of all stages in turn, until the budget is used up."""
    rng = random.Random(budget.seed)
    sweeps: list[tuple[_Sweep, Iterator[tuple[int, bool]]]] = []
    for stage, operations in stages:
        for name, operation in operations.items():
            one = _Sweep(name, operation, stage)
            await bounded(name, one.count, _PATIENCE, by_deadline=False)
            sweeps.append((one, one.points(rng)))
    for stage, _ in stages:
        await bounded("a look at what is there", stage.begin, _PATIENCE, by_deadline=False)
    while budget.is_left(report.operations.total()) and not report.is_hopeless:
        for one, points in sweeps:
            step, every_task = next(points)
            report.operations[one.name] += 1
            started = time.monotonic()

            async def cancel(one: _Sweep = one, step: int = step, every_task: bool = every_task) -> None:
                await one.cancel(step, every_task)

            whose = "of all tasks" if every_task else "of its own"
            what = f"{one.name!r}, cancelled at step {step} {whose}"
            try:
                await bounded(what, cancel, _PATIENCE, by_deadline=False)
            except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
                report.fail(f"{what}: {type(exc).__name__}: {exc}")
                return  # nothing is known of what is there now
            one.done += 1
            report.slowest = max(report.slowest, round(time.monotonic() - started, 2))
            if not budget.is_left(report.operations.total()):
                break
    swept = [f"{one.name} {min(one.done, one.own_steps)}/{one.own_steps}" for one, _ in sweeps]
    report.notes.append(f"steps of the own task that were swept: {', '.join(swept)}")
