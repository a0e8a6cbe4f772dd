"""What the host of a run asks for while that waits for its turn, runs and ends."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from typing import final

import trio

from .interpreter import REMINDERS, Interpreter
from .processes import BadRequestError, parse_seconds, receive_before
from .run import Run


@final
class Attendant:
    """Obeys the host of one run until that ends the stream, and stops the run at its deadline.

    A run that no interpreter has taken yet is withdrawn: there is nothing to interrupt or to kill. Nor is there where an
    interpreter is through with it, and only its last output is still to be sent.

    Args:
      run: The run.
      find: Finds the interpreter that has a run now; None: it waits, or is over.
      waits: It waits for one, within the block of `waiting`.

    """

    def __init__(self, run: Run, find: Callable[[Run], Interpreter | None], *, waits: bool) -> None:
        self._run = run
        self._find = find
        self.waiting: trio.CancelScope | None = trio.CancelScope() if waits else None
        """Cancelled when the run is withdrawn; None once an interpreter has taken it."""
        self._reminder = math.inf
        """When the run is to be reminded of its interrupt."""
        self._pauses: Iterator[float] = iter(())

    @property
    def waits(self) -> bool:
        """Whether no interpreter has taken the run yet."""
        return self.waiting is not None

    async def attend(self) -> None:
        """Carry what a run takes that an interpreter has, and obey its host."""
        run = self._run
        if not run.has_streams:
            await self.obey()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.carry)
            await self.obey()
            nursery.cancel_scope.cancel(reason="the run is over")

    async def obey(self) -> None:
        """Take requests until the host ends the stream, and then make sure that the run is over."""
        run = self._run
        try:
            while True:
                try:
                    request = await receive_before(min(run.deadline, self._reminder), run.records)
                except trio.TooSlowError:
                    if trio.current_time() < run.deadline:
                        self._remind()
                    else:
                        self._expire()
                    continue
                if request is None:
                    return
                self._grant(request)
        except BadRequestError as exc:
            run.records.stream.reset(str(exc))
        except trio.ClosedResourceError:
            if not run.over.is_set():  # its end closes the stream
                raise
        finally:
            if not run.over.is_set() and not run.abandoned:
                run.given_up = True
                self._kill()
                with trio.CancelScope(shield=True):
                    await run.over.wait()

    def _grant(self, request: dict[str, object]) -> None:
        match request:
            case {"interrupt": True}:
                self._interrupt()
            case {"kill": True}:
                self._kill()
            case {"deadline": seconds}:
                seconds_left = parse_seconds(seconds, "deadline")
                if not self._run.interrupted:
                    self._run.deadline = trio.current_time() + seconds_left
            case _:
                raise BadRequestError(f"not a request to a run: {request!r:.80}")

    @property
    def _ended(self) -> bool:
        return not self.waits and self._find(self._run) is None

    def _interrupt(self) -> None:
        if self._ended:
            return
        self._run.interrupted = True
        self._run.stopped = -signal.SIGINT
        self._run.deadline = trio.current_time() + self._run.grace
        if (interpreter := self._find(self._run)) is None:
            self._withdraw()
        else:
            interpreter.interrupt()
            self._pauses = iter(REMINDERS)
            self._reminder = trio.current_time() + next(self._pauses)

    def _remind(self) -> None:
        self._reminder += next(self._pauses, math.inf)
        if (interpreter := self._find(self._run)) is not None:
            interpreter.remind()

    def _kill(self) -> None:
        if self._ended:
            return
        self._run.stopped = -signal.SIGKILL
        if (interpreter := self._find(self._run)) is None:
            self._withdraw()
        else:
            interpreter.kill()

    def _withdraw(self) -> None:
        assert self.waiting is not None
        self.waiting.cancel(reason="the run is not wanted any more")

    def _expire(self) -> None:
        """Do what the host would do now."""
        self._run.deadline = math.inf
        if self._ended:
            return
        if self._run.interrupted:
            self._kill()
        else:
            self._run.expired = True
            self._interrupt()
