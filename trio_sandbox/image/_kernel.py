"""Taking the kernel proper out of an x86 kernel file: pure functions.

QEMU starts an uncompressed kernel through its PVH entry. The guest then has nothing to unpack,
which under software emulation takes a good part of a second.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

# The boot protocol's header. Source: the kernel's ``Documentation/arch/x86/boot.rst``.
_MAGIC_OFFSET, _MAGIC = 0x202, b"HdrS"
_SETUP_SECTORS_OFFSET, _DEFAULT_SETUP_SECTORS, _SECTOR = 0x1F1, 4, 512
_PAYLOAD_OFFSET, _PAYLOAD_LENGTH = 0x248, 0x24C
#: The payload's last bytes are its uncompressed size, and no part of the compressed stream.
_SIZE_BYTES = 4
_ELF = b"\x7fELF"
_LZ4_LEGACY = b"\x02!L\x18"
#: No kernel is larger. What claims to be is damaged.
_MAXIMUM_BYTES = 2**29


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Return the ELF file that *bzimage* has compressed inside.

    Raises:
      ValueError: if *bzimage* is no x86 kernel, is damaged, or is compressed in a way that Python
        before 3.14 can't undo (zstd).
    """
    payload = _payload(bzimage)
    try:
        if payload.startswith(b"\x1f\x8b"):
            vmlinux = gzip.decompress(payload)
        elif payload.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
            vmlinux = lzma.LZMADecompressor().decompress(payload, _MAXIMUM_BYTES)
        elif payload.startswith(b"BZh"):
            vmlinux = bz2.decompress(payload)
        elif payload.startswith(_LZ4_LEGACY):
            vmlinux = decompress_lz4_legacy(payload)
        else:
            raise ValueError(f"the kernel is compressed in an unknown way: {payload[:6].hex()}")
    except (EOFError, OSError, lzma.LZMAError) as exc:
        raise ValueError(f"the kernel file is damaged: {exc}") from exc
    if not vmlinux.startswith(_ELF):
        raise ValueError("what the kernel file has inside is no ELF file")
    return vmlinux


def _payload(bzimage: bytes) -> bytes:
    if bzimage[_MAGIC_OFFSET : _MAGIC_OFFSET + len(_MAGIC)] != _MAGIC or len(bzimage) < _PAYLOAD_LENGTH + 4:
        raise ValueError("not an x86 kernel file")
    start: int
    length: int
    (start,) = struct.unpack_from("<I", bzimage, _PAYLOAD_OFFSET)
    (length,) = struct.unpack_from("<I", bzimage, _PAYLOAD_LENGTH)
    start += ((bzimage[_SETUP_SECTORS_OFFSET] or _DEFAULT_SETUP_SECTORS) + 1) * _SECTOR
    if start + length > len(bzimage):
        raise ValueError("the kernel file is cut short")
    return bzimage[start : start + length - _SIZE_BYTES]


def decompress_lz4_legacy(data: bytes) -> bytes:
    """Return what *data*, in LZ4's "legacy" frame format, stands for.

    It is the format that the kernel's build uses, and the standard library has no LZ4.

    Raises:
      ValueError: if *data* is damaged.

    Source: LZ4's ``doc/lz4_Frame_format.md`` and ``doc/lz4_Block_format.md``.

    """
    result = bytearray()
    position = len(_LZ4_LEGACY)
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if position + size > len(data):
            raise ValueError("the LZ4 data is cut short")
        try:
            result += _decompress_lz4_block(data[position : position + size])
        except IndexError as exc:
            raise ValueError("the LZ4 data is damaged") from exc
        if len(result) > _MAXIMUM_BYTES:
            raise ValueError("the LZ4 data unpacks to far too much")
        position += size
    return bytes(result)


def _decompress_lz4_block(block: bytes) -> bytearray:
    result = bytearray()
    position = 0
    while True:
        token = block[position]
        literals, position = _length(block, position + 1, token >> 4)
        if position + literals > len(block):
            raise IndexError("literals past the end")
        result += block[position : position + literals]
        position += literals
        if position == len(block):
            return result
        distance = block[position] | block[position + 1] << 8
        matched, position = _length(block, position + 2, token & 15)
        matched += 4
        start = len(result) - distance
        if distance == 0 or start < 0:
            raise IndexError("a match before the beginning")
        if distance >= matched:
            result += result[start : start + matched]
        else:  # the match overlaps what it produces: a pattern, repeated
            result += (bytes(result[start:]) * (matched // distance + 1))[:matched]


def _length(block: bytes, position: int, length: int) -> tuple[int, int]:
    """Return a length whose four bits in the token are *length*, and the position behind it."""
    if length == 15:
        while True:
            byte = block[position]
            position += 1
            length += byte
            if byte != 255:
                break
    return length, position
