"""Snapshots of machines that go on, with a fake QEMU: agents and monitors that do not do their part."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests._leaks import nothing_left
from trio_sandbox import SnapshotError, Timeouts
from trio_sandbox.qemu import Vm, open_runtime, open_vm_manager

from ._qemu import fake_accelerator, fake_config


@asynccontextmanager
async def open_machine(directory: Path, *modes: str) -> AsyncGenerator[Vm]:
    accelerator = fake_accelerator(directory)
    (directory / "new").touch()
    (directory / "snapshot").mkdir()
    async with open_runtime(Path("/tmp")) as runtime:
        timeouts = Timeouts(kill=1)
        async with open_vm_manager(runtime=runtime, accelerator=accelerator, timeouts=timeouts) as manager:
            with nothing_left(directory):
                async with manager.open_vm(fake_config(directory, *modes)) as vm:
                    yield vm


async def take(vm: Vm, directory: Path) -> None:
    with nothing_left(directory):
        await vm.snapshot(directory / "snapshot", directory / "new")


def asked(vm: Vm) -> list[str]:
    """Give the commands that the snapshot needed."""
    return re.findall(r'"execute": ?"([^"]+)"', vm.qmp_log())[1:]


async def test_taken(tmp_path: Path) -> None:
    async with open_machine(tmp_path) as vm:
        await take(vm, tmp_path)
        assert vm.config.overlay == tmp_path / "new"
        assert asked(vm)[-3:] == ["cont", "remove-fd", "remove-fd"]
        await vm.guest.ping()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("never-frozen", "did not get ready for being saved within 1 s"),
        ("refuses-to-freeze", "the guest can't be saved: not now"),
    ],
)
async def test_a_guest_that_does_not_hold_still_lives_on(tmp_path: Path, mode: str, message: str) -> None:
    async with open_machine(tmp_path, mode) as vm:
        with pytest.raises(SnapshotError, match=message):
            await take(vm, tmp_path)
        assert asked(vm) == [], "it was not even stopped"
        assert vm.config.overlay == tmp_path / "overlay"
        assert vm.failure is None
        await vm.guest.ping()


async def test_a_guest_that_gives_up_in_the_middle_lives_on(tmp_path: Path) -> None:
    async with open_machine(tmp_path, "gives-up") as vm:
        with pytest.raises(SnapshotError, match="gave up while its state was saved: enough"):
            await take(vm, tmp_path)
        assert vm.config.overlay == tmp_path / "new"
        await vm.guest.ping()


async def test_a_guest_that_does_not_go_on_is_ended(tmp_path: Path) -> None:
    async with open_machine(tmp_path, "never-goes-on") as vm:
        with pytest.raises(SnapshotError, match="was ended, as it did not go on: the guest's agent"):
            await take(vm, tmp_path)
        assert "did not go on" in str(await vm.wait_ended())


@pytest.mark.parametrize("command", ["add-fd", "blockdev-add", "stop", "xen-save-devices-state", "blockdev-snapshot"])
async def test_a_command_that_qemu_refuses(tmp_path: Path, command: str) -> None:
    async with open_machine(tmp_path, f"refuses-{command}") as vm:
        with pytest.raises(SnapshotError, match=f"could not be saved: {command}: no such command"):
            await take(vm, tmp_path)
        said = asked(vm)
        assert said.count("cont") == said.count("xen-save-devices-state")
        assert said[-3:] == ["blockdev-del", "remove-fd", "remove-fd"]
        assert vm.config.overlay == tmp_path / "overlay"
        await vm.guest.ping()


@pytest.mark.parametrize("command", ["add-fd", "stop", "xen-save-devices-state", "blockdev-snapshot", "cont"])
async def test_qemu_that_ends_in_the_middle(tmp_path: Path, command: str) -> None:
    async with open_machine(tmp_path, f"dies-at-{command}") as vm:
        with pytest.raises(SnapshotError, match=r"the virtual machine (was )?ended"):
            await take(vm, tmp_path)
        assert await vm.wait_ended() is not None
