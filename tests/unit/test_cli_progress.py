"""How the command line shows progress."""

from __future__ import annotations

import io
import sys

import pytest

from trio_sandbox import Progress
from trio_sandbox.cli._progress import open_progress

STEPS = [
    Progress("image python", "unpacking"),
    Progress("image python", "unpacking", 0.2),
    Progress("system disk", "kernel", 0.5),
    Progress("image python", "unpacking", 0.4),
    Progress("image python", "built", 1.0),
]

LINES = "image python: unpacking\nsystem disk: kernel\nimage python: built\n"


class Terminal(io.StringIO):
    """A text file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def show_steps(output: io.StringIO, *, quiet: bool = False) -> str:
    with open_progress(quiet=quiet, output=output) as show:
        for step in STEPS:
            show(step)
    return output.getvalue()


def test_a_file_gets_a_line_for_each_new_message() -> None:
    assert show_steps(io.StringIO()) == LINES


def test_quiet_is_quiet() -> None:
    assert show_steps(Terminal(), quiet=True) == ""


def test_a_terminal_gets_bars_that_are_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = show_steps(Terminal())
    assert "image python" in shown
    assert "system disk" in shown
    assert "\x1b[2K" in shown  # lines are erased in place
    assert shown != LINES


def test_a_terminal_gets_lines_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # what importing it then does: ImportError
    assert show_steps(Terminal()) == LINES
