"""Ctrl-C at any step of a program."""

from __future__ import annotations

import signal
from typing import final

import trio


@final
class InterruptAt(trio.abc.Instrument):
    """Presses Ctrl-C when the task `main` is about to take one of the steps *numbers*."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers
        self.steps = 0
        self.main: trio.lowlevel.Task | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count the steps."""
        if task is self.main:
            self.steps += 1
            if self.steps in self.numbers:
                signal.raise_signal(signal.SIGINT)
