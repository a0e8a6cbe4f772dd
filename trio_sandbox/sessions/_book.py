"""Who has which session, who waits, and what is to be done: decisions, without a sandbox and without waiting.

Every method takes note of something that has happened, and decides at once what follows from it. Tasks that wait are told by events.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Final, final

import attrs
import trio

from .._errors import CapacityError, SandboxClosedError
from ..sandbox import Sandbox
from ._values import Session, SessionEnd, SessionsConfig, SessionsStatistics

#: Keys whose sandbox is gone that are remembered until a lease is told; clients may make keys up.
_REMEMBERED: Final = 10_000


class Phase(enum.Enum):
    """What a session's keeper does."""

    OPENING = enum.auto()
    AWAKE = enum.auto()
    FALLING_ASLEEP = enum.auto()
    ASLEEP = enum.auto()
    WAKING = enum.auto()


@final
@attrs.define(eq=False)
class Kept:
    """A sandbox of the book, from the decision to open it until it is gone. A task, its keeper, does what is decided."""

    key: str
    before: SessionEnd | None
    """Why the earlier one of that key is gone."""
    since: float
    """When it was last used."""
    phase: Phase = Phase.OPENING
    sandbox: Sandbox | None = None
    told: bool = False
    """Whether a lease was told that it is fresh."""
    leases: list[Ticket] = attrs.field(factory=list["Ticket"])
    retry: float = 0.0
    """Before then it is not put to sleep for idleness."""
    end: SessionEnd | None = None
    """Why it is to be closed; None while it is not."""
    detached: bool = False
    """Whether it is not the session of its key any more."""
    bell: trio.Event = attrs.field(factory=trio.Event)
    """Set, and replaced, when its keeper has something new to do."""
    scope: trio.CancelScope = attrs.field(factory=lambda: trio.CancelScope(shield=True))
    """All that its keeper does. The shield has a deadline from when it is to be closed."""
    falling: trio.CancelScope | None = None
    """What puts it to sleep, or wakes it up."""
    gone: trio.Event = attrs.field(factory=trio.Event)

    @property
    def dead(self) -> bool:
        """Whether its VM has ended by itself."""
        return self.sandbox is not None and self.sandbox.failure is not None

    def note_sleep(self) -> None:
        """Take note if somebody who leases it has put it to sleep, or has woken it up."""
        if self.sandbox is not None and self.phase in (Phase.AWAKE, Phase.ASLEEP):
            self.phase = Phase.ASLEEP if self.sandbox.statistics().hibernated else Phase.AWAKE

    def ring(self) -> None:
        """Have its keeper look what there is to do."""
        self.bell.set()
        self.bell = trio.Event()


@final
@attrs.define(eq=False)
class Ticket:
    """A lease, from when it is asked for until it is given back."""

    key: str
    exclusive: bool
    asker: object
    done: trio.Event = attrs.field(factory=trio.Event)
    """Set once it has a session, or an error."""
    session: Session | None = None
    error: Exception | None = None
    traceback: TracebackType | None = None
    """That of the error when it was told."""


@final
class Book:
    """The book of all sessions of one block.

    Args:
      config: Limits.
      start: Called with each session that is to have a keeper.
      clock: Tells the time.

    """

    def __init__(self, config: SessionsConfig, start: Callable[[Kept], object], clock: Callable[[], float]) -> None:
        self._config = config
        self._start = start
        self._clock = clock
        self._current: dict[str, Kept] = {}
        self._all: dict[Kept, None] = {}  # those of `_current`, and those that are detached and not gone yet
        self._waiting: dict[str, dict[Ticket, None]] = {}  # by key: those of one key need the same sandbox
        self._holding: dict[Ticket, Kept] = {}
        self._ended: dict[str, SessionEnd] = {}
        self._restless: set[Kept] = set()  # refused to sleep, since there was too little room
        self._counts: Counter[str] = Counter()
        self._shut = False

    # --- What is asked ---

    def remembers(self, key: str) -> bool:
        """Tell whether there is a session of *key*, or the next lease will be told of the end of one."""
        return key in self._current or key in self._ended

    def statistics(self) -> SessionsStatistics:
        """Return numbers."""
        counts = self._counts
        return SessionsStatistics(
            sessions=len(self._all),
            awake=self._awake(),
            leased=sum(bool(kept.leases) for kept in self._all),
            tasks_waiting_lease=sum(map(len, self._waiting.values())),
            **{
                name: counts[name]
                for name in ("opened", "failed", "slept", "woken", "expired", "evicted", "died", "closed")
            },
        )

    # --- Leases ---

    def ask(self, key: str, asker: object, *, exclusive: bool) -> Ticket:
        """Note that somebody wants a lease.

        Raises:
          SandboxClosedError: if the block was left.
          RuntimeError: if *asker* would wait for itself.

        """
        if self._shut:
            raise _block_was_left()
        ticket = Ticket(key, exclusive, asker)
        kept = self._find(key)
        if kept is not None:
            kept.note_sleep()
        own = _own_leases(ticket, kept)
        if own and (exclusive or any(each.exclusive for each in own)):
            raise RuntimeError(
                f"this task has a lease of session {key!r:.100} already and would wait for itself: an exclusive lease is the only one; end the other first"
            )
        self._waiting.setdefault(key, {})[ticket] = None
        self._settle()
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """Note that somebody does not want a lease any more, or not want to wait for it."""
        if ticket in self._waiting.get(ticket.key, ()):
            self._leave_line(ticket)
        kept = self._holding.pop(ticket, None)
        if kept is not None:
            kept.leases.remove(ticket)
            kept.since = self._clock()
            if not kept.leases and kept.end is None:
                if kept.dead or kept.detached:
                    self._end(kept, "died")
                else:
                    kept.note_sleep()
        if ticket.key in self._current:
            self._current[ticket.key].ring()  # its time may come now
        self._settle()

    # --- What keepers tell ---

    def opened(self, kept: Kept, sandbox: Sandbox) -> None:
        """Note that a sandbox is there."""
        kept.sandbox = sandbox
        kept.phase = Phase.AWAKE
        kept.since = self._clock()
        self._counts["opened"] += 1
        self._settle()

    def fell_asleep(self, kept: Kept, *, asleep: bool) -> None:
        """Note that a sandbox is asleep, or did not fall asleep."""
        kept.phase = Phase.ASLEEP if asleep else Phase.AWAKE
        self._counts["slept"] += asleep
        if kept.dead:
            self._end(kept, "died")
        elif not asleep:
            kept.retry = self._clock() + (self._config.sleep_after or 0.0)
            self._restless.add(kept)
        self._settle()

    def woke_up(self, kept: Kept, error: Exception | None) -> None:
        """Note that a sandbox is awake, or did not wake up."""
        kept.phase = Phase.AWAKE if error is None else Phase.ASLEEP
        kept.since = self._clock()
        self._counts["woken"] += error is None
        if isinstance(error, SandboxClosedError):
            self._end(kept, "died")  # who waits gets another
        elif error is not None:
            self._fail(kept.key, error)
        self._settle()

    def look(self, kept: Kept) -> float:
        """Do what a session's time has come for; return when to look again, at the latest."""
        if kept.leases or kept.end is not None or kept.key in self._waiting:
            return float("inf")
        now = self._clock()
        close_at = kept.since + _seconds(self._config.close_after)
        sleep_at = float("inf")
        if now >= close_at:
            self._end(kept, "expired")
        elif kept.phase is Phase.AWAKE:
            sleep_at = max(kept.since + _seconds(self._config.sleep_after), kept.retry)
            if now >= sleep_at:
                kept.phase = Phase.FALLING_ASLEEP
        return min(close_at, sleep_at)

    def is_gone(self, kept: Kept, error: Exception | None) -> bool:
        """Note that a session is closed, or could not be opened because of *error*; return whether anybody is told of that error."""
        told = False
        if kept.sandbox is not None and kept.end is not None:
            self._counts[kept.end] += 1
        elif error is not None:
            self._counts["failed"] += 1
            told = not kept.detached and self._fail(kept.key, error)
        del self._all[kept]
        self._restless.discard(kept)
        self._detach(kept, kept.end)
        kept.gone.set()
        self._settle()
        return told

    # --- Ends ---

    def close(self, key: str) -> Kept | None:
        """Have the session of *key* closed, whoever leases it; return it, if there is one."""
        kept = self._current.get(key)
        if kept is not None:
            self._end(kept, "closed")
            self._settle()
        return kept

    def shut(self) -> None:
        """Have all sessions closed, and nobody wait any more."""
        self._shut = True
        for kept in list(self._all):
            self._end(kept, "closed")
        for key in list(self._waiting):
            self._fail(key, _block_was_left())

    def _end(self, kept: Kept, reason: SessionEnd) -> None:
        if kept.end is not None:
            return
        kept.end = reason
        kept.scope.deadline = self._clock() + self._config.close_grace
        for scope in (kept.scope if kept.sandbox is None else None, kept.falling):
            if scope is not None:
                scope.cancel(reason="its session was closed")
        self._detach(kept, reason)
        kept.ring()

    def _detach(self, kept: Kept, reason: SessionEnd | None) -> None:
        """Have the next lease of its key get another, and be told the reason."""
        if kept.detached:
            return
        kept.detached = True
        del self._current[kept.key]
        if not kept.told:
            reason = kept.before  # nobody has had this one
        if reason is not None:
            self._ended[kept.key] = reason
            if len(self._ended) > _REMEMBERED:
                del self._ended[next(iter(self._ended))]

    # --- Decisions ---

    def _settle(self) -> None:
        """Serve those who wait, in their order, and make room for those who can't be served yet."""
        if self._shut:
            return
        short: dict[str, Kept | None] = {}  # keys that need room: for another session, or for this one to be awake
        for key in list(self._waiting):
            kept = self._find(key)
            if kept is not None and kept.phase is Phase.FALLING_ASLEEP:
                if kept.falling is None:  # it has not begun to
                    kept.phase = Phase.AWAKE
                else:
                    kept.falling.cancel(reason="it is wanted")
            if kept is not None and kept.phase is Phase.AWAKE:
                self._serve(kept)
            elif kept is None or kept.phase is Phase.ASLEEP:
                if not short and self._has_room(kept):
                    self._make_awake(key, kept)
                else:
                    short[key] = kept
        if short:
            self._make_room(short)
        else:
            self._restless.clear()

    def _find(self, key: str) -> Kept | None:
        """Return the session of *key*; one whose VM has ended is none any more."""
        kept = self._current.get(key)
        if kept is not None and kept.dead:
            if kept.leases:  # those who have it may still revert it
                self._detach(kept, "died")
            else:
                self._end(kept, "died")
            return None
        return kept

    def _serve(self, kept: Kept) -> None:
        """Give leases of a session that is awake, in the order of those who wait."""
        held_up = False
        for ticket in list(self._waiting[kept.key]):
            held_up = held_up or not _may_have(ticket, kept)
            if not held_up or _own_leases(ticket, kept):  # those in front may wait for this very task
                self._grant(ticket, kept)

    def _grant(self, ticket: Ticket, kept: Kept) -> None:
        assert kept.sandbox is not None
        ticket.session = Session(kept.key, kept.sandbox, not kept.told, None if kept.told else kept.before)
        kept.told = True
        self._restless.discard(kept)
        kept.leases.append(ticket)
        self._holding[ticket] = kept
        self._leave_line(ticket)
        ticket.done.set()

    def _has_room(self, kept: Kept | None) -> bool:
        return self._awake() < self._most_awake() and (kept is not None or len(self._all) < self._config.max_sessions)

    def _make_awake(self, key: str, kept: Kept | None) -> None:
        if kept is not None:
            kept.phase = Phase.WAKING
            kept.ring()
            return
        kept = self._current[key] = Kept(key, self._ended.pop(key, None), self._clock())
        self._all[kept] = None
        self._start(kept)

    def _make_room(self, short: dict[str, Kept | None]) -> None:
        """Close sessions and put them to sleep, so that there is room for all of *short*, or as much as there can be."""
        places = self._most_awake() - self._awake() + sum(_yields(kept) for kept in self._all)
        while places < len(short) and (oldest := self._oldest(Phase.AWAKE, but=self._restless)):
            oldest.phase = Phase.FALLING_ASLEEP
            oldest.ring()
            places += 1
        while places < len(short) and (oldest := self._oldest(Phase.OPENING, Phase.AWAKE)):
            self._end(oldest, "evicted")
            places += 1
        # Nobody loses a sandbox for one that could not be awake.
        new = [key for key, kept in list(short.items())[: max(places, 0)] if kept is None]
        unmet = (
            len(new) - (self._config.max_sessions - len(self._all)) - sum(kept.end is not None for kept in self._all)
        )
        while unmet > 0 and (oldest := self._oldest(*Phase)):
            self._end(oldest, "evicted")
            unmet -= 1
        refused = {*list(short)[max(places, 0) :], *(new[-unmet:] if unmet > 0 else ())}
        if refused and self._config.when_full == "refuse":
            for key in refused:
                self._fail(key, self._full())
            self._settle()

    def _oldest(self, *phases: Phase, but: set[Kept] | None = None) -> Kept | None:
        """Return the session that was not used for longest and that nobody leases or waits for, first of all one whose VM has ended."""
        found = [
            kept
            for kept in self._current.values()
            if kept.phase in phases and not kept.leases and kept not in (but or ()) and kept.key not in self._waiting
        ]
        return min(found, key=lambda kept: (not kept.dead, kept.since), default=None)

    def _awake(self) -> int:
        return sum(kept.phase is not Phase.ASLEEP for kept in self._all)

    def _most_awake(self) -> int:
        return self._config.max_sessions if self._config.max_awake is None else self._config.max_awake

    def _full(self) -> CapacityError:
        return CapacityError(
            f"there are {len(self._all)} sandboxes, {self._awake()} of them awake, and no more may be (`max_sessions`, `max_awake`) while "
            "all that could make room are in use; nothing was started: try again later"
        )

    def _fail(self, key: str, error: Exception) -> bool:
        """Have all who wait for *key* raise *error*; return whether anybody does."""
        tickets = list(self._waiting.get(key, ()))
        for ticket in tickets:
            self._leave_line(ticket)
            ticket.error, ticket.traceback = error, error.__traceback__
            ticket.done.set()
        return bool(tickets)

    def _leave_line(self, ticket: Ticket) -> None:
        line = self._waiting[ticket.key]
        del line[ticket]
        if not line:
            del self._waiting[ticket.key]


def _own_leases(ticket: Ticket, kept: Kept | None) -> list[Ticket]:
    """Return the leases of a session that the task of *ticket* has already."""
    return [] if kept is None else [each for each in kept.leases if each.asker is ticket.asker]


def _may_have(ticket: Ticket, kept: Kept) -> bool:
    return not kept.leases if ticket.exclusive else not any(each.exclusive for each in kept.leases)


def _yields(kept: Kept) -> bool:
    """Whether a session that is awake is about to be one less."""
    return kept.phase is not Phase.ASLEEP and (kept.end is not None or kept.phase is Phase.FALLING_ASLEEP)


def _seconds(value: float | None) -> float:
    return float("inf") if value is None else value


def _block_was_left() -> SandboxClosedError:
    return SandboxClosedError("the block of open_sessions() has exited; open another")
