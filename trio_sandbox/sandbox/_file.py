"""Open files in the guest."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable
from operator import index
from typing import Literal, TypeAlias, TypeVar, final

import trio

from ..guest.trees import CHUNK, HEADER
from ._files import FileSession, encode_request
from ._slot import Slot

T = TypeVar("T")

BinaryMode: TypeAlias = Literal[
    "rb", "wb", "ab", "xb", "rb+", "wb+", "ab+", "xb+", "r+b", "w+b", "a+b", "x+b"
]  # fmt: skip
TextMode: TypeAlias = Literal["r", "w", "a", "x", "r+", "w+", "a+", "x+", "rt", "wt", "at", "xt"]

_WRITE = b"W"


@final
class GuestFile(trio.abc.AsyncResource):
    """A file in the guest, open for bytes. Made by `GuestPath.open`.

    Like what `trio.open_file` gives for binary modes: ``async with``, ``async for`` line by line, and these
    methods. One task at a time. A method that is cancelled may have had its effect; the file is closed then.

    Methods raise the `OSError` of the guest, `ValueError` once the file is closed, `io.UnsupportedOperation`
    for what the mode does not allow, and besides what the methods of `GuestPath` raise.
    """

    def __init__(self, name: str, mode: str, session: FileSession) -> None:
        self.name = name
        """The path that it was opened by."""
        self.mode = mode
        """The mode that it was opened with."""
        self._readable = "r" in mode or "+" in mode
        self._writable = mode[0] != "r" or "+" in mode
        self._session = session
        self._buffer = b""
        self._at_end = False
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<trio_sandbox.GuestFile {self.name!r}, mode {self.mode!r}: {'closed' if self._closed else 'open'}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def readable(self) -> bool:
        """Whether the mode allows reading."""
        return self._readable

    def writable(self) -> bool:
        """Whether the mode allows writing."""
        return self._writable

    async def read(self, size: int | None = -1) -> bytes:
        """Return *size* bytes, fewer only at the end of the file; all that is left if negative or None."""
        return await self._read(-1 if size is None else index(size))

    async def _read(self, size: int) -> bytes:
        self._check("read", self._readable)
        parts = [self._take(size)]
        missing = size - len(parts[0])
        while missing != 0:
            data = await self._ask("read", CHUNK if size < 0 else min(missing, CHUNK))
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        else:
            await trio.lowlevel.checkpoint()
        return b"".join(parts)

    def _take(self, size: int) -> bytes:
        if size < 0:
            size = len(self._buffer)
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    async def readline(self) -> bytes:
        r"""Return the next line with its ``\n``; ``b""`` at the end of the file."""
        self._check("read", self._readable)
        start = 0
        pieces = self._buffer
        while (end := pieces.find(b"\n", start)) < 0:
            data = await self._ask("read", CHUNK)
            if not data:
                self._buffer = b""
                return pieces
            start = len(pieces)
            pieces = self._buffer = pieces + data
        await trio.lowlevel.checkpoint()
        return self._take(end + 1)

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
            await self._exchange(b"".join((HEADER.pack(_WRITE, len(chunk)), chunk)), bytes)
        await trio.lowlevel.checkpoint()
        return len(view)

    async def flush(self) -> None:
        """Do nothing: what was written is with the guest's kernel already."""
        self._check("flush", True)
        await trio.lowlevel.checkpoint()

    async def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, counted from the start, from here or from the end; return it."""
        self._check("seek", True)
        offset, whence = _offset(offset), _offset(whence)
        if whence == io.SEEK_CUR:
            offset -= len(self._buffer)
        self._buffer = b""
        return await self._ask_number("seek", offset, whence)

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
        return await self._ask_number("truncate", field)

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

    async def _ask(self, operation: str, *fields: object) -> bytes:
        return await self._exchange(encode_request(operation, *fields), bytes)

    async def _ask_number(self, operation: str, *fields: object) -> int:
        return await self._exchange(encode_request(operation, *fields), self._number)

    async def _exchange(self, request: bytes, parse: Callable[[bytes], T]) -> T:
        self._busy = True
        try:
            async with self._session.failures():
                await self._session.send(request)
                return parse(await self._session.reply())
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self.name) from None
        except BaseException:
            # An answer that nobody took would be taken for the answer to the next request.
            self._closed = True
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


@final
class GuestTextFile(trio.abc.AsyncResource):
    """A file in the guest, open for text. Made by `GuestPath.open`.

    Like what `trio.open_file` gives for text modes. As for `GuestFile`, which is its `buffer`; there is no
    `tell`, and `seek` goes to the start or the end only.
    """

    def __init__(self, buffer: GuestFile, encoding: str, errors: str, newline: str | None) -> None:
        self.buffer = buffer
        """The same file, for bytes."""
        self.encoding = encoding
        self.errors = errors
        self._newline = newline
        self._make_decoder()

    def _make_decoder(self) -> None:
        decoder = codecs.getincrementaldecoder(self.encoding)(self.errors)
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True) if self._newline is None else decoder
        self._text = ""

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<trio_sandbox.GuestTextFile {self.name!r}, mode {self.buffer.mode!r}: {state}>"

    @property
    def name(self) -> str:
        """The path that it was opened by."""
        return self.buffer.name

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.buffer.closed

    async def _fill(self) -> bool:
        """Decode more; False at the end of the file."""
        data = await self.buffer.read(CHUNK)
        self._text += self._decoder.decode(data, final=not data)
        return bool(data)

    async def read(self, size: int | None = -1) -> str:
        """Return *size* characters, fewer only at the end of the file; all that is left if negative or None."""
        wanted = -1 if size is None else size
        while wanted < 0 or len(self._text) < wanted:
            if not await self._fill():
                break
        else:
            await trio.lowlevel.checkpoint()
        if wanted < 0:
            wanted = len(self._text)
        text, self._text = self._text[:wanted], self._text[wanted:]
        return text

    async def readline(self) -> str:
        """Return the next line with its end; ``""`` at the end of the file."""
        while (end := self._line_end()) < 0:
            if not await self._fill():
                end = len(self._text) if self._line_end() < 0 else self._line_end()
                break
        else:
            await trio.lowlevel.checkpoint()
        line, self._text = self._text[:end], self._text[end:]
        return line

    def _line_end(self) -> int:
        """Return where the first line of what was decoded ends, or -1."""
        if self._newline == "":
            # A \r that comes last may be half of a \r\n.
            match = re.search(r"\r\n|\n|\r(?!\Z)", self._text)
            return -1 if match is None else match.end()
        end = self._newline or "\n"
        position = self._text.find(end)
        return -1 if position < 0 else position + len(end)

    def __aiter__(self) -> GuestTextFile:
        return self

    async def __anext__(self) -> str:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def write(self, text: str) -> int:
        """Write *text* and return its length in characters."""
        if type(text) is not str:
            raise TypeError(f"a file open for text takes str, not {type(text).__name__}")
        if self._text:
            raise io.UnsupportedOperation("writing after reading needs a seek() between them in text mode")
        data = text if self._newline in (None, "", "\n") else text.replace("\n", self._newline or "\n")
        await self.buffer.write(data.encode(self.encoding, self.errors))
        return len(text)

    async def flush(self) -> None:
        """Do nothing: what was written is with the guest's kernel already."""
        await self.buffer.flush()

    async def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to the start, or with ``io.SEEK_END`` to the end; return the position in bytes."""
        if offset != 0 or whence not in (io.SEEK_SET, io.SEEK_END):
            raise io.UnsupportedOperation("in text mode seek() goes to the start or to the end only; see `buffer`")
        self._make_decoder()
        return await self.buffer.seek(0, whence)

    async def truncate(self, size: int) -> int:
        """Make the file *size* bytes long; return that."""
        return await self.buffer.truncate(size)

    async def aclose(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        await self.buffer.aclose()


async def open_file(
    slot: Slot, user: str | int | None, path: str, mode: str, *, encoding: str, errors: str, newline: str | None
) -> GuestFile | GuestTextFile:
    """What `GuestPath.open` does."""
    kinds = mode.replace("b", "", 1).replace("t", "", 1).replace("+", "", 1)
    if kinds not in ("r", "w", "a", "x") or ("b" in mode and "t" in mode):
        raise ValueError(f"`mode` must be one of r, w, a and x, with + and b where wanted, not {mode!r}")
    if newline not in (None, "", "\n", "\r", "\r\n"):
        raise ValueError(f"`newline` must be None, '', '\\n', '\\r' or '\\r\\n', not {newline!r}")
    codecs.lookup(encoding)
    codecs.lookup_error(errors)
    request = encode_request("open", path, kinds + ("+" if "+" in mode else ""))
    what = f"open of {path!r:.200}"
    session = FileSession(await slot.resolve(what), user, what)
    try:
        async with session.failures():
            await session.send(request)
            await session.reply()
    except BaseException:
        session.close()
        raise
    file = GuestFile(path, mode, session)
    return file if "b" in mode else GuestTextFile(file, encoding, errors, newline)
