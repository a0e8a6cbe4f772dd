"""Checkpoints, copies and sleep of a sandbox whose guest is a script: what it remembers is copied."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias, final

import trio

from .._errors import SandboxClosedError, SandboxHibernatedError, SnapshotError
from .._nurseries import Services
from ..client import check_open, guest_failures
from ..machines import HeldMachine, check_count, hold_machine, open_together
from ..network import Gateway
from ..sandbox import Checkpoint, Checkpoints, Sandbox, SandboxNetwork, Slot, Usage, transaction
from ._guest import ScriptedGuest
from ._machine import ScriptedMachine, open_machine

#: Told what is about to be done; what it raises is raised by that.
Before: TypeAlias = Callable[[str], object]
OpenCopy: TypeAlias = Callable[[ScriptedGuest, Gateway], AbstractAsyncContextManager[Sandbox]]


@final
class ScriptedLife:
    """Cares for the machine of a scripted sandbox: a `sandbox.Life`.

    Args:
      services: Those of the sandbox's block.
      held: Its machine.
      gateway: What decides on its connections.
      patience: Seconds for its guest to answer.
      give_back: Seconds that a failed transaction has to go back.
      before: See `Before`.
      open_copy: Opens a sandbox with a copy of the guest.

    """

    def __init__(
        self,
        services: Services,
        held: HeldMachine[ScriptedMachine],
        gateway: Gateway,
        *,
        patience: float,
        give_back: float,
        before: Before,
        open_copy: OpenCopy,
    ) -> None:
        self.slot: Slot = Slot(held.vm)
        self.network: SandboxNetwork = SandboxNetwork(self.slot, gateway, patience)
        self.reverts: int = 0
        self.hibernations: int = 0
        self.last_pause: float | None = None
        self.clock_error: float | None = None
        self._services = services
        self._held = held
        self._gateway = gateway
        self._give_back = give_back
        self._before = before
        self._open_copy = open_copy
        self._changing = trio.Lock()
        self._checkpoints: Checkpoints[ScriptedGuest] = Checkpoints()
        self._asleep: ScriptedGuest | None = None
        self._closed = False

    @property
    def hibernated(self) -> bool:
        """Whether it is asleep."""
        return self._asleep is not None

    @property
    def checkpoints(self) -> int:
        """How many checkpoints there are to go back to."""
        return len(self._checkpoints)

    def usage(self) -> Usage:
        """What `Sandbox.usage` does: nothing is used."""
        numbers = self.network.statistics()
        return Usage(
            cpu_seconds=0.0,
            memory_bytes=0,
            disk_bytes=0,
            network_bytes_sent=numbers.bytes_sent,
            network_bytes_received=numbers.bytes_received,
        )

    async def checkpoint(self) -> Checkpoint:
        """What `Sandbox.checkpoint` does."""
        async with self._awake("a checkpoint"):
            self._before("checkpoint")
            checkpoint = self._checkpoints.add(self._held.vm.script.copy(), lambda: None)
            self.last_pause = 0.0
        return checkpoint

    async def revert(self, checkpoint: Checkpoint | None) -> None:
        """What `Sandbox.revert` does."""
        async with self._changing:
            kept = self._checkpoints.find(checkpoint)
            self._check_not_closed("reverting")
            self._before("revert")
            self.slot.shut_off(self._gate)
            old = self._held
            try:
                await self._go_on(kept.copy())
            except BaseException:
                if self._asleep is None:
                    self.slot.reopen()
                raise
            old.vm.retire("the sandbox was reverted to a checkpoint")
            await old.close()
            self.reverts += 1

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """What `Sandbox.transaction` does."""
        return transaction(self, self._give_back)

    async def save(self, name: str, *, replace: bool) -> None:
        """What `Sandbox.save` does: there is nothing that a real sandbox could start from."""
        await trio.lowlevel.checkpoint()
        raise SnapshotError(f"a scripted sandbox can't be saved as {name!r:.100}, replaced or not ({replace})")

    @asynccontextmanager
    async def fork(self, count: int) -> AsyncGenerator[tuple[Sandbox, ...]]:
        """What `Sandbox.fork` does."""
        count = check_count(count)
        async with self._awake("forking"):
            self._before("fork")
            guest = self._held.vm.script.copy()
        async with open_together(
            [self._open_copy(guest.copy(), self._gateway.copy()) for _ in range(count)]
        ) as children:
            yield children

    async def hibernate(self) -> None:
        """What `Sandbox.hibernate` does."""
        async with self._changing:
            self._check_not_closed("hibernating")
            if self._asleep is not None:
                await trio.lowlevel.checkpoint()
                return
            machine = self._held.vm
            check_open(machine, "hibernating")
            async with guest_failures(machine, "hibernating"):
                await machine.guest.ping()  # with the answer come the guest's ends of streams that are over
            if machine.guest.statistics().open_streams:
                raise trio.BusyResourceError(
                    "a sandbox can't hibernate while a run, a process, a file or a connection is open"
                )
            self._before("hibernate")
            self._asleep = machine.script.copy()
            self.slot.shut_off(self._gate)
            self.hibernations += 1
            await self._held.close()

    async def resume(self) -> None:
        """What `Sandbox.resume` does."""
        async with self._changing:
            self._check_not_closed("resuming")
            if self._asleep is None:
                await trio.lowlevel.checkpoint()
                return
            self._before("resume")
            await self._go_on(self._asleep)

    def close(self) -> None:
        """Let requests find out that the block was left."""
        self._closed = True
        self._asleep = None
        self._checkpoints.discard_all()
        self.slot.reopen()

    async def _go_on(self, guest: ScriptedGuest) -> None:
        """Have a machine with that guest in the slot."""
        try:
            self._held = await hold_machine(self._services, open_machine(guest))
        except trio.ClosedResourceError as exc:
            raise SandboxClosedError("the sandbox's block exited meanwhile") from exc
        self._held.vm.guest_handler = self.network.handler
        self._asleep = None
        self.slot.reopen(self._held.vm)

    async def _gate(self, what: str) -> None:
        async with self._changing:
            if self._asleep is not None:
                raise SandboxHibernatedError(
                    f"{what} was not sent: the sandbox hibernates; call `await sandbox.resume()`"
                )

    @asynccontextmanager
    async def _awake(self, what: str) -> AsyncGenerator[None]:
        while True:
            await self.slot.resolve(what)
            async with self._changing:
                if self._asleep is None:
                    check_open(self._held.vm, what)
                    self._check_not_closed(what)
                    yield
                    return

    def _check_not_closed(self, what: str) -> None:
        if self._closed:
            raise SandboxClosedError(f"{what} is not possible: the sandbox's block has exited; open another sandbox")
