"""A connection to one of several addresses: Happy Eyeballs (RFC 8305) over addresses that were vetted.

`trio.open_tcp_stream` resolves the name itself, and by then it may lead elsewhere.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from functools import partial

import trio

#: Seconds that an address has before the next one is tried as well (RFC 8305, section 5).
_HEAD_START = 0.25
#: Addresses of a name that are tried: whoever answers for the name must not have us open any number of connections.
_MOST_ADDRESSES = 8


def interleave(addresses: Sequence[str]) -> list[str]:
    """Return *addresses* with the two families taking turns, the first one's first (RFC 8305, section 4)."""
    first = [address for address in addresses if (":" in address) == (":" in addresses[0])]
    second = [address for address in addresses if (":" in address) != (":" in addresses[0])]
    shared = min(len(first), len(second))
    turns = [address for pair in zip(first, second, strict=False) for address in pair]
    return turns + first[shared:] + second[shared:]


async def connect(addresses: Sequence[str], port: int, spare: trio.Semaphore) -> tuple[trio.SocketStream, str]:
    """Connect to *port* of one of *addresses*; return the connection, and to which one it is.

    Each address that is tried while others still are takes a place of *spare*. Without one it waits until those have failed: what a
    sandbox connects to need not answer, and each attempt is a descriptor.

    Cancelled, no connection is left.

    Raises:
      OSError: if none takes it: the error of the first.

    """
    if len(addresses) == 1:  # nothing to choose, and no tasks to choose it by
        return _kept_alive(await _connect_one(addresses[0], port)), addresses[0]
    failures: dict[str, OSError] = {}
    winners: list[tuple[trio.SocketStream, str]] = []

    async def attempt(address: str, failed: trio.Event, *, is_spare: bool) -> None:
        try:
            stream = await _connect_one(address, port)
        except OSError as exc:
            failures[address] = exc
            failed.set()
        else:
            winners.append((stream, address))
            nursery.cancel_scope.cancel(reason="there is a connection")
        finally:
            if is_spare:
                spare.release()

    addresses = interleave(addresses)[:_MOST_ADDRESSES]

    try:
        async with trio.open_nursery() as nursery:
            others: list[trio.Event] = []
            for address in addresses:
                is_spare = not all(other.is_set() for other in others) and _take(spare)
                if not is_spare:
                    for other in others:
                        await other.wait()
                failed = trio.Event()
                others.append(failed)
                nursery.start_soon(partial(attempt, address, failed, is_spare=is_spare))
                with trio.move_on_after(_HEAD_START):
                    await failed.wait()
    except BaseException:
        for stream, _ in winners:
            stream.socket.close()
        raise
    for stream, _ in winners[1:]:
        stream.socket.close()
    if winners:
        stream, address = winners[0]
        return _kept_alive(stream), address
    if not failures:
        raise OSError(errno.EHOSTUNREACH, "there is no address to connect to")
    raise next(failures[address] for address in addresses if address in failures)


def _take(spare: trio.Semaphore) -> bool:
    try:
        spare.acquire_nowait()
    except trio.WouldBlock:
        return False
    return True


def _kept_alive(stream: trio.SocketStream) -> trio.SocketStream:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return stream


async def _connect_one(address: str, port: int) -> trio.SocketStream:
    # A machine may be without one of the families, or have no descriptors left: then this fails already.
    sock = trio.socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        await sock.connect((address, port))
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise
