"""Saying on standard error what went wrong."""

from __future__ import annotations

import sys
from typing import cast


def complain(message: str) -> None:
    """Print one message of ours."""
    print(f"trio-sandbox: {message}", file=sys.stderr, flush=True)


def complain_about(exc: BaseException) -> None:
    """Print what happened and why, without tracebacks; of a group, each thing that happened."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", exc).exceptions:
            complain_about(inner)
        return
    complain(str(exc) or repr(exc))
    cause = exc.__cause__
    while cause is not None:
        print(f"  because: {cause or repr(cause)}", file=sys.stderr, flush=True)
        cause = cause.__cause__
