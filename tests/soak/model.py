"""The part `model`: random sequences of all that can be done to a sandbox, against a dictionary of what it must hold.

Hypothesis draws them, and looks for the shortest one that shows a difference; see `tests/_model.py`. Each sequence begins at
one checkpoint, with no variables and no files.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import trio
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests._model import ALL, Bench, Command, Interpreter, command_lists, play
from trio_sandbox import Host, Sandbox, Timeouts, open_host

from ._report import Budget, Report
from ._watch import bounded
from ._world import open_world, wait_for_none

#: Seconds for one sequence, on the slowest machine, and for what must be gone after the last.
_PATIENCE, _CLEAN_BOUND = 600.0, 10.0
#: Commands of the longest sequence, and sequences between two looks at the budget.
_LONGEST, _ROUND = 14, 20
_DIRECTORY = "/home/user/model"


async def soak(budget: Budget, report: Report) -> None:
    """Soak sequences."""
    async with open_world() as world:
        config = world.config(
            timeouts=Timeouts(interrupt_grace=60)
        )  # what is cancelled keeps its state, however slow the machine is now
        async with open_host(config) as host, host.open_sandbox() as sandbox:
            await sandbox.path(_DIRECTORY).mkdir()
            await sandbox.run("0")
            await _search(host, sandbox, budget, report)
        for what in await wait_for_none(world.left, _CLEAN_BOUND):
            report.fail(f"left: {what}")


async def _search(host: Host, sandbox: Sandbox, budget: Budget, report: Report) -> None:
    base = await sandbox.checkpoint()

    async def example(commands: list[Command]) -> None:
        if not budget.is_left(report.operations.total()):
            return
        started = time.monotonic()

        async def do() -> None:
            await sandbox.revert(base)
            await play(Bench(Interpreter(sandbox, _DIRECTORY), host), commands)

        await bounded(f"the sequence {[kind for kind, *_ in commands]}", do, _PATIENCE, by_deadline=False)
        report.operations.update(kind for kind, *_ in commands)
        report.slowest = max(report.slowest, round(time.monotonic() - started, 1))

    number = 0
    while budget.is_left(report.operations.total()):
        number += 1
        try:
            await trio.to_thread.run_sync(try_many, example, ALL, _LONGEST, _ROUND, budget.seed * 1000 + number)
        except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
            notes = "\n".join(getattr(exc, "__notes__", ()))
            report.fail(f"{type(exc).__name__}: {exc}\n{notes}")
            return  # what the sandbox holds now is of no use


def try_many(
    example: Callable[[list[Command]], Awaitable[None]], kinds: list[str], longest: int, many: int, start: int
) -> None:
    """Have Hypothesis try *many* sequences, from a thread of Trio's; what the shortest that fails raises is raised."""

    @seed(start)
    @settings(
        max_examples=many,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]
        phases=[Phase.generate, Phase.shrink],
    )
    @given(command_lists(kinds, longest))
    def search(commands: list[Command]) -> None:
        trio.from_thread.run(example, commands)

    search()
