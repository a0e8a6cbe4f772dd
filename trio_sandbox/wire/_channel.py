"""The guest channel: any number of two-way streams over one connection, with Trio around the protocol."""

# This module and `_stream` are one unit, cut in two for its length; users see neither's underscored names.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias, final

import trio

from ._connection import BACKLOG_LIMIT, Connection
from ._errors import ChannelError, PeerGoneError, PeerSilentError
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
from ._framing import Role
from ._groups import besides_broken, hide_nursery
from ._pace import Pace
from ._port import DirectStream, PortStream
from ._stream import ChannelStream
from ._waiter import Waiter

#: Called with each stream that the peer opens, and with OPEN's header, which is not to be trusted. It is called in the task that
#: reads and must not wait; what it returns is awaited in a task of its own, so that it can be any async function. None: it
#: has served the stream, and closed it, already.
StreamHandler: TypeAlias = "Callable[[ChannelStream, dict[str, object]], Awaitable[object] | None]"

#: Seconds between two looks whether the peer has read what was sent.
_LOOK = 0.001
#: Seconds that leaving the block waits for the peer to take what is queued.
FLUSH_GRACE = 1.0


class ChannelStatistics(NamedTuple):
    """Numbers about a channel, all but the last three since it was opened."""

    bytes_sent: int
    """Handed to the transport, headers and all."""
    bytes_received: int
    """Headers and all."""
    writes: int
    """Calls of the transport's `send_all`."""
    reads: int
    """Calls of the transport's `receive_some` that returned data."""
    open_streams: int
    """Streams that are not over on both sides."""
    peer_streams: int
    """Those of them that the peer opened."""
    backlog: int
    """Bytes of control frames that wait to be written."""


@final
class Channel:
    """One side of a guest channel; made by `open_channel` only."""

    def __init__(self, transport: trio.abc.Stream, connection: Connection, handler: StreamHandler | None) -> None:
        self._transport = transport
        self._direct = transport if isinstance(transport, DirectStream) else None
        self._port = transport if isinstance(transport, PortStream) else None
        self._connection = connection
        self._handler = handler
        self._streams: dict[int, ChannelStream] = {}
        self._handlers: trio.Nursery | None = None
        self._served = 0  # by tasks of theirs, so far
        self._scope = trio.CancelScope(shield=True)  # of the tasks that read and write

        self._peer_hello: dict[str, object] | None = None
        self._greeted = trio.Event()
        self._failure: ChannelError | None = None
        self._closed = False
        self._ended = trio.Event()

        self._writer = Waiter()
        self._writing = False  # the writer is, or is about to be, in the middle of a write
        self._rest: memoryview | None = None  # of a write that `_flush` began and the writer has to finish
        self._drained = Waiter()  # the reader waits for the writer here
        self._written = Waiter()  # for there being nothing to write
        self._held = False  # nothing is to be written
        self._flushed = trio.Event()
        self._pings: deque[Waiter] = deque()
        self._ping_count = 0

        self._bytes_sent = self._bytes_received = self._writes = self._reads = 0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._failure is None else f"failed ({self._failure})"
        return f"<Channel: {state}, {self._connection.open_streams} streams>"

    @property
    def peer_hello(self) -> dict[str, object]:
        """What the peer introduced itself with; only "version" was checked."""
        assert self._peer_hello is not None, "open_channel() waits for it"
        return self._peer_hello

    @property
    def failure(self) -> ChannelError | None:
        """Why the channel failed, or None while it has not."""
        return self._failure

    @trio.lowlevel.enable_ki_protection
    def open_stream(self, header: Mapping[str, object], *, flush: bool = False) -> ChannelStream:
        """Open a stream, at once and without waiting for the peer.

        What is sent on it before the next checkpoint travels in the same write.

        Args:
          header: A JSON object, at most 4096 bytes, that tells the peer's handler what this stream is for.
          flush: Write it here and now, where the transport can: nothing is about to be sent on it.

        Raises:
          ValueError: if *header* is too long or isn't JSON.
          StreamLimitError: if this side has 1024 streams open already.
          trio.BrokenResourceError: if the channel failed; ``__cause__`` says why.
          trio.ClosedResourceError: if the channel's block was left.

        """
        self._check()
        stream = ChannelStream(self, self._connection.open_stream(header))
        self._streams[stream.id] = stream
        if flush:
            self._flush()
        else:
            self._wake_writer()
        return stream

    async def ping(self) -> float:
        """Return the seconds that it takes the peer to answer a ping, queues included.

        Cancelled: the answer will be ignored. Errors are those of `open_stream`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self._ping_count += 1
        waiter = Waiter()
        self._pings.append(waiter)
        self._connection.ping(self._ping_count.to_bytes(8, "big"))
        start = trio.current_time()
        self._wake_writer()
        await waiter.wait()
        return trio.current_time() - start

    async def wait_closed(self) -> ChannelError | None:
        """Wait until the channel fails, and return why, or None once its block has been left."""
        await self._ended.wait()
        return self._failure

    async def wait_written(self) -> None:
        """Wait until all that can be sent now has been written; for one task at a time. Errors as `open_stream`."""
        await trio.lowlevel.checkpoint()
        self._check()
        while self._writing or self._connection.wants_write:
            self._wake_writer()
            await self._written.wait()

    @asynccontextmanager
    async def hold_writes(self) -> AsyncGenerator[None]:
        """Write nothing for a block; what is sent meanwhile is written after it. One block at a time.

        When the block starts the peer has read all that was written before, where the transport is a `PortStream`
        over a socket. In the block silence is no failure. Errors are those of `open_stream`.
        """
        assert not self._held
        await self.wait_written()
        self._held = True
        try:
            while self._port is not None and self._port.count_untaken():
                await trio.sleep(_LOOK)
                self._check()
            yield
        finally:
            self._held = False
            self._flush()

    @trio.lowlevel.enable_ki_protection
    def feed(self, data: bytes) -> None:
        """Take *data* that somebody else has read of the transport, as if it were received now."""
        try:
            for event in self._connection.receive(data):
                assert event is not None, "only a guest is fed, and guests don't make pauses"
                self._dispatch(event)
        except ChannelError as exc:
            self._fail(exc)
        else:
            self._flush()

    def statistics(self) -> ChannelStatistics:
        """Return numbers for debugging and monitoring."""
        return ChannelStatistics(
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            writes=self._writes,
            reads=self._reads,
            open_streams=self._connection.open_streams,
            peer_streams=self._connection.peer_streams,
            backlog=self._connection.backlog,
        )

    # --- For the streams ---

    def _error(self) -> Exception:
        """Return a fresh exception that says why nothing works any more."""
        if self._closed:
            return trio.ClosedResourceError("the channel was closed here")
        error = trio.BrokenResourceError(f"the channel failed: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _check(self) -> None:
        if self._closed or self._failure is not None:
            raise self._error()

    def _forget(self, stream: ChannelStream) -> None:
        self._streams.pop(stream.id, None)

    def _wake_writer(self) -> None:
        """Have written soon what is queued, together with what others queue until the next checkpoint."""
        if self._writer and not self._held and self._connection.wants_write:
            self._writer.wake()

    def _flush(self) -> None:
        """Write what is queued here and now, where the transport can; saves waking the writer, and being woken by it."""
        direct = self._direct
        if direct is None:
            self._wake_writer()
            return
        connection = self._connection
        try:
            # While the writer is in the middle of a write nothing may come between; it takes this when it is through.
            while connection.wants_write and not self._writing and not self._held:
                data = self._next_write()
                done = direct.send_nowait(data)
                if done < len(data):
                    self._writing = True
                    self._rest = memoryview(data)[done:]
                    self._writer.wake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(PeerGoneError("the connection broke"), exc)

    def _flush_blocking(self) -> None:
        """Write what is queued, and let no other task run until all of it is written; between other writes only."""
        assert self._port is not None
        assert not self._writing
        self._flush()
        while self._rest is not None:
            rest, self._rest = self._rest, None
            self._port.send_blocking(rest)
            self._writing = False
            self._flush()

    def _next_write(self) -> bytes | bytearray:
        data, sent = self._connection.next_write()
        for stream_id in sent:
            if stream := self._streams.get(stream_id):
                stream._on_sent()
        if data:
            self._writes += 1
            self._bytes_sent += len(data)
        return data

    # --- Tasks ---

    async def _serve(self, silence_timeout: float) -> None:
        """Read, write and ping until the channel fails or its scope is cancelled."""
        with self._scope:
            try:
                with hide_nursery():
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._write)
                        nursery.start_soon(self._read)
                        if silence_timeout != math.inf:
                            nursery.start_soon(self._watch, silence_timeout)
            finally:
                # The peer learns of our end from this, and nothing else: a broken peer would not listen.
                await trio.aclose_forcefully(self._transport)

    @trio.lowlevel.enable_ki_protection
    async def _read(self) -> None:  # noqa: ASYNC910 - leaves only by an error of the transport, after which it ends
        connection = self._connection
        receive = self._transport.receive_some if self._direct is None else self._direct.receive_view
        pace = Pace() if connection.makes_pauses else None
        try:
            while True:
                data = await receive()
                if not data:
                    raise PeerGoneError("the peer closed the connection")
                self._reads += 1
                self._bytes_received += len(data)
                if pace is not None:
                    pace.begin_turn(len(data))
                for event in connection.receive(data):
                    if event is not None:
                        self._dispatch(event)
                    elif pace is not None:
                        self._flush()
                        await trio.sleep(pace.end_turn(connection.idle_frames, self._served))
                        pace.begin_turn()
                self._flush()
                if pace is not None and (pause := pace.end_turn(connection.idle_frames, self._served)):
                    await trio.sleep(pause)
                while connection.backlog > BACKLOG_LIMIT:
                    await self._drained.wait()
        except ChannelError as exc:
            self._fail(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(PeerGoneError("the connection broke"), exc)

    def _dispatch(self, event: Event) -> None:
        match event:
            case DataReceived(stream_id, data):
                if stream := self._streams.get(stream_id):
                    stream._on_data(data)
            case EndReceived(stream_id):
                if stream := self._streams.get(stream_id):
                    stream._on_end()
            case StreamOpened(stream_id, header):
                self._accept(stream_id, header)
            case ResetReceived(stream_id, reason):
                if stream := self._streams.get(stream_id):
                    stream._on_reset(reason)
            case CreditReceived(stream_id):
                if stream := self._streams.get(stream_id):
                    stream._on_credit()
            case PongReceived():
                self._pings.popleft().wake()
            case HelloReceived(hello):
                self._peer_hello = hello
                self._greeted.set()

    def _accept(self, stream_id: int, header: dict[str, object]) -> None:
        if self._handler is None or self._handlers is None:
            self._connection.reset(stream_id, "refused")
            self._connection.idle_frames += 1
            return
        stream = ChannelStream(self, stream_id)
        self._streams[stream_id] = stream
        serving = self._handler(stream, header)
        if serving is not None:
            self._served += 1
            self._handlers.start_soon(self._handle, serving, stream)

    async def _handle(  # noqa: ASYNC910 - the handler's checkpoints are its own affair
        self, serving: Awaitable[object], stream: ChannelStream
    ) -> None:
        try:
            await serving
        except (trio.BrokenResourceError, BaseExceptionGroup) as exc:
            stream.reset("the handler failed")
            # Not a bug where the stream broke and the handler only did not care.
            rest = besides_broken(exc) if stream._is_broken else exc
            if rest is exc:
                raise
            if rest is not None:
                raise rest from None
        except BaseException as exc:
            stream.reset("cancelled" if isinstance(exc, trio.Cancelled) else "the handler failed")
            raise
        else:
            stream.close()

    @trio.lowlevel.enable_ki_protection
    async def _write(self) -> None:  # noqa: ASYNC910 - as above
        try:
            while True:
                if self._held:
                    await self._writer.wait()
                    continue
                data = self._rest or self._next_write()
                self._rest = None
                if data:
                    self._writing = True
                    await self._transport.send_all(data)
                    self._writing = False
                    self._drained.wake()
                else:
                    self._written.wake()
                    if self._closed:
                        self._flushed.set()
                    await self._writer.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(PeerGoneError("the connection broke"), exc)

    async def _watch(self, silence_timeout: float) -> None:
        while True:
            await trio.sleep(silence_timeout / 2)
            with trio.move_on_after(silence_timeout) as patience:
                await self.ping()
            if patience.cancelled_caught and not self._held:
                self._fail(PeerSilentError(f"the peer left a ping unanswered for {silence_timeout} seconds"))

    @trio.lowlevel.enable_ki_protection
    def _fail(self, failure: ChannelError, cause: BaseException | None = None) -> None:
        """Record the one reason, tell everyone who waits, and end our tasks."""
        if self._failure is not None or self._closed:
            return
        failure.__cause__ = failure.__cause__ or cause
        self._failure = failure
        self._end()
        self._scope.cancel(reason=f"the channel failed: {failure}")

    def _end(self) -> None:
        self._ended.set()
        self._greeted.set()
        for stream in list(self._streams.values()):  # who hears of it may close others
            stream._on_channel_end(closed=self._closed)
        for waiter in self._pings:
            waiter.fail(self._error())
        self._written.fail(self._error())

    async def _close(self) -> None:
        """Say goodbye to all streams, and give the peer a moment to take what is queued."""
        for stream in list(self._streams.values()):
            stream.reset("the channel was closed")
        self._closed = True
        self._end()
        if self._failure is None:
            self._writer.wake()
            with trio.move_on_after(FLUSH_GRACE):
                await self._flushed.wait()
        else:
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_channel(
    stream: trio.abc.Stream,
    *,
    role: Role,
    hello: Mapping[str, object],
    handler: StreamHandler | None = None,
    silence_timeout: float = math.inf,
) -> AsyncGenerator[Channel]:
    """Run one side of a guest channel over *stream* for a block.

    Both sides have said hello when the block starts; bound that by a cancel scope of your own around
    the whole, or around the entry alone by an `AsyncExitStack`. When the channel fails the block goes
    on: its streams raise, and `Channel.wait_closed` returns. However the block is left, its handlers
    are cancelled first and *stream* is closed last.

    Args:
      stream: The connection to the peer. It is closed in any case.
      role: Which side this is; the peer must be the other.
      hello: A JSON object, at most 64 KiB, to introduce this side with; "version" is added.
      handler: Called with each stream that the peer opens, and its header; see `StreamHandler`. When what it returned
        is through the stream is closed. An exception is a bug: it cancels the block and comes out of it,
        unless it only says that the stream broke. None: such streams are reset ("refused").
      silence_timeout: Seconds that the peer may leave a ping unanswered before the channel fails;
        `math.inf` to send none.

    Raises:
      ValueError: if *hello* is too long, isn't JSON or has another version, or *silence_timeout* isn't positive.
      WireError: if the peer's hello, or what came in its place, broke the protocol.
      PeerGoneError: if the connection ended before the peer's hello.

    """
    if not silence_timeout > 0:
        raise ValueError(f"`silence_timeout` must be a positive number of seconds, not {silence_timeout!r}")
    channel = Channel(stream, Connection(role, hello), handler)
    with hide_nursery():
        async with trio.open_nursery() as services:
            try:
                with hide_nursery():
                    async with trio.open_nursery() as handlers:
                        # Before the first byte is read: the peer may open a stream right after its hello.
                        channel._handlers = handlers
                        services.start_soon(channel._serve, silence_timeout)
                        try:
                            await channel._greeted.wait()
                            if channel._failure is not None:
                                raise channel._failure
                            yield channel
                        finally:
                            channel._handlers = None
                            handlers.cancel_scope.cancel(reason="the block of open_channel() was left")
                await channel._close()
            finally:
                channel._closed = True
                channel._end()
                channel._scope.cancel(reason="the block of open_channel() was left")
