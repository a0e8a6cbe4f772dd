"""Showing progress on standard error: bars where rich and a terminal are there, else lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TextIO

from .._config import Progress
from ._report import printable

ShowProgress = Callable[[Progress], None]


def _show_nothing(progress: Progress) -> None:
    """Be quiet."""


class LineProgress:
    """A line for each new step, which a log file can take as well."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._last: dict[str, str] = {}

    def __call__(self, progress: Progress) -> None:
        """Show the step, unless only its fraction changed."""
        if self._last.get(progress.stage) != progress.message:
            self._last[progress.stage] = progress.message
            print(printable(f"{progress.stage}: {progress.message}"), file=self._output, flush=True)


@contextmanager
def open_progress(*, quiet: bool, output: TextIO | None = None) -> Generator[ShowProgress]:
    """Yield what to call with each `Progress`; leaving the block clears the bars away."""
    stream: TextIO = sys.stderr if output is None else output
    if quiet:
        yield _show_nothing
    elif stream.isatty():
        with _open_bars(stream) as show:
            yield show
    else:
        yield LineProgress(stream)


@contextmanager
def _open_bars(output: TextIO) -> Generator[ShowProgress]:
    try:
        # The extra `cli`. Without it everything works, and progress comes in lines.
        from rich import console, progress as bars
    except ImportError:
        yield LineProgress(output)
        return
    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}", style="bold", markup=False),
        bars.BarColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[message]}", markup=False),  # nothing in it is ours to obey
    )

    class Terminal(console.Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave the cursor alone: who ends us at once leaves nobody to show it again."""
            return False

    terminal = Terminal(file=output)
    if terminal.is_dumb_terminal:  # where bars would not be shown at all
        yield LineProgress(output)
        return
    with bars.Progress(*columns, console=terminal, transient=True) as display:
        tasks: dict[str, bars.TaskID] = {}

        def show(progress: Progress) -> None:
            task = tasks.get(progress.stage)
            if task is None:
                task = tasks[progress.stage] = display.add_task(printable(progress.stage), total=None, message="")
            total = None if progress.fraction is None else 1.0
            display.update(task, total=total, completed=progress.fraction or 0.0, message=printable(progress.message))
            if progress.fraction == 1.0:
                display.stop_task(task)

        yield show
