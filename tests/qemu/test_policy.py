"""What a running QEMU can do, against what the page on security says: red when it can do more."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from trio_sandbox import Sandbox, SandboxConfig, open_host
from trio_sandbox.host import Host

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
