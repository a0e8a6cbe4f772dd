"""Trio's instruments, of which the agent has none."""

from __future__ import annotations

from collections import UserDict
from typing import Any, cast

from trio._core import _run  # pyright: ignore[reportPrivateUsage]


def look_quickly() -> None:
    """Have this run of Trio look for its instruments in a plain dict. None can be added any more.

    Trio looks two hundred times in the start of a sandbox and six times in a run of code, each time by a call into a class that is
    written in Python: one instruction in fifteen of a start. Where Trio keeps them otherwise, that is left as it is.
    """
    trio_run: Any = _run
    runner: Any = trio_run.GLOBAL_RUN_CONTEXT.runner
    kept: Any = getattr(runner, "instruments", None)
    if isinstance(kept, UserDict) and not any(cast("UserDict[str, object]", kept).values()):
        runner.instruments = {}
