"""Files of a tree that are still what they were: told by their states, so that only others are read. Standard library only.

A state is which file it is, how long, and when it was last changed. No program can set that time (ctime): neither
``cp -p`` nor tar nor touch. So a file in the same state is the same, if this held when the state was taken. Otherwise
none is told:

- That time was a while ago. The kernel's clock for it stands still for some milliseconds, and two changes may get the same
  time. And it notes the time first, and makes the change then.
- No write(2) was under way, which may take long.
- The file was written out. That takes away the right to write to it from programs that have it mapped, so that the next
  time they write the kernel notes it. It does so on file systems on a block device; on others no state is told.

In a tree (see `trees`) there are two more records:

    s  name            a file that is in the state that the other side knows, without its content
    t  state           the state in which the file before it was read
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from typing import Final

from .trees import BATCH, TreeReader, record

#: Bytes of a state.
STATE_LIMIT: Final = 128
SAME, STATE = b"s", b"t"
#: Records of names to leave out, and of paths with states; both are fields separated by NUL.
EXCLUDED, STATES = b"N", b"K"
#: Seconds after which the kernel's clock has certainly gone on.
_TICK: Final = 0.011
_CLOCK_REALTIME_COARSE: Final = 5


class ChangesReader(TreeReader):
    """Reads a tree, but for the files that are in a known state.

    Args:
      path: As that of `TreeReader`.
      known: The states of files by their paths below.
      excluded: As that of `TreeReader`.
      patience: Nanoseconds after which a change is complete whose time was noted.
      write_out: Writes out a file, given its descriptor; returns whether it did.

    """

    def __init__(
        self,
        path: str,
        known: Mapping[bytes, bytes],
        excluded: Container[str],
        patience: int,
        write_out: Callable[[int], bool],
    ) -> None:
        super().__init__(path, excluded)
        self._known = known
        self._below = len(os.fsencode(path)) + 1
        self._patience = patience
        self._write_out = write_out

    def _read_file(self, descriptor: int, status: os.stat_result, head: bytes, shown: str) -> Generator[bytes]:
        state = _state(status)
        path = os.fsencode(shown)[self._below :]
        if self._known.get(path) == state:
            self._put(SAME, head.partition(b"\0")[2])
            return
        # A file that is read by itself has no path.
        told = path and _is_kept(status, _clock() - self._patience) and self._settle(descriptor)
        yield from super()._read_file(descriptor, status, head, shown)
        if told and _state(os.fstat(descriptor)) == state:
            self._put(STATE, state)

    def _settle(self, descriptor: int) -> bool:
        """Wait for writes that are under way, and write the file out; return whether that was done."""
        try:
            os.lseek(descriptor, 0, os.SEEK_HOLE)  # takes the lock that a write holds
            os.lseek(descriptor, 0, os.SEEK_SET)
        except OSError:
            return False  # it is empty, or its file system can't
        return self._write_out(descriptor)


def states_below(parent: int, name: str) -> Generator[bytes]:
    """Yield the paths and states of the files in the directory *name* in *parent*, as fields. What can't be read has none.

    Nobody may have had any of them mapped.
    """
    if not os.access(name, os.R_OK | os.X_OK, dir_fd=parent, effective_ids=True):
        return  # else fwalk() would raise, which it does for no directory below
    time.sleep(_TICK)
    now = _clock()
    for directory, _, names, descriptor in os.fwalk(name, dir_fd=parent):
        for each in names:
            status = os.stat(each, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and _is_kept(status, now):
                yield os.fsencode(f"{directory}/{each}")[len(os.fsencode(name)) + 1 :]
                yield _state(status)


def pack(tag: bytes, fields: Iterable[bytes]) -> Generator[bytes]:
    """Yield records with *fields*, an even number of them in each."""
    ready: list[bytes] = []
    size = 0
    for field in fields:
        if size >= BATCH and not len(ready) % 2:
            yield record(tag, b"\0".join(ready))
            ready, size = [], 0
        ready.append(field)
        size += len(field) + 1
    if ready:
        yield record(tag, b"\0".join(ready))


def unpack_states(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the paths and states of a record.

    Raises:
      ValueError: if it has none.

    """
    fields = payload.split(b"\0")
    if len(fields) % 2:
        raise ValueError(f"no paths and states: {payload[:80]!r}")
    return zip(fields[::2], fields[1::2], strict=True)


def _state(status: os.stat_result) -> bytes:
    times = status.st_mtime_ns, status.st_ctime_ns
    return b"%x.%x.%x.%x.%x" % (status.st_dev, status.st_ino, status.st_size, *times)


def _is_kept(status: os.stat_result, now: int) -> bool:
    """Whether whatever happens to a file after *now* changes its state, if nothing was under way and it was written out."""
    return status.st_ctime_ns < now and os.major(status.st_dev) != 0


def _clock() -> int:
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
