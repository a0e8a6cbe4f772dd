"""Checks of a configuration's fields, whose messages name the field, the limit, the value and the way out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs

T = TypeVar("T")
#: More than anybody waits; some more, and it would be too much for a time.
_MOST_SECONDS = 1e15
#: What attrs calls with the object, the field and the value.
Check = Callable[[object, "attrs.Attribute[Any]", T], None]


def whole_number(lowest: int, highest: int | None = None, *, unit: str = "") -> Check[int]:
    """Make a check for whole numbers from *lowest* to *highest*; True and False are none."""
    kind = f"a whole number of {unit}" if unit else "a whole number"
    tail = f" {unit}" if unit else ""
    limits = f"at least {lowest}{tail}" if highest is None else f"from {lowest} to {highest}{tail}"

    def check(_: object, attribute: attrs.Attribute[Any], value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`{attribute.name}` must be {kind}, not {_show(value)}")
        if value < lowest or (highest is not None and value > highest):
            raise ValueError(f"`{attribute.name}` must be {limits}, not {value}")

    return check


def number(lowest: float, highest: float) -> Check[float]:
    """Make a check for numbers from *lowest* to *highest*, whole or not; True and False are none, and NaN is not between any."""

    def check(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
        _check_number(attribute, value, "a number")
        if not lowest <= value <= highest:
            raise ValueError(f"`{attribute.name}` must be from {lowest:g} to {highest:g}, not {_show(value)}")

    return check


def _check_number(attribute: attrs.Attribute[Any], value: object, kind: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{attribute.name}` must be {kind}, not {_show(value)}")


def check_seconds(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Check for a positive number of seconds; `math.inf` is one."""
    _check_number(attribute, value, "a number of seconds")
    if not value > 0:  # NaN is not, either
        raise ValueError(f"`{attribute.name}` must be a positive number of seconds, not {_show(value)}")
    if _MOST_SECONDS < value != math.inf:
        raise ValueError(
            f"`{attribute.name}` must be at most {_MOST_SECONDS:g} seconds, or math.inf, not {_show(value)}"
        )


def check_flag(_: object, attribute: attrs.Attribute[Any], value: bool) -> None:
    """Check for True or False."""
    if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`{attribute.name}` must be True or False, not {_show(value)}")


def check_text(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    """Check for text."""
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`{attribute.name}` must be str, not {_show(value)}")


def check_callable(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Check for what can be called."""
    if not callable(value):
        raise TypeError(f"`{attribute.name}` must be a function, not {_show(value)}")


def instance(kind: type[T], example: str = "") -> Check[T]:
    """Make a check for objects of one class; *example* is how to make one."""
    such_as = f", such as {example}," if example else ","

    def check(_: object, attribute: attrs.Attribute[Any], value: T) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"`{attribute.name}` must be a {kind.__name__}{such_as} not {_show(value)}")

    return check


def one_of(*choices: str) -> Check[str]:
    """Make a check for one of some texts."""
    named = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"

    def check(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
        if value not in choices:
            raise ValueError(f"`{attribute.name}` must be {named}, not {_show(value)}")

    return check


def or_none(check: Check[T]) -> Check[T | None]:
    """Make a check that None passes as well."""

    def check_unless_none(instance: object, attribute: attrs.Attribute[Any], value: T | None) -> None:
        if value is not None:
            check(instance, attribute, value)

    return check_unless_none


def to_path(value: str | os.PathLike[str], name: str, kind: str = "directory") -> Path:
    """Return a path on the host, or refuse what can't be one; *name* is what to call it, *kind* what is there."""
    text: object = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`{name}` must be a path, str or Path, not {_show(value)}")
    if not text or "\0" in text:
        raise ValueError(f"`{name}` must be the path of a {kind}, not {_show(text)}")
    return Path(text)


def _show(value: object) -> str:
    return f"{value!r:.100}"
