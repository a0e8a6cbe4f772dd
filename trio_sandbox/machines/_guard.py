"""What makes room where `HostConfig.memory_overcommit` has taken sandboxes for idler than they are, before the kernel kills somebody.

First machines of the warm pool go, which are nobody's. Then idle sandboxes are put to sleep, one after the other, the longest idle first. Busy ones are
left alone: what they need, those that wait do not get. That is for `Admission` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol, final

import attrs
import trio

from .._errors import SandboxError
from .._observe import part_logger
from ._admission import Admission
from ._budget import disk_shortage

_log = part_logger("admission")

#: Seconds between two looks. In one of them a guest may fill a few hundred MiB: the reserve is for that.
_LOOK: Final = 1.0
#: Seconds without a request after which a sandbox is idle: less is the pause between two requests of one program.
_IDLE: Final = 2.0
#: Seconds before another try with a sandbox in which something runs, or that could not be put to sleep.
_PAUSE: Final = 10.0


class Sleeper(Protocol):
    """A sandbox, as far as the guard knows it."""

    @property
    def idle_since(self) -> float | None:
        """When it was last asked for something, on Trio's clock; None: it is not to be put to sleep now."""
        ...

    async def doze(self) -> bool:
        """Put it to sleep until its next request, if nothing is under way in it; tell whether it sleeps.

        Raises:
          SandboxError, OSError: if that failed; it goes on.

        """
        ...


@attrs.define(eq=False)
class _Watched:
    sleeper: Sleeper
    not_before: float = 0.0
    """When another try may be made."""


@final
class MemoryGuard:
    """Makes room for a host while `serve` runs.

    Args:
      admission: Knows how much memory is left, and who waits for some.
      give_back_spare: Has one idle machine of the warm pool closed; tells whether there was one.
      directory: Where sleeping sandboxes are kept. Its disk has to have room for them.

    """

    def __init__(self, admission: Admission, give_back_spare: Callable[[], bool], directory: Path) -> None:
        self._admission = admission
        self._give_back_spare = give_back_spare
        self._directory = directory
        self._watched: list[_Watched] = []
        self._no_disk = ""

    @contextmanager
    def watch(self, sleeper: Sleeper) -> Generator[None]:
        """Know a sandbox for the block."""
        watched = _Watched(sleeper)
        self._watched.append(watched)
        try:
            yield
        finally:
            self._watched.remove(watched)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Look what is left, and make room where somebody needs some."""
        task_status.started()
        while True:  # noqa: ASYNC913 - it begins with a sleep
            await trio.sleep(_LOOK)
            # What a spare had is free only when its machine is gone; what a sandbox had is when it sleeps.
            while self._admission.needs_memory() and not self._give_back_spare():
                if not await self._put_one_to_sleep():
                    break

    async def _put_one_to_sleep(self) -> bool:  # noqa: ASYNC910 - there may be nobody, and the next look comes
        """Put the sandbox to sleep that is idle for longest, of those that can; tell whether there is one."""
        if not self._has_disk():
            return False  # noqa: ASYNC910 - as above
        for watched in self._order():
            if watched not in self._watched:
                continue  # it was closed meanwhile
            try:
                if await watched.sleeper.doze():
                    self._admission.note_sleep()
                    return True
            except (SandboxError, OSError) as exc:
                _log.warning("an idle sandbox was not put to sleep for want of memory, and goes on: %s", exc)
            watched.not_before = trio.current_time() + _PAUSE
        return False  # noqa: ASYNC910 - as above

    def _order(self) -> list[_Watched]:
        now = trio.current_time()
        idle = [
            (since, watched)
            for watched in self._watched
            if (since := watched.sleeper.idle_since) is not None and now - since >= _IDLE and now >= watched.not_before
        ]
        return [watched for _, watched in sorted(idle, key=lambda pair: pair[0])]

    def _has_disk(self) -> bool:
        """Tell whether a sandbox that sleeps has room on the disk; the log has it once if not."""
        shortage = disk_shortage(self._directory) or ""
        if shortage and not self._no_disk:
            _log.warning("no sandbox is put to sleep for want of memory: %s", shortage)
        self._no_disk = shortage
        return not shortage
