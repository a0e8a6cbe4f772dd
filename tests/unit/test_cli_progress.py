"""How the command line shows progress."""

from __future__ import annotations

import io
import re
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


def test_a_terminal_that_can_not_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert show_steps(Terminal()) == LINES


def test_who_is_ended_at_once_leaves_the_cursor_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[?25l" not in show_steps(Terminal())


HOSTILE = Progress("[/bold]", "[red]x[/nothing]\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}y")


def test_a_message_is_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    for output in (Terminal(), io.StringIO()):
        with open_progress(quiet=False, output=output) as show:
            show(HOSTILE)
        assert "[/bold]" in output.getvalue()
        assert "[red]x[/nothing]\\x1b[2J\\u202ey" in output.getvalue()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_takes_the_colours_out(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    colours = re.findall(r"\x1b\[[0-9;]*[34]\d[0-9;]*m", show_steps(Terminal()))
    assert bool(colours) is (no_color == "")
