"""A directory of the host's: what is in it, and how changes get there from a copy of the guest's. Blocks: to be called in threads.

Everything is looked up by name in a directory that is open already, and no link is followed but the directory itself: what a
link leads to, and what somebody puts into the place of a directory meanwhile, is never read or written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

import attrs

from .._workspace_change import WorkspaceChange
from ..guest.trees import MAXIMUM_DEPTH, extents, open_directory
from ._plan import Entry, Tree

#: What is in the making beside its place: never part of a directory's content.
_TEMPORARY: Final = re.compile(r"\.trio-sandbox-[0-9a-f]{16}")
_EXECUTABLE: Final = 0o111
_NEW_FILE, _NEW_PROGRAM = 0o666, 0o777
_PIECE: Final = 2**20
#: What the kernel says where something is not any more what was found.
_MEANWHILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP)


@final
@attrs.frozen
class Found:
    """What was found in a directory."""

    tree: Tree
    states: Mapping[str, tuple[int, ...]]
    """By path, what tells whether it is still what was found."""


def scan(directory: int, *, max_bytes: int | None = None, size: int = 0, ours: bool = False) -> Found:
    """Find out what is in the open directory, and below.

    Args:
      directory: Its descriptor, which stays the caller's.
      max_bytes: As many as its files may have together, holes included; None: any number.
      size: So many of these are taken already.
      ours: It is a copy that was made for us alone, in which what can't be read is made readable.

    Raises:
      OSError: as open(2) and read(2), with the path below the directory; ENAMETOOLONG for more than `MAXIMUM_DEPTH` directories in each
        other; EFBIG for more than *max_bytes*.

    """
    tree: dict[str, Entry] = {}
    states: dict[str, tuple[int, ...]] = {}
    waiting = [""]
    while waiting:
        top = waiting.pop()
        if top.count("/") >= MAXIMUM_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"directories are nested deeper than {MAXIMUM_DEPTH}", top)
        with _shown(top), _within(directory, top, ours=ours) as descriptor:
            for name in os.listdir(descriptor):
                if _TEMPORARY.fullmatch(name):
                    continue
                path = posixpath.join(top, name)
                with _shown(path):
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    size += status.st_size if stat.S_ISREG(status.st_mode) else 0
                    if max_bytes is not None and size > max_bytes:
                        raise OSError(
                            errno.EFBIG,
                            f"more than the {max_bytes} bytes that were allowed by `max_bytes`, holes included",
                        )
                    tree[path] = _entry(descriptor, name, status, ours=ours)
                    states[path] = _state(status)
                if tree[path].kind == "directory":
                    waiting.append(path)
    return Found(tree, states)


def unchanged(directory: int, found: Found) -> Tree:
    """Return what of *found* is still there in the open directory as it was, as far as can be told without reading it."""
    tree: dict[str, Entry] = {}
    for path, state in found.states.items():
        with suppress(OSError):
            if _state(os.stat(path, dir_fd=directory, follow_symlinks=False)) == state:
                tree[path] = found.tree[path]
    return tree


def _entry(directory: int, name: str, status: os.stat_result, *, ours: bool) -> Entry:
    if stat.S_ISDIR(status.st_mode):
        return Entry("directory")
    if stat.S_ISLNK(status.st_mode):
        return Entry("link", os.readlink(name, dir_fd=directory))
    if not stat.S_ISREG(status.st_mode):
        return Entry("other")
    descriptor = open_file(directory, name, ours=ours)
    with open(descriptor, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry("file", digest, executable=bool(status.st_mode & stat.S_IXUSR), size=status.st_size)


def _state(status: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISDIR(status.st_mode):
        return (status.st_mode, status.st_dev, status.st_ino)  # what is in it is looked at by itself
    return (status.st_mode, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_file(directory: int, name: str, *, ours: bool = False) -> int:
    """Return the descriptor of a regular file in the open directory.

    Raises:
      OSError: as open(2); ELOOP for a link.

    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=directory)
    except PermissionError:
        if not ours:
            raise
    os.chmod(name, stat.S_IRUSR, dir_fd=directory)
    return os.open(name, flags, dir_fd=directory)


@contextmanager
def opened(directory: Path) -> Generator[int]:
    """Yield the descriptor of a directory, which may be a link to one."""
    descriptor = open_directory(os.fspath(directory), follow=True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_below(directory: int, path: str) -> int:
    """Return the descriptor of a regular file below the open directory, on the way to which there is no link.

    Raises:
      OSError: as open(2), with the path below the directory.

    """
    top, name = posixpath.split(path)
    with _shown(path), _within(directory, top) as parent:
        return open_file(parent, name)


@contextmanager
def _within(top: int, path: str, *, ours: bool = False) -> Generator[int]:
    """Yield the descriptor of a directory below *top*, on the way to which there is no link."""
    descriptor = os.dup(top)
    try:
        for name in filter(None, path.split("/")):
            if ours:
                os.chmod(name, stat.S_IRWXU, dir_fd=descriptor)
            inner = open_directory(name, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _shown(path: str) -> Generator[None]:
    """Say in errors which path below the directory they are about."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path or ".") from exc


@final
class Applier:
    """Makes changes in a directory of the host's.

    Args:
      host: Its descriptor.
      found: What was in it when the changes were planned.
      copy: The descriptor of a copy of the guest's directory, made for us alone.
      guest: What is in that.

    """

    def __init__(self, host: int, found: Found, copy: int, guest: Tree) -> None:
        self._host, self._found = host, found
        self._states = dict(found.states)
        self._copy, self._guest = copy, guest

    def apply(self, changes: Iterable[WorkspaceChange]) -> list[WorkspaceChange]:
        """Make those of *changes* that are no conflicts; return them all, with what turned out to be one only now.

        Each file gets its place as a whole. An error leaves what was done before.

        Raises:
          OSError: if something can't be read or written.

        """
        done = {change.path: change for change in changes}
        possible = [change for change in done.values() if not change.conflict]
        # What is in a directory goes before it; what is in another directory comes after it.
        for change in sorted(possible, key=lambda change: change.path, reverse=True):
            if self._replaces_directory(change):
                done[change.path] = self._do(change, self._remove)
        for change in sorted(possible, key=lambda change: change.path):
            if change.kind != "removed" and not done[change.path].conflict:
                done[change.path] = self._do(change, self._put)
        return list(done.values())

    def _replaces_directory(self, change: WorkspaceChange) -> bool:
        here = self._found.tree.get(change.path)
        return change.kind == "removed" or (here is not None and here.kind == "directory")

    def _do(self, change: WorkspaceChange, step: Callable[[str, int, str], None]) -> WorkspaceChange:
        top, name = posixpath.split(change.path)
        with _shown(change.path):
            try:
                with _within(self._host, top) as parent:
                    if _state_of(parent, name) != self._states.get(change.path):
                        return attrs.evolve(change, conflict="was changed here meanwhile")
                    step(change.path, parent, name)
            except OSError as exc:
                if exc.errno not in _MEANWHILE:
                    raise
                return attrs.evolve(change, conflict=f"was changed here meanwhile: {exc.strerror}")
        return change

    def _remove(self, path: str, parent: int, name: str) -> None:
        remove = os.rmdir if self._found.tree[path].kind == "directory" else os.unlink
        remove(name, dir_fd=parent)
        del self._states[path]

    def _put(self, path: str, parent: int, name: str) -> None:
        entry = self._guest[path]
        if entry.kind == "directory":
            _unlink(parent, name)
            os.mkdir(name, dir_fd=parent)
            return
        temporary = f".trio-sandbox-{os.urandom(8).hex()}"
        try:
            if entry.kind == "link":
                os.symlink(entry.content, temporary, dir_fd=parent)
            else:
                self._copy_file(path, entry, parent, temporary, name)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            _unlink(parent, temporary)
            raise

    def _copy_file(self, path: str, entry: Entry, parent: int, temporary: str, name: str) -> None:
        mode = _NEW_PROGRAM if entry.executable else _NEW_FILE
        with open(open_below(self._copy, path), "rb", buffering=0) as source:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, mode, dir_fd=parent), "wb", buffering=0) as target:
                size = os.fstat(source.fileno()).st_size
                for start, end in extents(source.fileno(), size):
                    _copy_part(source.fileno(), target.fileno(), start, end)
                os.ftruncate(target.fileno(), size)
                here = _status(parent, name)
                if here is not None and stat.S_ISREG(here.st_mode):
                    os.fchmod(target.fileno(), _mode_like(here.st_mode, executable=entry.executable))


def _copy_part(source: int, target: int, start: int, end: int) -> None:
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        data = os.pread(source, min(_PIECE, end - start), start)
        if not data:
            return
        start += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]


def _mode_like(mode: int, *, executable: bool) -> int:
    """Return the permissions of a file that takes the place of one with *mode*: who may read it may execute it, or nobody may."""
    mode = stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID | _EXECUTABLE)
    return mode | (mode >> 2 & _EXECUTABLE) if executable else mode


def _status(directory: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _state_of(directory: int, name: str) -> tuple[int, ...] | None:
    status = _status(directory, name)
    return None if status is None else _state(status)


def _unlink(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
