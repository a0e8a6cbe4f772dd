"""The bars of `trio-sandbox run --trace`."""

from __future__ import annotations

import io

import pytest

from trio_sandbox._observe import Recorded
from trio_sandbox.cli._trace import draw, draw_for

SPANS = [
    Recorded("starting the host", {}, 0, 1.0, 3.0),
    Recorded("sandbox", {}, 0, 3.0, 9.0),
    Recorded("boot", {"accelerator": "tcg"}, 1, 3.0, 8.0),
    Recorded("first_output", {}, 1, 8.0, 8.001),
    Recorded("not over", {}, 0, 9.0),
]


def test_each_bar_is_at_its_place_and_as_long_as_its_time() -> None:
    assert draw(SPANS, width=48).splitlines() == [
        "  starting the host    2.000 s  ####",
        "  sandbox              6.000 s      ############",
        "    boot (tcg)         5.000 s      ##########",
        "    first output       0.001 s                #",
        "  total                8.000 s  ################",
    ]


@pytest.mark.parametrize("width", range(1, 200, 7))
def test_no_line_is_longer_than_the_terminal_and_narrow_ones_have_no_bars(width: int) -> None:
    lines = draw(SPANS, width=width).splitlines()
    bars = ["#" in line for line in lines]
    assert all(bars) or not any(bars)
    assert not any(bars) or max(map(len, lines)) <= width
    assert any(bars) == (width >= 42)


@pytest.mark.parametrize("spans", [[], [Recorded("not over", {}, 0, 1.0)]])
def test_where_nothing_is_over_there_is_nothing_to_draw(spans: list[Recorded]) -> None:
    assert draw(spans, width=80) == ""


def test_what_took_no_time_at_all_is_drawn() -> None:
    first, total = draw([Recorded("a", {}, 0, 2.0, 2.0)], width=80).splitlines()
    assert first.endswith("0.000 s  #")
    assert total.endswith("0.000 s  #")


class Terminal(io.TextIOWrapper):
    """A terminal of a character set."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_no_color_says_otherwise(
    no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b[" in draw_for(Terminal(), SPANS)) == coloured
    assert "\x1b[" not in draw_for(io.StringIO(), SPANS)


def test_a_terminals_width_and_characters_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, draw_for(Terminal(), SPANS).splitlines())) == 60
    assert "\N{FULL BLOCK}" in draw_for(Terminal(), SPANS)
    assert "#" in draw_for(Terminal("ascii"), SPANS)
    draw_for(Terminal("ascii"), SPANS).encode("ascii")
