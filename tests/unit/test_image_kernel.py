"""Kernel files and initial RAM disks as values."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.image._initrd import InitrdEntry, encode_initrd
from trio_sandbox.image._kernel import decompress_lz4_legacy, extract_vmlinux

VMLINUX = b"\x7fELF" + bytes(range(256)) * 64
LZ4_MAGIC = b"\x02!L\x18"


def bzimage(payload: bytes, *, setup_sectors: int = 1) -> bytes:
    """Wrap a compressed kernel as the kernel's build does."""
    header = bytearray((setup_sectors + 1) * 512)
    header[0x1F1] = setup_sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<I", header, 0x248, 64)
    struct.pack_into("<I", header, 0x24C, len(payload) + 4)
    return bytes(header) + bytes(64) + payload + struct.pack("<I", len(VMLINUX)) + b"more"


def lz4(*blocks: bytes) -> bytes:
    return LZ4_MAGIC + b"".join(len(block).to_bytes(4, "little") + block for block in blocks)


def literals(data: bytes) -> bytes:
    """Make an LZ4 block of literals alone."""
    if len(data) < 15:
        return bytes([len(data) << 4]) + data
    full, rest = divmod(len(data) - 15, 255)
    return b"\xf0" + b"\xff" * full + bytes([rest]) + data


COMPRESSED = {
    "gzip": gzip.compress(VMLINUX),
    "xz": lzma.compress(VMLINUX),
    "lzma": lzma.compress(VMLINUX, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress(VMLINUX),
    "lz4": lz4(literals(VMLINUX)),
}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("setup_sectors", [1, 27])
def test_the_kernel_comes_out_whole(kind: str, setup_sectors: int) -> None:
    assert extract_vmlinux(bzimage(COMPRESSED[kind], setup_sectors=setup_sectors)) == VMLINUX


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "not an x86 kernel"),
        (b"\x7fELF" + bytes(4096), "not an x86 kernel"),
        (bzimage(gzip.compress(VMLINUX))[:1200], "cut short"),
        (bzimage(gzip.compress(VMLINUX)[:100]), "damaged"),
        (bzimage(b"\xfd7zXZ\0" + bytes(100)), "damaged"),
        (bzimage(b"\x28\xb5\x2f\xfd zstd"), "unknown way: 28b52ffd"),
        (bzimage(gzip.compress(b"MZ" + bytes(100))), "no ELF file"),
    ],
)
def test_what_is_no_kernel_is_refused(damaged: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_vmlinux(damaged)


def test_lz4_matches_may_overlap_what_they_make() -> None:
    # Literal "ab", then 9 bytes from 2 back; literal "c", then 20 bytes from 1 back; then "!".
    block = b"\x25ab\x02\x00" + b"\x1fc\x01\x00\x01" + b"\x10!"
    assert decompress_lz4_legacy(lz4(block)) == b"ab" + b"ababababa" + b"c" * 21 + b"!"


@given(st.lists(st.binary(max_size=600), max_size=4))
def test_lz4_blocks_follow_each_other(pieces: list[bytes]) -> None:
    assert decompress_lz4_legacy(lz4(*map(literals, pieces))) == b"".join(pieces)


@given(st.binary(max_size=200))
def test_arbitrary_lz4_is_data_or_an_error(data: bytes) -> None:
    try:
        decompress_lz4_legacy(lz4(data))
    except ValueError:
        pass


@pytest.mark.parametrize("block", [b"", b"\x50abc", b"\x10a\x00\x00\x00", b"\x10a\x05\x00\x00", b"\xf0\xff"])
def test_damaged_lz4_is_refused(block: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        decompress_lz4_legacy(lz4(block))


def test_lz4_that_is_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="cut short"):
        decompress_lz4_legacy(lz4(literals(b"abc"))[:-1])


def decode(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Read a newc archive, as the kernel does."""
    entries: list[tuple[str, int, bytes]] = []
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[position + 110 : position + 110 + name_size]
        assert name.endswith(b"\0")
        start = (position + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            return entries
        entries.append((name[:-1].decode(), mode, archive[start : start + size]))
        position = (start + size + 3) & ~3


@given(st.lists(st.tuples(st.text("abc/", min_size=1), st.none() | st.binary(max_size=9), st.booleans())))
def test_an_initrd_is_what_was_put_in(entries: list[tuple[str, bytes | None, bool]]) -> None:
    archive = encode_initrd([InitrdEntry(*entry) for entry in entries])
    assert len(archive) % 4 == 0
    assert decode(archive) == [
        (path, 0o040755 if data is None else 0o100755 if executable else 0o100644, data or b"")
        for path, data, executable in entries
    ]
