"""What the runs of an interpreter use, with all that they start: its control group counts the processor time, its process the rest."""

from __future__ import annotations

import math
import os
import time
from typing import TypeAlias, final

from ..helpers.porter import UNCOUNTED
from .children import Child

#: Seconds after the end of a run in which the next one need not find out anew what was used before it: that takes a hundredth of a run, and
#: so does to forget what memory there was.
_RECENTLY = 0.05

#: Bytes before the number that it begins with.
_PREFIX = len("usage_usec ")

#: What a run has used: microseconds of processor time; the most memory that its interpreter had, in KiB, or 0 where nobody
#: counts it; blocks of 512 bytes that were written to disks, or -1 where nobody counts them.
Used: TypeAlias = tuple[int, int, int]
NOTHING: Used = (0, 0, -1)


@final
class Meter:
    """Tells what each run of an interpreter has used.

    Args:
      child: The interpreter's process, whose control group nobody was in before. Its `Child.descriptors` are this object's: a
        file that tells the processor time of its group, and one that makes the most memory it had what it has now.
      ported: Whether it is its porter's, which begins to count its memory by itself.

    """

    def __init__(self, child: Child, *, ported: bool) -> None:
        self._child = child
        self._ported = ported
        self._before = self._last = 0
        self._peak = self._written = 0
        self._has_grown = True
        self._read_at = -math.inf

    def begin(self, asked_at: float) -> None:
        """Count from now on, for a run that was asked for at *asked_at* by `time.perf_counter`."""
        is_soon = asked_at <= self._read_at + _RECENTLY
        self._before = self._last if is_soon else self._read()
        if (self._has_grown or not is_soon) and not self._ported and len(self._child.descriptors) == 2:
            try:
                os.write(self._child.descriptors[1], b"5")
            except OSError:
                pass  # it is over

    def used(self, peak: int, written: int) -> Used:
        """Return what was used since. A run that begins soon counts from here.

        Args:
          peak: The most memory that the interpreter had since its file was last written to, in KiB; 0 if it does not say.
          written: Blocks that it has written since it started; `UNCOUNTED` if it does not say.

        """
        self._has_grown, self._peak = peak > self._peak, peak
        self._last, self._read_at = self._read(), time.perf_counter()
        if not self._ported and len(self._child.descriptors) != 2:
            peak = 0
        if written == UNCOUNTED:
            return max(0, self._last - self._before), peak, -1
        before, self._written = self._written, written
        return max(0, self._last - self._before), peak, max(0, written - before)

    def close(self) -> None:
        """Count no more."""
        self._child.abandoned = True
        while self._child.descriptors:
            os.close(self._child.descriptors.pop())

    def _read(self) -> int:
        if not self._child.descriptors:
            return 0  # it has yet to start, or there are no control groups
        try:
            text = os.pread(self._child.descriptors[0], 64, 0)
        except OSError:
            return 0  # its group is gone
        return int(text[_PREFIX : text.index(b"\n")])
