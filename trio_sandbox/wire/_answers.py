"""Short answers: what a peer may say is bounded before it says it."""

from __future__ import annotations

from ._errors import WireError
from ._stream import ChannelStream


async def receive_up_to(stream: ChannelStream, size: int) -> bytes:  # noqa: ASYNC910 - receiving is a checkpoint
    """Return the next *size* bytes of a stream, at least 1; fewer only where the peer ended it.

    Cancelled: what had come is lost. Errors are those of `ChannelStream.receive_some`.
    """
    answer = await stream.receive_some(size)
    while len(answer) < size and (data := await stream.receive_some(size - len(answer))):
        answer += data
    return answer


async def receive_all(stream: ChannelStream, most: int) -> bytes:
    """Return all that a peer says on a stream until it ends that: *most* bytes or fewer.

    Cancelled: what had come is lost.

    Raises:
      WireError: if it says more. The stream was reset.

    Otherwise errors are those of `ChannelStream.receive_some`.
    """
    answer = await receive_up_to(stream, most + 1)
    if len(answer) > most:
        error = WireError(f"an answer of more than {most} bytes, which begins with {answer[:40]!r}")
        stream.reset(str(error))
        raise error
    return answer
