"""Text in the guest's files: decoded in pieces, so that nobody else waits for it."""

from __future__ import annotations

import codecs
import errno
import io
import re
import sys
from operator import index
from typing import Protocol, final

import trio

from ..constants import MAXIMUM_READ_BYTES
from ..guest.trees import CHUNK
from ._file import GuestFile, check_limit

#: Bytes that are decoded at once: a millisecond's work.
_AT_ONCE = 2**18
#: What a str has beside its characters; a little more, for all kinds.
_STR_OVERHEAD = 128


class _Decoder(Protocol):
    def decode(self, input: bytes, final: bool = False) -> str: ...  # noqa: A002 - its name in `codecs`


def _make_decoder(encoding: str, errors: str, *, translate: bool) -> _Decoder:
    # Also where no ends of lines are translated: it never lets go of half a "\r\n".
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate)


def check_newline(newline: str | None) -> None:
    """Refuse what `open` takes for no end of a line."""
    if newline not in (None, "", "\n", "\r", "\r\n"):
        raise ValueError(f"`newline` must be None, '', '\\n', '\\r' or '\\r\\n', not {newline!r:.100}")


async def decode_text(data: bytes, encoding: str, errors: str, name: str) -> str:
    r"""Return a file's content as text with ``\n`` for each kind of line end; the event loop turns meanwhile.

    Raises:
      UnicodeError, LookupError: as `bytes.decode`.
      OSError: with EFBIG if the text takes more memory than `constants.MAXIMUM_READ_BYTES`, which is 4 bytes for each
        character where one of them is beyond U+FFFF.

    """
    if len(data) <= _AT_ONCE:
        await trio.lowlevel.checkpoint()
        return data.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")
    decoder = _make_decoder(encoding, errors, translate=True)
    text = ""
    with memoryview(data) as view:
        for start in range(0, len(data), _AT_ONCE):
            await trio.lowlevel.checkpoint()
            piece = bytes(view[start : start + _AT_ONCE])
            try:
                # A local variable, which nothing else refers to, grows in its place.
                text += decoder.decode(piece, start + len(piece) == len(data))
            except UnicodeDecodeError as exc:
                # What the decoder kept of the piece before comes first in what it says that it could not decode.
                base = start + len(piece) - len(exc.object)
                raise UnicodeDecodeError(exc.encoding, data, base + exc.start, base + exc.end, exc.reason) from None
            _check_memory(text, name)
    return text  # noqa: ASYNC910 - there is one piece at least


def _check_memory(text: str, name: str) -> None:
    if sys.getsizeof(text) > MAXIMUM_READ_BYTES + _STR_OVERHEAD:
        raise OSError(
            errno.EFBIG,
            f"as text it takes more than {MAXIMUM_READ_BYTES} bytes of memory: open it and read pieces of a size",
            name,
        )


@final
class GuestTextFile(trio.abc.AsyncResource):
    """A file in the guest, open for text. Made by `GuestPath.open`.

    Like a file of `trio.open_file` in a text mode. See `GuestFile`, which is its `buffer`. There is no `tell`, and `seek`
    goes only to the start or the end.
    """

    def __init__(self, buffer: GuestFile, encoding: str, errors: str, newline: str | None, limit: int) -> None:
        self.buffer = buffer
        """The same file, for bytes."""
        self.encoding = encoding
        """How its bytes are read as text."""
        self.errors = errors
        """How errors of decoding and encoding are handled, as for `open`."""
        self._newline = newline
        self._limit = limit
        self._line_end = re.compile("\r\n|\n|\r" if newline == "" else newline or "\n")
        self._restart()

    def _restart(self) -> None:
        self._decoder = _make_decoder(self.encoding, self.errors, translate=self._newline is None)
        self._text = ""  # that was decoded, of which the first characters are taken
        self._taken = 0

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<trio_sandbox.GuestTextFile {self.name!r}, mode {self.buffer.mode!r}: {state}>"

    @property
    def name(self) -> str:
        """The path that it was opened by."""
        return self.buffer.name

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self.buffer.closed

    async def _fill(self, taken: str) -> bool:
        """Decode more after *taken*, which is all that was decoded; False at the end of the file. If it fails, *taken* comes next again."""
        try:
            data = await self.buffer.read1(CHUNK)
            self._text, self._taken = self._decoder.decode(data, not data), 0
        except BaseException:
            self._put_back(taken)
            raise
        return bool(data)

    def _take(self, end: int) -> str:
        start, self._taken = self._taken, end
        return self._text[start:end]

    def _take_some(self, wanted: int) -> str:
        """Take up to so many characters; all that there are if negative."""
        return self._take(len(self._text) if wanted < 0 else min(self._taken + wanted, len(self._text)))

    def _put_back(self, text: str) -> None:
        """Have *text*, which was taken, come next again."""
        self._text, self._taken = text + self._text[self._taken :], 0

    async def read(self, size: int | None = -1) -> str:
        """Return *size* characters, fewer only at the end of the file; all of the rest if negative or None.

        Raises:
          OSError: also with EFBIG if the rest takes more than `constants.MAXIMUM_READ_BYTES` of memory.

        """
        wanted = -1 if size is None else index(size)
        await trio.lowlevel.checkpoint()
        text = self._take_some(wanted)
        more = True
        while more and len(text) != wanted:
            more = await self._fill(text)
            text += self._take_some(wanted if wanted < 0 else wanted - len(text))
            if wanted < 0:
                _check_memory(text, self.name)
        return text

    async def readline(self, *, limit: int | None = None) -> str:
        """Return the next line with its end; ``""`` at the end of the file.

        Args:
          limit: The longest line, in characters; None: the *limit* that the file was opened with.

        Raises:
          OSError: also with EFBIG if the line is longer. Nothing is lost: read it with a higher limit, or by `read`.

        """
        longest = self._limit if limit is None else check_limit(limit)
        await trio.lowlevel.checkpoint()
        line = ""
        more = True
        while (match := self._line_end.search(self._text, self._taken)) is None and more and len(line) <= longest:
            line += self._take_some(-1)
            more = await self._fill(line)
        # Without one there is no more, or it is too much already.
        end = len(self._text) if match is None else match.end()
        if len(line) + end - self._taken > longest:
            self._put_back(line)
            raise OSError(errno.EFBIG, f"a line of more than {longest} characters: pass a higher `limit`", self.name)
        return line + self._take(end)

    def __aiter__(self) -> GuestTextFile:
        return self

    async def __anext__(self) -> str:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def write(self, text: str) -> int:
        """Write *text* and return its length in characters."""
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a file open for text takes str, not {type(text).__name__}")
        if self._taken < len(self._text):
            raise io.UnsupportedOperation("writing after reading needs a seek() between them in text mode")
        data = text if self._newline in (None, "", "\n") else text.replace("\n", self._newline or "\n")
        await self.buffer.write(data.encode(self.encoding, self.errors))
        return len(text)

    async def flush(self) -> None:
        """Do nothing: the guest's kernel already has what was written."""
        await self.buffer.flush()

    async def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to the start, or with ``io.SEEK_END`` to the end; return the position in bytes."""
        if offset != 0 or whence not in (io.SEEK_SET, io.SEEK_END):
            raise io.UnsupportedOperation("in text mode seek() goes to the start or to the end only; see `buffer`")
        position = await self.buffer.seek(0, whence)
        self._restart()
        return position

    async def truncate(self, size: int) -> int:
        """Make the file *size* bytes long; return that."""
        return await self.buffer.truncate(size)

    async def aclose(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        await self.buffer.aclose()
