"""Copies of running sandboxes, with real machines: what they share, what they don't, and what the one that was copied notices."""

from __future__ import annotations

import time

import attrs
import pytest
import trio

from tests._leaks import nothing_left
from trio_sandbox import CapacityError, OutputChunk, Sandbox, SandboxClosedError, open_host

from .test_templates import IDENTITY, check_clock

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_PREPARE = """
import os, random, secrets, socket, subprocess, time, uuid
random.random(), uuid.uuid1(), uuid.getnode()
x, begun = 41, time.monotonic()
open("/home/user/file", "w").write("from the parent")
background = subprocess.Popen(["sh", "-c", "while :; do date +%s.%N > /home/user/tick; sleep 0.05; done"])
"""
_TICK = """
import time
before = open("/home/user/tick").read()
while (tick := open("/home/user/tick").read()) in ("", before): time.sleep(0.01)
print(time.time(), time.monotonic() - begun, background.poll())
"""
_LINES = 400


async def run(sandbox: Sandbox, code: str) -> str:
    ran = await sandbox.run(code)
    assert (ran.stderr, ran.exit_code) == ("", 0)
    return ran.stdout


async def test_four_forks_and_one_of_a_fork() -> None:
    async def use(child: Sandbox, number: int) -> None:
        assert await run(child, "x += 1; print(x, open('/home/user/file').read())") == "42 from the parent\n"
        before = time.time()
        clock, since, ended = (await run(child, _TICK)).split()
        assert 0 < float(since) < 60, "the monotonic clock goes on where it was"
        assert ended == "None", "what a run left in the background goes on"
        assert before - 0.5 < float(clock) < time.time() + 0.5, "the clock is the host's"
        identities.append((await run(child, IDENTITY)).split())
        await check_clock(child)
        await run(child, f"x = {number}; open('/home/user/file', 'w').write('{number}')")
        wrote[number].set()
        for event in wrote:
            await event.wait()
        assert await run(child, "print(x, open('/home/user/file').read())") == f"{number} {number}\n"

    identities: list[list[str]] = []
    wrote = [trio.Event() for _ in range(4)]
    async with open_host() as host, host.open_sandbox() as sandbox:
        await run(sandbox, _PREPARE)
        before = host.statistics()
        async with sandbox.fork(4) as children, trio.open_nursery() as users:
            assert host.statistics().sandboxes_open == 5
            for number, child in enumerate(children):
                users.start_soon(use, child, number)
        # The sandbox is what it was, and can be forked again, as its forks can.
        assert await run(sandbox, "print(x, open('/home/user/file').read())") == "41 from the parent\n"
        async with sandbox.fork(1) as (child,):
            await run(child, "x = 50")
            async with child.fork(1) as (grandchild,):
                identities.append((await run(grandchild, IDENTITY)).split())
                assert await run(grandchild, "print(x, open('/home/user/file').read())") == "50 from the parent\n"
                # What happens to one is that one's.
                grandchild._slot.machine.retire("the test wants it")  # pyright: ignore[reportPrivateUsage]
                with pytest.raises(SandboxClosedError):
                    await grandchild.run("print(1)")
                with pytest.raises(SandboxClosedError):
                    async with grandchild.fork(1):
                        pytest.fail("forked")
            assert await run(child, "print(x)") == "50\n"
        after = host.statistics().admission
        # Other tests have hosts, too.
        here = [attrs.evolve(each, memory_mib_elsewhere=0, disk_mib_elsewhere=0) for each in (before.admission, after)]
        assert here[0] == here[1]
        assert host.statistics().sandboxes_open == 1
        identities.append((await run(sandbox, IDENTITY)).split())
        await check_clock(sandbox)  # it stood still for its forks
        with pytest.raises(CapacityError, match="1000 forks"):
            async with sandbox.fork(1000):
                pytest.fail("forked")
    for values in zip(*identities, strict=True):
        assert len(set(values)) == 6, values


async def test_what_is_under_way_stays_with_the_parent() -> None:
    async with open_host() as host, host.open_sandbox() as sandbox:
        await run(sandbox, "x = 41")
        async with (
            sandbox.stream(f"import time\nfor i in range({_LINES}): print(i); time.sleep(0.01)") as events,
            sandbox.open_process(["cat"]) as cat,
        ):
            assert cat.stdin is not None
            assert cat.stdout is not None
            output = bytearray()
            # It is in the middle of the run.
            while len(output) < 100:
                output += event.data if isinstance(event := await anext(events), OutputChunk) else b""
            with nothing_left(host._runtime.directory):  # pyright: ignore[reportPrivateUsage]
                async with sandbox.fork(1) as (child,):
                    # The interpreter is free as soon as the run has ended. Whether that needs a kill, load decides.
                    ran = await child.run("print(globals().get('x'))")
                    assert ran.stdout == ("None\n" if ran.restarted else "41\n")
                    gone = f"while kill -0 {cat.pid} 2>/dev/null; do sleep 0.01; done"
                    await child.run_process(["sh", "-c", gone])
            await cat.stdin.send_all(b"still there")
            assert await cat.stdout.receive_some() == b"still there"
            async for event in events:
                output += event.data if isinstance(event, OutputChunk) else b""
        assert bytes(output) == b"".join(b"%d\n" % number for number in range(_LINES)), "complete, and in order"
        assert await run(sandbox, "print(x)") == "41\n"
