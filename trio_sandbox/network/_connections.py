"""What is told about a sandbox's connections: an event for each, numbers about all, and a watch to follow them by."""

from __future__ import annotations

from collections import deque
from typing import Literal, TypeAlias, final

import attrs
import trio

Outcome: TypeAlias = Literal[
    "closed",
    "reset",
    "failed",
    "no such host",
    "refused by policy",
    "not a public address",
    "wrong server name",
    "over the limit",
]

#: Events that a watch keeps for a reader that lags behind; then it loses the oldest.
_KEPT_EVENTS = 1000


@final
@attrs.frozen(kw_only=True)
class NetworkEvent:
    """One decision about the network: a connection, reported when it ends, or a refused name or connection."""

    host: str
    """The name that the guest asked for; "" if what it asked for is no name."""
    port: int | None
    """The port; None for a lookup that was refused, before there was one."""
    address: str | None
    """Where the connection led; None if there was none."""
    outcome: Outcome
    """How it ended, or why there was none. "closed": both sides ended it. "reset": one broke it off."""
    error: str
    """What went wrong, in a sentence; for a refusal it names what would allow it. "" if nothing did."""
    started: float
    """When, in seconds since 1970."""
    duration: float
    """Seconds from the request until the end."""
    bytes_sent: int
    """What the guest sent."""
    bytes_received: int
    """What it got."""


@final
@attrs.frozen(kw_only=True)
class NetworkStatistics:
    """Numbers about a sandbox's network. All but the first count from the opening of the sandbox."""

    open_connections: int
    """Connections that exist now."""
    connections: int
    """Connections that were made."""
    lookups: int
    """Names that the guest asked for."""
    refused: int
    """Names and connections that no rule allows, or that lead to no public address."""
    failed: int
    """Connections that were allowed and failed: no such host, nobody there."""
    bytes_sent: int
    """What the guest sent."""
    bytes_received: int
    """What it got."""


@final
class EventQueue:
    """Events for one reader, who may lag behind."""

    def __init__(self) -> None:
        self.lost: int = 0
        """Events that were dropped, the oldest first."""
        self._events: deque[NetworkEvent] = deque()
        self._news = trio.Event()
        self._closed = False

    def put(self, event: NetworkEvent) -> None:
        """Add *event*."""
        if len(self._events) == _KEPT_EVENTS:
            self._events.popleft()
            self.lost += 1
        self._events.append(event)
        self._news.set()

    def close(self) -> None:
        """End the reader's iteration, after what has come."""
        self._closed = True
        self._news.set()

    async def get(self) -> NetworkEvent | None:
        """Return the next event, None at the end."""
        await trio.lowlevel.checkpoint()
        while not self._events and not self._closed:
            self._news = trio.Event()
            await self._news.wait()
        return self._events.popleft() if self._events else None


@final
class NetworkWatch:
    """The events of a sandbox's network, as they happen: an async iterator of `NetworkEvent`.

    Made by `Sandbox.watch_network` and `Sandbox.network`; it ends when that block does.
    """

    def __init__(self, events: EventQueue) -> None:
        self._events = events

    @property
    def lost(self) -> int:
        """How many events were dropped, the oldest first, because nobody took them; the last 1000 are kept."""
        return self._events.lost

    def __aiter__(self) -> NetworkWatch:
        return self

    async def __anext__(self) -> NetworkEvent:
        event = await self._events.get()
        if event is None:
            raise StopAsyncIteration
        return event
