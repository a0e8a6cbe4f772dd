"""Leases: who stands on an entry of the store holds a shared lock of its directory, and whoever makes room has to get that for himself.

The kernel drops a lock with the process that holds it, however that ends. So no lease is ever stale, and processes know of each
other's without telling each other anything.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

import attrs

from ._manifest import MANIFEST_NAME


@attrs.define
class _Lease:
    fd: int
    holders: int = 0


@final
class Leases:
    """Those of one process, or of a part of it: each entry is locked once, however many stand on it."""

    def __init__(self) -> None:
        self._leases: dict[Path, _Lease] = {}

    @contextmanager
    def try_hold(self, entries: Iterable[Path]) -> Generator[bool]:
        """Keep *entries* from being evicted for the block, and mark them as used now; yields whether they are there for that.

        They are not if one of them is missing, or being removed just now.

        Raises:
          OSError: if one can't be opened, for want of descriptors for instance.

        """
        held: list[Path] = []
        try:
            complete = all(self._take(entry, held) for entry in dict.fromkeys(entries))
            yield complete
        finally:
            for entry in held:
                self._give_back(entry)

    def _take(self, entry: Path, held: list[Path]) -> bool:
        lease = self._leases.get(entry)
        if lease is None:
            fd = _lock(entry)
            if fd is None:
                return False
            lease = self._leases[entry] = _Lease(fd)
        lease.holders += 1
        held.append(entry)
        mark_used(entry)
        return True

    def _give_back(self, entry: Path) -> None:
        lease = self._leases[entry]
        lease.holders -= 1
        if not lease.holders:
            del self._leases[entry]
            os.close(lease.fd)


def _lock(entry: Path) -> int | None:
    """Return the descriptor of a directory that we share the lock of; None if it is not there, or not any more."""
    try:
        fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(entry)):  # it may have been removed before we had the lock
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def mark_used(entry: Path) -> None:
    """Have an entry count as used now: those used longest ago are evicted first."""
    with suppress(OSError):  # where only reading is allowed it can still be used
        os.utime(entry / MANIFEST_NAME)


def last_used(entry: Path) -> float:
    """Tell when an entry was used, in Unix seconds; 0 for one without a manifest."""
    try:
        return (entry / MANIFEST_NAME).stat().st_mtime
    except OSError:
        return 0.0
