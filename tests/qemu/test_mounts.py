"""The host's directories in a real guest: read there by whoever is asked to, and written to by nobody."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trio_sandbox import MountError, Sandbox, SandboxConfig, open_host

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

#: All that root of the guest can think of to write: the file system, the file system made writable, the disk itself.
ATTACK = """
import ctypes, os, stat
libc = ctypes.CDLL(None, use_errno=True)
MS_REMOUNT, MS_BIND = 32, 4096

def attempt(what, *args):
    try:
        what(*args)
    except OSError as exc:
        print(exc.errno, end=" ")
    else:
        print("done:", what, args)

def remount(flags):
    if libc.mount(b"none", b"/data", None, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), "mount")

def write_to(disk):
    os.mknod(f"/root/{disk}", stat.S_IFBLK | 0o600, disk)
    with open(f"/root/{disk}", "r+b", buffering=0) as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())

part = os.stat("/data").st_dev
disk = os.makedev(os.major(part), os.minor(part) & ~15)
attempt(os.mkdir, "/data/new")
attempt(os.unlink, "/data/file")
attempt(remount, MS_REMOUNT)
attempt(os.mkdir, "/data/new")
attempt(write_to, part)
attempt(write_to, disk)
try:
    remount(MS_REMOUNT | MS_BIND)  # which makes the mount writable, and not what is below it
except OSError:
    pass
attempt(os.mkdir, "/data/new")
"""


async def test_mounts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_text("of the host's\n")
    (source / "link").symlink_to("sub/program")
    (source / "sub" / "program").write_text("#!/bin/sh\ncp /bin/true /data/x || echo ran\n")
    (source / "sub" / "program").chmod(0o700)
    large = os.urandom(3 * 2**20)
    (source / "large").write_bytes(large)
    (other := tmp_path / "other").mkdir()
    before = {path: path.lstat() for path in source.rglob("*")}
    config = SandboxConfig(mounts={"/data": source, "/srv/made/by/us": other})
    async with open_host() as host:
        async with host.open_sandbox("python", config) as sandbox:
            # The interpreter was there before, as it goes on from a template.
            result = await sandbox.run("import os; print(open('/data/file').read(), os.listdir('/srv/made/by/us'))")
            assert result.stdout == "of the host's\n []\n"
            assert await sandbox.path("/data/large").read_bytes() == large
            assert (await sandbox.path("/data/file").stat()).st_uid == 1000
            assert await shell(sandbox, "/data/link 2>/dev/null") == "ran\n"
            (source / "file").write_text("changed\n")
            assert await shell(sandbox, "cat /data/file", user="root") == "of the host's\n"
            (source / "file").write_text("of the host's\n")
            attacked = await sandbox.run_process(["python3", "-c", ATTACK], user="root", capture_stdout=True)
            assert "done" not in attacked.stdout.decode()
            assert len(attacked.stdout.split()) == 7
            assert await shell(sandbox, "echo 3 > /proc/sys/vm/drop_caches; cat /data/file", user="root") == (
                "of the host's\n"
            )
        assert {path: (path.lstat().st_mode, path.lstat().st_size) for path in source.rglob("*")} == {
            path: (status.st_mode, status.st_size) for path, status in before.items()
        }
        async with host.open_sandbox() as without:
            assert not await without.path("/data").exists()
        with pytest.raises(MountError, match="the guest can't mount /etc/passwd/x: Not a directory"):
            async with host.open_sandbox("python", SandboxConfig(mounts={"/etc/passwd/x": source})):
                pytest.fail("it has been opened")
        with pytest.raises(MountError, match="missing can't be mounted: No such file"):
            async with host.open_sandbox("python", SandboxConfig(mounts={"/data": source / "missing"})):
                pytest.fail("it has been opened")


async def shell(sandbox: Sandbox, line: str, user: str | None = None) -> str:
    completed = await sandbox.run_process(line, shell=True, capture_stdout=True, user=user)
    return completed.stdout.decode()
