"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Unpack, final

import trio_sandbox.sessions

from .. import Image, SandboxConfig, SandboxFields
from .._refused import refuse
from ..portal import plain
from ..sessions import SessionEnd, SessionsConfig, SessionsStatistics
from ._door import AioDoor, open_beside
from ._host import Host
from ._sandbox import Sandbox


@final
class Session(AioDoor[trio_sandbox.sessions.Session]):
    """A sandbox that a lease has, for the block of the lease. Made by `Sessions.lease`."""

    __slots__ = ()

    @property
    def key(self) -> str:
        """The key of the lease."""
        return self._inner.key

    @property
    def fresh(self) -> bool:
        """Whether nobody has leased this sandbox before: nothing of an earlier one is in it."""
        return self._inner.fresh

    @property
    def ended(self) -> SessionEnd | None:
        """Why the earlier sandbox of the key is gone, if there was one and this lease is the first to be told; None otherwise."""
        return self._inner.ended

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox. It is awake for as long as the lease lasts."""
        return Sandbox(self._portal, self._inner.sandbox)


@final
class Sessions(AioDoor[trio_sandbox.sessions.Sessions]):
    """Sandboxes by their keys, which any task may lease. Made by `open_sessions`."""

    __slots__ = ()

    @property
    def config(self) -> SessionsConfig:
        """The limits it was opened with."""
        return self._now(lambda: self._inner.config)

    def statistics(self) -> SessionsStatistics:
        """Return numbers about the sessions as they are now."""
        return self._now(self._inner.statistics)

    def remembers(self, key: str) -> bool:
        """Tell whether there is a session of *key*, or one has ended and the next lease will say so (`Session.ended`)."""
        return self._now(lambda: self._inner.remembers(key))

    @refuse("timeout")
    def lease(self, key: str, *, exclusive: bool = False) -> AbstractAsyncContextManager[Session]:
        """Have the sandbox of *key* for a block. It is opened if there is none, and woken up if it sleeps.

        See `trio_sandbox.sessions.Sessions.lease`.
        """
        return self._block(lambda: self._inner.lease(key, exclusive=exclusive), Session)

    async def close(self, key: str) -> None:
        """Close the sandbox of *key*, if there is one, whoever leases it. The next lease opens another.

        See `trio_sandbox.sessions.Sessions.close`.
        """
        await self._call(lambda: self._inner.close(key))


def open_sessions(
    host: Host,
    image: str | Image = "python",
    config: SandboxConfig | None = None,
    *,
    limits: SessionsConfig | None = None,
    **fields: Unpack[SandboxFields],
) -> AbstractAsyncContextManager[Sessions]:
    """Yield sessions: sandboxes by keys, such as the names of users, that tasks lease. When the block exits, all are closed.

    See `trio_sandbox.sessions.open_sessions`.
    """
    return open_beside(
        host, lambda: trio_sandbox.sessions.open_sessions(plain(host), image, config, limits=limits, **fields), Sessions
    )
