"""Archives (tar) of hostile origin: bytes in, entries out. No file is opened here, and nothing is written.

Formats: v7, ustar, GNU and PAX, with long names, large numbers, extended attributes and sparse files of all four kinds. The library's
own `tarfile` takes a damaged header for the end, and reads headers of any length into memory.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Final, final

import attrs

_BLOCK: Final = 512
#: Bytes of what extends a header. Paths have 4096, and all extended attributes of a file have to fit one block of its file system.
_LONGEST_EXTENSION: Final = 1 << 20
#: Parts of one sparse file.
_MOST_PARTS: Final = 100_000
_MOST_XATTRS: Final = 100
#: Headers that describe no entry by themselves: so many for each entry, and so many more in all.
_HEADERS_PER_ENTRY, _SPARE_HEADERS = 4, 10_000
_MAXIMUM_ID: Final = 2**32 - 2
_DECIMAL: Final = re.compile(rb"[0-9]{1,19}")
_SECONDS: Final = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?")
_XATTR: Final = b"SCHILY.xattr."
_SPARSE: Final = b"GNU.sparse."
_ZEROS: Final = bytes(_BLOCK)

Extents = tuple[tuple[int, int], ...]


class TarError(Exception):
    """The archive is damaged, or has what no archive of an image has."""


class Kind(enum.Enum):
    """What an entry is."""

    FILE = enum.auto()
    HARD_LINK = enum.auto()
    SYMLINK = enum.auto()
    CHARACTER_DEVICE = enum.auto()
    BLOCK_DEVICE = enum.auto()
    DIRECTORY = enum.auto()
    FIFO = enum.auto()


_KINDS: Final = {
    b"\0": Kind.FILE,
    b"0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


@final
@attrs.frozen
class TarEntry:
    """One entry, as the archive says; nothing of it was judged but that it can be."""

    path: bytes
    kind: Kind
    mode: int
    """Permission bits, with those of set-user-id, set-group-id and sticky."""
    uid: int
    gid: int
    mtime: int
    """In nanoseconds."""
    target: bytes = b""
    """What a link leads to."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number."""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    size: int = 0
    """Of a file, its holes included."""
    offset: int = 0
    """Where in the archive the content of a file begins."""
    extents: Extents = ()
    """Where in the file it belongs, part for part: offset and length."""


def read_entries(archive: bytes | memoryview) -> Iterator[TarEntry]:
    """Give the entries of an archive, in order.

    Raises:
      TarError: as soon as something is met that can't be read.

    """
    offset = extended = 0
    headers_left = _SPARE_HEADERS
    records: dict[bytes, bytes] = {}
    parts: list[tuple[int, int]] = []
    while header := bytes(archive[offset : offset + _BLOCK]):
        if header == _ZEROS:
            break
        if len(header) < _BLOCK:
            raise TarError("it ends within a header")
        _check_sum(header)
        offset += _BLOCK
        kind, size = header[156:157], _number(header[124:136])
        headers_left += _HEADERS_PER_ENTRY if kind in _KINDS else -1
        if headers_left < 0:
            raise TarError("it has more headers that are about entries than entries")
        if kind == b"g":  # for all that follows; other programs that take images apart leave it out, too
            offset += -(-size // _BLOCK) * _BLOCK
            continue
        if kind in (b"x", b"L", b"K"):
            extended += size
            if extended > _LONGEST_EXTENSION:
                raise TarError(f"a header has extensions of {extended} bytes")
            extension = _content(archive, offset, size)
            offset += -(-size // _BLOCK) * _BLOCK
            match kind:
                case b"x":
                    _read_records(extension, records, parts)
                case b"L":
                    records.setdefault(b"path", extension.partition(b"\0")[0])
                case _:
                    records.setdefault(b"linkpath", extension.partition(b"\0")[0])
            continue
        if kind not in _KINDS:
            raise TarError(f"an entry is of the kind {kind!r}, which nobody knows")
        entry, offset = _read_entry(archive, header, offset, size, records, parts)
        yield entry
        records, parts, extended = {}, [], 0
    if records:
        raise TarError("it ends before the entry that a header is for")


def _read_entry(
    archive: bytes | memoryview,
    header: bytes,
    offset: int,
    size: int,
    records: dict[bytes, bytes],
    parts: list[tuple[int, int]],
) -> tuple[TarEntry, int]:
    kind = _KINDS[header[156:157]]
    path = records.get(_SPARSE + b"name") or records.get(b"path") or _name(header)
    if header[156:157] in b"\0\x30" and path.endswith(b"/"):
        kind = Kind.DIRECTORY  # as archives were before there was a letter for them
    if b"size" in records:
        size = _decimal(records[b"size"])
    if kind is not Kind.FILE:
        size = 0
    extents: Extents = ()
    whole, end = size, offset
    if kind is Kind.FILE:
        whole, extents, offset, stored, end = _read_extents(archive, header, offset, size, records, parts)
        if offset + stored > len(archive):
            raise TarError("it ends within a file")
    is_device = kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE)
    xattrs = [(name[len(_XATTR) :], value) for name, value in records.items() if name.startswith(_XATTR)]
    if len(xattrs) > _MOST_XATTRS:
        raise TarError(f"an entry has {len(xattrs)} extended attributes")
    entry = TarEntry(
        path=path,
        kind=kind,
        mode=_number(header[100:108]) & 0o7777,
        uid=_id(records.get(b"uid"), header[108:116]),
        gid=_id(records.get(b"gid"), header[116:124]),
        mtime=_time(records[b"mtime"]) if b"mtime" in records else _number(header[136:148], signed=True) * 10**9,
        target=(records.get(b"linkpath") or _text(header[157:257])) if kind in (Kind.SYMLINK, Kind.HARD_LINK) else b"",
        device=(_number(header[329:337]), _number(header[337:345])) if is_device else (0, 0),
        xattrs=tuple(xattrs),
        size=whole,
        offset=offset,
        extents=extents,
    )
    return entry, end


def _read_extents(
    archive: bytes | memoryview,
    header: bytes,
    offset: int,
    size: int,
    records: dict[bytes, bytes],
    parts: list[tuple[int, int]],
) -> tuple[int, Extents, int, int, int]:
    """Return a file's size, its parts, where the first begins, what all of them take, and where the next header is."""
    end = offset + -(-size // _BLOCK) * _BLOCK
    if header[156:157] == b"S":
        whole, parts, start = _read_old_map(archive, header, offset)
        end += start - offset
        offset, stored = start, size
    elif records.get(_SPARSE + b"major") == b"1":
        whole = _decimal(records.get(_SPARSE + b"realsize", b""))
        parts, start = _read_map(archive, offset, size)
        stored = size - (start - offset)
        offset = start
    elif _SPARSE + b"size" in records:
        whole, stored = _decimal(records[_SPARSE + b"size"]), size
        if _SPARSE + b"map" in records:
            numbers = [_decimal(each) for each in records[_SPARSE + b"map"].split(b",")]
            if len(numbers) % 2:
                raise TarError("the map of a sparse file is damaged")
            parts = list(zip(numbers[::2], numbers[1::2], strict=True))
    else:
        return size, ((0, size),) if size else (), offset, size, end
    reached = 0
    for start, length in parts:
        if start < reached or start + length > whole:
            raise TarError("the parts of a sparse file are not in order")
        reached = start + length
    if sum(length for _, length in parts) != stored:
        raise TarError("the parts of a sparse file are not what the archive has of it")
    return whole, tuple(part for part in parts if part[1]), offset, stored, end


def _read_old_map(archive: bytes | memoryview, header: bytes, offset: int) -> tuple[int, list[tuple[int, int]], int]:
    """Read GNU's own map of a sparse file: in the header, and in blocks behind it."""
    parts: list[tuple[int, int]] = []
    whole, block, start, count, more = _number(header[483:495]), header, 386, 4, header[482]
    while True:
        for number in range(count):
            field = block[start + 24 * number : start + 24 * number + 24]
            if not field.strip(b"\0 "):
                break
            parts.append((_number(field[:12]), _number(field[12:])))
        if not more:
            return whole, parts, offset
        if len(parts) > _MOST_PARTS:
            raise TarError(f"a sparse file has more than {_MOST_PARTS} parts")
        block = _content(archive, offset, _BLOCK)
        offset += _BLOCK
        start, count, more = 0, 21, block[504]


def _read_map(archive: bytes | memoryview, offset: int, size: int) -> tuple[list[tuple[int, int]], int]:
    """Read the map of a sparse file at the beginning of its content: lines of numbers."""
    text = bytes(archive[offset : offset + min(size, _LONGEST_EXTENSION)])
    position = 0

    def number() -> int:
        nonlocal position
        end = text.find(b"\n", position, position + 20)
        if end < 0:
            raise TarError("the map of a sparse file is damaged")
        value, position = _decimal(text[position:end]), end + 1
        return value

    count = number()
    if count > _MOST_PARTS:
        raise TarError(f"a sparse file has more than {_MOST_PARTS} parts")
    parts = [(number(), number()) for _ in range(count)]
    return parts, offset + -(-position // _BLOCK) * _BLOCK


def _read_records(text: bytes, records: dict[bytes, bytes], parts: list[tuple[int, int]]) -> None:
    """Read the records of a PAX header: length, key and value, each length counting itself."""
    position, part = 0, 0
    while position < len(text) and text[position]:
        space = text.find(b" ", position, position + 20)
        length = _decimal(text[position : max(space, position)])
        record = text[space + 1 : position + length]
        key, has_value, value = record.partition(b"=")
        if position + length > len(text) or not record.endswith(b"\n") or not has_value:
            raise TarError("a PAX header is damaged")
        position += length
        value = value[:-1]
        if key == _SPARSE + b"offset":
            part = _decimal(value)
        elif key == _SPARSE + b"numbytes":
            parts.append((part, _decimal(value)))
        elif value:
            records[key] = value
        else:
            records.pop(key, None)


def _content(archive: bytes | memoryview, offset: int, size: int) -> bytes:
    content = bytes(archive[offset : offset + size])
    if len(content) < size:
        raise TarError("it ends within a header")
    return content


def _check_sum(header: bytes) -> None:
    wanted = _number(header[148:156])
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    # Some old programs have added signed bytes.
    if found != wanted and found - 256 * sum(byte > 127 for byte in header[:148] + header[156:]) != wanted:
        raise TarError("a header is damaged: its checksum is another one")


def _name(header: bytes) -> bytes:
    name, prefix = _text(header[:100]), b""
    if header[257:263] == b"ustar\0":  # GNU's has times where the prefix would be
        prefix = _text(header[345:500])
    return b"%b/%b" % (prefix, name) if prefix else name


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, *, signed: bool = False) -> int:
    """Read a number of a header: octal digits, or binary where they would not do."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field, "big")
        value -= 0 if field[0] == 0xFF else 0x80 << 8 * (len(field) - 1)
    else:
        digits = field.strip(b"\0 ").partition(b"\0")[0].strip()
        try:
            value = int(digits or b"0", 8)
        except ValueError:
            raise TarError(f"{field!r} is no number") from None
    if not -(2**63) <= value < 2**63 or (value < 0 and not signed):
        raise TarError(f"{value} is no number of a header")
    return value


def _decimal(text: bytes) -> int:
    if not _DECIMAL.fullmatch(text) or int(text) >= 2**63:
        raise TarError(f"{text[:40]!r} is no number")
    return int(text)


def _id(record: bytes | None, field: bytes) -> int:
    value = _number(field) if record is None else _decimal(record)
    if value > _MAXIMUM_ID:
        raise TarError(f"{value} is no number of a user or a group")
    return value


def _time(text: bytes) -> int:
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise TarError(f"{text[:40]!r} is no time")
    value = int(match[2]) * 10**9 + int((match[3] or b"")[:9].ljust(9, b"0"))
    return -value if match[1] else value
