"""Records on a stream: a tag of one byte and a payload, so that kinds of content can take turns.

A record is tag (u8), payload length (u32, big endian), payload.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from typing import final

import trio

from ._errors import WireError
from ._framing import decode_json, encode_json
from ._stream import ChannelStream

JSON = b"J"
STDOUT = b"O"
STDERR = b"E"
DISPLAY = b"D"

#: What the MIME type of a display may look like: RFC 6838, section 4.2; without parameters.
MIME_TYPE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}/[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}")

#: Bytes of one record's payload unless its reader says otherwise.
DEFAULT_RECORD_LIMIT = 2**20

#: What programs print may come as a record for each byte. To take one costs a turn of the scheduler, so that so many are taken as one.
JOINED_RECORDS = 32
#: Bytes of a payload that are worth the turn.
_WORTH_A_TURN = 1024
#: Records of less, already there, that one reader takes before others have their turn, and seconds of that: as long as they have taken.
SMALL_RECORDS_IN_TURN = 64
_PAUSE = 0.001

_HEADER = struct.Struct(">cI")
_HEADER_SIZE = _HEADER.size


def encode_record(tag: bytes, payload: bytes | bytearray | memoryview) -> bytes:
    """Return the bytes of one record; *tag* is one byte."""
    return b"".join((_HEADER.pack(tag, len(payload)), payload))


@final
class RecordDecoder:
    """Cuts the bytes of a stream into records; does no I/O.

    Args:
      limit: The longest payload, in bytes, that is let through.
      joined: Tags of which records in a row may come out as one: what they say is a stream of bytes.

    """

    def __init__(self, limit: int = DEFAULT_RECORD_LIMIT, joined: bytes = b"") -> None:
        self._limit = limit
        self._joined = joined
        self._buffer: bytes | bytearray = b""
        self._position = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        rest = len(self._buffer) - self._position
        if not rest:
            self._buffer = data
        elif isinstance(self._buffer, bytearray):
            del self._buffer[: self._position]
            self._buffer += data
        else:
            self._buffer = bytearray(memoryview(self._buffer)[self._position :])
            self._buffer += data
        self._position = 0

    def next_record(self) -> tuple[bytes, bytes] | None:
        """Return the tag and the payload of the next record, or None until more is fed.

        Raises:
          WireError: if its payload is longer than the limit; known from its header, before it is stored.

        """
        start = self._position + _HEADER_SIZE
        if start > len(self._buffer):
            return None
        tag: bytes
        length: int
        tag, length = _HEADER.unpack_from(self._buffer, self._position)
        if length > self._limit:
            raise WireError(f"record of {length} bytes; at most {self._limit} are allowed")
        end = start + length
        if end > len(self._buffer):
            return None
        payload = bytes(self._buffer[start:end])
        self._position = end
        if end < len(self._buffer) and tag in self._joined and self._buffer[end] == tag[0]:
            payload = self._join(tag, payload)
        return tag, payload

    def _join(self, tag: bytes, payload: bytes) -> bytes:
        """Return *payload* with those of the records of the same tag that are there behind it."""
        parts = [payload]
        size = len(payload)
        while len(parts) < JOINED_RECORDS:
            start = self._position + _HEADER_SIZE
            if start > len(self._buffer):
                break
            next_tag: bytes
            length: int
            next_tag, length = _HEADER.unpack_from(self._buffer, self._position)
            end = start + length
            size += length
            if next_tag != tag or size > self._limit or end > len(self._buffer):
                break
            parts.append(bytes(self._buffer[start:end]))
            self._position = end
        return b"".join(parts)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of what was fed, so that the stream may end here."""
        return self._position == len(self._buffer)


@final
class RecordStream(trio.abc.AsyncResource):
    """Records over a `ChannelStream`, which it owns and which is `stream`.

    Who receives many small ones that are there already is held up now and then, so that a peer can't have all of the event loop's time.

    Args:
      stream: What to send and receive on.
      limit: The longest payload, in bytes, that is received.
      joined: As `RecordDecoder` has it.

    """

    def __init__(self, stream: ChannelStream, *, limit: int = DEFAULT_RECORD_LIMIT, joined: bytes = b"") -> None:
        self.stream = stream
        self._decoder = RecordDecoder(limit, joined)
        self._small = 0  # records that were taken since the last wait

    def __repr__(self) -> str:
        return f"<RecordStream on {self.stream!r}>"

    async def send(self, tag: bytes, payload: bytes | bytearray | memoryview, *, end: bool = False) -> None:
        """Send one record, and END in the same write if *end*; otherwise like `ChannelStream.send_all`."""
        await self.stream.send_all(encode_record(tag, payload), end=end)

    async def send_json(self, value: Mapping[str, object], *, end: bool = False) -> None:
        """Send *value* as a record with the tag `JSON`; `ValueError` or `TypeError` if it is not JSON."""
        await self.send(JSON, encode_json(value), end=end)

    async def send_many(self, records: Iterable[tuple[bytes, bytes]], *, end: bool = False) -> None:
        """Send several records, tag and payload each, in as few writes as possible."""
        await self.stream.send_all(b"".join([encode_record(*record) for record in records]), end=end)

    async def send_and_close(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Send several records and close, all in one write where there is room: `ChannelStream.send_and_close`."""
        await self.stream.send_and_close(b"".join([encode_record(*record) for record in records]))

    def send_and_close_nowait(self, records: Iterable[tuple[bytes, bytes]]) -> bool:
        """Send several records, which are little, and close: `ChannelStream.send_and_close_nowait`."""
        return self.stream.send_and_close_nowait(b"".join([encode_record(*record) for record in records]))

    async def send_eof(self) -> None:
        """Like `ChannelStream.send_eof`."""
        await self.stream.send_eof()

    async def receive(self, *, at_once: bool = False) -> tuple[bytes, bytes] | None:
        """Return the next record as tag and payload, or None after the last.

        Cancelled: nothing is lost, the next call goes on.

        Args:
          at_once: Give other tasks no turn if the record is there already, for who calls this until it waits.

        Raises:
          WireError: if a record is longer than the limit or the stream ends within one. It was reset.

        Otherwise as `ChannelStream.receive_some`.
        """
        if self._small >= SMALL_RECORDS_IN_TURN:
            self._small = 0
            await trio.sleep(_PAUSE)
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        record = self._next_record()
        if record is not None:
            if not at_once:
                # Not cancellable any more: the record would be lost.
                await trio.lowlevel.cancel_shielded_checkpoint()
            return record  # noqa: ASYNC910 - see above
        while True:
            if self._small and not self.stream.has_news:
                self._small = 0  # to wait for it is a pause, too
            data = await self.stream.receive_some()
            if not data:
                break
            self._decoder.feed(data)
            record = self._next_record()
            if record is not None:
                return record
        if not self._decoder.is_empty:
            raise self._violation(WireError("the stream ended within a record"))
        return None

    async def receive_json(self) -> dict[str, object] | None:
        """Return the next record, which must be a JSON object, or None after the last.

        Raises:
          WireError: if it is something else; the stream was reset. Otherwise as `receive`.

        """
        record = await self.receive()
        if record is None:
            return None
        tag, payload = record
        try:
            if tag != JSON:
                raise WireError(f"record with tag {tag!r} where JSON was expected")
            return decode_json(payload, "record")
        except WireError as exc:
            raise self._violation(exc) from exc.__cause__

    async def aclose(self) -> None:
        """Like `ChannelStream.aclose`."""
        await self.stream.aclose()

    def _next_record(self) -> tuple[bytes, bytes] | None:
        try:
            record = self._decoder.next_record()
        except WireError as exc:
            raise self._violation(exc) from None
        if record is not None and len(record[1]) < _WORTH_A_TURN:
            self._small += 1
        return record

    def _violation(self, error: WireError) -> WireError:
        self.stream.reset(str(error))
        return error
