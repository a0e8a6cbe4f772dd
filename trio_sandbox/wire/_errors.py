"""What can go wrong on a channel.

    Exception
    ├── ChannelError             why a channel failed
    │   ├── WireError            the peer broke the protocol
    │   ├── PeerGoneError        the connection ended
    │   └── PeerSilentError      the peer left a ping unanswered for too long
    ├── StreamLimitError         too many streams are open to open another
    └── trio.BrokenResourceError
        └── StreamResetError     the peer reset this one stream

Operations on the streams of a failed channel raise `trio.BrokenResourceError` whose `__cause__` is the
`ChannelError`. This package is used inside guests as well, hence these are not `SandboxError`s.
"""

from __future__ import annotations

from typing import final

import trio


class ChannelError(Exception):
    """Why a channel failed. Whatever was in flight may or may not have arrived."""


@final
class WireError(ChannelError):
    """The peer broke the protocol; nothing it sent after that was looked at."""


@final
class PeerGoneError(ChannelError):
    """The connection ended or broke; `__cause__` has the transport's error where there was one."""


@final
class PeerSilentError(ChannelError):
    """The peer left a ping unanswered for longer than `silence_timeout`."""


@final
class StreamLimitError(Exception):
    """As many streams as one side may have are open; nothing was sent. Close one first."""


@final
class StreamResetError(trio.BrokenResourceError):
    """The peer gave this stream up; `reason` is its own text, and not to be trusted."""

    def __init__(self, reason: str) -> None:
        # Quoted, as it may hold what a terminal obeys.
        super().__init__(f"the peer reset the stream: {reason!r}" if reason else "the peer reset the stream")
        self.reason = reason
