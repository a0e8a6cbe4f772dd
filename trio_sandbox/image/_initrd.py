"""The initial RAM disk: a "newc" cpio archive, made from values."""

from __future__ import annotations

import stat
from collections.abc import Iterable

import attrs

_HEADER_FIELDS = 13
_ALIGNMENT = 4


@attrs.frozen
class InitrdEntry:
    """One directory or file of the archive."""

    path: str
    """Relative to the root, without a leading slash."""
    data: bytes | None = None
    """The file's content; None makes a directory."""
    executable: bool = False


def encode_initrd(entries: Iterable[InitrdEntry]) -> bytes:
    """Return the cpio archive of *entries*, which must name a directory before what is in it.

    Everything belongs to root, and no time is kept: equal entries give equal bytes.

    Source: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``.

    """
    archive = bytearray()
    inode = 0
    for inode, entry in enumerate(entries, 1):
        kind = stat.S_IFDIR if entry.data is None else stat.S_IFREG
        mode = kind | (0o755 if entry.data is None or entry.executable else 0o644)
        _append(archive, entry.path, inode, mode, entry.data or b"")
    _append(archive, "TRAILER!!!", inode + 1, 0, b"")
    return bytes(archive)


def _append(archive: bytearray, path: str, inode: int, mode: int, data: bytes) -> None:
    name = path.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, 4 device numbers, length of the name, checksum
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    assert len(fields) == _HEADER_FIELDS
    archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    archive += bytes(-len(archive) % _ALIGNMENT)
    archive += data
    archive += bytes(-len(archive) % _ALIGNMENT)
