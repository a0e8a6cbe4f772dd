"""Our own standard input, output and error: read and written as bytes, whatever they are."""

from __future__ import annotations

import os
import select
from collections.abc import Awaitable, Callable
from typing import Literal

import trio

Stream = Literal["stdout", "stderr"]
Write = Callable[[Stream, bytes], Awaitable[object]]
Read = Callable[[], Awaitable[bytes]]

_CHUNK = 65536


class OutputClosedError(Exception):
    """Nobody reads our standard output or error any more."""


async def write_output(stream: Stream, data: bytes) -> None:
    """Write to our own standard output or error, past Python's buffers.

    In a thread, since a terminal or pipe may block for ever; and cancellable, so that a reader who
    does not read can't keep us from ending. Cancelled, some of *data* may be written, even later.

    Raises:
      OutputClosedError: if nobody reads it.
      OSError: if it can't be written for another reason.
    """
    descriptor = {"stdout": 1, "stderr": 2}[stream]
    try:
        await trio.to_thread.run_sync(_write_all, descriptor, data, abandon_on_cancel=True)
    except BrokenPipeError as exc:
        raise OutputClosedError from exc
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, stream) from exc


async def read_input() -> bytes:
    """Wait for some of our standard input; ``b""`` at its end. Cancelled: what is read later is lost."""
    # In a thread, for a file can't be waited for.
    return await trio.to_thread.run_sync(_read_some, abandon_on_cancel=True)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # others may have made it so, and it is theirs as well
            select.select([], [descriptor], [])


def _read_some() -> bytes:
    while True:
        try:
            return os.read(0, _CHUNK)
        except BlockingIOError:
            select.select([0], [], [])
