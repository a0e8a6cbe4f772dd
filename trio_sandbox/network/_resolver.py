"""Names to addresses, by the host's own resolver and in threads of our own."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias, final

import trio

#: Threads that look names up for one sandbox. They are not shared, with other sandboxes or with the application, which Trio
#: lends its own: a guest with slow names would use them up, or find out by waiting what the others look up.
_THREADS = 4
#: Addresses of a name that are looked at.
_MOST_ADDRESSES = 64
#: Seconds that an answer counts, and names that are remembered.
_FRESH, _REMEMBERED = 30.0, 1024

Lookup: TypeAlias = Callable[[str], Iterable[str]]


def look_up(name: str) -> list[str]:
    """Return the addresses of *name*. Blocks.

    Raises:
      socket.gaierror: as `socket.getaddrinfo`.

    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(address[0]) for *_, address in found]


@final
class HostResolver:
    """What the sandboxes of one host share of resolving: the function, and nothing that tells one of another."""

    def __init__(self, lookup: Lookup = look_up) -> None:
        self.lookup: Lookup = lookup


@final
class Resolver:
    """Resolves the names of one sandbox."""

    def __init__(self, host: HostResolver) -> None:
        self._host = host
        self._threads = trio.CapacityLimiter(_THREADS)
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}

    async def resolve(self, name: str) -> tuple[str, ...]:
        """Return the addresses of *name*; each once. With a dot at the end, the host's search domains do not apply to it.

        Cancelled, it leaves a thread behind that ends by itself; it takes a share of the threads until then.

        Raises:
          socket.gaierror: if there are none.
          OSError: if this machine can't find out.

        """
        expires, addresses = self._known.get(name, (-math.inf, ()))
        if trio.current_time() < expires:
            await trio.lowlevel.checkpoint()
            return addresses
        found = await trio.to_thread.run_sync(
            partial(self._host.lookup, name), limiter=self._threads, abandon_on_cancel=True
        )
        addresses = tuple(dict.fromkeys(found))[:_MOST_ADDRESSES]
        if len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[name] = (trio.current_time() + _FRESH, addresses)
        return addresses
