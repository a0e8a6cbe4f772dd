"""The guest's connections to the outside: each becomes a stream of the channel, which the agent opens.

    {"service": "connect", "host": name, "port": n}    answered by an errno in two bytes, big-endian; after 0 as in `tunnels`

A program's first packet is held until the host has answered. So `connect` succeeds when there is a connection, takes as long as it
takes, and fails as it failed.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol, final

import trio
from trio.socket import SocketType

from ....wire import Channel, ChannelStream, StreamLimitError, receive_up_to
from ..carried import STREAM_GONE, Carried
from . import dns
from .lookups import Lookups
from .names import RESOLVER, Names
from .packets import Syn

#: Connections at a time, those included that wait for the host. Further ones come again in a second: programs' kernels see to it.
_MOST_CONNECTIONS: Final = 256
#: Queries at a time that the host has to answer. Programs ask again.
_MOST_LOOKUPS: Final = 64
#: Of a socket, so many at once before others have their turn.
_AT_ONCE: Final = 64
#: Seconds for a program's kernel to complete a connection that was let in. A program that gave up does not.
_ACCEPT_PATIENCE: Final = 5.0
#: Seconds between two tries where there are no descriptors left, or the interface is down: it would fail again at once.
_PAUSE: Final = 0.1
#: Seconds that a client may take for a query over TCP.
_QUERY_PATIENCE: Final = 10.0
_DNS_PORT: Final = 53
#: A longer query is cut, and then it is none.
_LONGEST_QUERY: Final = 4096
_NOBODY_ASKS = (BlockingIOError, InterruptedError)


class Kernel(Protocol):
    """What there is of `steering.Steering`."""

    listener: socket.socket
    queries: socket.socket
    syns: socket.socket

    def receive_syn(self) -> Syn | None:
        """See `steering.Steering`."""
        ...

    def let_in(self, syn: Syn, /) -> None:
        """See `steering.Steering`."""
        ...

    def refuse(self, syn: Syn, number: int, /) -> None:
        """See `steering.Steering`."""
        ...


@final
class Egress:
    """The connections during one conversation with a host.

    Args:
      kernel: Where they come from.
      channel: Where they go.
      names: What their addresses stand for.

    """

    def __init__(self, kernel: Kernel, channel: Channel, names: Names) -> None:
        self._kernel = kernel
        self._channel = channel
        self._names = names
        self._lookups = Lookups(channel, names)
        self._pending: dict[tuple[bytes, int, bytes, int], _Pending] = {}
        self._connections = 0
        self._queries = 0

    async def run(self) -> None:
        """Serve the guest's programs until cancelled; then all connections are broken off."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_syns, nursery)
            nursery.start_soon(self._accept, nursery)
            nursery.start_soon(self._take_queries, nursery)

    def forget(self) -> None:
        """Ask the host anew for every name."""
        self._lookups.forget()

    # --- Connections ---

    async def _take_syns(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._kernel.syns)
            try:
                for _ in range(_AT_ONCE):
                    syn = self._kernel.receive_syn()
                    if syn is not None and syn.key not in self._pending:  # else it is sent again, and under way
                        self._begin(syn, nursery)
            except _NOBODY_ASKS:
                pass
            except OSError:  # root has taken the interface down
                await trio.sleep(_PAUSE)

    def _begin(self, syn: Syn, nursery: trio.Nursery) -> None:
        if syn.target == RESOLVER.packed:
            if syn.target_port == _DNS_PORT:
                self._kernel.let_in(syn)
            else:
                self._kernel.refuse(syn, errno.ECONNREFUSED)
            return
        name = self._names.name(syn.target)
        if name is None:
            self._kernel.refuse(syn, errno.EHOSTUNREACH)
        elif syn.target_port == 0:  # programs can ask for it, and the host takes it for a broken protocol
            self._kernel.refuse(syn, errno.ECONNREFUSED)
        elif self._connections < _MOST_CONNECTIONS:
            self._connections += 1
            pending = self._pending[syn.key] = _Pending(syn)
            nursery.start_soon(self._connect, pending, name)

    async def _connect(self, pending: _Pending, name: str) -> None:
        syn = pending.syn
        try:
            header = {"service": "connect", "host": name, "port": syn.target_port}
            try:
                stream = self._channel.open_stream(header, flush=True)
            except (*STREAM_GONE, StreamLimitError):
                return  # the program's kernel asks again
            try:
                await Carried(stream).run(partial(self._open_socket, pending, stream))
            finally:
                stream.close()
        finally:
            self._forget(pending)
            if pending.sock is not None:
                break_off(pending.sock)
            self._connections -= 1

    def _forget(self, pending: _Pending) -> None:
        # A program may use its port again while its last connection is not over here: then the entry is the new one's.
        if self._pending.get(pending.syn.key) is pending:
            del self._pending[pending.syn.key]

    async def _open_socket(self, pending: _Pending, stream: ChannelStream) -> SocketType | None:
        """Wait for the host's connection, then for the program's."""
        try:
            number = await _receive_errno(stream)
        except STREAM_GONE:
            # This conversation is over. The program's kernel asks again, maybe in another machine.
            return None
        if number == errno.ETIMEDOUT:
            return None  # the program's own patience decides
        if number:
            self._kernel.refuse(pending.syn, number)
            return None
        self._kernel.let_in(pending.syn)
        with trio.move_on_after(_ACCEPT_PATIENCE):
            await pending.accepted.wait()
        self._forget(pending)
        sock, pending.sock = pending.sock, None
        if sock is None:
            stream.reset("the program gave up")
            return None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return trio.socket.from_stdlib_socket(sock)

    async def _accept(self, nursery: trio.Nursery) -> None:
        listener = self._kernel.listener
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(_AT_ONCE):
                try:
                    sock, (address, port) = listener.accept()
                except _NOBODY_ASKS:
                    break
                except OSError:
                    # The program went away meanwhile, or there are no descriptors: that takes a while, and must not spin.
                    await trio.sleep(_PAUSE)
                    break
                target, target_port = sock.getsockname()
                if target == str(RESOLVER):
                    self._begin_query(partial(self._serve_query_stream, sock), sock.close, nursery)
                    continue
                key = socket.inet_aton(address), port, socket.inet_aton(target), target_port
                pending = self._pending.get(key)
                if pending is None or pending.sock is not None:
                    break_off(sock)  # root has forged our mark, or it comes too late
                else:
                    pending.sock = sock
                    pending.accepted.set()

    # --- Names ---

    async def _take_queries(self, nursery: trio.Nursery) -> None:
        sock = self._kernel.queries
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                for _ in range(_AT_ONCE):
                    data, client = sock.recvfrom(_LONGEST_QUERY)
                    query = dns.parse(data)
                    if query is None:
                        continue
                    answer = self._lookups.answer_now(query)
                    if answer is None:
                        self._begin_query(partial(self._serve_query, query, client), _nothing, nursery)
                    else:
                        self._answer(answer, client)
            except _NOBODY_ASKS:
                pass
            except OSError:
                await trio.sleep(_PAUSE)

    def _begin_query(
        self, serve: Callable[[], Awaitable[None]], refuse: Callable[[], object], nursery: trio.Nursery
    ) -> None:
        if self._queries >= _MOST_LOOKUPS:
            refuse()
            return
        self._queries += 1
        nursery.start_soon(self._counted, serve)

    async def _counted(self, serve: Callable[[], Awaitable[None]]) -> None:
        try:
            await serve()
        finally:
            self._queries -= 1

    async def _serve_query(self, query: dns.Query, client: tuple[str, int]) -> None:
        self._answer(await self._lookups.answer(query), client)

    def _answer(self, answer: bytes, client: tuple[str, int]) -> None:
        # Where there is no room, or nobody any more, the program asks again.
        with contextlib.suppress(OSError):
            self._kernel.queries.sendto(answer, client)

    async def _serve_query_stream(self, sock: socket.socket) -> None:
        """Serve queries over TCP, each with its length in front (RFC 7766)."""
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            with trio.move_on_after(_QUERY_PATIENCE), contextlib.suppress(trio.BrokenResourceError):
                while True:
                    size = await _receive_exactly(stream, 2)
                    query = dns.parse(await _receive_exactly(stream, int.from_bytes(size, "big"))) if size else None
                    if query is None:
                        return
                    answer = self._lookups.answer_now(query) or await self._lookups.answer(query)
                    await stream.send_all(struct.pack(">H", len(answer)) + answer)


@final
class _Pending:
    """A connection that is held."""

    def __init__(self, syn: Syn) -> None:
        self.syn = syn
        self.accepted = trio.Event()
        self.sock: socket.socket | None = None
        """The program's connection, between its being accepted and its being carried."""


def _nothing() -> None:
    pass


def break_off(sock: socket.socket) -> None:
    """Close *sock* so that its program sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def _receive_errno(stream: ChannelStream) -> int:
    answer = await receive_up_to(stream, 2)
    return int.from_bytes(answer, "big") if len(answer) == 2 else errno.ECONNRESET


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Return *size* bytes; b"" if the client ended before."""
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            return b""
        data += piece
    return data
