"""Tasks that wait for their share of a host."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from tests._disks import small_disk
from tests._leaks import cancel_at_every_step
from trio_sandbox import CapacityError, HostConfig, SandboxConfig
from trio_sandbox.constants import IMAGE_DISK_MIB, MINIMUM_DISK_MIB, VM_OVERHEAD_MIB
from trio_sandbox.machines import _disk_limit
from trio_sandbox.machines._admission import Admission
from trio_sandbox.machines._disk_limit import choose_disk_mib

SMALL = SandboxConfig(memory_mib=128)
EACH = 128 + VM_OVERHEAD_MIB


def room_for(count: int) -> Admission:
    return Admission(HostConfig(memory_budget_mib=count * EACH, vcpu_budget=100))


def reserved(admission: Admission) -> tuple[int, int, int]:
    numbers = admission.statistics()
    return numbers.memory_mib_reserved, numbers.vcpus_reserved, numbers.tasks_waiting


async def test_a_task_waits_until_there_is_room_and_nobody_overtakes(autojump_clock: trio.testing.MockClock) -> None:
    admission = room_for(2)
    order: list[str] = []

    async def hold(name: str, config: SandboxConfig, seconds: float) -> None:
        async with admission.admit(config):
            order.append(name)
            await trio.sleep(seconds)
            order.append(f"{name} left")

    async with trio.open_nursery() as nursery:
        for name, config, seconds in [
            ("a", SMALL, 1),
            ("large", SandboxConfig(memory_mib=128 + EACH), 1),
            ("b", SMALL, 1),
            ("c", SMALL, 2),
        ]:
            nursery.start_soon(hold, name, config, seconds)
            await trio.testing.wait_all_tasks_blocked()
        # There would be room for b beside a; but then the large one might wait for ever.
        assert order == ["a"]
        assert reserved(admission) == (EACH, 1, 3)
    assert order[:3] == ["a", "a left", "large"]
    assert order[3] == "large left"
    assert sorted(order[4:6]) == ["b", "c"]
    assert reserved(admission) == (0, 0, 0)


async def test_processors_are_counted_as_well() -> None:
    admission = Admission(HostConfig(memory_budget_mib=10**6, vcpu_budget=3))
    async with admission.admit(SandboxConfig(vcpus=2)):
        with trio.move_on_after(0) as scope:
            async with admission.admit(SandboxConfig(vcpus=2)):
                pytest.fail("there is one left")
        assert scope.cancelled_caught
        async with admission.admit(SandboxConfig(vcpus=1)):
            assert admission.statistics().vcpus_reserved == admission.statistics().vcpu_budget == 3


async def test_what_never_fits_is_refused_at_once_even_while_others_wait() -> None:
    admission = Admission(HostConfig(memory_budget_mib=300, vcpu_budget=2))
    async with admission.admit(SMALL):
        for config, words in [
            (
                SandboxConfig(memory_mib=256),
                [f"{256 + VM_OVERHEAD_MIB} MiB", "300 MiB", "HostConfig.memory_budget_mib"],
            ),
            (SandboxConfig(memory_mib=128, vcpus=3), ["3 vCPUs", "may have 2", "HostConfig.vcpu_budget"]),
        ]:
            with pytest.raises(CapacityError) as caught:
                async with admission.admit(config):
                    pytest.fail("never fits")
            assert all(word in str(caught.value) for word in words)
            assert caught.value.retry_safe
    assert reserved(admission) == (0, 0, 0)


async def test_a_waiter_that_gives_up_lets_those_behind_it_through() -> None:
    admission = room_for(2)
    entered = trio.Event()

    async def small() -> None:
        async with admission.admit(SMALL):
            entered.set()
            await trio.sleep_forever()

    async def large(scope: trio.CancelScope) -> None:
        with scope:
            async with admission.admit(SandboxConfig(memory_mib=128 + EACH)):
                pytest.fail("there is no room for it")

    async with trio.open_nursery() as nursery, admission.admit(SMALL):
        scope = trio.CancelScope()
        nursery.start_soon(large, scope)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(small)
        await trio.testing.wait_all_tasks_blocked()
        assert reserved(admission) == (EACH, 1, 2)
        scope.cancel()
        await entered.wait()
        assert reserved(admission) == (2 * EACH, 2, 0)
        nursery.cancel_scope.cancel()


async def test_a_waiter_cancelled_in_the_moment_of_its_grant_takes_nothing() -> None:
    admission = room_for(1)
    scope = trio.CancelScope()

    async def wait() -> None:
        with scope:
            async with admission.admit(SMALL):
                await trio.lowlevel.checkpoint()
                pytest.fail("was cancelled")

    async with trio.open_nursery() as nursery:
        async with admission.admit(SMALL):
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
        scope.cancel()  # it was granted just now, and has not run since
        assert reserved(admission) == (EACH, 1, 0)
    assert reserved(admission) == (0, 0, 0)


async def test_cancelled_at_every_step_it_leaves_nothing_taken() -> None:
    admission = room_for(1)

    async def contend() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(once)

    async def once() -> None:
        async with admission.admit(SMALL):
            await trio.lowlevel.checkpoint()

    def check() -> None:
        assert reserved(admission) == (0, 0, 0)

    assert await cancel_at_every_step(contend, check=check, every_task=True) > 5


async def test_an_error_in_the_block_comes_out_as_it_is_and_gives_back() -> None:
    admission = room_for(1)
    with pytest.raises(KeyError, match="of the body"):
        async with admission.admit(SMALL):
            raise KeyError("of the body")
    assert reserved(admission) == (0, 0, 0)


@pytest.mark.parametrize("value", [0, -1])
def test_a_budget_of_nothing_is_wrong(value: int) -> None:
    with pytest.raises(ValueError, match="memory_budget_mib"):
        HostConfig(memory_budget_mib=value)
    with pytest.raises(ValueError, match="vcpu_budget"):
        HostConfig(vcpu_budget=value)


async def test_a_share_is_reserved_only_if_that_makes_nobody_wait() -> None:
    admission = room_for(2)
    told: list[str] = []
    admission.on_wait = lambda: told.append("somebody waits")
    admission.on_release = lambda: told.append("something came free")
    with admission.reserve(SMALL) as first, admission.reserve(SMALL) as second, admission.reserve(SMALL) as third:
        assert (first, second, third) == (True, True, False)
        assert reserved(admission) == (2 * EACH, 2, 0)
    assert reserved(admission) == (0, 0, 0)
    assert told == ["something came free"] * 3
    with pytest.raises(CapacityError):
        admission.reserve(SandboxConfig(memory_mib=128 + 2 * EACH)).__enter__()

    async def wait(task_status: trio.TaskStatus[None]) -> None:
        async with admission.admit(SandboxConfig(memory_mib=128 + EACH)):
            task_status.started()

    del told[:]
    with admission.reserve(SMALL) as first:
        assert first
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, trio.TASK_STATUS_IGNORED)
            await trio.testing.wait_all_tasks_blocked()
            assert told == ["somebody waits"]
            assert admission.demand.memory_mib == 3 * EACH
            # It would fit, and it would have the one who waits wait longer.
            with admission.reserve(SMALL) as second:
                assert not second
            nursery.cancel_scope.cancel()
    assert reserved(admission) == (0, 0, 0)


# --- Disks ---


async def test_disks_are_counted_where_there_is_a_budget() -> None:
    admission = Admission(HostConfig(memory_budget_mib=10**6, vcpu_budget=100, disk_budget_mib=100))
    with pytest.raises(
        CapacityError, match=r"may write 8192 MiB to its disk, without `SandboxConfig.disk_mib`, can never fit"
    ):
        admission.amount(SMALL)
    with pytest.raises(CapacityError, match=r"may write 101 MiB .* may write 100 MiB \(HostConfig.disk_budget_mib\)"):
        admission.amount(SandboxConfig(disk_mib=101))
    with pytest.raises(CapacityError, match=r"and 120 MiB of the 100 MiB of `HostConfig.disk_budget_mib`"):
        async with admission.admit_together(SandboxConfig(disk_mib=40), 2, beside=1):
            pytest.fail("there is no room for three")
    async with admission.admit(SandboxConfig(disk_mib=60)):
        assert admission.statistics().disk_mib_reserved == 60
        with trio.move_on_after(0) as scope:
            async with admission.admit(SandboxConfig(disk_mib=60)):
                pytest.fail("there are 40 MiB left")
        assert scope.cancelled_caught
        async with admission.admit(SandboxConfig(disk_mib=40)):
            assert admission.statistics().disk_mib_reserved == 100
    assert admission.statistics().disk_mib_reserved == 0


async def test_a_disk_stays_taken_while_its_sandbox_sleeps() -> None:
    admission = Admission(HostConfig(memory_budget_mib=10**6, vcpu_budget=100, disk_budget_mib=100))
    config = SandboxConfig(disk_mib=60)
    with ExitStack() as disk:
        async with admission.admit(config):
            disk.enter_context(admission.keep_disk(config))
        assert reserved(admission) == (0, 0, 0)
        assert admission.statistics().disk_mib_reserved == 60
        with admission.reserve(config) as fits:
            assert not fits
        async with admission.admit_again(config):
            assert reserved(admission) == (config.memory_mib + VM_OVERHEAD_MIB, 1, 0)
            assert admission.statistics().disk_mib_reserved == 60
    assert admission.statistics().disk_mib_reserved == 0


async def test_without_a_budget_disks_are_not_counted() -> None:
    async with room_for(2).admit(SandboxConfig(memory_mib=128, disk_mib=10**9)):
        pass


async def test_nothing_is_opened_on_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    with small_disk(mount_point, 40 * 2**20) as disk:
        admission = Admission(HostConfig(memory_budget_mib=10 * EACH, vcpu_budget=100), disk)
        async with admission.admit(SMALL):
            (disk / "full").write_bytes(bytes(39 * 2**20))
            with pytest.raises(
                CapacityError, match=r"has 1 MiB left, and 2 MiB are kept .* safe to try again"
            ) as caught:
                async with admission.admit(SMALL):
                    pytest.fail("the disk is nearly full")
            assert caught.value.retry_safe
            with pytest.raises(CapacityError, match="1 MiB left"):
                async with admission.admit_together(SMALL, 2, beside=1):
                    pytest.fail("the disk is nearly full")
            with pytest.raises(CapacityError, match="1 MiB left"), admission.reserve(SMALL):
                pytest.fail("the disk is nearly full")
            # What sleeps has its place there already.
            async with admission.admit_again(SMALL):
                assert reserved(admission) == (2 * EACH, 2, 0)
            (disk / "full").unlink()
            async with admission.admit(SMALL):
                assert reserved(admission) == (2 * EACH, 2, 0)
        assert reserved(admission) == (0, 0, 0)


def test_who_has_no_limit_of_its_disk_gets_no_more_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    with small_disk(mount_point, 40 * 2**20) as disk:
        assert choose_disk_mib(None, disk) == 38
        assert choose_disk_mib(10**6, disk) == 10**6, "who says so knows better"
        (disk / "full").write_bytes(bytes(39 * 2**20))
        assert choose_disk_mib(None, disk) == MINIMUM_DISK_MIB
    monkeypatch.setattr(_disk_limit, "disk_room", mock.Mock(return_value=IMAGE_DISK_MIB))
    assert choose_disk_mib(None, tmp_path) is None
