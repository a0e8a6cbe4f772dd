"""How a thread that has no Trio waits for what a Trio thread does."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, final

import trio

from ..portal import Block, Call, Delivery, Door, Portal, Work, enter_now
from ._deadlines import current_deadline

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

#: Runs bound how many of their functions are called at a time, and nothing else of ours is to wait for those.
_NO_LIMIT: Final = float("inf")


class BlockingDoor(Door[T]):
    """An object that lives in a Trio thread, for threads that wait for what it does."""

    __slots__ = ()

    def _call(self, function: Callable[[], Awaitable[R]]) -> R:
        done = threading.Event()
        result = Delivery[R](done.set)
        call = Call(function, result, deadline=current_deadline())
        self._portal.check()
        with _ended_when_interrupted(self._portal, call, done):
            self._portal.submit(call, threading.current_thread())
            done.wait()
        return result.take()

    def _next(self, function: Callable[[], Awaitable[R]]) -> R:
        try:
            return self._call(function)
        except StopAsyncIteration:
            raise StopIteration from None

    def _now(self, function: Callable[[], R]) -> R:
        return self._portal.now(function, threading.current_thread())

    def _block(
        self, open_inner: Callable[[], AbstractAsyncContextManager[S]], convert: Callable[[Portal, S], R]
    ) -> AbstractContextManager[R]:
        return _Block(self._portal, open_inner(), convert)

    def _block_now(
        self, open_inner: Callable[[], AbstractContextManager[S]], convert: Callable[[Portal, S], R]
    ) -> AbstractContextManager[R]:
        return _Block(self._portal, enter_now(open_inner()), convert)

    def _functions(
        self, functions: Mapping[str, Callable[..., object]] | None
    ) -> Mapping[str, Callable[..., object]] | None:
        return call_in_threads(functions)


def open_root(
    open_inner: Callable[[], AbstractAsyncContextManager[S]], convert: Callable[[Portal, S], R]
) -> AbstractContextManager[R]:
    """Return a block that has a Trio thread of its own, for as long as it is open."""
    return _Block(None, open_inner(), convert)


def open_beside(
    owner: BlockingDoor[Any],
    open_inner: Callable[[], AbstractAsyncContextManager[S]],
    convert: Callable[[Portal, S], R],
) -> AbstractContextManager[R]:
    """Return a block in the Trio thread that *owner* lives in."""
    return owner._block(open_inner, convert)  # pyright: ignore[reportPrivateUsage]


@final
class _Block(AbstractContextManager[R], Generic[S, R]):
    """A block that a thread enters and leaves; in the Trio thread one task does both."""

    def __init__(
        self, portal: Portal | None, manager: AbstractAsyncContextManager[S], convert: Callable[[Portal, S], R]
    ) -> None:
        self._is_root = portal is None
        self._portal = portal or Portal()
        self._manager = manager
        self._convert = convert
        self._work: Block[S] | None = None
        self._over = threading.Event()  # a root is over when its thread is
        self._finished = Delivery[bool](_do_nothing if self._is_root else self._over.set)

    def __enter__(self) -> R:
        if self._work is not None:
            raise RuntimeError("this block was entered before: call the function that made it again, for another one")
        entered = threading.Event()
        value = Delivery[S](entered.set)
        self._work = Block(self._manager, value, self._finished, deadline=current_deadline())
        self._portal.check()
        with _ended_when_interrupted(self._portal, self._work, self._over):
            if self._is_root:
                self._portal.start(self._work, threading.current_thread(), self._over.set)
            else:
                self._portal.submit(self._work, threading.current_thread())
            entered.wait()
            if value.failed:
                self._over.wait()
        return self._convert(self._portal, value.take())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        work = self._work
        assert work is not None
        if self._portal.forked and error is not None:
            return None  # it ends this process, as a rule, and nothing here is this process's
        self._portal.check()
        with _ended_when_interrupted(self._portal, work, self._over):
            self._portal.tell(lambda: work.leave((kind, error, traceback)))
            self._over.wait()
        return self._finished.take()


@contextmanager
def _ended_when_interrupted(portal: Portal, work: Work, over: threading.Event) -> Generator[None]:
    """Have *work* end when Ctrl-C comes in a block, and wait for that, which is bounded. A second Ctrl-C ends the waiting.

    Other handlers of signals may raise, too.
    """
    try:
        yield
    except BaseException:
        portal.abandon(work)
        over.wait()
        raise


def call_in_threads(
    functions: Mapping[str, Callable[..., object]] | None,
) -> Mapping[str, Callable[..., object]] | None:
    """Return *functions* as async ones that call the same in threads, where they may block.

    A run that ends does not wait for them. What is no mapping of functions is returned as it is, to be refused as such.
    """
    if not isinstance(functions, Mapping):
        return functions
    named = dict(functions)
    for name, function in named.items():
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"`functions[{name!r}]` must not be async here, where nothing is awaited; see trio_sandbox.aio"
            )
    limiter = trio.CapacityLimiter(_NO_LIMIT)

    def in_thread(function: Callable[..., object]) -> Callable[..., Awaitable[object]]:
        async def call(*arguments: object, **options: object) -> object:
            return await trio.to_thread.run_sync(
                partial(function, *arguments, **options), abandon_on_cancel=True, limiter=limiter
            )

        return call

    return {name: in_thread(function) if callable(function) else function for name, function in named.items()}


def _do_nothing() -> None:
    """For a result that nobody waits for by itself."""
