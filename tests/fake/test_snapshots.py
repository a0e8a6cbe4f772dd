"""Snapshots of machines that go on, with a fake QEMU: agents and monitors that do not do their part."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests._interrupts import InterruptAt
from tests._leaks import cancel_at_every_step, nothing_left, open_fds
from trio_sandbox import QMPClosedError, SnapshotError, Timeouts
from trio_sandbox.qemu import MachineConfig, SavedState, Snapshot, Vm, _vm, open_runtime, open_vm_manager

from ._qemu import check_fdsets, fake_accelerator, fake_config


@asynccontextmanager
async def open_machine(
    directory: Path, *modes: str, restored: bool = False, timeouts: Timeouts | None = None
) -> AsyncGenerator[Vm]:
    """Open a machine that has booted, or goes on from a state, and has the RAM's file mapped privately then."""
    accelerator = fake_accelerator(directory)
    (directory / "new").touch()
    (directory / "snapshot").mkdir()
    config, saved = fake_config(directory, *modes), None
    if restored:
        for name in ("ram", "state"):
            (directory / name).touch()
        os.truncate(directory / "ram", config.memory_mib * 2**20)
        config = attrs.evolve(config, memory_file=directory / "ram")
        saved = SavedState(directory / "state", b"m" * 16)
    async with open_runtime(Path("/tmp")) as runtime:
        timeouts = timeouts or Timeouts(kill=1)
        async with open_vm_manager(runtime=runtime, accelerator=accelerator, timeouts=timeouts) as manager:
            with nothing_left(directory):
                async with manager.open_vm(config, saved=saved) as vm:
                    yield vm


async def take(vm: Vm, directory: Path) -> None:
    with nothing_left(directory):
        await vm.snapshot(directory / "snapshot", directory / "new")


def asked(vm: Vm) -> list[str]:
    """Give the commands that the snapshot needed."""
    return re.findall(r'"execute": ?"([^"]+)"', vm.qmp_log())[1:]


async def test_memory_that_somebody_has_written_to_later_is_noticed(tmp_path: Path) -> None:
    async with open_machine(tmp_path) as vm:
        snapshot = await vm.snapshot(tmp_path / "snapshot", tmp_path / "new")
        snapshot.check_memory()
        assert snapshot.config.memory_file is not None
        snapshot.config.memory_file.chmod(0o644)
        with snapshot.config.memory_file.open("r+b") as file:
            file.seek(2**20)
            file.write(b"PWNED")
        with pytest.raises(SnapshotError, match=r"has been written to since.*a retry does not help"):
            snapshot.check_memory()
        snapshot.discard()
        (tmp_path / "snapshot").mkdir()


async def test_taken(tmp_path: Path) -> None:
    async with open_machine(tmp_path) as vm:
        await take(vm, tmp_path)
        assert vm.config.overlay == tmp_path / "new"
        assert asked(vm)[-3:] == ["cont", "remove-fd", "query-fdsets"]
        await check_fdsets(vm)
        (tmp_path / "snapshot" / "second").mkdir()
        (tmp_path / "snapshot" / "newer").touch()
        await vm.snapshot(tmp_path / "snapshot" / "second", tmp_path / "snapshot" / "newer")
        assert asked(vm)[-4:] == ["cont", "remove-fd", "query-fdsets", "remove-fd"]
        await check_fdsets(vm)
        await vm.guest.ping()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("never-frozen", "did not get ready to be saved within 1 s"),
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
        assert said.count("cont") == said.count("stop")
        assert said[-3:] == ["blockdev-del", "remove-fd", "remove-fd"]
        await check_fdsets(vm)
        assert await vm.qmp.execute("query-named-block-nodes") == [{"node-name": "overlay"}]
        assert vm.config.overlay == tmp_path / "overlay"
        await vm.guest.ping()


@pytest.mark.parametrize("command", ["add-fd", "stop", "xen-save-devices-state", "blockdev-snapshot", "cont"])
async def test_qemu_that_ends_in_the_middle(tmp_path: Path, command: str) -> None:
    async with open_machine(tmp_path, f"dies-at-{command}") as vm:
        with pytest.raises(SnapshotError, match=r"the virtual machine (was )?ended"):
            await take(vm, tmp_path)
        assert str(await vm.wait_ended()).startswith("QEMU exited with status 5: qemu: Assertion failed")


@pytest.mark.parametrize("memory", ["its own", "out of reach"])
@pytest.mark.parametrize("version", ["seven", "ten"])
async def test_qemu_s_last_words_when_it_ends_over_a_state(tmp_path: Path, memory: str, version: str) -> None:
    command = "migrate" if memory == "out of reach" else "xen-save-devices-state"
    modes = ("hides-memory",) if memory == "out of reach" else ()
    async with open_machine(tmp_path, version, f"dies-at-{command}", *modes, restored=True) as vm:
        with pytest.raises(SnapshotError, match="QEMU exited with status 5: qemu: Assertion failed"):
            await take(vm, tmp_path)


@pytest.mark.parametrize("version", ["seven", "ten"])
async def test_a_state_that_qemu_refuses_to_write_leaves_it_no_descriptor(tmp_path: Path, version: str) -> None:
    async with open_machine(tmp_path, version, "hides-memory", "refuses-migrate", restored=True) as vm:
        with pytest.raises(SnapshotError, match="could not be saved: no such command"):
            await take(vm, tmp_path)
        await check_fdsets(vm)
        await vm.guest.ping()


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("stream-hangs", "nothing was copied for 0.5 s"),
        ("stream-fails", "no space"),
        ("refuses-block-stream", "no such"),
    ],
)
async def test_layers_that_can_not_be_merged_cost_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str, why: str
) -> None:
    monkeypatch.setattr(_vm, "MOST_LAYERS", 1)
    timeouts = Timeouts(qmp_command=0.5) if mode == "stream-hangs" else None
    (machine := tmp_path / "machine").mkdir()
    async with open_machine(machine, mode, timeouts=timeouts) as vm:
        for number in range(3):
            (directory := tmp_path / f"taken{number}").mkdir()
            (tmp_path / f"overlay{number}").touch()
            await vm.snapshot(directory, tmp_path / f"overlay{number}")
            shutil.rmtree(directory)
        assert len(vm.config.layers) == 3
        assert "block-job-cancel" in asked(vm) or mode != "stream-hangs"
        assert vm.failure is None
    assert "could not be made fewer, and are 2:" in caplog.text
    assert why in caplog.text


async def test_qemu_that_does_not_let_the_machine_go_on(tmp_path: Path) -> None:
    async with open_machine(tmp_path, "refuses-cont") as vm:
        with pytest.raises(SnapshotError, match="was ended, as it did not go on: cont: no such command"):
            await take(vm, tmp_path)
        assert "after a snapshot was begun: cont: no such command" in str(await vm.wait_ended())


async def test_qemu_that_does_not_answer_any_more(tmp_path: Path) -> None:
    """What it was asked last is said, not what else it would have been asked."""
    async with open_machine(tmp_path, "hangs-after-stop", timeouts=Timeouts(kill=1, qmp_command=0.2)) as vm:
        with pytest.raises(SnapshotError, match=r"was ended, as it did not go on: stop: no answer within 0.2 s"):
            await take(vm, tmp_path)
        assert asked(vm)[-1] == "stop"
        assert "after a snapshot was begun: stop: no answer" in str(await vm.wait_ended())


@pytest.mark.parametrize("every_task", [False, True], ids=["its task", "every task"])
@pytest.mark.parametrize("memory", ["shared", "private", "out of reach", "out of reach of a newer QEMU"])
async def test_cancelled_anywhere_the_machine_goes_on_and_qemu_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, *, every_task: bool
) -> None:
    """It took the snapshot or not; QEMU has no descriptor and no disk of ours too many, and nothing is held back."""
    taken: list[Snapshot] = []
    number = 0

    async def take_one() -> None:
        nonlocal number
        number += 1
        (directory := tmp_path / f"taken/{number}").mkdir()
        (overlay := tmp_path / f"taken/{number}.qcow2").touch()
        before = vm.config
        try:
            taken.append(await vm.snapshot(directory, overlay))
        finally:
            with trio.CancelScope(shield=True):
                await check_that_it_goes_on(before, overlay)

    async def check_that_it_goes_on(before: MachineConfig, overlay: Path) -> None:
        assert vm.failure is None
        await vm.guest.ping()
        assert (await vm.qmp.execute("query-status"))["status"] == "running"
        await check_fdsets(vm)
        if len(vm.config.layers) < len(before.layers):  # they were merged
            before = attrs.evolve(before, layers=before.layers[:1])
            del nodes[2:]
        if vm.config.overlay == overlay:
            nodes.append("the new one")
            assert vm.config.layers == (*before.layers, before.overlay)
        else:
            assert vm.config == before
        assert len(await vm.qmp.execute("query-named-block-nodes")) == len(nodes)

    # Before every third snapshot layers are merged.
    monkeypatch.setattr(_vm, "MOST_LAYERS", 3)
    (tmp_path / "taken").mkdir()
    modes = {"out of reach": ("hides-memory",), "out of reach of a newer QEMU": ("hides-memory", "ten")}.get(memory, ())
    async with open_machine(tmp_path, *modes, restored=memory != "shared") as vm:
        nodes = ["the first one"]
        fds = open_fds()
        steps = await cancel_at_every_step(
            take_one, check=lambda: pytest.fail("left") if open_fds() != fds else None, every_task=every_task
        )
        assert steps > 3
        snapshot = taken[-1]
        assert snapshot.saved.with_memory == ("hides-memory" in modes)
        assert snapshot.saved.devices.stat().st_size == 4096


@pytest.mark.parametrize(
    ("mode", "end"),
    [
        ("never-frozen", None),
        ("gives-up", None),
        ("never-goes-on", "the guest's agent did not go on"),
        ("hangs-after-stop", "no answer within 0.2 s"),
        ("dies-at-stop", "Assertion failed"),  # its last words
    ],
)
async def test_cancelled_anywhere_while_somebody_does_not_do_his_part(
    tmp_path: Path, mode: str, end: str | None
) -> None:
    """The machine goes on, or was ended and says why; it never stands still."""
    # Short ones only where they pass: a slow machine must not be taken for one that hangs.
    timeouts = Timeouts(kill=0.2, qmp_command=0.2 if mode == "hangs-after-stop" else 20)
    if mode in ("gives-up", "dies-at-stop"):
        timeouts = Timeouts()
    accelerator = fake_accelerator(tmp_path)
    outcomes: set[str | None] = set()

    async def take_one() -> None:
        for name in ("snapshot", "new"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / "snapshot").mkdir()
        with trio.CancelScope(shield=True) as opening:
            async with manager.open_vm(fake_config(tmp_path, mode)) as vm:
                opening.shield = False
                try:
                    with pytest.raises(SnapshotError):
                        await vm.snapshot(tmp_path / "snapshot", tmp_path / "new")
                finally:
                    with trio.CancelScope(shield=True):
                        outcomes.add(await outcome(vm))

    async def outcome(vm: Vm) -> str | None:
        try:
            await vm.guest.ping()
            assert (await vm.qmp.execute("query-status"))["status"] == "running"
            await check_fdsets(vm)
        except (trio.BrokenResourceError, QMPClosedError):
            return str(await vm.wait_ended()).splitlines()[0].removeprefix("the virtual machine was ended: ")
        return None

    (tmp_path / "new").touch()
    async with (
        open_runtime(Path("/tmp")) as runtime,
        open_vm_manager(runtime=runtime, accelerator=accelerator, timeouts=timeouts) as manager,
    ):
        with nothing_left():
            assert await cancel_at_every_step(take_one) > 3
    assert {outcome and outcome.rpartition(": ")[2] for outcome in outcomes} == {None, end}


def test_ctrl_c_anywhere_lets_the_machine_go_on(tmp_path: Path) -> None:
    async def take_one(directory: Path, step: int) -> bool:
        """Interrupt the snapshot at *step*; return whether it has as many."""
        directory.mkdir()
        async with open_machine(directory) as vm:
            instrument = InterruptAt(step)
            instrument.main = trio.lowlevel.current_task()
            trio.lowlevel.add_instrument(instrument)
            try:
                await vm.snapshot(directory / "snapshot", directory / "new")
                await trio.lowlevel.checkpoint()
            except KeyboardInterrupt:
                return True
            finally:
                trio.lowlevel.remove_instrument(instrument)
                said = asked(vm)
                assert said.count("cont") >= said.count("stop")  # it may come before that was sent
                await vm.guest.ping()  # noqa: ASYNC102 - nobody cancels
        return False

    step = 1
    while trio.run(take_one, tmp_path / str(step), step):
        step += 1
    assert step > 3
