"""Several sandboxes that are opened together and live for one block."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, TypeVar

import trio

from .._nurseries import hide_nursery, open_services
from ._machines import HeldMachine, hold_machine

T = TypeVar("T")

_OWNER: Final = "Sandbox.fork()"
#: Machines that are opened at a time, for each processor: one computes while another waits.
_OPENINGS_PER_PROCESSOR: Final = 2


def check_count(count: object) -> int:
    """Return *count*, the number of sandboxes wanted.

    Raises:
      TypeError, ValueError: if it is none.

    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"the number of forks must be a whole number, not {count!r}")
    if count < 1:
        raise ValueError(f"the number of forks must be at least 1, not {count}")
    return count


@asynccontextmanager
async def open_together(openings: Sequence[AbstractAsyncContextManager[T]]) -> AsyncGenerator[tuple[T, ...]]:
    """Enter all of *openings* for a block, some at a time, each in a task of its own, and leave them together.

    If one fails, or this is cancelled, those that have been entered are left again.

    Raises:
      Exception: what entering the first that failed raised. What more of them raised before they were given up, as a
        rule for the same reason, is in its notes.

    """
    async with open_services(_OWNER) as services:
        held: dict[int, HeldMachine[T]] = {}
        failures: list[Exception] = []
        limiter = trio.CapacityLimiter(_OPENINGS_PER_PROCESSOR * len(os.sched_getaffinity(0)))

        async def enter(number: int) -> None:
            async with limiter:
                try:
                    held[number] = await hold_machine(services, openings[number])
                except Exception as exc:  # noqa: BLE001 - it is raised below
                    failures.append(exc)
                    nursery.cancel_scope.cancel(reason="another one could not be opened")

        with hide_nursery(_OWNER):
            async with trio.open_nursery() as nursery:
                for number in range(len(openings)):
                    nursery.start_soon(enter, number)
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"{_OWNER}: another one could not be opened either: {other}")
            raise first
        try:
            yield tuple(held[number].vm for number in range(len(openings)))
        finally:
            # The services alone would end them one after the other.
            with trio.CancelScope(shield=True), hide_nursery(_OWNER):
                async with trio.open_nursery() as nursery:
                    for each in held.values():
                        nursery.start_soon(each.close)
