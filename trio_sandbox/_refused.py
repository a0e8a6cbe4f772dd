"""What callers are told who pass an argument that other libraries take and this one does not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

Refused = Literal["timeout", "input", "capture_output", "text", "encoding"]

_DECODE: Final = "output is bytes, which you can decode, as in `completed.stdout.decode()`"
#: What to do in place of passing each of them.
_WAYS: Final[dict[Refused, str]] = {
    "timeout": "put a deadline around it, `with trio.fail_after(seconds):`. Under asyncio it is "
    "`async with asyncio.timeout(seconds):`, and without async `with trio_sandbox.blocking.fail_after(seconds):`",
    "input": "pass bytes as `stdin`",
    "capture_output": "say `capture_stdout=True`, `capture_stderr=True` or both",
    "text": _DECODE,
    "encoding": _DECODE,
}


def check_refused(what: str, arguments: Mapping[str, object], *names: Refused) -> None:
    """Say what to do instead to callers of *what* who have passed one of *names*.

    Raises:
      TypeError: if *arguments* has one of them.

    """
    for name in names:
        if name in arguments:
            raise TypeError(f"{what} has no `{name}`, and nothing was done: {_WAYS[name]}")


def refuse(*names: Refused) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that callers may expect to take *names*.

    Its parameters stay the same, and so does its kind: a coroutine function stays one.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        what = f"{function.__name__}()"
        refused = frozenset[str](names)
        if inspect.iscoroutinefunction(function):
            coroutine_function = cast("Callable[P, Awaitable[object]]", function)

            @functools.wraps(function)
            async def wait(*args: P.args, **kwargs: P.kwargs) -> object:
                if not refused.isdisjoint(kwargs):
                    check_refused(what, kwargs, *names)
                return await coroutine_function(*args, **kwargs)

            return _marked(cast("Callable[P, T]", wait), names)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not refused.isdisjoint(kwargs):
                check_refused(what, kwargs, *names)
            return function(*args, **kwargs)

        call.__wrapped__ = inner = inspect.unwrap(function)
        if inspect.isasyncgenfunction(inner):
            call.__returns_acontextmanager__ = True  # type: ignore[attr-defined] # for the documentation
        return _marked(call, names)

    return decorate


def _marked(function: Callable[P, T], names: tuple[Refused, ...]) -> Callable[P, T]:
    function.__refuses__ = names  # type: ignore[attr-defined] # so that the other doors refuse them, too
    return function
