"""What can be soaked. To add a part, write a module with a function like `runs.soak`, and name it here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from . import cancel, crash, faults, fuzz, hostile, load, model, network, runs
from ._report import Budget, Report

#: Each has its operations counted, and what goes wrong told, in the report; it ends when the budget is used up.
PARTS: dict[str, Callable[[Budget, Report], Awaitable[None]]] = {
    "runs": runs.soak,
    "network": network.soak,
    "cancel": cancel.soak,
    "model": model.soak,
    "hostile": hostile.soak,
    "fuzz": fuzz.soak,
    "crash": crash.soak,
    "faults": faults.soak,
    "load": load.soak,
}
