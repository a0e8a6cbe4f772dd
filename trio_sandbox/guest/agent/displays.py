"""What a run shows besides what it prints: pictures, tables and the like, as a worker hands them over."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator, Sequence
from typing import final

from ...wire import MIME_TYPE
from .pipes import CHUNK

#: One has fewer bytes: its size travels as 32 bits, though no guest has as much memory.
_SIZE_LIMIT = 1 << 32
#: With these the file is one of memory, which no read blocks on, and it can't change any more.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class BadDisplayError(Exception):
    """No worker of ours hands such a thing over."""


@final
class Display:
    """One form of an object that a run shows. Leaving its block tells the code that it has been taken.

    Args:
      mime: Its MIME type, not checked yet.
      item: Which of the run's objects it shows.
      descriptors: A sealed memory file with the bytes, and one that the code waits for to be closed. Owned from now on.

    Raises:
      BadDisplayError: if that is not what they are; they were closed.

    """

    def __init__(self, mime: bytes, item: int, descriptors: Sequence[int]) -> None:
        self._descriptors = list(descriptors)
        self.mime: str = mime.decode("ascii", "replace")
        self.item: int = item
        try:
            if len(descriptors) != 2 or not MIME_TYPE.fullmatch(self.mime):
                raise BadDisplayError
            # A file that is not of memory has no seals to ask for.
            if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise BadDisplayError
            if fcntl.fcntl(descriptors[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                raise BadDisplayError
            self.size: int = os.fstat(descriptors[0]).st_size
            if self.size >= _SIZE_LIMIT:
                raise BadDisplayError
        except (BadDisplayError, OSError) as exc:
            self.close()
            raise BadDisplayError from exc

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors."""
        while self._descriptors:
            with contextlib.suppress(OSError):
                os.close(self._descriptors.pop())

    def read(self) -> Generator[bytes]:
        """Yield the bytes, in pieces for not holding them all."""
        position = 0
        while position < self.size:
            data = os.pread(self._descriptors[0], CHUNK, position)
            position += len(data)
            yield data
