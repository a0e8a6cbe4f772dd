"""A bound on how often something is done."""

from __future__ import annotations

from typing import final

import trio


@final
class Rate:
    """Lets so many through a second, and a burst at once; the others wait in line (a token bucket).

    Args:
      per_second: How many a second.
      burst: How many at once, after a while in which nobody came.

    """

    def __init__(self, per_second: float, burst: int) -> None:
        self._interval = 1 / per_second
        self._burst = burst
        self._next = 0.0
        """When the bucket would be full again, less what fits into it: who comes after that need not wait."""
        self._turn = trio.StrictFIFOLock()

    async def wait(self) -> None:
        """Wait for one's turn. Always a checkpoint. Cancelled, it is as if nobody had waited."""
        async with self._turn:
            turn = max(self._next, trio.current_time() - self._burst * self._interval) + self._interval
            await trio.sleep_until(turn)
            self._next = turn
