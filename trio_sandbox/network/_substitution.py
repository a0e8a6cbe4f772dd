"""Placeholders for secrets: values in their place in requests, and the other way round in responses. Bytes in, bytes out."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias, final

Headers: TypeAlias = list[tuple[bytes, bytes]]

_PREFIX: Final = "trio-sandbox-"
#: Characters of a placeholder at least; 76 bits of them are random.
_SHORTEST: Final = 32
#: Bytes of a secret that are looked for in base64 at least: what is shorter, others have as well.
_SHORTEST_ENCODED: Final = 9
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/=_-]+)", re.IGNORECASE)


def make_placeholder(value: str) -> str:
    """Return what stands for *value* in a guest. If possible it is as long, so that what is filtered keeps its length."""
    digits = max(_SHORTEST, len(value)) - len(_PREFIX)
    return _PREFIX + secrets.token_hex(digits // 2 + 1)[:digits]


def substitute(
    headers: Iterable[tuple[bytes, bytes]], values: Mapping[bytes, bytes]
) -> tuple[Headers, dict[bytes, bytes]]:
    """Put values in the place of their placeholders, those within Basic credentials included.

    Args:
      headers: Names and values of a request's headers.
      values: The secrets, by placeholder.

    Returns:
      The headers, and what a response must not have in it, with what it may have in its place.

    """
    hidden = {value: placeholder for placeholder, value in values.items()}
    result: Headers = []
    for name, text in headers:
        changed = _replace(text, values)
        if (basic := _BASIC.fullmatch(text)) and (credentials := _decode(basic[1])) is not None:
            inserted = _replace(credentials, values)
            if inserted != credentials:
                encoded = base64.b64encode(inserted)
                hidden[encoded] = basic[1]
                changed = text[: basic.start(1)] + encoded
        result.append((name, changed))
    return result, hidden


def _replace(text: bytes, values: Mapping[bytes, bytes]) -> bytes:
    # Placeholders are random and hold no other; what was put in is not looked at again.
    if not any(placeholder in text for placeholder in values):
        return text
    return re.sub(b"|".join(map(re.escape, values)), lambda match: values[match[0]], text)


def _decode(encoded: bytes) -> bytes | None:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return None


def _in_base64(text: bytes) -> Iterator[bytes]:
    """Yield what every longer text that has *text* in it has in it in base64: it may begin at any of three places."""
    for start in range(3):
        whole = (len(text) - start) // 3 * 3
        if whole >= _SHORTEST_ENCODED:
            yield base64.b64encode(text[start : start + whole])
            yield base64.urlsafe_b64encode(text[start : start + whole])


@final
class ResponseFilter:
    """Replaces what a guest must not see in a body that comes in pieces; each time by as many bytes.

    Args:
      hidden: What it is, with what stands for it: cut, or filled up with "*", where it is of another length.

    """

    def __init__(self, hidden: Mapping[bytes, bytes]) -> None:
        self._hidden = {text: mask[: len(text)].ljust(len(text), b"*") for text, mask in hidden.items()}
        for text in hidden:
            for encoded in _in_base64(text):
                self._hidden.setdefault(encoded, b"*" * len(encoded))
        # Of two at one place the longer one, which may begin with the other.
        longest_first = sorted(self._hidden, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first)))
        self._longest = max(map(len, longest_first))
        self._kept = b""

    def text(self, data: bytes) -> bytes:
        """Return *data*, which is whole, with nothing hidden in it."""
        return self._pattern.sub(lambda match: self._hidden[match[0]], data)

    def feed(self, data: bytes) -> bytes:
        """Return what can be passed on once *data* has come; the beginning of what is hidden has to wait."""
        data = self._kept + data
        passed: list[bytes] = []
        position = 0
        # Where something hidden may begin of which more has to come, and might be the longer of two.
        waits = self._first_beginning(data)
        for match in self._pattern.finditer(data):
            if match.start() >= waits:
                break
            passed += data[position : match.start()], self._hidden[match[0]]
            position = match.end()
        waits = max(waits, position)
        passed.append(data[position:waits])
        self._kept = data[waits:]
        return b"".join(passed)

    def finish(self) -> bytes:
        """Return what is left at the end."""
        kept, self._kept = self._kept, b""
        return self.text(kept)

    def _first_beginning(self, data: bytes) -> int:
        """Return where the end of *data* begins that something hidden begins with, and goes on after."""
        for start in range(max(0, len(data) - self._longest + 1), len(data)):
            tail = data[start:]
            if any(len(text) > len(tail) and text.startswith(tail) for text in self._hidden):
                return start
        return len(data)
