"""What all hosts of one user have given out: each says so in a small file of its own, and reads those of the others.

The files are in a private directory in memory, at one place whatever the environment of the processes is, so that a write never waits for a
disk. Each is locked by its host for as long as that lives: the kernel drops the lock however a process ends, and whoever finds a file without
one removes it.

There is no lock around all of them, since a process that is stopped while it has that would stop all others. A host *first* says what it wants to
have given out, *then* reads what the others say, and takes it back if that is too much. So of two that ask at the same time at least
one sees the other. Both may see each other, and take it back; they look again soon.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final
from weakref import WeakSet

import attrs

from .._observe import part_logger
from .._private import make_new_directory
from .._stored_json import Fields, parse_json

_log = part_logger("admission")

#: Where everybody may make directories: in memory, if there is such a place.
_BASES: Final = (Path("/dev/shm"), Path("/var/tmp"))
#: The version of what is in the files. Others are not read, so a field that is missing or has another meaning needs another number.
FORMAT: Final = 1
#: Bytes of a file; all of it is written at once, and in place.
SIZE: Final = 512
_NAME: Final = re.compile("[0-9a-f]{16}")
#: Tries to make a file while others remove theirs, and to read one while it is written.
_ATTEMPTS: Final = 20


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
    """Return the content of a host's file; a checksum tells what was written half from what is whole."""
    body = json.dumps({"format": FORMAT, **attrs.asdict(entry)}).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body.ljust(SIZE - 10))


def decode(data: bytes) -> LedgerEntry:
    """Return what a file says.

    Raises:
      ValueError: if it is not what `encode` makes, or is of another version.

    """
    checksum, _, body = data[:SIZE].partition(b" ")
    body = body.rstrip()
    if len(data) != SIZE or checksum != b"%08x" % zlib.crc32(body):
        raise ValueError("it is damaged")
    fields = Fields(parse_json(body))
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


def _ignore(path: Path) -> None:
    """Take no notice."""


@final
class Ledger:
    """The file of one host, and what those of the others say. Made by `open_ledger`.

    Where there can be no file, this host is for itself: `problem` says why.
    """

    def __init__(self, directory: Path | None, guard: Callable[[Path], object] = _ignore) -> None:
        self._guard = guard
        self._directory = default_directory() if directory is None else directory
        self._name = ""
        self._fd = -1
        self._entry: LedgerEntry | None = None
        self._unreadable: set[str] = set()
        self.problem: str = ""
        """Why others don't know of this host, nor this host of others; empty if they do."""

    def publish(self, entry: LedgerEntry) -> None:
        """Have others know *entry*, if they don't yet. Blocks the Trio thread for some microseconds."""
        if entry == self._entry and not self._is_removed():
            return
        if self.problem:
            return
        try:
            if self._is_removed():
                self._make()
            os.pwrite(self._fd, encode(entry), 0)
        except OSError as exc:
            self._give_up(exc)
        else:
            self._entry = entry

    def others(self) -> list[LedgerEntry]:
        """Return what the other hosts say that are alive, and remove the files of those that are not."""
        if self.problem:
            return []
        try:
            directory = self._open_directory(make=False)
        except FileNotFoundError:
            return []
        except OSError as exc:
            self._give_up(exc)
            return []
        try:
            return [
                entry
                for name in os.listdir(directory)
                if name != self._name and _NAME.fullmatch(name) and (entry := self._read(directory, name)) is not None
            ]
        finally:
            os.close(directory)

    def close(self) -> None:
        """Have others know that this host is no more."""
        if self._fd < 0:
            return
        with suppress(OSError):
            os.unlink(self._directory / self._name)
        self.release()
        with suppress(OSError):
            os.rmdir(self._directory)  # which fails if somebody else has a file there

    def release(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _is_removed(self) -> bool:
        """Whether there is no file of ours, or nobody can find it any more."""
        return self._fd < 0 or os.fstat(self._fd).st_nlink == 0

    def _give_up(self, exc: OSError) -> None:
        self.close()
        self.problem = f"{self._directory}: {exc.strerror}"
        _log.warning(
            "other processes' sandboxes are not counted, nor are this one's counted by them: %s. Together they may take more memory than "
            "there is; to change that, make that directory this user's own with mode 0700, or give each HostConfig.memory_budget_mib",
            self.problem,
        )

    def _open_directory(self, *, make: bool) -> int:
        """Open our directory, which nobody else can have put anything into."""
        if make:
            with suppress(FileExistsError):
                make_new_directory(self._directory)
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(fd)
        if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
            return fd
        os.close(fd)
        raise PermissionError(errno.EPERM, "it is somebody else's, or others may enter it")

    def _make(self) -> None:
        self.release()
        for _ in range(_ATTEMPTS):
            with suppress(FileNotFoundError):  # whoever was the last removed the directory just now
                directory = self._open_directory(make=True)
                try:
                    if self._make_file(directory):
                        return
                finally:
                    os.close(directory)
        raise OSError(errno.EAGAIN, "files disappear there as soon as they are made")

    def _make_file(self, directory: int) -> bool:
        name = secrets.token_hex(8)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            # Until it is locked, others take it for a dead host's.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(fd, 0o600)  # whatever the umask says
        except BlockingIOError:
            os.close(fd)
            return False
        self._name, self._fd = name, fd
        self._guard(self._directory / name)
        _open_ledgers.add(self)
        return not self._is_removed()

    def _read(self, directory: int, name: str) -> LedgerEntry | None:
        """Return what a file says; None if its host is dead, or if it can't be read."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return None
            with suppress(BlockingIOError):
                # Shared, or two that look at the same time would each take the other for the owner.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
                return None
            why: object = ""
            for _ in range(_ATTEMPTS):
                try:
                    return decode(os.pread(fd, SIZE + 1, 0))
                except ValueError as exc:
                    why = exc  # perhaps it is being written
            if name not in self._unreadable:
                self._unreadable.add(name)
                _log.warning(
                    "what another process's sandboxes take is not counted: %s/%s: %s", self._directory, name, why
                )
            return None
        finally:
            os.close(fd)


def default_directory() -> Path:
    """Return where the files of this user's hosts are, the same in all processes."""
    base = next((base for base in _BASES if os.access(base, os.W_OK | os.X_OK)), _BASES[-1])
    return base / f"trio-sandbox-{os.geteuid()}"


@contextmanager
def open_ledger(directory: Path | None = None, *, guard: Callable[[Path], object] = _ignore) -> Generator[Ledger]:
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


_open_ledgers: Final[WeakSet[Ledger]] = WeakSet()


def _release_in_child() -> None:
    # A child by os.fork() that outlives us would hold our locks, and what we had given out would be counted for as long as it lives.
    for ledger in list(_open_ledgers):
        ledger.release()


os.register_at_fork(after_in_child=_release_in_child)
