"""One sandbox of a node, for a user who is elsewhere: its machines are offered, and its methods are called."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Final, final

import attrs
import trio

from .._errors import LinkProtocolError, SandboxClosedError, SandboxError
from .._image_steps import PackagesStep
from .._nurseries import hide_nursery
from ..client import Machine
from ..network import HostDialer, HostResolver
from ..sandbox import Checkpoint, Sandbox
from ..wire import Role
from ._dial import Operator
from ._links import open_link
from ._messages import Ended, Offer, Opened, Status
from ._relay import Relay
from ._security import Secrets
from ._tls import TlsStream

#: Seconds for the news of a machine's end to be written, before its link is closed, which tells less.
_NEWS_PATIENCE: Final = 5.0


@final
class Keeper:
    """Keeps one sandbox.

    Args:
      number: Of the sandbox on this node.
      sandbox: It.
      secrets: Where secrets of machines come from.
      numbers: Numbers for machines, which are unique on this node.
      tell: Sends a message to the sandbox's user.

    """

    def __init__(
        self,
        number: int,
        sandbox: Sandbox,
        secrets: Secrets,
        numbers: itertools.count[int],
        tell: Callable[[object], Awaitable[object]],
    ) -> None:
        self.number: int = number
        self.sandbox: Sandbox = sandbox
        self._slot = sandbox._slot  # pyright: ignore[reportPrivateUsage]
        # Its user holds a connection to this very machine, and decides when it sleeps.
        self._slot.stays_awake = lambda: True
        self._secrets = secrets
        self._numbers = numbers
        self._tell = tell
        self._resolver = HostResolver()
        self._changing = trio.Lock()
        self._machines: dict[int, Machine] = {}
        self._checkpoints: dict[int, Checkpoint] = {}
        self._told: Status | None = None
        #: What changes the machine: one thing at a time.
        self._changes: dict[str, Callable[..., Awaitable[object]]] = {
            "machine": self._machine,
            "checkpoint": self._checkpoint,
            "discard": self._discard,
            "revert": self._revert,
            "hibernate": sandbox.hibernate,
            "resume": sandbox.resume,
            "save": self._save,
        }
        #: What does not, and may take as long as it likes.
        self._requests: dict[str, Callable[..., Awaitable[object]]] = {"install": self._install}

    def opened(self) -> Opened:
        """Return what its user is told first."""
        sandbox = self.sandbox
        command = sandbox._command  # pyright: ignore[reportPrivateUsage]
        # Its long texts follow: of hundreds of copies they would be too much for one message.
        self._told = attrs.evolve(self._status(), console=None, qmp_log=None)
        return Opened(self.number, sandbox.image, sandbox.config, sandbox.language, command, self._offer(), self._told)

    def _offer(self) -> Offer:
        machine = self._slot.machine
        number = next((number for number, known in self._machines.items() if known is machine), None)
        if number is None:
            number = next(self._numbers)
            self._machines = {number: machine}
        self._secrets.revoke(number)
        return Offer(number, self._secrets.issue(number), machine.accelerator, machine.pid)

    def owns(self, machine: int) -> bool:
        """Tell whether the machine of that number is this sandbox's."""
        return machine in self._machines

    def news(self) -> Status | None:
        """Return what it is like now; None if its user knows that already."""
        last, self._told = self._told, self._status()
        if self._told == last:
            return None
        return self._told if last is None else without_known(self._told, last)

    def _status(self) -> Status:
        sandbox = self.sandbox
        numbers = sandbox.statistics()
        try:
            usage = sandbox.usage()
        except SandboxError:
            usage = None  # a test's sandbox has no machine of its own
        return Status(
            sandbox=self.number,
            usage=usage,
            clock_error=numbers.clock_error,
            last_pause=numbers.last_pause,
            console=sandbox.console(),
            qmp_log=sandbox.qmp_log(),
        )

    # --- What its user asks for ---

    async def ask(self, operation: str, arguments: tuple[Any, ...]) -> object:
        """Do what its user asks for.

        Raises:
          LinkProtocolError: if there is no such operation.
          Exception: what it raises.

        """
        if (request := self._requests.get(operation)) is not None:
            return await request(*arguments)
        change = self._changes.get(operation)
        if change is None:
            raise LinkProtocolError(f"a sandbox has no operation {operation!r:.40}")
        async with self._changing:
            return await change(*arguments)

    async def _machine(self) -> Offer | None:
        await trio.lowlevel.checkpoint()
        return None if self.sandbox.statistics().hibernated else self._offer()

    async def _checkpoint(self) -> int:
        checkpoint = await self.sandbox.checkpoint()
        number = next(self._numbers)
        self._checkpoints[number] = checkpoint
        return number

    async def _discard(self, number: int) -> None:
        await trio.lowlevel.checkpoint()
        if (checkpoint := self._checkpoints.pop(number, None)) is not None:
            checkpoint.discard()

    async def _revert(self, number: int) -> None:
        checkpoint = self._checkpoints.get(number)
        if checkpoint is None:
            raise LinkProtocolError(f"a sandbox has no checkpoint {number!r:.40}")
        await self.sandbox.revert(checkpoint)

    async def _save(self, name: str, replace: bool) -> None:
        await self.sandbox.save(name, replace=replace)

    async def _install(self, step: PackagesStep) -> None:
        await self.sandbox._install(step)  # pyright: ignore[reportPrivateUsage]

    # --- Its machines ---

    async def serve_machine(self, number: int, stream: TlsStream) -> None:
        """Relay what a connection and the machine of that number say to each other, until one of them ends.

        A machine whose user is gone is ended: nobody could use it any more. When the machine ends, or this is cancelled, the
        connection breaks off, as QEMU's port does: if streams were ended or reset before, that would be taken for the guest's word.
        """
        machine = self._machines[number]
        relay = Relay(machine.guest, self._slot.note_request, Operator(HostDialer(self._resolver)))
        ended = False

        async def wait_end() -> None:
            nonlocal ended
            try:
                failure = await machine.wait_ended()
                ended = True
                if failure is not None:
                    # First the news: when the link closes, whoever waits on it asks why.
                    with trio.move_on_after(_NEWS_PATIENCE):
                        await self._tell(Ended(number, failure))
            finally:
                stream.close()

        try:
            with hide_nursery("a machine's link"):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait_end)
                    with trio.CancelScope(shield=True):  # it ends with the connection, which that task closes
                        async with open_link(stream, Role.GUEST, relay.accept_user, silence=float("inf")) as link:
                            relay.user = link
                            machine.guest_handler = relay.accept_guest
                            await link.wait_closed()
                    nursery.cancel_scope.cancel(reason="the link is closed")
        finally:
            machine.guest_handler = None
            if not ended and not machine.closed:
                machine.retire("the connection of who used it is gone")

    def close(self) -> None:
        """Let nobody connect any more."""
        for number in self._machines:
            self._secrets.revoke(number)
        self._machines = {}


def without_known(status: Status, last: Status) -> Status:
    """Return *status* without those long texts that are as they were."""
    return attrs.evolve(
        status,
        console=None if status.console == last.console else status.console,
        qmp_log=None if status.qmp_log == last.qmp_log else status.qmp_log,
    )


def gone(number: int) -> SandboxClosedError:
    """Return the error for a sandbox that a node does not have any more."""
    return SandboxClosedError(f"sandbox {number} of this node is closed; nothing was done")
