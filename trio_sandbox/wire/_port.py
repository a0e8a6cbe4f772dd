"""Streams that can also write without waiting, of which one is a file descriptor."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
from abc import abstractmethod
from typing import final

import trio

from ._errors import PeerGoneError, WireError

#: Bytes that are received at once.
READ_SIZE = 131072
#: What a virtio-serial port has its buffers in: Linux's driver allocates them so.
_PAGE = 4096
#: Bytes that `PortStream.skip_past` drops at most: more than a port and its sockets hold.
SKIP_LIMIT = 1 << 20
#: Seconds after which `PortStream.call` sends its marker again.
_CALL_AGAIN = 0.25


class DirectStream(trio.abc.Stream):
    """A stream from which `open_channel` saves turns of the scheduler, and copies."""

    @abstractmethod
    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Write as much as is taken at once and return how many bytes that was, maybe 0. What is written next is the rest.

        Raises:
          trio.ClosedResourceError: if this was closed.
          trio.BrokenResourceError: if the peer is gone; ``__cause__`` says why.

        """

    @abstractmethod
    async def receive_view(self) -> bytes | memoryview:
        """Like `receive_some`, but what it returns may be valid until the next call only, which saves a copy."""


@final
class PortStream(DirectStream):
    """A virtio-serial port, or one end of a socket pair, for `open_channel`.

    Unlike Trio's own streams it waits before it reads, because a channel's reader hardly ever finds
    something at once, and it has `send_nowait`. Under software emulation each saved system call and each
    saved turn of the scheduler is felt in every round trip.

    Args:
      fd: The descriptor, of something that `epoll` takes. Owned from now on, and made non-blocking.

    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)
        self._full = False  # the last read took all it could, so that there may be more
        self._ahead = b""  # read already, and to be received next
        self._marker = b""  # what may come again before anything else
        self._buffer = memoryview(b"")  # until something is read
        self._pages: list[memoryview] = []

    def fileno(self) -> int:
        """Return the descriptor, or -1 after closing."""
        return self._fd

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """See `DirectStream`; what is written next may be anything."""
        self._check()
        done = 0
        with memoryview(data) as view:
            while done < len(view):
                try:
                    done += os.write(self._fd, view[done:] if done else view)
                except BlockingIOError:
                    break
                except OSError as exc:
                    raise trio.BrokenResourceError(f"writing failed: {exc}") from exc
        return done

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write *data*; only one task at a time may. Cancelled: a part of it may be written."""
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data)
        while True:
            view = view[self.send_nowait(view) :]
            if not view:
                break
            await trio.lowlevel.wait_writable(self._fd)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until something can be written."""
        self._check()
        await trio.lowlevel.wait_writable(self._fd)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what there is to read, waiting for at least one byte; ``b""`` at the end."""
        self._check()
        size = READ_SIZE if max_bytes is None else min(max_bytes, READ_SIZE)
        if size < 1:
            raise ValueError(f"`max_bytes` must be at least 1, not {max_bytes}")
        if not self._marker:
            return await self._read(size)
        # The other end may have sent the marker more often than was needed.
        marker, data = self._marker, b""
        while True:
            more = await self._read(size)
            data += more
            while data.startswith(marker):
                data = data[len(marker) :]
            if not more or not marker.startswith(data):
                break
        self._marker = b""
        data, self._ahead = data[:size], data[size:] + self._ahead
        return data

    async def receive_view(self) -> bytes | memoryview:
        """See `DirectStream`."""
        self._check()
        return await (self.receive_some() if self._marker or self._ahead else self._read_view(READ_SIZE))

    async def _read(self, size: int) -> bytes:
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            await trio.lowlevel.checkpoint()
            return data
        return bytes(await self._read_view(size))

    async def _read_view(self, size: int) -> memoryview:
        if not self._pages:
            self._buffer = memoryview(bytearray(READ_SIZE))
            # A read of a port gives one page at most, but the kernel reads on for as long as each of these is filled.
            self._pages = [self._buffer[start : start + _PAGE] for start in range(0, READ_SIZE, _PAGE)]
        first = self._pages[:1] if size >= _PAGE else [self._buffer[:size]]
        while True:
            if self._full:
                await trio.lowlevel.checkpoint()
                self._check()
            else:
                await trio.lowlevel.wait_readable(self._fd)
            try:
                length = os.readv(self._fd, first)
                if length == _PAGE < size:
                    # Now, and not before, since most of what comes is short and to hand the kernel all pages would be felt.
                    with contextlib.suppress(OSError):  # the next read meets it again
                        length += os.readv(self._fd, self._pages[1 : size // _PAGE])
            except BlockingIOError:
                self._full = False
            except OSError as exc:
                raise trio.BrokenResourceError(f"reading failed: {exc}") from exc
            else:
                self._full = length == size
                return self._buffer[:length]

    async def skip_past(self, marker: bytes) -> None:
        """Drop what comes up to *marker*, and that too; what comes after it is received next.

        The two ends of a machine's port agree by this on where a new conversation starts, when the machine
        goes on from a saved state: what was under way on its port then may be lost, or come late. At most
        `SKIP_LIMIT` bytes are dropped, and repetitions of the marker. Cancelled: it can be called again.

        Raises:
          WireError: if the peer sends more than that without the marker.
          PeerGoneError: if the end comes first.

        """
        seen, dropped = b"", 0
        while True:
            try:
                data = await self._read(READ_SIZE)
            except trio.Cancelled:
                self._ahead = seen
                raise
            if not data:
                raise PeerGoneError("the connection ended before the marker")
            seen += data
            start = seen.find(marker)
            if start >= 0:
                break
            # Its beginning may be there already.
            kept = seen[-len(marker) + 1 :]
            dropped += len(seen) - len(kept)
            if dropped > SKIP_LIMIT:
                raise WireError(f"no marker in the first {dropped} bytes")
            seen = kept
        self._ahead, self._marker = seen[start + len(marker) :], marker

    async def call(self, marker: bytes) -> None:
        """Send *marker* until it comes back, and drop what comes before it.

        More than once, as a reader of the old conversation, which has yet to end, may take the first for its own.
        Errors and cancelling are as for `skip_past`; the other end must have called that.
        """
        await self.send_all(marker)
        while True:
            with trio.move_on_after(_CALL_AGAIN):
                await self.skip_past(marker)
                return
            self.send_nowait(marker)

    def send_blocking(self, data: memoryview) -> None:
        """Write *data*; nothing else of this thread runs meanwhile. Errors as `send_nowait`."""
        writable = select.poll()
        writable.register(self._fd, select.POLLOUT)
        while data := data[self.send_nowait(data) :]:
            writable.poll()

    def block_until(self, *words: bytes) -> bytes:
        """Read until one of *words* came, and return all that was read; at the end of the data, too.

        Nothing else of this thread runs meanwhile, which is the point: a machine whose state is saved in here
        is in the same place wherever it goes on. Give what was read to the channel, or to `unread` of a new stream.
        """
        data, self._ahead = bytearray(self._ahead), b""
        overlap = max(map(len, words)) - 1
        readable = select.poll()
        readable.register(self._fd, select.POLLIN)
        start = 0
        while not any(data.find(word, start) >= 0 for word in words):
            start = max(len(data) - overlap, 0)
            readable.poll()
            try:
                piece = os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                continue
            if not piece:
                break
            data += piece
        return bytes(data)

    def unread(self, data: bytes) -> None:
        """Have *data* received before what is still to be read. Nobody may be waiting to receive."""
        self._ahead = data + self._ahead

    def count_untaken(self) -> int:
        """Return how many bytes, at least, the peer has yet to read of what was sent; for a socket."""
        self._check()
        count: int = struct.unpack("i", fcntl.ioctl(self._fd, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        return count

    def close(self) -> None:
        """Close at once; whoever waits gets `trio.ClosedResourceError`. Doing it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)

    async def aclose(self) -> None:
        """`close`, and a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self._fd < 0:
            raise trio.ClosedResourceError("this port was closed")
