"""What a running QEMU can do, against what the page on security says: red when it can do more."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import cast

import pytest

from trio_sandbox import Sandbox, SandboxConfig, open_host
from trio_sandbox.host import Host
from trio_sandbox.qemu import Vm

pytestmark = pytest.mark.qemu


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_host() as host:
        yield host


def pid_of(sandbox: Sandbox) -> int:
    pid = sandbox.statistics().qemu_pid
    assert pid is not None
    return pid


def soft_and_hard(pid: int) -> dict[str, tuple[str, str]]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): (line[26:47].strip(), line[47:68].strip()) for line in lines}


async def test_limits_of_resources_hold_for_every_thread(host: Host) -> None:
    if not host.accelerator.confinement.limits:
        pytest.skip("this host has no prlimit")
    async with host.open_sandbox(config=SandboxConfig(vcpus=2)) as sandbox:
        await sandbox.run("1")
        pid = pid_of(sandbox)
        limits = soft_and_hard(pid)
        assert limits["Max core file size"] == ("0", "0")
        assert limits["Max open files"] == ("1024", "1024")
        soft, hard = limits["Max file size"]
        assert soft == hard
        assert 8 * 2**30 < int(hard) < 10 * 2**30
        if host.accelerator.confinement.uid_per_vm:
            assert limits["Max processes"] == ("162", "162")
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        threads = {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
        assert threads == {min(ours + 5, 19)}


def writable_files(pid: int) -> set[str]:
    """Give the names of the files on a disk that a process has open for writing."""
    found = set[str]()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            path, info = os.readlink(f"/proc/{pid}/fd/{fd}"), Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        except FileNotFoundError:
            continue  # closed meanwhile
        flags = next(int(line.split()[1], 8) for line in info.splitlines() if line.startswith("flags:"))
        if path.startswith("/") and not path.startswith(("/dev/", "/memfd:")) and flags & os.O_ACCMODE != os.O_RDONLY:
            found.add(path)
    return found


async def test_what_others_stand_on_is_written_to_by_nobody(host: Host) -> None:
    """A QEMU that its guest took over can't reach back into a checkpoint, a saved sandbox, or the siblings of a fork."""
    async with host.open_sandbox() as sandbox:
        for revert in (False, True):
            checkpoints = []
            for number in range(3):
                await sandbox.run(f"open('file-{number}', 'w').write('x' * 10**6)")
                checkpoints.append(await sandbox.checkpoint())
                vm = cast("Vm", sandbox._slot.machine)  # pyright: ignore[reportPrivateUsage]
                disks = {path for path in writable_files(pid_of(sandbox)) if path.endswith(".qcow2")}
                assert disks == {os.fspath(vm.config.overlay)}, "and of no layer"
                assert vm.config.overlay.stat().st_nlink == 1, "nobody else stands on what it writes to"
            # What it writes is there, in spite of all that was opened and closed.
            assert (await sandbox.run("import os; os.sync(); len(open('file-0').read())")).value == "1000000"
            if not revert:
                await sandbox.revert(checkpoints[0])
        async with sandbox.fork(2) as children:
            for each in (sandbox, *children):
                vm = cast("Vm", each._slot.machine)  # pyright: ignore[reportPrivateUsage]
                disks = {path for path in writable_files(pid_of(each)) if path.endswith(".qcow2")}
                assert disks == {os.fspath(vm.config.overlay)}
