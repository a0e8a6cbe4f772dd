"""What a Trio thread does for other threads: one call, or one block."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from types import TracebackType
from typing import Generic, TypeVar, final

import outcome
import trio

from .._errors import SandboxClosedError
from .._nurseries import open_services

T = TypeVar("T")

#: What a block was left with; three times None where nothing was raised.
Left = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


@final
class Delivery(Generic[T]):
    """One result, on its way from the Trio thread to who waits for it in another.

    Args:
      wake: Called once the result is there, in whatever thread that is.

    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._result: outcome.Outcome[T] | None = None

    def deliver(self, result: outcome.Outcome[T]) -> None:
        """Hand the result over; the first one counts."""
        if self._result is None:
            self._result = result
            self._wake()

    @property
    def failed(self) -> bool:
        """Whether the result is there, and an exception."""
        return isinstance(self._result, outcome.Error)

    def take(self) -> T:
        """Return the result, or raise it; once."""
        assert self._result is not None
        return self._result.unwrap()


def block_was_left() -> SandboxClosedError:
    """Return the error of what is asked of a portal that has ended, or ends meanwhile."""
    return SandboxClosedError("the block of the host or sandbox was left; open another one")


class Work(abc.ABC):
    """Something that a task of the Trio thread does for another thread.

    Args:
      deadline: When it is to be over, on the clock of `time.perf_counter`.

    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.begun: bool = False
        """A task has it, or it was cancelled before; only the Trio thread looks at this, and changes it."""
        self._deadline = deadline
        self._scope = trio.CancelScope()
        self._abandoned = False

    async def serve(self) -> None:  # noqa: ASYNC910 - the task has nothing else to do
        """Do it, in a task of its own. Whatever comes of it is delivered, and nothing is raised but `trio.Cancelled`."""
        try:
            with self._scope:
                if self._deadline != math.inf:
                    self._scope.deadline = trio.current_time() + self._deadline - time.perf_counter()
                await self._do()
        except trio.Cancelled:
            raise
        except BaseException as exc:  # noqa: BLE001 - it is for who waits
            self.fail(exc)
        finally:
            self._stopped()

    def _stopped(self) -> None:
        """Say why there is no result, unless there is one."""
        if self._scope.cancelled_caught and not self._abandoned:
            self.fail(TimeoutError("the deadline passed; what was under way was stopped, in the guest as well"))
        else:
            self.fail(block_was_left())  # who waited and was interrupted does not look at it

    def abandon(self) -> None:
        """Have it end; called in the Trio thread."""
        self._abandoned = True
        self._scope.cancel(reason="nobody waits for it any more")

    @abc.abstractmethod
    async def _do(self) -> None:
        """Do the work, and deliver its results."""

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """Deliver *error* to who still waits for something."""


@final
class Call(Work, Generic[T]):
    """One call of an async function.

    Args:
      function: What to call.
      result: Where its result goes.
      deadline: As of `Work`.

    """

    def __init__(
        self, function: Callable[[], Awaitable[T]], result: Delivery[T], *, deadline: float = math.inf
    ) -> None:
        super().__init__(deadline)
        self._function = function
        self._result = result

    async def _do(self) -> None:
        self._result.deliver(outcome.Value(await self._function()))

    def fail(self, error: BaseException) -> None:
        self._result.deliver(outcome.Error(error))


@final
class Look(Work, Generic[T]):
    """One call of a function that does not wait for anything: it has a result in any case, also if Trio ends meanwhile.

    Args:
      function: What to call, in the Trio thread.
      result: Where its result goes.

    """

    def __init__(self, function: Callable[[], T], result: Delivery[T]) -> None:
        super().__init__()
        self._function = function
        self._result = result
        self._asked = False

    async def _do(self) -> None:  # noqa: ASYNC910 - there is nothing to wait for
        self._ask()

    def fail(self, error: BaseException) -> None:
        self._ask()

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._result.deliver(outcome.capture(self._function))


@final
class Block(Work, Generic[T]):
    """One block of an async context manager, which is entered and left in the same task.

    Its deadline counts in all of it, as that of a cancel scope around it would.

    Args:
      manager: What is entered.
      entered: Where its value goes.
      finished: Where it goes, once it is left, whether the exception that came out of the block was dealt with.
      deadline: As of `Work`.

    """

    def __init__(
        self,
        manager: AbstractAsyncContextManager[T],
        entered: Delivery[T],
        finished: Delivery[bool],
        *,
        deadline: float = math.inf,
    ) -> None:
        super().__init__(deadline)
        self._manager = manager
        self._entered = entered
        self._finished = finished
        self._leaving = trio.Event()
        self._left: Left = (None, None, None)

    async def _do(self) -> None:
        value = await self._manager.__aenter__()
        self._entered.deliver(outcome.Value(value))
        # Whoever is in the block leaves it, and nobody else. That thread is not to be told from here that something is over.
        with trio.CancelScope(shield=True):
            await self._leaving.wait()
        error = self._left[1]
        try:
            suppressed = await self._manager.__aexit__(*self._left)
        except BaseException as exc:  # noqa: ASYNC103 - what the body raised goes on where it comes from
            if exc is not error:
                raise
            suppressed = False
        self._finished.deliver(outcome.Value(bool(suppressed)))

    def _stopped(self) -> None:
        if self._left[1] is not None:
            self._finished.deliver(outcome.Value(False))  # what came out of the body goes on, and says more
        super()._stopped()

    def leave(self, left: Left) -> None:
        """Have it left; called in the Trio thread."""
        self._left = left
        self._leaving.set()

    def abandon(self) -> None:
        super().abandon()
        self._leaving.set()

    def fail(self, error: BaseException) -> None:
        self._entered.deliver(outcome.Error(error))
        self._finished.deliver(outcome.Error(error))


@asynccontextmanager
async def enter_now(manager: AbstractContextManager[T]) -> AsyncGenerator[T]:  # noqa: ASYNC910 - as where it comes from
    """Make of a context manager one that a Trio task enters and leaves."""
    with manager as value:
        yield value


@asynccontextmanager
async def start_service(function: Callable[..., Awaitable[None]], *args: object, kind: type[T]) -> AsyncGenerator[T]:
    """Run for a block what would go in ``nursery.start()``, and yield what it starts with, which is a *kind*."""
    async with open_services(f"{getattr(function, '__qualname__', 'the block')}()") as services:
        started: object = await services.start(function, *args)
        assert isinstance(started, kind)
        yield started
