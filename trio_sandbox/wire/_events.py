"""What the bytes of a peer mean; `Connection.receive` yields these."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class HelloReceived(NamedTuple):
    """The peer introduced itself; always the first event."""

    hello: dict[str, object]


class StreamOpened(NamedTuple):
    """The peer opened a stream."""

    stream_id: int
    header: dict[str, object]


class DataReceived(NamedTuple):
    """Part of a DATA frame, not necessarily all of it."""

    stream_id: int
    data: bytes | bytearray | memoryview


class EndReceived(NamedTuple):
    """The peer sends nothing more on this stream."""

    stream_id: int


class ResetReceived(NamedTuple):
    """The peer takes nothing more on this stream, and unless it had ended it, sends nothing more."""

    stream_id: int
    reason: str


class CreditReceived(NamedTuple):
    """The peer takes more on a stream that had run out of credit."""

    stream_id: int


class PongReceived(NamedTuple):
    """The oldest unanswered ping was answered."""

    payload: bytes


Event: TypeAlias = (
    HelloReceived | StreamOpened | DataReceived | EndReceived | ResetReceived | CreditReceived | PongReceived
)
