"""Sandboxes that requests share by a key, across tasks: opened when first used, closed when nobody has used them for a while."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import final

import attrs
import trio

from .. import Checkpoint, Sandbox, SandboxError
from .._nurseries import Services, open_services
from .._observe import part_logger

_log = part_logger("integrations")


@final
@attrs.define(eq=False)
class Session:
    """A sandbox that is open, and what belongs to it."""

    sandbox: Sandbox
    checkpoints: dict[str, Checkpoint] = attrs.field(factory=dict[str, Checkpoint])
    """By the names that users know them by."""
    made: int = 0
    """Checkpoints that were made so far."""


@attrs.define(eq=False)
class _Entry:
    opening: trio.Lock = attrs.field(factory=trio.Lock)
    session: Session | None = None
    users: int = 0
    idle_since: float = 0.0
    expired: bool = False
    """It was closed because nobody used it, and nobody was told so yet."""
    end: trio.CancelScope | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)


@final
class Sessions:
    """Made by `open_sessions`."""

    def __init__(
        self,
        services: Services,
        open_sandbox: Callable[[], AbstractAsyncContextManager[Sandbox]],
        idle: float,
        limit: int,
    ) -> None:
        self._services = services
        self._open_sandbox = open_sandbox
        self._idle = idle
        self._limit = limit
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @asynccontextmanager
    async def use(self, key: str) -> AsyncGenerator[tuple[Session, bool]]:
        """Yield the session of *key*, and whether an earlier one of it was closed because nobody used it.

        Raises:
          RuntimeError: if it is a new one, and there are as many as may be, all of which are in use.
          Exception: what opening a sandbox raises.

        """
        entry = self._entries.get(key)
        if entry is None:
            await self._make_room()
            entry = self._entries.setdefault(key, _Entry())
        entry.users += 1
        try:
            async with entry.opening:
                if entry.session is None:
                    entry.ended = trio.Event()
                    await self._services.start(self._keep, entry)
            session, expired = entry.session, entry.expired
            entry.expired = False
            assert session is not None
            yield session, expired
        finally:
            entry.users -= 1
            entry.idle_since = trio.current_time()

    async def close(self, key: str) -> None:
        """End the session of *key*, if there is one; its next user gets a new one."""
        entry = self._entries.get(key)
        if entry is not None and entry.end is not None:
            entry.end.cancel(reason="it was closed")
            await entry.ended.wait()
        await trio.lowlevel.checkpoint()

    async def _make_room(self) -> None:
        """Forget the key that was not used for longest, if there are as many as may be."""
        await trio.lowlevel.checkpoint()
        if len(self._entries) < self._limit:
            return
        idle = [key for key, entry in self._entries.items() if not entry.users]
        if not idle:
            raise RuntimeError(f"there are {self._limit} sandboxes already, all of them in use; try again later")
        oldest = min(idle, key=lambda key: self._entries[key].idle_since)
        await self.close(oldest)
        self._entries.pop(oldest, None)

    async def _keep(  # noqa: ASYNC910 - opening a sandbox is a checkpoint
        self, entry: _Entry, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Keep a sandbox open until nobody has used it for so long, or it is closed."""
        started = False
        try:
            with trio.CancelScope() as entry.end:
                async with self._open_sandbox() as sandbox:
                    entry.session = Session(sandbox)
                    task_status.started()
                    started = True
                    while entry.users or trio.current_time() < entry.idle_since + self._idle:
                        left = entry.idle_since + self._idle - trio.current_time()
                        await trio.sleep(self._idle if entry.users else max(left, 0))
                    entry.expired = True
        except SandboxError as exc:
            if not started:
                raise
            _log.warning("a sandbox did not end well: %s", exc)  # others are not to end with it
        finally:
            entry.session = None
            entry.end = None
            entry.ended.set()


@asynccontextmanager
async def open_sessions(
    open_sandbox: Callable[[], AbstractAsyncContextManager[Sandbox]], *, idle: float, limit: int
) -> AsyncGenerator[Sessions]:
    """Yield sessions for a block, which closes them all.

    Args:
      open_sandbox: Opens one; called in the task that keeps it.
      idle: Seconds after which one that nobody uses is closed.
      limit: How many there may be at a time. For one more, that which was not used for longest is closed.

    """
    async with open_services("open_sessions()") as services:
        yield Sessions(services, open_sandbox, idle, limit)
