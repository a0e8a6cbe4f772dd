"""The resolver's wire format, as far as a guest needs it: bytes in, bytes out (RFC 1035, RFC 6891, RFC 8914)."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

A: Final = 1
PTR: Final = 12
AAAA: Final = 28
_SOA, _OPT, _INTERNET = 6, 41, 1

NOERROR: Final = 0
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
NOTIMP: Final = 4

_RESPONSE, _OPCODE, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x7800, 0x0100, 0x0080
_HEADER = struct.Struct(">6H")
_LONGEST_QUERY, _LONGEST_NAME, _LONGEST_LABEL = 4096, 255, 63
_OUR_PAYLOAD = 1232
_EXTENDED_ERROR, _BLOCKED = 15, 15
#: A label that the host would take; whatever else programs ask for does not exist.
_LABEL = re.compile(rb"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class Query(NamedTuple):
    """One question."""

    number: int
    flags: int
    name: str
    """In lower case and without the last dot; "" if it is no host name."""
    kind: int
    """A, AAAA, ..."""
    question: bytes
    """As it came: some clients compare it, case and all."""
    extended: bool
    """Whether an answer may have an OPT record."""
    supported: bool
    """Whether it is an ordinary question about the Internet."""


def parse(data: bytes) -> Query | None:
    """Return the question in *data*; None if that is nothing to be answered."""
    if not _HEADER.size <= len(data) <= _LONGEST_QUERY:
        return None
    number, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _RESPONSE or questions != 1:
        return None
    labels: list[bytes] = []
    position = _HEADER.size
    while True:
        length = data[position] if position < len(data) else _LONGEST_LABEL + 1
        position += 1
        if length > _LONGEST_LABEL:  # cut short, or a pointer, which has nothing to point at
            return None
        if length == 0:
            break
        labels.append(data[position : position + length].lower())
        position += length
        if position - _HEADER.size >= _LONGEST_NAME:
            return None
    question = data[_HEADER.size : position + 4]
    if len(question) < position + 4 - _HEADER.size:
        return None
    kind, klass = struct.unpack_from(">HH", data, position)
    rest = data[position + 4 :]
    extended = (answers, authorities, additional) == (0, 0, 1) and rest[:3] == b"\0" + _OPT.to_bytes(2, "big")
    is_name = bool(labels) and all(map(_LABEL.fullmatch, labels))
    return Query(
        number,
        flags,
        b".".join(labels).decode("ascii") if is_name else "",
        kind,
        question,
        extended,
        not flags & _OPCODE and klass == _INTERNET,
    )


def answer(
    query: Query, code: int = NOERROR, records: Sequence[tuple[int, int, bytes]] = (), *, why: str = ""
) -> bytes:
    """Return the answer to *query*.

    Args:
      query: What was asked.
      code: NOERROR or what is wrong.
      records: Kind, seconds that it counts, and data of each record.
      why: Why the name is blocked, for clients that understand that.

    """
    flags = _RESPONSE | _RECURSION_AVAILABLE | query.flags & (_OPCODE | _RECURSION_DESIRED) | code
    body = b"".join(_record(b"\xc0\x0c", kind, seconds, data) for kind, seconds, data in records)
    authorities = additional = 0
    if not records and code in (NOERROR, NXDOMAIN):
        # How long "there is none" counts: a second.
        body += _record(b"\0", _SOA, 1, b"\0\0" + struct.pack(">5I", 1, 3600, 600, 86400, 1))
        authorities = 1
    if query.extended:
        option = b""
        if why:
            text = _BLOCKED.to_bytes(2, "big") + why.encode()
            option = struct.pack(">HH", _EXTENDED_ERROR, len(text)) + text
        body += b"\0" + struct.pack(">HHIH", _OPT, _OUR_PAYLOAD, 0, len(option)) + option
        additional = 1
    header = _HEADER.pack(query.number, flags, 1, len(records), authorities, additional)
    return header + query.question + body


def _record(owner: bytes, kind: int, seconds: int, data: bytes) -> bytes:
    return owner + struct.pack(">HHIH", kind, _INTERNET, seconds, len(data)) + data


def encode_name(name: str) -> bytes:
    """Return *name* as the data of a PTR record."""
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".")) + b"\0"


def parse_reverse_name(name: str) -> bytes | None:
    """Return the packed address that *name*, below in-addr.arpa, asks about; None if it is none."""
    parts = name.removesuffix(".in-addr.arpa").split(".")
    if len(parts) != 4 or not all(part.isdecimal() and len(part) <= 3 and int(part) < 256 for part in parts):
        return None
    return bytes(int(part) for part in reversed(parts))
