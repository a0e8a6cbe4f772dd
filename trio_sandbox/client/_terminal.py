"""Terminals of processes in the guest."""

from __future__ import annotations

from typing import final

import attrs
import trio

from ..wire import ChannelStream

#: Rows or columns: what the guest's kernel keeps of them.
_LARGEST_SIZE = 65535


def check_size(value: object, name: str) -> None:
    """Refuse what can't be a terminal's height or width."""
    if type(value) is not int:
        raise TypeError(f"`{name}` must be int, not {type(value).__name__}")
    if not 0 < value <= _LARGEST_SIZE:
        raise ValueError(f"`{name}` must be from 1 to {_LARGEST_SIZE}, not {value}")


def _size(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    check_size(value, attribute.name)


def _term(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    if type(value) is not str:
        raise TypeError(f"`{attribute.name}` must be str, not {type(value).__name__}")
    if not value or "\0" in value:
        raise ValueError(f"`{attribute.name}` must name a kind of terminal, not {value!r}")


@final
@attrs.frozen(kw_only=True)
class Terminal:
    """What kind of terminal a process in the guest gets."""

    rows: int = attrs.field(default=24, validator=_size)
    """Its height in characters, 1 to 65535; `GuestProcess.resize` changes it."""
    columns: int = attrs.field(default=80, validator=_size)
    """Its width in characters, likewise."""
    term: str = attrs.field(default="xterm-256color", validator=_term)
    """Its kind, for the process's variable TERM; one that `env` sets comes first."""


@final
class GuestTerminal(trio.abc.Stream):
    r"""The user's side of the terminal that controls a process in the guest.

    Sending is typing, control characters included: ``b"\x03"`` is Ctrl-C, ``b"\x04"`` Ctrl-D. Receiving is reading the
    screen; it ends when no process has the terminal open any more. Closing hangs up, like closing a terminal's window: the
    foreground processes get SIGHUP.
    """

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Type *data*; a process that does not read makes this wait. Cancelled: some of it may have been typed.

        Raises:
          trio.BrokenResourceError: if no process has the terminal open any more, or the virtual machine ended.
          trio.ClosedResourceError: if this end was closed.

        """
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` might not block."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for what is shown next; ``b""`` at the end. Cancelled: nothing is lost.

        Raises:
          trio.BrokenResourceError: if the virtual machine ended.
          trio.ClosedResourceError: if this end was closed.

        """
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Hang up."""
        await self._stream.aclose()
