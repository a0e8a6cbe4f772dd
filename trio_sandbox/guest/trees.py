"""Files, and whole trees of them, as records: read on one side, written on the other. Standard library only.

The host and the guest's file helper both use it, in either direction. A tree is one entry, depth first:

    d  mode NUL name           a directory; its entries follow, then
    u                          its end
    f  mode NUL name NUL data  a file with its first bytes
    c  data                    the last file goes on
    h  size                    the last file goes on with a hole of so many bytes, a number of 64 bits
    l  name NUL target         a symbolic link
    .                          the end of the whole

A name is one component of a path and never a path, so that no tree can say where it is written: not by "..", by
an absolute name or by a link that it brought itself. There are no owners, no devices, and of a mode the nine
permission bits only: a program that is set-user-id in a guest must not be so on its host.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Container, Generator, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Protocol

    class _Entries(Protocol):
        """What os.scandir() returns."""

        def __next__(self) -> os.DirEntry[str]: ...
        def __iter__(self) -> _Entries: ...
        def close(self) -> None: ...


HEADER = struct.Struct(">cI")
_HOLE = struct.Struct(">Q")

#: Bytes of content in one record, where it is not said otherwise.
CHUNK = 65536
#: Bytes after which what was read is handed on.
BATCH = 131072
#: Directories within directories. Each one costs two descriptors while it is read.
MAXIMUM_DEPTH = 128
#: What an entry counts for beside its content where there is a limit on bytes: a block on the disk, as a rule.
ENTRY_COST = 4096
#: Of one file, holes included: no file in a guest can be longer (ext4).
MAXIMUM_LENGTH = 2**44

#: Of one record with names of a directory: bytes after which it ends, and names at most.
LISTING_BYTES = 32768
LISTING_NAMES = 1000
#: What all names in an answer may cost, in bytes, with this much for each beside its own length: what it takes where it is kept.
LISTING_LIMIT = 128 * 2**20
NAME_COST = 512

_PERMISSIONS = 0o777
_NAME_LIMIT = 255
_TARGET_LIMIT = 4095


class TreeError(Exception):
    """What came is not a tree."""


def record(tag: bytes, payload: bytes) -> bytes:
    """Return the bytes of one record."""
    return HEADER.pack(tag, len(payload)) + payload


class TreeReader:
    """Reads a file or a tree.

    Args:
      path: What to read; a symbolic link here is followed, and none below.
      excluded: Names below that are left out, with all that is in them.

    """

    def __init__(self, path: str, excluded: Container[str] = ()) -> None:
        self.files: int = 0
        """Files and links read so far."""
        self.size: int = 0
        """Bytes of content read so far."""
        self._path = path
        self._excluded = excluded
        self._ready: list[bytes] = []
        self._ready_size = 0
        self._directories: list[tuple[int, _Entries, str]] = []

    def batches(self) -> Generator[bytes]:
        """Yield the tree's records, many at a time. Closing the iterator early leaves nothing open.

        Raises:
          OSError: as open(2) and read(2), with the path of what could not be read; EOPNOTSUPP for what is no
            file, directory or link; ENAMETOOLONG for directories nested deeper than `MAXIMUM_DEPTH`.

        """
        try:
            # Looked at before it is opened: opening a device can do things.
            _check_kind(os.stat(self._path).st_mode, self._path)
            yield from self._read(None, self._path, "", self._path)
            while self._directories:
                directory, entries, path = self._directories[-1]
                entry = next(entries, None)
                if entry is None:
                    self._leave()
                    self._put(b"u", b"")
                elif entry.name in self._excluded:
                    continue
                elif entry.is_symlink():
                    target = os.readlink(entry.name, dir_fd=directory)
                    self._put(b"l", b"%s\0%s" % (os.fsencode(entry.name), os.fsencode(target)))
                    self.files += 1
                else:
                    shown = f"{path}/{entry.name}"
                    if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                        _check_kind(0, shown)
                    yield from self._read(directory, entry.name, entry.name, shown)
                if self._ready_size >= BATCH:
                    yield self._take()
            self._put(b".", b"")
            yield self._take()
        finally:
            while self._directories:
                self._leave()

    def _read(self, directory: int | None, path: str, name: str, shown: str) -> Generator[bytes]:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = -1
        try:
            descriptor = os.open(path, flags if directory is None else flags | os.O_NOFOLLOW, dir_fd=directory)
            status = os.fstat(descriptor)
            _check_kind(status.st_mode, shown)
            head = b"%o\0%s" % (status.st_mode & _PERMISSIONS, os.fsencode(name))
            if stat.S_ISDIR(status.st_mode):
                self._put(b"d", head)
                self._enter(descriptor, shown)
                descriptor = -1
                return
            self.files += 1
            yield from self._read_file(descriptor, status, head, shown)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, shown) from None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _read_file(self, descriptor: int, status: os.stat_result, head: bytes, _shown: str) -> Generator[bytes]:
        """Read an open file, whose record starts with *head*."""
        if is_sparse(status):
            self._put(b"f", head + b"\0")
            yield from self._read_parts(descriptor, status.st_size)
            return
        data = os.read(descriptor, CHUNK)
        self._put(b"f", b"%s\0%s" % (head, data))
        self.size += len(data)
        # A size of 0 may mean that the kernel does not know it: /proc. Otherwise what is added meanwhile is left
        # out, so that a file which grows has an end.
        left = status.st_size - len(data) if status.st_size else None
        if data and left != 0:
            yield from self._read_content(descriptor, left)

    def _read_parts(self, descriptor: int, size: int) -> Generator[bytes]:
        position = 0
        for start, end in extents(descriptor, size):
            if start > position:
                self._put(b"h", _HOLE.pack(start - position))
            os.lseek(descriptor, start, os.SEEK_SET)
            yield from self._read_content(descriptor, end - start)
            position = end
        if size > position:
            self._put(b"h", _HOLE.pack(size - position))

    def _read_content(self, descriptor: int, left: int | None) -> Generator[bytes]:
        """Read *left* bytes, which are more than none, from where the file is; None: all that there are."""
        while left is None or left > 0:
            if self._ready_size >= BATCH:
                yield self._take()
            # With its header it makes up a batch, of which the frames of a channel are even parts.
            most = BATCH - HEADER.size
            data = os.read(descriptor, most if left is None else min(most, left))
            if not data:
                return
            self._put(b"c", data)
            self.size += len(data)
            if left is not None:
                left -= len(data)

    def _enter(self, descriptor: int, shown: str) -> None:
        if len(self._directories) == MAXIMUM_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"directories are nested deeper than {MAXIMUM_DEPTH}", shown)
        # Copies the descriptor, and closes its copy when it is used up or collected.
        self._directories.append((descriptor, os.scandir(descriptor), shown))

    def _leave(self) -> None:
        descriptor, entries, _ = self._directories.pop()
        entries.close()
        os.close(descriptor)

    def _put(self, tag: bytes, payload: bytes) -> None:
        self._ready += (HEADER.pack(tag, len(payload)), payload)
        self._ready_size += HEADER.size + len(payload)

    def _take(self) -> bytes:
        data = b"".join(self._ready)
        self._ready.clear()
        self._ready_size = 0
        return data


def _check_kind(mode: int, path: str) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EOPNOTSUPP, "neither a file nor a directory nor a link", path)


def is_sparse(status: os.stat_result) -> bool:
    """Whether a file takes less room than it is long, so that it may have holes."""
    return status.st_blocks * 512 < status.st_size


def extents(descriptor: int, size: int) -> Iterable[tuple[int, int]]:
    """Yield the start and the end of each part of a file, up to *size*, that is not a hole. Moves the file's position.

    Raises:
      OSError: as lseek(2).

    """
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # nothing else is there
            if exc.errno != errno.EINVAL:
                raise
            start, end = end, size  # the file system does not know
        if start < size:
            yield start, end


class TreeWriter:
    """Writes a tree whose sender is not trusted; *name* in *parent* is all that it can make.

    Every name is looked up in the directory that was made for it, by descriptor and without following
    links, and nothing that is there already is opened.

    Args:
      parent: A directory's descriptor, which stays the caller's.
      name: What the tree is to be called in there. Nobody may be using that name.
      max_bytes: What the tree may need, with `ENTRY_COST` for each entry and each hole; None: anything.
      mask: Bits of modes that nothing gets.

    """

    def __init__(self, parent: int, name: str, *, max_bytes: int | None = None, mask: int = 0) -> None:
        self.files: int = 0
        """Files and links written so far."""
        self.size: int = 0
        """Bytes of content written so far."""
        self.finished: bool = False
        """The tree is there as a whole."""
        self._parent = parent
        self._name = name
        self._limit = max_bytes
        self._mask = mask
        self._cost = 0
        self._file = -1
        self._ends_in_hole = False
        self._directories: list[tuple[int, int]] = []
        self._complete = False

    def write(self, tag: bytes, payload: bytes | memoryview) -> None:
        """Take one record.

        Raises:
          TreeError: if it is not a record, or not one that can stand here.
          OSError: as open(2), write(2) and so on; EFBIG if the tree is larger than allowed.

        """
        if tag == b"c":
            self._write(payload)
            return
        if tag == b"h":
            self._leave_hole(bytes(payload))
            return
        payload = bytes(payload)
        self._close_file()
        if tag == b"." and self._complete and not payload:
            self.finished = True
            self._complete = False  # so that nothing can follow
        elif tag == b"u" and self._directories and not payload:
            descriptor, mode = self._directories.pop()
            try:
                os.fchmod(descriptor, mode)
            finally:
                os.close(descriptor)
            self._complete = not self._directories
        elif tag == b"f":
            permissions, name, data = _split(payload, 3)
            self._make_file(_parse_mode(permissions) & ~self._mask, self._new_name(name), data)
        elif tag == b"d":
            permissions, name = _split(payload, 2)
            self._make_directory(_parse_mode(permissions) & ~self._mask, self._new_name(name))
        elif tag == b"l" and self._directories:
            name, target = _split(payload, 2)
            if not 0 < len(target) <= _TARGET_LIMIT or b"\0" in target:
                raise TreeError(f"not the target of a link: {target[:80]!r}")
            where = self._new_name(name)
            with _nothing_there(where):
                os.symlink(os.fsdecode(target), where, dir_fd=self._directories[-1][0])
            self.files += 1
        else:
            raise TreeError(f"a record that can't stand here: {tag!r}")

    def expect(self, size: int) -> int:
        """Take a record "c" without its payload: return the descriptor that the caller writes those *size* bytes to.

        It is open until something else is written, or all is closed.

        Raises:
          TreeError, OSError: as `write`.

        """
        if self._file < 0:
            raise TreeError("content that belongs to no file")
        self._charge(size)
        self.size += size
        if size:
            self._ends_in_hole = False
        return self._file

    def _leave_hole(self, payload: bytes) -> None:
        if self._file < 0 or len(payload) != _HOLE.size:
            raise TreeError("a hole that can't be here")
        (size,) = _HOLE.unpack(payload)
        if not size:
            raise TreeError("a hole of nothing")
        # It takes no room, but what comes behind it does.
        self._charge(ENTRY_COST)
        length = os.lseek(self._file, 0, os.SEEK_CUR) + size
        try:
            if length > MAXIMUM_LENGTH:
                raise OverflowError
            os.lseek(self._file, length, os.SEEK_SET)
        except (OverflowError, OSError) as exc:  # or longer than this file system allows
            raise OSError(errno.EFBIG, f"a file of {length} bytes, holes included, is too long") from exc
        self._ends_in_hole = True

    def close(self) -> None:
        """Close what is open; what is on the disk stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        while self._directories:
            os.close(self._directories.pop()[0])

    def _new_name(self, name: bytes) -> str:
        if self._complete or self.finished:
            raise TreeError("more than one tree")
        self._charge(ENTRY_COST)
        if not self._directories:
            return self._name
        if not name or len(name) > _NAME_LIMIT or name in (b".", b"..") or b"/" in name or b"\0" in name:
            raise TreeError(f"not a name: {name[:80]!r}")
        return os.fsdecode(name)

    def _make_file(self, mode: int, name: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _nothing_there(name):
            self._file = os.open(name, flags, mode, dir_fd=self._directory)
        # As a rule the umask took nothing away; looking costs a fraction of what setting it does.
        if stat.S_IMODE(os.fstat(self._file).st_mode) != mode:
            os.fchmod(self._file, mode)
        self.files += 1
        self._complete = not self._directories
        self._write(data)

    def _make_directory(self, mode: int, name: str) -> None:
        if len(self._directories) == MAXIMUM_DEPTH:
            raise TreeError(f"directories are nested deeper than {MAXIMUM_DEPTH}")
        with _nothing_there(name):
            os.mkdir(name, 0o700, dir_fd=self._directory)
        descriptor = open_directory(name, dir_fd=self._directory)
        self._directories.append((descriptor, mode))

    @property
    def _directory(self) -> int:
        return self._directories[-1][0] if self._directories else self._parent

    def _write(self, data: bytes | memoryview) -> None:
        descriptor = self.expect(len(data))
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def _charge(self, cost: int) -> None:
        self._cost += cost
        if self._limit is not None and self._cost > self._limit:
            raise OSError(errno.EFBIG, f"more than the {self._limit} bytes that were allowed by `max_bytes`")

    def _close_file(self) -> None:
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            try:
                if self._ends_in_hole:
                    self._ends_in_hole = False
                    os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR))
            finally:
                os.close(descriptor)


class _nothing_there:  # noqa: N801  used like a function, and contextlib's costs ten times as much
    """A name that is taken within a new tree was sent twice."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, FileExistsError):
            raise TreeError(f"two entries of one name: {self._name[:80]!r}") from error


def _split(payload: bytes, fields: int) -> list[bytes]:
    found = payload.split(b"\0", fields - 1)
    if len(found) != fields:
        raise TreeError(f"a record with too few fields: {payload[:80]!r}")
    return found


def _parse_mode(text: bytes) -> int:
    # Not int() alone: it takes signs, blanks, underscores and megabytes of digits.
    if not 0 < len(text) <= len("777") or text.strip(b"01234567"):
        raise TreeError(f"not a mode: {text[:80]!r}")
    return int(text, 8)


def open_directory(path: str, *, dir_fd: int | None = None, follow: bool = False) -> int:
    """Return the descriptor of a directory, by default of no link to one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(path, flags if follow else flags | os.O_NOFOLLOW, dir_fd=dir_fd)


def check_replaceable(parent: int, name: str) -> None:
    """Raise the `OSError` that would meet a tree renamed to *name* in *parent* when all of it is there.

    Only what is bound to fail in any case does so here: whether a file or a tree comes is not known yet.
    """
    try:
        descriptor = open_directory(name, dir_fd=parent)
    except OSError:
        return
    try:
        with os.scandir(descriptor) as entries:
            if next(entries, None) is not None:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
    finally:
        os.close(descriptor)


def remove(parent: int, name: str) -> None:
    """Remove *name* in the directory *parent* with all that is in it, following no link; it need not be there.

    Raises:
      OSError: as unlink(2) and rmdir(2).

    """
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass
    else:
        return
    try:
        descriptor = open_directory(name, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        descriptor = open_directory(name, dir_fd=parent)
    try:
        os.fchmod(descriptor, 0o700)
        for entry in os.listdir(descriptor):
            remove(descriptor, entry)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=parent)
