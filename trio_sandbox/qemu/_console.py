"""What a machine's kernel and agent print, and what it tells about the machine's end."""

from __future__ import annotations

import signal
import socket
from typing import Final

import trio

from .._quote import quote_guest, quote_tail
from ._process import BoundedTail, describe_exit

_CONSOLE_BYTES: Final = 64 * 2**10
#: How much of the console goes into an error's message.
_EXCERPT_LINES: Final = 40
_PANIC: Final = "Kernel panic"
_READ_BYTES: Final = 64 * 2**10
#: More than a socket holds, and an end even if QEMU should live on.
_LAST_READS: Final = 64


class Console:
    """The end of what the guest's kernel and agent print, kept in bounded memory."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._tail = BoundedTail(_CONSOLE_BYTES)

    def __str__(self) -> str:
        # Carriage returns and escape sequences of a hostile guest would act on our user's terminal.
        return "".join(char for char in str(self._tail) if char.isprintable() or char in "\n\t")

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Read until QEMU is gone, so that a guest that prints never waits for us."""
        task_status.started()
        await trio.lowlevel.checkpoint()
        while self._read():
            await trio.lowlevel.wait_readable(self._socket)

    def drain(self) -> None:
        """Take what is there already: the last words of a QEMU that has ended."""
        for _ in range(_LAST_READS):
            if not self._read(until_empty=True):
                break

    def _read(self, *, until_empty: bool = False) -> bool:
        """Read once. False: there will be no more, or, if so asked, there is no more now."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return not until_empty
        except OSError:
            return False  # The connection broke with QEMU's end.
        self._tail.append(data)
        return data != b""

    def excerpt(self) -> str:
        """Return what goes into an error's message."""
        return excerpt(str(self))


def excerpt(console: str) -> str:
    """Return the lines that tell most about an end: those around a panic, else the last."""
    lines = console.strip().splitlines()
    start = len(lines) - _EXCERPT_LINES
    for number, line in enumerate(lines):
        if _PANIC in line:
            # What led to it, and where; the rest of the trace can be long.
            start = min(start, number - _EXCERPT_LINES // 4)
            break
    start = max(start, 0)
    return "\n".join(lines[start : start + _EXCERPT_LINES])


def describe_end(returncode: int, output: str, console: str) -> str:
    """Say in words why a QEMU is gone that nobody ended."""
    for line in console.splitlines():
        if _PANIC in line:
            return f"the guest's kernel panicked: {quote_guest(line[line.index(_PANIC) :].strip())}"
    if returncode == 0:
        return "the guest shut down or rebooted"
    if returncode == -signal.SIGBUS:
        return "QEMU was ended by SIGBUS: the disk that its RAM's file is on is full, or that file was cut off"
    said = f": {quote_tail(output.strip())}" if output.strip() else ""
    return f"QEMU {describe_exit(returncode)}{said}"
