"""Archives of images as bytes: what is in one, and what a stranger may not put there. And headers of a stranger's disk."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests._parsers import STRANGERS_DISK, make_archive
from trio_sandbox.image._archive import read_archive
from trio_sandbox.qemu import Qcow2FormatError, check_strangers_header, forget_backing_file, read_qcow2_info

from .test_qcow2 import header


def read(data: bytes) -> object:
    return read_archive(io.BytesIO(data))


def members(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        found: list[tuple[tarfile.TarInfo, bytes]] = []
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found.append((member, file.read()))
        return found


def packed(parts: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Make an archive of *parts*, each as long as its data unless it says otherwise."""
    result = b""
    for member, data in parts:
        result += member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    return result + bytes(1024)


def test_an_archive_is_a_tar_file_with_an_index_in_front() -> None:
    data = make_archive()
    assert [member.name for member, _ in members(data)] == [
        "index.json",
        "0/image.qcow2",
        "1/image.qcow2",
        f"locks/pylock-{'a' * 32}",
    ]
    archive = read_archive(io.BytesIO(data))
    assert [layer.manifest.name for layer in archive.layers] == ["python", "python+" + "2" * 12]
    assert archive.locks == {f"pylock-{'a' * 32}": "a lock"}
    for layer in archive.layers:
        assert data[layer.offset : layer.offset + layer.size] == STRANGERS_DISK
    # tar pads a file to a record, which is all that may follow.
    read(data + bytes(-len(data) % 10240))


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 3000, -1, -512, -1024, -1025])
def test_half_an_archive_is_none(size: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        read(make_archive()[:size])


@pytest.mark.parametrize("tail", [b"x", bytes(10241), bytes(512) + b"x"])
def test_nothing_comes_behind_its_end(tail: bytes) -> None:
    with pytest.raises(ValueError, match="behind its end"):
        read(make_archive() + tail)


HOSTILE: dict[str, dict[str, object]] = {
    "a path for a name": {"name": "../../../etc"},
    "an absolute path": {"name": "/etc"},
    "a name with an escape": {"name": "python+\x1b[2J"},
    "a long name": {"name": "p" * 101},
    "a digest that is a path": {"digest": "/../x"},
    "no digest": {"digest": "ab"},
    "another layer below": {"below": {"name": "python", "content": "0" * 64}},
    "nothing below": {"below": {}},
    "an escape in a step": {"step": "packages \x1b]0;x\x07"},
    "lines in a step": {"step": "packages\nidna"},
    "a step that is no text": {"step": ["x"]},
    "an option for uv": {"packages": {"idna": "3.10\n--index-url https://example.org"}},
    "an option for uv as a name": {"packages": {"--find-links x": "3.10"}},
    "a package at a place": {"packages": {"idna": "3.10 @ file:///etc/passwd"}},
    "a version that is no text": {"packages": {"idna": 3}},
    "no size": {"virtual_size": "1"},
    "a lock that is a path": {"pylock": "../../x"},
    "nested deep": {"below": {"name": "python", "content": "x", "more": json.loads("[" * 400 + "]" * 400)}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_that_says_what_it_must_not_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"it |python\+2") as caught:
        read(make_archive(**changes))
    assert str(caught.value).isprintable()


def test_the_index_is_of_this_format_and_bounded() -> None:
    (index, text), *rest = members(make_archive())
    value = json.loads(text)

    def with_index(changed: object) -> bytes:
        data = json.dumps(changed).encode()
        index.size = len(data)
        return packed([(index, data), *rest])

    read(with_index(value))
    cases: list[tuple[Any, str]] = [
        ({**value, "format": 2}, "format"),
        ({**value, "layers": value["layers"] * 65}, "at most 128"),
        ({**value, "layers": []}, "no layers"),
        ({**value, "layers": value["layers"][1:]}, "does not stand on"),
        ({**value, "layers": [value["layers"][0], {**value["layers"][1], "files": {}}]}, "other files than"),
        ({**value, "locks": ["pylock-" + "b" * 32]}, "a lock that no layer needs"),
        ({**value, "locks": value["locks"] * 2}, "a lock that no layer needs"),
        ([], "an object was expected"),
    ]
    for changed, why in cases:
        with pytest.raises(ValueError, match=why):
            read(with_index(changed))


def test_members_are_plain_files_of_the_names_and_sizes_that_the_index_says() -> None:
    parts = members(make_archive())

    def with_disk(**changes: object) -> bytes:
        disk = tarfile.TarInfo("0/image.qcow2")
        disk.size = len(STRANGERS_DISK)
        for name, value in changes.items():
            setattr(disk, name, value)
        return packed([parts[0], (disk, parts[1][1]), *parts[2:]])

    read(with_disk())
    for changes in (
        {"name": "../image.qcow2"},
        {"name": "1/image.qcow2"},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0},
        {"type": tarfile.LNKTYPE, "linkname": "index.json"},
        {"type": tarfile.CHRTYPE},
        {"type": tarfile.DIRTYPE},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"type": tarfile.GNUTYPE_LONGNAME},
        {"type": tarfile.XHDTYPE},
        {"size": len(STRANGERS_DISK) + 1},
        {"size": 2**62},
        {"size": -1},
    ):
        with pytest.raises(ValueError, match=r"should be|plain file"):
            read(with_disk(**changes))
    # More bytes than any index has are not read.
    index = tarfile.TarInfo("index.json")
    index.size = 2**40
    with pytest.raises(ValueError, match="more than"):
        read(index.tobuf(tarfile.GNU_FORMAT) + b"{}")


def head(*, at: int = 0, value: bytes = b"", extension: int | None = None) -> bytes:
    """Give the header of a disk that may come from anywhere, but for what is changed."""
    changed = bytearray(STRANGERS_DISK)
    changed[at : at + len(value)] = value
    if extension is not None:
        changed[104:112] = struct.pack(">II", extension, 5)
    return bytes(changed)


FOREIGN = {
    "a backing file": (header(backing_file=b"/etc/shadow", backing_format=b"raw"), "backing file"),
    "a backing file without a name": (head(at=8, value=(200).to_bytes(8, "big")), "backing file"),
    "version 2": (header(version=2), "version 2"),
    "a file for the data": (head(at=72, value=(4).to_bytes(8, "big")), "a file for its data"),
    "the name of one": (head(extension=0x44415441), "features"),
    "another compression": (head(at=72, value=(8).to_bytes(8, "big")), "features"),
    "marked as damaged": (head(at=72, value=(2).to_bytes(8, "big")), "features"),
    "unknown features": (head(at=72, value=(2**63).to_bytes(8, "big")), "features"),
    "bitmaps": (head(at=88, value=(1).to_bytes(8, "big")), "features"),
    "encrypted": (head(at=32, value=(2).to_bytes(4, "big")), "features"),
    "a header of encryption": (head(extension=0x0537BE77), "features"),
    "snapshots": (head(at=60, value=(1).to_bytes(4, "big")), "features"),
    "large clusters": (head(at=20, value=(21).to_bytes(4, "big")), "features"),
    "a huge table": (head(at=36, value=(2**31).to_bytes(4, "big")), "tables"),
    "a table elsewhere": (head(at=40, value=(2**63).to_bytes(8, "big")), "tables"),
    "references elsewhere": (head(at=48, value=(2**40).to_bytes(8, "big")), "tables"),
    "no disk": (b"#!/bin/sh", "not qcow2"),
}


@pytest.mark.parametrize(("data", "why"), FOREIGN.values(), ids=FOREIGN)
def test_a_disk_that_names_other_files_or_is_not_like_ours_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Qcow2FormatError, match=why):
        check_strangers_header(data, 2**18)


def test_a_disk_like_ours_is_taken() -> None:
    assert check_strangers_header(STRANGERS_DISK, 2**17).virtual_size == 2**30
    with pytest.raises(Qcow2FormatError, match="tables"):
        check_strangers_header(STRANGERS_DISK, 2**17 - 1)


def test_a_layer_forgets_where_the_disk_below_was(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    content = header(backing_file=b"/home/alice/image.qcow2", backing_format=b"qcow2") + b"rest"
    disk.write_bytes(content)
    for _ in range(2):
        forget_backing_file(disk)
        assert read_qcow2_info(disk).backing_file is None
        assert b"alice" not in disk.read_bytes()
        assert len(disk.read_bytes()) == len(content)
        assert disk.read_bytes().endswith(b"rest")
    link = tmp_path / "link"
    link.symlink_to(disk)
    with pytest.raises(OSError, match="symbolic links"):
        forget_backing_file(link)
