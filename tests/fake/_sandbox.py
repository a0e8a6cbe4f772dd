"""A sandbox whose guest is a real agent in this process, confined to nothing but perhaps control groups."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from tests._leaks import HANG_LIMIT
from trio_sandbox import SandboxConfig, Timeouts
from trio_sandbox.guest.agent.local import open_local_agent
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.wire import Role, open_channel

from ._guest import FakeMachine


@asynccontextmanager
async def open_local_sandbox(
    config: SandboxConfig | None = None, timeouts: Timeouts | None = None, cgroup: str | None = None
) -> AsyncGenerator[tuple[Sandbox, FakeMachine]]:
    """Yield a sandbox and its machine; bounded, for a test that hangs to fail."""
    with trio.fail_after(HANG_LIMIT):
        async with (
            open_local_agent(cgroup=cgroup) as stream,
            open_channel(stream, role=Role.HOST, hello={"version": 1}) as channel,
        ):
            machine = FakeMachine(channel, lambda: trio.lowlevel.spawn_system_task(trio.aclose_forcefully, stream))
            try:
                yield Sandbox(Slot(machine), "python", config or SandboxConfig(), timeouts or Timeouts()), machine
            finally:
                machine.closed = True
                machine.ended.set()


async def comes_late(seconds: float, operate: Callable[[], Awaitable[object]], look: Callable[[], object]) -> bool:
    """Cancel an operation after so many *seconds*; tell whether what *look* sees then is something else a moment later."""
    with trio.move_on_after(seconds):
        await operate()
    seen = look()
    await trio.sleep(0.02)
    return look() != seen
