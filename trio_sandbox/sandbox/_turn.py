"""Whose turn it is at a sandbox's interpreters."""

from __future__ import annotations

from types import TracebackType
from typing import final

import trio

from .._entries import asker_of


@final
class Turn:
    """A lock, for one task after the other, which costs no turn of the scheduler where nobody has it."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    @property
    def tasks_waiting(self) -> int:
        """How many tasks wait for it."""
        return self._lock.statistics().tasks_waiting

    def is_of(self, asker: object) -> bool:
        """Whether *asker* has it: see `current_asker`."""
        return self._lock.locked() and asker_of(self._lock.statistics().owner) is asker

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> None:
        """Wait for it. Cancelled, be it before: nobody has it because of this."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(  # noqa: ASYNC910 - it waits for nothing
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
