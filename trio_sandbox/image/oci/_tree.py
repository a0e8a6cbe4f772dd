"""A tree of files in memory: what layers come to, and what is written to the disk."""

from __future__ import annotations

from typing import Final, final

import attrs

from ._tar import Extents, Kind

#: Links on the way to one file, as Linux has it.
_MOST_LINKS: Final = 40


class TreeError(Exception):
    """There is no such place, or what stands there is in the way."""


@final
@attrs.define(eq=False)
class Node:
    """A file of any kind. What has several names is one node."""

    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    """In nanoseconds."""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    target: bytes = b""
    """What a symbolic link leads to."""
    device: tuple[int, int] = (0, 0)
    size: int = 0
    source: int = 0
    """The number of the archive that has the content."""
    offset: int = 0
    """Where in there it begins."""
    extents: Extents = ()
    """Where in the file it belongs, part for part."""
    children: dict[bytes, Node] = attrs.field(factory=dict["bytes", "Node"])
    """By name, of a directory."""
    depth: int = 0
    """How far below the root a directory is."""

    @property
    def is_directory(self) -> bool:
        """Whether it has children."""
        return self.kind is Kind.DIRECTORY


@final
@attrs.frozen
class Found:
    """A place in the tree: what is there need not be anything."""

    parent: Node
    name: bytes
    """In the parent, after the links were followed."""
    node: Node | None


@final
class Tree:
    """Files below a root. Whatever links say, there is nothing above it.

    Args:
      most_steps: How many parts of paths may be walked in all, before `TreeError`.

    """

    def __init__(self, most_steps: int) -> None:
        self.root = Node(Kind.DIRECTORY)
        self._steps_left = most_steps

    def find(self, path: bytes, *, follow: bool = True) -> Found | None:
        """Look a path up, links followed as if the root were that of all; None if what is on the way is missing, or no directory.

        Args:
          path: Relative to the root, whether or not it begins with a slash.
          follow: Whether a link at its end is followed, too.

        Raises:
          TreeError: if there are too many links on the way.

        """
        way = [self.root]
        rest = self.split(path)[::-1]
        name = b"."
        links = 0
        while rest:
            name = rest.pop()
            if name == b"..":
                if len(way) > 1:
                    way.pop()
                continue
            node = way[-1].children.get(name)
            if node is not None and node.kind is Kind.SYMLINK and (follow or rest):
                links += 1
                if links > _MOST_LINKS:
                    raise TreeError(f"there are more than {_MOST_LINKS} symbolic links on the way to {show(path)}")
                if node.target.startswith(b"/"):
                    way = [self.root]
                rest += self.split(node.target)[::-1]
            elif node is not None and node.is_directory:
                way.append(node)
            elif rest:
                return None
            else:
                return Found(way[-1], name, node)
        return Found(way[-2] if len(way) > 1 else self.root, name, way[-1])

    def split(self, path: bytes) -> list[bytes]:
        """Return the parts of a path that mean anything.

        Raises:
          TreeError: if too many were asked for by now.

        """
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        self._steps_left -= len(parts) + 1
        if self._steps_left < 0:
            raise TreeError("its paths have too many parts to be looked up")
        return parts

    def get(self, path: bytes) -> Node | None:
        """Return what is at a path, links followed; None if nothing is."""
        found = self.find(path)
        return None if found is None else found.node


def show(path: bytes) -> str:
    """Write a path as people may read it."""
    return ascii(path.decode("utf-8", "replace"))[:200]
