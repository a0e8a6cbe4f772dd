"""Virtual machines from boot to end, with a fake QEMU: what a real one does too seldom, or too slowly."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import (
    BalloonError,
    GuestProtocolError,
    QMPError,
    SandboxClosedError,
    Timeouts,
    VmBootError,
    VmDiedError,
)
from trio_sandbox.qemu import Runtime, VmManager, open_runtime, open_vm_manager

from ._qemu import fake_accelerator, fake_config


@pytest.fixture
async def runtime() -> AsyncGenerator[Runtime]:
    async with open_runtime(Path("/tmp")) as runtime:
        yield runtime


@pytest.fixture
async def manager(runtime: Runtime, tmp_path: Path) -> AsyncGenerator[VmManager]:
    async with open_vm_manager(runtime=runtime, accelerator=fake_accelerator(tmp_path)) as manager:
        yield manager


async def test_a_machine_from_boot_to_end(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            assert vm.guest.peer_hello["agent"] == "fake"
            assert await vm.qmp.execute("query-status") == {"status": "running", "running": True}
            assert await vm.guest.ping() >= 0
            assert manager.statistics().open == 1
            assert vm.failure is None
            assert not vm.closed
            os.kill(vm.pid, 0)
        assert vm.closed
        assert vm.failure is None
        assert await vm.wait_ended() is None
        with pytest.raises(ProcessLookupError):
            os.kill(vm.pid, 0)
    assert manager.statistics().open == 0
    assert manager.statistics().booted == 1
    assert manager.statistics().failed == 0


async def test_a_clone_s_balloon_is_refused_before_qemu_is_asked(manager: VmManager, tmp_path: Path) -> None:
    (tmp_path / "memory").touch()
    clone = attrs.evolve(fake_config(tmp_path), memory_file=tmp_path / "memory")
    os.truncate(tmp_path / "memory", clone.memory_mib * 2**20)
    async with manager.open_vm(clone) as vm:
        asked = vm.qmp_log()
        for operation in (vm.balloon.set_target(128), vm.balloon.inflate(128), vm.balloon.deflate(256)):
            with pytest.raises(BalloonError, match="shared with others; its balloon must not be moved"):
                await operation
        assert vm.qmp_log() == asked


async def test_the_body_is_cancelled_before_the_services(manager: VmManager, tmp_path: Path) -> None:
    answers: list[object] = []
    with trio.CancelScope() as scope:
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    answers.append(await vm.qmp.execute("query-status"))
                    answers.append(await vm.guest.ping())
    assert len(answers) == 2


async def test_qemu_that_exits_at_once(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path), pytest.raises(VmBootError, match="exited with status 1: qemu: could not do it"):
        async with manager.open_vm(fake_config(tmp_path, "refuse")):
            pytest.fail("booted")
    assert manager.statistics().failed == 1


async def test_a_guest_that_panics_at_boot(manager: VmManager, tmp_path: Path) -> None:
    with pytest.raises(VmBootError, match="the guest's kernel panicked: Kernel panic - not syncing: of fear") as caught:
        async with manager.open_vm(fake_config(tmp_path, "panic")):
            pytest.fail("booted")
    assert "last line" in caught.value.console
    # The first lines do not fit, and what the guest prints can't act on a terminal.
    assert "booting" not in caught.value.console
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("mode", ["no-hello", "no-qmp"])
async def test_a_guest_that_never_answers(runtime: Runtime, tmp_path: Path, mode: str) -> None:
    timeouts = Timeouts(boot=2, qmp_connect=30)
    async with open_vm_manager(runtime=runtime, accelerator=fake_accelerator(tmp_path), timeouts=timeouts) as manager:
        with nothing_left(tmp_path), pytest.raises(VmBootError, match=r"did not answer within 2 s") as caught:
            async with manager.open_vm(fake_config(tmp_path, mode)):
                pytest.fail("booted")
        assert isinstance(caught.value.__cause__, trio.TooSlowError)
        assert "last line" in caught.value.console


async def test_a_guest_that_says_garbage_in_place_of_hello(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path), pytest.raises(GuestProtocolError, match="broke the protocol"):
        async with manager.open_vm(fake_config(tmp_path, "garbage")):
            pytest.fail("booted")


async def test_a_guest_of_another_version_is_ended_with_a_word_about_that(manager: VmManager, tmp_path: Path) -> None:
    words = r"speaks version 2 of the protocol, and this is version 1: it is of another version of trio-sandbox"
    with nothing_left(tmp_path), pytest.raises(GuestProtocolError, match=words):
        async with manager.open_vm(fake_config(tmp_path, "newer")):
            pytest.fail("booted")


async def test_a_guest_that_says_garbage_later(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            stream = vm.guest.open_stream({"service": "any"})
            await vm.qmp.execute("guest-garbage")
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert isinstance(await vm.wait_ended(), GuestProtocolError)
    assert isinstance(vm.failure, GuestProtocolError)


async def test_a_monitor_that_says_garbage(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            with pytest.raises(QMPError):
                await vm.qmp.execute("qmp-garbage")
            failure = await vm.wait_ended()
            assert isinstance(failure, VmDiedError)
            assert "monitor broke" in str(failure)


async def test_an_agent_that_does_not_answer_pings(runtime: Runtime, tmp_path: Path) -> None:
    timeouts = Timeouts(agent_silence=0.2)
    async with open_vm_manager(runtime=runtime, accelerator=fake_accelerator(tmp_path), timeouts=timeouts) as manager:
        with nothing_left(tmp_path):
            async with manager.open_vm(fake_config(tmp_path, "silent")) as vm:
                failure = await vm.wait_ended()
                assert isinstance(failure, VmDiedError)
                assert "did not answer for 0.2 s" in str(failure)


async def test_killed_it_wakes_every_waiter_with_the_cause(manager: VmManager, tmp_path: Path) -> None:
    woken: list[object] = []

    async def wait_for_end() -> None:
        woken.append(await vm.wait_ended())

    async def wait_for_guest() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await vm.guest.open_stream({"service": "any"}).receive_some()
        woken.append(await vm.wait_ended())

    with nothing_left(tmp_path):
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_end)
                nursery.start_soon(wait_for_guest)
                await trio.testing.wait_all_tasks_blocked()
                os.kill(vm.pid, signal.SIGKILL)
            assert woken == [vm.failure] * 2
            assert isinstance(vm.failure, VmDiedError)
            assert "was ended by SIGKILL" in str(vm.failure)
            with pytest.raises(QMPError):
                await vm.qmp.execute("query-status")
            with pytest.raises(trio.BrokenResourceError):
                vm.guest.open_stream({"service": "any"})
    assert manager.statistics().failed == 1


async def test_qemu_that_ends_by_itself(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            with pytest.raises(QMPError):
                await vm.qmp.execute("quit")
            assert "exited with status 3" in str(await vm.wait_ended())


async def test_retired(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            vm.retire("it is too old")
            vm.retire("it is ugly, too")
            failure = await vm.wait_ended()
            assert "it is too old" in str(failure)
            with pytest.raises(trio.BrokenResourceError):
                await vm.guest.open_stream({"service": "any"}).receive_some()


async def test_a_console_without_end_is_kept_in_64_kib(manager: VmManager, tmp_path: Path) -> None:
    async with manager.open_vm(fake_config(tmp_path)) as vm:
        assert vm.console().endswith("last line\n")
        await vm.qmp.execute("flood")
        assert len(vm.console()) == 64 * 2**10
        assert vm.console().endswith("x\n")


@pytest.mark.parametrize("missing", ["kernel", "initrd", "system_disk", "image", "overlay"])
async def test_a_file_that_is_missing(manager: VmManager, tmp_path: Path, missing: str) -> None:
    config = fake_config(tmp_path)
    (tmp_path / missing).unlink()
    with nothing_left(tmp_path), pytest.raises(FileNotFoundError) as caught:
        async with manager.open_vm(config):
            pytest.fail("booted")
    assert caught.value.filename == str(tmp_path / missing)


async def test_a_manager_that_was_closed(runtime: Runtime, tmp_path: Path) -> None:
    async with open_vm_manager(runtime=runtime, accelerator=fake_accelerator(tmp_path)) as manager:
        pass
    with pytest.raises(SandboxClosedError):
        async with manager.open_vm(fake_config(tmp_path)):
            pytest.fail("booted")


async def test_an_error_of_the_body_comes_out_bare(manager: VmManager, tmp_path: Path) -> None:
    with nothing_left(tmp_path), pytest.raises(KeyError, match="mine"):
        async with manager.open_vm(fake_config(tmp_path)):
            raise KeyError("mine")


async def test_cancelled_at_every_step_of_boot_and_end(manager: VmManager, tmp_path: Path) -> None:
    config = fake_config(tmp_path)

    async def attempt() -> None:
        with nothing_left(tmp_path):
            async with manager.open_vm(config):
                await trio.lowlevel.checkpoint()

    await attempt()
    assert await cancel_at_every_step(attempt, every_task=True) > 10
    assert manager.statistics().open == 0


async def test_cancelled_at_every_step_of_a_failing_boot(manager: VmManager, tmp_path: Path) -> None:
    config = fake_config(tmp_path, "refuse")

    async def attempt() -> None:
        with nothing_left(tmp_path), pytest.raises(VmBootError):
            async with manager.open_vm(config):
                pytest.fail("booted")

    await attempt()
    assert await cancel_at_every_step(attempt, every_task=True) > 10
