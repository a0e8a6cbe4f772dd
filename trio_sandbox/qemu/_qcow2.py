"""qcow2 files without QEMU: what a header says, and stamping copies of a prototype overlay.

The format is QEMU's docs/interop/qcow2.txt. All numbers in it are big-endian.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import attrs

_MAGIC: Final = b"QFI\xfb"
#: Version 2's header; version 3 has more fields behind it, `header_length` among them.
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
#: Offset and length of the backing file's name.
_BACKING_FIELDS: Final = struct.Struct(">QI")
_BACKING_OFFSET: Final = 8
_HEADER_LENGTH: Final = struct.Struct(">I")
_HEADER_LENGTH_OFFSET: Final = 100
_VERSION_3_BYTES: Final = 104
_EXTENSION: Final = struct.Struct(">II")
_END_OF_EXTENSIONS: Final = 0
_BACKING_FORMAT: Final = 0xE2792ACA
#: Names of features, for error messages.
_FEATURE_NAMES: Final = 0x6803F857
#: Version 3: incompatible, compatible and autoclear features.
_FEATURES: Final = struct.Struct(">QQQ")
_FEATURES_OFFSET: Final = 72
_EXTERNAL_DATA: Final = 1 << 2
#: QEMU's own limit on the table of level 1, in bytes.
_LONGEST_L1: Final = 32 * 2**20
#: The specification's own limits: clusters of 512 bytes to 2 MiB, backing file names of 1023 bytes.
_CLUSTER_BITS: Final = range(9, 22)
_BACKING_NAME_BYTES: Final = 1023
#: Header, extensions and backing file name all lie in the first cluster, which QEMU makes 64 KiB
#: unless asked otherwise. Of larger ones nobody fills more than this.
HEAD_BYTES: Final = 64 * 2**10

#: The unit in which a stamp leaves zeros out. File systems allocate in blocks of this size.
_BLOCK: Final = 4096


class Qcow2FormatError(ValueError):
    """The bytes are not a qcow2 header, or a broken one."""


@attrs.frozen(kw_only=True)
class Qcow2Info:
    """What a qcow2 header says."""

    version: int
    """2 or 3."""
    virtual_size: int
    """The disk's size as a guest sees it, in bytes."""
    cluster_size: int
    """In bytes."""
    backing_file: str | None
    """The backing file as it is recorded: relative to the overlay's directory unless absolute."""
    backing_format: str | None
    """The backing file's recorded format; None where the overlay leaves it to a guess."""


def parse_qcow2_header(head: bytes) -> Qcow2Info:
    """Read the header at the beginning of *head*, the first 64 KiB of a file or all of it.

    Raises:
      Qcow2FormatError: if it is not a qcow2 header or contradicts itself.

    """
    if head[:4] != _MAGIC:
        raise Qcow2FormatError("not qcow2 format")
    try:
        (_, version, name_offset, name_length, cluster_bits, size, *_) = _HEADER.unpack_from(head)
        if version not in (2, 3):
            raise Qcow2FormatError(f"unknown qcow2 version {version}")
        length = _HEADER.size
        if version >= 3:
            (length,) = _HEADER_LENGTH.unpack_from(head, _HEADER_LENGTH_OFFSET)
            if length < _VERSION_3_BYTES:
                raise Qcow2FormatError(f"corrupt qcow2 header: a length of {length} bytes")
        if cluster_bits not in _CLUSTER_BITS:
            raise Qcow2FormatError(f"corrupt qcow2 header: clusters of 2**{cluster_bits} bytes")
        backing_file = None
        if name_offset:
            if name_length > _BACKING_NAME_BYTES or name_offset + name_length > len(head):
                raise Qcow2FormatError("corrupt qcow2 header: a backing file name outside the first cluster")
            backing_file = head[name_offset : name_offset + name_length].decode("utf-8", errors="surrogateescape")
        return Qcow2Info(
            version=version,
            virtual_size=size,
            cluster_size=1 << cluster_bits,
            backing_file=backing_file,
            backing_format=next(
                (
                    data.decode("ascii", errors="replace")
                    for kind, data in _extensions(head, length, name_offset or len(head))
                    if kind == _BACKING_FORMAT
                ),
                None,
            ),
        )
    except struct.error as exc:
        raise Qcow2FormatError("corrupt qcow2 header: it is truncated") from exc


def check_strangers_header(head: bytes, file_size: int) -> Qcow2Info:
    """Read a header that a stranger may have written, and refuse what no image of ours has.

    QEMU would open other files of the host's that a header names, as a backing file or as one for the data.

    Args:
      head: The first 64 KiB of the file, or all of it.
      file_size: In bytes.

    Raises:
      Qcow2FormatError: which says what is wrong.

    """
    info = parse_qcow2_header(head)
    if info.version != 3:
        raise Qcow2FormatError(f"qcow2 version {info.version}, and ours have 3")
    (*_, crypt, l1_size, l1_offset, refcount_offset, refcount_clusters, snapshots, _) = _HEADER.unpack_from(head)
    incompatible, _, autoclear = _FEATURES.unpack_from(head, _FEATURES_OFFSET)
    (length,) = _HEADER_LENGTH.unpack_from(head, _HEADER_LENGTH_OFFSET)
    kinds = {kind for kind, _ in _extensions(head, length, len(head))}
    if info.backing_file is not None:
        raise Qcow2FormatError("it names a backing file")
    if incompatible & _EXTERNAL_DATA:
        raise Qcow2FormatError("it names a file for its data")
    if (
        incompatible
        or autoclear
        or crypt
        or snapshots
        or kinds - {_BACKING_FORMAT, _FEATURE_NAMES}
        or info.cluster_size != HEAD_BYTES
    ):
        raise Qcow2FormatError("it uses features that no image of ours does")
    tables = ((l1_offset, l1_size * 8), (refcount_offset, refcount_clusters * info.cluster_size))
    if l1_size * 8 > _LONGEST_L1 or any(offset + size > file_size for offset, size in tables):
        raise Qcow2FormatError("its tables are not within the file")
    return info


def forget_backing_file(path: str | os.PathLike[str]) -> None:
    """Have the header of a qcow2 file that nobody has open name no backing file, nor any path of this machine.

    Whoever opens it has to say what it stands on. Again is no error.

    Raises:
      Qcow2FormatError: if it is not qcow2.
      OSError: if it can't be read or written.

    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        head = os.pread(fd, HEAD_BYTES, 0)
        if parse_qcow2_header(head).backing_file is not None:
            offset, length = _BACKING_FIELDS.unpack_from(head, _BACKING_OFFSET)
            os.pwrite(fd, bytes(_BACKING_FIELDS.size), _BACKING_OFFSET)
            os.pwrite(fd, bytes(length), offset)
    finally:
        os.close(fd)


def _extensions(head: bytes, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Give type and data of each header extension; they end with one of type 0 or at *end*."""
    while offset + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(head, offset)
        if kind == _END_OF_EXTENSIONS:
            return
        offset += _EXTENSION.size
        if offset + length > end:
            raise Qcow2FormatError("corrupt qcow2 header: an extension goes past its end")
        yield kind, head[offset : offset + length]
        offset += (length + 7) & ~7


@attrs.frozen
class FileIdentity:
    """What tells one file's content from another's without reading it.

    A file replaced by another of the same size within the clock's resolution has another inode.
    """

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Take it from what `os.stat` gave."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_qcow2_info(path: str | os.PathLike[str]) -> Qcow2Info:
    """Read the qcow2 header of a file or block device. Blocks for one open and one read.

    Raises:
      Qcow2FormatError: if it is not a qcow2 header or contradicts itself.
      OSError: if the file can't be read, or is neither file nor block device.

    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "Neither a regular file nor a block device", os.fspath(path))
        return parse_qcow2_header(os.pread(fd, HEAD_BYTES, 0))
    finally:
        os.close(fd)


class Qcow2InfoCache:
    """`read_qcow2_info`, remembered for as long as the file is the same.

    Args:
      limit: How many files to remember; the one used longest ago is forgotten first.

    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._known: OrderedDict[str, tuple[FileIdentity, Qcow2Info]] = OrderedDict()

    def read(self, path: str) -> tuple[FileIdentity, Qcow2Info]:
        """Give the identity of the file at *path* and what its header says; errors as `read_qcow2_info`."""
        identity = FileIdentity.of(os.stat(path))
        known = self._known.get(path)
        if known is None or known[0] != identity:
            # Replaced between the two calls, it is read again next time: the identity is the old one's.
            known = self._known[path] = identity, read_qcow2_info(path)
            if len(self._known) > self._limit:
                self._known.popitem(last=False)
        self._known.move_to_end(path)
        return known


@attrs.frozen
class Stamp:
    """A small, mostly empty file, ready to be written any number of times."""

    size: int
    """In bytes."""
    pieces: tuple[tuple[int, bytes], ...]
    """What is not zero: offset and data, in order."""

    @classmethod
    def of(cls, content: bytes) -> Stamp:
        """Make the stamp of a file's whole content."""
        pieces: list[tuple[int, bytes]] = []
        zeros = bytes(_BLOCK)
        start: int | None = None
        for offset in range(0, len(content) + 1, _BLOCK):
            block = content[offset : offset + _BLOCK]
            empty = block == zeros[: len(block)]
            if empty and start is not None:
                pieces.append((start, content[start:offset]))
                start = None
            elif not empty and start is None:
                start = offset
        if start is not None:
            pieces.append((start, content[start:]))
        return cls(len(content), tuple(pieces))

    def write(self, fd: int) -> None:
        """Write the content to an empty file; what is zero stays a hole.

        Raises:
          OSError: if the disk is full, for instance. The file is incomplete then.

        """
        for offset, data in self.pieces:
            written = os.pwrite(fd, data, offset)
            while written < len(data):  # A full disk takes what it can, then raises.
                written += os.pwrite(fd, data[written:], offset + written)
        os.ftruncate(fd, self.size)
