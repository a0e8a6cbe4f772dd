"""What tests use to show that nothing is left, wherever a cancellation struck."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import trio


def open_fds() -> dict[int, str]:
    """Give this process's file descriptors and what they are."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed the directory
    return found


def child_pids() -> list[int]:
    """Give this process's children, zombies included."""
    children: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            children += map(int, file.read().split())
    return sorted(children)


class _CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when the task that made this is about to run for the nth time."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self._scope, self._steps, self._task = scope, step, trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._steps -= 1
            if self._steps == 0:
                self._scope.cancel(reason="the step that the test wants")


async def cancel_at_every_step(
    function: Callable[[], Awaitable[object]], *, check: Callable[[], object] = lambda: None
) -> int:
    """Run *function* again and again, cancelled when its task is resumed first, second, ... time.

    Call *check* after each run, and give the number of runs: one more than there are points to
    be cancelled at.
    """
    step = 0
    while True:
        step += 1
        with trio.CancelScope() as scope:
            instrument = _CancelAtStep(scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                await function()
            finally:
                trio.lowlevel.remove_instrument(instrument)
        check()
        if not scope.cancelled_caught:
            return step
