"""Service "clock": what time it is here, for the host to find out how far that is off, and to put it right.

    {"service": "clock"}                answered by the time, in 8 bytes: nanoseconds since 1970, big-endian
    {"service": "clock", "step": n}     first sets the clock forward by so many nanoseconds, or back

A step is as right when it comes late as it was when it was sent. A time would be late by then.
"""

from __future__ import annotations

import time
from typing import final

from ...wire import ChannelStream


def step_clock(nanoseconds: int) -> None:
    """Set this machine's clock forward, or back; `OSError` if it can't be that time."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + nanoseconds)


@final
class ClockService:
    """Tells the time.

    Args:
      settable: Whether the clock is ours to set. Otherwise steps are ignored.

    """

    def __init__(self, *, settable: bool) -> None:
        self._settable = settable

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        step = header.get("step", 0)
        if type(step) is not int:
            stream.reset(f"a step is a whole number of nanoseconds, not {step!r:.80}")
            return
        if step and self._settable:
            try:
                step_clock(step)
            except (OSError, OverflowError) as exc:
                stream.reset(f"the clock can't be set: {exc}")
                return
        await stream.send_all(time.time_ns().to_bytes(8, "big"), end=True)
