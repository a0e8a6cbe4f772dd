"""Saying on standard error what went wrong."""

from __future__ import annotations

import re
import sys
from typing import cast

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def complain(message: str) -> None:
    """Print one message of ours."""
    _print(f"trio-sandbox: {message}")


def complain_about(exc: BaseException) -> None:
    """Print what happened and why, without tracebacks; of a group, each thing that happened."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", exc).exceptions:
            complain_about(inner)
        return
    complain(str(exc) or repr(exc))
    cause = exc.__cause__
    while cause is not None:
        _print(f"  because: {str(cause) or repr(cause)}")
        cause = cause.__cause__


def _print(text: str) -> None:
    # A message may quote the guest's console, and what a hostile guest says must not reach a
    # terminal as commands to it.
    shown = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text.replace("\r\n", "\n"))
    print(shown, file=sys.stderr, flush=True)
