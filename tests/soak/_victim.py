"""A program with sandboxes under a mixed load, to be killed: ``python -m tests.soak._victim CACHE RUNTIME``.

It says "ready" when the load begins, and then a line for each operation.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from trio_sandbox import HostConfig, SandboxConfig, open_host

from ._load import Load

#: What one sandbox is used for, besides another that is saved and put to sleep; and what comes and goes.
_KINDS = ("run", "shell", "stream", "process", "file", "fork", "checkpoint")


async def _main(cache: Path, runtime: Path) -> None:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(HostConfig(cache_dir=cache, runtime_dir=runtime)))
        busy = await stack.enter_async_context(host.open_sandbox())
        asleep = await stack.enter_async_context(host.open_sandbox())
        await asleep.run("v = 7")
        loads = [Load(busy, "busy"), Load(asleep, "asleep")]

        async def come_and_go() -> None:
            number = 0
            while True:
                number += 1
                # A template is made each time.
                await host.run("1", config=SandboxConfig(memory_mib=128, warmup=f"q = {number}"))

        async def tell() -> None:
            told = 0
            while True:
                done = sum(load.done.total() for load in loads)
                for failure in [failure for load in loads for failure in load.failures]:
                    sys.exit(f"a load failed: {failure}")
                print("done\n" * (done - told), end="", flush=True)
                told = done
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(loads[0].serve, *_KINDS)
            nursery.start_soon(loads[1].serve, "life")
            nursery.start_soon(come_and_go)
            nursery.start_soon(tell)
            print("ready", flush=True)


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]), Path(sys.argv[2]))
