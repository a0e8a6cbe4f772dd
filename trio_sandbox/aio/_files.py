"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

from typing import final

import trio_sandbox

from ._door import AioDoor


@final
class GuestFile(AioDoor[trio_sandbox.GuestFile]):
    """A file in the guest, open for bytes. Made by `GuestPath.open`.

    See `trio_sandbox.GuestFile`.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The path that it was opened by."""
        return self._inner.name

    @property
    def mode(self) -> str:
        """The mode that it was opened with."""
        return self._inner.mode

    async def aclose(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        await self._call(self._inner.aclose)

    async def __aenter__(self) -> GuestFile:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._now(lambda: self._inner.closed)

    def readable(self) -> bool:
        """Whether the mode allows reading."""
        return self._now(self._inner.readable)

    def writable(self) -> bool:
        """Whether the mode allows writing."""
        return self._now(self._inner.writable)

    async def read(self, size: int | None = -1) -> bytes:
        """Return *size* bytes, fewer only at the end of the file; all of the rest if negative or None.

        See `trio_sandbox.GuestFile.read`.
        """
        return await self._call(lambda: self._inner.read(size))

    async def read1(self, size: int = -1) -> bytes:
        """Return up to *size* bytes, or some if negative, as soon as there are any; ``b""`` at the end of the file.

        See `trio_sandbox.GuestFile.read1`.
        """
        return await self._call(lambda: self._inner.read1(size))

    async def readline(self, *, limit: int | None = None) -> bytes:
        r"""Return the next line with its ``\n``; ``b""`` at the end of the file.

        See `trio_sandbox.GuestFile.readline`.
        """
        return await self._call(lambda: self._inner.readline(limit=limit))

    def __aiter__(self) -> GuestFile:
        return self

    async def __anext__(self) -> bytes:
        return await self._next(self._inner.__anext__)

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of *data* and return its length in bytes."""
        return await self._call(lambda: self._inner.write(data))

    async def flush(self) -> None:
        """Do nothing: the guest's kernel already has what was written."""
        await self._call(self._inner.flush)

    async def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position, counted from the start, from here or from the end; return it."""
        return await self._call(lambda: self._inner.seek(offset, whence))

    async def tell(self) -> int:
        """Return the position."""
        return await self._call(self._inner.tell)

    async def truncate(self, size: int | None = None) -> int:
        """Make the file *size* bytes long, or end here; return its size. The position stays."""
        return await self._call(lambda: self._inner.truncate(size))


@final
class GuestTextFile(AioDoor[trio_sandbox.GuestTextFile]):
    """A file in the guest, open for text. Made by `GuestPath.open`.

    See `trio_sandbox.GuestTextFile`.
    """

    __slots__ = ()

    @property
    def buffer(self) -> GuestFile:
        """The same file, for bytes."""
        return GuestFile(self._portal, self._inner.buffer)

    @property
    def encoding(self) -> str:
        """How its bytes are read as text."""
        return self._inner.encoding

    @property
    def errors(self) -> str:
        """How errors of decoding and encoding are handled, as for `open`."""
        return self._inner.errors

    async def aclose(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        await self._call(self._inner.aclose)

    async def __aenter__(self) -> GuestTextFile:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def name(self) -> str:
        """The path that it was opened by."""
        return self._now(lambda: self._inner.name)

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._now(lambda: self._inner.closed)

    async def read(self, size: int | None = -1) -> str:
        """Return *size* characters, fewer only at the end of the file; all of the rest if negative or None.

        See `trio_sandbox.GuestTextFile.read`.
        """
        return await self._call(lambda: self._inner.read(size))

    async def readline(self, *, limit: int | None = None) -> str:
        """Return the next line with its end; ``""`` at the end of the file.

        See `trio_sandbox.GuestTextFile.readline`.
        """
        return await self._call(lambda: self._inner.readline(limit=limit))

    def __aiter__(self) -> GuestTextFile:
        return self

    async def __anext__(self) -> str:
        return await self._next(self._inner.__anext__)

    async def write(self, text: str) -> int:
        """Write *text* and return its length in characters."""
        return await self._call(lambda: self._inner.write(text))

    async def flush(self) -> None:
        """Do nothing: the guest's kernel already has what was written."""
        await self._call(self._inner.flush)

    async def seek(self, offset: int, whence: int = 0) -> int:
        """Go to the start, or with ``io.SEEK_END`` to the end; return the position in bytes."""
        return await self._call(lambda: self._inner.seek(offset, whence))

    async def truncate(self, size: int) -> int:
        """Make the file *size* bytes long; return that."""
        return await self._call(lambda: self._inner.truncate(size))
