"""Service "tcp": a stream of the channel is a connection to a server in the guest.

The header says what is wanted, and two bytes answer it, big endian: 0, or the errno of the failure and the end.

    {"service": "tcp", "port": n}                  connect; after the answer the stream carries what the connection carries
    {"service": "tcp", "port": n, "wait": true}    answer once somebody listens there, and the end

The guest has no network device: there is its loopback interface, and nothing that could be reached through it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import struct
from functools import partial
from typing import final

import trio
from trio.socket import SocketType

from ...wire import ChannelStream

#: Bytes that are taken at once.
_CHUNK = 1 << 17
#: Seconds that a server may take to read what was sent before the host closed the stream. TCP itself waits longer.
_LINGER = 30.0
#: Seconds between two looks for somebody who listens, the first and the longest: there is nothing that would tell us.
_LOOKS = 0.005, 0.05
_HIGHEST_PORT = 65535
#: Which of these a server that was told "localhost" listens at is its affair.
_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
#: Local addresses at which a connection to one of these arrives, as /proc/net/tcp and tcp6 have them: words of 32 bits
#: in the machine's order, which is little endian wherever we run.
_LOCAL_ADDRESSES = (
    "00000000",  # any
    "0100007F",
    "0" * 32,  # any
    "00000000000000000000000001000000",
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
)

#: Of a stream of the channel: the host reset it, the channel failed, or the other direction gave it up.
_STREAM_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


async def serve(stream: ChannelStream, header: dict[str, object]) -> None:
    """Serve one stream of the service."""
    port = header.get("port")
    if type(port) is not int or not 0 < port <= _HIGHEST_PORT:
        stream.reset(f"a port is a number from 1 to {_HIGHEST_PORT}, not {port!r:.80}")
    elif header.get("wait") is True:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_given_up, stream, nursery.cancel_scope)
            await _wait_listening(port)
            await stream.send_all(_answer(0), end=True)
            nursery.cancel_scope.cancel(reason="somebody listens")
    else:
        await _Tunnel(stream).run(port)


async def _cancel_when_given_up(stream: ChannelStream, scope: trio.CancelScope) -> None:
    await stream.wait_given_up()
    scope.cancel(reason="the host does not want it any more")


def _answer(error: int) -> bytes:
    return struct.pack(">H", error)


@final
class _Tunnel:
    """One connection. Whatever one side does to its end happens to the other side's."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self._scope = trio.CancelScope()
        self._delivered = False
        """The server has all that the host sent, and the end."""
        self._received = False
        """The host has all that the server sent, and the end, or wants no more."""
        self._unwanted = False
        """The host closed the stream."""
        self._broken: OSError | None = None
        """Why the server will not get the rest of what the host sends."""

    async def run(self, port: int) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                try:
                    sock = await _connect(port)
                except OSError as exc:
                    await self._stream.send_all(_answer(exc.errno or errno.EIO), end=True)
                else:
                    with sock:
                        await self._carry(sock)
                nursery.cancel_scope.cancel(reason="the connection is over")

    async def _watch(self) -> None:
        await self._stream.wait_given_up()
        self._unwanted = True
        # Closing does not take back what was sent; but a server that does not read must not keep us for ever.
        self._scope.deadline = -math.inf if self._delivered else trio.current_time() + _LINGER

    async def _carry(self, sock: SocketType) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver, sock)
                with contextlib.suppress(*_STREAM_GONE):  # a host that wants no more may still have sent something
                    await self._stream.send_all(_answer(0))
                    await self._receive(sock)
                self._received = True
                if self._broken is not None:
                    self._give_up(self._broken)
        finally:
            if not self._delivered:
                # The server must not take a part for the whole: let it see a reset, not an end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _deliver(self, sock: SocketType) -> None:
        """Pass on what the host sends."""
        try:
            while data := await self._stream.relay(partial(_send, sock.fileno())):
                await _send_all(sock, data)
            sock.shutdown(socket.SHUT_WR)
        except _STREAM_GONE:
            self._scope.cancel(reason="the host gave the stream up")
            return
        except OSError as exc:
            # The server is gone, but what it said before can still be read. Meanwhile the host must not hang on us.
            self._broken = exc
            if self._received:
                self._give_up(exc)
            else:
                await self._discard()
            return
        self._delivered = True
        if self._unwanted:
            self._scope.cancel(reason="the host closed the stream")

    async def _receive(self, sock: SocketType) -> None:
        """Pass on what the server sends."""
        try:
            while data := await sock.recv(_CHUNK):
                await self._stream.send_all(data)
        except OSError as exc:
            self._give_up(exc)
            return
        await self._stream.send_eof()

    async def _discard(self) -> None:
        with contextlib.suppress(*_STREAM_GONE):
            while await self._stream.receive_some(_CHUNK):
                pass

    def _give_up(self, error: OSError) -> None:
        # In this order: the other direction is not to find its stream closed under it.
        self._scope.cancel(reason="the connection broke")
        self._stream.reset(f"the connection broke: {error.strerror}")


async def _connect(port: int) -> SocketType:
    failures: list[OSError] = []
    for family, address in _ADDRESSES:
        try:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
            try:
                await sock.connect((address, port))
                # Where nobody listens, TCP can connect a socket to itself, by the chance of the port that it was given.
                if sock.getsockname() == sock.getpeername():
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody but ourselves")
                # Who writes to a stream wants it sent.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException:
                sock.close()
                raise
        except OSError as exc:
            failures.append(exc)
        else:
            return sock
    raise failures[0]


def _send(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0


async def _send_all(sock: SocketType, data: bytes) -> None:
    sent = await sock.send(data)
    while sent < len(data):
        sent += await sock.send(memoryview(data)[sent:])


async def _wait_listening(port: int) -> None:
    pause, longest = _LOOKS
    # By looking and not by connecting, which the server would see.
    while not _is_listening(port):
        await trio.sleep(pause)
        pause = min(2 * pause, longest)


def _is_listening(port: int) -> bool:
    wanted = {f"{address}:{port:04X}" for address in _LOCAL_ADDRESSES}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as table:
            next(table, None)
            for line in table:
                _, local, _, state, _ = line.split(maxsplit=4)
                if state != "0A":  # TCP_LISTEN, which come first, and there may be very many of the others
                    break
                if local in wanted:
                    return True
    return False
