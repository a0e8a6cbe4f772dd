"""What programs say when there is no room left for what they write, which is nobody's fault but the disk's."""

from __future__ import annotations

from typing import Final

_WORDS: Final = ("no space left on device", "disk quota exceeded", "enospc", "edquot")


def says_full(output: str) -> bool:
    """Tell whether a program's output is about a full disk."""
    said = output.lower()
    return any(word in said for word in _WORDS)
