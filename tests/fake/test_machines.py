"""A machine that a task holds: opened for whoever asks, closed early or with the block, and never left."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step
from trio_sandbox._nurseries import Services, open_services
from trio_sandbox.machines._machines import hold_machine


async def checkpoint() -> None:
    await trio.lowlevel.checkpoint()


class Machines:
    """Makes machines that are numbers, and knows which of them are open."""

    def __init__(self, *, enter: Callable[[], Awaitable[None]] = checkpoint, leave: Exception | None = None) -> None:
        self.open: list[int] = []
        self.opened = 0
        self._enter = enter
        self._leave = leave

    @asynccontextmanager
    async def machine(self) -> AsyncGenerator[int]:
        self.opened += 1
        number = self.opened
        self.open.append(number)
        try:
            await self._enter()
            yield number
        finally:
            with trio.move_on_after(1, shield=True):
                await checkpoint()
            self.open.remove(number)
            if self._leave is not None:
                raise self._leave


async def test_a_machine_is_open_until_the_block_is_left() -> None:
    machines = Machines()
    async with open_services("test") as services:
        held = await hold_machine(services, machines.machine())
        assert held.vm == 1
        assert machines.open == [1]
        assert not held.closed
    assert machines.open == []
    assert held.closed
    await held.close()


async def test_machines_are_closed_in_any_order_by_any_task_and_more_than_once() -> None:
    machines = Machines()
    async with open_services("test") as services:
        first, second, third = [await hold_machine(services, machines.machine()) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.close)
            nursery.start_soon(second.close)
        assert machines.open == [1, 3]
        await first.close()
        await first.close()
        assert machines.open == [3]
        assert third.vm == 3
    assert machines.open == []


async def test_a_machine_that_does_not_open_raises_in_the_opener_only() -> None:
    async def fail() -> None:
        await checkpoint()
        raise OSError("no disk")

    machines = Machines(enter=fail)
    async with open_services("test") as services:
        with pytest.raises(OSError, match="no disk"):
            await hold_machine(services, machines.machine())
        assert machines.open == []
        await checkpoint()


async def test_what_leaving_raises_is_for_whoever_closes_first() -> None:
    machines = Machines(leave=OSError("no disk"))
    async with open_services("test") as services:
        held = await hold_machine(services, machines.machine())
        with pytest.raises(OSError, match="no disk"):
            await held.close()
        await held.close()


async def test_what_leaving_raises_comes_out_of_the_block_if_that_closes() -> None:
    machines = Machines(leave=OSError("no disk"))
    with pytest.raises(OSError, match="no disk"):
        async with open_services("test") as services:
            await hold_machine(services, machines.machine())


async def test_closing_goes_on_when_cancelled() -> None:
    machines = Machines()
    async with open_services("test") as services:
        held = await hold_machine(services, machines.machine())
        with trio.CancelScope() as scope:
            scope.cancel()
            await held.close()
        assert machines.open == []


async def test_cancelled_anywhere_nothing_is_left() -> None:
    machines = Machines()

    async def use() -> None:
        async with open_services("test") as services:
            held = await hold_machine(services, machines.machine())
            other = await hold_machine(services, machines.machine())
            await held.close()
            assert machines.open == [other.vm]
            await checkpoint()

    def check() -> None:
        assert machines.open == []

    await cancel_at_every_step(use, check=check)
    await cancel_at_every_step(use, check=check, every_task=True)


async def test_a_machine_is_not_opened_once_the_block_is_left() -> None:
    machines = Machines()
    async with open_services("test") as services:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await hold_machine(services, machines.machine())
    assert machines.opened == 0


async def test_a_machine_that_is_opening_when_the_block_is_left_is_closed() -> None:
    machines = Machines(enter=trio.sleep_forever)

    async def open_late(services: Services) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await hold_machine(services, machines.machine())

    async with trio.open_nursery() as nursery:
        async with open_services("test") as services:
            nursery.start_soon(open_late, services)  # noqa: ASYNC111
            await trio.testing.wait_all_tasks_blocked()
            assert machines.open == [1]
        assert machines.open == []
