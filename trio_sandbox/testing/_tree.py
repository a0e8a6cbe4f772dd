"""Files in memory: what a scripted guest has in place of a disk. Errors are those of the system calls."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Iterator, MutableMapping
from typing import Final, final

import attrs

HOME: Final = "/home/user"
_LINKS: Final = 40
_USER: Final = 1000
#: Bytes of a name, as of every Linux file system; and of a file, which is in memory.
_LONGEST_NAME: Final = 255
_LONGEST: Final = 2**30
_numbers = itertools.count(2)


def failure(number: int, path: str, second: str | None = None) -> OSError:
    """Make the error of a system call."""
    return OSError(number, os.strerror(number), path, None, second)


@final
@attrs.define(eq=False)
class Node:
    """A file, a directory or a symbolic link."""

    mode: int
    """Its kind and its permissions."""
    content: bytearray = attrs.field(factory=bytearray)
    """What a file holds."""
    entries: dict[str, Node] = attrs.field(factory=dict[str, "Node"])
    """What a directory holds."""
    target: str = ""
    """Where a link leads."""
    number: int = attrs.field(factory=lambda: next(_numbers))
    links: int = 1
    changed_ns: int = attrs.field(factory=time.time_ns)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def size(self) -> int:
        """What stat(2) says of its size."""
        return len(os.fsencode(self.target)) if stat.S_ISLNK(self.mode) else len(self.content)

    def holds(self, directory: Node) -> bool:
        """Whether a directory is below this one."""
        return any(each is directory or each.holds(directory) for each in self.entries.values())

    def resize(self, size: int, path: str = "") -> None:
        """Make a file longer or shorter."""
        if size > _LONGEST:
            raise failure(errno.EFBIG, path)
        self.content += bytes(max(size - len(self.content), 0))
        del self.content[size:]

    def touch(self) -> None:
        """Note that it was changed now."""
        self.changed_ns = time.time_ns()

    def numbers(self) -> tuple[int, ...]:
        """Return what stat(2) says, in the order of the file helper's protocol."""
        blocks = (self.size + 511) // 512
        times = (self.changed_ns,) * 3
        return (self.mode, self.number, 1, self.links, _USER, _USER, self.size, 0, 4096, blocks, *times)


def new_file(mode: int = 0o644) -> Node:
    """Make an empty file."""
    return Node(stat.S_IFREG | mode)


def new_directory(mode: int = 0o755) -> Node:
    """Make an empty directory."""
    return Node(stat.S_IFDIR | mode)


def new_link(target: str) -> Node:
    """Make a symbolic link."""
    return Node(stat.S_IFLNK | 0o777, target=target)


@final
class ScriptedFiles(MutableMapping[str, bytes]):
    """The files of a scripted guest, for its script: contents of regular files by absolute paths, as far as they are in no link.

    Setting one makes the directories that it is in. There are users' names for nothing: nobody is refused anything.
    """

    def __init__(self) -> None:
        self.root: Node = new_directory()
        for path in ("/tmp", HOME):
            self.make_directories(path)

    def __getitem__(self, path: str) -> bytes:
        node = self._find_or_none(path)
        if node is None or not stat.S_ISREG(node.mode):
            raise KeyError(path)
        return bytes(node.content)

    def __setitem__(self, path: str, content: bytes) -> None:
        if not isinstance(path, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a file's path must be str, not {path!r:.100}")
        if "\0" in path:
            raise ValueError(f"a file's path must not hold a NUL character: {path!r:.100}")
        if not isinstance(content, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"the content of the file {path!r:.100} must be bytes, not {type(content).__name__}: encode text"
            )
        self.make_directories(os.path.dirname(self.absolute(path)))
        parent, name = self.locate(path)
        node = parent.entries.setdefault(name, new_file())
        if node.is_directory:
            raise failure(errno.EISDIR, path)
        node.content[:] = content
        node.touch()

    def __delitem__(self, path: str) -> None:
        self[path]
        self.unlink(path)

    def __iter__(self) -> Iterator[str]:
        return self._walk("", self.root)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _walk(self, place: str, directory: Node) -> Iterator[str]:
        for name, node in directory.entries.items():
            if node.is_directory:
                yield from self._walk(f"{place}/{name}", node)
            elif stat.S_ISREG(node.mode):
                yield f"{place}/{name}"

    # --- Finding ---

    def absolute(self, path: str) -> str:
        """Return the path from the root; a relative one starts at the user's home."""
        return os.path.join(HOME, path)

    def locate(self, path: str, *, follow: bool = True) -> tuple[Node, str]:
        """Return the directory that the last component of a path is in, and that component; "" for the root itself.

        Raises:
          OSError: as path_resolution(7) says.

        """
        pending = self.absolute(path).split("/")[::-1]
        trail, name, links = [self.root], "", 0
        while pending:
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                trail = trail[:-1] or trail
                continue
            if not trail[-1].is_directory:
                raise failure(errno.ENOTDIR, path)
            if len(os.fsencode(part)) > _LONGEST_NAME:
                raise failure(errno.ENAMETOOLONG, path)
            node = trail[-1].entries.get(part)
            last = not any(each not in ("", ".") for each in pending)
            if node is not None and stat.S_ISLNK(node.mode) and (follow or not last):
                links += 1
                if links > _LINKS:
                    raise failure(errno.ELOOP, path)
                if node.target.startswith("/"):
                    trail = [self.root]
                pending += node.target.split("/")[::-1]
                continue
            if last:
                name = part
                return trail[-1], name
            if node is None:
                raise failure(errno.ENOENT, path)
            trail.append(node)
        if len(trail) == 1:
            return self.root, ""
        parent, node = trail[-2], trail[-1]
        return parent, next(name for name, each in parent.entries.items() if each is node)

    def find(self, path: str, *, follow: bool = True) -> Node:
        """Return what is at a path, or raise `FileNotFoundError`."""
        parent, name = self.locate(path, follow=follow)
        node = parent.entries.get(name) if name else self.root
        if node is None:
            raise failure(errno.ENOENT, path)
        return node

    def _find_or_none(self, path: str) -> Node | None:
        try:
            return self.find(path)
        except OSError:
            return None

    def resolve(self, path: str) -> str:
        """Return the path without links, as realpath(3); what is not there is left as it is."""
        done = "/"
        pending = self.absolute(path).split("/")[::-1]
        for _ in range(4096):
            if not pending:
                return done
            part = pending.pop()
            if part in ("", "."):
                continue
            there = os.path.dirname(done) if part == ".." else os.path.join(done, part)
            try:
                node = self.find(there, follow=False)
            except OSError:
                node = None
            if node is not None and stat.S_ISLNK(node.mode):
                pending += node.target.split("/")[::-1]
                done = "/" if node.target.startswith("/") else done
            else:
                done = there
        raise failure(errno.ELOOP, path)

    # --- Changing ---

    def add(self, path: str, node: Node, *, replace: bool = False) -> None:
        """Put something where nothing is; with *replace*, where something of its kind may be."""
        parent, name = self.locate(path, follow=False)
        old = parent.entries.get(name) if name else self.root
        if old is not None:
            if not replace:
                raise failure(errno.EEXIST, path)
            if old.is_directory and (not node.is_directory or old.entries):
                raise failure(errno.ENOTEMPTY if node.is_directory else errno.EISDIR, path)
            if node.is_directory and not old.is_directory:
                raise failure(errno.ENOTDIR, path)
        parent.entries[name] = node
        parent.touch()

    def make_directories(self, path: str) -> None:
        """Make a directory and those that it is in, as far as they are not there."""
        place = "/"
        for part in self.absolute(path).split("/"):
            place = os.path.join(place, part)
            if self._find_or_none(place) is None:
                self.add(place, new_directory())

    def unlink(self, path: str, *, directory: bool = False) -> Node:
        """Remove a file or a link, or an empty *directory*; return what it was."""
        node = self.find(path, follow=False)
        if node.is_directory != directory:
            raise failure(errno.EISDIR if node.is_directory else errno.ENOTDIR, path)
        if node.entries:
            raise failure(errno.ENOTEMPTY, path)
        parent, name = self.locate(path, follow=False)
        del parent.entries[name]
        parent.touch()
        node.links -= 1
        return node

    def rename(self, source: str, target: str) -> None:
        """Give another name, in place of what has it: as by the system call."""
        node = self.find(source, follow=False)
        try:
            there, new = self.locate(target, follow=False)
            if there.entries.get(new) is node:
                return
            if node is there or node.holds(there):
                raise failure(errno.EINVAL, source)
            self.add(target, node, replace=True)
        except OSError as exc:
            raise failure(exc.errno or errno.EIO, source, target) from None
        parent, name = self.locate(source, follow=False)
        del parent.entries[name]
