"""Saying on standard error what went wrong."""

from __future__ import annotations

import contextlib
import sys
from typing import cast

from .._quote import escape

#: Before each further line of a message: none of ours starts so far to the right, so none can be feigned.
_INDENT = "\n" + 6 * " "


def complain(message: str) -> None:
    """Print one message of ours."""
    _print(f"trio-sandbox: {printable(message)}")


def complain_about(exc: BaseException) -> None:
    """Print what happened and why, without tracebacks; of a group, each thing that happened."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", exc).exceptions:
            complain_about(inner)
        return
    complain(_describe(exc))
    cause = exc.__cause__
    while cause is not None:
        _print(f"  because: {printable(_describe(cause))}")
        cause = cause.__cause__


def printable(text: str) -> str:
    """Make *text* fit to be shown on a terminal.

    It may quote a guest. Whatever is no character to be seen is written as an escape sequence: a terminal would take
    it for a command, or show other text than there is. A line that is not the first is indented.
    """
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    return _INDENT.join(escape(line.expandtabs()) for line in lines)


def one_line(text: str) -> str:
    """Make *text* fit to be shown on a terminal, in one line."""
    return printable(text.replace("\n", " "))


def _describe(exc: BaseException) -> str:
    return str(exc) or repr(exc)


def _print(line: str) -> None:
    # Where nobody reads our standard error, there is nobody left to be told.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
