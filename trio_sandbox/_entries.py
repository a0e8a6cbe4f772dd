"""Doors into the library: what is said to who comes without Trio, or not by ``async with``."""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Final, NoReturn, ParamSpec, TypeVar, final

import trio

from ._forked import count_block, end_if_forked, forget_block

P = ParamSpec("P")
T = TypeVar("T")


#: Who asks, where that is no Trio task: a thread or a task of asyncio, which a Trio task acts for.
_asker: Final[ContextVar[object]] = ContextVar("trio_sandbox._asker")


def act_for(who: object) -> None:
    """Note in the current context that what is asked of us is asked by *who*, unless that is known already."""
    if _asker.get(None) is None:
        _asker.set(who)


def current_asker() -> object:
    """Return who asks now: the Trio task that runs, or who it acts for."""
    return _asker.get(None) or trio.lowlevel.current_task()


def asker_of(task: trio.lowlevel.Task | None) -> object:
    """Return who asks when *task* does."""
    return None if task is None else task.context.get(_asker) or task


def check_trio(what: str) -> None:
    """Refuse to go on outside of Trio.

    Raises:
      RuntimeError: if no Trio task runs here; the message names the way.

    """
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        raise RuntimeError(f"{what} needs Trio, and {_where(what)}") from None


@final
class Home:
    """The Trio run that something of ours was opened in. Tasks of any other would break its scheduler, and their own."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    def check(self, what: str) -> None:
        """Refuse to go on anywhere else.

        Raises:
          RuntimeError: if no Trio task runs here, or one of another run; the message names the way.

        """
        try:
            is_here = trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            is_here = False
        if not is_here:
            check_trio(what)
            raise RuntimeError(
                f"{what} belongs to another call of `trio.run()` than the one that runs here, and nothing was sent: open a host "
                "in each, or pass the work on to the one that has it, by `trio.from_thread.run`"
            )


#: What `trio_sandbox.aio` and `trio_sandbox.blocking` open blocks with, as it is called here.
OPENED_BY_DOORS: Final = frozenset({"open_host()", "open_sandbox()", "open_sessions()"})


def _where(what: str) -> str:
    only_here = what.startswith(("open_", "FleetHost.", "the fleet")) and what not in OPENED_BY_DOORS
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        return (
            f"asyncio runs here: {'' if only_here else 'use trio_sandbox.aio, which has the same for asyncio, or '}start your async "
            "function by `trio.run(main)` in place of `asyncio.run(main())`"
        )
    return (
        f"no Trio runs here: {'' if only_here else 'use trio_sandbox.blocking, which has the same without async, or '}call it in an "
        "async function that you start by `trio.run(main)`"
    )


@final
class _Block(AbstractAsyncContextManager[T]):
    """An asynchronous context manager that says how to enter it to who tries otherwise."""

    def __init__(self, manager: AbstractAsyncContextManager[T], name: str) -> None:
        self._manager = manager
        self._name = name
        self._owner = 0

    # Ctrl-C comes at a checkpoint of ours, not between what we made and what would take it away again.
    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> T:
        check_trio(self._name)
        self._owner = count_block()
        try:
            return await self._manager.__aenter__()
        except BaseException:
            forget_block()
            raise

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        end_if_forked(self._owner, error)
        try:
            return await self._manager.__aexit__(kind, error, traceback)  # noqa: ASYNC102 - whose block it is bounds it
        finally:
            forget_block()

    def __enter__(self) -> NoReturn:
        self._refuse()

    def __exit__(self, *_: object) -> None:
        """Never called: without it Python would complain before `__enter__` can say what to do."""

    def __await__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"{self._name} opens a block: write `async with {self._name[:-1]}...) as ...:`, in an async function that you "
            "start by `trio.run(main)`"
        )


def open_block(function: Callable[P, AsyncGenerator[T]]) -> Callable[P, AbstractAsyncContextManager[T]]:
    """Do what `contextlib.asynccontextmanager` does, for a public function that is the first that users call."""
    manager = asynccontextmanager(function)
    name = f"{function.__qualname__}()"

    @functools.wraps(function)
    def opened(*args: P.args, **kwargs: P.kwargs) -> AbstractAsyncContextManager[T]:
        return _Block(manager(*args, **kwargs), name)

    opened.__returns_acontextmanager__ = True  # type: ignore[attr-defined] # for the documentation
    return opened
