"""Nurseries whose background tasks outlive the body, and which don't show that they are there."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeVar

import trio

T = TypeVar("T")


@contextmanager
def hide_nursery(owner: str) -> Generator[None]:
    """Raise the one exception that happened instead of a group of one.

    Only our own layer is taken off: a group that the body raised passes whole. Where two parts
    failed, nothing is dropped: the group is raised with a note that names *owner*. Who interrupts the
    program wants it to end: that exception is raised, and what failed besides is its cause.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [exc for exc in group.exceptions if not isinstance(exc, trio.Cancelled)]
        for exc in errors:
            if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                # Itself and not a copy: contextlib gives it back the traceback that it came with, without our frames.
                if len(errors) > 1:
                    exc.__cause__ = group.derive([other for other in errors if other is not exc])
                raise_keeping_context(exc)
        if len(errors) > 1:
            group.add_note(f"{owner}: more than one of its tasks failed")
            raise
        raise_keeping_context(errors[0] if errors else group.exceptions[0])


def raise_keeping_context(exc: BaseException) -> NoReturn:
    """Raise *exc* without the exception that is being handled becoming its context."""
    context = exc.__context__
    try:
        raise exc
    finally:
        exc.__context__ = context
        del exc, context


class _ShieldOnStarted:
    """A task status that shields its task from the moment it says it has started.

    The task does it itself, between two of its checkpoints: a shield put up by somebody else could
    undo a cancellation that the task is just about to deliver, which Trio does not expect.
    """

    def __init__(self, task_status: trio.TaskStatus[object], scope: trio.CancelScope) -> None:
        self._task_status = task_status
        self._scope = scope

    def started(self, value: object = None) -> None:
        # If start() is cancelled already, Trio leaves the task where it is and waits for its end.
        self._scope.shield = trio.current_effective_deadline() != -math.inf
        self._task_status.started(value)


class Services:
    """Background tasks that a cancellation from outside does not reach before the body has left.

    Without this, a cancelled scope hits the tasks that the body's own cleanup needs at the same
    moment as the body. They are ended in reverse order of their start, one after the other.
    """

    def __init__(self, nursery: trio.Nursery, owner: str) -> None:
        self._nursery = nursery
        self._owner = owner
        self._running: dict[trio.CancelScope, trio.Event] = {}
        self._stopped = False

    @trio.lowlevel.enable_ki_protection  # between the two: what is listed has a task that takes it off the list
    async def start(self, serve: Callable[..., Awaitable[object]], *args: object) -> Any:
        """Like `trio.Nursery.start`; until `started()` the caller's scopes apply to the task.

        Raises:
          trio.ClosedResourceError: if the block was left before the service had started; it has ended.

        """
        if self._stopped:
            raise trio.ClosedResourceError(f"the block of {self._owner} was left")
        scope, ended = trio.CancelScope(), trio.Event()
        self._running[scope] = ended
        try:
            value: Any = await self._nursery.start(self._run, scope, ended, serve, args)
        except RuntimeError as exc:
            if scope.cancelled_caught:  # that it "exited without calling task_status.started()" is our doing
                raise trio.ClosedResourceError(f"the block of {self._owner} was left") from exc
            raise
        return value

    # Ctrl-C is for the main task, which is told at its next checkpoint: it must not cut short what a service does at its end.
    @trio.lowlevel.enable_ki_protection
    async def _run(
        self,
        scope: trio.CancelScope,
        ended: trio.Event,
        serve: Callable[..., Awaitable[object]],
        args: tuple[object, ...],
        *,
        task_status: trio.TaskStatus[object],
    ) -> None:
        try:
            with scope:
                await serve(*args, task_status=_ShieldOnStarted(task_status, scope))
        finally:
            self._running.pop(scope, None)  # it may have ended by itself, one of thousands
            ended.set()

    @trio.lowlevel.enable_ki_protection
    async def stop(self) -> None:  # noqa: ASYNC910 - it has one, which Ctrl-C may break off
        """End every service, the youngest first; their own cleanup bounds how long it takes.

        Ctrl-C waits for that, too: a service that nobody ends would hold up the program for ever.
        """
        self._stopped = True
        interrupt: KeyboardInterrupt | None = None
        with trio.CancelScope(shield=True):  # noqa: ASYNC912 - as above
            try:
                await trio.lowlevel.checkpoint()
            except KeyboardInterrupt as exc:
                interrupt = exc
            while self._running:
                scope, ended = next(reversed(self._running.items()))
                scope.cancel(reason=f"the block of {self._owner} was left")
                try:
                    await ended.wait()
                except KeyboardInterrupt as exc:
                    interrupt = exc
        if interrupt is not None:
            raise interrupt


@asynccontextmanager
@trio.lowlevel.enable_ki_protection
async def open_services(owner: str) -> AsyncGenerator[Services]:
    """Yield `Services` for a block; leaving it, however, ends them after the body.

    A service that raises cancels the body and its exception comes out of the block.
    *owner* is the public name to put into messages, for instance ``"open_qmp()"``.
    """
    with hide_nursery(owner):
        async with trio.open_nursery() as nursery:
            services = Services(nursery, owner)
            try:
                yield services
            finally:
                await services.stop()  # noqa: ASYNC102 - it shields itself, and each service bounds its own end


@trio.lowlevel.enable_ki_protection
async def run_in_own_task(function: Callable[[], Awaitable[T]]) -> T:
    """Run *function* where Ctrl-C comes as a cancellation, and not before a shield is left.

    In the main task it is raised by whatever that waits for, shielded or not.
    """
    results: list[T] = []

    async def run() -> None:
        results.append(await function())

    with hide_nursery("run_in_own_task()"):
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - the task is what is wanted
            nursery.start_soon(run)
    return results[0]
