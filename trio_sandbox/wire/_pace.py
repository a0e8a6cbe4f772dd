"""How much of the host's time one guest may take: as many frames as are worth something to somebody, and then a pause.

The smallest frames have nine bytes, so that one read of the port can have 14,000 of them. The host takes a few at a time, lets
everybody else have a turn, and stays away from that guest for as long as it was busy with it. Frames that do nothing, for
streams that are over or of credit that nobody waits for, have a rate besides, past which they are an attack.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final, final

from ._errors import WireError

#: Frames without effect that may come at once, and each second. A guest of ours sends one or two with each request, and there are
#: never more than some thousand of these in a second.
IDLE_FRAMES: Final = 20_000
IDLE_RATE: Final = 4_000


@final
class Pace:
    """Counts what one guest costs. No I/O, but it looks at a clock."""

    def __init__(self) -> None:
        self._room: float = IDLE_FRAMES
        self._counted = 0
        self._looked = self._began = perf_counter()

    def begin_turn(self) -> None:
        """Say that frames are about to be handled."""
        self._began = perf_counter()

    def end_turn(self, idle_frames: int) -> float:
        """Say that so many frames without effect have come so far; return the seconds to stay away.

        Raises:
          WireError: if there are too many of them.

        """
        now = perf_counter()
        self._room = min(self._room + (now - self._looked) * IDLE_RATE, IDLE_FRAMES) - (idle_frames - self._counted)
        self._looked, self._counted = now, idle_frames
        if self._room < 0:
            raise WireError(f"more than {IDLE_FRAMES} frames without any effect, faster than {IDLE_RATE} in a second")
        return now - self._began
