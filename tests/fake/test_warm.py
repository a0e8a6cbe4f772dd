"""The warm pool with machines that are numbers: who gets one, who has to go, and what is left."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step
from trio_sandbox import CapacityError, HostConfig, SandboxConfig, VmDiedError
from trio_sandbox._image import AnyImage
from trio_sandbox._nurseries import open_services
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.machines import _admission
from trio_sandbox.machines._admission import Admission
from trio_sandbox.machines._budget import Limit
from trio_sandbox.machines._ledger import LedgerEntry, open_ledger
from trio_sandbox.machines._warm import WarmKey, WarmPool

SMALL = SandboxConfig(memory_mib=128)
LARGE = SandboxConfig(memory_mib=128 + 128 + VM_OVERHEAD_MIB)  # as much as two small ones
EACH = 128 + VM_OVERHEAD_MIB
PYTHON = ("python", SMALL)
OTHER = ("other", SMALL)


async def checkpoint() -> None:
    await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class Machine:
    number: int
    image: AnyImage
    dead: bool = False


@attrs.define(eq=False)
class Machines:
    """Opens machines that are numbers; knows which are open, and does with each step what a test says."""

    enter: Callable[[], Awaitable[None]] = checkpoint
    waking: Callable[[], Awaitable[None]] = checkpoint
    leave: Exception | None = None
    open_now: list[Machine] = attrs.field(factory=list[Machine])
    prepared: list[AnyImage] = attrs.field(factory=list[AnyImage])
    opened: int = 0
    settled: int = 0

    async def prepare(self, image: AnyImage) -> None:
        self.prepared.append(image)
        await checkpoint()

    @asynccontextmanager
    async def open(self, image: AnyImage, config: SandboxConfig) -> AsyncGenerator[Machine]:
        self.opened += 1
        machine = Machine(self.opened, image)
        self.open_now.append(machine)
        try:
            await self.enter()
            yield machine
        finally:
            with trio.move_on_after(1, shield=True):
                await checkpoint()
            self.open_now.remove(machine)
            if self.leave is not None:
                raise self.leave

    async def settle(self, vm: Machine) -> None:
        self.settled += 1
        await checkpoint()

    async def wake(self, vm: Machine) -> None:
        if vm.dead:
            raise VmDiedError("it was killed")
        await self.waking()

    def numbers(self) -> list[int]:
        return sorted(machine.number for machine in self.open_now)


@asynccontextmanager
async def open_warm_pool(
    wanted: dict[WarmKey, int], admission: Admission, machines: Machines
) -> AsyncGenerator[WarmPool[Machine]]:
    async with open_services("test") as services:
        pool = WarmPool(wanted, admission, machines)
        await services.start(pool.serve)
        yield pool


def room_for(count: int) -> Admission:
    return Admission(HostConfig(memory_budget_mib=count * EACH, vcpu_budget=100))


async def use(pool: WarmPool[Machine], admission: Admission, key: WarmKey = PYTHON) -> int | None:
    """Do what the host does; returns the machine's number if it came from the pool."""
    with pool.user_opens():
        async with pool.checkout(*key) as held:
            if held is not None:
                return held.vm.number
            async with admission.admit(key[1]):
                return None


quiet = trio.testing.wait_all_tasks_blocked


async def test_a_pool_fills_hands_out_and_fills_again(autojump_clock: trio.testing.MockClock) -> None:
    machines, admission = Machines(), room_for(10)
    async with open_warm_pool({PYTHON: 2, OTHER: 1}, admission, machines) as pool:
        assert pool.statistics().ready == 0, "nobody waits for the pool"
        await quiet()
        assert machines.prepared == ["other", "python"]
        assert pool.statistics().ready == machines.settled == 3
        assert admission.statistics().memory_mib_reserved == 3 * EACH
        async with pool.checkout(*PYTHON) as held:
            assert held is not None
            assert held.vm.image == "python"
            await quiet()
            assert pool.statistics().ready == 3, "there is another in its place"
            assert admission.statistics().memory_mib_reserved == 4 * EACH
        assert held.closed
        assert held.vm not in machines.open_now
        assert admission.statistics().memory_mib_reserved == 3 * EACH
        numbers = pool.statistics()
        assert (numbers.hits, numbers.misses, numbers.refills, numbers.refill_failures) == (1, 0, 4, 0)
        assert numbers.last_refill_seconds is not None
        assert numbers.total_refill_seconds >= numbers.last_refill_seconds
    assert machines.open_now == []
    assert admission.statistics().memory_mib_reserved == 0


async def test_a_pool_leaves_room_to_other_hosts_and_fills_when_they_are_gone(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_admission, "memory_limit", lambda: Limit(4 * EACH, "says the test"))
    with open_ledger(tmp_path / "ledgers") as own, open_ledger(tmp_path / "ledgers") as other:
        other.publish(LedgerEntry(pid=1, memory_total=4 * EACH, memory_reserved=2 * EACH))
        machines, admission = Machines(), Admission(HostConfig(vcpu_budget=100), None, own)
        async with open_warm_pool({PYTHON: 3}, admission, machines) as pool:
            await quiet()
            assert pool.statistics().ready == 2
            async with admission.admit(SMALL):  # the pool gives way, and nobody waits for the other host
                assert (pool.statistics().ready, pool.statistics().evicted) == (1, 1)
            other.publish(LedgerEntry(pid=1, memory_total=4 * EACH))
            await trio.sleep(10)
            assert pool.statistics().ready == 3


async def test_configurations_match_as_a_whole(autojump_clock: trio.testing.MockClock) -> None:
    machines, admission = Machines(), room_for(10)
    async with open_warm_pool({PYTHON: 1}, admission, machines) as pool:
        await quiet()
        for other in (
            ("other", SMALL),
            ("python", LARGE),
            ("python", attrs.evolve(SMALL, max_output_bytes=1)),
            ("python", attrs.evolve(SMALL, warmup="1")),
        ):
            async with pool.checkout(*other) as held:
                assert held is None
        assert pool.statistics().misses == 0, "of what the pool never has, there is nothing to miss"
        async with pool.checkout("python", SandboxConfig(memory_mib=128)) as held:
            assert held is not None
            # The next comes before there is another.
            async with pool.checkout(*PYTHON) as other_held:
                assert other_held is None
        assert (pool.statistics().hits, pool.statistics().misses) == (1, 1)


async def test_the_dead_are_dropped_and_the_next_is_tried(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    machines, admission = Machines(), room_for(10)
    async with open_warm_pool({PYTHON: 3}, admission, machines) as pool:
        await quiet()
        machines.open_now[0].dead = machines.open_now[1].dead = True
        assert await use(pool, admission) == 3
        assert "could not be used any more: it was killed" in caplog.text
        await trio.sleep(1)
        assert machines.numbers() == [4, 5, 6]
        for machine in machines.open_now:
            machine.dead = True
        assert await use(pool, admission) is None
        numbers = pool.statistics()
        assert (numbers.hits, numbers.misses, numbers.dropped) == (1, 1, 5)
    assert machines.open_now == []


async def test_a_user_who_would_wait_makes_idle_machines_go(autojump_clock: trio.testing.MockClock) -> None:
    """Of any configuration, as many as need be, and no more."""
    machines, admission = Machines(), room_for(4)
    async with open_warm_pool({PYTHON: 2, OTHER: 2}, admission, machines) as pool:
        await quiet()
        assert admission.statistics().memory_mib_reserved == 4 * EACH
        with pool.user_opens():
            async with admission.admit(LARGE):
                assert pool.statistics().ready == 2
                assert {machine.image for machine in machines.open_now} == {"python", "other"}
                await quiet()
        numbers = pool.statistics()
        assert (numbers.evicted, numbers.ready, numbers.refills) == (2, 2, 4), (
            "others may follow: it is left free for now"
        )
        await trio.sleep(10)
        assert pool.statistics().ready == 4
        # What fits only without the pool fits.
        with pool.user_opens():
            async with admission.admit(SandboxConfig(memory_mib=4 * EACH - VM_OVERHEAD_MIB)):
                assert machines.open_now == []
        with pytest.raises(CapacityError):
            async with admission.admit(SandboxConfig(memory_mib=4 * EACH)):
                pass


async def test_several_waiting_users_are_counted_together(autojump_clock: trio.testing.MockClock) -> None:
    machines, admission = Machines(), room_for(3)
    in_use = 0

    async def hold(config: SandboxConfig) -> None:
        nonlocal in_use
        async with admission.admit(config):
            in_use += 1
            await trio.sleep(1)

    async with open_warm_pool({PYTHON: 3}, admission, machines) as pool:
        await quiet()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, SMALL)
            nursery.start_soon(hold, SMALL)
            await quiet()
            assert (in_use, pool.statistics().ready) == (2, 1)
            # There is no room for it beside them; when they are gone, the last one of the pool is not in its way, and yet gone.
            nursery.start_soon(hold, LARGE)
            await quiet()
            assert pool.statistics().ready == 0


async def test_a_machine_that_is_being_opened_gives_way_as_well(autojump_clock: trio.testing.MockClock) -> None:
    machines, admission = Machines(enter=trio.sleep_forever), room_for(2)
    async with open_warm_pool({PYTHON: 1}, admission, machines) as pool:
        await quiet()
        assert machines.numbers() == [1]
        async with admission.admit(SMALL):
            assert machines.numbers() == [1], "there is room for both"
        with pool.user_opens():
            async with admission.admit(LARGE):
                assert machines.open_now == []
        assert (pool.statistics().evicted, pool.statistics().refills) == (1, 0)
        machines.enter = checkpoint
        await trio.sleep(10)
        assert pool.statistics().ready == 1


async def test_no_refill_begins_while_a_user_opens_or_waits(autojump_clock: trio.testing.MockClock) -> None:
    machines, admission = Machines(), room_for(3)
    async with open_warm_pool({PYTHON: 1}, admission, machines) as pool:
        await quiet()
        with pool.user_opens():
            async with pool.checkout(*PYTHON) as held:
                assert held is not None
                await trio.sleep(10)
                assert machines.opened == 1
        await quiet()
        assert machines.opened == 1, "its first answer comes first"
        await trio.sleep(1)
        assert machines.opened == 2

        # Where a refill would take what somebody waits for, or would displace somebody, it does not begin.
        async with admission.admit(LARGE), trio.open_nursery() as nursery:
            await quiet()
            assert pool.statistics().ready == 1

            async def wait_for_two() -> None:
                async with admission.admit(LARGE):
                    pass

            nursery.start_soon(wait_for_two)
            await trio.sleep(10)
            assert machines.open_now == []
            nursery.cancel_scope.cancel()
        await trio.sleep(10)
        assert pool.statistics().ready == 1


async def test_a_full_host_is_not_refilled_and_does_not_spin(autojump_clock: trio.testing.MockClock) -> None:
    machines, admission = Machines(), room_for(1)
    async with open_warm_pool({PYTHON: 2}, admission, machines) as pool:
        await trio.sleep(3600)
        assert (machines.opened, pool.statistics().ready) == (1, 1)


async def test_a_pool_that_can_not_be(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CapacityError, match="can never fit"):
        WarmPool({PYTHON: 1, ("python", LARGE): 1}, room_for(1), Machines())
    WarmPool({PYTHON: 1, ("python", LARGE): 0}, room_for(1), Machines())
    assert caplog.text == ""
    WarmPool({PYTHON: 2}, room_for(1), Machines())
    assert "will never be full" in caplog.text


async def test_refills_that_fail_are_logged_and_tried_less_and_less_often(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenError(Exception):
        """Of no kind that anybody knows."""

    failures: list[Exception] = [VmDiedError("no luck"), OSError("disk full"), BrokenError("a bug")]
    begun: list[float] = []

    async def enter() -> None:
        begun.append(trio.current_time())
        await checkpoint()
        if failures:
            raise failures.pop(0)

    machines, admission = Machines(enter=enter), room_for(10)
    async with open_warm_pool({PYTHON: 1, OTHER: 1}, admission, machines) as pool:
        await trio.sleep(100)
        assert pool.statistics().ready == 2, "the host and the pool go on"
        assert pool.statistics().refill_failures == 3
    assert [round(moment - begun[0]) for moment in begun] == [0, 0, 1, 1, 3]
    for words in ("no luck", "disk full", "a bug"):
        assert words in caplog.text


async def test_an_image_that_is_not_ready_is_tried_again_with_the_machine(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    @attrs.define(eq=False)
    class Unready(Machines):
        async def prepare(self, image: AnyImage) -> None:
            await checkpoint()
            raise OSError(f"no {image}")

    async with open_warm_pool({PYTHON: 1}, room_for(1), Unready()) as pool:
        await quiet()
        assert pool.statistics().ready == 1
    assert "image 'python' is not ready for the pool: no python" in caplog.text


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_machine_that_ends_badly(
    handed_over: bool, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has it is told; where nobody has, the log is."""
    machines, admission = Machines(leave=VmDiedError("would not go")), room_for(1)
    async with open_warm_pool({PYTHON: 1}, admission, machines) as pool:
        await quiet()
        if handed_over:
            with pytest.raises(VmDiedError, match="would not go"):
                async with pool.checkout(*PYTHON):
                    pass
        else:
            async with admission.admit(SMALL):
                await quiet()
            assert "did not end well: would not go" in caplog.text
        machines.leave = None
    assert machines.open_now == []


async def test_cancelled_between_checkout_and_use_the_machine_is_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machines, admission = Machines(waking=trio.sleep_forever), room_for(10)
    async with open_warm_pool({PYTHON: 1}, admission, machines) as pool:
        await quiet()
        with trio.move_on_after(1):
            await use(pool, admission)
        await trio.sleep(1)
        assert machines.numbers() == [2], "not back in the pool: another"
        assert pool.statistics().hits == 0


async def test_cancelled_anywhere_it_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    machines, admission = Machines(), room_for(3)

    async def all_of_it() -> None:
        async with open_warm_pool({PYTHON: 2, OTHER: 1}, admission, machines) as pool:
            for _ in range(10):
                await checkpoint()
            await use(pool, admission)
            with pool.user_opens():
                async with pool.checkout(*PYTHON), admission.admit(LARGE):
                    await checkpoint()
            await use(pool, admission, OTHER)

    def check() -> None:
        assert machines.open_now == []
        assert admission.demand == type(admission.demand)(0, 0)

    assert await cancel_at_every_step(all_of_it, check=check) > 20
    assert await cancel_at_every_step(all_of_it, check=check, every_task=True) > 40
