"""Progress on the terminal, past pytest's capturing: the first test may wait minutes for an image to be built."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from trio_sandbox import Progress


def show_on_terminal(config: pytest.Config) -> Callable[[Progress], None]:
    """Give what shows each new step as a line; nothing where there is no terminal, as in a worker of pytest-xdist."""
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    shown = ""

    def show(progress: Progress) -> None:
        nonlocal shown
        line = f"{progress.stage}: {progress.message}"
        if terminal is not None and line != shown:
            shown = line
            with nullcontext() if capture is None else capture.global_and_fixture_disabled():
                terminal.ensure_newline()
                terminal.write_line(line)

    return show
