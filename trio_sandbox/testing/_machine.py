"""What stands for a virtual machine: a channel in memory, with a scripted guest at its other end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio
import trio.testing

from .._errors import VmDiedError
from .._nurseries import open_services
from ..qemu import Accelerator, Confinement, QemuBuild
from ..wire import Channel, ChannelStream, PeerGoneError, Role, StreamHandler, open_channel
from ._guest import ScriptedGuest

PID: Final = 100
_ACCELERATOR: Final = Accelerator(
    name="tcg",
    hardware=False,
    reason="a scripted sandbox, in which nothing runs",
    qemu=QemuBuild(path="", size=0, modified_ns=0, version=(0, 0)),
    confinement=Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False),
)


@attrs.define(eq=False)
class ScriptedMachine:
    """What `Sandbox` needs of a virtual machine."""

    guest: Channel
    script: ScriptedGuest
    hang_up: Callable[[], object]
    failure: Exception | None = None
    closed: bool = False
    pid: int = PID
    accelerator: Accelerator = _ACCELERATOR
    ended: trio.Event = attrs.field(factory=trio.Event)
    guest_handler: StreamHandler | None = None

    def accept(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object] | None:
        """Serve a stream that the guest opens."""
        if self.guest_handler is not None:
            return self.guest_handler(stream, header)
        stream.reset("refused")
        return None

    def retire(self, reason: str) -> None:
        """End it."""
        self.end(VmDiedError(reason))

    def end(self, failure: Exception) -> None:
        """End it for that reason."""
        if self.failure is None:
            self.failure = failure
            self.ended.set()
            self.hang_up()

    async def wait_ended(self) -> Exception | None:
        """Wait until it is gone; return why."""
        await self.ended.wait()
        return self.failure

    def console(self) -> str:
        """Return what its console shows: nothing."""
        return ""

    def qmp_log(self) -> str:
        """Return what QEMU said: nothing."""
        return ""


@asynccontextmanager
async def open_machine(guest: ScriptedGuest) -> AsyncGenerator[ScriptedMachine]:
    """Yield a machine with that guest, for a block."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def run_guest(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC910 (the suppressed error is a checkpoint)
        task_status.started()
        with contextlib.suppress(PeerGoneError):  # cancelled before we had said hello
            async with open_channel(theirs, role=Role.GUEST, hello={"version": 1}, handler=guest.serve) as channel:
                guest.channel = channel
                await channel.wait_closed()

    def accept(stream: ChannelStream, header: dict[str, object]) -> Awaitable[object] | None:
        return machine.accept(stream, header)

    def hang_up() -> None:
        theirs.send_stream.close()
        theirs.receive_stream.close()

    async with open_services("open_scripted_sandbox()") as services:
        await services.start(run_guest)
        async with open_channel(ours, role=Role.HOST, hello={"version": 1}, handler=accept) as channel:
            machine = ScriptedMachine(channel, guest, hang_up)
            guest.end = machine.end
            try:
                yield machine
            finally:
                machine.closed = True
                machine.ended.set()
