"""How a task of asyncio waits for what a Trio thread does."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, cast, final

import trio

from ..portal import Block, Call, Delivery, Door, Portal, Work, enter_now

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

#: Seconds that a function which a run has called has to end, once it is cancelled with the run.
_PATIENCE: Final = 10.0


class AioDoor(Door[T]):
    """An object that lives in a Trio thread, for tasks of asyncio."""

    __slots__ = ()

    async def _call(self, function: Callable[[], Awaitable[R]]) -> R:
        task = _current_task()
        done = _Signal()
        result = Delivery[R](done.set)
        call = Call(function, result)
        self._portal.check()
        self._portal.submit(call, task)
        await _wait(done, self._portal, call)
        return result.take()

    _next = _call

    def _now(self, function: Callable[[], R]) -> R:
        return self._portal.now(function, _asker())

    def _block(
        self, open_inner: Callable[[], AbstractAsyncContextManager[S]], convert: Callable[[Portal, S], R]
    ) -> AbstractAsyncContextManager[R]:
        return _Block(self._portal, open_inner(), convert)

    def _block_now(
        self, open_inner: Callable[[], AbstractContextManager[S]], convert: Callable[[Portal, S], R]
    ) -> AbstractAsyncContextManager[R]:
        return _Block(self._portal, enter_now(open_inner()), convert)

    def _functions(
        self, functions: Mapping[str, Callable[..., object]] | None
    ) -> Mapping[str, Callable[..., object]] | None:
        return call_in_asyncio(functions)


def open_root(
    open_inner: Callable[[], AbstractAsyncContextManager[S]], convert: Callable[[Portal, S], R]
) -> AbstractAsyncContextManager[R]:
    """Return a block that has a Trio thread of its own, for as long as it is open."""
    return _Block(None, open_inner(), convert)


def open_beside(
    owner: AioDoor[Any], open_inner: Callable[[], AbstractAsyncContextManager[S]], convert: Callable[[Portal, S], R]
) -> AbstractAsyncContextManager[R]:
    """Return a block in the Trio thread that *owner* lives in."""
    return owner._block(open_inner, convert)  # pyright: ignore[reportPrivateUsage]


@final
class _Block(AbstractAsyncContextManager[R], Generic[S, R]):
    """A block that tasks of asyncio enter and leave; in the Trio thread one task does both."""

    def __init__(
        self, portal: Portal | None, manager: AbstractAsyncContextManager[S], convert: Callable[[Portal, S], R]
    ) -> None:
        self._is_root = portal is None
        self._portal = portal or Portal()
        self._manager = manager
        self._convert = convert
        self._work: Block[S] | None = None
        self._finished: Delivery[bool] | None = None
        self._over: _Signal | None = None  # a root is over when its thread is

    async def __aenter__(self) -> R:
        if self._work is not None:
            raise RuntimeError("this block was entered before: call the function that made it again, for another one")
        task = _current_task()
        entered, self._over = _Signal(), _Signal()
        value = Delivery[S](entered.set)
        self._finished = Delivery[bool](_do_nothing if self._is_root else self._over.set)
        self._portal.check()
        self._work = Block(self._manager, value, self._finished)
        if self._is_root:
            self._portal.start(self._work, task, self._over.set)
        else:
            self._portal.submit(self._work, task)
        await _wait(entered, self._portal, self._work, self._over)
        if value.failed:
            await _wait(self._over, self._portal, self._work)
        return self._convert(self._portal, value.take())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        work, over, finished = self._work, self._over, self._finished
        assert work is not None
        assert over is not None
        assert finished is not None
        if self._portal.forked and error is not None:
            return None  # noqa: ASYNC910 - it ends this process, as a rule, and nothing here is this process's
        self._portal.check()
        self._portal.tell(lambda: work.leave((kind, error, traceback)))
        await _wait(over, self._portal, work)  # noqa: ASYNC102 - asyncio has no shields, and the guest's answer is bounded
        return finished.take()


@final
class _Signal:
    """An `asyncio.Event` that another thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        """Set it; without effect where the loop is closed, and nobody waits."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


async def _wait(signal: _Signal, portal: Portal, work: Work, over: _Signal | None = None) -> None:
    """Wait for *signal*. Cancelled: have *work* end, wait for *over* then, which is bounded, and go on as cancelled."""
    try:
        await signal.wait()
    except asyncio.CancelledError:
        portal.abandon(work)
        while True:
            try:
                await (over or signal).wait()  # noqa: ASYNC102 - as above
                break
            except asyncio.CancelledError:  # noqa: ASYNC103 - it is raised below
                continue  # noqa: ASYNC104 - the guest is asked to stop already, and no more can be done
        raise


def _current_task() -> asyncio.Task[object]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    if task is None:
        raise RuntimeError(
            "trio_sandbox.aio needs asyncio, and no task of it runs here: start your async function by `asyncio.run(main())`. "
            "Under Trio use trio_sandbox itself, and trio_sandbox.blocking without either"
        )
    return cast("asyncio.Task[object]", task)


def _asker() -> object:
    """Return the task of asyncio that runs, or the thread where none does: what needs no waiting can be asked from anywhere."""
    try:
        return _current_task()
    except RuntimeError:
        return threading.current_thread()


def call_in_asyncio(
    functions: Mapping[str, Callable[..., object]] | None,
) -> Mapping[str, Callable[..., object]] | None:
    """Return *functions* as async ones for Trio that call the same in the loop of asyncio that runs here.

    What is no mapping of functions is returned as it is, to be refused as such.
    """
    if not isinstance(functions, Mapping):
        return functions
    loop = asyncio.get_running_loop()

    def in_asyncio(function: Callable[..., object]) -> Callable[..., Awaitable[object]]:
        async def call(*arguments: object, **options: object) -> object:
            async def call_it() -> object:
                result = function(*arguments, **options)
                if inspect.isawaitable(result):
                    return await cast("Awaitable[object]", result)
                return result  # noqa: ASYNC910 - a task of asyncio's, whose function need not wait

            return await _await_in(loop, call_it)

        return call

    return {name: in_asyncio(function) if callable(function) else function for name, function in functions.items()}


async def _await_in(loop: asyncio.AbstractEventLoop, function: Callable[[], Awaitable[object]]) -> object:
    """Have a task of asyncio await what *function* returns; called in Trio. Cancelled: so is that task, and waited for."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()
    tasks: list[asyncio.Task[object]] = []

    async def run() -> object:
        return await function()

    def tell(_: asyncio.Task[object]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    def start() -> None:
        tasks.append(loop.create_task(run()))
        tasks[0].add_done_callback(tell)

    def stop() -> None:
        tasks[0].cancel()

    loop.call_soon_threadsafe(start)
    try:
        await done.wait()
    except trio.Cancelled:
        with trio.move_on_after(_PATIENCE, shield=True), contextlib.suppress(RuntimeError):  # its loop may be closed
            loop.call_soon_threadsafe(stop)
            await done.wait()
        raise
    try:
        return tasks[0].result()
    except asyncio.CancelledError:
        raise RuntimeError("the function was cancelled") from None  # noqa: ASYNC104 - by itself, not with this task


def _do_nothing() -> None:
    """For a result that nobody waits for by itself."""
