"""Service "clock": what time it is here, for the host to find out how far that is off, and to put it right.

    {"service": "clock"}                answered by the time, in 8 bytes: nanoseconds since 1970, big-endian
    {"service": "clock", "step": n}     first sets the clock forward by so many nanoseconds, or back

A step is as right when it comes late as it was when it was sent. A time would be late by then.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from typing import final

from ...wire import ChannelStream

#: Of adjtimex(2): what to do with the clock, its parts, and the whole of the structure, in bytes.
_ADJ_SETOFFSET, _ADJ_NANO = 0x0100, 0x2000
_TIMEX_HEAD, _TIMEX_BYTES = "I68xqq", 208
_SECOND = 10**9

_libc = ctypes.CDLL(None, use_errno=True)


def step_clock(nanoseconds: int) -> None:
    """Set this machine's clock forward, or back; `OSError` if it can't be that time.

    The kernel adds the step by itself. Who reads the time and sets what it comes to, sets the clock back by as long as others run between the two.
    """
    request = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        struct.pack_into(_TIMEX_HEAD, request, 0, _ADJ_SETOFFSET | _ADJ_NANO, *divmod(nanoseconds, _SECOND))
    except struct.error:
        raise OverflowError(f"{nanoseconds} ns is more than a clock can be set forward or back") from None
    if _libc.adjtimex(request) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


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
