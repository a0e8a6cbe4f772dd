"""The memory that is really left, looked at whenever somebody asks for some, for hosts with `HostConfig.memory_overcommit`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import final

import trio

from .._observe import measure, part_logger
from ._budget import memory_rooms
from ._memory import Level, MemoryWatch

_log = part_logger("admission")


@final
class MeasuredMemory:
    """A `MemoryWatch` with the kernel's files and Trio's clock. It says in the log when there is more or less than before.

    Args:
      overcommit: `HostConfig.memory_overcommit`, for messages.

    """

    def __init__(self, overcommit: float) -> None:
        self.watch = MemoryWatch()
        """What is known after the last look."""
        self._overcommit = overcommit
        self._unread = False
        self.look()
        if not self.watch.tells_stalls:
            _log.warning(
                "this kernel does not tell how long programs wait for memory (no /proc/pressure/memory), so only what is left decides whether "
                "there is enough; to change that, boot it with psi=1"
            )

    def look(self) -> None:
        """Find out what is left. Blocks the Trio thread for some 0.2 ms."""
        try:
            rooms = memory_rooms()
        except OSError as exc:
            if not self._unread:
                self._unread = True
                _log.warning("what memory is left can't be read, and what was read last is taken for it: %s", exc)
            return
        self._unread = False
        if self.watch.look(rooms, trio.current_time()):
            tell = _log.info if self.watch.level is Level.EASY else _log.warning
            tell("memory is %s: %s", self.watch.level.word, self.watch.describe())

    def holds(self, amount_mib: int) -> bool:
        """Look, and tell whether so much more may be given out."""
        self.look()
        return self.watch.admits(amount_mib)

    def grant(self, who: Hashable, amount_mib: int) -> None:
        """Take note that *who* was given so much."""
        self.watch.grant(who, amount_mib, trio.current_time())

    def note_sleep(self) -> None:
        """Count a sandbox that was put to sleep for want of memory."""
        self.watch.put_to_sleep += 1
        measure("memory.sleeps")

    def describe(self, amount_mib: int) -> str:
        """Say why somebody who wants so much waits."""
        return f"{self.watch.describe()}; it counts with {amount_mib} MiB, by `HostConfig.memory_overcommit` {self._overcommit:g}"
