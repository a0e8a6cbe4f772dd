"""A bound on how often something is done."""

from __future__ import annotations

import math
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
        self._next = -math.inf
        """When the bucket would be full again, less what fits into it: who comes after that need not wait."""
        self._line = trio.StrictFIFOLock()

    async def wait(self) -> None:
        """Wait for one's turn. Always a checkpoint. Cancelled, it is as if nobody had waited."""
        await trio.lowlevel.checkpoint_if_cancelled()
        turn = self._find_turn()
        if turn <= trio.current_time() and not self._line.locked():  # nobody stands in line
            self._next = turn
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        async with self._line:
            turn = self._find_turn()
            await trio.sleep_until(turn)
            self._next = turn

    def _find_turn(self) -> float:
        return max(self._next, trio.current_time() - self._burst * self._interval) + self._interval
