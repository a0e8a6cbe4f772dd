"""How a program ended, for ``trio-sandbox run --json``."""

from __future__ import annotations

import json

import attrs
import trio

from .._errors import OutputLimitError
from .._results import RunTimings
from ._program import Program
from ._streams import Stream


@attrs.frozen(kw_only=True)
class Outcome:
    """How a program ended."""

    status: int
    """The exit status of the command."""
    timings: RunTimings
    """Seconds since the command began."""
    cpu_seconds: float
    """Processor time of its machine."""
    timed_out: bool = False
    oom: bool = False
    """It was killed for want of memory."""


@attrs.define
class Collected:
    """What a program prints, kept up to a limit."""

    limit: int
    output: dict[Stream, bytearray] = attrs.field(factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})

    async def write(self, stream: Stream, data: bytes) -> None:
        """Keep *data*.

        Raises:
          OutputLimitError: if there is too much of it by now.
        """
        await trio.lowlevel.checkpoint()
        self.output[stream] += data
        if len(self.output[stream]) > self.limit:
            raise OutputLimitError(
                f"the program printed more than the {self.limit} bytes to {stream} that --json can take, and was stopped"
            )

    def as_json(self, outcome: Outcome, program: Program, accelerator: str) -> bytes:
        """Write one line with all that is known; bytes that are no UTF-8 become U+FFFD."""
        timings = outcome.timings
        fields = {
            "exit_code": None if outcome.timed_out else outcome.status,
            "timed_out": outcome.timed_out,
            "oom": outcome.oom,
            "duration": round(timings.ended - timings.sent, 6),
            "timings": {name: value and round(value, 6) for name, value in attrs.asdict(timings).items()},
            "cpu_seconds": round(outcome.cpu_seconds, 6),
            "stdout": self.output["stdout"].decode("utf-8", "replace"),
            "stderr": self.output["stderr"].decode("utf-8", "replace"),
            "language": program.language,
            "image": str(program.image),
            "accelerator": accelerator,
        }
        return f"{json.dumps(fields)}\n".encode()
