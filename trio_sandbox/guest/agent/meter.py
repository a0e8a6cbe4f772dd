"""What the runs of an interpreter use of the processor, with all that they start: its control group counts it."""

from __future__ import annotations

import math
import os
import time
from typing import final

from .children import Child

#: Seconds after the end of a run in which the next one need not find out anew what was used before it: that takes a hundredth of a run.
_RECENTLY = 0.05


@final
class Meter:
    """Tells what each run of an interpreter has used, in microseconds; 0 where nobody counts it.

    Args:
      child: The interpreter's process, whose control group nobody was in before. Its `Child.descriptor` is this object's.

    """

    def __init__(self, child: Child) -> None:
        self._child = child
        self._before = self._last = 0
        self._read_at = -math.inf

    def begin(self, asked_at: float) -> None:
        """Count from now on, for a run that was asked for at *asked_at* by `time.perf_counter`."""
        self._before = self._last if asked_at <= self._read_at + _RECENTLY else self._read()

    def used(self) -> int:
        """Return what was used since. A run that begins soon counts from here."""
        self._last, self._read_at = self._read(), time.perf_counter()
        return max(0, self._last - self._before)

    def close(self) -> None:
        """Count no more."""
        self._child.abandoned = True
        if self._child.descriptor >= 0:
            os.close(self._child.descriptor)
            self._child.descriptor = -1

    def _read(self) -> int:
        if self._child.descriptor < 0:
            return 0  # it has yet to start, or there are no control groups
        try:
            text = os.pread(self._child.descriptor, 64, 0)
        except OSError:
            return 0  # its group is gone
        return int(text[len("usage_usec ") : text.index(b"\n")])
