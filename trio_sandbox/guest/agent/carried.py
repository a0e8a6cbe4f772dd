"""A connection that a stream of the channel carries on: whatever one side does to its end happens to the other side's."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import final

import trio
from trio.socket import SocketType

from ...wire import PIECE_SIZE, ChannelStream

#: Seconds that a program may take to read what was sent before the host closed the stream. TCP itself waits longer.
_LINGER = 30.0

#: Of a stream of the channel: the host reset it, the channel failed, or the other direction gave it up.
STREAM_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


@final
class Carried:
    """One connection of this machine's, and the stream of the channel that it goes on by."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self._scope = trio.CancelScope()
        self._delivered = False
        """The program has all that the host sent, and the end."""
        self._received = False
        """The host has all that the program sent, and the end, or wants no more."""
        self._unwanted = False
        """The host closed the stream."""
        self._broken: OSError | None = None
        """Why the program will not get the rest of what the host sends."""

    async def run(self, open_socket: Callable[[], Awaitable[SocketType | None]], greeting: bytes = b"") -> None:
        """Carry the connection until both ends are over.

        Args:
          open_socket: Returns this machine's end, or None if there will be none.
          greeting: What to tell the host once there is one.

        """
        self._stream.call_on_news(self._notice)
        try:
            with self._scope:
                sock = await open_socket()
                if sock is not None:
                    with sock:
                        await self._carry(sock, greeting)
        finally:
            self._stream.call_on_news(None)

    def _notice(self) -> None:
        if self._stream.is_given_up and not self._unwanted:
            self._unwanted = True
            # Closing does not take back what was sent; but a program that does not read must not keep us for ever.
            self._scope.deadline = -math.inf if self._delivered else trio.current_time() + _LINGER

    async def _carry(self, sock: SocketType, greeting: bytes) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver, sock)
                with contextlib.suppress(*STREAM_GONE):  # a host that wants no more may still have sent something
                    if greeting:
                        await self._stream.send_all(greeting)
                    await self._receive(sock)
                self._received = True
                if self._broken is not None:
                    self._give_up(self._broken)
        finally:
            if not self._delivered:
                # The program must not take a part for the whole: let it see a reset, not an end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _deliver(self, sock: SocketType) -> None:
        """Pass on what the host sends."""
        try:
            while data := await self._stream.relay(partial(_send, sock.fileno())):
                await _send_all(sock, data)
            sock.shutdown(socket.SHUT_WR)
        except STREAM_GONE:
            self._scope.cancel(reason="the host gave the stream up")
            return
        except OSError as exc:
            # The program is gone, but what it said before can still be read. Meanwhile the host must not hang on us.
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
        """Pass on what the program sends."""
        try:
            while data := await _receive_some(sock):
                await self._stream.send_all(data)
        except OSError as exc:
            self._give_up(exc)
            return
        await self._stream.send_eof()

    async def _discard(self) -> None:
        with contextlib.suppress(*STREAM_GONE):
            while await self._stream.receive_some(PIECE_SIZE):
                pass

    def _give_up(self, error: OSError) -> None:
        # In this order: the other direction is not to find its stream closed under it.
        self._scope.cancel(reason="the connection broke")
        self._stream.reset(f"the connection broke: {error.strerror}")


def _send(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0


async def _receive_some(sock: SocketType) -> bytes:
    # Trio's own looks before it waits. Hardly ever is there something by then.
    while True:
        await trio.lowlevel.wait_readable(sock)
        with contextlib.suppress(BlockingIOError):
            return os.read(sock.fileno(), PIECE_SIZE)


async def _send_all(sock: SocketType, data: bytes) -> None:
    sent = await sock.send(data)
    while sent < len(data):
        sent += await sock.send(memoryview(data)[sent:])
