"""The server name in what a TLS client sends first (RFC 8446, sections 4.1.2 and 5.1; RFC 6066, section 3).

Python's `ssl` could read it, with OpenSSL's parser. But a name that is not ASCII makes it print what the guest wrote to this
process's standard error, and a server is asked for here whose name is compared, so that all that is unusual can be refused.
"""

from __future__ import annotations

from typing import Final, final

from .._network import is_host_name

#: Bytes that a client may send before its hello is complete. With post-quantum key shares it takes some 2 KiB.
LONGEST_HELLO: Final = 16 * 2**10

_RECORD_HEADER: Final = 5
_HANDSHAKE, _VERSION_MAJOR, _CLIENT_HELLO = 22, 3, 1
_SERVER_NAME, _HOST_NAME = 0, 0


class NotNamedError(Exception):
    """What came is no hello with a server name; the text says what it is."""


_NO_TLS: Final = "it did not begin with a TLS hello"


@final
class ClientHello:
    """Reads a client's hello, fed piece by piece."""

    def __init__(self) -> None:
        self.data: bytearray = bytearray()
        """All that was fed, for whoever it is passed on to."""
        self._message = bytearray()  # what the records up to here hold
        self._position = 0  # of the next record

    def feed(self, data: bytes | bytearray) -> str | None:
        """Take *data*, and return the server name; None if more is needed.

        Raises:
          NotNamedError: if it is no TLS, is not as clients write it, has no server name, or is too long.

        """
        self.data += data
        # Many records may have come at once, and each takes a moment.
        while self._position <= LONGEST_HELLO and self._take_record():
            end = 4 + int.from_bytes(self._message[1:4], "big")
            if self._message[0] != _CLIENT_HELLO:
                raise NotNamedError(_NO_TLS)
            if len(self._message) >= max(end, 4):
                return _server_name(bytes(self._message[4:end]))
        if len(self.data) > LONGEST_HELLO:
            raise NotNamedError(f"its TLS hello is longer than {LONGEST_HELLO} bytes")
        return None

    def _take_record(self) -> bool:
        """Take what the next record holds; False if it is not complete."""
        header = bytes(self.data[self._position : self._position + _RECORD_HEADER])
        if header[:1] not in (b"", bytes([_HANDSHAKE])) or header[1:2] not in (b"", bytes([_VERSION_MAJOR])):
            raise NotNamedError(_NO_TLS)
        start = self._position + _RECORD_HEADER
        end = start + int.from_bytes(header[3:5], "big")
        if len(header) < _RECORD_HEADER or len(self.data) < end:
            return False
        if start == end:
            raise NotNamedError(_NO_TLS)
        self._message += self.data[start:end]
        self._position = end
        return True


def _server_name(message: bytes) -> str:
    reader = _Reader(message)
    reader.skip(2 + 32)  # version and random
    reader.vector(1)  # session
    reader.vector(2)  # cipher suites
    reader.vector(1)  # compression methods
    extensions = _Reader(reader.vector(2) if reader.rest() else b"")
    if reader.rest():
        raise NotNamedError(_NO_TLS)
    names: list[bytes] = []
    while extensions.rest():
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind == _SERVER_NAME:
            names += _host_names(content)
    if not names:
        raise NotNamedError("its TLS hello has no server name")
    name = names[0].decode("latin-1").lower()
    if len(names) > 1 or not is_host_name(name):
        raise NotNamedError("the server name in its TLS hello is not one that it can have asked for")
    return name


def _host_names(content: bytes) -> list[bytes]:
    outer = _Reader(content)
    entries = _Reader(outer.vector(2))
    names: list[bytes] = []
    while entries.rest():
        kind = entries.number(1)
        name = entries.vector(2)
        if kind != _HOST_NAME:
            raise NotNamedError("its TLS hello has a server name of another kind than a host name")
        names.append(name)
    if outer.rest():
        raise NotNamedError(_NO_TLS)
    return names


@final
class _Reader:
    """Takes the parts of a message, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def rest(self) -> int:
        return len(self._data) - self._position

    def skip(self, size: int) -> None:
        self._take(size)

    def number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def vector(self, size_bytes: int) -> bytes:
        return self._take(self.number(size_bytes))

    def _take(self, size: int) -> bytes:
        if size > self.rest():
            raise NotNamedError(_NO_TLS)
        self._position += size
        return self._data[self._position - size : self._position]
