"""Short questions to the host: a stream each, and no task that waits for the answer.

Under software emulation each task, and each turn of the scheduler, is felt in every lookup and every connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import trio

from ....wire import Channel, ChannelStream
from ..carried import STREAM_GONE


@final
class Questions:
    """Those of one conversation.

    Args:
      channel: Where the host is.

    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open: set[Question] = set()

    def ask(self, header: Mapping[str, object], size: int, answered: Callable[[Question], object]) -> Question:
        """Ask the host, here and now.

        Args:
          header: What.
          size: Bytes of the answer.
          answered: Called once, later, when the answer is there. It must neither wait nor raise.

        Raises:
          StreamLimitError, trio.BrokenResourceError, trio.ClosedResourceError: if it can't be asked.

        """
        stream = self._channel.open_stream(header, flush=True)
        if stream.is_given_up:  # nothing could be written
            raise trio.BrokenResourceError("the channel failed")
        question = Question(stream, size, answered, self._open)
        self._open.add(question)
        return question

    def close(self) -> None:
        """Want no answers any more."""
        for question in tuple(self._open):
            question.close()


@final
class Question:
    """One question; made by `Questions.ask`."""

    def __init__(
        self, stream: ChannelStream, size: int, answered: Callable[[Question], object], siblings: set[Question]
    ) -> None:
        self.answer: bytes = b""
        """What has come of it; shorter than it should be if the host gave the question up."""
        self._stream = stream
        self._size = size
        self._answered = answered
        self._siblings = siblings
        stream.call_on_news(self._hear)

    def _hear(self) -> None:
        try:
            while len(self.answer) < self._size and (
                data := self._stream.receive_nowait(self._size - len(self.answer))
            ):
                self.answer += data
        except trio.WouldBlock:
            return
        except STREAM_GONE:
            pass
        # The host closes the stream with its last word, mostly in the same write. Closing it before that takes a write of ours.
        self._stream.call_on_news(self._close_after)
        self._answered(self)

    def _close_after(self) -> None:
        if self._stream.is_given_up:
            self.close()

    def take_stream(self) -> ChannelStream:
        """Return the stream of a question that was answered, and goes on. It is the caller's from now on."""
        self._siblings.discard(self)
        self._stream.call_on_news(None)
        return self._stream

    def close(self) -> None:
        """Want no answer any more. Doing it again does nothing."""
        self.take_stream().close()
