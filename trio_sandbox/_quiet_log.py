"""A bound on how much of a log is filled by what a guest can make happen again and again."""

from __future__ import annotations

import math
from typing import Final, final

import trio

from ._observe import Adapter

#: How many lines there may be in a minute.
MOST_LINES: Final = 100
_MINUTE: Final = 60.0


@final
class QuietLog:
    """Writes lines to a log, and counts those that are too many.

    Args:
      log: Where they go.

    """

    def __init__(self, log: Adapter) -> None:
        self._log = log
        self._until = -math.inf
        self._lines = self._untold = 0

    def warning(self, message: str, *args: object, cause: Exception | None = None) -> None:
        """Log a warning, and the traceback of *cause*, unless there were too many in this minute."""
        now = trio.current_time()
        if now >= self._until:
            self.tell_untold()
            self._until, self._lines = now + _MINUTE, 0
        if self._lines >= MOST_LINES:
            self._untold += 1
            return
        self._lines += 1
        self._log.warning(message, *args, exc_info=cause)

    def tell_untold(self) -> None:
        """Log how many there were that were not logged."""
        if self._untold:
            self._log.warning("%d more were not logged: there were too many", self._untold)
            self._untold = 0
