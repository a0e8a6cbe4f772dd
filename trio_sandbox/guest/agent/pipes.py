"""Streams that carry what a process reads and prints, and the kernel pipes at their other ends."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import final

import trio

from ...wire import ChannelStream, StreamResetError
from ..spawner.terminals import resize_terminal

#: Bytes that are read of a pipe at once: what the kernel keeps in one unless told otherwise.
CHUNK = 65536
#: Streams that may wait for a process to name them.
_PARKED_LIMIT = 256
#: Seconds that a request waits for a stream that it names. The host opens them first, so that what
#: is missing now is only the turn of the task that parks it.
_PATIENCE = 5.0


#: Seconds from a process's end in which others that it started may still print, as the last in a pipeline of a shell does.
_STRAGGLERS_PATIENCE = 0.5
#: Bytes that a pipe of an ordinary user can hold.
_LARGEST_PIPE = 1 << 20


class NoSuchPipeError(Exception):
    """A request names a stream that the host did not open as a pipe, or named before."""


@final
class ParkedPipes:
    """Service "pipe": streams that the host opened for the input or output of a process to come.

        {"service": "pipe", "name": int}

    A request names a stream by its id, or by the name in its header, which a host gives that passes on the streams of another.
    """

    def __init__(self) -> None:
        self._parked: dict[int, tuple[ChannelStream, trio.Event]] = {}
        self._arrived = trio.Event()

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Keep *stream* until a request that took it is done with it."""
        if len(self._parked) >= _PARKED_LIMIT:
            stream.reset(f"more than {_PARKED_LIMIT} pipes wait for a process")
            return
        name = header.get("name")
        number = name if isinstance(name, int) else stream.id
        done = trio.Event()
        self._parked[number] = stream, done
        self._arrived.set()
        self._arrived = trio.Event()
        try:
            await stream.wait_given_up()
        finally:
            parked = self._parked.pop(number, None) is not None
        if not parked:
            await done.wait()

    @asynccontextmanager
    async def take(self, number: int) -> AsyncGenerator[ChannelStream]:
        """Yield the stream of that id for a block; leaving it closes the stream, or resets it if it is not finished.

        Raises:
          NoSuchPipeError: if there is none, or another request has it.

        """
        with trio.move_on_after(_PATIENCE):
            while number not in self._parked:
                await self._arrived.wait()
        if number not in self._parked:
            raise NoSuchPipeError(f"no pipe with the stream id {number}")
        stream, done = self._parked.pop(number)
        try:
            yield stream
        finally:
            stream.close()
            done.set()


async def feed(stream: ChannelStream, descriptor: int) -> None:
    """Write what the host sends to the pipe *descriptor*, which is closed when either end is."""
    async with trio.lowlevel.FdStream(descriptor) as pipe:
        try:
            while data := await stream.relay(partial(_write, descriptor)):
                await pipe.send_all(data)
        except StreamResetError:
            pass  # the host gave it up: end of file, there is nothing else to tell a process
        except (trio.BrokenResourceError, BrokenPipeError):
            stream.reset("nobody reads this any more")


def _write(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0


async def drain(descriptor: int, stream: ChannelStream) -> None:
    """Send the host what comes out of the pipe *descriptor*, which is closed when either end is."""
    async with trio.lowlevel.FdStream(descriptor) as pipe:
        # Where the host gave it up, closing the pipe is what tells the process.
        with contextlib.suppress(StreamResetError):
            while data := await pipe.receive_some(CHUNK):
                await stream.send_all(data)
            await stream.send_eof()


@final
class Stragglers:
    """How long output is read that others may hold open when their process is over: for a moment after its end."""

    def __init__(self) -> None:
        self._deadline = math.inf
        self._waiting: set[trio.CancelScope] = set()

    def begin(self) -> None:
        """Begin the moment: the process is over."""
        self._deadline = trio.current_time() + _STRAGGLERS_PATIENCE
        for scope in self._waiting:
            scope.deadline = self._deadline

    async def receive(self, pipe: trio.lowlevel.FdStream) -> bytes | bytearray | None:
        """Return what comes, ``b""`` at the end; None after the moment."""
        with trio.CancelScope(deadline=self._deadline) as scope:
            self._waiting.add(scope)
            try:
                return await pipe.receive_some(CHUNK)
            finally:
                self._waiting.discard(scope)
        return None

    async def send_rest(self, descriptor: int, stream: ChannelStream) -> None:
        """Send the host what had been printed when the moment was over, and nothing later than needs be."""
        for _ in range(_LARGEST_PIPE // CHUNK):
            try:
                data = os.read(descriptor, CHUNK)
            except OSError:  # there is nothing; or of a terminal, nobody
                return
            if not data:
                return
            await stream.send_all(data)


async def drain_and_discard(descriptor: int, stream: ChannelStream, stragglers: Stragglers) -> None:
    """Do as `drain` until the process is over, and take what others write to the pipe then, for them not to be hurt."""
    async with trio.lowlevel.FdStream(descriptor) as pipe:
        with contextlib.suppress(StreamResetError):
            while data := await stragglers.receive(pipe):
                await stream.send_all(data)
            if data is None:
                await stragglers.send_rest(descriptor, stream)
            await stream.send_eof()
        while await pipe.receive_some(CHUNK):
            pass


@final
class Terminal:
    """The terminal of a process, and the stream at whose other end somebody sits.

    Args:
      descriptor: Our end of the terminal, owned from now on.
      stream: What is typed comes from it, and what is shown goes to it. It is closed with the terminal.
      wait_exit: Waits for the process to be over.
      stragglers: For how long others may have it open after that.

    """

    def __init__(
        self,
        descriptor: int,
        stream: ChannelStream,
        wait_exit: Callable[[], Awaitable[object]],
        stragglers: Stragglers,
    ) -> None:
        self._stragglers = stragglers
        self._pty = trio.lowlevel.FdStream(descriptor)
        self._stream = stream
        self._wait_exit = wait_exit

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; nothing happens once it is closed."""
        if self._pty.fileno() >= 0:
            resize_terminal(self._pty.fileno(), rows, columns)

    async def carry(self) -> None:
        """Carry bytes both ways until no process has the terminal open, or the host ends the stream: then hang up."""
        try:
            async with self._pty, trio.open_nursery() as nursery:
                nursery.start_soon(self._type, nursery.cancel_scope)
                with contextlib.suppress(trio.BrokenResourceError):  # EIO of the terminal, or the stream is gone
                    while data := await self._stragglers.receive(self._pty):
                        await self._stream.send_all(data)
                    if data is None:
                        await self._stragglers.send_rest(self._pty.fileno(), self._stream)
                with contextlib.suppress(trio.BrokenResourceError):
                    await self._stream.send_eof()
                # Programs close what they have before they exit: hung up now, they would die of that.
                await self._wait_exit()
                nursery.cancel_scope.cancel(reason="nobody has the terminal open any more")
        finally:
            self._stream.close()

    async def _type(self, scope: trio.CancelScope) -> None:
        try:
            while data := await self._stream.receive_some(CHUNK):
                try:
                    await self._pty.send_all(data)
                except trio.BrokenResourceError:
                    return  # there is still to be shown what was printed before that
        except trio.BrokenResourceError:
            pass  # the host gave the stream up, which comes to the same
        scope.cancel(reason="the host hung up")


async def discard(descriptor: int) -> None:
    """Read the pipe *descriptor* to its end, for whoever still writes to it not to be hurt by our not listening."""
    async with trio.lowlevel.FdStream(descriptor) as pipe:
        while await pipe.receive_some(CHUNK):
            pass


def open_pipe(for_writing: bool, user: int | None = None) -> tuple[int, int]:
    """Return our end of a new pipe, which does not block, and the end for a process.

    The process may open it by name (/dev/stdout) if it is *user*'s; None: leave it ours.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if user is not None:
        os.fchown(writer, user, -1)
    ours, theirs = (writer, reader) if for_writing else (reader, writer)
    os.set_blocking(ours, False)
    return ours, theirs
