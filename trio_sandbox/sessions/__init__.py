"""Sandboxes for services: each has a key, such as the name of a user, and any task may lease it.

    async with open_host() as host, open_sessions(host, "python") as sessions:
        async with sessions.lease("ada") as session:
            await session.sandbox.run("x = 1")

When nobody has leased a sandbox for a while, it sleeps; later it is closed.
"""

from __future__ import annotations

from .._metadata import fix_module_metadata
from ._sessions import (
    OpensSandboxes as OpensSandboxes,
    Sessions as Sessions,
    open_sessions as open_sessions,
    open_sessions_with as open_sessions_with,
)
from ._values import (
    Session as Session,
    SessionEnd as SessionEnd,
    SessionsConfig as SessionsConfig,
    SessionsStatistics as SessionsStatistics,
)

fix_module_metadata(__name__, globals())
del fix_module_metadata
