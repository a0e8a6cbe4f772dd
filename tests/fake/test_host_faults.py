"""Checkpoints, forks, saving and sleep where something is wrong, with a fake QEMU: whatever it is, nothing is left of them.

All else is real: the host, its admission, the launcher, machines and snapshots.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import trio

from tests._disks import filled, small_disk
from tests._leaks import cancel_at_every_step, child_pids, nothing_left, open_fds
from trio_sandbox import (
    CapacityError,
    Host,
    HostConfig,
    ImageMissingError,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxHibernatedError,
    SnapshotError,
)
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.image import ImageStore
from trio_sandbox.machines import _named
from trio_sandbox.machines._named import NamedTemplateStore
from trio_sandbox.qemu import Vm
from trio_sandbox.sandbox import _lifecycle

from ._host import open_fake_host
from ._qemu import check_fdsets

MEMORY_MIB = 128
CONFIG = SandboxConfig(memory_mib=MEMORY_MIB)


class Fixture:
    """A sandbox that is used in many ways, and what it has of the host's."""

    def __init__(self, directory: Path, host: Host, sandbox: Sandbox) -> None:
        self.directory, self.host, self.sandbox = directory, host, sandbox
        self._before = self._count()

    def _count(self) -> tuple[int, int, int]:
        return len(child_pids()), len(open_fds()), self.host.statistics().admission.memory_mib_reserved

    async def check(self) -> None:
        """Assert that the sandbox goes on, and that nothing else is there."""
        assert (await self.sandbox.run("")).exit_code == 0
        assert self.sandbox.statistics().checkpoints == 0
        if self.sandbox.statistics().reverts:
            # It still has the machine that it was opened with, for its share of the host.
            await sleep(self.sandbox)
        assert self._count() == self._before
        vm = self.sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
        assert isinstance(vm, Vm)
        own = {path.name for path in (vm.config.overlay, *vm.config.layers)}
        (directory,) = (self.directory / "overlays").iterdir()
        assert {path.name for path in directory.iterdir()} == own
        assert (await vm.qmp.execute("query-status"))["status"] == "running"
        await check_fdsets(vm)


@asynccontextmanager
async def open_fixture(directory: Path) -> AsyncGenerator[Fixture]:
    async with open_fake_host(directory) as host:
        async with host.open_sandbox(config=CONFIG):
            pass  # the template is there
        with nothing_left(directory / "overlays"):
            async with host.open_sandbox(config=CONFIG) as sandbox:
                assert (await sandbox.run("")).exit_code == 0
                yield Fixture(directory, host, sandbox)


async def checkpoint(sandbox: Sandbox) -> None:
    (await sandbox.checkpoint()).discard()


async def revert(sandbox: Sandbox) -> None:
    kept = await sandbox.checkpoint()
    try:
        await sandbox.revert()
    finally:
        kept.discard()


async def transaction(sandbox: Sandbox) -> None:
    with pytest.raises(KeyError):
        async with sandbox.transaction():
            raise KeyError


async def fork(sandbox: Sandbox) -> None:
    async with sandbox.fork(2) as children:
        for child in children:
            assert (await child.run("")).exit_code == 0


async def save(sandbox: Sandbox) -> None:
    await sandbox.save("mine", replace=True)


async def sleep(sandbox: Sandbox) -> None:
    await sandbox.hibernate()
    await sandbox.resume()


OPERATIONS = [checkpoint, revert, transaction, fork, save, sleep]
Operation = Callable[[Sandbox], Awaitable[None]]
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


@each_operation
async def test_cancelled_anywhere_nothing_is_left(tmp_path: Path, operation: Operation) -> None:
    async with open_fixture(tmp_path) as fixture:

        async def use() -> None:
            try:
                await operation(fixture.sandbox)
            finally:
                with trio.CancelScope(shield=True):
                    await fixture.sandbox.resume()
                    await fixture.check()

        assert await cancel_at_every_step(use) > 10
    store = NamedTemplateStore(tmp_path / "cache")
    assert len(list((tmp_path / "cache/saved").glob("*~*"))) == len(store.names())


@pytest.mark.parametrize("operation", [checkpoint, revert, fork, save, sleep], ids=lambda operation: operation.__name__)
async def test_a_full_disk_is_a_clear_error_and_nothing_is_left(tmp_path: Path, operation: Operation) -> None:
    """Whichever block of the disk is the last one. Saving wants room for all of the RAM."""
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", (2 * MEMORY_MIB + 8) * 2**20) as directory:
        async with open_fixture(directory) as fixture:
            failures: list[str] = []
            done = False
            while not done:
                blocks = len(failures) + (MEMORY_MIB * 256 if operation is save and failures else 0)
                with filled(directory, leave=4096 * blocks):
                    try:
                        await operation(fixture.sandbox)
                        done = True
                    except (SnapshotError, OSError) as exc:
                        failures.append(f"{exc}{'' if getattr(exc, 'retry_safe', True) else ', and no retry'}")
                    if not fixture.sandbox.statistics().hibernated:
                        assert (await fixture.sandbox.run("")).exit_code == 0
                await fixture.sandbox.resume()
                await fixture.check()
            assert all(re.search("No space left on device|no room for 128 MiB", text) for text in failures)
            assert not any("no retry" in text for text in failures)
            assert 0 < len(failures) < 20


@pytest.mark.parametrize(("operation", "module"), [(sleep, _lifecycle), (save, _named)], ids=["sleep", "save"])
async def test_a_disk_that_turns_out_to_be_full_when_files_are_brought_to_it(
    tmp_path: Path, operation: Operation, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems that take what there is no room for, and say so at the end."""

    def fail(paths: Iterable[Path]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(next(iter(paths))))

    async with open_fixture(tmp_path) as fixture:
        with monkeypatch.context() as patches, pytest.raises(OSError, match="No space left on device"):
            patches.setattr(module, "sync_files", fail)
            await operation(fixture.sandbox)
        await fixture.check()
        assert not list((tmp_path / "cache/saved").glob("*"))
        await operation(fixture.sandbox)
        await fixture.check()


async def test_what_can_not_be_done_says_so(tmp_path: Path) -> None:
    """Of a sandbox that hibernates, whose machine is gone, that was left, or for which there is no room."""
    requests: dict[str, Operation] = {"a checkpoint": checkpoint, "forking": fork, "saving": save}
    async with open_fixture(tmp_path) as fixture:
        sandbox = fixture.sandbox
        with pytest.raises(ValueError, match=r"nothing to revert to: call `await sandbox.checkpoint\(\)` first"):
            await sandbox.revert()
        with pytest.raises(CapacityError, match=r"1000 forks of a sandbox with 128 MiB .* can never fit"):
            async with sandbox.fork(1000):
                pytest.fail("forked")
        await sandbox.hibernate()
        asleep = set((tmp_path / "overlays").iterdir())
        for what, request in requests.items():
            with pytest.raises(SandboxHibernatedError, match=f"^{what} was not sent: the sandbox hibernates; call"):
                await request(sandbox)
        with pytest.raises(ValueError, match="nothing to revert to"):
            await sandbox.revert()
        assert set((tmp_path / "overlays").iterdir()) == asleep
        await sandbox.resume()
        await fixture.check()

        sandbox._slot.machine.retire("the test wants it")  # pyright: ignore[reportPrivateUsage]
        left = set((tmp_path / "overlays").iterdir())
        for what, request in {**requests, "hibernating": Sandbox.hibernate}.items():
            with pytest.raises(SandboxClosedError, match=f"^{what} was not sent: .* machine is gone") as caught:
                await request(sandbox)
            assert "the test wants it" in str(caught.value.__cause__)
            assert caught.value.retry_safe
        with pytest.raises(ValueError, match="nothing to revert to"):
            await sandbox.revert()
        await sandbox.resume()  # it does not hibernate: nothing to do
        assert set((tmp_path / "overlays").iterdir()) == left

    async with open_fixture(tmp_path) as fixture:
        pass
    sandbox = fixture.sandbox
    for request in (*requests.values(), Sandbox.hibernate, Sandbox.resume):
        with pytest.raises(SandboxClosedError, match="block has exited"):
            await request(sandbox)
    with pytest.raises(ValueError, match="nothing to revert to"):
        await sandbox.revert()
    assert NamedTemplateStore(tmp_path / "cache").names() == []
    assert not list((tmp_path / "cache/saved").glob("*"))


@pytest.mark.parametrize("part", ["image", "kernel", "initrd", "system_disk"])
async def test_an_image_that_somebody_removed_is_asked_for_again(tmp_path: Path, part: str) -> None:
    async with open_fake_host(tmp_path) as host:
        async with host.open_sandbox(config=CONFIG) as sandbox:
            (tmp_path / part).rename(tmp_path / "away")
            store = Missing(tmp_path)
            host._images._store = cast("ImageStore", store)  # pyright: ignore[reportPrivateUsage]
            for _ in range(2):
                with pytest.raises(ImageMissingError) as caught:
                    async with host.open_sandbox(config=CONFIG):
                        pytest.fail("it was opened")
                assert caught.value.retry_safe
            assert store.asked == ["python"] * 2
            assert (await sandbox.run("")).exit_code == 0, "what is open goes on"
            (tmp_path / "away").rename(tmp_path / part)
            async with host.open_sandbox(config=CONFIG):
                pass
            assert len(store.asked) == 2, "it is there again"


class Missing:
    """A store without images."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        self.hold = ImageStore(directory).hold

    async def ensure_bootable(self, name: str, **_: object) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(name)
        raise ImageMissingError("it is not in the store")


async def test_a_configuration_must_be_one(tmp_path: Path) -> None:
    async with open_fake_host(tmp_path) as host:
        with pytest.raises(TypeError, match="`config` must be a SandboxConfig, not "):
            async with host.open_sandbox(config={"memory_mib": 256}):  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
                pytest.fail("opened")


async def test_forks_wait_for_room_together_and_nothing_is_taken_before(tmp_path: Path) -> None:
    """Neither a snapshot nor a share: the one that is forked is not even stopped."""
    config = HostConfig(memory_budget_mib=4 * (MEMORY_MIB + VM_OVERHEAD_MIB), vcpu_budget=100)
    async with open_fake_host(tmp_path, config=config) as host, host.open_sandbox(config=CONFIG) as sandbox:
        async with host.open_sandbox(config=CONFIG), host.open_sandbox(config=CONFIG):
            with nothing_left(tmp_path / "overlays"), trio.move_on_after(0.05) as scope:
                await fork(sandbox)
            assert scope.cancelled_caught
            assert sandbox.statistics().last_pause is None
        await fork(sandbox)
        with pytest.raises(CapacityError, match="4 forks"):
            async with sandbox.fork(4):
                pytest.fail("forked")
