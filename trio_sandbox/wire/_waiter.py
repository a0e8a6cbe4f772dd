"""Where a task waits for another one of the same channel."""

from __future__ import annotations

from collections.abc import Callable

import trio
from outcome import Error, Value


class Waiter:
    """A place where at most one task waits to be woken; a lighter `trio.Event` that can be used again."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    def __bool__(self) -> bool:
        return self._task is not None

    async def wait(self, on_cancel: Callable[[], object] | None = None) -> None:
        """Wait for `wake` or `fail`. Always a checkpoint; cancelled, it is as if nobody had waited.

        *on_cancel* is called at the moment of a cancellation: the task has its turn later, and others may have theirs before.
        """
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            if on_cancel is not None:
                on_cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        """Let the task that waits, if any, go on."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task, Value(None))

    def fail(self, error: BaseException) -> None:
        """Raise *error* in the task that waits, if any."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task, Error(error))
