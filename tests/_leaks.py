"""What tests use to show that nothing is left, wherever a cancellation struck."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import trio

#: Seconds that a test may take on the slowest machine, and anything in it that is waited for. A hang then fails by itself, with a
#: traceback of where it hung and with its cleanup done, instead of taking the whole run with it.
HANG_LIMIT = 240


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
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                children += map(int, file.read().split())
        except FileNotFoundError:
            pass  # a thread that ended: its children are another's now
    return sorted(children)


@contextmanager
def nothing_left(*directories: Path) -> Generator[None]:
    """Assert that the block leaves no descriptor, no child and no file in *directories*."""
    files = {directory: set(os.listdir(directory)) for directory in directories}
    fds, children = open_fds(), child_pids()
    try:
        yield
    finally:
        left = {fd: what for fd, what in open_fds().items() if fd not in fds}
        assert not left
        assert set(child_pids()) <= set(children)
        assert {directory: set(os.listdir(directory)) for directory in directories} == files


async def wait_until(condition: Callable[[], bool]) -> None:
    """Poll for what happens in another process, which can't tell us; the bound is for what hangs."""
    with trio.fail_after(HANG_LIMIT):
        while True:
            if condition():
                return
            await trio.sleep(0.005)


class _CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when a task, the one given or any, is about to run for the nth time."""

    def __init__(self, scope: trio.CancelScope, step: int, task: trio.lowlevel.Task | None) -> None:
        self._scope, self._task = scope, task
        self.remaining = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._task is None or task is self._task:
            self.remaining -= 1
            if self.remaining == 0:
                self._scope.cancel(reason="the step that the test wants")


async def cancel_at_step(function: Callable[[], Awaitable[object]], step: int, *, every_task: bool = False) -> int:
    """Run *function*, cancelled when its task, or with *every_task* any task, is resumed for the *step*-th time.

    Return how many steps were left before the cancellation: 0 or less if it came.
    """
    scope = trio.CancelScope()
    instrument = _CancelAtStep(scope, step, None if every_task else trio.lowlevel.current_task())
    with scope:
        trio.lowlevel.add_instrument(instrument)
        try:
            await function()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return instrument.remaining


async def count_steps(function: Callable[[], Awaitable[object]]) -> int:
    """Run *function*; return how often its task was resumed."""
    return 10_000 - await cancel_at_step(function, 10_000)


async def cancel_at_every_step(
    function: Callable[[], Awaitable[object]],
    *,
    check: Callable[[], object] = lambda: None,
    every_task: bool = False,
) -> int:
    """Run *function* again and again, cancelled when its task is resumed first, second, ... time.

    With *every_task*, cancel it when whatever task is resumed: services that run meanwhile then
    are in any state. Call *check* after each run, and await what it returns if that is awaitable; give the number of runs:
    one more than there are points to be cancelled at.
    """
    step = 0
    while True:
        step += 1
        remaining = await cancel_at_step(function, step, every_task=every_task)
        if isinstance(checking := check(), Awaitable):
            await checking
        # Not "was not cancelled": a shield may have let a cancellation pass, and later ones count.
        if remaining > 0:
            return step
