"""What travels over the guest channel: frames, their limits, and JSON inside them.

A frame is a header of nine bytes, big endian (payload length: u32, kind: u8, stream id: u32),
and the payload:

    kind    stream  payload
    HELLO   0       a JSON object with "version"; the first frame of each side, and only that
    OPEN    new     a JSON object that says what the stream is for
    DATA    open    1 to `MAX_PAYLOAD` bytes, at most as many as there is credit for
    END     open    none: the sender sends nothing more on this stream
    RESET   used    why, in UTF-8: the sender neither sends nor takes anything more on this stream
    CREDIT  used    u32: so many bytes more may be sent to the sender of this frame
    PING    0       8 bytes
    PONG    0       the 8 bytes of the oldest ping not yet answered

The host's streams have odd ids, the guest's even ones, and each side's ids only ever grow. A stream
starts with `INITIAL_CREDIT` in each direction. It is over when each side has ended or reset it; who
receives RESET before that answers with RESET. So each side knows when an id is out of use, and
DATA or END after that is a violation. RESET and CREDIT may cross the end of a stream, and are ignored then.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Mapping
from typing import cast

from ._errors import WireError

PROTOCOL_VERSION = 1

#: Bytes of payload in one frame. What a stalled frame can hold up, and small beside a stream's credit.
MAX_PAYLOAD = 65536
#: Bytes of the JSON in OPEN. A header names a service; what is large belongs on the stream, under its credit.
MAX_OPEN_HEADER = 4096
#: Bytes of the text in RESET; longer reasons are cut before they are sent.
MAX_REASON = 256
#: Bytes that may be sent on a stream before the receiver has taken any, each way.
#: Several frames: a sender must not wait for a round trip while the receiver keeps up.
INITIAL_CREDIT = 256 * 1024
#: Credit beyond this is a violation: no receiver of ours gives it, and it must not grow without bound.
MAX_CREDIT = 2**31 - 1
#: Streams that one side may have open at once.
MAX_STREAMS = 1024

HEADER = struct.Struct(">IBI")
HEADER_SIZE = HEADER.size
CREDIT = struct.Struct(">I")


class Role(enum.Enum):
    """Which side of a channel one is; the value is the id of the first stream that it opens."""

    HOST = 1
    GUEST = 2


class Kind(enum.IntEnum):
    """What a frame means."""

    HELLO = 1
    OPEN = 2
    DATA = 3
    END = 4
    RESET = 5
    CREDIT = 6
    PING = 7
    PONG = 8


#: For each kind: the least and the greatest length of the payload, and whether it is about a stream.
RULES: Mapping[int, tuple[int, int, bool]] = {
    Kind.HELLO: (2, MAX_PAYLOAD, False),
    Kind.OPEN: (2, MAX_OPEN_HEADER, True),
    Kind.DATA: (1, MAX_PAYLOAD, True),
    Kind.END: (0, 0, True),
    Kind.RESET: (0, MAX_REASON, True),
    Kind.CREDIT: (4, 4, True),
    Kind.PING: (8, 8, False),
    Kind.PONG: (8, 8, False),
}


def frame(kind: Kind, stream_id: int, payload: bytes = b"") -> bytes:
    """Return the bytes of one frame."""
    return HEADER.pack(len(payload), kind, stream_id) + payload


def check_header(length: int, kind: int, stream_id: int) -> None:
    """Raise `WireError` for a frame header that no state of any stream could make right."""
    rule = RULES.get(kind)
    if rule is None:
        raise WireError(f"frame of unknown kind {kind}")
    least, greatest, about_stream = rule
    if not least <= length <= greatest:
        raise WireError(f"{Kind(kind).name} frame of {length} bytes; {least} to {greatest} are allowed")
    if (stream_id != 0) is not about_stream:
        raise WireError(f"{Kind(kind).name} frame for stream {stream_id}")


def encode_json(value: Mapping[str, object]) -> bytes:
    """Return *value* as compact JSON; `ValueError` or `TypeError` if it can't be.

    In ASCII, because the lone surrogates by which Python carries undecodable file names are not UTF-8.
    """
    return _ENCODER.encode(value).encode()


def decode_json(data: bytes, what: str) -> dict[str, object]:
    """Return the JSON object that a peer sent, with nothing around it; `WireError` naming *what* if it is none."""
    try:
        text = data.decode()
        value, end = _DECODER.raw_decode(text)  # decode() would look for white space first
        if end < len(text):
            raise ValueError("something comes after it")
    except (ValueError, RecursionError) as exc:
        raise WireError(f"{what} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise WireError(f"{what} is JSON, but not an object")
    return cast("dict[str, object]", value)


def decode_hello(payload: bytes) -> dict[str, object]:
    """Return what a peer introduces itself with; `WireError` if it is no JSON object of our version."""
    hello = decode_json(payload, "HELLO")
    version = hello.get("version")
    if version != PROTOCOL_VERSION or isinstance(version, bool):
        raise WireError(
            f"the peer speaks version {version!r:.20} of the protocol, and this is version {PROTOCOL_VERSION}: "
            "it is of another version of trio-sandbox"
        )
    return hello


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


# Made once: `json.dumps` and `json.loads` with arguments make them anew in every call.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
