"""What forks are made of, without machines: shares for all of them at once, and blocks that are entered and left together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step
from trio_sandbox import CapacityError, HostConfig, SandboxConfig
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.machines._admission import Admission
from trio_sandbox.machines._fork import check_count, open_together

CONFIG = SandboxConfig(memory_mib=128)
EACH = 128 + VM_OVERHEAD_MIB


def admission(sandboxes: int) -> Admission:
    return Admission(HostConfig(memory_budget_mib=EACH * sandboxes, vcpu_budget=100))


async def test_shares_are_waited_for_together_and_given_back_one_by_one() -> None:
    budget = admission(4)
    order: list[str] = []

    async def fork() -> None:
        async with budget.admit_together(CONFIG, 3, beside=1) as shares:
            order.append("forks")
            first, *_ = shares
            with first:
                assert budget.statistics().memory_mib_reserved == 4 * EACH
            assert budget.statistics().memory_mib_reserved == 3 * EACH
        assert budget.statistics().memory_mib_reserved == EACH

    async with budget.admit(CONFIG), trio.open_nursery() as nursery:
        async with budget.admit(CONFIG):
            nursery.start_soon(fork)
            await trio.testing.wait_all_tasks_blocked()
            # Two of the three would fit: nobody gets a part and waits for the rest.
            assert budget.statistics().memory_mib_reserved == 2 * EACH
            assert budget.statistics().tasks_waiting == 1
            order.append("another")
    assert order == ["another", "forks"]
    assert budget.statistics().memory_mib_reserved == 0


async def test_more_than_ever_fit_beside_what_there_is() -> None:
    budget = admission(4)
    with pytest.raises(CapacityError, match=r"3 forks of a sandbox with 128 MiB .* beside the 2 that there are"):
        async with budget.admit_together(CONFIG, 3, beside=2):
            pytest.fail("admitted")
    with pytest.raises(CapacityError, match=r"1000 forks .* 1001 vCPUs"):
        async with Admission(HostConfig(memory_budget_mib=10**9, vcpu_budget=100)).admit_together(
            CONFIG, 1000, beside=1
        ):
            pytest.fail("admitted")
    assert budget.statistics().memory_mib_reserved == 0


async def test_cancelled_while_waiting_for_shares() -> None:
    budget = admission(3)

    async def fork() -> None:
        async with trio.open_nursery() as nursery:
            async with budget.admit(CONFIG), budget.admit(CONFIG):
                nursery.start_soon(hold)
                await trio.testing.wait_all_tasks_blocked()

    async def hold() -> None:
        async with budget.admit_together(CONFIG, 2, beside=1) as shares:
            with shares[0]:
                await trio.lowlevel.checkpoint()

    steps = await cancel_at_every_step(fork, check=lambda: _assert_nothing_taken(budget), every_task=True)
    assert steps > 5


def _assert_nothing_taken(budget: Admission) -> None:
    assert (budget.statistics().memory_mib_reserved, budget.statistics().tasks_waiting) == (0, 0)


class Blocks:
    """Blocks that count who is in them."""

    def __init__(self) -> None:
        self.inside = 0
        self.most_entering = self.entering = 0

    @asynccontextmanager
    async def open(self, number: int, *, fails: bool = False) -> AsyncGenerator[int]:
        self.entering += 1
        self.most_entering = max(self.most_entering, self.entering)
        try:
            await trio.lowlevel.checkpoint()
            if fails:
                raise OSError("it could not be opened")
        finally:
            self.entering -= 1
        self.inside += 1
        try:
            yield number
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            self.inside -= 1


async def test_blocks_that_are_entered_and_left_together() -> None:
    blocks = Blocks()
    async with open_together([blocks.open(number) for number in range(50)]) as entered:
        assert entered == tuple(range(50))
        assert blocks.inside == 50
        assert 1 < blocks.most_entering < 50, "some at a time"
    assert blocks.inside == 0


async def test_one_that_can_not_be_entered() -> None:
    blocks = Blocks()
    with pytest.raises(OSError, match="it could not be opened"):
        async with open_together([blocks.open(number, fails=number == 7) for number in range(20)]):
            pytest.fail("entered")
    assert (blocks.inside, blocks.entering) == (0, 0)


async def test_several_that_can_not_be_entered_are_one_error() -> None:
    blocks = Blocks()
    with pytest.raises(OSError, match="it could not be opened") as caught:
        async with open_together([blocks.open(number, fails=number < 2) for number in range(2)]):
            pytest.fail("entered")
    assert caught.value.__notes__ == ["Sandbox.fork(): another one could not be opened either: it could not be opened"]
    assert (blocks.inside, blocks.entering) == (0, 0)


async def test_blocks_are_left_at_every_cancellation() -> None:
    blocks = Blocks()

    async def use() -> None:
        async with open_together([blocks.open(number) for number in range(3)]):
            await trio.lowlevel.checkpoint()

    def check() -> None:
        assert (blocks.inside, blocks.entering) == (0, 0)

    assert await cancel_at_every_step(use, check=check) > 3
    assert await cancel_at_every_step(use, check=check, every_task=True) > 10


@pytest.mark.parametrize("count", [0, -1])
def test_numbers_of_forks_that_are_none(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, not {count}"):
        check_count(count)


@pytest.mark.parametrize("count", ["4", 2.0, None, True])
def test_what_is_no_number_of_forks(count: object) -> None:
    with pytest.raises(TypeError, match="must be a whole number"):
        check_count(count)
