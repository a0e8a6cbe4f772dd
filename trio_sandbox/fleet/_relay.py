"""The guest channel with a longer wire: each stream of one channel is a stream of the other.

What happens to one end happens to the other, in the same order: data, its end, and being given up. A reader that is slow stops its own
writer: what is taken from one side has been taken by the other, but for as much as a stream has credit for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, final

import trio

from .._nurseries import hide_nursery
from ..wire import Channel, ChannelStream, StreamLimitError, StreamResetError
from ._dial import MARK, Operator

#: Bytes of one piece from which on waking a task costs more than a write of its own.
_LARGE: Final = 4096


@final
class Relay:
    """Opens on one channel what is opened on another, and passes on what they carry.

    Args:
      guest: The channel to the machine's agent.
      on_request: Called when the user opens a stream.
      operator: What makes connections from here for the user.

    """

    def __init__(self, guest: Channel, on_request: Callable[[], object], operator: Operator) -> None:
        self._operator = operator
        self.user: Channel | None = None
        """The link to who uses the machine, once it is open; until then the guest can open nothing."""
        self._guest = guest
        self._on_request = on_request

    def accept_user(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object] | None:
        """Serve a stream that the user opened: a `StreamHandler` of the link."""
        if MARK in header:
            return self._operator.accept(stream, header)
        self._on_request()
        if header.get("service") == "pipe":
            header = {**header, "name": stream.id}  # by which the user's requests name it
        return self._accept(stream, self._guest, header)

    def accept_guest(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object] | None:
        """Serve a stream that the guest opened: a `StreamHandler` of the guest's channel."""
        if self.user is None:
            stream.reset("refused")
            return None
        return self._accept(stream, self.user, header)

    def _accept(self, stream: ChannelStream, to: Channel, header: dict[str, object]) -> Awaitable[object] | None:
        try:
            # At once, and in the order in which they come: a request finds the streams that it names.
            other = to.open_stream(header, flush=True)
        except (StreamLimitError, ValueError) as exc:
            stream.reset(str(exc))
            return None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # Whoever cares for the two channels finds out why that is, and breaks the other off with the reason.
            return _wait_cancelled()
        return carry(stream, other)


async def carry(one: ChannelStream, other: ChannelStream) -> None:
    """Pass on what comes both ways, until both have ended, or one is given up, and with it the other.

    When a stream is broken because its channel is, the other stays as it is until this is cancelled: whoever cares for the channels
    knows more. Cancelled, both are given up.
    """
    ended = 0

    async def pass_on(source: ChannelStream, sink: ChannelStream) -> None:
        nonlocal ended
        try:
            await _pass_all(source, sink)
            ended += 1
            if ended < 2:
                await source.wait_given_up()
        except StreamResetError:
            if source.reset_reason is None:
                return  # it was the sink, which the other direction cares for: what came from there before goes on first
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.sleep_forever()
        if source.reset_reason is not None:
            sink.reset(source.reset_reason)
        elif ended < 2:
            await trio.sleep_forever()  # its channel is broken
        nursery.cancel_scope.cancel(reason="it is over")

    try:
        with hide_nursery("a relayed stream"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, one, other)
                await pass_on(other, one)
    finally:
        one.close()
        other.close()


async def _pass_all(source: ChannelStream, sink: ChannelStream) -> None:
    """Pass on all that comes, and its end, in the same write as the last data where that is there already."""
    take = partial(_take_large, sink)
    data = await source.relay(take)
    while data:
        following = _receive_nowait(source)
        if following == b"" and source.reset_reason is not None:
            await sink.send_and_close(data)
            return
        await sink.send_all(data, end=following == b"")
        if following == b"":
            return
        data = following or await source.relay(take)
    await sink.send_eof()


def _take_large(sink: ChannelStream, data: memoryview) -> int:
    """Pass on at once, without waking a task, what is large; what is little had better travel with what follows it."""
    return 0 if len(data) < _LARGE else sink.send_nowait(data)


def _receive_nowait(source: ChannelStream) -> bytes | None:
    """Return what has come already; None: nothing, b"": the end."""
    try:
        return source.receive_nowait(2**16)
    except trio.WouldBlock:
        return None


async def _wait_cancelled() -> None:
    await trio.sleep_forever()
