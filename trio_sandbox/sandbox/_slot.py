"""Where a sandbox's machine is: another can take its place, and requests that come meanwhile wait."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import final

import trio

from .._entries import Home
from .._observe import new_id
from ..client import Machine

#: Waits until the slot may have a machine again, or raises why it has none; told what the request is, for messages.
Gate = Callable[[str], Awaitable[None]]


@final
class Slot:
    """The place of a sandbox's machine.

    A request asks it for the machine once, when it starts, and stays with that one: a failure of a machine
    that was replaced since is that one's.

    Args:
      machine: The machine that is in it at first.
      id: The sandbox's own, if it has one already.

    """

    def __init__(self, machine: Machine, id: str | None = None) -> None:  # noqa: A002 - that is what it is
        self.id: str = new_id() if id is None else id
        """The sandbox's own name, in logs and spans, whatever its machine."""
        self.home: Home = Home()
        """The only Trio run that may use it."""
        self.machine: Machine = machine
        """The machine that is in it, or was the last."""
        self.last_request: float = trio.current_time()
        """When a request last asked for the machine, on Trio's clock."""
        self.environment: Callable[[], Mapping[str, str]] = dict[str, str]
        """Returns variables that programs get besides those of their user: the network's."""
        self.stays_awake: Callable[[], bool] = bool
        """Tells whether its owner needs the machine awake, asked for something or not."""
        self._gate: Gate | None = None
        self._requested: trio.Event | None = None
        self._changed = trio.Event()

    @property
    def shut(self) -> bool:
        """Whether requests are kept from the machine, which may be gone."""
        return self._gate is not None

    async def resolve(self, what: str) -> Machine:
        """Return the machine for the request *what*, as soon as there is one; a checkpoint only if there is none.

        Raises:
          RuntimeError: if this is not the Trio run that it belongs to.
          Exception: what the gate raises.

        """
        self.home.check(what)
        while self._gate is not None:
            await self._gate(what)
        self.note_request()
        return self.machine  # noqa: ASYNC910 - a run is too short for one more checkpoint

    def note_request(self) -> None:
        """Note that a request has the machine, or more of one that somebody else has resolved."""
        self.last_request = trio.current_time()
        if self._requested is not None:
            self._requested.set()
            self._requested = None

    async def wait_request(self) -> None:
        """Wait until a request asks for the machine."""
        if self._requested is None:
            self._requested = trio.Event()
        await self._requested.wait()

    def shut_off(self, gate: Gate) -> None:
        """Send further requests through *gate* until `reopen`; those that have their machine are not disturbed."""
        self._gate = gate

    def reopen(self, machine: Machine | None = None) -> None:
        """Give requests the machine again, or *machine* from now on."""
        self._gate = None
        if machine is not None:
            self.machine = machine
        self._changed.set()
        self._changed = trio.Event()

    async def wait_ended(self) -> Exception | None:
        """Block until the machine is gone and none is to take its place; return why, None if its block was left."""
        while True:
            machine, changed = self.machine, self._changed
            failure = await machine.wait_ended()
            if self.machine is machine:
                if self._gate is None:
                    return failure
                await changed.wait()
