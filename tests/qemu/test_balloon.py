"""The balloon of a real guest."""

from __future__ import annotations

import os
import signal

import pytest
import trio
import trio.testing

from trio_sandbox import BalloonError, QMPClosedError, Timeouts
from trio_sandbox.qemu import BalloonClient, MachineConfig, VmManager

pytestmark = pytest.mark.qemu


async def test_balloon_of_a_running_guest(manager: VmManager, config: MachineConfig) -> None:
    """One boot, everything that needs a guest."""
    async with manager.open_vm(config) as vm:
        balloon = BalloonClient(vm.qmp)
        full = config.memory_mib
        assert await balloon.query() == full
        with pytest.raises(ValueError, match=f"at most {full} MiB"):
            await balloon.inflate(full + 1)

        assert await balloon.inflate(full - 96) == full
        assert await balloon.query() == full - 96
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
