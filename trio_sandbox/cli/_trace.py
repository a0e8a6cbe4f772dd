"""Drawing the spans of a command as bars, for ``trio-sandbox run --trace``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Final, TextIO

from .._observe import Recorded, Recording
from ._report import printable

#: Columns where the output is no terminal, or does not say how many it has.
_WIDTH: Final = 80
#: The fewest columns that a bar is drawn in.
_LEAST: Final = 10
_COLOUR, _PLAIN = "\x1b[36m", "\x1b[0m"


def draw(spans: Sequence[Recorded], *, width: int, block: str = "#", coloured: bool = False) -> str:
    """Return a line for each span that is over, in their order: its name, its seconds, and a bar at its place in time.

    Args:
      spans: What to draw.
      width: Columns that a line may have; where they are too few there are no bars.
      block: What a bar is made of.
      coloured: Whether bars have a colour.

    """
    over = [(each, each.ended) for each in spans if each.ended is not None]
    if not over:
        return ""
    began, ended = min(each.began for each, _ in over), max(end for _, end in over)
    total = Recorded("total", {}, 0, began)
    rows = [(_name(each), each.began - began, end - began) for each, end in [*over, (total, ended)]]
    widest = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:{widest}}{end - start:9.3f} s" for name, start, end in rows]
    room = width - max(map(len, lines)) - 2
    if room >= _LEAST:
        scale = room / (ended - began) if ended > began else 0.0
        for number, (_, start, end) in enumerate(rows):
            first = min(int(start * scale), room - 1)
            bar = block * max(1, min(round((end - start) * scale), room - first))
            lines[number] += f"  {' ' * first}{_COLOUR + bar + _PLAIN if coloured else bar}"
    return "\n".join(lines)


def _name(each: Recorded) -> str:
    about = each.attributes.get("accelerator")
    name = each.name.replace("_", " ") if about is None else f"{each.name} ({about})"
    return printable("  " * each.depth + name)


def show_trace(recording: Recording) -> None:
    """Draw a recording on standard error."""
    # Where nobody reads our standard error, there is nobody left to be told.
    with contextlib.suppress(OSError):
        if picture := draw_for(sys.stderr, recording.spans()):
            print(picture, file=sys.stderr, flush=True)


def draw_for(output: TextIO, spans: Sequence[Recorded]) -> str:
    """Draw *spans* as *output* can show them."""
    terminal = output.isatty()
    return draw(
        spans,
        width=_width(output) if terminal else _WIDTH,
        block="\N{FULL BLOCK}" if _can_write(output, "\N{FULL BLOCK}") else "#",
        coloured=terminal and not os.environ.get("NO_COLOR"),
    )


def _width(output: TextIO) -> int:
    try:
        return int(os.environ.get("COLUMNS", "")) or _WIDTH
    except ValueError:
        pass
    try:
        return os.get_terminal_size(output.fileno()).columns or _WIDTH
    except (OSError, ValueError):
        return _WIDTH


def _can_write(output: TextIO, text: str) -> bool:
    try:
        text.encode(output.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
