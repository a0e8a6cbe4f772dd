"""The guest's clock, kept with the host's however late the guest hears of anything.

The hello tells a guest the time, and is late by as long as it takes the guest to read it: a millisecond, or half a
second where many share the processors. So the host asks for the guest's time and knows, by its own clock, when it asked
and when it was answered. How far the guest is off is known to half of that, and corrected by a step, which is the
same however late it is read. See `trio_sandbox.guest.agent.clock`; the arithmetic is that of RFC 5905 (NTP), and of
Marzullo's intersections.
"""

from __future__ import annotations

import time
from typing import Final, final

import trio

from ..wire import Channel, StreamLimitError, StreamResetError, receive_up_to

#: Nanoseconds that a clock may be off, proved, before it is put right, or else asked again.
_GOOD_ENOUGH: Final = 20_000_000
#: Seconds before the first request after the hello, a snapshot or a hand-over: they belong to the first run.
_FIRST_PAUSE: Final = 0.5
#: Seconds between two requests while nothing is proved, twice as many each time; and when all is well. Under software
#: emulation a guest's clock goes wrong by some milliseconds in a minute.
_SHORT_PAUSE, _LONG_PAUSE = 0.05, 60.0
#: A clock that is still wrong after so many steps is told wrong, or somebody in the guest sets it as well. It is left alone
#: for the long pause, or until it was disturbed.
_MOST_STEPS: Final = 5
#: Seconds between two looks at our own clock, which somebody may set, or which went on while this host was suspended.
_LOOK: Final = 5.0
#: Seconds for an answer: a later one proves nothing of use. And for that to a step, which should not come while we
#: go on without it.
_PATIENCE, _STEP_PATIENCE = 0.5, 10.0
_ANSWER_BYTES: Final = 8
_SECOND: Final = 10**9


@final
class ClockComparison:
    """How far another clock is off, as far as exchanges with its owner prove. Times are nanoseconds; no I/O."""

    def __init__(self) -> None:
        self._known: tuple[int, int] | None = None

    @property
    def error(self) -> int | None:
        """The most that the other clock may be off, either way; None before the first exchange."""
        return None if self._known is None else max(map(abs, self._known))

    def exchanged(self, sent: int, told: int, received: int) -> None:
        """Take an exchange: *told* was the other's time at some moment between *sent* and *received*, of ours."""
        if received < sent:
            return  # Our clock was set back meanwhile.
        low, high = told - received, told - sent
        if self._known is not None:
            # Both are true, so what they have in common is, unless a clock was set meanwhile: then the last word counts.
            common = max(low, self._known[0]), min(high, self._known[1])
            if common[0] <= common[1]:
                low, high = common
        self._known = low, high

    @property
    def step(self) -> int:
        """How far the other clock had better be set forward: 0 if it is right, or if not enough is known to do better."""
        if self._known is None:
            return 0
        low, high = self._known
        worst = max(abs(low), abs(high))
        # Half of the interval is what it could be off afterwards.
        afterwards = (high - low) // 2
        better = afterwards <= worst // 2 or afterwards < _GOOD_ENOUGH
        return -((low + high) // 2) if better and worst > _GOOD_ENOUGH else 0

    def stepped(self, step: int) -> None:
        """Take that the other clock has been set forward by *step*, since the last exchange."""
        if self._known is not None:
            low, high = self._known
            self._known = low + step, high + step


@final
class GuestClock:
    """Keeps the clock of one guest while `serve` runs."""

    def __init__(self) -> None:
        self._bound: float | None = None
        self._disturbed = trio.Event()

    @property
    def bound(self) -> float | None:
        """Seconds that the clock was off at most when it was last compared with ours, as that proved; None: not yet."""
        return self._bound

    def disturb(self) -> None:
        """Say that the clock may have become wrong: it is compared again soon."""
        self._bound = None
        self._disturbed.set()
        self._disturbed = trio.Event()

    async def serve(  # noqa: ASYNC910 - it sleeps first
        self, guest: Channel, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Keep the clock right until the channel fails. What the guest makes of it is its own affair: no answer is an error."""
        task_status.started()
        try:
            while True:
                disturbed = self._disturbed
                await trio.sleep(_FIRST_PAUSE)
                await self._put_right(guest, disturbed)
                await _wait(disturbed)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The channel's own service says so.

    async def _put_right(self, guest: Channel, disturbed: trio.Event) -> None:
        comparison, pause, steps = ClockComparison(), _SHORT_PAUSE, 0
        while True:
            step = comparison.step
            told = await _exchange(guest, step)
            if told is not None:
                # The answer is of after the step.
                comparison.stepped(step)
                comparison.exchanged(*told)
            elif step:
                comparison = ClockComparison()  # It was made, or not.
            if disturbed.is_set():
                return
            error = comparison.error
            self._bound = None if error is None else error / _SECOND
            if error is not None and error <= _GOOD_ENOUGH:
                return
            steps += bool(step)
            if steps >= _MOST_STEPS:
                return
            await trio.sleep(pause)
            pause = min(2 * pause, _LONG_PAUSE)


async def _exchange(guest: Channel, step: int) -> tuple[int, int, int] | None:
    """Ask the guest for the time, have it make a *step* first, and return what `ClockComparison` takes; None: no answer."""
    header: dict[str, object] = {"service": "clock"}
    if step:
        header["step"] = step
    with trio.move_on_after(_STEP_PATIENCE if step else _PATIENCE):
        try:
            sent = time.time_ns()
            async with guest.open_stream(header, flush=True) as stream:
                answer = await receive_up_to(stream, _ANSWER_BYTES + 1)
            received = time.time_ns()
            if len(answer) == _ANSWER_BYTES:
                return sent, int.from_bytes(answer, "big"), received
        except (StreamResetError, StreamLimitError):
            await trio.lowlevel.checkpoint()
    return None


async def _wait(disturbed: trio.Event) -> None:
    """Wait until the guest's clock may have become wrong."""
    await trio.lowlevel.checkpoint()
    ours = time.time() - trio.current_time()
    deadline = trio.current_time() + _LONG_PAUSE
    while trio.current_time() < deadline and abs(time.time() - trio.current_time() - ours) < _GOOD_ENOUGH / _SECOND:
        with trio.move_on_after(_LOOK):
            await disturbed.wait()
            return
