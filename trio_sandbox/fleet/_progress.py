"""What a node says of its long work, to its user."""

from __future__ import annotations

from typing import Final, final

from .._config import Progress

#: Stages of which news are kept until somebody takes them; a node has a few.
_MOST: Final = 100


@final
class ProgressNotes:
    """The newest of each stage, until somebody takes it: what `HostConfig.progress` is on a node."""

    def __init__(self) -> None:
        self._newest: dict[str, Progress] = {}

    def __call__(self, progress: Progress) -> None:
        """Note a step."""
        if progress.stage in self._newest or len(self._newest) < _MOST:
            self._newest[progress.stage] = progress

    def take(self) -> tuple[Progress, ...]:
        """Return what is new."""
        newest = tuple(self._newest.values())
        self._newest.clear()
        return newest
