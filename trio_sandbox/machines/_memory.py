"""Whether the memory that is really left is enough: what was measured in, decisions out.

Only a host with `HostConfig.memory_overcommit` above 1 asks. Its budget counts what sandboxes are taken to use; this looks at what they do use. Nothing
here reads a file or waits.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, Literal, final

import attrs

_MIB: Final = 2**20

#: The part of a room that is kept free. The budget of a host leaves the same part for our own process, the page cache and the neighbours.
_RESERVE_SHARE: Final = 0.1
#: Its bounds, in MiB. A guest may fill its RAM between two looks: the least is one of 256 MiB. The most is what eight guests write in a second under
#: KVM, page by page; of a large machine a tenth would be memory that nobody ever uses.
_RESERVE_MIB: Final = (256, 4096)
#: The most of a small room that is kept free.
_LARGEST_RESERVE: Final = 0.25
#: Below this part of the reserve memory is short: there is still as much left as putting a sandbox to sleep may take meanwhile.
_SHORT: Final = 0.5
#: Stalls count where less than this part is left. Elsewhere they are somebody's who has reached a limit of its own, such as one guest in its control
#: group: if they counted, that guest could keep all others out. Where they count, the kernel says by them that what it calls available is in use.
_NEAR: Final = 0.25
#: With this share of the time in which at least one program waited for memory, it is tight.
_SOME_STALL: Final = 0.1
#: With this share of the time in which all programs waited, it is short.
_ALL_STALL: Final = 0.1
#: How much better than these it has to be for a step back: or else one sandbox that sleeps, and one that is opened, would have it go up and down.
_EASE: Final = 1.25
#: Seconds after which a sandbox's memory shows in what is left, if nobody has said before that its machine is up. Under emulation, with many that start at
#: once, that takes some seconds.
_SEEN_AFTER: Final = 10.0


@final
@attrs.frozen
class Stalls:
    """How long programs waited for memory: the share of the last ten seconds, from 0 to 1, as the kernel has averaged it."""

    some: float
    """In which at least one of them waited."""
    full: float
    """In which all that had something to do waited."""


@final
@attrs.frozen
class Room:
    """What is left of some memory that we share with others."""

    where: str
    """Whose it is, as in "of 8 MiB (where) 4 MiB are left"."""
    left: int
    """Bytes that can be had."""
    total: int
    """All there is, in bytes."""
    stalls: Stalls | None = None
    """How long programs that share it waited; None: the kernel does not tell."""

    @property
    def reserve(self) -> int:
        """Bytes that are kept free."""
        least, most = (bound * _MIB for bound in _RESERVE_MIB)
        return int(min(max(self.total * _RESERVE_SHARE, least), most, self.total * _LARGEST_RESERVE))

    def level(self, ease: float = 1.0) -> Level:
        """Judge it; with *ease* above 1 it has to be better by so much."""
        near = self.left < self.total * _NEAR * ease
        stalls = self.stalls if near and self.stalls is not None else Stalls(0.0, 0.0)
        if self.left < self.reserve * _SHORT * ease or stalls.full * ease >= _ALL_STALL:
            return Level.SHORT
        if self.left < self.reserve * ease or stalls.some * ease >= _SOME_STALL:
            return Level.TIGHT
        return Level.EASY

    def __str__(self) -> str:
        said = f"of {self.total // _MIB} MiB {self.where} {self.left // _MIB} MiB are left, and {self.reserve // _MIB} MiB are kept free"
        if self.stalls is None:
            return f"{said} (the kernel does not tell how long programs wait for memory)"
        return f"{said}; of the last ten seconds some program waited for memory in {self.stalls.some:.0%}, and all in {self.stalls.full:.0%}"


class Level(enum.IntEnum):
    """How much memory there is."""

    EASY = 0
    """Enough."""
    TIGHT = 1
    """Enough for what there is, and for nothing new."""
    SHORT = 2
    """Too little for what there is."""

    @property
    def word(self) -> Literal["easy", "tight", "short"]:
        """What people call it."""
        return _WORDS[self]


_WORDS: Final[dict[Level, Literal["easy", "tight", "short"]]] = {
    Level.EASY: "easy",
    Level.TIGHT: "tight",
    Level.SHORT: "short",
}


@final
@attrs.frozen
class MemoryStatistics:
    """The memory that is really left for the sandboxes of a host with `HostConfig.memory_overcommit`."""

    level: Literal["easy", "tight", "short"]
    """How much there is: "easy", enough; "tight", nothing is opened or woken up; "short", idle sandboxes are put to sleep besides."""
    measured: str
    """What was measured last, in words, of what has least left: this machine, or one of our control groups."""
    stalls_known: bool
    """Whether the kernel tells how long programs wait for memory (PSI). If not, only what is left decides."""
    put_to_sleep: int
    """How often an idle sandbox was put to sleep for want of memory."""


@final
class MemoryWatch:
    """What is known of the memory that is left, and who may have some of it.

    It gets worse at once, and better only with a margin. The narrowest room decides.
    """

    def __init__(self) -> None:
        self.level: Level = Level.EASY
        """How much there is."""
        self.put_to_sleep: int = 0
        """How many sandboxes the guard has put to sleep."""
        self._rooms: Sequence[Room] = ()
        self._granted: dict[Hashable, tuple[float, int]] = {}  # when, in that order, and how many bytes

    @property
    def _unseen(self) -> int:
        return sum(amount for _, amount in self._granted.values())

    @property
    def tells_stalls(self) -> bool:
        """Whether the kernel says how long programs wait."""
        return any(room.stalls is not None for room in self._rooms)

    @property
    def worst(self) -> Room | None:
        """The room that has least beyond its reserve, of those of the worst level; None before the first look."""
        return min(self._rooms, key=lambda room: (-room.level(), room.left - room.reserve), default=None)

    def statistics(self) -> MemoryStatistics:
        """Return what is known, as it is now."""
        return MemoryStatistics(self.level.word, self.describe(), self.tells_stalls, self.put_to_sleep)

    def look(self, rooms: Iterable[Room], now: float) -> bool:
        """Take note of what was measured at *now*, in seconds; tell whether the level is another."""
        self._rooms = tuple(rooms)
        while (first := next(iter(self._granted), None)) is not None and self._granted[first][0] <= now - _SEEN_AFTER:
            self.forget(first)
        before = self.level
        level = max((room.level() for room in self._rooms), default=Level.EASY)
        eased = max((room.level(_EASE) for room in self._rooms), default=Level.EASY)
        self.level = max(level, min(before, eased))
        return self.level != before

    def admits(self, amount_mib: int) -> bool:
        """Tell whether so much more may be given out, after the last look: beside the reserves, and what is given out and not to be seen yet."""
        wanted = amount_mib * _MIB + self._unseen
        return self.level is Level.EASY and all(room.left - wanted >= room.reserve for room in self._rooms)

    def grant(self, who: Hashable, amount_mib: int, now: float) -> None:
        """Take note that *who* was given so much."""
        self._granted[who] = now, amount_mib * _MIB

    def forget(self, who: Hashable) -> None:
        """Count what *who* was given no more: it shows now, or was given back. Again is no error."""
        self._granted.pop(who, None)

    def describe(self) -> str:
        """Say what was measured, and what of that is not to be seen yet."""
        if not (unseen := self._unseen):
            return str(self.worst)
        return f"{self.worst}; {unseen // _MIB} MiB are for machines that start just now, and need not show in that yet"
