"""A caller's deadline, on its way to the guest, which stops what was asked for by itself where we can't."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import final

import trio

from .._nurseries import hide_nursery
from ._failures import STREAM_GONE

#: Seconds past the deadline that the guest waits for us. While our event loop turns we are the ones who stop what
#: runs, as the caller's scopes say then: they may have been moved, and a cleanup may be shielded from them.
DEADLINE_SLACK = 0.5
#: Seconds after which we look again whether a deadline has moved.
_PERIOD = 1.0


@final
class TravellingDeadline:
    """The effective deadline of the task that makes it, and what the guest knows of it."""

    def __init__(self) -> None:
        self._told = trio.current_effective_deadline()

    def fields(self, grace: float = math.inf) -> dict[str, object]:
        """Return what a request has of it, with the seconds from INT to KILL where these differ."""
        seconds = self._seconds_left()
        if seconds is None:
            return {}
        if grace == math.inf:
            return {"deadline": seconds}
        return {"deadline": seconds, "grace": grace}

    def followed(
        self, owner: str, send: Callable[[dict[str, object]], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Tell the guest, by *send*, when the deadline moves within the block, and when we have taken over.

        A scope does not say that it was changed, so it is looked at again, every second or sooner, and when it ends.
        A deadline that was none at first, or has become none, stays that for the guest.
        """
        return nullcontext() if self._told == math.inf else self._followed(owner, send)

    @asynccontextmanager
    async def _followed(self, owner: str, send: Callable[[dict[str, object]], Awaitable[None]]) -> AsyncGenerator[None]:
        left = trio.Event()
        with hide_nursery(owner):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, left, send)
                try:
                    yield
                finally:
                    left.set()
                    nursery.cancel_scope.cancel(reason=f"the block of {owner} was left")

    async def _follow(  # noqa: ASYNC910 - there is a deadline at first
        self, left: trio.Event, send: Callable[[dict[str, object]], Awaitable[None]]
    ) -> None:
        try:
            while self._told < math.inf:
                remaining = self._told - trio.current_time()
                await trio.sleep(max(min(remaining / 2, _PERIOD) if remaining > DEADLINE_SLACK else remaining, 0))
                deadline = trio.current_effective_deadline()
                if deadline != self._told:
                    self._told = deadline
                    await _try_to(send, self._seconds_left())
        except trio.Cancelled:
            # The caller is cancelled. Most leave at once, and that stops it; a cleanup may take the time it likes.
            with trio.move_on_after(DEADLINE_SLACK / 2, shield=True):
                await left.wait()
            if not left.is_set():
                with trio.move_on_after(DEADLINE_SLACK, shield=True):
                    await _try_to(send, None)
            raise

    def _seconds_left(self) -> float | None:
        # No time of day, nor of any other clock: the guest's differ.
        if self._told == math.inf:
            return None
        return max(self._told - trio.current_time(), 0) + DEADLINE_SLACK


async def let_deadline_pass() -> None:
    """Wait until the caller's own scopes cancel it, if they are to about now, as the guest says.

    They may be a little late, for instance because the guest's clock is a little fast.
    """
    deadline = trio.current_effective_deadline()
    if deadline <= trio.current_time() + DEADLINE_SLACK:
        await trio.sleep_until(deadline)
    await trio.lowlevel.checkpoint()


async def _try_to(send: Callable[[dict[str, object]], Awaitable[None]], seconds: float | None) -> None:
    try:
        await send({"deadline": seconds})
    except STREAM_GONE:
        await trio.lowlevel.checkpoint()  # those who wait for the guest say why it is gone
