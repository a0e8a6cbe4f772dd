"""Copies of the host's files, put among those of an image, and lines added to a file of it: no program of the image is needed. Stdlib only."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO

from ..trees import extents, is_sparse
from .replacing import check_regular, write_all

#: Bytes that the kernel copies at a time.
_PIECE = 1 << 30
#: Bytes of a file of lines, of which the guest reads no more.
_LONGEST = 1 << 20


def merge(source: str, target: str, disk: str = "/") -> None:
    """Copy a file, a link or a directory to *target*, on the file system of *disk*; directories on the way are made where they are missing.

    What is a directory on both sides is merged, and the one that is there stays as it is. Whatever else is there makes room. What is new belongs
    to who does it, and has the mode and the times of its source.

    Raises:
      OSError: as open(2), mkdir(2), unlink(2) and write(2); EXDEV if *target* is on another file system.

    """
    parent = os.path.dirname(target)
    try:
        os.makedirs(parent, 0o755, exist_ok=True)
    except FileExistsError as exc:
        raise _not_a_directory(exc.filename) from None
    if os.stat(parent).st_dev != os.stat(disk).st_dev:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), target)
    made: list[tuple[str, os.stat_result]] = []
    rest = [(source, target)]
    while rest:
        path, place = rest.pop()
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            if _make_directory(place):
                made.append((place, status))
            rest += [(f"{path}/{name}", f"{place}/{name}") for name in os.listdir(path)]
            continue
        if os.path.lexists(place):
            os.unlink(place)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(path), place)
            os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        else:
            _copy_file(path, place)
    for place, status in reversed(made):
        os.chmod(place, stat.S_IMODE(status.st_mode))
        os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))


def _make_directory(path: str) -> bool:
    """Make a directory; False if one is there, or a link that leads to one."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise _not_a_directory(path) from None
        return False
    return True


def _not_a_directory(path: str) -> NotADirectoryError:
    return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def _copy_file(source: str, target: str) -> None:
    """Copy a regular file to a new one; holes stay holes."""
    with FileIO(source) as old, FileIO(target, "x") as new:
        status = os.fstat(old.fileno())
        check_regular(status, source)
        for start, end in extents(old.fileno(), status.st_size) if is_sparse(status) else [(0, status.st_size)]:
            new.seek(start)
            offset = start
            while offset < end and (
                count := os.sendfile(new.fileno(), old.fileno(), offset, min(_PIECE, end - offset))
            ):
                offset += count
        new.truncate(status.st_size)
        os.fchmod(new.fileno(), stat.S_IMODE(status.st_mode))
        os.utime(new.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


def append(path: str, text: str) -> None:
    """Add *text* to a file, on a line of its own; everybody may read it then.

    Raises:
      OSError: as open(2) and write(2); EFBIG if nobody would read all of it.

    """
    added = os.fsencode(text)
    with FileIO(path, "a+", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        check_regular(status, path)
        if status.st_size + len(added) >= _LONGEST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        whole = not status.st_size or os.pread(file.fileno(), 1, status.st_size - 1) == b"\n"
        write_all(file, memoryview((b"" if whole else b"\n") + added))
        os.fchmod(file.fileno(), 0o644)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o644)  # opening a named pipe would wait for ever
