"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

from typing import final

import trio_sandbox

from ._door import BlockingDoor


@final
class GuestFile(BlockingDoor[trio_sandbox.GuestFile]):
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

    def close(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        self._call(self._inner.aclose)

    def __enter__(self) -> GuestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def read(self, size: int | None = -1) -> bytes:
        """Return *size* bytes, fewer only at the end of the file; all of the rest if negative or None.

        See `trio_sandbox.GuestFile.read`.
        """
        return self._call(lambda: self._inner.read(size))

    def read1(self, size: int = -1) -> bytes:
        """Return up to *size* bytes, or some if negative, as soon as there are any; ``b""`` at the end of the file.

        See `trio_sandbox.GuestFile.read1`.
        """
        return self._call(lambda: self._inner.read1(size))

    def readline(self, *, limit: int | None = None) -> bytes:
        r"""Return the next line with its ``\n``; ``b""`` at the end of the file.

        See `trio_sandbox.GuestFile.readline`.
        """
        return self._call(lambda: self._inner.readline(limit=limit))

    def __iter__(self) -> GuestFile:
        return self

    def __next__(self) -> bytes:
        return self._next(self._inner.__anext__)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of *data* and return its length in bytes."""
        return self._call(lambda: self._inner.write(data))

    def flush(self) -> None:
        """Do nothing: the guest's kernel already has what was written."""
        self._call(self._inner.flush)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position, counted from the start, from here or from the end; return it."""
        return self._call(lambda: self._inner.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return self._call(self._inner.tell)

    def truncate(self, size: int | None = None) -> int:
        """Make the file *size* bytes long, or end here; return its size. The position stays."""
        return self._call(lambda: self._inner.truncate(size))


@final
class GuestTextFile(BlockingDoor[trio_sandbox.GuestTextFile]):
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

    def close(self) -> None:
        """Close it, in the guest as well. Doing it again does nothing."""
        self._call(self._inner.aclose)

    def __enter__(self) -> GuestTextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The path that it was opened by."""
        return self._now(lambda: self._inner.name)

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._now(lambda: self._inner.closed)

    def read(self, size: int | None = -1) -> str:
        """Return *size* characters, fewer only at the end of the file; all of the rest if negative or None.

        See `trio_sandbox.GuestTextFile.read`.
        """
        return self._call(lambda: self._inner.read(size))

    def readline(self, *, limit: int | None = None) -> str:
        """Return the next line with its end; ``""`` at the end of the file.

        See `trio_sandbox.GuestTextFile.readline`.
        """
        return self._call(lambda: self._inner.readline(limit=limit))

    def __iter__(self) -> GuestTextFile:
        return self

    def __next__(self) -> str:
        return self._next(self._inner.__anext__)

    def write(self, text: str) -> int:
        """Write *text* and return its length in characters."""
        return self._call(lambda: self._inner.write(text))

    def flush(self) -> None:
        """Do nothing: the guest's kernel already has what was written."""
        self._call(self._inner.flush)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to the start, or with ``io.SEEK_END`` to the end; return the position in bytes."""
        return self._call(lambda: self._inner.seek(offset, whence))

    def truncate(self, size: int) -> int:
        """Make the file *size* bytes long; return that."""
        return self._call(lambda: self._inner.truncate(size))
