"""Text of a guest's, quoted in text of ours: bounded, and with nothing in it that a terminal would obey.

Whatever a guest says comes into a message, a note or a log through one of these.
"""

from __future__ import annotations

#: Characters of a guest's text in a message of one line.
REASON_LIMIT = 1000
#: Characters of a guest's text in a message of several lines: the end of a traceback, of a console.
EXCERPT_LIMIT = 8000
#: What stands for characters that were left out.
_LEFT_OUT = "[...]"


def quote_guest(text: str, limit: int = REASON_LIMIT) -> str:
    r"""Return *text* in one line of at most *limit* characters; what is not printable is written as ``\x1b``."""
    quoted = escape(text[:limit])
    if len(text) > limit or len(quoted) > limit:
        quoted = quoted[: limit - len(_LEFT_OUT)] + _LEFT_OUT
    return quoted


def quote_tail(text: str, limit: int = REASON_LIMIT) -> str:
    """Return the end of *text* like `quote_guest`, for where what matters comes last."""
    quoted = escape(text[-limit:])
    if len(text) > limit or len(quoted) > limit:
        quoted = _LEFT_OUT + quoted[len(_LEFT_OUT) - limit :]
    return quoted


def quote_lines(text: str, limit: int = EXCERPT_LIMIT) -> str:
    """Return the end of *text*, each line of it behind a bar, so that none can be taken for one of ours; tabs stay."""
    lines = text[-limit:].replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(text) > limit:
        lines[:1] = [_LEFT_OUT + lines[0]] if lines else []
    return "\n".join("| " + "\t".join(map(escape, line.split("\t"))) for line in lines)


def escape(text: str) -> str:
    r"""Return *text* with whatever is not printable in it, tabs and line ends included, written as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
