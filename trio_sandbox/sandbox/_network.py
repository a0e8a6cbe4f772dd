"""The network of a sandbox, whatever machine it has: policies in force, and the machine's switch."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, final

import trio

from .._errors import GuestProtocolError, NetworkUnavailableError, SandboxError
from .._network import Network
from ..client import Machine, ask
from ..network import Gateway, NetworkStatistics, NetworkWatch
from ..wire import StreamHandler
from ._slot import Slot

_ANSWER_BYTES: Final = 2


@final
class SandboxNetwork:
    """Puts policies in force, and has the guest's side follow.

    Args:
      slot: Where the sandbox's machine is.
      gateway: What decides on the guest's connections.
      patience: Seconds for the guest to switch its side on or off.

    """

    def __init__(self, slot: Slot, gateway: Gateway, patience: float) -> None:
        self._slot = slot
        self._gateway = gateway
        self._patience = patience
        self._switching = trio.Lock()
        slot.environment = lambda: gateway.environment

    @property
    def policy(self) -> Network:
        """The policy in force."""
        return self._gateway.network

    @property
    def handler(self) -> StreamHandler | None:
        """See `Gateway.handler`."""
        return self._gateway.handler

    @property
    def certificates(self) -> str:
        """See `Gateway.certificates`."""
        return self._gateway.certificates

    def statistics(self) -> NetworkStatistics:
        """What `Sandbox.network_statistics` does."""
        return self._gateway.statistics()

    @contextmanager
    def watch(self) -> Generator[NetworkWatch]:
        """What `Sandbox.watch_network` does."""
        with self._gateway.watch() as watch:
            yield watch

    @asynccontextmanager
    async def block(self, network: Network) -> AsyncGenerator[NetworkWatch]:
        """What `Sandbox.network` does."""
        with self._gateway.watch() as watch:
            try:
                with self._gateway.layer(network):
                    await self.switch(await self._slot.resolve("the network"))
                    yield watch
            finally:
                # What the guest's side believes protects nothing: without a policy nothing is answered. So this may fail.
                with trio.move_on_after(self._patience, shield=True):
                    await self._follow()

    async def _follow(self) -> None:
        machine = self._slot.machine
        await trio.lowlevel.checkpoint()
        if self._slot.shut or machine.closed or machine.failure is not None:
            return  # whatever machine comes next is told by its hello
        try:
            await self.switch(machine)
        except (SandboxError, OSError):
            return  # the next request to this machine says what is wrong with it

    async def switch(self, machine: Machine) -> None:
        """Have the guest's side on, or off, as the policy in force says.

        Raises:
          NetworkUnavailableError: if the guest can't.
          SandboxError: all that `ask` raises.

        """
        async with self._switching:
            on = bool(self.policy)
            machine.guest_handler = self._gateway.handler
            certificates = self._gateway.certificates.encode()
            request = {"service": "network", "on": on, "certificates": bool(certificates)}
            answer = await ask(
                machine, request, "the network", most=_ANSWER_BYTES, patience=self._patience, data=certificates
            )
        if len(answer) != _ANSWER_BYTES:
            raise GuestProtocolError(f"the guest answered a switch of its network with {answer!r}")
        number = int.from_bytes(answer, "big")
        if number:
            why = os.strerror(number) if number in errno.errorcode else f"error {number}"
            raise NetworkUnavailableError(
                f"the guest could not switch its network {'on' if on else 'off'}: {why}. Nothing was opened; "
                "open the sandbox without a network, or report this"
            )
