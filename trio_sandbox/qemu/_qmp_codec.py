"""QMP without I/O: values in, bytes out; bytes in, values out.

The protocol, as far as a client sees it (QEMU: docs/interop/qmp-spec.rst):

1. Both sides send JSON objects; QEMU ends each of its own with CR LF.
2. QEMU speaks first: the greeting. It may come twice before the first reply: a client that
   connects at the very moment at which QEMU sets up its monitor is noticed by both of QEMU's
   threads that are at it (seen with 7.2).
3. Every command gets exactly one reply, a ``return`` or an ``error``, which repeats the
   command's ``id``. An error without ``id`` means that QEMU couldn't parse what it got.
4. Events come at any time after the greeting.

Anything else is a violation. After one the connection is `broken` for good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NoReturn, cast

import attrs
import outcome

from .._errors import QMPCommandError, QMPProtocolError
from ..constants import QMP_LINE_LIMIT

# QEMU 7.2 reads a monitor's socket one byte at a time, some 4.5 us each: every byte saved in a
# command is time saved. So no blanks, no escapes, and short ids. Hence also `QMPConnection._free_ids`.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


@attrs.frozen
class QMPGreeting:
    """What QEMU says first."""

    version: tuple[int, int, int]
    """QEMU's version: major, minor, micro."""
    package: str
    """The distributor's addition to the version; may be empty."""
    capabilities: tuple[str, ...]
    """What could be negotiated, for instance ``"oob"``."""


@attrs.frozen
class QMPEvent:
    """Something that happened in QEMU."""

    name: str
    """For instance ``"JOB_STATUS_CHANGE"``; QEMU's QMP reference lists them."""
    data: Mapping[str, Any]
    """The event's own fields; empty where it has none."""
    timestamp: float
    """When it happened, in seconds since the epoch by QEMU's clock; -1 where QEMU couldn't tell."""


@attrs.frozen
class QMPReply:
    """The end of a command: its ``return`` value, or a `QMPCommandError`."""

    id: int
    result: outcome.Outcome[Any]


QMPMessage = QMPGreeting | QMPEvent | QMPReply


class QMPState(Enum):
    """Where a connection is; it only moves downwards."""

    GREETING = auto()
    """Nothing came yet."""
    RUNNING = auto()
    """The greeting came; commands may be sent."""
    BROKEN = auto()
    """The peer broke the protocol."""


def encode_command(command: str, arguments: Mapping[str, object] | None = None) -> str:
    """Turn a command into JSON that lacks only its id and the closing brace.

    Raises:
      TypeError: if *command* is not a string, or *arguments* not a mapping of what JSON has.
      ValueError: if *command* is empty, or *arguments* hold what UTF-8 or JSON can't
        express: a lone surrogate (as from a path that is not UTF-8), NaN, a cycle.

    """
    if not isinstance(command, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may be untyped
        raise TypeError(f"`command` must be a string, not {command!r}")
    if not command:
        raise ValueError("`command` must not be empty")
    text = f'{{"execute":{_encode(command)}'
    if arguments is not None:
        if not isinstance(arguments, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] # as above
            raise TypeError(f"`arguments` must be a mapping or None, not {arguments!r}")
        text += f',"arguments":{_encode(dict(arguments))}'
    text.encode()  # for its UnicodeEncodeError, which is a ValueError
    return text


class QMPConnection:
    """The client's side of one QMP connection, as a state machine.

    Args:
      line_limit: The most bytes that one message of the peer's may have.

    """

    def __init__(self, *, line_limit: int = QMP_LINE_LIMIT) -> None:
        self.state = QMPState.GREETING
        self._line_limit = line_limit
        self._partial: list[bytes] = []
        self._partial_size = 0
        self._replied = False
        self._in_flight: dict[int, str] = {}
        self._free_ids: list[int] = []

    @property
    def in_flight(self) -> int:
        """How many commands wait for their replies."""
        return len(self._in_flight)

    def send(self, command: str, encoded: str) -> tuple[int, bytes]:
        """Number a command that `encode_command` made; return its id and the bytes to send.

        An id is used again once its reply has come, so ids stay short.
        """
        if self.state is not QMPState.RUNNING:
            raise RuntimeError(f"no command can be sent while the connection is {self.state.name}")
        number = self._free_ids.pop() if self._free_ids else len(self._in_flight)
        self._in_flight[number] = command
        return number, f'{encoded},"id":{number}}}\n'.encode()

    def receive(self, data: bytes) -> list[QMPMessage]:
        """Take what the peer sent, in pieces of any size; return the messages that it completed.

        Raises:
          QMPProtocolError: if the peer broke the protocol. Messages before the violation
            in the same *data* are lost: nothing that such a peer says can be relied on.

        """
        if self.state is QMPState.BROKEN:
            raise QMPProtocolError("the connection is broken since an earlier violation")
        try:
            return [self._parse(line) for line in self._split(data) if line and not line.isspace()]
        except QMPProtocolError:
            self.state = QMPState.BROKEN
            self._partial.clear()
            raise

    def _split(self, data: bytes) -> list[bytes]:
        # Only *data* is searched for line ends, not what came before: a message of many MiB
        # that comes in small pieces must not cost quadratic time.
        *lines, rest = data.split(b"\n")
        if lines and self._partial:
            lines[0] = b"".join((*self._partial, lines[0]))
            self._partial.clear()
            self._partial_size = 0
        if rest:
            self._partial.append(rest)
            self._partial_size += len(rest)
        if self._partial_size > self._line_limit or max(map(len, lines), default=0) > self._line_limit:
            raise QMPProtocolError(f"the peer sent a line of more than {self._line_limit} bytes")
        return lines

    def _parse(self, line: bytes) -> QMPMessage:
        try:
            message: object = _decode(line.decode())
        except (ValueError, RecursionError) as exc:  # RecursionError: "[" a hundred thousand times
            raise QMPProtocolError(f"the peer sent a line that is not JSON: {_shorten(line)}") from exc
        if not isinstance(message, dict):
            raise QMPProtocolError(f"the peer sent something else than a JSON object: {_shorten(line)}")
        fields = cast("dict[str, Any]", message)
        try:
            if self.state is QMPState.GREETING or ("QMP" in fields and not self._replied):
                return self._greeting(fields["QMP"])
            if "event" in fields:
                return _event(fields)
            return self._reply(fields)
        except (KeyError, TypeError, ValueError, OverflowError) as exc:  # the last: seconds that no float can have
            raise QMPProtocolError(f"the peer sent an unexpected message: {_shorten(line)}") from exc

    def _greeting(self, fields: dict[str, Any]) -> QMPGreeting:
        version = fields["version"]
        numbers = version["qemu"]
        greeting = QMPGreeting(
            (_whole(numbers["major"]), _whole(numbers["minor"]), _whole(numbers["micro"])),
            _text(version["package"]),
            tuple(map(_text, fields["capabilities"])),
        )
        self.state = QMPState.RUNNING
        return greeting

    def _reply(self, fields: dict[str, Any]) -> QMPReply:
        error = fields.get("error")
        if "id" not in fields and error is not None:
            raise QMPProtocolError(f"the peer did not understand us: {error['desc']}")
        number = fields["id"]
        # `bool` and `float` compare equal to an `int` key.
        if type(number) is not int or number not in self._in_flight:
            raise ValueError("no command has this id")
        result: outcome.Outcome[Any]
        if error is None:
            result = outcome.Value(fields["return"])
        else:
            name, desc = _text(error["class"]), _text(error["desc"])
            result = outcome.Error(QMPCommandError(self._in_flight[number], name, desc))
        self._replied = True
        del self._in_flight[number]
        self._free_ids.append(number)
        return QMPReply(number, result)


def _event(fields: dict[str, Any]) -> QMPEvent:
    name, data, timestamp = fields["event"], fields.get("data", {}), fields["timestamp"]
    if not isinstance(name, str) or not isinstance(data, dict):
        raise TypeError("an event has a name and an object")
    # Both are -1 where QEMU's host has no clock (spec, "Asynchronous events").
    seconds, microseconds = _whole(timestamp["seconds"]), _whole(timestamp["microseconds"])
    return QMPEvent(name, cast("dict[str, Any]", data), -1.0 if seconds < 0 else seconds + microseconds / 1e6)


def _whole(value: object) -> int:
    if type(value) is not int:  # `bool` is one to isinstance()
        raise TypeError("a whole number is wanted")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is wanted")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _shorten(line: bytes) -> str:
    """Show enough of *line* to recognise it, and no more: it may have megabytes."""
    return repr(line if len(line) <= 200 else line[:200] + b"...")


# Made once: `json.loads` with arguments makes one in every call.
_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode
