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
from functools import partial
from typing import Final, Protocol, final

import trio
from trio.socket import SocketType

from ....wire import Channel, ChannelStream, StreamLimitError
from ..carried import STREAM_GONE, Carried
from . import dns
from .lookups import Lookups
from .names import RESOLVER, Names
from .packets import Syn
from .questions import Question, Questions

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
#: Bytes of the host's answer: an errno.
_ANSWER_BYTES: Final = 2
_RESOLVER, _DNS_PORT = str(RESOLVER), 53
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
        self._names = names
        self._questions = Questions(channel)
        self._lookups = Lookups(self._questions, names)
        self._pending: dict[tuple[bytes, int, bytes, int], _Pending] = {}
        self._settled: dict[tuple[bytes, int, bytes, int], tuple[int, int]] = {}
        """The sequence numbers of SYNs that were answered, and by which errno they were refused, or 0."""
        self._connections = 0
        self._queries = 0

    async def run(self) -> None:
        """Serve the guest's programs until cancelled; then all connections are broken off."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_syns, nursery)
                nursery.start_soon(self._accept_all, nursery)
                nursery.start_soon(self._take_queries)
        finally:
            self._lookups.close()
            self._questions.close()

    def forget(self) -> None:
        """Ask the host anew for every name."""
        self._lookups.forget()

    # --- Connections ---

    async def _take_syns(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(self._kernel.syns)
                try:
                    for _ in range(_AT_ONCE):
                        syn = self._kernel.receive_syn()
                        if syn is not None and not self._has_seen(syn):
                            self._begin(syn, nursery)
                except _NOBODY_ASKS:
                    pass
                except OSError:  # root has taken the interface down
                    await trio.sleep(_PAUSE)
        finally:
            # Those that have a task end with it.
            for pending in [pending for pending in self._pending.values() if not pending.is_answered]:
                pending.question.close()
                self._end(pending)

    def _has_seen(self, syn: Syn) -> bool:
        """Whether it comes again, since no answer came for a second; a refusal is said again, as nobody is sure to have taken it."""
        number, refusal = self._settled.get(syn.key, (None, 0))
        if number != syn.number:
            return syn.key in self._pending
        if refusal:
            self._kernel.refuse(syn, refusal)
        return True

    def _settle(self, syn: Syn, refusal: int = 0) -> None:
        self._settled.pop(syn.key, None)
        self._settled[syn.key] = syn.number, refusal
        if len(self._settled) > _MOST_CONNECTIONS:
            del self._settled[next(iter(self._settled))]

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
            self._ask(syn, name, nursery)

    def _ask(self, syn: Syn, name: str, nursery: trio.Nursery) -> None:
        """Ask the host for a connection. There is no task for one that there is not yet."""
        header = {"service": "connect", "host": name, "port": syn.target_port}
        try:
            question = self._questions.ask(header, _ANSWER_BYTES, partial(self._hear, syn, nursery))
        except (*STREAM_GONE, StreamLimitError):
            return  # the program's kernel asks again
        self._pending[syn.key] = _Pending(syn, question)
        self._connections += 1

    def _hear(self, syn: Syn, nursery: trio.Nursery, question: Question) -> None:
        """Let a connection in, or refuse it, as the host has answered."""
        pending = self._pending[syn.key]
        number = int.from_bytes(question.answer, "big") if len(question.answer) == _ANSWER_BYTES else errno.ETIMEDOUT
        if number == 0:
            pending.is_answered = True
            self._kernel.let_in(syn)
            with contextlib.suppress(OSError):  # mostly it is there by now
                self._accept(nursery, pending)
            nursery.start_soon(self._carry, pending, question.take_stream())
            return
        # Of a timeout, or a conversation that is over, the program hears nothing: its own patience decides, and its kernel asks
        # again, maybe in another machine.
        if number != errno.ETIMEDOUT:
            self._kernel.refuse(syn, number)
            self._settle(syn, number)
        self._end(pending)

    def _end(self, pending: _Pending) -> None:
        self._forget(pending)
        if pending.sock is not None:
            break_off(pending.sock)
        self._connections -= 1

    def _forget(self, pending: _Pending) -> None:
        # A program may use its port again while its last connection is not over here: then the entry is the new one's.
        if self._pending.get(pending.syn.key) is pending:
            del self._pending[pending.syn.key]

    async def _carry(self, pending: _Pending, stream: ChannelStream) -> None:
        try:
            await Carried(stream).run(partial(self._wait_accepted, pending, stream))
        finally:
            stream.close()
            self._end(pending)

    async def _wait_accepted(self, pending: _Pending, stream: ChannelStream) -> SocketType | None:
        if pending.sock is None:
            with trio.move_on_after(_ACCEPT_PATIENCE):
                await pending.accepted.wait()
        self._forget(pending)
        sock, pending.sock = pending.sock, None
        if sock is None:
            stream.reset("the program gave up")
            return None
        self._settle(pending.syn)
        return trio.socket.from_stdlib_socket(sock)

    async def _accept_all(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._kernel.listener)
            try:
                self._accept(nursery)
            except _NOBODY_ASKS:
                pass
            except OSError:
                # The program went away meanwhile, or there are no descriptors: that takes a while, and must not spin.
                await trio.sleep(_PAUSE)

    def _accept(self, nursery: trio.Nursery, wanted: _Pending | None = None) -> None:
        """Take connections that were let in, up to that of *wanted*.

        Raises:
          OSError: if there are no more, or none can be taken now.

        """
        for _ in range(_AT_ONCE):
            sock, (address, port) = self._kernel.listener.accept()
            target, target_port = sock.getsockname()
            if target == _RESOLVER:
                self._begin_queries(sock, nursery)
                continue
            key = socket.inet_aton(address), port, socket.inet_aton(target), target_port
            pending = self._pending.get(key)
            if pending is None or not pending.is_answered or pending.sock is not None:
                break_off(sock)  # root has forged our mark, or it comes too late
                continue
            pending.sock = sock
            pending.accepted.set()
            if pending is wanted:
                return

    # --- Names ---

    async def _take_queries(self) -> None:
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
                    if answer is not None:
                        self._answer(client, answer)
                    elif self._queries < _MOST_LOOKUPS:
                        self._queries += 1
                        self._lookups.ask(query, partial(self._answer_late, client))
            except _NOBODY_ASKS:
                pass
            except OSError:
                await trio.sleep(_PAUSE)

    def _answer_late(self, client: tuple[str, int], answer: bytes | None) -> None:
        self._queries -= 1
        if answer is not None:
            self._answer(client, answer)

    def _answer(self, client: tuple[str, int], answer: bytes) -> None:
        # Where there is no room, or nobody any more, the program asks again.
        with contextlib.suppress(OSError):
            self._kernel.queries.sendto(answer, client)

    def _begin_queries(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        if self._queries >= _MOST_LOOKUPS:
            sock.close()
            return
        self._queries += 1
        nursery.start_soon(self._serve_queries, sock)

    async def _serve_queries(self, sock: socket.socket) -> None:
        try:
            await self._serve_query_stream(sock)
        finally:
            self._queries -= 1

    async def _serve_query_stream(self, sock: socket.socket) -> None:
        """Serve queries over TCP, each with its length in front (RFC 7766)."""
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            with trio.move_on_after(_QUERY_PATIENCE), contextlib.suppress(trio.BrokenResourceError):
                while True:
                    size = await _receive_exactly(stream, 2)
                    query = dns.parse(await _receive_exactly(stream, int.from_bytes(size, "big"))) if size else None
                    if query is None:
                        return
                    answer = self._lookups.answer_now(query) or await self._wait_answer(query)
                    if answer is None:
                        return
                    await stream.send_all(struct.pack(">H", len(answer)) + answer)

    async def _wait_answer(self, query: dns.Query) -> bytes | None:
        answers: list[bytes | None] = []
        over = trio.Event()

        def answered(answer: bytes | None) -> None:
            answers.append(answer)
            over.set()

        self._lookups.ask(query, answered)
        await over.wait()
        return answers[0]


@final
class _Pending:
    """A connection that is held."""

    def __init__(self, syn: Syn, question: Question) -> None:
        self.syn = syn
        self.question = question
        self.is_answered = False
        """The host has connected, and the program may."""
        self.accepted = trio.Event()
        self.sock: socket.socket | None = None
        """The program's connection, between its being accepted and its being carried."""


def break_off(sock: socket.socket) -> None:
    """Close *sock* so that its program sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Return *size* bytes; b"" if the client ended before."""
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            return b""
        data += piece
    return data
