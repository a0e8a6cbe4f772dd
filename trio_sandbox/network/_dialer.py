"""Where a gateway's connections are made from: this machine, or another one that is asked to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, final

import trio

from ._addresses import Private, may_connect
from ._connect import connect
from ._resolver import HostResolver, Resolver

#: Addresses of names that are tried beside others at a time, for one sandbox.
_SPARE_DIALS: Final = 32


class Dialer(Protocol):
    """Resolves names, and connects, for one sandbox. What to resolve and where to connect is decided by whoever asks."""

    async def resolve(self, name: str) -> tuple[str, ...]:
        """Do `Resolver.resolve`."""
        ...

    async def vet(self, addresses: Sequence[str], private: Private) -> list[str]:
        """Return those of *addresses* that a rule with *private* lets a guest connect to from there.

        Raises:
          OSError: if that can't be found out.

        """
        ...

    async def connect(self, addresses: Sequence[str], port: int) -> tuple[trio.abc.HalfCloseableStream, str]:
        """Connect to *port* of one of *addresses*; return the connection, and to which one it is. Cancelled, none is left.

        Raises:
          OSError: if none takes it.

        """
        ...


@final
class HostDialer:
    """Connects from this machine.

    Args:
      resolver: What resolves names for all sandboxes of the host.

    """

    def __init__(self, resolver: HostResolver) -> None:
        self._resolver = Resolver(resolver)
        self._spare = trio.Semaphore(_SPARE_DIALS)

    async def resolve(self, name: str) -> tuple[str, ...]:
        """Do `Resolver.resolve`."""
        return await self._resolver.resolve(name)

    async def vet(self, addresses: Sequence[str], private: Private) -> list[str]:
        """Return those of *addresses* that are allowed; see `may_connect`."""
        return [address for address in addresses if may_connect(address, private)]  # noqa: ASYNC910 - it waits for nothing

    async def connect(self, addresses: Sequence[str], port: int) -> tuple[trio.SocketStream, str]:
        """Do `connect`."""
        return await connect(addresses, port, self._spare)
