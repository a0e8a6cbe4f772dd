"""How much of the host's time one guest may take: half of it, in short turns, unless it has much to say.

The smallest frames have nine bytes, so that one read of the port can have 14,000 of them. The host takes a few at a time and lets
everybody else have a turn. What it has spent on one guest it gets back by staying away from that guest for as long, at the latest when
that comes to a millisecond. What a large read takes is no debt: its bytes are worth it. Frames that do nothing, for
streams that are over or of credit that nobody waits for, have a rate besides, past which they are an attack.
"""

from __future__ import annotations

from time import perf_counter, thread_time
from typing import Final, final

from ._errors import WireError

#: Frames that a host handles before others have their turn, which takes it a millisecond at most. A read of large frames has three.
FRAMES_IN_TURN: Final = 128
#: How many other frames take as long as OPEN, which starts a task, and how many bytes of its JSON take as long as one.
FRAMES_OF_OPEN: Final = 20
JSON_OF_A_FRAME: Final = 64
#: Frames without effect that may come at once, and each second. A guest of ours sends one or two with each request, and there are
#: never more than some thousand of these in a second.
IDLE_FRAMES: Final = 20_000
IDLE_RATE: Final = 4_000
#: Seconds of work on one guest that it need not pay back at once.
_SHORT: Final = 0.001
#: Seconds that a stream costs which a guest opens: what serves it has a task of its own, whose turns are counted as being away.
_SERVED: Final = 0.0003
#: Seconds that a byte is worth. To pass on what comes at 250 MB/s takes no longer.
_WORTH: Final = 4e-9


@final
class Pace:
    """Counts what one guest costs. No I/O, but it looks at a clock."""

    def __init__(self) -> None:
        self._room: float = IDLE_FRAMES
        self._counted = 0
        self._served = 0
        self._debt = 0.0
        self._began = self._worth = 0.0
        self._ended = perf_counter()

    def begin_turn(self, size: int = 0) -> None:
        """Say that frames are about to be handled, of *size* bytes that have just come."""
        self._worth = size * _WORTH
        self._began = thread_time()

    def end_turn(self, idle_frames: int, served: int = 0) -> float:
        """Say that so many frames without effect have come so far, and streams that are served; return the seconds to stay away, which may be 0.

        Raises:
          WireError: if there are too many of them.

        """
        now = perf_counter()
        # Of this thread: what other processes take from us is not the guest's fault.
        busy = thread_time() - self._began
        away = max(0.0, now - self._ended - busy)
        self._debt = max(0.0, self._debt - away) + max(0.0, busy - self._worth) + (served - self._served) * _SERVED
        self._served = served
        if idle_frames != self._counted or self._room < IDLE_FRAMES:
            self._room = min(self._room + (now - self._ended) * IDLE_RATE, IDLE_FRAMES) - (idle_frames - self._counted)
            self._counted = idle_frames
        self._ended = now
        if self._room < 0:
            raise WireError(f"more than {IDLE_FRAMES} frames without any effect, faster than {IDLE_RATE} in a second")
        if self._debt < _SHORT:
            return 0.0
        pause, self._debt = self._debt, 0.0
        return pause
