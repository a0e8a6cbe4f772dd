"""What every object of a door is: one of ours, for Trio, and the portal to where it lives."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from ._portal import Portal

T = TypeVar("T")


class Door(Generic[T]):
    """An object that a program without Trio holds in place of one that lives in a Trio thread."""

    __slots__ = ("_inner", "_portal")

    def __init__(self, portal: Portal, inner: T) -> None:
        self._portal = portal
        self._inner = inner

    def __repr__(self) -> str:
        room = type(self).__module__
        return repr(self._inner).replace("<trio_sandbox.", f"<{room}.", 1)


def plain(value: object) -> Any:
    """Return what the object of a door stands for; anything else as it is."""
    if isinstance(value, Door):
        return cast("Door[object]", value)._inner  # pyright: ignore[reportPrivateUsage]
    return value


def plain_all(values: object) -> Any:
    """Do what `plain` does to each of a list or tuple of arguments."""
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in cast("list[object]", values)]
    return values
