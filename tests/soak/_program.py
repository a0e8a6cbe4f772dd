"""Programs that use the library where something is wrong, each in a process of its own: ``python -m tests.soak._program WHAT CACHE RUNTIME [ARGUMENT]``.

The last line on the standard output is JSON: a list of what happened, each with its name, and what it came to.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from trio_sandbox import Host, HostConfig, Sandbox, SandboxConfig, SandboxError, Timeouts, open_host

#: Seconds for one operation.
_PATIENCE = 90.0
#: Sandboxes and processes that are opened where a limit is, at most.
_SANDBOXES, _PROCESSES = 12, 40


class Diary:
    """What happened."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, str]] = []
        """What was done, what it came to, and what that is: a "result", an "error" that is documented, or one that is a "surprise"."""

    async def note(self, what: str, operation: Callable[[], Awaitable[object]]) -> bool:
        """Do it, and note what it comes to; return whether it came to a result."""

        async def bounded() -> object:
            with trio.fail_after(_PATIENCE):
                return await operation()

        return await self.note_opened(what, bounded)

    async def note_opened(self, what: str, operation: Callable[[], Awaitable[object]]) -> bool:
        """Do and note what opens a block that stays open, which no bound may be around."""
        try:
            result = await operation()
        except Exception as exc:  # noqa: BLE001  whether it may be is noted
            documented = isinstance(exc, (SandboxError, OSError)) and not isinstance(exc, trio.TooSlowError)
            entry = (what, f"{type(exc).__name__}: {str(exc)[:300]}", "error" if documented else "surprise")
            self.entries.append(entry)
            return False
        self.entries.append((what, str(result), "result"))
        return True


async def _compute(sandbox: Sandbox) -> str:
    return (await sandbox.run("print(6 * 7)")).stdout


async def _fork(sandbox: Sandbox) -> str:
    async with sandbox.fork(1) as (child,):
        return await _compute(child)


async def _open_and_compute(host: Host, config: SandboxConfig | None = None) -> str:
    return (await host.run("print(6 * 7)", config=config)).stdout


async def _once(diary: Diary, config: HostConfig, argument: str) -> None:
    """Open a sandbox whose warm-up is *argument*, so that it has a template of its own."""
    async with open_host(config) as host:
        own = SandboxConfig(memory_mib=128, warmup=argument)
        await diary.note("opened", partial(_open_and_compute, host, own))
        await diary.note("opened again", partial(_open_and_compute, host, own))


async def _limited(diary: Diary, config: HostConfig, argument: str) -> None:
    """Do as much as a limit of this process's allows: *argument* is its name and its value."""
    name, value = argument.split("=")
    resource.setrlimit(getattr(resource, name), (int(value), int(value)))

    async def use() -> None:
        async with open_host(config) as host:
            async with AsyncExitStack() as stack:
                opened: list[Sandbox] = []

                async def open_one() -> None:
                    opened.append(await stack.enter_async_context(host.open_sandbox()))

                while len(opened) < _SANDBOXES and await diary.note_opened("opened", open_one):
                    pass
                for sandbox in opened:
                    await diary.note("computes", partial(_compute, sandbox))
                if opened:
                    await _use_one(diary, opened[0])
            await diary.note("opened after all were closed", partial(_open_and_compute, host))

    await diary.note_opened("host", use)


async def _use_one(diary: Diary, sandbox: Sandbox) -> None:
    async with AsyncExitStack() as stack:

        async def open_process() -> None:
            await stack.enter_async_context(sandbox.open_process(["cat"]))

        for _ in range(_PROCESSES):
            if not await diary.note_opened("process", open_process):
                break
    await diary.note("forked", partial(_fork, sandbox))
    await diary.note("checkpointed", sandbox.checkpoint)
    await diary.note("uploaded", partial(sandbox.upload, __file__, "/home/user/uploaded"))
    await diary.note("computes at last", partial(_compute, sandbox))


async def _forked(diary: Diary, config: HostConfig, argument: str) -> None:
    """Fork in the middle of a block, as *argument* says, and go on."""
    async with open_host(config) as host, host.open_sandbox() as sandbox:
        await sandbox.run("x = 1")
        pid = os.fork()
        if pid == 0:
            match argument:
                case "ends":
                    os._exit(0)
                case "exits":
                    sys.exit(0)
                case "raises":
                    raise ValueError("in the child")
                case "goes on":
                    await sandbox.run("x = 2")
                case _:  # it outlives its parent, with copies of all descriptors
                    os.execvp("sleep", ["sleep", "5"])
        if argument != "outlives":
            os.waitpid(pid, 0)  # noqa: ASYNC222  as such programs do
        await diary.note("computes", partial(_compute, sandbox))
        await diary.note("opened", partial(_open_and_compute, host))


async def _suspended(diary: Diary, config: HostConfig, _argument: str) -> None:
    """Say "ready", and use a sandbox for some seconds, in which this process may be stopped."""
    async with open_host(config) as host, host.open_sandbox() as busy, host.open_sandbox() as idle:
        await idle.run("y = 3")
        print("ready", flush=True)
        for number in range(1, 100):
            await busy.run("x = globals().get('x', 0) + 1")
            await trio.sleep(0.05)
            if number == 99:
                await diary.note("counted", lambda: _printed(busy, "print(x)"))
        await diary.note("computes", lambda: _printed(idle, "print(y)"))
        await trio.sleep(6)  # the clock is looked at within five seconds
        await diary.note("clock", lambda: _printed(idle, "import time; print(time.time())"))
        await diary.note("own clock", _time)
        await diary.note("opened", partial(_open_and_compute, host))


async def _printed(sandbox: Sandbox, code: str) -> str:
    return (await sandbox.run(code)).stdout.strip()


async def _time() -> float:
    await trio.lowlevel.checkpoint()
    return time.time()


_WHAT = {"once": _once, "limited": _limited, "forked": _forked, "suspended": _suspended}

if __name__ == "__main__":
    what, cache, runtime, argument = sys.argv[1:]
    timeouts = Timeouts(agent_silence=5) if what == "suspended" else Timeouts()
    written = Diary()
    trio.run(
        _WHAT[what], written, HostConfig(cache_dir=Path(cache), runtime_dir=Path(runtime), timeouts=timeouts), argument
    )
    print(json.dumps(written.entries), flush=True)
