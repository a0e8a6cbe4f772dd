"""Long work is told to the log: a first use builds images for minutes, and must not do so without a word."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import final

from .._config import Progress
from .._observe import part_logger

_log = part_logger("progress")


@final
class ProgressLog:
    """Logs each new message of a stage, but not each fraction of it, and passes everything on.

    Args:
      report: What is told as well.

    """

    def __init__(self, report: Callable[[Progress], object]) -> None:
        self._report = report
        self._last: dict[str, str] = {}

    def __call__(self, progress: Progress) -> None:
        """Take a step."""
        if _log.isEnabledFor(logging.INFO) and self._last.get(progress.stage) != progress.message:
            self._last[progress.stage] = progress.message
            _log.info("%s: %s", progress.stage, progress.message)
        self._report(progress)
