"""Checkpoints, transactions, saving and sleep of a sandbox whose machines are fakes that remember one text."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step, wait_until
from trio_sandbox import (
    BalloonError,
    Checkpoint,
    GuestProtocolError,
    HostConfig,
    Network,
    OutcomeUnknownError,
    SandboxClosedError,
    SandboxConfig,
    SandboxHibernatedError,
    SnapshotError,
    TemplateExistsError,
    Timeouts,
    VmBootError,
)
from trio_sandbox._nurseries import open_services
from trio_sandbox.image import BuiltImage
from trio_sandbox.image._manifest import Manifest
from trio_sandbox.machines._admission import Admission
from trio_sandbox.machines._claims import Resources
from trio_sandbox.machines._launcher import Launcher
from trio_sandbox.machines._machines import hold_machine
from trio_sandbox.machines._named import NamedTemplate, NamedTemplateStore
from trio_sandbox.network import Gateway, HostResolver
from trio_sandbox.qemu import MachineConfig, SavedState, Snapshot, Vm
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.sandbox._lifecycle import Lifecycle
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.wire import STDOUT, RecordStream

from ._guest import FakeMachine, finished, open_fake_machine, receive_json

MEMORY_MIB = 128


class FakeLauncher:
    """Opens machines that remember a text, and saves it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.open: list[FakeMachine] = []
        self.states: dict[FakeMachine, str] = {}
        self.busy = False
        self.silent = False
        self.endless = False
        self.asked = 0
        self.opening: Callable[[], object] = lambda: None
        """Called where a machine is opened; may raise."""
        self.saving: Callable[[], object] = lambda: None
        """The same, where one is saved."""
        self._number = 0

    @asynccontextmanager
    async def open_machine(self, state: str = "") -> AsyncGenerator[FakeMachine]:
        async def code(records: RecordStream) -> None:
            text = (await receive_json(records))["code"]
            if text == "wait":
                await receive_json(records)  # to be interrupted
            elif text:
                self.states[machine] = text
            await records.send(STDOUT, self.states[machine].encode())
            await records.send_json(finished())
            await records.send_eof()

        async def idle(records: RecordStream) -> None:
            self.asked += 1
            if self.silent:
                await trio.sleep_forever()
            while self.endless:
                await records.stream.send_all(bytes(2**16))
            await records.stream.send_all(b"busy" if self.busy else b"idle", end=True)

        await trio.lowlevel.checkpoint()
        self.opening()
        async with open_fake_machine({"code": code, "idle": idle}) as machine:
            self.states[machine] = state
            self.open.append(machine)
            try:
                await trio.lowlevel.checkpoint()
                yield machine
            finally:
                self.open.remove(machine)

    async def snapshot(self, machine: FakeMachine) -> Snapshot:
        await trio.lowlevel.checkpoint()
        self.saving()
        self._number += 1
        directory = self.directory / f"snapshot-{self._number}"
        directory.mkdir()
        for name in ("memory", "layer0.qcow2"):
            (directory / name).touch()
        (directory / "devices").write_text(self.states[machine])
        config = MachineConfig(
            kernel="kernel",
            initrd="initrd",
            system_disk="system",
            image="image",
            overlay="overlay",
            layers=[directory / "layer0.qcow2"],
            memory_file=directory / "memory",
            memory_mib=MEMORY_MIB,
        )
        return Snapshot(directory, config, SavedState(directory / "devices", os.urandom(16)), 0.0)

    @asynccontextmanager
    async def open_restored(
        self, snapshot: Snapshot, guest_handler: object, guest_certificates: str
    ) -> AsyncGenerator[FakeMachine]:
        assert guest_handler is None
        assert guest_certificates == ""
        async with self.open_machine(snapshot.saved.devices.read_text()) as machine:
            yield machine

    def describe(self, name: str, image: BuiltImage, snapshot: Snapshot) -> NamedTemplate:
        return NamedTemplate(
            name=name,
            directory=snapshot.directory,
            image=image.name,
            image_digest=image.digest,
            memory_mib=MEMORY_MIB,
            vcpus=1,
            machine="m",
            qemu="QEMU",
            marker=snapshot.saved.marker,
            with_memory=False,
            balloon=False,
            mounted=False,
            layer_count=1,
        )


@attrs.frozen
class Site:
    sandbox: Sandbox
    lifecycle: Lifecycle[Sandbox]
    launcher: FakeLauncher
    admission: Admission
    named: NamedTemplateStore
    noted: list[Vm | None]
    """The machines that the sandbox got besides the first, and None for sleep."""

    async def run(self, text: str = "") -> str:
        """Have the machine remember *text* if there is one, and return what it remembers."""
        return (await self.sandbox.run(text)).stdout

    def reserved(self) -> int:
        return self.admission.statistics().memory_mib_reserved

    def files(self) -> list[str]:
        return os.listdir(self.launcher.directory)


@asynccontextmanager
async def open_site(
    directory: Path,
    *,
    budget_mib: int = 1000,
    hibernate_after: float | None = None,
    timeouts: Timeouts | None = None,
    admission: Admission | None = None,
) -> AsyncGenerator[Site]:
    """Yield a sandbox; when it is closed nothing of it may be left."""
    snapshots = directory / "snapshots"
    snapshots.mkdir(exist_ok=True)
    launcher = FakeLauncher(snapshots)
    config = SandboxConfig(memory_mib=MEMORY_MIB, hibernate_after=hibernate_after)
    before = 0 if admission is None else admission.statistics().memory_mib_reserved
    admission = admission or Admission(HostConfig(memory_budget_mib=budget_mib, vcpu_budget=4))
    manifest = Manifest(name="fake", digest="d", created=0, files={}, details={})
    image = BuiltImage(
        name="fake", digest="d", path=directory / "image", size_bytes=0, virtual_size=0, manifest=manifest
    )
    named = NamedTemplateStore(directory)

    @asynccontextmanager
    async def machine() -> AsyncGenerator[Vm]:
        async with admission.admit(config), launcher.open_machine() as machine:
            yield cast("Vm", machine)

    noted: list[Vm | None] = []
    try:
        async with open_services("test") as services:
            lifecycle: Lifecycle[Sandbox] = Lifecycle(
                services,
                await hold_machine(services, machine()),
                image=image,
                launcher=cast("Launcher", launcher),
                admission=admission,
                named=named,
                config=config,
                timeouts=timeouts or Timeouts(),
                open_child=lambda machine, beside, _: pytest.fail(f"nobody forks {machine} beside {beside}"),
                gateway=Gateway(Network.none(), HostResolver(), connect_timeout=1),
                note_machine=noted.append,
            )
            if hibernate_after is not None:
                await services.start(lifecycle.serve_idleness, hibernate_after)
            try:
                sandbox = Sandbox(lifecycle.slot, "fake", config, Timeouts(), lifecycle)
                yield Site(sandbox, lifecycle, launcher, admission, named, noted)
            finally:
                lifecycle.close()
    finally:
        assert launcher.open == []
        assert os.listdir(snapshots) == []
        assert admission.statistics().memory_mib_reserved == before


@pytest.fixture
async def site(tmp_path: Path) -> AsyncGenerator[Site]:
    async with open_site(tmp_path) as site:
        yield site


def fail_with(error: Exception) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


async def test_who_finds_no_room_beside_other_processes_sleeps_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.run("before")
    await site.sandbox.hibernate()
    with monkeypatch.context() as patch:
        patch.setattr(site.admission, "_read_others", lambda: Resources(10**6, 0))
        patch.setattr(site.admission, "_patience", 0.0)
        with pytest.raises(SnapshotError, match="did not wake up, and still hibernates: no sandbox was opened"):
            await site.sandbox.resume()
    await site.sandbox.resume()
    assert await site.run() == "before"


# --- Checkpoints ---


async def test_going_back_to_a_checkpoint_as_often_as_wanted(site: Site) -> None:
    await site.run("first")
    checkpoint = await site.sandbox.checkpoint()
    for text in ("second", "third"):
        assert await site.run(text) == text
        await site.sandbox.revert(checkpoint)
        assert await site.run() == "first"
    statistics = site.sandbox.statistics()
    assert (statistics.checkpoints, statistics.reverts) == (1, 2)
    first, second = site.noted
    assert first is not second is site.lifecycle.slot.machine


async def test_of_several_checkpoints_the_newest_is_the_default(site: Site) -> None:
    checkpoints: dict[str, Checkpoint] = {}
    for text in ("first", "second", "third"):
        await site.run(text)
        checkpoints[text] = await site.sandbox.checkpoint()
    await site.sandbox.revert(checkpoints["first"])
    assert await site.run() == "first"
    await site.sandbox.revert()
    assert await site.run() == "third"
    checkpoints["third"].discard()
    checkpoints["third"].discard()
    assert len(site.files()) == 2
    await site.sandbox.revert()
    assert await site.run() == "second"
    await site.run("fourth")
    await site.sandbox.checkpoint()
    await site.sandbox.revert()
    assert await site.run() == "fourth"
    assert site.sandbox.statistics().checkpoints == 3


async def test_what_can_not_be_gone_back_to(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call `await sandbox.checkpoint\(\)` first"):
        await site.sandbox.revert()
    checkpoint = await site.sandbox.checkpoint()
    (tmp_path / "other").mkdir()
    async with open_site(tmp_path / "other") as other:
        with pytest.raises(ValueError, match="another sandbox's"):
            await other.sandbox.revert(checkpoint)
    checkpoint.discard()
    assert checkpoint.discarded
    with pytest.raises(ValueError, match="was discarded"):
        await site.sandbox.revert(checkpoint)


@pytest.mark.parametrize("wrong", ["first", 1, True])
async def test_only_a_checkpoint_can_be_reverted_to(site: Site, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"must be what `Sandbox\.checkpoint` returned, not "):
        await site.sandbox.revert(wrong)


async def test_what_is_under_way_learns_of_it_and_what_comes_meanwhile_waits(site: Site) -> None:
    await site.run("first")
    await site.sandbox.checkpoint()
    outputs: list[str] = []

    async def wait() -> None:
        async with site.sandbox.stream("wait") as events:
            with pytest.raises(OutcomeUnknownError) as caught:
                async for _ in events:
                    pass
            assert "the sandbox was reverted" in str(caught.value.__cause__)

    async def look() -> None:
        # As the other run has the interpreter, until it has failed.
        outputs.append(await site.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(look)
        await site.sandbox.revert()
    assert outputs == ["first"]
    assert len(site.launcher.open) == 2, "the first keeps the sandbox's share of the host"
    assert sum(machine.failure is None for machine in site.launcher.open) == 1
    await site.sandbox.revert()
    assert len(site.launcher.open) == 2


async def test_a_revert_that_fails_leaves_the_sandbox_as_it_was(site: Site) -> None:
    await site.run("first")
    await site.sandbox.checkpoint()
    await site.run("second")
    site.launcher.opening = fail_with(VmBootError("no room"))
    with pytest.raises(SnapshotError, match="not reverted, and is as it was: no room"):
        await site.sandbox.revert()
    assert await site.run() == "second"
    assert site.sandbox.statistics().reverts == 0


async def test_a_sandbox_whose_machine_died_can_go_back(site: Site) -> None:
    await site.run("first")
    await site.sandbox.checkpoint()
    site.launcher.open[0].retire("somebody killed it")
    with pytest.raises(SandboxClosedError):
        await site.run()
    with pytest.raises(SandboxClosedError):
        await site.sandbox.checkpoint()
    await site.sandbox.revert()
    assert await site.run() == "first"


async def test_a_checkpoint_that_fails(site: Site) -> None:
    site.launcher.saving = fail_with(SnapshotError("no room"))
    with pytest.raises(SnapshotError, match="no room"):
        await site.sandbox.checkpoint()
    assert await site.run("first") == "first"


async def test_a_sandbox_without_a_lifecycle_says_so() -> None:
    async with open_fake_machine({}) as machine:
        sandbox = Sandbox(Slot(machine), "python", SandboxConfig(), Timeouts())
        with pytest.raises(SnapshotError, match="can't be saved"):
            await sandbox.checkpoint()


# --- Transactions ---


async def test_a_transaction_is_kept_or_undone(site: Site) -> None:
    await site.run("first")
    async with site.sandbox.transaction():
        await site.run("second")
    assert await site.run() == "second"
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with site.sandbox.transaction():
            await site.run("third")
            raise error
    assert caught.value is error
    assert await site.run() == "second"
    assert site.files() == []


async def test_nested_transactions(site: Site) -> None:
    await site.run("first")
    with pytest.raises(ZeroDivisionError):
        async with site.sandbox.transaction():
            await site.run("second")
            with pytest.raises(KeyError):
                async with site.sandbox.transaction():
                    await site.run("third")
                    raise KeyError
            assert await site.run() == "second"
            async with site.sandbox.transaction():
                await site.run("fourth")
            raise ZeroDivisionError
    assert await site.run() == "first"


async def test_a_cancelled_transaction_is_undone(site: Site) -> None:
    await site.run("first")
    with trio.CancelScope() as scope:
        async with site.sandbox.transaction():
            await site.run("second")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert await site.run() == "first"


async def test_a_transaction_that_can_not_be_undone_closes_the_sandbox(site: Site) -> None:
    with pytest.raises(KeyError):
        async with site.sandbox.transaction():
            await site.run("second")
            site.launcher.opening = fail_with(VmBootError("no room"))
            raise KeyError
    with pytest.raises(SandboxClosedError) as caught:
        await site.run()
    assert "could not be reverted" in str(caught.value.__cause__)


# --- Saving ---


async def test_saving(site: Site) -> None:
    await site.run("first")
    await site.sandbox.save("mine")
    template = site.named.find("mine")
    assert template.devices.read_text() == "first"
    assert [path.exists() for path in template.files] == [True] * 3
    assert site.files() == []
    await site.run("second")
    with pytest.raises(TemplateExistsError):
        await site.sandbox.save("mine")
    assert site.named.find("mine").devices.read_text() == "first"
    await site.sandbox.save("mine", replace=True)
    assert site.named.find("mine").devices.read_text() == "second"
    with pytest.raises(ValueError, match="the name of a saved sandbox"):
        await site.sandbox.save("../mine")


async def test_saving_that_fails_leaves_what_was_saved_before(site: Site, tmp_path: Path) -> None:
    await site.sandbox.save("mine")
    before = os.listdir(tmp_path / "saved")
    site.launcher.saving = fail_with(SnapshotError("no room"))
    with pytest.raises(SnapshotError, match="no room"):
        await site.sandbox.save("mine", replace=True)
    assert os.listdir(tmp_path / "saved") == before


# --- Sleep ---


async def test_asleep_there_is_no_machine_and_no_share_of_the_host(site: Site) -> None:
    await site.run("first")
    reserved = site.reserved()
    assert reserved > MEMORY_MIB
    await site.sandbox.hibernate()
    await site.sandbox.hibernate()
    assert (site.launcher.open, site.reserved()) == ([], 0)
    statistics = site.sandbox.statistics()
    assert (statistics.hibernated, statistics.hibernations, statistics.qemu_pid) == (True, 1, None)
    assert repr(site.sandbox).endswith("hibernated>")
    for request in (site.run, site.sandbox.checkpoint, lambda: site.sandbox.save("x"), site.sandbox.path("x").exists):
        with pytest.raises(SandboxHibernatedError, match=r"was not sent: .* call `await sandbox.resume\(\)`"):
            await request()
    await site.sandbox.resume()
    await site.sandbox.resume()
    assert await site.run() == "first"
    assert (len(site.launcher.open), site.reserved(), site.files()) == (1, reserved, [])
    assert site.noted == [None, site.lifecycle.slot.machine]


async def test_a_sandbox_closed_asleep(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.sandbox.checkpoint()
        await site.sandbox.hibernate()
    for request in (site.run, site.sandbox.resume, site.sandbox.hibernate, site.sandbox.checkpoint):
        with pytest.raises(SandboxClosedError):
            await request()


async def test_going_back_wakes_up(site: Site) -> None:
    await site.run("first")
    checkpoint = await site.sandbox.checkpoint()
    await site.run("second")
    await site.sandbox.hibernate()
    await site.sandbox.revert(checkpoint)
    assert await site.run() == "first"
    assert site.reserved() > 0
    await site.sandbox.hibernate()
    await site.sandbox.resume()
    await site.sandbox.revert(checkpoint)
    assert await site.run() == "first"


async def test_nothing_may_be_under_way(site: Site) -> None:
    async with site.sandbox.stream("wait"):
        with pytest.raises(trio.BusyResourceError, match="while a run, a process, a file or a connection is open"):
            await site.sandbox.hibernate()
    site.launcher.busy = True
    with pytest.raises(trio.BusyResourceError, match="an earlier run has left"):
        await site.sandbox.hibernate()
    assert await site.run("first") == "first"


@pytest.mark.parametrize("way", ["silent", "endless"])
async def test_a_guest_that_does_not_say_whether_it_is_idle_can_be_left(tmp_path: Path, way: str) -> None:
    async with open_site(tmp_path, timeouts=Timeouts(kill=0.05)) as site:
        await site.run("old")
        checkpoint = await site.sandbox.checkpoint()
        setattr(site.launcher, way, True)
        with pytest.raises((OutcomeUnknownError, GuestProtocolError)):
            await site.sandbox.hibernate()
        with pytest.raises(SandboxClosedError):
            await site.sandbox.checkpoint()
        with pytest.raises(SandboxClosedError):
            await site.run()
        await site.sandbox.revert(checkpoint)
        assert await site.run() == "old"
        # By itself, too, and again: the sandbox can be closed.
        with pytest.raises((OutcomeUnknownError, GuestProtocolError)):
            await site.sandbox.hibernate()


async def test_falling_asleep_or_waking_up_may_fail_and_nothing_is_lost(site: Site) -> None:
    await site.run("first")
    site.launcher.saving = fail_with(SnapshotError("no room"))
    with pytest.raises(SnapshotError, match="no room"):
        await site.sandbox.hibernate()
    assert await site.run() == "first"
    site.launcher.saving = lambda: None
    await site.sandbox.hibernate()
    site.launcher.opening = fail_with(VmBootError("no memory"))
    with pytest.raises(SnapshotError, match="did not wake up, and still hibernates: no memory"):
        await site.sandbox.resume()
    assert (site.reserved(), site.launcher.open) == (0, [])
    site.launcher.opening = lambda: None
    await site.sandbox.resume()
    assert await site.run() == "first"


async def test_waking_up_waits_for_room(tmp_path: Path) -> None:
    async with open_site(tmp_path, budget_mib=300) as site:
        await site.run("first")
        await site.sandbox.hibernate()
        async with trio.open_nursery() as nursery:
            async with site.admission.admit(SandboxConfig(memory_mib=MEMORY_MIB)):
                nursery.start_soon(site.sandbox.resume)  # noqa: ASYNC111
                await trio.testing.wait_all_tasks_blocked()
                assert site.admission.statistics().tasks_waiting == 1
        assert await site.run() == "first"


async def test_an_idle_sandbox_falls_asleep_and_a_request_wakes_it(tmp_path: Path) -> None:
    async with open_site(tmp_path, hibernate_after=0.05) as site:
        await site.run("first")
        for _ in range(2):
            await wait_until(lambda: site.lifecycle.hibernated)
            assert await site.run() == "first"
        await wait_until(lambda: site.lifecycle.hibernated)
        await site.sandbox.hibernate()
        with pytest.raises(SandboxHibernatedError):
            await site.run()
        await site.sandbox.resume()
        assert await site.run() == "first"


async def test_a_busy_sandbox_stays_awake(tmp_path: Path) -> None:
    async with open_site(tmp_path, hibernate_after=0.05) as site:
        site.launcher.busy = True
        await wait_until(lambda: site.launcher.asked > 2)
        assert site.sandbox.statistics().hibernations == 0
        site.launcher.busy = False
        await wait_until(lambda: site.lifecycle.hibernated)


async def test_one_that_can_not_fall_asleep_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_site(tmp_path, hibernate_after=0.05) as site:
        site.launcher.saving = fail_with(SnapshotError("no room"))
        await wait_until(lambda: "an idle sandbox did not fall asleep: no room" in caplog.text)
        assert await site.run("first") == "first"
        site.launcher.saving = lambda: None
        await wait_until(lambda: site.lifecycle.hibernated)


@attrs.define
class FakeBalloon:
    """What `Vm.balloon` is for an idle sandbox."""

    balloon: bool = True
    given: int = 0
    cancelled: int = 0
    failure: Exception | None = None
    slow: bool = False

    async def reclaim(self) -> int:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        try:
            await trio.sleep(math.inf if self.slow else 0)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        self.given += 1
        return 64


@asynccontextmanager
async def open_reclaiming(directory: Path) -> AsyncGenerator[tuple[Site, FakeBalloon]]:
    balloon = FakeBalloon()
    async with open_site(directory) as site, open_services("reclaiming") as services:
        (machine,) = site.launcher.open
        machine.balloon = machine.config = balloon
        await services.start(site.lifecycle.serve_reclaiming, 0.05)
        yield site, balloon


async def test_an_idle_sandbox_gives_memory_back_once_for_each_time(tmp_path: Path) -> None:
    async with open_reclaiming(tmp_path) as (site, balloon):
        await wait_until(lambda: balloon.given == 1)
        await trio.sleep(0.2)
        assert balloon.given == 1
        assert await site.run("first") == "first"
        await wait_until(lambda: balloon.given == 2)


async def test_a_request_ends_the_giving(tmp_path: Path) -> None:
    async with open_reclaiming(tmp_path) as (site, balloon):
        balloon.slow = True
        await wait_until(site.lifecycle._changing.locked)
        assert await site.run("first") == "first"
        await wait_until(lambda: balloon.cancelled == 1)
        balloon.slow = False
        await wait_until(lambda: balloon.given == 1)


async def test_one_that_can_not_give_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_reclaiming(tmp_path) as (site, balloon):
        balloon.failure = BalloonError("not now")
        await wait_until(lambda: "an idle sandbox did not give memory back: not now" in caplog.text)
        balloon.failure = None
        await wait_until(lambda: balloon.given == 1)
        assert await site.run("first") == "first"


async def test_requests_that_come_together_wake_it_once(tmp_path: Path) -> None:
    async with open_site(tmp_path, hibernate_after=1) as site:
        await site.run("first")
        await wait_until(lambda: site.lifecycle.hibernated)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(site.sandbox.checkpoint)
                nursery.start_soon(site.run)
        assert len(site.launcher.open) == 1
        assert site.sandbox.statistics().checkpoints == 3


# --- Cancellation ---


@pytest.mark.parametrize("operation", ["checkpoint", "revert", "save", "hibernate", "resume", "transaction"])
async def test_cancelled_anywhere_the_sandbox_is_as_before_or_as_after(tmp_path: Path, operation: str) -> None:
    async def use() -> None:
        async with open_site(tmp_path) as site:
            sandbox = site.sandbox
            await site.run("first")
            await sandbox.checkpoint()
            await site.run("second")
            if operation == "resume":
                await sandbox.hibernate()
            try:
                if operation == "save":
                    await sandbox.save("mine", replace=True)
                elif operation == "transaction":
                    async with sandbox.transaction():
                        await site.run("third")
                        await trio.lowlevel.checkpoint()
                else:
                    await getattr(sandbox, operation)()
            finally:
                with trio.CancelScope(shield=True):
                    await sandbox.resume()
                    assert await site.run() in {
                        "revert": ("second", "first"),
                        "transaction": ("second", "third"),
                    }.get(operation, ("second",))

    def check() -> None:
        left = list((tmp_path / "saved").glob("*~*"))
        assert len(left) == len(NamedTemplateStore(tmp_path).names())

    assert await cancel_at_every_step(use, check=check) > 10


# --- What it takes ---


async def test_what_machines_took_that_are_gone_is_the_sandboxs(site: Site) -> None:
    # Each machine of these takes a second, and a MiB.
    assert (site.sandbox.usage().cpu_seconds, site.sandbox.usage().memory_bytes) == (1, 2**20)
    checkpoint = await site.sandbox.checkpoint()
    await site.sandbox.revert()
    assert site.sandbox.usage().cpu_seconds == 2
    await site.sandbox.hibernate()
    assert (site.sandbox.usage().cpu_seconds, site.sandbox.usage().memory_bytes) == (2, 0)
    await site.sandbox.resume()
    assert (site.sandbox.usage().cpu_seconds, site.sandbox.usage().memory_bytes) == (3, 2**20)
    checkpoint.discard()
    assert site.sandbox.usage().network_bytes_sent == 0
