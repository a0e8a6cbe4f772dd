"""Layers of a container image, merged: entries of archives in, one tree of files out. Nothing is read or written here.

What an entry is called is looked up as in a root directory: links on the way are followed, and lead nowhere else than into the
tree. A name is refused if it has ``..``. What an entry ``.wh.NAME`` or ``.wh..wh..opq`` takes away is of lower layers only, wherever
in its own layer it stands, and never what a link leads to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import attrs

from ._tar import Kind, TarEntry
from ._tree import Node, Tree, TreeError, show

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
#: Other names that begin so are notes of the program that made the layer.
_NOTES: Final = b".wh..wh."
#: What the guest's file system takes of one file's extended attributes: names, values, and 16 bytes beside each.
_MOST_XATTR_BYTES: Final = 4000
_XATTRS: Final = (b"security.", b"trusted.", b"user.")
#: Of a program that made the layer, about the layer.
_OVERLAY: Final = b"trusted.overlay."
LONGEST_NAME: Final = 255
#: What a part of a sparse file counts for.
_PART_BYTES: Final = 128


class MergeError(Exception):
    """The layers are not those of an image, or are more than may be."""


@final
@attrs.frozen(kw_only=True)
class Limits:
    """What an image may have."""

    layers: int = 256
    entries: int = 500_000
    """In all layers together."""
    path_bytes: int = 4095
    depth: int = 512
    file_bytes: int = 16 * 2**30
    """The size of one file, its holes included."""
    steps: int = 50_000_000
    """Parts of paths that are looked up."""
    description_bytes: int = 256 * 2**20
    """What all entries say of themselves: paths, links, extended attributes, and the parts of sparse files."""


@final
class Merger:
    """Puts layers on top of each other, the lowest first.

    Args:
      limits: What they may have.

    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = Limits() if limits is None else limits
        self.tree: Final = Tree(self._limits.steps)
        self._entries = self._layers = 0
        self._described = 0

    def add_layer(self, entries: Iterable[TarEntry]) -> None:
        """Put a layer on top.

        Raises:
          MergeError: if it can't be one; the tree is of no use then.

        """
        if self._layers == self._limits.layers:
            raise MergeError(f"there are more than {self._limits.layers} layers")
        added: list[TarEntry] = []
        try:
            # What takes something away is looked for first: what it takes is of the layers below, which then are all that is there.
            for entry in entries:
                self._count()
                self._weigh(entry)
                parts = self._split(entry.path)
                if parts and parts[-1].startswith(_WHITEOUT):
                    self._take_away(parts[:-1], parts[-1])
                else:
                    added.append(entry)
            for entry in added:
                self._add(self._split(entry.path), entry)
        except TreeError as exc:
            raise MergeError(str(exc)) from exc
        self._layers += 1

    def _count(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise MergeError(f"there are more than {self._limits.entries} files and directories")

    def _weigh(self, entry: TarEntry) -> None:
        """Count what an entry says of itself, which stays in memory: far more than it takes in an archive that is compressed."""
        self._described += len(entry.path) + len(entry.target) + _PART_BYTES * len(entry.extents)
        self._described += sum(len(name) + len(value) for name, value in entry.xattrs)
        if self._described > self._limits.description_bytes:
            raise MergeError(
                f"its paths, links, attributes and sparse files take more than {self._limits.description_bytes >> 20} MiB"
            )

    def _add(self, parts: list[bytes], entry: TarEntry) -> None:
        if not parts:
            if entry.kind is not Kind.DIRECTORY:
                raise MergeError("the root is no directory")
            _describe(self.tree.root, entry)
            return
        *way, name = parts
        parent = self._enter(way)
        node = self._link(entry) if entry.kind is Kind.HARD_LINK else self._node(entry, parent, name)
        parent.children[name] = node

    def _node(self, entry: TarEntry, parent: Node, name: bytes) -> Node:
        node = parent.children.get(name)
        if entry.kind is not Kind.DIRECTORY:
            node = Node(entry.kind)
        elif node is None or not node.is_directory:
            node = Node(Kind.DIRECTORY, depth=self._below(parent))
        _describe(node, entry)
        if entry.size > self._limits.file_bytes:
            raise MergeError(f"{show(entry.path)} has {entry.size} bytes; {self._limits.file_bytes} are allowed")
        node.source = self._layers
        return node

    def _link(self, entry: TarEntry) -> Node:
        found = self.tree.find(b"/".join(self._split(entry.target)), follow=False)
        if found is None or found.node is None or found.node.is_directory:
            raise MergeError(f"{show(entry.path)} is another name of {show(entry.target)}, which is no file there")
        return found.node

    def _take_away(self, way: list[bytes], name: bytes) -> None:
        directory = self._enter_lower(way)
        if name == _OPAQUE:
            if directory is not None:
                directory.children.clear()
            return
        if name.startswith(_NOTES):
            return
        name = name[len(_WHITEOUT) :]
        if name in (b"", b".", b".."):
            raise MergeError(f"{show(_WHITEOUT + name)} takes nothing away that could be there")
        if directory is not None:
            directory.children.pop(name, None)

    def _enter_lower(self, way: list[bytes]) -> Node | None:
        """Return a directory that is there by its own name."""
        node = self.tree.root
        for name in way:
            child = node.children.get(name)
            if child is None or not child.is_directory:
                return None
            node = child
        return node

    def _enter(self, way: list[bytes]) -> Node:
        """Return the directory for an entry; what is missing on the way is made."""
        node = self.tree.root
        for number, name in enumerate(way, 1):
            child = node.children.get(name)
            if child is None:
                self._count()
                child = node.children[name] = Node(Kind.DIRECTORY, depth=self._below(node))
            elif child.kind is Kind.SYMLINK:
                path = b"/".join(way[:number])
                child = self._follow(path)
                node = child
                continue
            elif not child.is_directory:
                raise MergeError(f"{show(b'/'.join(way[:number]))} is no directory, and there is a file in it")
            node = child
        return node

    def _follow(self, path: bytes) -> Node:
        found = self.tree.find(path)
        if found is None or found.node is None or not found.node.is_directory:
            raise MergeError(f"{show(path)} is a link that leads to no directory, and there is a file in it")
        return found.node

    def _below(self, parent: Node) -> int:
        if parent.depth >= self._limits.depth:
            raise MergeError(f"directories are more than {self._limits.depth} deep")
        return parent.depth + 1

    def _split(self, path: bytes) -> list[bytes]:
        if len(path) > self._limits.path_bytes or b"\0" in path:
            raise MergeError(f"a path has {len(path)} bytes, or a zero among them: {show(path)}")
        parts = self.tree.split(path)
        if b".." in parts:
            raise MergeError(f"a path leads out of its directory: {show(path)}")
        if any(len(part) > LONGEST_NAME for part in parts):
            raise MergeError(f"a name has more than {LONGEST_NAME} bytes: {show(path)}")
        return parts


def _describe(node: Node, entry: TarEntry) -> None:
    """Give a node what its entry says; of a directory, all but its children."""
    node.mode, node.uid, node.gid, node.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
    node.size, node.offset, node.extents = entry.size, entry.offset, entry.extents
    node.device = entry.device
    if entry.kind is Kind.SYMLINK:
        if not entry.target or len(entry.target) >= 4096 or b"\0" in entry.target:
            raise MergeError(f"{show(entry.path)} is a link that leads nowhere")
        node.target, node.mode = entry.target, 0o777
    kept = [
        (name, value)
        for name, value in entry.xattrs
        if name.startswith(_XATTRS) and not name.startswith(_OVERLAY) and name.isascii()
    ]
    if any(len(name) > LONGEST_NAME for name, _ in kept) or _xattr_bytes(kept) > _MOST_XATTR_BYTES:
        raise MergeError(f"{show(entry.path)} has more extended attributes than a file system takes")
    node.xattrs = tuple(sorted(kept))


def _xattr_bytes(xattrs: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(24 + len(name) + len(value) for name, value in xattrs)
