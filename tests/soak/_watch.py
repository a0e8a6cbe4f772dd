"""Bounds on operations, with what everybody was doing when one hung."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import trio

from trio_sandbox._nurseries import hide_nursery


class HungError(Exception):
    """An operation did not come back."""


async def bounded(what: str, operation: Callable[[], Awaitable[None]], seconds: float, *, by_deadline: bool) -> None:
    """Await *operation*, for so many seconds at most.

    Args:
      what: For the message.
      operation: What to do.
      seconds: How long it may take.
      by_deadline: Let its tasks have a deadline, which goes along to the guest; otherwise they are cancelled from outside.

    Raises:
      HungError: if it took longer.

    """
    stacks = ""

    async def cancel() -> None:
        nonlocal stacks
        await trio.sleep(seconds if not by_deadline else seconds * 0.99)
        stacks = "\n".join(describe_tasks())
        if not by_deadline:
            scope.cancel(reason="it hung")

    limit = trio.CancelScope()
    with hide_nursery("the soak"), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            if by_deadline:
                limit.deadline = trio.current_time() + seconds
            with limit:
                await operation()
            nursery.cancel_scope.cancel(reason="it came back")
    if limit.cancelled_caught or stacks:
        raise HungError(f"{what} was not back after {seconds:g} s. What the tasks waited for:\n{stacks}")


def all_tasks() -> Iterator[trio.lowlevel.Task]:
    """Every task of this Trio run."""
    root = trio.lowlevel.current_root_task()
    found = [] if root is None else [root]
    while found:
        task = found.pop()
        yield task
        for nursery in task.child_nurseries:
            found.extend(nursery.child_tasks)


def describe_tasks() -> list[str]:
    """Where each task waits, innermost last."""
    return [
        f"    {task.name}: "
        + " > ".join(f"{frame.f_code.co_name}:{line}" for frame, line in list(task.iter_await_frames())[-8:])
        for task in all_tasks()
    ]
