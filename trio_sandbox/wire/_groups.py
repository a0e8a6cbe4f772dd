"""Groups of exceptions, as nurseries raise them: the one that matters."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import trio


def besides_broken(
    exc: trio.BrokenResourceError | BaseExceptionGroup[BaseException],
) -> BaseException | None:
    """Return what *exc* says besides that a stream broke: None, a cancellation, or else all of it."""
    if not isinstance(exc, BaseExceptionGroup):
        return None
    rest = exc.split(trio.BrokenResourceError)[1]
    return exc if rest is not None and rest.split(trio.Cancelled)[1] is not None else rest


@contextmanager
def hide_nursery() -> Generator[None]:
    """Raise the one exception that happened instead of a group of one.

    The host's side has the same in a module of its own, which does not exist inside a guest.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [exc for exc in group.exceptions if not isinstance(exc, trio.Cancelled)]
        interrupts = [error for error in errors if isinstance(error, (KeyboardInterrupt, SystemExit))]
        if len(errors) > 1 and not interrupts:
            group.add_note("open_channel(): more than one of its tasks failed")
            raise
        error = (interrupts or errors or group.exceptions)[0]
        if interrupts and len(errors) > 1:
            error.__cause__ = group.derive([other for other in errors if other is not error])
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context
            del error, context, errors, interrupts
