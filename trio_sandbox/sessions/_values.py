"""What users of sessions say and are told: frozen values."""

from __future__ import annotations

from typing import Literal, TypeAlias, final

import attrs

from .._checks import check_seconds, one_of, or_none, whole_number
from ..sandbox import Sandbox

SessionEnd: TypeAlias = Literal["expired", "evicted", "died", "closed"]


@attrs.frozen(kw_only=True)
class SessionsConfig:
    """How many sandboxes sessions may have, and for how long. Every field has a default."""

    sleep_after: float | None = attrs.field(default=60.0, validator=or_none(check_seconds))
    """Seconds without a lease after which a sandbox is put to sleep, as `Sandbox.hibernate` does. The next lease wakes it up. One in which processes or threads run stays awake, and is tried again after the same time. None: sandboxes sleep only if others need their place."""
    close_after: float | None = attrs.field(default=3600.0, validator=or_none(check_seconds))
    """Seconds without a lease after which a sandbox is closed, asleep or awake. Its state is lost. None: never."""
    max_sessions: int = attrs.field(default=100, validator=whole_number(1))
    """How many sandboxes there may be, asleep and awake. For one more, the one without a lease that was not used for longest is closed ("evicted")."""
    max_awake: int | None = attrs.field(default=None, validator=or_none(whole_number(1)))
    """How many of them may be awake, or about to be: as many as the host has memory for. For one more, the one without a lease that was not used for
    longest is put to sleep. If none can sleep, since processes run in all of them, that one is closed ("evicted"). None: all of them."""
    when_full: Literal["wait", "refuse"] = attrs.field(default="wait", validator=one_of("wait", "refuse"))
    """What a lease does if it needs a sandbox, and as many as may be are leased: "wait" until a lease ends, first come, first served; or "refuse", which
    raises `CapacityError` at once."""
    close_grace: float = attrs.field(default=10.0, validator=check_seconds)
    """Seconds that closing a sandbox may take, for instance if your function that opens them saves something at the end. Then it is cancelled."""


@final
@attrs.frozen(eq=False)
class Session:
    """A sandbox that a lease has, for the block of the lease. Made by `Sessions.lease`."""

    key: str
    """The key of the lease."""
    _sandbox: Sandbox
    fresh: bool
    """Whether nobody has leased this sandbox before: nothing of an earlier one is in it."""
    ended: SessionEnd | None
    """Why the earlier sandbox of the key is gone, if there was one and this lease is the first to be told; None otherwise.

    - "expired": nobody leased it for `SessionsConfig.close_after`.
    - "evicted": another session needed its place.
    - "died": its VM ended, by a crash for instance.
    - "closed": `Sessions.close` was called.
    """

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox. It is awake for as long as the lease lasts."""
        return self._sandbox


@final
@attrs.frozen
class SessionsStatistics:
    """Numbers about sessions."""

    sessions: int
    """All sandboxes: those that are being opened or closed, those awake and those asleep."""
    awake: int
    """Those of them that are not asleep."""
    leased: int
    """Those of them that have a lease."""
    tasks_waiting_lease: int
    """Tasks that wait for a lease."""
    opened: int
    """How many sandboxes were opened so far."""
    failed: int
    """How many could not be opened."""
    slept: int
    """How often one was put to sleep."""
    woken: int
    """How often one was woken up."""
    expired: int
    """How many were closed because nobody leased them for `SessionsConfig.close_after`."""
    evicted: int
    """How many were closed because another session needed their place."""
    died: int
    """How many were closed because their VM had ended."""
    closed: int
    """How many were closed by `Sessions.close`, and at the end of the block."""
