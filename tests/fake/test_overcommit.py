"""Hosts that give out more memory than there is: who waits, who is refused, who is put to sleep."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
import trio
import trio.testing

from tests._disks import small_disk
from tests._leaks import cancel_at_every_step, wait_until
from tests._memory import RESERVE_MIB, TOTAL_MIB, MadeUpMemory
from trio_sandbox import CapacityError, HostConfig, SandboxConfig, SandboxError, SnapshotError, Timeouts
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.machines import _admission, _guard, _measured
from trio_sandbox.machines._admission import Admission
from trio_sandbox.machines._guard import MemoryGuard
from trio_sandbox.machines._memory import MemoryStatistics

from .test_lifecycle import MEMORY_MIB, Site, fail_with, open_site
from .test_warm import PYTHON, Machines, open_warm_pool

SMALL = SandboxConfig(memory_mib=MEMORY_MIB)
WHOLE = MEMORY_MIB + VM_OVERHEAD_MIB
#: What a small sandbox counts with.
EACH = WHOLE // 4


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpMemory:
    """Have a machine with all of its memory left."""
    return MadeUpMemory(tmp_path / "root", monkeypatch)


def overcommitted(sandboxes: int = 1000, *, patience: float = 5.0) -> Admission:
    return Admission(
        HostConfig(
            memory_budget_mib=max(sandboxes * EACH, WHOLE),
            vcpu_budget=1000,
            memory_overcommit=4,
            timeouts=Timeouts(admission=patience),
        )
    )


def seen(admission: Admission) -> MemoryStatistics:
    numbers = admission.statistics().memory
    assert numbers is not None
    return numbers


# --- What a sandbox counts with ---


async def test_a_sandbox_counts_with_its_part(memory: MadeUpMemory) -> None:
    admission = overcommitted(8)
    async with admission.admit(SMALL), admission.admit_together(SMALL, 7, beside=1):
        numbers = admission.statistics()
        assert (numbers.memory_mib_reserved, numbers.memory_overcommit) == (8 * EACH, 4)
        with trio.move_on_after(0) as scope:
            async with admission.admit(SMALL):
                pytest.fail("there is no room for a ninth")
        assert scope.cancelled_caught
    # A machine that makes a layer works all the time.
    async with admission.admit(SMALL, idles=False):
        assert admission.statistics().memory_mib_reserved == WHOLE


async def test_what_never_fits_is_what_one_may_have(memory: MadeUpMemory) -> None:
    admission = overcommitted(8)
    assert admission.total.memory_mib == 2 * WHOLE
    admission.amount(SandboxConfig(memory_mib=2 * WHOLE - VM_OVERHEAD_MIB))
    with pytest.raises(CapacityError, match=f"takes {2 * WHOLE + 1} MiB, .* and can never fit"):
        admission.amount(SandboxConfig(memory_mib=2 * WHOLE + 1 - VM_OVERHEAD_MIB))
    with pytest.raises(CapacityError, match=r"9 forks .* can never fit"):
        async with admission.admit_together(SMALL, 9, beside=0):
            pytest.fail("there is no room for nine")


async def test_without_overcommit_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measured, "memory_rooms", mock.Mock(side_effect=AssertionError("somebody looks")))
    admission = Admission(HostConfig(memory_budget_mib=1000, vcpu_budget=10))
    async with admission.admit(SMALL):
        assert not admission.needs_memory()
        numbers = admission.statistics()
        assert (numbers.memory_overcommit, numbers.memory) == (1, None)


# --- Who waits, and who is refused ---


async def test_while_memory_is_tight_nobody_is_admitted_and_nobody_overtakes(
    memory: MadeUpMemory, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_sandbox")
    admission = overcommitted()
    order: list[str] = []

    async def hold(name: str, config: SandboxConfig) -> None:
        async with admission.admit(config):
            order.append(name)

    async with admission.admit(SMALL), trio.open_nursery() as nursery:
        memory.set(RESERVE_MIB - 1)
        for name, mib in (("large", 4 * 2000), ("small", 128)):
            nursery.start_soon(hold, name, SandboxConfig(memory_mib=mib))
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        assert (admission.statistics().tasks_waiting, seen(admission).level) == (2, "tight")
        memory.set(RESERVE_MIB + 2000)
        await trio.sleep(1)
        assert order == [], "there is room for the small one, and the large one is first"
        memory.set(RESERVE_MIB + 3000)
    assert order == ["large", "small"]
    assert seen(admission).level == "easy"
    assert "memory is tight: of 20000 MiB in the machine 1999 MiB are left, and 2000 MiB are kept free" in caplog.text
    assert "a sandbox waits for memory: of 20000 MiB in the machine 1999 MiB are left" in caplog.text
    assert "memory is easy: of 20000 MiB in the machine 4000 MiB are left" in caplog.text


async def test_who_waits_too_long_is_told_what_was_measured(
    memory: MadeUpMemory, autojump_clock: trio.testing.MockClock
) -> None:
    admission = overcommitted()
    memory.set(3000, some=0.25)
    refused: list[float] = []

    async def wait(after: float) -> None:
        await trio.sleep(after)
        with pytest.raises(CapacityError) as caught:
            async with admission.admit(SMALL):
                pytest.fail("memory is tight")
        refused.append(trio.current_time() - began - after)
        words = str(caught.value)
        assert "memory was tight for 5 s: of 20000 MiB in the machine 3000 MiB are left, and 2000 MiB are kept" in words
        assert "some program waited for memory in 25%, and all in 0%" in words
        assert f"it counts with {EACH} MiB, by `HostConfig.memory_overcommit` 4" in words
        assert words.endswith("Nothing was started, and it is safe to try again")
        assert caught.value.retry_safe

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for after in (0.0, 0.1, 3.0):
            nursery.start_soon(wait, after)
    # Each waits as long as that, and not as long as those before it besides.
    assert all(5 <= seconds < 6 for seconds in refused)
    assert admission.statistics().memory_mib_reserved == 0
    memory.set(TOTAL_MIB)
    async with admission.admit(SMALL):
        pass


async def test_patience_begins_anew_when_somebody_is_admitted(
    memory: MadeUpMemory, autojump_clock: trio.testing.MockClock
) -> None:
    admission = overcommitted()
    admitted: list[float] = []

    async def wait() -> None:
        async with admission.admit(SMALL):
            admitted.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        memory.set(0)
        for _ in range(2):
            nursery.start_soon(wait)
        await trio.sleep(4)
        # One more than the reserve holds, and what that has shows at once.
        memory.set(RESERVE_MIB * 5 // 4 + EACH)
        await wait_until(lambda: bool(admitted))
        memory.set(0)
        await trio.sleep(4)
        memory.set(TOTAL_MIB)
    assert len(admitted) == 2


async def test_many_that_come_at_the_same_time_do_not_all_pass_the_same_look(
    memory: MadeUpMemory, autojump_clock: trio.testing.MockClock
) -> None:
    admission = overcommitted()
    memory.set(RESERVE_MIB + 20 * EACH)
    most = now = 0

    async def hold() -> None:
        nonlocal most, now
        async with admission.admit(SMALL):
            now += 1
            most = max(most, now)
            await trio.sleep(1)
            now -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(150):
            nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()
        assert now == 20
        assert f"{20 * EACH} MiB are for machines that start just now" in seen(admission).measured
        memory.set(TOTAL_MIB)
    assert most > 20
    assert admission.statistics().memory_mib_reserved == 0


async def test_what_is_up_shows_in_what_is_left(memory: MadeUpMemory) -> None:
    admission = overcommitted()
    memory.set(RESERVE_MIB + 2 * EACH)
    async with AsyncExitStack() as stack:
        for _ in range(10):
            note_up = await stack.enter_async_context(admission.admit(SMALL))
            note_up()
        for _ in range(10):
            note_up = await stack.enter_async_context(admission.admit_again(SMALL))
            note_up()
        assert "start just now" not in seen(admission).measured


async def test_what_was_closed_at_once_counts_no_more(memory: MadeUpMemory) -> None:
    admission = overcommitted()
    memory.set(RESERVE_MIB + 2 * EACH)
    for _ in range(100):
        async with admission.admit(SMALL), admission.admit(SMALL):
            pass
        async with admission.admit_together(SMALL, 2, beside=0) as shares:
            for share in shares:
                with share:
                    pass


async def test_cancelled_at_every_step_it_leaves_nothing_taken(
    memory: MadeUpMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_admission, "_LOOK", 0.01)
    admission = overcommitted()

    async def contend() -> None:
        memory.set(0)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(once)
            await trio.sleep(0.02)
            memory.set(TOTAL_MIB)

    async def once() -> None:
        async with admission.admit(SMALL):
            await trio.lowlevel.checkpoint()

    def check() -> None:
        assert admission.statistics().memory_mib_reserved == admission.statistics().tasks_waiting == 0

    assert await cancel_at_every_step(contend, check=check, every_task=True) > 5


async def test_what_can_not_be_read_is_as_it_was(
    memory: MadeUpMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    admission = overcommitted()
    monkeypatch.setattr(_measured, "memory_rooms", fail_with(OSError("no such device")))
    for _ in range(2):
        async with admission.admit(SMALL):
            pass
    assert caplog.text.count("what memory is left can't be read, and what was read last is taken for it") == 1


async def test_a_kernel_without_stalls_is_said_once(memory: MadeUpMemory, caplog: pytest.LogCaptureFixture) -> None:
    memory.forget_stalls()
    admission = overcommitted()
    async with admission.admit(SMALL):
        assert not seen(admission).stalls_known
    memory.set(RESERVE_MIB - 1)
    assert seen(admission).level == "easy", "statistics do not look"
    assert not admission.has_memory_for(admission.amount(SMALL))
    assert seen(admission).level == "tight"
    assert caplog.text.count("this kernel does not tell how long programs wait for memory") == 1


# --- Who is put to sleep ---


@attrs.define(eq=False)
class FakeSleeper:
    """A sandbox that is idle since a moment, and takes *mib* while it is awake."""

    name: str
    memory: MadeUpMemory
    told: list[str]
    idle_since: float | None = 0.0
    error: Exception | None = None
    busy: bool = False
    left_mib: int = 0
    """What is left when it sleeps."""
    seconds: float = 0.0
    """How long that takes."""

    async def doze(self) -> bool:
        self.told.append(self.name)
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        if not self.busy:
            self.idle_since = None
            self.memory.set(self.left_mib)
        return not self.busy


@attrs.define
class Guarded:
    admission: Admission
    memory: MadeUpMemory
    guard: MemoryGuard
    stack: AsyncExitStack
    told: list[str] = attrs.field(factory=list[str])

    def add(self, name: str, since: float | None = 0.0, *, left_mib: int = 0, seconds: float = 0.0) -> FakeSleeper:
        sleeper = FakeSleeper(name, self.memory, self.told, since, left_mib=left_mib, seconds=seconds)
        self.stack.enter_context(self.guard.watch(sleeper))
        return sleeper


@asynccontextmanager
async def open_guarded(
    memory: MadeUpMemory, directory: Path, give_back: Callable[[], bool] = bool
) -> AsyncGenerator[Guarded]:
    admission = overcommitted()
    guard = MemoryGuard(admission, give_back, directory)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await nursery.start(guard.serve)
        yield Guarded(admission, memory, guard, stack)
        nursery.cancel_scope.cancel()


async def test_the_longest_idle_sleep_first_and_only_as_many_as_it_takes(
    memory: MadeUpMemory, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1000)
    now = trio.current_time()
    async with open_guarded(memory, tmp_path) as guarded:
        guarded.add("young", now - 20, left_mib=TOTAL_MIB)
        guarded.add("old", now - 60, left_mib=100)
        guarded.add("middle", now - 40, left_mib=RESERVE_MIB // 2 * 5 // 4)
        guarded.add("at once", now + 1000)
        guarded.add("not now", None)
        memory.set(RESERVE_MIB // 2)
        await trio.sleep(5)
        assert guarded.told == [], "it is tight, but nobody waits"
        memory.set(100)
        await trio.sleep(5)
        assert guarded.told == ["old", "middle"]
        assert (seen(guarded.admission).level, seen(guarded.admission).put_to_sleep) == ("tight", 2)


async def test_who_waits_has_idle_ones_sleep(
    memory: MadeUpMemory, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_guarded(memory, tmp_path) as guarded:
        guarded.add("old", -20, left_mib=RESERVE_MIB * 2)
        guarded.add("young", -10)
        memory.set(RESERVE_MIB - 1)
        async with guarded.admission.admit(SMALL):
            assert guarded.told == ["old"]


async def test_busy_ones_and_those_that_can_not_are_left_alone_for_a_while(
    memory: MadeUpMemory,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_guarded(memory, tmp_path) as guarded:
        guarded.add("busy", -30).busy = True
        guarded.add("failing", -20).error = SnapshotError("no room on the disk")
        guarded.add("odd", -20).error = OSError("nor here")
        memory.set(0)
        await trio.sleep(9.5)
        assert guarded.told == ["busy", "failing", "odd"]
        assert "was not put to sleep for want of memory, and goes on: no room on the disk" in caplog.text
        guarded.add("idle", -10)
        await trio.sleep(1)
        assert guarded.told[3:] == ["idle"]
        await trio.sleep(10)
        assert guarded.told[4:] == ["busy", "failing", "odd"]
        assert seen(guarded.admission).put_to_sleep == 1


async def test_one_that_was_closed_meanwhile_is_not_asked(
    memory: MadeUpMemory, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_guarded(memory, tmp_path) as guarded:
        guarded.add("slow", -20, seconds=2).busy = True
        with guarded.guard.watch(FakeSleeper("closed", memory, guarded.told, -10)):
            memory.set(0)
            await trio.sleep(2)
        await trio.sleep(5)
        assert guarded.told == ["slow"]


async def test_a_full_disk_is_said_once_and_nobody_sleeps(
    memory: MadeUpMemory,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    with small_disk(mount_point, 40 * 2**20) as disk:
        (disk / "full").write_bytes(bytes(39 * 2**20))
        async with open_guarded(memory, disk) as guarded:
            guarded.add("idle", -10)
            memory.set(0)
            await trio.sleep(5)
            assert guarded.told == []
            assert caplog.text.count("no sandbox is put to sleep for want of memory: the disk of") == 1
            (disk / "full").unlink()
            await trio.sleep(2)
            assert guarded.told == ["idle"]


async def test_spares_go_before_anybody_sleeps(
    memory: MadeUpMemory, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    spares = ["one", "two"]

    def give_back() -> bool:
        if spares:
            guarded.told.append(spares.pop())
            return True
        return False

    async with open_guarded(memory, tmp_path, give_back) as guarded:
        guarded.add("idle", -10)
        memory.set(0)
        await trio.sleep(5)
        assert guarded.told == ["two", "one", "idle"]


async def test_the_warm_pool_gives_back_and_makes_no_new_ones(
    memory: MadeUpMemory, autojump_clock: trio.testing.MockClock
) -> None:
    machines = Machines()
    admission = overcommitted()
    async with open_warm_pool({PYTHON: 2}, admission, machines) as pool:
        await trio.sleep(1)
        assert machines.numbers() == [1, 2]
        memory.set(0)
        assert pool.give_back()
        assert pool.give_back(), "what the first had comes free just now"
        await trio.sleep(5)
        assert (machines.numbers(), pool.statistics().evicted) == ([2], 1)
        assert pool.give_back()
        await trio.sleep(100)
        assert not pool.give_back()
        assert (machines.numbers(), admission.statistics().memory_mib_reserved) == ([], 0)
        memory.set(TOTAL_MIB)
        await trio.sleep(5)
        assert machines.numbers() == [3, 4]


async def test_the_warm_pool_gives_back_what_it_is_about_to_open(
    memory: MadeUpMemory, autojump_clock: trio.testing.MockClock
) -> None:
    machines = Machines(enter=trio.sleep_forever)
    async with open_warm_pool({PYTHON: 1}, overcommitted(), machines) as pool:
        await trio.sleep(1)
        assert (machines.numbers(), pool.statistics().ready) == ([1], 0)
        memory.set(0)
        assert pool.give_back()
        await trio.sleep(5)
        assert machines.numbers() == []
        assert not pool.give_back()


# --- Sandboxes, whose machines are fakes ---


@asynccontextmanager
async def open_watched(memory: MadeUpMemory, directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Site]:
    """Yield a sandbox that a guard may put to sleep."""
    monkeypatch.setattr(_guard, "_LOOK", 0.02)
    monkeypatch.setattr(_guard, "_IDLE", 0.02)
    monkeypatch.setattr(_guard, "_PAUSE", 0.05)
    admission = overcommitted(patience=0.2)
    async with trio.open_nursery() as nursery:
        async with open_site(directory, admission=admission) as site:
            guard = MemoryGuard(admission, bool, directory)
            with guard.watch(site.lifecycle):
                await nursery.start(guard.serve)
                yield site
                nursery.cancel_scope.cancel()


async def test_an_idle_sandbox_sleeps_when_memory_is_short_and_the_next_request_wakes_it(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        await site.run("first")
        memory.set(0)
        await wait_until(lambda: seen(site.admission).put_to_sleep == 1)
        assert (site.lifecycle.hibernated, site.reserved()) == (True, 0)
        with pytest.raises(SnapshotError) as caught:
            await site.run()
        assert "the sandbox did not wake up, and still hibernates: no sandbox was opened or woken up" in str(
            caught.value
        )
        assert "memory was tight for 0.2 s: of 20000 MiB in the machine 0 MiB are left" in str(caught.value)
        assert caught.value.retry_safe
        memory.set(TOTAL_MIB)
        assert await site.run() == "first"
        assert not site.lifecycle.hibernated


async def test_one_in_which_something_runs_stays_awake(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        async with site.sandbox.stream("wait"):
            memory.set(0)
            await trio.sleep(0.3)
            assert site.launcher.asked == 0, "requests that come meanwhile do not wait for that"
        site.launcher.busy = True
        await wait_until(lambda: site.launcher.asked > 1)
        assert site.sandbox.statistics().hibernations == 0
        assert await site.run("first") == "first"
        site.launcher.busy = False
        await wait_until(lambda: site.lifecycle.hibernated)


async def test_one_whose_owner_needs_it_awake_stays_awake(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        site.lifecycle.slot.stays_awake = lambda: True
        memory.set(0)
        await trio.sleep(0.3)
        assert (site.launcher.asked, site.lifecycle.hibernated) == (0, False)
        site.lifecycle.slot.stays_awake = lambda: False
        await wait_until(lambda: site.lifecycle.hibernated)


async def test_one_with_a_connection_to_the_outside_stays_awake(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        channel = type(site.lifecycle.slot.machine.guest)
        statistics = channel.statistics

        def with_one(each: Any) -> object:
            return statistics(each)._replace(open_streams=1, peer_streams=1)

        with monkeypatch.context() as patch:
            patch.setattr(channel, "statistics", with_one)
            memory.set(0)
            await trio.sleep(0.3)
            assert (site.launcher.asked, site.lifecycle.hibernated) == (0, False)
        await wait_until(lambda: site.lifecycle.hibernated)


async def test_a_guest_that_does_not_answer_is_busy_and_not_ended(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_sandbox.sandbox._lifecycle._DOZE_PATIENCE", 0.05)
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        await site.run("first")
        site.launcher.silent = True
        memory.set(0)
        await wait_until(lambda: site.launcher.asked > 2)
        assert await site.run() == "first"
        assert site.lifecycle.slot.machine.failure is None


async def test_one_that_can_not_be_saved_goes_on(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        site.launcher.saving = fail_with(SnapshotError("the disk is full"))
        memory.set(0)
        await wait_until(
            lambda: "was not put to sleep for want of memory, and goes on: the disk is full" in caplog.text
        )
        assert await site.run("first") == "first"


async def test_a_request_that_comes_while_it_falls_asleep_calls_that_off(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        await site.run("first")
        saving = trio.Event()
        site.launcher.saving = saving.set
        memory.set(0)
        await saving.wait()
        assert await site.run() == "first", "though there is no room to wake it up"
        assert site.sandbox.statistics().hibernations == 0
        await wait_until(lambda: site.lifecycle.hibernated)


async def test_by_call_it_sleeps_until_it_is_told(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_watched(memory, tmp_path, monkeypatch) as site:
        await site.run("first")
        await site.sandbox.hibernate()
        memory.set(0)
        await trio.sleep(0.2)
        assert seen(site.admission).put_to_sleep == 0
        with pytest.raises(SandboxError, match=r"call `await sandbox.resume\(\)`"):
            await site.run()
        memory.set(TOTAL_MIB)
        await site.sandbox.resume()
        assert await site.run() == "first"


async def test_closed_while_it_falls_asleep_nothing_is_left(
    memory: MadeUpMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`open_site` checks that: it is left at each step of falling asleep, the guard's and the sandbox's own."""
    steps = 0

    async def count(site: Site) -> None:
        nonlocal steps
        memory.set(0)
        while not site.lifecycle.hibernated:
            steps += 1
            await trio.lowlevel.checkpoint()

    async with open_watched(memory, tmp_path, monkeypatch) as site:
        await count(site)
    assert steps > 10
    for left in range(1, 40, 2):
        memory.set(TOTAL_MIB)
        async with open_watched(memory, tmp_path, monkeypatch) as site:
            await trio.sleep(0.03)
            dozing = trio.Event()
            doze = site.lifecycle.doze

            async def tell() -> bool:
                dozing.set()  # noqa: B023 - it is this round's
                return await doze()  # noqa: B023 - as above

            monkeypatch.setattr(site.lifecycle, "doze", tell)
            memory.set(0)
            await dozing.wait()
            for _ in range(left):
                await trio.lowlevel.checkpoint()
