"""The third disk of a machine that makes a layer: one directory of ours, as a file system.

`mke2fs` and `debugfs`, which make the disk of a sandbox's mounts, wait until all of it is on the host's disk, twice. This disk is
read at once and thrown away: what it has may never get there.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import Final, final

import trio
import trio.from_thread

from .._errors import ImageBuildError
from ..constants import MOUNTS_DISK_BYTES
from .oci import BLOCK, UNIT, Kind, Node, TreeError, write_file_system

_KINDS: Final = {stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFREG: Kind.FILE, stat.S_IFLNK: Kind.SYMLINK}


def write_tree_disk(tree: Path, disk: Path) -> int:
    """Write *tree* to the empty file *disk*; return how many bytes of that its file system has. Blocks: call it in a thread of Trio's.

    All of it belongs to root. Nobody may change *tree* meanwhile.

    Args:
      tree: A directory of directories, files and symbolic links.
      disk: `constants.MOUNTS_DISK_BYTES` long; what is free takes no room.

    Raises:
      ImageBuildError: if it does not fit.
      OSError: if something can't be read or written.

    """
    survey = _Survey()
    root = survey.take(os.fspath(tree))
    if survey.size > MOUNTS_DISK_BYTES:
        limit = MOUNTS_DISK_BYTES // 2**30
        raise ImageBuildError(
            f"what one step of an image brings may take {limit} GiB, and it takes more; split the step"
        )
    try:
        with open(disk, "r+b", buffering=0) as file:
            write_file_system(
                file.fileno(),
                survey.size,
                root,
                survey.files,
                uuid=bytes(16),
                check_cancelled=trio.from_thread.check_cancelled,
            )
    except TreeError as exc:
        raise ImageBuildError(f"what a step of the image brings can't be on a disk: {exc}") from exc
    return survey.size


@final
class _Files:
    """What is in files, by their numbers; each is in memory only while it is copied."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __getitem__(self, number: int, /) -> memoryview:
        with open(self.paths[number], "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@final
class _Survey:
    """What there is, and what it takes at most."""

    def __init__(self) -> None:
        self.files = _Files()
        self._blocks = 0
        self._entries = 0

    @property
    def size(self) -> int:
        """Bytes of a file system that certainly has room for it."""
        # A directory has a block more for each few names; and there are inodes, bitmaps, descriptors and what says where files are.
        blocks = self._blocks + 2 * self._entries
        return (blocks * BLOCK * 17 // 16 // UNIT + 2) * UNIT

    def take(self, tree: str) -> Node:
        """Return the directory *tree*, with all that is below."""
        root = self._look_at(tree)
        directories = [(root, tree)]
        while directories:
            trio.from_thread.check_cancelled()
            parent, path = directories.pop()
            with os.scandir(path) as children:
                for child in children:
                    node = parent.children[os.fsencode(child.name)] = self._look_at(child.path)
                    if node.is_directory:
                        directories.append((node, child.path))
        return root

    def _look_at(self, path: str) -> Node:
        status = os.lstat(path)
        node = Node(_KINDS[stat.S_IFMT(status.st_mode)], mode=stat.S_IMODE(status.st_mode), mtime=status.st_mtime_ns)
        self._entries += 1
        if node.kind is Kind.SYMLINK:
            node.target = os.fsencode(os.readlink(path))
        elif node.kind is Kind.FILE and status.st_size:
            self._blocks += -(-status.st_size // BLOCK)
            node.size, node.extents = status.st_size, ((0, status.st_size),)
            node.source = len(self.files.paths)
            self.files.paths.append(path)
        return node
