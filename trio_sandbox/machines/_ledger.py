"""What all hosts of one user have given out: each says so in a file of its own, and reads those of the others; see `_held_files`.

There is no lock around all of them, since a process that is stopped while it has that would stop all others. A host *first* says what it wants to
have given out, *then* reads what the others say, and takes it back if that is too much. So of two that ask at the same time at least
one sees the other. Both may see each other, and take it back; they look again soon.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import attrs

from .._observe import part_logger
from ._held_files import (
    Guard,
    HeldFile,
    decode_record,
    default_directory as default_directory,
    encode_record,
    no_guard,
    read_held_files,
    read_whole,
)

_log = part_logger("admission")

#: The version of what is in the files. Others are not read, so a field that is missing or has another meaning needs another number.
FORMAT: Final = 1
#: Bytes of a file; all of it is written at once, and in place.
SIZE: Final = 512


@final
@attrs.frozen(kw_only=True)
class LedgerEntry:
    """What one host says of itself, in MiB."""

    pid: int
    """Its process."""
    memory_total: int
    """What it reckons that all hosts together may take of the machine's memory."""
    memory_reserved: int = 0
    """What it has given out of that."""
    disk: int = 0
    """The number of the file system that its sandboxes' disks are on."""
    disk_total: int = 0
    """What it reckons that all hosts together may write there."""
    disk_reserved: int = 0
    """What it has given out of that."""


def encode(entry: LedgerEntry) -> bytes:
    """Return the content of a host's file."""
    return encode_record({"format": FORMAT, **attrs.asdict(entry)}, SIZE)


def decode(data: bytes) -> LedgerEntry:
    """Return what a file says.

    Raises:
      ValueError: if it is not what `encode` makes, or is of another version.

    """
    fields = decode_record(data, SIZE)
    fields.check_format(FORMAT)
    return LedgerEntry(**{field.name: fields.number(field.name) for field in attrs.fields(LedgerEntry)})


def reckon(measured: int, reserved: int, totals: Iterable[int]) -> int:
    """Return what all hosts together may take, as a new one reckons.

    Those that were there may have used some of what they gave out, and that was not there to be measured any more. How much nobody knows: at
    most all of it, and never so much that there was more than any of them measured.

    Args:
      measured: What the new one found left.
      reserved: What the others have given out.
      totals: What each of them reckoned.

    """
    return min(max(measured, *totals, 0), measured + reserved)


@final
class Ledger:
    """The file of one host, and what those of the others say. Made by `open_ledger`.

    Where there can be no file, this host is for itself: `problem` says why.
    """

    def __init__(self, directory: Path | None, guard: Guard = no_guard) -> None:
        self._file = HeldFile(default_directory() if directory is None else directory, "", guard)
        self._entry: LedgerEntry | None = None
        self._unreadable: set[str] = set()
        self.problem: str = ""
        """Why others don't know of this host, nor this host of others; empty if they do."""

    def publish(self, entry: LedgerEntry) -> None:
        """Have others know *entry*, if they don't yet. Blocks the Trio thread for some microseconds."""
        if entry == self._entry and not self._file.missing:
            return
        if self.problem:
            return
        try:
            if self._file.missing:
                self._file.make()
            os.pwrite(self._file.fd, encode(entry), 0)
        except OSError as exc:
            self._give_up(exc)
        else:
            self._entry = entry

    def others(self) -> list[LedgerEntry]:
        """Return what the other hosts say that are alive, and remove the files of those that are not."""
        if self.problem:
            return []
        try:
            found = read_held_files(self._file.directory, "", self._read, but=self._file.name)
        except OSError as exc:
            self._give_up(exc)
            return []
        return [entry for entry in found if entry is not None]

    def close(self) -> None:
        """Have others know that this host is no more."""
        self._file.remove()

    def _give_up(self, exc: OSError) -> None:
        self.close()
        self.problem = f"{self._file.directory}: {exc.strerror}"
        _log.warning(
            "other processes' sandboxes are not counted, nor are this one's counted by them: %s. Together they may take more memory than "
            "there is; to change that, make that directory this user's own with mode 0700, or give each HostConfig.memory_budget_mib",
            self.problem,
        )

    def _read(self, name: str, fd: int) -> LedgerEntry | None:
        """Return what a file says; None if it can't be read, or says nothing yet: its host has given out nothing before it has written that."""
        if os.fstat(fd).st_size == 0:
            return None
        try:
            return read_whole(lambda: decode(os.pread(fd, SIZE + 1, 0)))
        except ValueError as exc:
            if name not in self._unreadable:
                self._unreadable.add(name)
                _log.warning(
                    "what another process's sandboxes take is not counted: %s/%s: %s", self._file.directory, name, exc
                )
            return None


@contextmanager
def open_ledger(directory: Path | None = None, *, guard: Guard = no_guard) -> Generator[Ledger]:
    """Yield a ledger for the block; others know of it from its first entry until the block is left.

    Args:
      directory: Where the files are; None: where all hosts of this user have them.
      guard: Told of the file, for it to be removed if we are killed. Others would remove it some time later.

    """
    ledger = Ledger(directory, guard)
    try:
        yield ledger
    finally:
        ledger.close()
