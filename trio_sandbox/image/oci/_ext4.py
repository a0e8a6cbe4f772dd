"""An ext4 file system of a tree in memory, written in one go: owners, modes, devices and attributes as they are to be, by anybody.

`mke2fs -d` could do it as root only, who may make files that belong to others. This one writes what
it needs: bitmaps and tables of inodes first, then all else, one block after the other, so that what is free is one piece. There is no journal and there are no
checksums, as in the other images: a machine's disk is thrown away. Names of fields are those of the kernel's documentation, "ext4 Data Structures and Algorithms".
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, final

from ._tar import Kind
from ._tree import Node, TreeError

BLOCK: Final = 4096
_INODE: Final = 256
_GROUP: Final = 8 * BLOCK
"""Blocks of a group: as many as one block has bits."""
#: A file system is a multiple of this, in bytes.
UNIT: Final = _GROUP * BLOCK
_BYTES_PER_INODE: Final = 16384
_ROOT, _FIRST_INODE = 2, 11
_MOST_LINKS: Final = 65000
#: The most blocks of one extent, how many are in an inode, and how many in a block.
_LONGEST_EXTENT, _INODE_EXTENTS, _BLOCK_EXTENTS = 32768, 4, 340
_EXTENTS_FLAG: Final = 0x80000
_FAST_LINK: Final = 60
_EXTRA_ISIZE: Final = 32
#: Bytes that are written at a time.
_PIECE: Final = 1 << 20

# ext_attr, dir_index, and sparse_super2, which with no group named is for no copies of the superblock at all.
_COMPATIBLE: Final = 0x8 | 0x20 | 0x200
_INCOMPATIBLE: Final = 0x2 | 0x40 | 0x200  # filetype, extents, flex_bg
_READ_ONLY: Final = 0x2 | 0x8 | 0x20 | 0x40  # large_file, huge_file, dir_nlink, extra_isize
_HALF_MD4: Final = 1
_USER_XATTR_AND_ACL: Final = 0x4 | 0x8

_FORMATS: Final = {
    Kind.FILE: (stat.S_IFREG, 1),
    Kind.DIRECTORY: (stat.S_IFDIR, 2),
    Kind.CHARACTER_DEVICE: (stat.S_IFCHR, 3),
    Kind.BLOCK_DEVICE: (stat.S_IFBLK, 4),
    Kind.FIFO: (stat.S_IFIFO, 5),
    Kind.SYMLINK: (stat.S_IFLNK, 7),
}
_XATTR_MAGIC: Final = 0xEA020000
_XATTR_INDEXES: Final = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_WORD: Final = 0xFFFFFFFF


class Sources(Protocol):
    """Where files have their content, by numbers."""

    def __getitem__(self, number: int, /) -> bytes | memoryview:
        """Return all of one."""
        ...


def write_file_system(
    fd: int,
    size: int,
    root: Node,
    sources: Sources,
    *,
    uuid: bytes,
    check_cancelled: Callable[[], object],
) -> None:
    """Write a file system. Blocks: call it in a thread.

    Args:
      fd: An empty file, or one of zeros, which gets *size* bytes at least, with holes where nothing is.
      size: A multiple of `UNIT`.
      root: The tree.
      sources: Where files have their content, by `Node.source`.
      uuid: Of 16 bytes; what has hashes in it depends on that.
      check_cancelled: Called now and then; what it raises comes out of here.

    Raises:
      TreeError: if it does not fit, or has what this file system can't have.
      OSError: if the file can't be written.

    """
    if os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)
    _Writer(fd, size, root, sources, uuid, check_cancelled).write()


@final
class _Writer:
    def __init__(
        self,
        fd: int,
        size: int,
        root: Node,
        sources: Sources,
        uuid: bytes,
        check_cancelled: Callable[[], object],
    ) -> None:
        self._fd = fd
        self._sources = sources
        self._uuid = uuid
        self._check_cancelled = check_cancelled
        self._numbers: dict[Node, int] = {root: _ROOT}
        self._links: dict[Node, int] = {root: 2}
        self._parents: dict[Node, Node] = {root: root}
        self._directories: list[Node] = [root]
        self._number_all()
        self._groups = size // UNIT
        self._blocks = size // BLOCK
        wanted = max(size // _BYTES_PER_INODE, 2 * (len(self._numbers) + _FIRST_INODE))
        # A whole number of blocks has them, in each group.
        per_block = BLOCK // _INODE
        self._inodes_per_group = -(-wanted // self._groups // per_block + 1) * per_block
        if self._inodes_per_group > 8 * BLOCK:
            raise TreeError(f"there are more files than a file system of {size} bytes has")
        self._descriptors = 1
        self._block_bitmaps = self._descriptors + -(-self._groups * 32 // BLOCK)
        self._inode_bitmaps = self._block_bitmaps + self._groups
        self._tables = self._inode_bitmaps + self._groups
        self._table_blocks = self._inodes_per_group // per_block
        self._next = self._tables + self._groups * self._table_blocks

    def _number_all(self) -> None:
        number = _FIRST_INODE
        for directory in self._directories:  # which grows
            for child in directory.children.values():
                if child in self._numbers:
                    self._links[child] += 1
                    continue
                self._numbers[child] = number
                number += 1
                if child.is_directory:
                    self._links[child] = 2
                    self._links[directory] += 1
                    self._parents[child] = directory
                    self._directories.append(child)
                else:
                    self._links[child] = 1

    def write(self) -> None:
        for count, (node, number) in enumerate(self._numbers.items()):
            if not count % 1000:
                self._check_cancelled()
            self._write_inode(node, number)
        self._write_metadata()

    # --- Inodes ---

    def _write_inode(self, node: Node, number: int) -> None:
        before = self._next
        size, flags, body = self._write_content(node)
        attributes = self._write_xattrs(node) if node.xattrs else 0
        links = self._links[node]
        if links > _MOST_LINKS:
            if not node.is_directory:
                raise TreeError(f"a file has {links} names; {_MOST_LINKS} are allowed")
            links = 1  # which is how it says that it has lost count
        seconds, extra = _time(node.mtime)
        major, _ = _FORMATS[node.kind]
        inode = struct.pack(
            "<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIII",
            major | node.mode & 0o7777,
            node.uid & 0xFFFF,
            size & _WORD,
            seconds,
            seconds,
            seconds,
            0,
            node.gid & 0xFFFF,
            links,
            (self._next - before) * (BLOCK // 512),
            flags,
            0,
            body,
            0,  # generation
            attributes,
            size >> 32,
            0,
            0,  # the higher half of the number of blocks, and of that of the attributes'
            0,
            node.uid >> 16,
            node.gid >> 16,
            0,
            0,
            _EXTRA_ISIZE,
            0,
            extra,
            extra,
            extra,
            seconds,
            extra,
            0,
        )
        os.pwrite(self._fd, inode, self._tables * BLOCK + (number - 1) * _INODE)

    def _write_content(self, node: Node) -> tuple[int, int, bytes]:
        """Return the size, the flags and what the inode says about where it is."""
        match node.kind:
            case Kind.FILE:
                return node.size, _EXTENTS_FLAG, self._map(self._write_parts(node))
            case Kind.DIRECTORY:
                data = self._directory(node)
                return len(data), _EXTENTS_FLAG, self._map(self._write_data(data))
            case Kind.SYMLINK if len(node.target) < _FAST_LINK:
                return len(node.target), 0, node.target
            case Kind.SYMLINK:
                return len(node.target), _EXTENTS_FLAG, self._map(self._write_data(node.target))
            case Kind.CHARACTER_DEVICE | Kind.BLOCK_DEVICE:
                major, minor = node.device
                if major > 0xFFF or minor > 0xFFFFF:
                    raise TreeError(f"there is no device of number {major}, {minor}")
                if major < 256 and minor < 256:
                    return 0, 0, struct.pack("<I", major << 8 | minor)
                return 0, 0, struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
            case _:
                return 0, 0, b""

    def _allocate(self, count: int) -> int:
        first = self._next
        self._next += count
        if self._next > self._blocks:
            raise TreeError(f"it does not fit a file system of {self._blocks * BLOCK} bytes")
        return first

    def _write_data(self, data: bytes) -> list[tuple[int, int, int]]:
        count = -(-len(data) // BLOCK)
        first = self._allocate(count)
        os.pwrite(self._fd, data, first * BLOCK)
        return list(_extents(0, first, count))

    def _write_parts(self, node: Node) -> list[tuple[int, int, int]]:
        """Write the content of a file without its holes; return where it is, by blocks: in the file, on the disk, how many."""
        found: list[tuple[int, int, int]] = []
        source, position = self._sources[node.source], node.offset
        reached = -1  # the last block of the file that is there
        for start, length in node.extents:
            first, last = start // BLOCK, (start + length - 1) // BLOCK
            missing = max(first, reached + 1)
            if missing <= last:
                found += _extents(missing, self._allocate(last - missing + 1), last - missing + 1)
                reached = last
            self._write_at(found, source[position : position + length], start)
            position += length
        return _joined(found)

    def _write_at(self, found: list[tuple[int, int, int]], data: bytes | memoryview, start: int) -> None:
        # A part may begin in the block in which the one before it ends, and then go on in those just allocated.
        for logical, physical, count in found[-(2 + len(data) // (_LONGEST_EXTENT * BLOCK) + 1) :]:
            low, high = max(start, logical * BLOCK), min(start + len(data), (logical + count) * BLOCK)
            for offset in range(low, high, _PIECE):
                piece = data[offset - start : min(offset + _PIECE, high) - start]
                os.pwrite(self._fd, piece, physical * BLOCK + offset - logical * BLOCK)
            if high - low > _PIECE:
                self._check_cancelled()

    def _map(self, extents: list[tuple[int, int, int]]) -> bytes:
        """Return the root of the tree of a file's extents, having written the rest of it."""
        entries = [struct.pack("<IHHI", logical, count, 0, physical) for logical, physical, count in extents]
        starts = [logical for logical, _, _ in extents]
        depth = 0
        while len(entries) > _INODE_EXTENTS:
            parts = [entries[at : at + _BLOCK_EXTENTS] for at in range(0, len(entries), _BLOCK_EXTENTS)]
            starts = starts[::_BLOCK_EXTENTS]
            blocks = [self._allocate(1) for _ in parts]
            for part, block in zip(parts, blocks, strict=True):
                os.pwrite(self._fd, _extent_node(part, _BLOCK_EXTENTS, depth), block * BLOCK)
            entries = [struct.pack("<IIHH", start, block, 0, 0) for start, block in zip(starts, blocks, strict=True)]
            depth += 1
        return _extent_node(entries, _INODE_EXTENTS, depth)

    def _directory(self, directory: Node) -> bytes:
        entries = [
            (b".", self._numbers[directory], 2),
            (b"..", self._numbers[self._parents[directory]], 2),
            *((name, self._numbers[child], _FORMATS[child.kind][1]) for name, child in directory.children.items()),
        ]
        blocks: list[bytes] = []
        block, last = bytearray(), 0
        for name, number, kind in entries:
            length = 8 + -(-len(name) // 4) * 4
            if len(block) + length > BLOCK:
                blocks.append(_closed(block, last))
                block = bytearray()
            last = len(block)
            block += struct.pack("<IHBB", number, length, len(name), kind) + name.ljust(length - 8, b"\0")
        return b"".join([*blocks, _closed(block, last)])

    def _write_xattrs(self, node: Node) -> int:
        """Write the one block of a file's attributes; return its number."""
        entries: list[tuple[int, bytes, bytes]] = []
        for name, value in node.xattrs:
            prefix, index = next(each for each in _XATTR_INDEXES if name.startswith(each[0]))
            entries.append((index, name[len(prefix) :], value))
        entries.sort(key=lambda entry: (entry[0], len(entry[1]), entry[1]))
        table, values, whole = b"", b"", 0
        for index, name, value in entries:
            padded = value.ljust(-(-len(value) // 4) * 4, b"\0")
            values = padded + values
            digest = _hash_attribute(name, padded)
            whole = (whole << 16 & _WORD) ^ whole >> 16 ^ digest
            offset = BLOCK - len(values) if value else 0
            table += struct.pack("<BBHIII", len(name), index, offset, 0, len(value), digest)
            table += name.ljust(-(-len(name) // 4) * 4, b"\0")
        head = struct.pack("<IIIII12x", _XATTR_MAGIC, 1, 1, whole, 0)
        room = BLOCK - len(head) - len(table) - len(values)
        if room < 4:
            raise TreeError("a file has more extended attributes than a file system takes")
        block = self._allocate(1)
        os.pwrite(self._fd, head + table + bytes(room) + values, block * BLOCK)
        return block

    # --- What is at the beginning ---

    def _write_metadata(self) -> None:
        last_inode = len(self._numbers) + _FIRST_INODE - 2
        free_blocks = free_inodes = 0
        directories = [0] * self._groups
        for directory in self._directories:
            directories[(self._numbers[directory] - 1) // self._inodes_per_group] += 1
        descriptors = b""
        for group in range(self._groups):
            used_blocks = min(max(self._next - group * _GROUP, 0), _GROUP)
            used_inodes = min(max(last_inode - group * self._inodes_per_group, 0), self._inodes_per_group)
            free_blocks += _GROUP - used_blocks
            free_inodes += self._inodes_per_group - used_inodes
            bitmaps = self._block_bitmaps + group, self._inode_bitmaps + group
            os.pwrite(self._fd, _bitmap(used_blocks, _GROUP), bitmaps[0] * BLOCK)
            os.pwrite(self._fd, _bitmap(used_inodes, self._inodes_per_group), bitmaps[1] * BLOCK)
            descriptors += struct.pack(
                "<IIIHHH14x",
                *bitmaps,
                self._tables + group * self._table_blocks,
                (_GROUP - used_blocks) & 0xFFFF,
                (self._inodes_per_group - used_inodes) & 0xFFFF,
                directories[group],
            )
        os.pwrite(self._fd, descriptors, self._descriptors * BLOCK)
        os.pwrite(self._fd, self._superblock(free_blocks, free_inodes), 1024)

    def _superblock(self, free_blocks: int, free_inodes: int) -> bytes:
        block = bytearray(1024)

        def put(offset: int, layout: str, *values: object) -> None:
            struct.pack_into(f"<{layout}", block, offset, *values)

        put(0x0, "IIIIIIIIIII", self._groups * self._inodes_per_group, self._blocks, 0, free_blocks, free_inodes,
            0, 2, 2, _GROUP, _GROUP, self._inodes_per_group)  # fmt: skip
        # Never mounted; no number of mounts is too much; clean; errors do not matter; no checks; Linux; revision 1.
        put(0x34, "hHHHH", 0, 0xFFFF, 0xEF53, 1, 1)
        put(0x4C, "I", 1)
        put(0x54, "IH", _FIRST_INODE, _INODE)
        put(0x5C, "III", _COMPATIBLE, _INCOMPATIBLE, _READ_ONLY)
        put(0x68, "16s", self._uuid)
        put(0xEC, "16sB", self._uuid, _HALF_MD4)
        put(0x100, "I", _USER_XATTR_AND_ACL)
        put(0x15C, "HH", _EXTRA_ISIZE, _EXTRA_ISIZE)
        put(0x160, "I", 1)  # signed hashes of names
        put(0x174, "B", 4)  # 16 groups are one for the allocator
        return bytes(block)


def _extents(logical: int, physical: int, count: int) -> Iterator[tuple[int, int, int]]:
    for at in range(0, count, _LONGEST_EXTENT):
        yield logical + at, physical + at, min(_LONGEST_EXTENT, count - at)


def _joined(extents: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Make one of what follows on each other."""
    joined: list[tuple[int, int, int]] = []
    for logical, physical, count in extents:
        if joined:
            before, at, length = joined[-1]
            if before + length == logical and at + length == physical and length + count <= _LONGEST_EXTENT:
                joined[-1] = before, at, length + count
                continue
        joined.append((logical, physical, count))
    return joined


def _extent_node(entries: Sequence[bytes], most: int, depth: int) -> bytes:
    return struct.pack("<HHHHI", 0xF30A, len(entries), most, depth, 0) + b"".join(entries)


def _closed(block: bytearray, last: int) -> bytes:
    """Have the last name of a directory's block reach to its end."""
    struct.pack_into("<H", block, last + 4, BLOCK - last)
    return bytes(block.ljust(BLOCK, b"\0"))


def _bitmap(used: int, of: int) -> bytes:
    """Return a block with the first *used* bits set, and those that stand for nothing."""
    ones = (1 << used) - 1 | ((1 << 8 * BLOCK) - (1 << of))
    return ones.to_bytes(BLOCK, "little")


def _time(nanoseconds: int) -> tuple[int, int]:
    """Return the two words of a time; what can't be said becomes the nearest that can."""
    seconds, rest = divmod(nanoseconds, 10**9)
    seconds = min(max(seconds, -(2**31)), 2**34 - 2**31 - 1)
    low = (seconds + 2**31) % 2**32 - 2**31
    return low & _WORD, rest << 2 | (seconds - low) >> 32 & 3


def _hash_attribute(name: bytes, value: bytes) -> int:
    digest = 0
    for byte in name:
        digest = (digest << 5 & _WORD) ^ digest >> 27 ^ byte
    for (word,) in struct.iter_unpack("<I", value):
        digest = (digest << 16 & _WORD) ^ digest >> 16 ^ word
    return digest
