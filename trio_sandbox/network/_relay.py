"""One connection carried both ways between a guest's stream and its upstream, and counted."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import final

import trio
from trio.socket import SocketType

from ..wire import PIECE_SIZE, ChannelStream
from ._client_hello import ClientHello, NotNamedError

#: Bytes that are taken at once: nearly as many as a stream has credit for. With a quarter of it a download takes a fourth longer.
_CHUNK = 2 * PIECE_SIZE
#: Seconds for a client to send its TLS hello.
_HELLO_PATIENCE = 10.0
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class WrongServerNameError(Exception):
    """The guest's TLS handshake is for another host than it asked for; the text says what it is."""


@final
class Relay:
    """Carries one connection.

    Args:
      stream: The guest's end.
      upstream: The other end, closed when it is over.
      count: Told how many bytes the guest sent, and how many it gets, before they go on. Returns whether they may; else it has
        cancelled who runs this. What did not go on after all is told as less than nothing.

    """

    def __init__(
        self,
        stream: ChannelStream,
        upstream: trio.abc.HalfCloseableStream,
        count: Callable[[int, int], bool],
    ) -> None:
        self._stream = stream
        self._upstream = upstream
        self._count = count
        self.complete: bool = False
        """Whether both sides have ended it in good order."""

    async def run(self, expected_name: str | None) -> None:
        """Carry it until both sides have ended it, or one breaks it off; then the other end is broken off, too.

        Args:
          expected_name: What the guest's TLS hello must name, before any of it goes on; None: whatever it sends goes on.

        Raises:
          WrongServerNameError: if the guest names another, or none. Nothing of it was sent.

        """
        wrong_name: WrongServerNameError | None = None
        self._set_linger(on=True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._receive, nursery.cancel_scope)
                try:
                    await self._send(expected_name)
                except WrongServerNameError as exc:
                    wrong_name = exc  # raised outside, where it is in no group
                    nursery.cancel_scope.cancel(reason="the guest named another server")
                except _BROKEN:
                    nursery.cancel_scope.cancel(reason="one side broke the connection off")
            if wrong_name is not None:
                raise wrong_name
            self.complete = not nursery.cancel_scope.cancel_called
            if self.complete:
                self._set_linger(on=False)
        finally:
            await trio.aclose_forcefully(self._upstream)

    async def _send(self, expected_name: str | None) -> None:
        if expected_name is not None:
            data = await receive_hello(self._stream, expected_name)
            self._count(len(data), 0)
            await self._upstream.send_all(data)
        while data := await self._receive_more():
            self._count(len(data), 0)
            await self._upstream.send_all(data)
        await self._upstream.send_eof()

    async def _receive_more(self) -> bytes:
        """Return what the guest sent and the upstream does not take at once."""
        if not isinstance(self._upstream, trio.SocketStream):
            return await self._stream.receive_some(_CHUNK)
        try:
            return await self._stream.relay(partial(self._pass_on, self._upstream.socket))
        except OSError as exc:
            raise trio.BrokenResourceError(f"the other side broke the connection off: {exc}") from exc

    def _pass_on(self, upstream: SocketType, data: memoryview) -> int:
        if not self._count(len(data), 0):
            return len(data)  # it goes nowhere, and neither does what comes after it
        try:
            done = os.write(upstream.fileno(), data)
        except BlockingIOError:
            done = 0
        if done < len(data):
            self._count(done - len(data), 0)
        return done

    async def _receive(self, scope: trio.CancelScope) -> None:
        try:
            while data := await self._upstream.receive_some(_CHUNK):
                self._count(0, len(data))
                await self._stream.send_all(data)
            await self._stream.send_eof()
        except _BROKEN:
            scope.cancel(reason="one side broke the connection off")

    def _set_linger(self, *, on: bool) -> None:
        """Let the upstream see a reset when it is closed, and not the end of all that there was to say."""
        if isinstance(self._upstream, trio.SocketStream):
            with contextlib.suppress(OSError):
                self._upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))


async def receive_hello(stream: ChannelStream, expected: str) -> bytes:
    """Return what the guest sent until its TLS hello was complete.

    Raises:
      WrongServerNameError: if that names another server than *expected*, or none.

    """
    hello = ClientHello()
    name = None
    try:
        with trio.fail_after(_HELLO_PATIENCE):
            while name is None:
                data = await stream.receive_some(_CHUNK)
                if not data:
                    raise NotNamedError("it ended before a TLS hello")
                name = hello.feed(bytes(data))
    except trio.TooSlowError:
        raise WrongServerNameError(f"it sent no TLS hello within {_HELLO_PATIENCE:g} s") from None
    except NotNamedError as exc:
        raise WrongServerNameError(str(exc)) from None
    if name != expected:
        raise WrongServerNameError(f"its TLS hello names {name[:253]!r} as the server")
    return bytes(hello.data)
