"""Deadlines for code that has no cancel scopes."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, final

#: On the clock of `time.perf_counter`.
_deadline: Final[ContextVar[float]] = ContextVar("trio_sandbox.blocking._deadline", default=math.inf)


def current_deadline() -> float:
    """Return the deadline that is in force, on the clock of `time.perf_counter`; `math.inf` where there is none."""
    return _deadline.get()


@final
class Expiry:
    """Says of a block of `move_on_after` whether its deadline cut it short."""

    def __init__(self) -> None:
        self.expired: bool = False
        """Whether the deadline ended what was under way; known when the block is left."""

    def __repr__(self) -> str:
        return f"<trio_sandbox.blocking.Expiry: {'expired' if self.expired else 'in time'}>"


@contextmanager
def fail_after(seconds: float) -> Generator[None]:
    """Stop what a sandbox does for this thread when the block has lasted that long, by a `TimeoutError`.

        with fail_after(10):
            sandbox.run(code)

    It works on calls into this library: one that is under way is stopped, in the guest as well, and one that comes later
    does not begin. Your own code between them is not stopped. Blocks may be nested; the earliest deadline counts.

    Args:
      seconds: How long, 0 or more; `math.inf` is no limit.

    Raises:
      TypeError, ValueError: if *seconds* is no such number.
      TimeoutError: if the deadline passed while a call was under way, or before one.

    """
    with _in_force(_deadline_in(seconds)):
        yield


@contextmanager
def move_on_after(seconds: float) -> Generator[Expiry]:
    """Do what `fail_after` does, and leave the block without an error when the deadline passes.

        with move_on_after(10) as limit:
            sandbox.run(code)
        if limit.expired:
            print(sandbox.last_output.stdout)

    Args:
      seconds: As for `fail_after`.

    """
    expiry = Expiry()
    deadline = _deadline_in(seconds)
    earlier = current_deadline() < deadline
    try:
        with _in_force(deadline):
            yield expiry
    except TimeoutError:
        # One that comes of something else comes before the deadline; one of an earlier deadline is for the block that has it.
        if earlier or time.perf_counter() < deadline:
            raise
        expiry.expired = True


def _deadline_in(seconds: float) -> float:
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`seconds` must be a number of seconds, not {seconds!r:.100}")
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"`seconds` must be 0 or more, not {seconds!r}")
    return time.perf_counter() + seconds


@contextmanager
def _in_force(deadline: float) -> Generator[None]:
    token = _deadline.set(min(deadline, _deadline.get()))
    try:
        yield
    finally:
        _deadline.reset(token)
