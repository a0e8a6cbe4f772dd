"""Names to addresses, by the host's own resolver and in threads of our own."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias, final

import trio

#: Threads that look names up: for all sandboxes of a host, and for one of them. The application's own, which Trio lends, are
#: not taken: a guest with slow names would use them up.
_HOST_THREADS, _SANDBOX_THREADS = 8, 4
#: Seconds that an answer counts, and names that are remembered.
_FRESH, _REMEMBERED = 30.0, 1024

Lookup: TypeAlias = Callable[[str], Iterable[str]]


def look_up(name: str) -> list[str]:
    """Return the addresses of *name*, without the host's search domains. Blocks.

    Raises:
      socket.gaierror: as `socket.getaddrinfo`.

    """
    found = socket.getaddrinfo(f"{name}.", None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(address[0]) for *_, address in found]


@final
class HostResolver:
    """What the sandboxes of one host share of resolving: the threads, and nothing that tells one of another."""

    def __init__(self, lookup: Lookup = look_up) -> None:
        self.lookup: Lookup = lookup
        self.threads: trio.CapacityLimiter = trio.CapacityLimiter(_HOST_THREADS)


@final
class Resolver:
    """Resolves the names of one sandbox."""

    def __init__(self, host: HostResolver) -> None:
        self._host = host
        self._turns = trio.Semaphore(_SANDBOX_THREADS)
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}

    async def resolve(self, name: str) -> tuple[str, ...]:
        """Return the addresses of *name*, which was checked; each once.

        Cancelled, it leaves a thread behind that ends by itself; it takes a share of the threads until then.

        Raises:
          socket.gaierror: if there are none.

        """
        expires, addresses = self._known.get(name, (-math.inf, ()))
        if trio.current_time() < expires:
            await trio.lowlevel.checkpoint()
            return addresses
        async with self._turns:
            found = await trio.to_thread.run_sync(
                partial(self._host.lookup, name), limiter=self._host.threads, abandon_on_cancel=True
            )
        addresses = tuple(dict.fromkeys(found))
        if len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[name] = (trio.current_time() + _FRESH, addresses)
        return addresses

    def forget(self) -> None:
        """Ask anew for every name."""
        self._known.clear()
