"""The users' Python where it is the same program as the agent's: their interpreter then runs from the agent's file.

So both have the same memory for their code, which QEMU, when it emulates the processor, translates once for both of them:
a machine that goes on from a saved state has an eighth less to translate until it answers. And the guest has some megabytes more for other things.

The two must be equal byte for byte. That is found out before any code of the users' runs, and what they put in its place
later is not what was compared. What they get to see of ours is no more than they have: one file of a file system that
can't be written to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

#: Bytes that are compared at a time.
_PIECE = 1 << 17


def open_own_program() -> int:
    """Return a descriptor of the program that this process runs."""
    return os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)


class Twin:
    """A program of the users' that is the same as ours.

    Args:
      ours: A descriptor of ours.
      theirs: What `os.stat` says of theirs.

    """

    __slots__ = ("_identity", "descriptor")

    def __init__(self, ours: int, theirs: os.stat_result) -> None:
        self.descriptor: int = ours
        """What to execute in its place."""
        self._identity = _identify(theirs)

    def is_at(self, path: str) -> bool:
        """Whether *path* is still the file that was compared, unchanged."""
        try:
            return _identify(os.stat(path)) == self._identity
        except OSError:
            return False


def find_twin(ours: int, paths: Iterable[str]) -> Twin | None:
    """Return the first file of *paths* if it is the same as the descriptor *ours*, which is kept.

    If it is not, or there is none, the descriptor is closed.
    """
    twin = _compare(ours, paths)
    if twin is None:
        os.close(ours)
    return twin


def _compare(ours: int, paths: Iterable[str]) -> Twin | None:
    for path in paths:
        try:
            theirs = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            status = os.fstat(theirs)
            if not (stat.S_ISREG(status.st_mode) and _are_equal(ours, theirs, status.st_size)):
                return None
            # It was read for the comparison only.
            os.posix_fadvise(theirs, 0, 0, os.POSIX_FADV_DONTNEED)
            return Twin(ours, status)
        except OSError:
            return None
        finally:
            os.close(theirs)
    return None


def _are_equal(ours: int, theirs: int, size: int) -> bool:
    if os.fstat(ours).st_size != size:
        return False
    return all(os.pread(ours, _PIECE, offset) == os.pread(theirs, _PIECE, offset) for offset in range(0, size, _PIECE))


def _identify(status: os.stat_result) -> tuple[int, ...]:
    # Whoever writes to a file can't keep its time of change.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
