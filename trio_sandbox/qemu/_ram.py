"""The RAM of a machine that goes on, copied from outside: its file, and the pages that only its process has.

A machine that was made from a saved state has the RAM's file mapped privately: the kernel gives it a copy of each
page that it writes to. So its RAM is that file, which never changes and can be copied while the machine runs, and
some MiB of such pages, which are copied while it stands still.

Sources: proc_pid_maps(5), proc_pid_mem(5), and ``Documentation/admin-guide/mm/pagemap.rst`` in the kernel's sources.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final, NamedTuple, final

import trio

#: The mode of a RAM's file that nobody writes to any more. QEMU, which runs as another user, opens it anew.
FROZEN_MODE: Final = 0o444

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
#: Bytes of one entry of a pagemap.
_ENTRY: Final = 8
#: Bytes that are copied between two looks whether they are still wanted.
_CHUNK: Final = 64 * 2**20
#: Bytes that go through our own memory at once.
_BUFFER: Final = 2**20

#: The last byte of an entry, for runs of pages that are in memory (0x80) or swapped out (0x40) and not a file's (0x20).
_OWN_PAGES: Final = re.compile(rb"[\x40-\x5f\x80-\x9f\xc0-\xdf]+")

#: What copy_file_range(2) says where it can't do it and sendfile(2) can: between file systems, above all.
_TRY_SENDFILE: Final = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class Mapping(NamedTuple):
    """A part of a file that a process has mapped privately."""

    start: int
    """Its address."""
    size: int
    offset: int
    """What is there, counted from the beginning of the file."""


def parse_maps(text: str, inode: int, size: int) -> list[Mapping]:
    """Return where a process has a file mapped privately, by the text of its ``/proc/PID/maps``.

    Raises:
      ValueError: if the mappings are not the whole of the file's *size* bytes, each of them once.

    """
    found: list[Mapping] = []
    for line in text.splitlines():
        addresses, permissions, offset, _, number, *_ = line.split(maxsplit=5)
        if int(number) == inode and permissions.endswith("p"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(Mapping(start, end - start, int(offset, 16)))
    found.sort(key=lambda mapping: mapping.offset)
    expected = 0
    for mapping in found:
        if mapping.offset != expected:
            break
        expected += mapping.size
    if expected != size or sum(mapping.size for mapping in found) != size:
        raise ValueError(f"the RAM's file is not mapped as a whole: {found}")
    return found


def find_own_pages(entries: bytes) -> Iterator[tuple[int, int]]:
    """Yield the first and the number of the pages in each run that a process has copies of.

    Args:
      entries: Of its ``/proc/PID/pagemap``, for a private mapping of a file.

    """
    # One byte of each entry tells, so that the search is the regular expression engine's.
    for match in _OWN_PAGES.finditer(entries[_ENTRY - 1 :: _ENTRY]):
        yield match.start(), match.end() - match.start()


def copy_data(source: int, target: int) -> None:
    """Copy what there is of the file *source* into the empty file *target*, but not its holes. Run it in a thread of Trio's.

    Raises:
      OSError: as copy_file_range(2) and sendfile(2): ENOSPC, above all.
      trio.Cancelled: if the caller was cancelled.

    """
    offset, size = 0, os.fstat(source).st_size
    by_range = True
    while offset < size:
        trio.from_thread.check_cancelled()
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        offset = start
        end = min(os.lseek(source, start, os.SEEK_HOLE), start + _CHUNK)
        while offset < end:
            if by_range:
                try:
                    done = os.copy_file_range(source, target, end - offset, offset, offset)
                except OSError as exc:
                    if exc.errno not in _TRY_SENDFILE:
                        raise
                    by_range = False
                    continue
            else:
                os.lseek(target, offset, os.SEEK_SET)
                done = os.sendfile(target, source, offset, end - offset)
            if done == 0:
                raise OSError(errno.EIO, "a file that was to be copied became shorter")
            offset += done


@final
class PrivateRam:
    """The pages of its own that a process has of a file which it has mapped privately. Use it as a context manager.

    Args:
      pid: The process.
      file: A descriptor of the file.

    Raises:
      OSError, ValueError: if the kernel does not let us read them, which takes the same rights as to trace the process.

    """

    def __init__(self, pid: int, file: int) -> None:
        status = os.fstat(file)
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            self._mappings = parse_maps(maps.read(), status.st_ino, status.st_size)
        with ExitStack() as stack:
            self._pagemap, self._memory = (
                stack.enter_context(open(f"/proc/{pid}/{name}", "rb", buffering=0)) for name in ("pagemap", "mem")
            )
            first = self._mappings[0].start
            if not self._read_entries(first, 1) or not os.pread(self._memory.fileno(), _PAGE, first):
                raise ValueError("there is nothing to read")
            self._stack = stack.pop_all()

    def __enter__(self) -> PrivateRam:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copy(self, target: int) -> int:
        """Write the pages to where they belong in the file *target*, and return how many bytes that were.

        The process must not be writing to them. Run it in a thread of Trio's.

        Raises:
          OSError: if they can't be read or written.

        """
        total = 0
        for mapping in self._mappings:
            for first, count in find_own_pages(self._read_entries(mapping.start, mapping.size // _PAGE)):
                offset = first * _PAGE
                self._copy(target, mapping.start + offset, mapping.offset + offset, count * _PAGE)
                total += count * _PAGE
        return total

    def _read_entries(self, address: int, count: int) -> bytes:
        entries = bytearray()
        while len(entries) < count * _ENTRY:
            position = address // _PAGE * _ENTRY + len(entries)
            piece = os.pread(self._pagemap.fileno(), count * _ENTRY - len(entries), position)
            if not piece:
                raise OSError(errno.EIO, "the process is gone")
            entries += piece
        return bytes(entries)

    def _copy(self, target: int, address: int, offset: int, size: int) -> None:
        while size:
            data = os.pread(self._memory.fileno(), min(size, _BUFFER), address)
            if not data:
                raise OSError(errno.EIO, "the process is gone")
            done = os.pwrite(target, data, offset)
            address, offset, size = address + done, offset + done, size - done
