"""Virtual machines with the real QEMU, kernel and agent. Each boot takes seconds: few tests, many looks."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import HANG_LIMIT, nothing_left, wait_until
from trio_sandbox import VmBootError, VmDiedError
from trio_sandbox.qemu import (
    MachineConfig,
    Vm,
    VmManager,
)

pytestmark = pytest.mark.qemu


async def test_a_machine_and_its_confinement(manager: VmManager, config: MachineConfig, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        async with manager.open_vm(config, hostname="box") as vm:
            assert vm.guest.peer_hello["version"] == 1
            assert await vm.guest.ping() > 0
            status = await vm.qmp.execute("query-status")
            assert (status["running"], status["status"]) == (True, "running")
            _check_process(vm)
            _check_files(vm, config)
            await _check_devices(vm)
    assert vm.failure is None
    # An ordinary user's has a parent in between, which was killed with it.
    await wait_until(lambda: not Path(f"/proc/{vm.pid}").exists())


def _check_process(vm: Vm) -> None:
    confinement = vm.accelerator.confinement
    text = Path(f"/proc/{vm.pid}/status").read_text(encoding="utf-8")
    status = dict(line.split(":\t", 1) for line in text.splitlines())
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert os.getpgid(vm.pid) != os.getpgid(0)  # so that Ctrl-C is not for it
    uid, own_uid = int(status["Uid"].split()[0]), os.geteuid()
    assert (uid != own_uid) is confinement.other_user
    assert not status["Groups"].strip() or not confinement.other_user
    assert int(status["CapEff"], 16) == 0 or not confinement.other_user
    # Looking at another user's namespaces is root's privilege, as is having such a process.
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", vm.pid)}
    assert (len(namespaces) == 2) is confinement.network_namespace


def _check_files(vm: Vm, config: MachineConfig) -> None:
    """QEMU has open what it was given, and the base image can't be written to."""
    named: dict[str, int] = {}
    for fd in os.listdir(f"/proc/{vm.pid}/fd"):
        target = os.readlink(f"/proc/{vm.pid}/fd/{fd}")
        if target.startswith("/") and not target.startswith("/memfd:"):
            assert stat.S_ISREG(os.stat(target).st_mode) or target in ("/dev/null", "/dev/kvm"), target
            info = Path(f"/proc/{vm.pid}/fdinfo/{fd}").read_text(encoding="ascii")
            flags = int(next(line for line in info.splitlines() if line.startswith("flags:")).split()[1], 8)
            named[target] = max(named.get(target, 0), flags & os.O_ACCMODE)
    named.pop("/dev/null")
    named.pop("/dev/kvm", None)
    read_only = (config.kernel, config.initrd, config.system_disk, config.image)
    assert named == {str(config.overlay): os.O_RDWR} | {str(path): os.O_RDONLY for path in read_only}


async def _check_devices(vm: Vm) -> None:
    buses = await vm.qmp.execute("query-pci")
    classes = {device["class_info"]["class"] >> 8 for bus in buses for device in bus["devices"]}
    assert 0x02 not in classes, "a network controller"
    assert 0x03 not in classes, "a display controller"
    nodes = {node["node-name"]: node for node in await vm.qmp.execute("query-named-block-nodes", {"flat": True})}
    assert {name: node["ro"] for name, node in nodes.items()} == {
        "system-file": True,
        "system": True,
        "image-file": True,
        "image": True,
        "mounts-file": True,
        "mounts": True,
        "overlay-file": False,
        "overlay": False,
    }


async def test_a_kernel_panic_is_the_end_and_is_told(manager: VmManager, config: MachineConfig) -> None:
    config = attrs.evolve(config, kernel_args=(*config.kernel_args, "unknown_nmi_panic"))
    async with manager.open_vm(config) as vm:
        stream = vm.guest.open_stream({"service": "pipe"})
        await vm.qmp.execute("inject-nmi")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        failure = await vm.wait_ended()
        assert isinstance(failure, VmDiedError)
        assert "the guest's kernel panicked: Kernel panic - not syncing" in str(failure)
        assert "Kernel panic" in failure.console


async def test_an_initrd_that_is_garbage(manager: VmManager, config: MachineConfig, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"garbage" * 1000)
    initrd.chmod(0o644)
    with nothing_left(tmp_path), pytest.raises(VmBootError, match="the guest's kernel panicked") as caught:
        async with manager.open_vm(attrs.evolve(config, initrd=initrd)):
            pytest.fail("booted")
    assert "Unable to mount root fs" in caught.value.console


async def test_a_kernel_that_is_garbage(manager: VmManager, config: MachineConfig, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"garbage" * 1000)
    kernel.chmod(0o644)
    with nothing_left(tmp_path), pytest.raises(VmBootError, match="exited with status 1"):
        async with manager.open_vm(attrs.evolve(config, kernel=kernel)):
            pytest.fail("booted")


async def test_an_overlay_that_is_garbage(manager: VmManager, config: MachineConfig, tmp_path: Path) -> None:
    config.overlay.write_bytes(b"garbage" * 1000)
    with nothing_left(tmp_path), pytest.raises(VmBootError, match="Image is not in qcow2 format"):
        async with manager.open_vm(config):
            pytest.fail("booted")


async def test_an_overlay_in_use(manager: VmManager, config: MachineConfig) -> None:
    """Two machines that write to one disk would destroy it; the second one does not even start."""
    async with trio.open_nursery() as nursery:
        second_failed = trio.Event()

        async def boot_first() -> None:
            with trio.CancelScope() as scope:
                nursery.start_soon(_cancel_when, second_failed, scope)
                async with manager.open_vm(config):
                    await second_failed.wait()

        nursery.start_soon(boot_first)
        await wait_until(lambda: _is_locked(config.overlay))
        with pytest.raises(VmBootError, match='Failed to get "write" lock'):
            async with manager.open_vm(config):
                pytest.fail("booted")
        second_failed.set()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _is_locked(path: Path) -> bool:
    # Asked of the file itself: a container's file system may number its files otherwise than /proc/locks.
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with path.open("r+b") as file:
        (kind, *_) = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted))
    return bool(kind != fcntl.F_UNLCK)


_OWNER = """\
import sys, trio
from pathlib import Path
from trio_sandbox.qemu import (
    MachineConfig, detect_accelerator, open_runtime, open_storage_daemon, open_vm_manager,
)

async def main():
    base, cache, kernel, initrd, kernel_args, system_disk, image, overlay = sys.argv[1:]
    config = MachineConfig(kernel=kernel, initrd=initrd, kernel_args=kernel_args.split(), system_disk=system_disk,
        image=image, overlay=overlay)
    async with open_runtime(Path(base)) as runtime:
        accelerator = await detect_accelerator(cache_dir=Path(cache), environment=runtime.environment)
        async with (
            open_storage_daemon(directory=runtime.directory, environment=runtime.environment) as daemon,
            open_vm_manager(runtime=runtime, accelerator=accelerator) as manager,
            manager.open_vm(config) as vm,
        ):
            print(vm.pid, daemon.pid, runtime.reaper_pid, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def test_kill_9_of_the_owner_of_a_running_machine_leaves_nothing(
    config: MachineConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No QEMU, no storage daemon, no reaper, no runtime directory.

    It is promised within two seconds; how long it took is printed (``pytest -rP``), not asserted.
    """
    base = Path("/tmp") / f"ts-{os.getpid()}"
    base.mkdir()
    try:
        files = (config.kernel, config.initrd, " ".join(config.kernel_args), config.system_disk, config.image)
        argv = [base, tmp_path_factory.getbasetemp(), *files, config.overlay]
        owner = subprocess.Popen([sys.executable, "-c", _OWNER, *map(str, argv)], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        with owner.stdout:
            pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3
        assert all(_is_running(pid) for pid in pids)
        owner.send_signal(signal.SIGKILL)
        started = time.monotonic()
        owner.wait()
        assert _comes_true(lambda: not any(_is_running(pid) for pid in pids) and os.listdir(base) == [])
        print(f"nothing was left {time.monotonic() - started:.2f} s after the kill")
    finally:
        base.rmdir()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Poll; the bound is for machines that are busy with other things."""
    deadline = time.monotonic() + HANG_LIMIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
