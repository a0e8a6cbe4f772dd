"""A host's life: every way in and out, with the real storage daemon and, where boots would cost, a fake QEMU."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step, nothing_left
from tests.fake._qemu import fake_accelerator, fake_config
from trio_sandbox import (
    CapacityError,
    Host,
    HostConfig,
    QemuStorageDaemonError,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    Timeouts,
    VmBootError,
    open_host,
)
from trio_sandbox.image import BuiltImage, ImageStore, SystemDisk, default_cache_directory
from trio_sandbox.image._leases import Leases
from trio_sandbox.image._manifest import Manifest
from trio_sandbox.machines import Dependents, NamedTemplateStore
from trio_sandbox.machines._launcher import Launcher
from trio_sandbox.qemu import (
    MachineConfig,
    QemuStorageDaemon,
    make_marked,
    open_overlay_pool,
    open_runtime,
    open_storage_daemon,
    open_vm_manager,
)

from ._images import make_base

pytestmark = pytest.mark.qemu


@attrs.frozen
class OneImage:
    """A store that has the files of a `MachineConfig`, and nothing to build."""

    machine: MachineConfig

    def hold(self, entries: tuple[Path, ...]) -> AbstractContextManager[bool]:
        return Leases().try_hold(entries)

    async def ensure_bootable(self, name: str, **_: object) -> tuple[BuiltImage, SystemDisk]:
        await trio.lowlevel.checkpoint()
        machine = self.machine
        manifest = Manifest(name=name, digest="0", created=0, files={}, details={})
        return (
            BuiltImage(name=name, digest="0", path=machine.image, size_bytes=0, virtual_size=0, manifest=manifest),
            SystemDisk(
                digest="0",
                kernel=machine.kernel,
                initrd=machine.initrd,
                disk=machine.system_disk,
                kernel_args=machine.kernel_args,
            ),
        )


@asynccontextmanager
async def open_fake_host(
    directory: Path, *modes: str, config: HostConfig | None = None
) -> AsyncGenerator[tuple[Host, QemuStorageDaemon]]:
    """Yield a host with a fake QEMU that behaves as *modes* say, and its storage daemon, a real one."""
    accelerator = fake_accelerator(directory)
    machine = fake_config(directory, *modes)
    machine.image.unlink()
    make_base(machine.image)
    async with (
        open_runtime(directory) as runtime,
        open_storage_daemon(directory=runtime.directory, environment=runtime.environment) as daemon,
        open_overlay_pool(daemon) as overlays,
        open_vm_manager(runtime=runtime, accelerator=accelerator) as machines,
    ):
        store = cast("ImageStore", OneImage(machine))
        launcher = Launcher(
            machines=machines,
            overlays=overlays,
            templates=None,
            directory=runtime.directory,
            environment=runtime.environment,
            timeouts=Timeouts(),
            progress=lambda _: None,
        )
        named = NamedTemplateStore(directory)
        dependents = Dependents(directory)
        yield Host(config or HostConfig(), runtime, store, accelerator, launcher, named, dependents), daemon


def overlays_of(host: Host) -> list[Path]:
    """Give the disks of a host's sandboxes."""
    return list(host._runtime.directory.rglob("*.qcow2"))  # pyright: ignore[reportPrivateUsage]


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory whose path leaves room for a socket's."""
    return tmp_path_factory.mktemp("h")


async def test_a_host_cancelled_at_every_step_of_opening_and_closing(short_path: Path) -> None:
    config = HostConfig(cache_dir=short_path / "cache", runtime_dir=short_path)
    async with open_host(config):  # from here on the accelerator is known
        pass

    async def open_and_close() -> None:
        async with open_host(config):
            await trio.lowlevel.checkpoint()

    with nothing_left(short_path):
        assert await cancel_at_every_step(open_and_close) > 10


async def test_a_sandbox_cancelled_at_every_step_of_opening_and_closing(short_path: Path) -> None:
    with nothing_left():
        async with open_fake_host(short_path) as (host, _):

            async def open_and_close() -> None:
                async with host.open_sandbox():
                    await trio.lowlevel.checkpoint()

            def check() -> None:
                assert overlays_of(host) == []
                assert host.statistics().sandboxes_open == 0

            with nothing_left():
                assert await cancel_at_every_step(open_and_close, check=check, every_task=True) > 30


async def test_a_guest_that_does_not_boot_leaves_no_overlay(short_path: Path) -> None:
    async with open_fake_host(short_path, "panic") as (host, _):
        with nothing_left(), pytest.raises(VmBootError, match="of fear"):
            async with host.open_sandbox():
                pytest.fail("booted")
        assert overlays_of(host) == []


async def test_without_its_storage_daemon_a_host_says_so_and_leaves_nothing(short_path: Path) -> None:
    with nothing_left():
        async with open_fake_host(short_path) as (host, daemon):
            assert daemon.pid is not None
            os.kill(daemon.pid, signal.SIGKILL)
            with pytest.raises(QemuStorageDaemonError) as caught:
                async with host.open_sandbox():
                    pytest.fail("there is no disk for it")
            assert caught.value.retry_safe


async def test_overlays_of_a_known_image_need_no_storage_daemon(short_path: Path) -> None:
    async with open_fake_host(short_path) as (host, daemon):
        async with host.open_sandbox():
            pass
        assert daemon.pid is not None
        os.kill(daemon.pid, signal.SIGKILL)
        async with host.open_sandbox() as sandbox:
            assert "open" in repr(sandbox)


async def test_a_host_removes_what_a_dead_program_left_in_the_cache(short_path: Path) -> None:
    cache = short_path / "cache"
    left = cache / f"templates/.staging-{'a' * 24}-00000001", cache / f"saved/mine~{'0' * 16}"
    for path in left:
        path.parent.mkdir(mode=0o700, parents=True)
        make_marked(path)
    (cache / "accelerator.json").symlink_to(default_cache_directory() / "accelerator.json")
    async with open_host(HostConfig(cache_dir=cache, runtime_dir=short_path)):
        assert not any(path.exists() for path in left)


async def test_two_sandboxes_open_at_once_and_close_in_any_order(short_path: Path) -> None:
    async with open_fake_host(short_path) as (host, _):
        first_may_close = trio.Event()

        async def hold(*, task_status: trio.TaskStatus[None]) -> None:
            async with host.open_sandbox():
                task_status.started()
                await first_may_close.wait()

        async with trio.open_nursery() as nursery:
            await nursery.start(hold)
            async with host.open_sandbox():
                assert host.statistics().sandboxes_open == 2
                first_may_close.set()
        assert host.statistics().sandboxes_open == 0


async def test_a_sandbox_waits_for_room_and_is_refused_where_there_never_will_be_any(short_path: Path) -> None:
    async with open_fake_host(short_path, config=HostConfig(memory_budget_mib=400)) as (host, _):
        with nothing_left(), pytest.raises(CapacityError, match="400 MiB"):
            async with host.open_sandbox("no such image", SandboxConfig(memory_mib=1024)):
                pytest.fail("more than there is")
        first_may_close = trio.Event()

        async def hold(*, task_status: trio.TaskStatus[None]) -> None:
            async with host.open_sandbox():
                task_status.started()
                await first_may_close.wait()

        async with trio.open_nursery() as nursery:
            await nursery.start(hold)
            with trio.move_on_after(0):
                async with host.open_sandbox():
                    pytest.fail("the other has the memory")
            first_may_close.set()
            async with host.open_sandbox():
                assert host.statistics().sandboxes_open == 1
                assert host.statistics().admission.vcpus_reserved == 1
        assert host.statistics().admission.memory_mib_reserved == 0


async def test_a_host_that_closes_meanwhile_opens_nothing_for_those_that_waited(short_path: Path) -> None:
    async with (
        open_fake_host(short_path, config=HostConfig(memory_budget_mib=400)) as (host, _),
        trio.open_nursery() as nursery,
    ):

        async def wait() -> None:
            with pytest.raises(SandboxClosedError):
                async with host.open_sandbox():
                    pytest.fail("the host is closed")

        async with host.open_sandbox():
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert host.statistics().admission.tasks_waiting == 1
            host._closed = True  # pyright: ignore[reportPrivateUsage] # as open_host does


async def test_a_cache_directory_that_cannot_be_written_is_named(short_path: Path) -> None:
    # Not even root can make a directory here.
    async with open_host(HostConfig(cache_dir=Path("/proc/nowhere"), runtime_dir=short_path)) as host:
        with pytest.raises((SandboxError, OSError), match="/proc/nowhere"):
            await host.prepare()
