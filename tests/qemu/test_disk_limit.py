"""What a guest may write to its own disk: `SandboxConfig.disk_mib`, in real machines."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests._disks import small_disk
from trio_sandbox import Host, HostConfig, Sandbox, SandboxConfig, open_host
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines._named import NamedTemplateStore

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_MIB = 2**20


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_host() as host:
        yield host


#: Writes until the disk is full; prints why that ended, and how many MiB it were.
_FILL = (
    "import errno, os\n"
    "written, name = 0, {name!r}\n"
    "try:\n"
    "    with open(name, 'wb', buffering=0) as file:\n"
    "        while written < 4096: written += file.write(os.urandom(1 << 20)) / 2**20\n"
    "except OSError as exc: print(errno.errorcode[exc.errno], int(written))\n"
    "else: print('all', int(written))\n"
)


async def _fill(sandbox: Sandbox, name: str = "/home/user/full") -> tuple[str, int]:
    result = await sandbox.run(_FILL.format(name=name), check=True)
    word, count = result.stdout.split()
    return word, int(count)


def _file_limit(sandbox: Sandbox) -> int:
    pid = sandbox.statistics().qemu_pid
    assert pid is not None
    (line,) = (
        line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max file size")
    )
    return int(line.split()[3])


async def test_a_full_disk_is_no_broken_one(host: Host) -> None:
    config = SandboxConfig(disk_mib=64)
    async with host.open_sandbox(config=config) as sandbox, host.open_sandbox() as neighbour:
        word, count = await _fill(sandbox)
        assert word == "ENOSPC"
        assert 60 <= count <= 64
        # The guest says so, root is no exception, and what is removed can be written again.
        assert await _fill(sandbox, "/home/user/more") == ("ENOSPC", 0)
        script = "df -P -B 1M / | tail -1; head -c 8M /dev/zero >/root/more"
        full = await sandbox.run_process(
            ["sh", "-c", script], user="root", check=False, capture_stdout=True, stderr_to_stdout=True
        )
        assert full.stdout.split()[3] == b"0"
        assert b"No space left on device" in full.stdout
        (await sandbox.run("import os; os.remove('/home/user/full')")).check()
        word, count = await _fill(sandbox)
        assert word == "ENOSPC"
        assert count >= 48
        (await sandbox.run("with open('/home/user/full', 'rb') as file:\n    while file.read(1 << 20): pass")).check()
        # The host holds a limit of its own for a guest that does not keep this one.
        assert _file_limit(sandbox) < 2 * 2**30 < _file_limit(neighbour)
        (await neighbour.run("open('/home/user/x', 'wb').write(bytes(100 << 20))")).check()


async def test_what_is_removed_is_given_back_to_the_host(host: Host) -> None:
    async with host.open_sandbox(disk_mib=64) as sandbox:
        pid = sandbox.statistics().qemu_pid
        for _ in range(6):
            word, _ = await _fill(sandbox)
            assert word == "ENOSPC"
            (await sandbox.run("import os; os.sync(); os.remove('/home/user/full')")).check()
        overlays = {path for fd in Path(f"/proc/{pid}/fd").iterdir() if (path := fd.resolve()).name == "overlay.qcow2"}
        (overlay,) = overlays
        assert overlay.stat().st_size < (64 + 64) * _MIB


async def test_copies_and_saved_sandboxes_have_a_limit_too(host: Host) -> None:
    name = f"disk-{os.getpid()}"
    async with host.open_sandbox(disk_mib=64) as sandbox:
        await sandbox.run("open('/home/user/half', 'wb').write(bytes(32 << 20))", check=True)
        await sandbox.checkpoint()
        async with sandbox.fork(1) as (child,):
            word, count = await _fill(child)
            assert word == "ENOSPC"
            assert 28 <= count <= 32
            assert _file_limit(child) == _file_limit(sandbox)
        await sandbox.save(name, replace=True)
        await sandbox.hibernate()
        await sandbox.resume()
        await sandbox.revert()
        word, count = await _fill(sandbox)
        assert word == "ENOSPC"
        assert 28 <= count <= 32
    try:
        # A saved sandbox has the limit that it is opened with, or none.
        async with host.open_sandbox(template=name, disk_mib=16) as saved:
            word, count = await _fill(saved)
            assert word == "ENOSPC"
            assert 12 <= count <= 16
        async with host.open_sandbox(template=name) as saved:
            result = await saved.run("import os; s = os.statvfs('/'); print(s.f_bavail * s.f_frsize >> 20)", check=True)
            assert int(result.stdout) > 4096
    finally:
        NamedTemplateStore(default_cache_directory()).remove(name)


async def test_what_a_sandbox_takes_is_counted_by_the_host(host: Host) -> None:
    async with host.open_sandbox() as sandbox:
        before = sandbox.usage()
        assert before.cpu_seconds > 0
        assert before.memory_bytes > 8 * _MIB
        assert before.disk_bytes < 8 * _MIB
        code = (
            "import os\nsum(range(3_000_000))\nkept = os.urandom(32 << 20)\n"
            "open('/home/user/x', 'wb').write(kept); os.sync()"
        )
        await sandbox.run(code, check=True)
        after = sandbox.usage()
        assert after.cpu_seconds > before.cpu_seconds + 0.05
        assert after.memory_bytes > before.memory_bytes + 30 * _MIB
        assert 32 * _MIB <= after.disk_bytes < 48 * _MIB
        # It is the sandbox's, whatever machine that has: what was written before a checkpoint counts, and what machines took that are gone.
        await sandbox.checkpoint()
        await sandbox.revert()
        reverted = sandbox.usage()
        assert reverted.cpu_seconds > after.cpu_seconds
        assert 32 * _MIB <= reverted.disk_bytes < 48 * _MIB
        await sandbox.hibernate()
        asleep = sandbox.usage()
        assert asleep.cpu_seconds >= reverted.cpu_seconds
        assert asleep.memory_bytes == 0
        assert asleep == sandbox.usage()
        await sandbox.resume()
        assert sandbox.usage().cpu_seconds > asleep.cpu_seconds
        # A copy has taken nothing yet but what it is itself.
        async with sandbox.fork(1) as (child,):
            assert child.usage().disk_bytes < 8 * _MIB
            assert child.usage().cpu_seconds < after.cpu_seconds


async def test_one_guest_does_not_fill_the_disk_of_others(tmp_path: Path) -> None:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    with small_disk(mount_point, 400 * _MIB) as disk:
        runtime_dir = Path("/tmp", f"trio-sandbox-small-{os.getpid()}")  # sockets want a short path
        runtime_dir.symlink_to(disk)
        try:
            async with (
                open_host(HostConfig(runtime_dir=runtime_dir)) as host,
                host.open_sandbox() as filler,
                host.open_sandbox() as neighbour,
            ):
                word, count = await _fill(filler)
                assert word == "ENOSPC"
                assert 200 < count < 400
                write = (
                    "import os; f = open('mine', 'wb'); f.write(os.urandom(4 << 20)); f.flush(); os.fsync(f.fileno())"
                )
                await neighbour.run(write, check=True)
        finally:
            runtime_dir.unlink()
