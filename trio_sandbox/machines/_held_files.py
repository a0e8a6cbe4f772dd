"""Small files by which processes of one user tell each other of themselves.

They are in a private directory in memory, at one place whatever the environment of the processes is, so that a write never waits for a
disk. Each is locked by its owner for as long as that lives: the kernel drops the lock however a process ends, and whoever finds a file without
one removes it.

A file has records of a fixed size. Each is written at once, and in place. Whoever reads a record while it is written sees that by its checksum.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias, TypeVar, final
from weakref import WeakSet

from .._private import make_new_directory
from .._stored_json import Fields, parse_json

T = TypeVar("T")

#: Where everybody may make directories: in memory, if there is such a place.
_BASES: Final = (Path("/dev/shm"), Path("/var/tmp"))
#: Tries to make a file while others remove theirs, and to read one while it is written.
ATTEMPTS: Final = 20
#: What stands before a record's text: a checksum and a blank; and behind it: the end of the line.
_FRAME: Final = 10


def default_directory() -> Path:
    """Return where the files of this user's hosts are, the same in all processes."""
    base = next((base for base in _BASES if os.access(base, os.W_OK | os.X_OK)), _BASES[-1])
    return base / f"trio-sandbox-{os.geteuid()}"


def encode_record(fields: Mapping[str, object], size: int) -> bytes:
    """Return a record of *size* bytes; a checksum tells what was written half from what is whole.

    Raises:
      ValueError: if the fields take more.

    """
    body = json.dumps(fields, ensure_ascii=False).encode()
    if len(body) > size - _FRAME:
        raise ValueError(f"a record has at most {size - _FRAME} bytes, and this one would have {len(body)}")
    return b"%08x %s\n" % (zlib.crc32(body), body.ljust(size - _FRAME))


def decode_record(data: bytes, size: int) -> Fields:
    """Return what a record says.

    Raises:
      ValueError: if it is not what `encode_record` makes.

    """
    checksum, _, body = data[:size].partition(b" ")
    body = body.rstrip()
    if len(data) != size or checksum != b"%08x" % zlib.crc32(body):
        raise ValueError("it is damaged")
    return Fields(parse_json(body))


def read_whole(read: Callable[[], T]) -> T:
    """Return what *read* does; again and again if that is damaged, since it may be written just now.

    Raises:
      ValueError: if it is damaged each time.

    """
    for _ in range(ATTEMPTS - 1):
        with suppress(ValueError):
            return read()
    return read()


#: Told of a file, for it to be removed if we are killed.
Guard: TypeAlias = Callable[[Path], object]


def no_guard(path: Path) -> None:
    """Take no notice."""


@final
class HeldFile:
    """A file of this process, which holds a lock on it. It is made when it is first needed, by `make`.

    Args:
      directory: Where it is; made if it is missing.
      prefix: What its name begins with; 16 hexadecimal digits follow.
      guard: See `Guard`. Others would remove it some time later.

    """

    def __init__(self, directory: Path, prefix: str, guard: Guard) -> None:
        self.directory = directory
        self.name = ""
        """Empty until there is one."""
        self.fd = -1
        """Open for reading and writing; -1 while there is none."""
        self._prefix = prefix
        self._guard = guard

    @property
    def missing(self) -> bool:
        """Whether there is no file of ours, or nobody can find it any more."""
        return self.fd < 0 or os.fstat(self.fd).st_nlink == 0

    def make(self) -> None:
        """Make the file, which is empty, and lock it.

        Raises:
          OSError: if it can't be made, or the directory is somebody else's.

        """
        self.release()
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # whoever was the last removed the directory just now
                directory = open_held_directory(self.directory, make=True)
                try:
                    if self._make_in(directory):
                        return
                finally:
                    os.close(directory)
        raise OSError(errno.EAGAIN, "files disappear there as soon as they are made")

    def _make_in(self, directory: int) -> bool:
        name = self._prefix + secrets.token_hex(8)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            # Until it is locked, others take it for a dead owner's.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(fd, 0o600)  # whatever the umask says
        except OSError as exc:
            os.close(fd)
            if isinstance(exc, BlockingIOError):
                return False
            raise
        self.name, self.fd = name, fd
        self._guard(self.directory / name)
        _open_files.add(self)
        return not self.missing

    def remove(self) -> None:
        """Remove the file, and the directory if it was the last there."""
        if self.fd < 0:
            return
        with suppress(OSError):
            os.unlink(self.directory / self.name)
        self.release()
        with suppress(OSError):
            os.rmdir(self.directory)  # which fails if somebody else has a file there

    def release(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_held_directory(path: Path, *, make: bool) -> int:
    """Open a directory of such files, which nobody else can have put anything into; return the descriptor.

    Raises:
      OSError: if it can't be opened or made, or is somebody else's.

    """
    if make:
        with suppress(FileExistsError):
            make_new_directory(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
        return fd
    os.close(fd)
    raise PermissionError(errno.EPERM, "it is somebody else's, or others may enter it")


def read_held_files(path: Path, prefix: str, read: Callable[[str, int], T], *, but: str = "") -> list[T]:
    """Read the files of all processes that are alive, and remove those of the others.

    Args:
      path: The directory.
      prefix: What the files' names begin with; see `HeldFile`.
      read: Called with a file's name and a descriptor of it; what it returns is returned in a list.
      but: The name of one that is left out, since it is the caller's own.

    Raises:
      OSError: if the directory can't be opened, or is somebody else's, or there are no descriptors left. That it is missing is no error.

    """
    try:
        directory = open_held_directory(path, make=False)
    except FileNotFoundError:
        return []
    ours = re.compile(re.escape(prefix) + "[0-9a-f]{16}")
    found: list[T] = []
    try:
        for name in os.listdir(directory):
            if name == but or not ours.fullmatch(name) or (fd := _open_if_alive(directory, name)) is None:
                continue
            try:
                found.append(read(name, fd))
            finally:
                os.close(fd)
    finally:
        os.close(directory)
    return found


def _open_if_alive(directory: int, name: str) -> int | None:
    """Open a file whose owner lives; None if it is no such file. That of a dead owner is removed."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # it may well be one
        return None
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        if is_held(fd):
            return fd
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
    os.close(fd)
    return None


def is_held(fd: int) -> bool:
    """Tell whether the owner of a file lives; if not, this descriptor has the lock from now on."""
    try:
        # Shared, or two that look at the same time would each take the other for the owner.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


_open_files: Final[WeakSet[HeldFile]] = WeakSet()


def _release_in_child() -> None:
    # A child by os.fork() that outlives us would hold our locks, and we would seem to live for as long as it does.
    for file in list(_open_files):
        file.release()


os.register_at_fork(after_in_child=_release_in_child)
