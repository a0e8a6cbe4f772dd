"""What a gateway tells of its decisions: events for whoever watches, numbers, and lines of the log."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Final, final

import trio

from .._observe import add_span, measure, part_logger
from ._connections import EventQueue, NetworkEvent, NetworkStatistics, NetworkWatch, Outcome

_log = part_logger("network")

#: Seconds between two warnings of one refusal, and how many different ones are told in that time: a guest must not fill a
#: log by asking for ever new names.
_QUIET: Final = 60.0
_MOST_WARNINGS: Final = 100


@final
class Attempt:
    """What is known of one connection so far, for its event."""

    def __init__(self, host: str, port: int | None) -> None:
        self.host = host
        self.port = port
        self.address: str | None = None
        self.upstream: trio.abc.HalfCloseableStream | None = None
        """The other end, which whoever made the attempt closes."""
        self.room: trio.Semaphore | None = None
        """Where it takes the place of one connection."""
        self.sent = self.received = 0
        self.told = False
        """Its event is out."""
        self._started = time.time()
        self._clock = trio.current_time()

    def event(self, outcome: Outcome, error: str) -> NetworkEvent:
        return NetworkEvent(
            host=self.host,
            port=self.port,
            address=self.address,
            outcome=outcome,
            error=error,
            started=self._started,
            duration=trio.current_time() - self._clock,
            bytes_sent=self.sent,
            bytes_received=self.received,
        )


@final
class Journal:
    """Counts and tells what becomes of a sandbox's lookups and connections."""

    def __init__(self) -> None:
        self.context: Context = copy_context()
        """What decisions are told in."""
        self.open: int = 0
        """Connections that exist now."""
        self.connections: int = 0
        self.lookups: int = 0
        self.sent: int = 0
        self.received: int = 0
        self._refused = self._failed = 0
        self._warned: dict[str, float] = {}
        self._untold = 0
        self._watches: set[EventQueue] = set()

    def statistics(self) -> NetworkStatistics:
        """Return the numbers."""
        return NetworkStatistics(
            open_connections=self.open,
            connections=self.connections,
            lookups=self.lookups,
            refused=self._refused,
            failed=self._failed,
            bytes_sent=self.sent,
            bytes_received=self.received,
        )

    @contextmanager
    def watch(self) -> Generator[NetworkWatch]:
        """Yield a watch that is told of every decision during the block."""
        events = EventQueue()
        self._watches.add(events)
        try:
            yield NetworkWatch(events)
        finally:
            self._watches.discard(events)
            events.close()

    def tell(self, event: NetworkEvent) -> None:
        """Count *event*, log it, and hand it to who watches."""
        self.context.run(self._tell, event)
        for events in self._watches:
            events.put(event)

    def _tell(self, event: NetworkEvent) -> None:
        # Neither the name nor the address: the guest chooses them, and could write in them.
        add_span(
            "network",
            event.duration,
            outcome=event.outcome,
            bytes_sent=event.bytes_sent,
            bytes_received=event.bytes_received,
        )
        measure("network.decisions", outcome=event.outcome)
        where = event.host if event.port is None else f"{event.host}:{event.port}"
        if event.outcome in ("closed", "reset"):
            _log.info(
                "%s (%s) %s after %.3f s; sent %d bytes, received %d",
                where,
                event.address,
                event.outcome,
                event.duration,
                event.bytes_sent,
                event.bytes_received,
            )
        elif event.outcome in ("failed", "no such host"):
            self._failed += 1
            _log.info("%s: %s: %s", where, event.outcome, event.error)
        else:
            self._refused += 1
            self._warn(where, event)

    def _warn(self, where: str, event: NetworkEvent) -> None:
        now = trio.current_time()
        if now < self._warned.get(where, 0.0):
            return
        if len(self._warned) >= _MOST_WARNINGS:
            self._warned = {name: until for name, until in self._warned.items() if now < until}
            if len(self._warned) >= _MOST_WARNINGS:
                self._untold += 1
                return
        self._warned[where] = now + _QUIET
        if self._untold:
            _log.warning("%d more refusals were not logged: there were too many", self._untold)
            self._untold = 0
        _log.warning("%s: %s: %s", where or "a request", event.outcome, event.error)
