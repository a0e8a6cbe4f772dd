"""How long a guest's JSON takes to read, told before it is read: by its values, and hardly by its bytes."""

from __future__ import annotations


def has_more_values(text: bytes, most: int) -> bool:
    """Whether *text*, as far as it is JSON, has more than *most* commas and opening brackets outside of its strings."""
    if _count(text) <= most:
        return False
    # Without escapes each quotation mark begins or ends a string.
    parts = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 4 * most + 4)
    # Of two strings one is a value, at the least: the other may be its name.
    return len(parts) > 4 * most + 4 or _count(b"".join(parts[::2])) > most


def _count(text: bytes) -> int:
    return len(text) - len(text.translate(None, b",[{"))
