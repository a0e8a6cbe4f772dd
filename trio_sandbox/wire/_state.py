"""What one side of a channel knows about a stream."""

from __future__ import annotations

from ._framing import INITIAL_CREDIT


class StreamState:
    """One stream that is not over. "Done" means that a side has sent END or RESET."""

    __slots__ = (
        "begun",
        "close_after",
        "done",
        "end_after",
        "id",
        "pending",
        "receive_credit",
        "refusing",
        "remote_done",
        "send_credit",
        "taken",
    )

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.send_credit = INITIAL_CREDIT
        self.receive_credit = INITIAL_CREDIT
        self.taken = 0  # by the reader, and not yet given back as credit
        self.pending: memoryview | None = None
        self.begun = False  # part of `pending` has been sent
        self.end_after = False
        self.close_after = False
        self.done = False
        self.refusing = False  # we sent RESET: what still comes is counted and dropped
        self.remote_done = False
