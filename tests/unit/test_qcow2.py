"""qcow2 headers and stamps, without QEMU."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.qemu import Qcow2FormatError, Qcow2Info, read_qcow2_info
from trio_sandbox.qemu._qcow2 import Qcow2InfoCache, Stamp, parse_qcow2_header


def header(
    *,
    version: int = 3,
    size: int = 2**30,
    cluster_bits: int = 16,
    backing_file: bytes = b"",
    backing_format: bytes = b"",
    length: int = 104,
) -> bytes:
    """Build a header as the specification lays it out."""
    extensions = b""
    if backing_format:
        extensions += struct.pack(">II", 0xE2792ACA, len(backing_format)) + backing_format
        extensions += bytes(-len(backing_format) % 8)
    extensions += struct.pack(">II", 0, 0)
    fixed = length if version == 3 else 72
    name_offset = fixed + len(extensions) if backing_file else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, name_offset, len(backing_file), cluster_bits, size, *[0] * 7
    )
    if version == 3:
        head += struct.pack(">QQQII", 0, 0, 0, 4, length)
    return head.ljust(fixed, b"\0") + extensions + backing_file


def test_version_3_with_backing_file() -> None:
    assert parse_qcow2_header(header(backing_file="/ü/b.qcow2".encode(), backing_format=b"qcow2")) == Qcow2Info(
        version=3, virtual_size=2**30, cluster_size=65536, backing_file="/ü/b.qcow2", backing_format="qcow2"
    )


def test_version_2_without_backing_file() -> None:
    assert parse_qcow2_header(header(version=2, size=512, cluster_bits=9)) == Qcow2Info(
        version=2, virtual_size=512, cluster_size=512, backing_file=None, backing_format=None
    )


def test_longer_header_of_a_later_version_3() -> None:
    info = parse_qcow2_header(header(length=112, backing_format=b"raw", backing_file=b"x"))
    assert (info.backing_format, info.backing_file) == ("raw", "x")


def test_name_that_is_not_utf_8_survives() -> None:
    backing_file = parse_qcow2_header(header(backing_file=b"/\xff")).backing_file
    assert backing_file is not None
    assert os.fsencode(backing_file) == b"/\xff"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "not qcow2 format"),
        (b"QFI", "not qcow2 format"),
        (b"\0" * 512, "not qcow2 format"),
        (b"QFI\xfb", "truncated"),
        (header()[:60], "truncated"),
        (header()[:80], "truncated"),
        (header(version=4), "unknown qcow2 version 4"),
        (header(version=1), "unknown qcow2 version 1"),
        (header(cluster_bits=8), "clusters"),
        (header(cluster_bits=22), "clusters"),
        (header(length=96), "a length of 96"),
        (header(backing_file=b"x" * 1024), "backing file name"),
        (header(backing_file=b"x" * 100)[:-1], "backing file name"),
        (header()[:104] + struct.pack(">II", 7, 2**31), "extension"),
    ],
)
def test_what_is_no_header_is_refused(head: bytes, message: str) -> None:
    with pytest.raises(Qcow2FormatError, match=message):
        parse_qcow2_header(head)


@given(st.binary(max_size=200))
def test_arbitrary_headers_are_parsed_or_refused(tail: bytes) -> None:
    for head in (b"QFI\xfb" + tail, header(backing_format=b"qcow2")[:104] + tail):
        try:
            parse_qcow2_header(head)
        except Qcow2FormatError:
            pass


def test_reading_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_qcow2_info(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        read_qcow2_info(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="Neither a regular file"):
        read_qcow2_info(tmp_path / "fifo")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        read_qcow2_info(loop)


def test_cache_notices_a_replaced_and_a_rewritten_file(tmp_path: Path) -> None:
    path, cache = tmp_path / "base", Qcow2InfoCache()
    path.write_bytes(header(size=1024))
    identity, info = cache.read(str(path))
    assert info.virtual_size == 1024
    assert cache.read(str(path)) == (identity, info)
    other = tmp_path / "other"
    other.write_bytes(header(size=2048))
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the inode differs
    other.replace(path)
    assert cache.read(str(path))[1].virtual_size == 2048
    path.write_bytes(header(size=4096))
    os.utime(path, ns=(1, 1))  # only the time differs
    assert cache.read(str(path))[1].virtual_size == 4096


def test_cache_is_bounded_and_forgets_the_oldest(tmp_path: Path) -> None:
    cache = Qcow2InfoCache(limit=2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(header())
    first = [cache.read(str(path))[1] for path in paths[:2]]
    assert cache.read(str(paths[0]))[1] is first[0]
    cache.read(str(paths[2]))
    assert cache.read(str(paths[0]))[1] is first[0]
    assert cache.read(str(paths[1]))[1] is not first[1]


BLOCKS = st.lists(st.sampled_from([b"\0" * 4096, b"\0" * 4095 + b"x", b"y" * 4096]), max_size=8)


@given(BLOCKS, st.binary(max_size=100))
def test_stamp_writes_what_it_was_made_of(blocks: list[bytes], rest: bytes) -> None:
    content = b"".join(blocks) + rest
    stamp = Stamp.of(content)
    fd = os.memfd_create("stamp")
    try:
        stamp.write(fd)
        assert os.pread(fd, len(content) + 1, 0) == content
    finally:
        os.close(fd)
    assert all(any(data[start : start + 4096]) for _, data in stamp.pieces for start in range(0, len(data), 4096))


def test_stamp_leaves_holes(tmp_path: Path) -> None:
    stamp = Stamp.of(b"a" + bytes(2**20 - 1))
    assert stamp.pieces == ((0, b"a" + bytes(4095)),)
    path = tmp_path / "file"
    with path.open("wb") as file:
        stamp.write(file.fileno())
    assert path.stat().st_size == 2**20
    assert path.stat().st_blocks * 512 < 2**16
