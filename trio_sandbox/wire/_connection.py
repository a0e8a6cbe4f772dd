"""The protocol of the guest channel without any I/O: bytes in, events out; calls in, bytes out.

One `Connection` is one side. It checks every frame of the peer, keeps the credit of both directions and
decides what is written next. It holds no data of the application's but the one piece per stream that is
being sent, and what it queues by itself is bounded as long as its user heeds `backlog`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping

from ._errors import StreamLimitError, WireError
from ._events import (
    CreditReceived,
    DataReceived,
    EndReceived,
    Event,
    HelloReceived,
    PongReceived,
    ResetReceived,
    StreamOpened,
)
from ._framing import (
    CREDIT,
    HEADER,
    HEADER_SIZE,
    INITIAL_CREDIT,
    MAX_CREDIT,
    MAX_OPEN_HEADER,
    MAX_PAYLOAD,
    MAX_REASON,
    MAX_STREAMS,
    PROTOCOL_VERSION,
    Kind,
    Role,
    check_header,
    decode_hello,
    decode_json,
    encode_json,
    frame,
)
from ._pace import FRAMES_IN_TURN, FRAMES_OF_OPEN, JSON_OF_A_FRAME
from ._state import StreamState

#: Bytes of one write, headers and all, unless control frames alone are more.
WRITE_LIMIT = 65536
#: What had better be sent at once of very much: two writes. With a few bytes more there would be a third.
PIECE_SIZE = 2 * (WRITE_LIMIT - HEADER_SIZE)
#: What one stream may put into a write in one turn while others wait for theirs.
QUANTUM = 16384
#: Credit goes back once the reader has taken this much: early enough that a steady sender never waits.
CREDIT_STEP = INITIAL_CREDIT // 2
#: Bytes of queued control frames, OPEN aside, from which on no more input should be taken.
#: Two peers of ours never get there: all their streams together can't owe each other that much.
#: So only a peer that asks and does not read is stalled by it, and nobody by us.
BACKLOG_LIMIT = 2**21
#: Bytes of frames that nobody waits for, which may lie until something else is written.
LAZY_LIMIT = 256


class Connection:
    """One side of a channel.

    Args:
      role: Which side.
      hello: What to introduce ourselves with; "version" is added. It is queued at once.

    Raises:
      ValueError: if *hello* has another version, is too long or isn't JSON.

    """

    def __init__(self, role: Role, hello: Mapping[str, object]) -> None:
        if hello.get("version", PROTOCOL_VERSION) != PROTOCOL_VERSION:
            raise ValueError(f"hello says version {hello['version']!r}, and this is version {PROTOCOL_VERSION}")
        greeting = encode_json({**hello, "version": PROTOCOL_VERSION})
        if len(greeting) > MAX_PAYLOAD:
            raise ValueError(f"hello is {len(greeting)} bytes of JSON; at most {MAX_PAYLOAD} fit")
        self._parity = role.value % 2  # of the ids of streams opened here
        self._streams: dict[int, StreamState] = {}
        self._last_id = role.value - 2  # of the streams opened here
        self._last_peer_id = (3 - role.value) - 2
        self._open_count = 0
        self._peer_open_count = 0
        self._pings: deque[bytes] = deque()

        # Output
        self._control = bytearray(frame(Kind.HELLO, 0, greeting))
        self._open_bytes = 0  # how much of it is OPEN
        self._urgent = True  # somebody waits for something in it
        self._ready: deque[StreamState] = deque()  # have something pending and the credit to send it

        # Input
        self.idle_frames: int = 0
        """Frames so far that did nothing: of credit that nobody waits for, and for streams that are over."""
        self.makes_pauses: bool = role is Role.HOST
        """Whether `receive` does; a guest trusts its host."""
        self._frames_in_turn = FRAMES_IN_TURN if self.makes_pauses else sys.maxsize
        self._greeted = False
        self._error: WireError | None = None
        self._partial = bytearray()  # the frame that has not come whole, unless it is DATA
        self._needed = HEADER_SIZE  # how long `_partial` must be to go on
        self._body = 0  # bytes to come of a DATA frame
        self._body_stream: StreamState | None = None

    # --- Output: what the application asks for ---

    def open_stream(self, header: Mapping[str, object]) -> int:
        """Queue OPEN and return the new stream's id.

        Raises:
          ValueError: if *header* is longer than `MAX_OPEN_HEADER` or isn't JSON.
          StreamLimitError: if `MAX_STREAMS` are open.

        """
        payload = encode_json(header)
        if len(payload) > MAX_OPEN_HEADER:
            raise ValueError(f"the header is {len(payload)} bytes of JSON; at most {MAX_OPEN_HEADER} fit")
        if self._open_count >= MAX_STREAMS:
            raise StreamLimitError(f"{MAX_STREAMS} streams are open; close one first")
        self._last_id += 2
        self._open_count += 1
        self._streams[self._last_id] = StreamState(self._last_id)
        self._queue(Kind.OPEN, self._last_id, payload)
        self._open_bytes += HEADER_SIZE + len(payload)
        return self._last_id

    def send(
        self, stream_id: int, data: bytes | bytearray | memoryview, *, end: bool = False, close: bool = False
    ) -> None:
        """Let `next_write` send *data*, then END if *end* or *close*, then RESET if *close* and the peer goes on.

        One piece a stream at a time: `RuntimeError` while another is pending, or after END or RESET.
        *data* must not change until `next_write` has reported the stream, or `unsend` took it back.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.done or stream.pending is not None:
            raise RuntimeError(f"stream {stream_id} can't send now")
        stream.pending = memoryview(data).cast("B")
        stream.begun = False
        stream.end_after = end or close
        stream.close_after = close
        if stream.send_credit or not data:
            self._ready.append(stream)

    def send_now(self, stream_id: int, data: bytes | memoryview) -> int:
        """Queue a copy of as much of *data* as may go at once; return how much that is, 0 where another stream's turn comes first."""
        stream = self._streams.get(stream_id)
        if self._ready or stream is None or stream.done or stream.pending is not None:
            return 0
        size = min(len(data), stream.send_credit, WRITE_LIMIT - HEADER_SIZE - len(self._control))
        if size <= 0:
            return 0
        stream.send_credit -= size
        self._queue(Kind.DATA, stream_id, data[:size])
        return size

    def send_and_close(self, stream_id: int, data: bytes) -> bool:
        """Do what `send` does to close, and take a copy of what is little; False if there is no credit for *data*: nothing was done."""
        if not self.can_send(stream_id, len(data)):
            return False
        size = self.send_now(stream_id, data)
        if size and size == len(data):
            self.end(stream_id)
            self.reset(stream_id)
        else:
            self.send(stream_id, memoryview(data)[size:], close=True)
        return True

    def is_sending(self, stream_id: int) -> bool:
        """Whether something is pending on a stream."""
        stream = self._streams.get(stream_id)
        return stream is not None and stream.pending is not None

    def unsend(self, stream_id: int) -> bool:
        """Take back what is pending on a stream; return whether a part of it was sent already."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.pending is None:
            return False
        self._drop_pending(stream)
        return stream.begun

    def end(self, stream_id: int) -> None:
        """Queue END; does nothing after END or RESET. Nothing may be pending on the stream."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.done:
            return
        if stream.pending is not None:
            raise RuntimeError(f"stream {stream_id} is still sending")
        self._queue(Kind.END, stream_id)
        self._set_done(stream)

    def reset(self, stream_id: int, reason: str = "") -> None:
        """Queue RESET and drop what is pending; does nothing to a stream that is over.

        *reason* is cut to `MAX_REASON` bytes. No more events come for this stream.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.refusing:
            return
        self._drop_pending(stream)
        stream.refusing = True
        text = reason.encode(errors="replace")[:MAX_REASON].decode(errors="ignore").encode() if reason else b""
        self._queue(Kind.RESET, stream_id, text)
        self._set_done(stream)

    def take(self, stream_id: int, size: int) -> None:
        """Say that the application has taken *size* bytes of received data, so that more may come."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.refusing or stream.remote_done:
            return
        stream.taken += size
        if stream.taken >= CREDIT_STEP:
            self._queue(Kind.CREDIT, stream_id, CREDIT.pack(stream.taken))
            stream.receive_credit += stream.taken
            stream.taken = 0

    def ping(self, payload: bytes) -> None:
        """Queue PING with a *payload* of 8 bytes; a `PongReceived` answers it, in order."""
        self._queue(Kind.PING, 0, payload)
        self._pings.append(payload)

    # --- Output: what to write ---

    @property
    def wants_write(self) -> bool:
        """Whether `next_write` should be called now.

        Not for the mere answer to a RESET: the peer has given the stream up and is in no hurry, and
        where every write wakes a virtual machine it had better go with the next one.
        """
        return self._urgent or bool(self._ready) or len(self._control) > LAZY_LIMIT

    @property
    def backlog(self) -> int:
        """Bytes of queued control frames, OPEN aside; heed `BACKLOG_LIMIT`."""
        return len(self._control) - self._open_bytes

    @property
    def open_streams(self) -> int:
        """Streams of both sides that are not over."""
        return len(self._streams)

    @property
    def peer_streams(self) -> int:
        """Those of them that the peer opened."""
        return self._peer_open_count

    def can_send(self, stream_id: int, size: int = 1) -> bool:
        """Whether there is credit for *size* bytes of data; True as well where sending would fail at once."""
        stream = self._streams.get(stream_id)
        return stream is None or stream.done or stream.send_credit >= size

    def next_write(self) -> tuple[bytes | bytearray, list[int]]:
        """Return the bytes to write next, and the streams whose pending piece is used up by them.

        Control frames come first, then the streams take turns. Without anything to write: ``b""``.
        """
        sent: list[int] = []
        control = self._control
        if control:
            self._control = bytearray()
            self._open_bytes = 0
            self._urgent = False
        ready = self._ready
        if not ready:
            return control, sent
        parts: list[bytes | bytearray | memoryview] = [control]
        room = WRITE_LIMIT - len(control)
        while ready and room > HEADER_SIZE:
            stream = ready.popleft()
            pending = stream.pending
            assert pending is not None
            size = min(len(pending), stream.send_credit, room - HEADER_SIZE, QUANTUM if ready else MAX_PAYLOAD)
            if size:
                parts += (HEADER.pack(size, Kind.DATA, stream.id), pending[:size])
                room -= HEADER_SIZE + size
                stream.send_credit -= size
            if size < len(pending):
                stream.pending = pending[size:]
                stream.begun = True
                if stream.send_credit:
                    ready.append(stream)
                continue
            stream.pending = None
            sent.append(stream.id)
            if stream.end_after:
                parts.append(frame(Kind.END, stream.id))
                room -= HEADER_SIZE
                self._set_done(stream)
            if stream.close_after and not stream.remote_done:
                parts.append(frame(Kind.RESET, stream.id))
                room -= HEADER_SIZE
                stream.refusing = True
        return b"".join(parts), sent

    def _queue(self, kind: Kind, stream_id: int, payload: bytes | memoryview = b"", *, urgent: bool = True) -> None:
        self._urgent = self._urgent or urgent
        self._control += HEADER.pack(len(payload), kind, stream_id)
        self._control += payload

    def _drop_pending(self, stream: StreamState) -> None:
        if stream.pending is not None:
            if stream in self._ready:
                self._ready.remove(stream)
            stream.pending = None
            stream.end_after = False

    # --- Input ---

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event | None]:
        """Yield what *data*, the next bytes of the peer, mean; to be exhausted.

        A host yields None after each `FRAMES_IN_TURN` frames, whatever they mean: others may have their turn. Other methods may be called between two events. What a `DataReceived` holds is a part of *data*, and valid as long.

        Raises:
          WireError: at the violation, after the events before it; from then on, always.

        """
        if self._error is not None:
            raise self._error
        try:
            yield from self._receive(data)
        except WireError as exc:
            self._error = exc
            raise

    def _receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event | None]:
        position, end, frames = 0, len(data), 0
        partial = self._partial
        while position < end:
            if self._body:
                # DATA is passed on as it comes: nothing waits for the rest of a frame, or is copied twice.
                chunk = data[position : position + self._body]
                position += len(chunk)
                self._body -= len(chunk)
                stream = self._body_stream
                if stream is not None and not stream.refusing:
                    yield DataReceived(stream.id, chunk)
                continue
            if frames >= self._frames_in_turn:
                frames = 0
                yield None
            frames += 1
            if partial or end - position < HEADER_SIZE:
                missing = self._needed - len(partial)
                partial += data[position : position + missing]
                position += missing
                if len(partial) < self._needed:
                    return
                length, kind, stream_id = HEADER.unpack_from(partial)
                if self._needed == HEADER_SIZE:
                    self._check(length, kind, stream_id)
                    if kind == Kind.DATA:
                        partial.clear()
                        continue
                    self._needed += length
                    if length:
                        continue
                payload = bytes(partial[HEADER_SIZE:])
                partial.clear()
                self._needed = HEADER_SIZE
            else:
                length, kind, stream_id = HEADER.unpack_from(data, position)
                self._check(length, kind, stream_id)
                if kind == Kind.DATA:
                    position += HEADER_SIZE
                    continue
                stop = position + HEADER_SIZE + length
                if stop > end:
                    partial += data[position:]
                    self._needed = HEADER_SIZE + length
                    return
                payload = bytes(data[position + HEADER_SIZE : stop])
                position = stop
            if kind == Kind.OPEN:
                frames += FRAMES_OF_OPEN + length // JSON_OF_A_FRAME
            event = self._handle(kind, stream_id, payload)
            if event is not None:
                yield event

    def _check(self, length: int, kind: int, stream_id: int) -> None:
        """Check a frame as soon as its header is there, before anything is stored; prepare for DATA."""
        check_header(length, kind, stream_id)
        if (kind == Kind.HELLO) is self._greeted:
            raise WireError("a second HELLO" if self._greeted else f"{Kind(kind).name} before HELLO")
        if kind == Kind.DATA:
            stream = self._sending_stream(kind, stream_id)
            if length > stream.receive_credit:
                raise WireError(f"{length} bytes on stream {stream_id}, and credit for {stream.receive_credit}")
            stream.receive_credit -= length
            self._body = length
            self._body_stream = stream

    def _handle(self, kind: int, stream_id: int, payload: bytes) -> Event | None:
        match kind:
            case Kind.CREDIT:
                return self._handle_credit(stream_id, payload)
            case Kind.END:
                stream = self._sending_stream(kind, stream_id)
                self._set_remote_done(stream)
                return None if stream.refusing else EndReceived(stream_id)
            case Kind.OPEN:
                return self._handle_open(stream_id, payload)
            case Kind.RESET:
                return self._handle_reset(stream_id, payload)
            case Kind.PING:
                self.idle_frames += 1
                self._queue(Kind.PONG, 0, payload)
                return None
            case Kind.PONG:
                if not self._pings or self._pings.popleft() != payload:
                    raise WireError("PONG that answers no ping, or not the oldest")
                return PongReceived(payload)
            case _:
                hello = decode_hello(payload)
                self._greeted = True
                return HelloReceived(hello)

    def _handle_open(self, stream_id: int, payload: bytes) -> Event:
        if stream_id % 2 == self._parity:
            raise WireError(f"OPEN of stream {stream_id}, which is ours to open")
        if stream_id <= self._last_peer_id:
            raise WireError(f"OPEN of stream {stream_id} after {self._last_peer_id}")
        if self._peer_open_count >= MAX_STREAMS:
            raise WireError(f"more than {MAX_STREAMS} open streams")
        header = decode_json(payload, "OPEN")
        self._last_peer_id = stream_id
        self._peer_open_count += 1
        self._streams[stream_id] = StreamState(stream_id)
        return StreamOpened(stream_id, header)

    def _handle_reset(self, stream_id: int, payload: bytes) -> Event | None:
        stream = self._used_stream(Kind.RESET, stream_id)
        try:
            reason = payload.decode()
        except UnicodeDecodeError as exc:
            raise WireError(f"the reason for RESET is not UTF-8: {exc}") from exc
        if stream is None:
            self.idle_frames += 1
            return None
        self._drop_pending(stream)
        if not stream.done:
            self._queue(Kind.RESET, stream_id, urgent=False)
            self._set_done(stream)
        self._set_remote_done(stream)
        return None if stream.refusing else ResetReceived(stream_id, reason)

    def _handle_credit(self, stream_id: int, payload: bytes) -> Event | None:
        stream = self._used_stream(Kind.CREDIT, stream_id)
        (size,) = CREDIT.unpack(payload)
        if size == 0:
            raise WireError("CREDIT of 0 bytes")
        if stream is None or size < CREDIT_STEP:
            self.idle_frames += 1  # less than that no peer of ours gives at a time
        if stream is None:
            return None
        had = stream.send_credit
        if had + size > MAX_CREDIT:
            raise WireError(f"credit of {had + size} bytes on stream {stream_id}; at most {MAX_CREDIT} is allowed")
        stream.send_credit = had + size
        if had or stream.done:
            return None
        if stream.pending:  # an empty piece waits for no credit
            self._ready.append(stream)
        return CreditReceived(stream_id)

    def _used_stream(self, kind: Kind, stream_id: int) -> StreamState | None:
        """Return an open stream, or None for one that is over; any other is a violation."""
        stream = self._streams.get(stream_id)
        if stream is None:
            last = self._last_id if stream_id % 2 == self._parity else self._last_peer_id
            if stream_id > last:
                raise WireError(f"{kind.name} for stream {stream_id}, which was never opened")
        return stream

    def _sending_stream(self, kind: int, stream_id: int) -> StreamState:
        stream = self._streams.get(stream_id)
        if stream is None or stream.remote_done:
            raise WireError(f"{Kind(kind).name} for stream {stream_id}, which the peer does not have open")
        return stream

    def _set_done(self, stream: StreamState) -> None:
        stream.done = True
        if stream.remote_done:
            self._forget(stream)

    def _set_remote_done(self, stream: StreamState) -> None:
        stream.remote_done = True
        if stream.done:
            self._forget(stream)

    def _forget(self, stream: StreamState) -> None:
        if self._streams.pop(stream.id, None) is not None:
            if stream.id % 2 == self._parity:
                self._open_count -= 1
            else:
                self._peer_open_count -= 1
