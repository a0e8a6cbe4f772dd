"""What becomes of a sandbox's machine that is on another node: the node does it, and this side connects to what comes of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final, Generic, TypeVar, final

import attrs
import trio

from .._config import SandboxConfig, Timeouts
from .._errors import SandboxClosedError, SandboxError, SandboxHibernatedError, SnapshotError
from .._image_steps import PackagesStep
from .._nurseries import Services, open_services
from .._observe import part_logger
from ..client import check_open
from ..machines import check_count, check_template_name
from ..network import Gateway
from ..sandbox import Checkpoint, Checkpoints, GuestRequests, SandboxNetwork, Slot, Usage, transaction
from ._client import NodeClient
from ._machine import RemoteMachine
from ._messages import Ask, Fork, Offer, Opened, OpenedTogether, Status

_log = part_logger("fleet")

Child = TypeVar("Child")

#: Looks for idleness in the time after which a sandbox is to fall asleep.
_LOOKS: Final = 4


@final
class RemoteLife(Generic[Child]):
    """Cares for the machine of one sandbox on another node: a `sandbox.Life`. One thing at a time.

    Args:
      node: The node.
      opened: What it said of the sandbox.
      services: Those of the sandbox's block.
      machine: Its machine, connected.
      config: What the sandbox was opened with.
      timeouts: Bounds on what is asked of the guest.
      gateway: What decides on the guest's connections, which are made from here.
      background: Where requests go on that nobody waits for.
      open_child: Makes the sandbox of a copy of this one.
      hold_shares: Notes, for a block, that the node has so many sandboxes like this one more.
      saving: Has it saved under a name, in place of what others have or not, in a block.
      id: The sandbox's own.

    """

    def __init__(
        self,
        node: NodeClient,
        opened: Opened,
        services: Services,
        machine: RemoteMachine,
        *,
        config: SandboxConfig,
        timeouts: Timeouts,
        gateway: Gateway,
        background: trio.Nursery,
        open_child: Callable[[Services, Opened, Gateway], AbstractAsyncContextManager[Child]],
        hold_shares: Callable[[int], AbstractAsyncContextManager[None]],
        saving: Callable[[str, bool], AbstractAsyncContextManager[None]],
        id: str,  # noqa: A002 - that is what it is
    ) -> None:
        self.slot: Slot = Slot(machine, id)
        self.network: SandboxNetwork = SandboxNetwork(self.slot, gateway, timeouts.kill)
        self.reverts: int = 0
        self.hibernations: int = 0
        self.hibernated: bool = False
        self._node = node
        self._number = opened.sandbox
        self._services = services
        self._machine = machine
        self._config = config
        self._timeouts = timeouts
        self._gateway = gateway
        self._background = background
        self._open_child = open_child
        self._hold_shares = hold_shares
        self._saving = saving
        self._changing = trio.Lock()
        self._checkpoints: Checkpoints[int] = Checkpoints()
        self._status: Status = opened.status
        self._by_call = False
        self._installing = 0
        self._closed = False
        machine.note(self._status)
        node.hear(Status, self._number, self._note)

    def _note(self, status: Status) -> None:
        last = self._status
        self._status = attrs.evolve(
            status,
            console=last.console if status.console is None else status.console,
            qmp_log=last.qmp_log if status.qmp_log is None else status.qmp_log,
        )
        self._machine.note(self._status)

    @property
    def checkpoints(self) -> int:
        """How many checkpoints there are to go back to."""
        return len(self._checkpoints)

    @property
    def last_pause(self) -> float | None:
        """Seconds that its guest stood still for the last snapshot, as its node last said."""
        return self._status.last_pause

    @property
    def clock_error(self) -> float | None:
        """Seconds that the guest's clock is off at most, as its node last said; None: unknown."""
        return self._status.clock_error

    def usage(self) -> Usage:
        """What `Sandbox.usage` does, as its node last said, which is a second old at most."""
        if self._status.usage is None:
            raise SandboxError(
                f"node {self._node.name} does not know what the sandbox has taken; ask again in a second"
            )
        return self._status.usage

    async def _ask(self, operation: str, *arguments: object) -> object:
        return await self._node.ask(self._number, operation, *arguments)

    # --- Going back ---

    async def checkpoint(self) -> Checkpoint:
        """What `Sandbox.checkpoint` does."""
        async with self._awake("a checkpoint"):
            number = await self._ask("checkpoint")
        assert isinstance(number, int)
        return self._checkpoints.add(number, partial(self._discard, number))

    def _discard(self, number: int) -> None:
        if not self._closed and self._node.failure is None:
            message = Ask(self._number, "discard", (number,))
            self._node.request_soon(self._background, message, "giving a checkpoint up")

    async def revert(self, checkpoint: Checkpoint | None) -> None:
        """What `Sandbox.revert` does."""
        self.slot.home.check("reverting")
        async with self._changing:
            number = self._checkpoints.find(checkpoint)
            self._check_not_closed("reverting")
            async with self._changed("the sandbox was reverted to a checkpoint"):
                await self._ask("revert", number)
            self.reverts += 1

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None]:
        """What `Sandbox.transaction` does."""
        async with transaction(self, self._timeouts.boot):
            yield

    @asynccontextmanager
    async def _changed(self, why: str) -> AsyncGenerator[None]:
        """Have requests wait for a block in which the node may change the machine; then connect to the one that there is."""
        if not self.hibernated:
            self.slot.shut_off(self._gate)
        try:
            yield
        finally:
            # Also where it failed or was cancelled: only the node knows what became of it.
            with trio.move_on_after(self._timeouts.boot, shield=True):
                await self._follow(why)
            if not self.hibernated:
                self.slot.reopen()

    async def _follow(self, why: str) -> None:
        """Have the machine that the node has now in the slot."""
        try:
            offer = await self._ask("machine")
            if not isinstance(offer, Offer):
                return
            if self.hibernated or offer.machine != self._machine.number:
                machine = RemoteMachine(self._node, offer)
                await self._start(machine)
                machine.note(self._status)  # which may have come before the machine
                old, self._machine, self.hibernated = self._machine, machine, False
                old.retire(why)
                old.close()
                self.slot.reopen(machine)
                if self.network.policy:
                    await self.network.switch(machine)
        except (SandboxError, OSError) as exc:
            # Requests find out: the machine of before is gone, or there still.
            _log.warning("node %s did not give a sandbox's machine: %s", self._node.name, exc)

    async def _start(self, machine: RemoteMachine) -> None:
        try:
            await self._services.start(machine.serve)
        except trio.ClosedResourceError as exc:
            raise SandboxClosedError("the sandbox's block has exited meanwhile") from exc

    # --- Being saved, and copied ---

    async def save(self, name: str, *, replace: bool) -> None:
        """What `Sandbox.save` does: in the node's cache directory."""
        self.slot.home.check("saving")
        check_template_name(name)
        async with self._saving(name, replace), self._awake("saving"):
            await self._ask("save", name, replace)

    @asynccontextmanager
    async def fork(self, count: int) -> AsyncGenerator[tuple[Child, ...]]:
        """What `Sandbox.fork` does, on the same node."""
        count = check_count(count)
        await self.slot.resolve("forking")
        check_open(self._machine, "forking")
        async with (
            self._hold_shares(count),
            self._node.hold(Fork(self._number, count), "forking a sandbox") as opened,
            open_services("Sandbox.fork()") as services,
            AsyncExitStack() as stack,
        ):
            assert isinstance(opened, OpenedTogether)
            children = [
                await stack.enter_async_context(self._open_child(services, each, self._gateway.copy()))
                for each in opened.sandboxes
            ]
            yield tuple(children)

    # --- Being added to ---

    async def install(self, guest: GuestRequests, step: PackagesStep) -> None:
        """What `Sandbox.install` does: the node chooses and fetches the packages, as for its images."""
        machine = await self.slot.resolve("installing packages")
        check_open(machine, "installing packages")
        self._installing += 1
        try:
            await self._ask("install", step)
        finally:
            self._installing -= 1

    # --- Sleep ---

    async def hibernate(self) -> None:
        """What `Sandbox.hibernate` does."""
        self.slot.home.check("hibernating")
        async with self._changing:
            self._check_not_closed("hibernating")
            if not self.hibernated:
                await self._fall_asleep()
            self._by_call = True

    async def resume(self) -> None:
        """What `Sandbox.resume` does."""
        self.slot.home.check("resuming")
        async with self._changing:
            self._check_not_closed("resuming")
            if self.hibernated:
                await self._wake()

    async def serve_idleness(self, seconds: float, *, task_status: trio.TaskStatus[None]) -> None:
        """Have the sandbox fall asleep whenever it was idle for so many *seconds*: this side knows of its requests first."""
        task_status.started()
        while True:  # noqa: ASYNC913 - it begins with a sleep
            try:
                await self._wait_idle(seconds)
                async with self._changing:
                    if not self.hibernated:
                        await self._fall_asleep()
                        self._by_call = False
            except trio.BusyResourceError:
                pass
            except (SandboxError, OSError) as exc:
                _log.warning("an idle sandbox did not fall asleep: %s", exc)

    async def _wait_idle(self, seconds: float) -> None:
        busy_at = trio.current_time()
        while True:
            await trio.sleep(seconds / _LOOKS)
            now, machine = trio.current_time(), self._machine
            numbers = machine.guest.statistics()
            busy = numbers.open_streams > numbers.peer_streams or self._installing > 0
            if self.hibernated or machine.failure is not None or self._changing.locked() or busy:
                busy_at = now
            elif now - max(busy_at, self.slot.last_request) >= seconds:
                return

    async def _fall_asleep(self) -> None:
        check_open(self._machine, "hibernating")
        self.slot.shut_off(self._gate)
        try:
            with trio.CancelScope(shield=True):  # a node that is lost ends it; what it did must be known here
                await self._ask("hibernate")
        except BaseException:
            self.slot.reopen()
            raise
        self._machine.close()
        self.hibernated = True
        self.hibernations += 1

    async def _wake(self) -> None:
        try:
            async with self._changed("the sandbox went on"):
                await self._ask("resume")
        finally:
            if not self.hibernated:
                self._by_call = False
        if self.hibernated:
            raise SnapshotError("the sandbox did not wake up, and still hibernates")

    async def _gate(self, what: str) -> None:
        async with self._changing:
            if not self.hibernated:
                return
            if self._by_call:
                raise SandboxHibernatedError(
                    f"{what} was not sent: the sandbox hibernates; call `await sandbox.resume()`"
                )
            self._check_not_closed(what)
            await self._wake()

    # --- All of them ---

    @asynccontextmanager
    async def _awake(self, what: str) -> AsyncGenerator[None]:
        """Hold the lock for a block in which the machine is there."""
        while True:
            await self.slot.resolve(what)
            async with self._changing:
                if not self.hibernated:
                    check_open(self._machine, what)
                    self._check_not_closed(what)
                    yield
                    return

    def _check_not_closed(self, what: str) -> None:
        if self._closed:
            raise SandboxClosedError(f"{what} is not possible: the sandbox's block has exited; open another sandbox")

    def close(self) -> None:
        """Let requests find out that the block was left."""
        self._node.ignore(Status, self._number)
        self._closed = True
        self._checkpoints.discard_all()
        self._machine.close()
        self.slot.reopen()
