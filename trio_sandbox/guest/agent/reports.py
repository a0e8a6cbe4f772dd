"""What an interpreter says to the agent over its control socket: its worker says it, or the porter that speaks for that."""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
import struct
from typing import NamedTuple, TypeAlias

from .displays import BadDisplayError, Display

#: Bytes of the text of a value. The worker cuts what is longer.
_VALUE_LIMIT = 1 << 16
#: For the descriptors that come with one; the kernel closes those that there is no room for.
_ANCILLARY_SPACE = socket.CMSG_SPACE(2 * array.array("i").itemsize)

# Each is a letter, and but for the first two the number of the run.
_READY = b"R"
_SYNCED = b"S"
_BEGUN = b"B"
"""Said of a run that takes input or may call functions: nothing is sent to those before."""
_NOT_BEGUN = b"N"
"""The interpreter ends, and nothing of the run has been done."""
_DONE = struct.Struct(">cIBIQ")
"""D, the exit status, and what its process had and wrote: see `Meter.used`. Or V: behind it is the text of the last value, in UTF-8."""
_FAILED = struct.Struct(">cI")
"""F. Behind it is the errno, in digits."""
_SHOWN = struct.Struct(">cII")
"""P, and the number of what is shown. Behind it is the MIME type, and with it the descriptors of a `Display`."""
_END = struct.Struct(">BIQ")
"""What those have behind the number."""
_END_SIZE = _END.size
#: Longer than any of these.
_MESSAGE_LIMIT = _DONE.size + _VALUE_LIMIT + 1


class End(NamedTuple):
    """How a run ended that left its interpreter as it should."""

    status: int
    value: str | None
    peak: int
    written: int


class Mark(enum.Enum):
    """What has no more to it."""

    NOTHING = enum.auto()
    """There is nothing to be read, or nothing that matters."""
    READY = enum.auto()
    """It takes runs."""
    SYNCED = enum.auto()
    """It has forgotten what SIGINT it got."""
    BEGUN = enum.auto()
    """The run has begun."""
    NOT_BEGUN = enum.auto()
    """It has ended without having begun the run: it said so, or never read of it."""
    CLOSED = enum.auto()
    """It says nothing more."""
    NONSENSE = enum.auto()
    """Our worker says no such thing."""


#: What there was to be read: the end of the run, something that it shows, why it was not begun, or a mark.
Report: TypeAlias = "End | Display | OSError | Mark"


def take_report(control: socket.socket, number: int) -> Report:
    """Take what an interpreter has said, which has run *number* or had it last."""
    try:
        message, ancillary, _, _ = control.recvmsg(_MESSAGE_LIMIT, _ANCILLARY_SPACE, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return Mark.NOTHING
    except ConnectionResetError:
        # It left unread what we sent last. What it said before that can be read after this.
        return Mark.NOT_BEGUN
    except OSError:
        return Mark.CLOSED
    descriptors = _descriptors(ancillary) if ancillary else []
    if message.startswith(b"P"):
        return _parse_display(message, descriptors, number)
    for descriptor in descriptors:
        os.close(descriptor)
    if message[1:5] == number.to_bytes(4, "big"):
        return _parse_report_of_run(message[:1], message[_FAILED.size :])
    return {b"": Mark.CLOSED, _READY: Mark.READY, _SYNCED: Mark.SYNCED}.get(message, Mark.NONSENSE)


def _parse_report_of_run(kind: bytes, rest: bytes) -> Report:
    if kind == b"D" and len(rest) == _END_SIZE:
        status, peak, written = _END.unpack(rest)
        return End(status, None, peak, written)
    if kind == b"V" and _END_SIZE <= len(rest) <= _END_SIZE + _VALUE_LIMIT:
        status, peak, written = _END.unpack_from(rest)
        with contextlib.suppress(UnicodeDecodeError):
            return End(status, rest[_END_SIZE:].decode(), peak, written)
    if kind == b"F" and rest.isdigit() and len(rest) <= 3:
        return OSError(int(rest), os.strerror(int(rest)))
    if rest == b"":
        return {_BEGUN: Mark.BEGUN, _NOT_BEGUN: Mark.NOT_BEGUN}.get(kind, Mark.NONSENSE)
    return Mark.NONSENSE


def _parse_display(message: bytes, descriptors: list[int], number: int) -> Display | Mark:
    try:
        display = Display(message[_SHOWN.size :], int.from_bytes(message[5 : _SHOWN.size], "big"), descriptors)
    except BadDisplayError:
        return Mark.NONSENSE
    if message[1:5] == number.to_bytes(4, "big"):
        return display
    display.close()  # a thread of a past run's
    return Mark.NOTHING


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload)
    return descriptors.tolist()
