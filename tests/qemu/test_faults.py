"""Checkpoints, forks, sleep and templates of real machines where something is wrong: full disks, owners that are killed, rights that are missing."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from tests._disks import filled, small_disk
from tests._leaks import nothing_left, wait_until
from tests._processes import Process, birth, descendants, is_program
from trio_sandbox import (
    CapacityError,
    HostConfig,
    Progress,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SnapshotError,
    Timeouts,
    open_host,
)
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines._named import NamedTemplateStore
from trio_sandbox.qemu import Vm, _snapshot

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


@pytest.fixture
def short_path() -> Generator[Path]:
    """Give a directory whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="ts-") as directory:
        yield Path(directory)


async def run(sandbox: Sandbox, code: str) -> str:
    result = await sandbox.run(code)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


# --- Full disks ---


async def checkpoint(sandbox: Sandbox) -> None:
    (await sandbox.checkpoint()).discard()


async def fork(sandbox: Sandbox) -> None:
    async with sandbox.fork(1) as (child,):
        await run(child, "x += 1000; print(x)")


async def sleep(sandbox: Sandbox) -> None:
    await sandbox.hibernate()
    await sandbox.resume()


async def test_a_full_disk_costs_nothing_but_the_request(short_path: Path) -> None:
    """There is no room for the new overlay, for the RAM, or for the state that QEMU writes while the guest stands still."""
    disk_size = 400 * 2**20
    with small_disk(short_path, disk_size) as disk:
        async with open_host(HostConfig(runtime_dir=disk)) as host, host.open_sandbox() as sandbox:
            await run(sandbox, "x = 0")
            kept = await sandbox.checkpoint()
            (memory,) = disk.glob("*/snapshot-*/memory")
            size = memory.stat().st_blocks * 512
            kept.discard()
            runs = 0
            for leave, reason in (
                (0, "there is no disk for the machine to continue with: .*No space left on device"),
                (8 * 2**20, "could not be saved: .*No space left on device"),
                (size + 96 * 2**10, r"could not be saved: .*(No space left on device|the disk of .* is full)"),
            ):
                for operation in (checkpoint, fork, sleep):
                    # Nothing is opened, and so nothing forked, while a twentieth is not left.
                    refused = operation is fork and leave < disk_size // 20
                    with filled(disk, leave=leave), nothing_left(host._runtime.directory):  # pyright: ignore[reportPrivateUsage]
                        with pytest.raises(
                            CapacityError if refused else SnapshotError, match="MiB left, and" if refused else reason
                        ) as caught:
                            await operation(sandbox)
                        assert caught.value.retry_safe
                        runs += 1
                        assert await run(sandbox, "x += 1; print(x)") == str(runs)
            for operation in (checkpoint, fork, sleep):
                await operation(sandbox)
            assert await run(sandbox, "print(x)") == str(runs)


async def test_a_disk_that_fills_up_while_a_template_is_made(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What there was room for at first: the kernel ends QEMU, and the user gets a machine that boots."""
    with small_disk(short_path, 160 * 2**20) as disk, ExitStack() as stack:
        for name in ("store", "locks", "accelerator.json"):
            (disk / name).symlink_to(default_cache_directory() / name)

        def fill(step: Progress) -> None:
            if step.message == "booting a VM":
                stack.enter_context(filled(disk, leave=16 * 2**20))

        config = HostConfig(cache_dir=disk, progress=fill)
        async with open_host(config) as host, host.open_sandbox(config=SandboxConfig(memory_mib=128)) as sandbox:
            assert await run(sandbox, "print(1)") == "1"
        assert "no template can be made" in caplog.text
        assert "ended by SIGBUS: the disk that its RAM's file is on is full" in caplog.text
        assert os.listdir(disk / "templates") == ["locks"]


# --- Machines that stand still ---


async def test_a_machine_that_stands_still_and_goes_on_has_lost_nothing(sandbox: Sandbox) -> None:
    pid = sandbox.statistics().qemu_pid
    assert pid is not None
    await run(sandbox, "x = 1")
    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(run, sandbox, "x += 1")
        nursery.start_soon(sandbox.run_process, ["true"])
        nursery.start_soon(sandbox.path("f").write_bytes, b"content")
        await trio.sleep(0.2)  # for all to be under way; whether they are makes no difference
        os.kill(pid, signal.SIGCONT)
    assert await run(sandbox, "print(x, open('f').read())") == "4 content"


async def test_whoever_is_cancelled_is_back_while_a_machine_stands_still_and_no_other_is_hurt(short_path: Path) -> None:
    config = HostConfig(runtime_dir=short_path, timeouts=Timeouts(interrupt_grace=0.2, kill=0.5, process_exit=1))
    with nothing_left(short_path):
        async with open_host(config) as host, host.open_sandbox() as other:
            await run(other, "x = 7")
            async with host.open_sandbox() as sandbox:
                pid = sandbox.statistics().qemu_pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)
                with trio.move_on_after(0.2) as scope:
                    await sandbox.run("1")
                assert scope.cancelled_caught
                with pytest.raises(SandboxClosedError) as caught:  # what it may still be doing, nobody can tell
                    await sandbox.run("1")
                assert caught.value.retry_safe
            assert await run(other, "print(x)") == "7"


# --- Owners that are killed ---

_OWNER = """
import sys, trio
from trio_sandbox import HostConfig, open_host

async def fork(sandbox):
    async with sandbox.fork(2):
        await trio.sleep(0.2)

async def save(sandbox):
    await sandbox.save(sys.argv[3], replace=True)

async def sleep(sandbox):
    await sandbox.hibernate()
    await trio.sleep(0.2)
    await sandbox.resume()

async def main():
    async with open_host(HostConfig(runtime_dir=sys.argv[1])) as host, host.open_sandbox() as sandbox:
        while True:
            await globals()[sys.argv[2]](sandbox)

trio.run(main)
"""


def is_machine(process: Process) -> bool:
    return is_program(process, "qemu-system")


@pytest.mark.parametrize(
    ("operation", "moment"),
    [("fork", "saving"), ("fork", "opened"), ("sleep", "saving"), ("sleep", "asleep"), ("save", "saving")],
)
async def test_kill_9_of_the_owner(short_path: Path, operation: str, moment: str) -> None:
    """While the state is written, or when the copies are there, or nothing but the files of one that hibernates."""
    name = f"test-{os.getpid()}"
    saved = default_cache_directory() / "saved"
    owner = await trio.lowlevel.open_process([sys.executable, "-c", _OWNER, str(short_path), operation, name])
    try:

        def has_come() -> bool:
            assert owner.poll() is None
            if moment == "saving":
                return any(short_path.glob("*/snapshot-*/devices"))
            machines = sum(map(is_machine, descendants(owner.pid)))
            return machines == 3 if moment == "opened" else any(short_path.glob("*/snapshot-*")) and machines == 0

        await wait_until(has_come)
        owner.send_signal(signal.SIGSTOP)
        started = descendants(owner.pid)
        assert any(map(is_machine, started)) == (moment != "asleep")
    finally:
        owner.kill()
        with trio.CancelScope(shield=True):
            await owner.wait()
    await wait_until(lambda: not any(birth(process.pid) == process.birth for process in started))
    await wait_until(lambda: os.listdir(short_path) == [])
    named = NamedTemplateStore(default_cache_directory())
    if name in named.names():
        named.find(name)  # of an earlier round, and intact
        named.remove(name)
    named.prune()
    assert not list(saved.glob(f"{name}*"))


# --- Rights that are missing, and no templates ---


async def test_forks_and_all_else_where_qemu_s_memory_can_not_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """QEMU writes its RAM itself then, and each machine that goes on from there reads it."""

    def refuse(pid: int, file: int) -> None:
        raise PermissionError(f"the test does not let us read {pid}")

    monkeypatch.setattr(_snapshot, "PrivateRam", refuse)
    caplog.set_level("INFO")
    name = f"test-{os.getpid()}"
    with nothing_left():
        async with open_host() as host, host.open_sandbox() as sandbox:
            await run(sandbox, "x = 1; open('f', 'w').write('one')")
            async with sandbox.fork(1) as (child,):
                assert "QEMU's memory can't be read, and snapshots take longer" in caplog.text
                assert await run(child, "x += 1; print(x, open('f').read())") == "2 one"
                async with child.fork(1) as (grandchild,):
                    assert await run(grandchild, "print(x, open('f').read())") == "2 one"
            await sandbox.checkpoint()
            await run(sandbox, "x = 5; open('f', 'w').write('five')")
            await sandbox.hibernate()
            await sandbox.resume()
            await sandbox.save(name)
            try:
                async with host.open_sandbox(template=name) as other:
                    assert await run(other, "print(x, open('f').read())") == "5 five"
            finally:
                host._named.remove(name)  # pyright: ignore[reportPrivateUsage]
            await sandbox.revert()
            assert await run(sandbox, "print(x, open('f').read())") == "1 one"


async def test_a_warm_machine_of_a_host_without_templates_is_forked(short_path: Path) -> None:
    """It has booted, has a balloon, and its RAM is a file of its own."""
    config = HostConfig(templates=False, warm={"python": 1}, runtime_dir=short_path)
    with nothing_left(short_path):
        async with open_host(config) as host:
            await wait_until(lambda: host.statistics().warm.ready == 1)
            async with host.open_sandbox() as sandbox:
                assert host.statistics().warm.hits == 1
                vm = sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
                assert isinstance(vm, Vm)
                assert vm.config.memory_file is None
                assert await vm.balloon.query() == sandbox.config.memory_mib
                await run(sandbox, "x = bytes(2**24)")
                async with sandbox.fork(1) as (child,):
                    assert await run(child, "print(len(x)); del x") == str(2**24)
                assert await run(sandbox, "print(len(x))") == str(2**24)
