"""What runs show besides what they print."""

from __future__ import annotations

from typing import final

import attrs

from ._metadata import mark_public


@final
@attrs.frozen
class Display:
    """Something that a run displayed, in one form: a picture, a table as HTML, or the like."""

    mime: str
    """The MIME type, for instance ``image/png``. The guest says so: check the bytes before you trust them."""
    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")
    """The bytes; text is UTF-8."""
    item: int = 0
    """The number of the displayed object: displays with the same number are forms of one object. Show one of them."""

    @property
    def text(self) -> str:
        """The bytes as text; bytes that are not UTF-8 become U+FFFD."""
        return self.data.decode("utf-8", "replace")


mark_public(__name__, globals())
