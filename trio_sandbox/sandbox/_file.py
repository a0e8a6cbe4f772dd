"""Open files in the guest."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from operator import index
from typing import TypeVar, final

import trio

from ..constants import MAXIMUM_READ_BYTES
from ..guest.trees import CHUNK, HEADER
from ._files import FileSession, encode_request

T = TypeVar("T")

_WRITE = b"W"


@final
class GuestFile(trio.abc.AsyncResource):
    """A file in the guest, open for bytes. Made by `GuestPath.open`.

    Like a file of `trio.open_file` in a binary mode: ``async with``, ``async for`` line by line, and these methods. One task
    at a time. A cancelled method may have had its effect, and the file is closed.

    Methods raise the `OSError` of the guest, `ValueError` once the file is closed, `io.UnsupportedOperation`
    if the mode does not allow it, and what the methods of `GuestPath` raise.
    """

    def __init__(self, name: str, mode: str, session: FileSession, limit: int) -> None:
        self.name = name
        """The path that it was opened by."""
        self.mode = mode
        """The mode that it was opened with."""
        self._readable = "r" in mode or "+" in mode
        self._writable = mode[0] != "r" or "+" in mode
        self._session = session
        self._limit = limit
        self._buffer = bytearray()  # that was read ahead
        self._searched = 0  # so much of it holds no end of a line
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<trio_sandbox.GuestFile {self.name!r}, mode {self.mode!r}: {'closed' if self._closed else 'open'}>"

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._closed

    def readable(self) -> bool:
        """Whether the mode allows reading."""
        return self._readable

    def writable(self) -> bool:
        """Whether the mode allows writing."""
        return self._writable

    async def read(self, size: int | None = -1) -> bytes:
        """Return *size* bytes, fewer only at the end of the file; all of the rest if negative or None.

        Raises:
          OSError: also with EFBIG if the rest is more than `constants.MAXIMUM_READ_BYTES`: a guest's file may be endless.
            The position is then behind what was read; `seek`, or read pieces of a given size.

        """
        return await self._read(-1 if size is None else index(size))

    async def _read(self, size: int) -> bytes:
        self._check("read", self._readable)
        if 0 <= size <= len(self._buffer):
            await self._pause()
            return bytes(self._take(size))
        content = self._take(size)
        while data := await self._read_some(CHUNK if size < 0 else min(size - len(content), CHUNK)):
            content += data
            if len(content) == size:
                break
            if size < 0 and len(content) > MAXIMUM_READ_BYTES:
                raise OSError(
                    errno.EFBIG, f"more than {MAXIMUM_READ_BYTES} bytes are left: read pieces of a size", self.name
                )
        return bytes(content)

    async def read1(self, size: int = -1) -> bytes:
        """Return up to *size* bytes, or some if negative, as soon as there are any; ``b""`` at the end of the file.

        So what somebody writes to a pipe or a terminal piece by piece is read piece by piece.
        """
        wanted = index(size)
        self._check("read", self._readable)
        if self._buffer or wanted == 0:
            await self._pause()
            return bytes(self._take(wanted))
        return await self._read_some(CHUNK if wanted < 0 else min(wanted, CHUNK))

    def _take(self, size: int) -> bytearray:
        """Take up to so many bytes of what was read ahead; all of it if negative."""
        data = self._buffer if size < 0 else self._buffer[:size]
        self._drop(len(data))
        return data

    def _drop(self, size: int) -> None:
        if size == len(self._buffer):
            self._buffer = bytearray()  # who took the old one may change it
        else:
            del self._buffer[:size]
        self._searched = 0

    async def readline(self, *, limit: int | None = None) -> bytes:
        r"""Return the next line with its ``\n``; ``b""`` at the end of the file.

        Args:
          limit: The longest line, in bytes; None: the *limit* that the file was opened with.

        Raises:
          OSError: also with EFBIG if the line is longer. Nothing is lost: read it with a higher limit, or by `read`.

        """
        self._check("read", self._readable)
        longest = self._limit if limit is None else check_limit(limit)
        while (end := self._buffer.find(b"\n", self._searched)) < 0 and len(self._buffer) <= longest:
            self._searched = len(self._buffer)
            data = await self._read_some(CHUNK)
            if not data:
                return bytes(self._take(-1))
            self._buffer += data
        size = len(self._buffer) if end < 0 else end + 1
        if size > longest:
            raise OSError(errno.EFBIG, f"a line of more than {longest} bytes: pass a higher `limit`", self.name)
        await self._pause()
        return bytes(self._take(size))

    async def _pause(self) -> None:
        """Be a checkpoint at which no other task may take what was read ahead."""
        self._busy = True
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self._busy = False

    async def _read_some(self, size: int) -> bytes:
        def check(data: bytes) -> bytes:
            if len(data) > size:
                raise self._session.violation(f"{len(data)} bytes where {size} were asked for")
            return data

        return await self._exchange(encode_request("read", size), check)

    def __aiter__(self) -> GuestFile:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of *data* and return its length in bytes."""
        self._check("write", self._writable)
        view = memoryview(data).cast("B")
        if self._buffer:  # what was read ahead was not read yet
            await self.seek(0, io.SEEK_CUR)
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            await self._exchange(b"".join((HEADER.pack(_WRITE, len(chunk)), chunk)), bytes, changes=True)
        await trio.lowlevel.checkpoint()
        return len(view)

    async def flush(self) -> None:
        """Do nothing: the guest's kernel already has what was written."""
        self._check("flush", True)
        await trio.lowlevel.checkpoint()

    async def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, counted from the start, from here or from the end; return it."""
        self._check("seek", True)
        offset, whence = _offset(offset), _offset(whence)
        if whence == io.SEEK_CUR:
            offset -= len(self._buffer)
        position = await self._ask_number("seek", offset, whence)
        self._drop(len(self._buffer))  # only now: where there is no such position, it is still what comes next
        return position

    async def tell(self) -> int:
        """Return the position."""
        self._check("tell", True)
        return await self._ask_number("seek", 0, io.SEEK_CUR) - len(self._buffer)

    async def truncate(self, size: int | None = None) -> int:
        """Make the file *size* bytes long, or end here; return its size. The position stays."""
        self._check("truncate", self._writable)
        field = "" if size is None else _offset(size)
        if self._buffer:  # what was read ahead was not read yet
            await self.seek(0, io.SEEK_CUR)
        return await self._exchange(encode_request("truncate", field), self._number, changes=True)

    async def aclose(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        self._closed = True
        self._session.close()
        await trio.lowlevel.checkpoint()

    def _check(self, what: str, allowed: bool) -> None:
        if self._closed:
            raise ValueError("I/O operation on a closed file")
        if not allowed:
            raise io.UnsupportedOperation(f"not allowed in mode {self.mode!r}: {what}")
        if self._busy:
            raise trio.BusyResourceError("another task is using this file")

    async def _ask_number(self, operation: str, *fields: object) -> int:
        return await self._exchange(encode_request(operation, *fields), self._number)

    async def _exchange(self, request: bytes, parse: Callable[[bytes], T], *, changes: bool = False) -> T:
        self._busy = True
        try:
            async with self._session.failures():
                try:
                    await self._session.send(request)
                    return parse(await self._session.reply())
                except trio.ClosedResourceError:
                    if not self._closed:
                        raise
                    raise ValueError("another task closed the file; what this one wanted of it may be done") from None
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self.name) from None
        except BaseException as exc:
            # An answer that nobody took would be taken for the answer to the next request.
            self._closed = True
            if changes and isinstance(exc, trio.Cancelled):  # done or not done, but not under way: see `call`
                await self._session.take_back()  # noqa: ASYNC102 - it is shielded and bounded by itself
            self._session.close()
            raise
        finally:
            self._busy = False

    def _number(self, payload: bytes) -> int:
        if not 0 < len(payload) <= len(str(2**63)) or not payload.isdigit():
            raise self._session.violation(f"a number that is none: {payload[:80]!r}")
        return int(payload)


def _offset(number: int) -> int:
    """Return what the guest's system calls take, or raise what they would."""
    offset = index(number)
    if not -(2**63) <= offset < 2**63:
        raise OverflowError(f"a position in a file must fit into 64 bits, which {offset} does not")
    return offset


def check_limit(limit: int) -> int:
    """Return what a line may have, or raise for what can be no such number."""
    if index(limit) < 1:
        raise ValueError(f"`limit` must be at least 1, not {limit}")
    return limit
