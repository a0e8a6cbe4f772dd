"""The balloon of a real guest."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from tests._leaks import wait_until
from trio_sandbox import BalloonError, HostConfig, QMPClosedError, SandboxConfig, Timeouts, open_host
from trio_sandbox.client._messages import code_request
from trio_sandbox.client._output import RunTrace
from trio_sandbox.client._run import collect, open_run
from trio_sandbox.qemu import BalloonClient, MachineConfig, Vm, VmManager

pytestmark = pytest.mark.qemu


async def test_balloon_of_a_running_guest(manager: VmManager, config: MachineConfig) -> None:
    """One boot, everything that needs a guest."""
    async with manager.open_vm(attrs.evolve(config, balloon=True)) as vm:
        balloon = vm.balloon
        full = config.memory_mib
        assert await balloon.query() == full
        with pytest.raises(ValueError, match=f"at most {full} MiB"):
            await balloon.inflate(full + 1)

        # What is freed comes back to the host unasked ...
        before = _resident_mib(vm.pid)
        await _run(vm, "import os; data = os.urandom(96 * 2**20)")
        used = _resident_mib(vm.pid)
        assert used > before + 64
        await _run(vm, "del data")
        await wait_until(lambda: _resident_mib(vm.pid) < used - 64)
        # ... and what the guest keeps for later, in caches, when it is asked to.
        await _run(vm, "open('/home/user/cached', 'wb').write(os.urandom(64 * 2**20)); os.sync()")
        before = _resident_mib(vm.pid)
        assert await balloon.inflate(full - 128) == full
        assert await balloon.query() == full - 128
        assert _resident_mib(vm.pid) < before - 32
        assert await vm.guest.ping() > 0

        await balloon.deflate(full)
        assert await balloon.query() == full

        # A guest can't give up what it needs to live: it goes as far as it can, and gets it back.
        impatient = BalloonClient(vm.qmp, timeouts=Timeouts(balloon=1))
        with pytest.raises(BalloonError, match="and not 2 MiB after 1 s"):
            await impatient.inflate(2)
        await balloon.wait_actual(full)
        assert await vm.guest.ping() > 0

        async with trio.open_nursery() as nursery:

            async def inflate() -> None:
                with pytest.raises(QMPClosedError):
                    await balloon.inflate(full - 96)

            os.kill(vm.pid, signal.SIGSTOP)
            nursery.start_soon(inflate)
            await trio.testing.wait_all_tasks_blocked(0.01)
            os.kill(vm.pid, signal.SIGKILL)


async def test_an_idle_sandbox_gives_back_what_its_guest_caches() -> None:
    config = SandboxConfig(reclaim_after=1)
    async with open_host(HostConfig(templates=False)) as host, host.open_sandbox(config=config) as sandbox:
        pid = sandbox.statistics().qemu_pid
        assert pid is not None

        async def cache_and_give_back() -> None:
            await sandbox.run("import os; open('cached', 'wb').write(os.urandom(64 * 2**20)); os.sync()")
            least = _resident_mib(pid) - 32
            await wait_until(lambda: _resident_mib(pid) < least)

        for _ in range(2):
            await cache_and_give_back()
        result = await sandbox.run("data = b'x' * (96 * 2**20); print(os.stat('cached').st_size, len(data))")
        assert result.stdout == f"{64 * 2**20} {96 * 2**20}\n"


async def _run(vm: Vm, code: str) -> None:
    request = code_request(code, language="python", env=None, cwd=None)
    trace = RunTrace("python")
    async with open_run(vm, request, trace, display_limit=2**20, memory_mib=256, grace=1, patience=20) as events:
        result = await collect(events, 2**20)
    assert (result.exit_code, result.stderr) == (0, "")


def _resident_mib(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss"].split()[0]) / 1024
