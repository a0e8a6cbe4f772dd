"""One stream of a channel, as Trio knows streams."""

# This module and `_channel` are one unit, cut in two for its length; users see neither's underscored names.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final

import trio

from ._connection import Connection
from ._errors import ChannelError, StreamResetError
from ._waiter import Waiter


class Owner(Protocol):
    """What a stream needs of its `Channel`."""

    _connection: Connection

    @property
    def failure(self) -> ChannelError | None: ...
    def _error(self) -> Exception: ...
    def _check(self) -> None: ...
    def _forget(self, stream: ChannelStream, /) -> None: ...
    def _flush(self) -> None: ...
    def _flush_blocking(self) -> None: ...
    def feed(self, data: bytes, /) -> None: ...
    async def wait_written(self) -> None: ...


@final
class ChannelStream(trio.abc.HalfCloseableStream):
    """A two-way stream of bytes over a `Channel`, made by `Channel.open_stream` or given to a handler.

    Besides what `trio.abc.HalfCloseableStream` says:

    - Each direction ends by itself: END is read as ``b""``, and data can go on flowing the other way.
    - The peer's `reset` raises `StreamResetError` here, at once: what had come and was not read is dropped,
      unless the peer had sent END before, which makes it complete.
    - When the channel fails, what had come can still be read; then `trio.BrokenResourceError` is
      raised, and its ``__cause__`` is the `ChannelError`.
    - It must be closed, like any stream; leaving the channel's block closes all.
    """

    def __init__(self, channel: Owner, stream_id: int) -> None:
        self._channel = channel
        self._connection = channel._connection
        self.id = stream_id
        """The number both sides know this stream by."""

        self._buffer: bytes | bytearray = b""
        self._ended = False  # the peer's END came
        self._receiving = False
        self._reader = Waiter()
        self._take: Callable[[memoryview], int] | None = None  # of the task that waits in `relay`

        self._send_ended = False
        self._sending = False
        self._sender = Waiter()
        self._torn = False  # part of a send_all went out, and the rest never will

        self._closed = False
        self._reset: str | None = None  # the peer's reason
        self._watcher = Waiter()  # for its being over by any of these
        self._on_news: Callable[[], object] | None = None  # of who has no task that waits

    def __repr__(self) -> str:
        if self._closed:
            state = "closed"
        elif self._reset is not None:
            state = "reset by the peer"
        elif self._channel.failure is not None:
            state = "broken"
        else:
            state = "open"
        return f"<ChannelStream {self.id}: {state}>"

    @property
    def channel(self) -> Owner:
        """The channel that it is a stream of."""
        return self._channel

    # --- Sending ---

    @trio.lowlevel.enable_ki_protection
    async def send_all(self, data: bytes | bytearray | memoryview, *, end: bool = False) -> None:
        """Send *data*, waiting while the peer takes no more; returns when all is on its way.

        Cancelled: a part of *data* may have been sent. Then `aclose` resets the stream
        instead of ending it, so that the peer can't take a part for the whole.

        Args:
          data: Must not change until this returns.
          end: Send END as well, in the same write if there is room, like `send_eof` afterwards.

        Raises:
          trio.BusyResourceError: if another task is sending on this stream.
          trio.ClosedResourceError: if END was sent or the stream closed here, before or meanwhile.
          StreamResetError: if the peer gave the stream up.
          trio.BrokenResourceError: if the channel failed; ``__cause__`` says why.

        """
        await self._send(data, end=end, close=False)

    @trio.lowlevel.enable_ki_protection
    async def send_and_close(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data* and close the stream in the same write, so that the peer need not answer.

        However this ends, the stream is closed; cancelled or failed, as if `send_all` had been.
        """
        try:
            await self._send(data, end=True, close=True)
        finally:
            self.close()

    def send_and_close_nowait(self, data: bytes) -> bool:
        """Do what `send_and_close` does, and leave it to the channel to write *data* when it can.

        For what is little: it stays in memory until the peer takes it. Nobody else may be sending on the stream.

        Returns:
          False if there is no credit for all of it; then nothing was done.

        Raises:
          trio.ClosedResourceError, StreamResetError, trio.BrokenResourceError: as `send_all`.

        """
        self._check_send()
        if not self._connection.send_and_close(self.id, data):
            return False
        self._closed = True
        self._channel._forget(self)
        self._channel._flush()
        if self._reader:
            self._reader.fail(trio.ClosedResourceError("this stream was closed here"))
        self._watcher.wake()
        return True

    def send_nowait(self, data: memoryview) -> int:
        """Send as much of *data* as can be written at once, and return how many bytes that is; for the *take* of `relay`.

        Errors are those of `send_all`.
        """
        self._check_send()
        size = 0 if self._sending else self._connection.send_now(self.id, data)
        self._channel._flush()
        return size

    def send_blocking(self, data: bytes) -> None:
        """Send a few bytes, and let no other task run until they are written. Call `Channel.wait_written` just before.

        For a `PortStream` only, and for no more than there is credit for: for the first words on a stream.
        """
        self._check_send()
        self._connection.send(self.id, data, end=False, close=False)
        self._channel._flush_blocking()

    async def _send(self, data: bytes | bytearray | memoryview, *, end: bool, close: bool) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_send()
            if not data and not end:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            self._connection.send(self.id, data, end=end, close=close)
            self._channel._flush()
            if self._connection.is_sending(self.id):
                try:
                    self._channel._check()
                    # Taken back at once, or the rest could still be sent, and be the whole for the peer, and a failure for us.
                    await self._sender.wait(self._unsend)
                except BaseException:
                    self._unsend()  # nothing is left to take back where a reset or the channel's end woke us
                    raise
            else:
                self._channel._check()
                await trio.lowlevel.cancel_shielded_checkpoint()
            self._send_ended = end
        finally:
            self._sending = False

    def _unsend(self) -> None:
        self._torn = self._connection.unsend(self.id) or self._torn

    @trio.lowlevel.enable_ki_protection
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the peer takes data, or sending would fail; errors are those of `send_all`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_send()
            if self._connection.can_send(self.id):
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await self._sender.wait()
        finally:
            self._sending = False

    @trio.lowlevel.enable_ki_protection
    async def send_eof(self) -> None:
        """Send END: the peer reads ``b""`` after all that was sent. Doing it again does nothing.

        Cancelled: END was sent, or nothing happened. Errors are those of `send_all`.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._closed or not self._send_ended:
                self._check_send()
                self._send_ended = True
                self._connection.end(self.id)
                self._channel._flush()
            await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending = False

    def _check_send(self) -> None:
        if self._closed or self._send_ended:
            raise trio.ClosedResourceError("this stream was closed here" if self._closed else "END was sent")
        if self._reset is not None:
            raise StreamResetError(self._reset)
        self._channel._check()

    # --- Receiving ---

    @trio.lowlevel.enable_ki_protection
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has come, waiting for at least one byte; ``b""`` after the peer's END.

        Cancelled: nothing is lost.

        Args:
          max_bytes: At most so many, at least 1; None for all that is there.

        Raises:
          trio.BusyResourceError: if another task is receiving on this stream.
          trio.ClosedResourceError: if the stream was closed here, before or meanwhile.
          StreamResetError: if the peer gave the stream up before END.
          trio.BrokenResourceError: if the channel failed and all that came was read; ``__cause__`` says why.

        """
        if max_bytes is not None:
            if not isinstance(max_bytes, int):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"`max_bytes` must be an integer or None, not {max_bytes!r}")
            if max_bytes < 1:
                raise ValueError(f"`max_bytes` must be at least 1, not {max_bytes}")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._is_receivable():
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await self._reader.wait()
        finally:
            self._receiving = False
        self._is_receivable()  # again, after the last checkpoint, where it may have been reset; a cancellation loses nothing
        return self._take_received(max_bytes)

    @trio.lowlevel.enable_ki_protection
    def receive_nowait(self, max_bytes: int) -> bytes:
        """Return what `receive_some` would, and raise what it would, or `trio.WouldBlock` where it would wait."""
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        if not self._is_receivable():
            raise trio.WouldBlock
        return self._take_received(max_bytes)

    def _take_received(self, max_bytes: int | None) -> bytes:
        buffer = self._buffer
        if max_bytes is None or max_bytes >= len(buffer):
            self._buffer = b""
            data = bytes(buffer)
        else:
            data = bytes(buffer[:max_bytes])
            if not isinstance(buffer, bytearray):
                self._buffer = buffer = bytearray(buffer)
            del buffer[:max_bytes]
        if data:
            self._connection.take(self.id, len(data))
            self._channel._flush()
        return data

    @property
    def has_news(self) -> bool:
        """Whether `receive_some` would return, or raise, at once."""
        return self._closed or bool(self._buffer) or self._ended or self._is_broken

    @property
    def reset_reason(self) -> str | None:
        """Why the peer gave the stream up; None if it did not."""
        return self._reset

    @property
    def is_given_up(self) -> bool:
        """Whether `wait_given_up` would return at once."""
        return self._closed or self._is_broken

    def call_on_news(self, function: Callable[[], object] | None) -> None:
        """Have *function* called when `has_news` becomes true, and with each news after that; None: not any more.

        For who has no task that waits. It is called at once if there are news already, and later by the task that reads the channel; it
        must neither wait nor raise. What `relay` passes on is no news, and nor is what is done to the stream on this side.
        """
        self._on_news = function
        if function is not None and self.has_news:
            function()

    @trio.lowlevel.enable_ki_protection
    async def relay(self, take: Callable[[memoryview], int]) -> bytes:
        """Have what comes taken by *take*, as soon as it comes and without waking this task, for as long as it takes all.

        For who passes much on: it saves two copies, and a turn of the scheduler, of each piece.

        Cancelled: nothing is lost. Errors are those of `receive_some`, and whatever *take* raises.

        Args:
          take: Called with some bytes, which are valid until it returns; returns how many it has taken. Must not wait.

        Returns:
          The first bytes that it did not take; ``b""`` after the peer's END.

        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._take = take
        try:
            return await self.receive_some()
        finally:
            self._take = None

    def _is_receivable(self) -> bool:
        """Whether there is data or END; raise what forbids receiving."""
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        if self._buffer or self._ended:
            return True
        if self._reset is not None:
            raise StreamResetError(self._reset)
        self._channel._check()
        return False

    # --- Closing ---

    @trio.lowlevel.enable_ki_protection
    def close(self) -> None:
        """Close both directions at once, without waiting. Doing it again does nothing.

        The peer reads END after what was sent, and what it goes on sending fails there. It reads a
        reset instead where a `send_all` was cut short, be it just now.
        """
        if self._closed:
            return
        if self._torn or self._connection.is_sending(self.id):
            self.reset("closed while sending")
            return
        self._connection.end(self.id)
        self.reset("closed")

    @trio.lowlevel.enable_ki_protection
    def reset(self, reason: str = "") -> None:
        """Give the stream up, both directions, at once and without waiting; after closing, do nothing.

        What is underway in either direction is dropped. The peer gets a `StreamResetError` with *reason*,
        of which 256 bytes (UTF-8) travel.
        """
        if self._closed:
            return
        self._closed = True
        self._buffer = b""
        self._connection.reset(self.id, reason)
        self._channel._forget(self)
        self._channel._flush()
        self._wake(lambda: trio.ClosedResourceError("this stream was closed here"))
        self._watcher.wake()

    @trio.lowlevel.enable_ki_protection
    async def wait_given_up(self) -> None:
        """Wait until the peer resets the stream, it is closed here, or the channel ends; for one task at a time.

        For who neither sends nor receives at the moment, and would not notice.
        """
        if self.is_given_up:
            await trio.lowlevel.checkpoint()
        else:
            await self._watcher.wait()

    async def aclose(self) -> None:
        """`close`, and a checkpoint. Cancelled: it is closed all the same."""
        self.close()
        await trio.lowlevel.checkpoint()

    # --- What the channel tells it ---

    def _on_data(self, data: bytes | bytearray | memoryview) -> None:
        if self._take is not None and not self._buffer:
            try:
                taken = self._take(memoryview(data))
            except Exception as exc:  # noqa: BLE001  it is raised where it belongs
                self._take = None
                self._reader.fail(exc)
            else:
                self._connection.take(self.id, taken)
                data = data[taken:]
                if not data:
                    return
        if not self._buffer:
            self._buffer = bytes(data)
        elif isinstance(self._buffer, bytearray):
            self._buffer += data
        else:
            self._buffer = bytearray(self._buffer)
            self._buffer += data
        self._reader.wake()
        self._tell_news()

    def _on_end(self) -> None:
        self._ended = True
        self._reader.wake()
        self._tell_news()

    def _tell_news(self) -> None:
        if self._on_news is not None:
            self._on_news()

    def _on_reset(self, reason: str) -> None:
        self._reset = reason
        if not self._ended:
            self._buffer = b""
            self._reader.fail(StreamResetError(reason))
        self._sender.fail(StreamResetError(reason))
        self._watcher.wake()
        self._tell_news()

    def _on_sent(self) -> None:
        self._sender.wake()

    @property
    def _is_broken(self) -> bool:
        return self._reset is not None or self._channel.failure is not None

    def _on_credit(self) -> None:
        # A pending send_all goes on by itself: it waits until all of it is sent.
        if not self._connection.is_sending(self.id):
            self._sender.wake()

    def _on_channel_end(self, *, closed: bool) -> None:
        """The channel failed, or was closed here."""
        if closed:
            self._closed = True
        self._wake(self._channel._error)
        self._watcher.wake()
        self._tell_news()

    def _wake(self, make_error: Callable[[], Exception]) -> None:
        # An exception each: two tasks raising one would write into the same traceback.
        # Nobody waits to receive where END has come, so what is complete stays readable.
        self._reader.fail(make_error())
        self._sender.fail(make_error())
