"""The warm pool with real machines: who they are when they are handed over, and what becomes of those that are no good."""

from __future__ import annotations

import os
import signal
import time

import pytest
import trio

from tests._leaks import nothing_left, wait_until
from trio_sandbox import Host, HostConfig, Sandbox, UnknownImageError, open_host
from trio_sandbox.qemu import Vm

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_IDENTITY = """
import os, random, socket, time, uuid
print(os.urandom(16).hex(), random.random(), uuid.uuid4(), socket.gethostname(), open("/proc/sys/kernel/random/boot_id").read())
"""


async def ready(host: Host, count: int) -> None:
    await wait_until(lambda: host.statistics().warm.ready == count)


def idle(host: Host) -> list[Vm]:
    """Give the machines that wait, in the order in which they will be taken."""
    spares = host._warm._idle.values()  # pyright: ignore[reportPrivateUsage]
    return [spare.held.vm for queue in spares for spare in queue]


async def assert_clock(sandbox: Sandbox) -> None:
    before = time.time()
    told = float((await sandbox.run("import time; print(time.time())")).stdout)
    assert before - 0.2 < told < time.time() + 0.2


async def test_machines_that_wait(caplog: pytest.LogCaptureFixture) -> None:
    with nothing_left():
        async with open_host(HostConfig(warm={"python": 2})) as host:
            assert host.statistics().warm.ready == 0, "opening the host does not wait"
            await ready(host, 2)
            waiting = {vm.pid for vm in idle(host)}
            # A guest can use a balloon whether asked to or not, and these share their memory: none is there.
            assert [await vm.balloon.query() for vm in idle(host)] == [None, None]
            async with host.open_sandbox() as first, host.open_sandbox() as second:
                assert {first.statistics().qemu_pid, second.statistics().qemu_pid} == waiting
                seen = [(await sandbox.run(_IDENTITY)).stdout.split() for sandbox in (first, second)]
                assert all(one != other for one, other in zip(*seen, strict=True)), seen
                assert len(seen[0]) == 5
                assert (await first.run("print(dir() == [], 'x' in globals())")).stdout == "False False\n"
            assert host.statistics().warm.hits == 2

            # A host that stops for a while, and one of its machines that does not go on: that, and a dead one, are dropped.
            await ready(host, 2)
            stuck, dead = idle(host)
            os.kill(stuck.pid, signal.SIGSTOP)
            os.kill(dead.pid, signal.SIGKILL)
            async with host.open_sandbox() as sandbox:
                assert sandbox.statistics().qemu_pid not in (stuck.pid, dead.pid)
                await assert_clock(sandbox)
            numbers = host.statistics().warm
            assert (numbers.hits, numbers.misses, numbers.dropped) == (2, 1, 2)
            assert "could not be used any more: the guest did not answer" in caplog.text

            await ready(host, 2)
            for vm in idle(host):
                os.kill(vm.pid, signal.SIGSTOP)
            await trio.sleep(1.5)  # the pause itself
            for vm in idle(host):
                os.kill(vm.pid, signal.SIGCONT)
            async with host.open_sandbox() as sandbox:
                await assert_clock(sandbox)
            assert host.statistics().warm.hits == 3
        # Left in the middle of a refill.


async def test_an_image_that_nobody_knows() -> None:
    with nothing_left(), pytest.raises(UnknownImageError, match="there is no image 'pyhton'; there are: "):
        async with open_host(HostConfig(warm={"pyhton": 1})):
            pytest.fail("opened")
