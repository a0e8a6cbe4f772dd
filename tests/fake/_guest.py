"""A machine without a machine: the host's side of a channel, and a guest that a test scripts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
import trio.testing

from trio_sandbox import SandboxConfig, Timeouts, VmDiedError
from trio_sandbox.qemu import Accelerator, Confinement, MachineConfig, QemuBuild
from trio_sandbox.qemu._clock import GuestClock
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.wire import (
    JSON,
    Channel,
    ChannelStream,
    RecordStream,
    Role,
    StreamHandler,
    encode_json,
    encode_record,
    open_channel,
)

Service = Callable[[RecordStream], Awaitable[None]]

ACCELERATOR = Accelerator(
    name="tcg",
    hardware=False,
    reason="a test",
    qemu=QemuBuild(path="qemu", size=0, modified_ns=0, version=(7, 2)),
    confinement=Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False),
)


def _machine_config() -> MachineConfig:
    return MachineConfig(kernel="kernel", initrd="initrd", system_disk="system", image="image", overlay="overlay")


@attrs.define(eq=False)
class FakeMachine:
    """What `Sandbox` needs of a virtual machine, over memory streams."""

    guest: Channel
    cut: Callable[[], object]
    failure: Exception | None = None
    closed: bool = False
    accelerator: Accelerator = ACCELERATOR
    pid: int = attrs.field(factory=os.getpid)
    ended: trio.Event = attrs.field(factory=trio.Event)
    clock: GuestClock = attrs.field(factory=GuestClock)
    config: object = attrs.field(factory=_machine_config)
    balloon: object = None
    guest_handler: StreamHandler | None = None

    def retire(self, reason: str) -> None:
        """End the guest, as killing QEMU does: our side of the channel reads end of file."""
        if self.failure is None:
            self.failure = VmDiedError(reason)
            self.ended.set()
            self.cut()

    async def wait_ended(self) -> Exception | None:
        await self.ended.wait()
        return self.failure

    def cpu_seconds(self) -> float:
        return 1.0

    def own_memory(self) -> int:
        return 2**20

    def console(self) -> str:
        return "no console"

    def qmp_log(self) -> str:
        return "no monitor"


@asynccontextmanager
async def open_fake_machine(services: dict[str, Service]) -> AsyncGenerator[FakeMachine]:
    """Yield a machine whose guest serves each stream of a service by calling what *services* says."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def serve(stream: ChannelStream, header: dict[str, Any]) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the host gave a stream up
            records = RecordStream(stream)
            if "request" in header:  # it comes with the header, or else as the first record: all the same to a script
                records._decoder.feed(encode_record(JSON, encode_json(header["request"])))  # pyright: ignore[reportPrivateUsage]
            await {"pipe": leave_alone, **services}[header["service"]](records)

    async def guest() -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            async with open_channel(theirs, role=Role.GUEST, hello={"version": 1}, handler=serve) as channel:
                await channel.wait_closed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        async with open_channel(ours, role=Role.HOST, hello={"version": 1}) as channel:
            machine = FakeMachine(channel, nursery.cancel_scope.cancel)
            machine.cut = lambda: trio.lowlevel.spawn_system_task(trio.aclose_forcefully, theirs)
            try:
                yield machine
            finally:
                machine.closed = True
                machine.ended.set()
        nursery.cancel_scope.cancel(reason="the test is over")


@asynccontextmanager
async def open_fake_sandbox(
    services: dict[str, Service],
    *,
    config: SandboxConfig | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncGenerator[tuple[Sandbox, FakeMachine]]:
    """Yield a sandbox on a fake machine."""
    async with open_fake_machine(services) as machine:
        yield Sandbox(Slot(machine), "python", config or SandboxConfig(), timeouts or Timeouts()), machine


async def leave_alone(records: RecordStream) -> None:
    """A pipe that nobody reads or writes."""
    await trio.sleep_forever()


async def receive_json(records: RecordStream) -> Any:
    """Return the next record, which must be JSON; None at the end."""
    record = await records.receive()
    if record is None:
        return None
    assert record[0] == JSON
    return json.loads(record[1])


def finished(
    exit_code: int = 0,
    *,
    value: str | None = None,
    restarted: bool = False,
    state_kept: bool = True,
    expired: bool = False,
) -> dict[str, Any]:
    """Return the message that ends a run."""
    end = {"exit_code": exit_code, "value": value, "restarted": restarted, "state_kept": state_kept}
    return {"finished": {**end, "expired": expired}}
