"""The functions of the host that the code of one run may call: bytes between a stream of the host's and two pipes.

What the bytes say is between the host and the interpreter's worker, and nothing of it is trusted on either side: see
`client/_functions.py`, which is the host's half.
"""

from __future__ import annotations

import contextlib
import os
from typing import cast, final

import trio

from ...wire import ChannelStream
from .pipes import CHUNK, open_pipe
from .processes import BadRequestError, parse_pipe, parse_string


@final
class FunctionPipes:
    """What a run's interpreter calls the host's functions by.

    Args:
      stream: Where calls go, and answers come from.
      names: What the functions are called.

    """

    def __init__(self, stream: ChannelStream, names: list[str]) -> None:
        self.names = names
        self._stream = stream
        self._answers = self._calls = -1

    def open(self, user: int | None) -> list[int]:
        """Make the pipes; return the ends for the interpreter, which *user* may open by name: answers and calls."""
        self._answers, answers = open_pipe(for_writing=True, user=user)
        try:
            self._calls, calls = open_pipe(for_writing=False, user=user)
        except OSError:
            os.close(answers)
            raise
        return [answers, calls]

    def close(self) -> None:
        """Close our ends, if nobody carries anything."""
        for descriptor in (self._answers, self._calls):
            if descriptor >= 0:
                os.close(descriptor)
        self._answers = self._calls = -1

    async def carry(self) -> None:
        """Carry calls and answers until both have an end; cancelled when the run is over."""
        answers, calls = self._answers, self._calls
        self._answers = self._calls = -1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry_answers, answers)
            nursery.start_soon(self._carry_calls, calls)

    # Where one way is broken the other goes on: what the host has sent already is still read, and the run's end ends both.

    async def _carry_answers(self, descriptor: int) -> None:
        async with trio.lowlevel.FdStream(descriptor) as pipe:
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await self._stream.receive_some(CHUNK):
                    await pipe.send_all(data)

    async def _carry_calls(self, descriptor: int) -> None:
        async with trio.lowlevel.FdStream(descriptor) as pipe:
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await pipe.receive_some(CHUNK):
                    await self._stream.send_all(data)
                await self._stream.send_eof()


def parse_functions(value: object) -> tuple[int, list[str]] | None:
    """Return the id of the stream and the names in a request's "functions", None if it has none."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRequestError(f"functions must be an object, not {value!r:.80}")
    fields = cast("dict[str, object]", value)
    number, names = parse_pipe(fields.get("stream"), "stream"), fields.get("names")
    if number is None or not isinstance(names, list):
        raise BadRequestError(f"functions must have a stream and names, not {value!r:.80}")
    return number, [parse_string(name, "a function's name") for name in cast("list[object]", names)]
