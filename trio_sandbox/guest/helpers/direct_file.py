"""Writing a large file past the page cache: O_DIRECT of open(2). Linux only, stdlib only.

What the kernel does for each page that it keeps costs an emulated processor more than all else about a file that is
written. The disk's own end, outside, takes the bytes from our memory for next to nothing. Whoever reads the file first
pays about what was saved here; nothing is paid for where it is larger than memory, and nobody waits for it to be
written to the disk later.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

#: Bytes that are written at once: more do not fit into one request to a virtio disk where no two pages are neighbours.
BLOCK = 1 << 18
#: What file offsets have to be multiples of; no disk's sectors are larger.
_ALIGNMENT = 4096

#: Whatever is written goes through here, as memory has to be aligned too; one file at a time. Private, since processes
#: that we are forked into would share it otherwise. The kernel gives it pages as they are filled.
_block = memoryview(mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class DirectFile:
    """What comes for a file, in pieces of any size; what of it does not fill a `BLOCK` is written as usual.

    Args:
      descriptor: Of a regular file, open for writing at the place to go on from. It stays the caller's.

    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._filled = 0
        self._direct = False
        self._possible = os.lseek(descriptor, 0, os.SEEK_CUR) % _ALIGNMENT == 0

    @property
    def room(self) -> memoryview:
        """Where to put the next bytes; never empty."""
        return _block[self._filled :]

    def add(self, size: int) -> None:
        """Take the first *size* bytes of `room`.

        Raises:
          OSError: as write(2).

        """
        self._filled += size
        if self._filled == BLOCK:
            self._set_direct(self._possible)
            self._write()

    def finish(self) -> None:
        """Write what is left. Errors as `add`."""
        self._set_direct(False)
        self._write()

    def _write(self) -> None:
        data = _block[: self._filled]
        self._filled = 0
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as exc:
                if exc.errno != errno.EINVAL or not self._direct:
                    raise
                # The file system would rather not, or stopped at an odd place, as where the disk is full.
                self._possible = False
                self._set_direct(False)

    def _set_direct(self, wanted: bool) -> None:
        if wanted is self._direct:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self._possible = False  # a file system in memory, for one
        else:
            self._direct = wanted
