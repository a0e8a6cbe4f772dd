"""Service "mounts": file systems on a disk of the host's appear in the users' tree, read-only.

A record stream of JSON:

    {"mounts": [{"target": str, "offset": n, "size": n}, ...]}      where on the disk each one is, in bytes
    {"mounted": n}  or  {"failed": {"errno": n, "strerror": str, "filename": str}}, and the end

It is asked for before any other code of the sandbox runs, and again in a machine that goes on from a saved sandbox. A target is an absolute path, made where it is missing.
The kernel is told of partitions, one for each file system: a table of them on the disk would have been read, and found
missing, when the machine booted that this one goes on from.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import ExitStack
from typing import cast, final

from ...wire import ChannelStream, RecordStream
from .children import Children
from .processes import BadRequestError, failure_fields

_REQUEST_LIMIT = 2**20

# linux/blkpg.h
_BLKPG, _ADD_PARTITION = 0x1269, 1
_PARTITION = struct.Struct("qqi64s64s4x")


@final
class MountService:
    """Mounts what is on the disk.

    Args:
      children: Whose spawner lives where the users do.
      disk: The disk's device; None: there is none.

    """

    def __init__(self, children: Children, disk: str | None) -> None:
        self._children = children
        self._disk = disk
        self._parts = 0
        """Partitions of it."""

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        records = RecordStream(stream, limit=_REQUEST_LIMIT)
        message = await records.receive_json()
        if message is None:
            return
        try:
            places = _parse_places(message.get("mounts"))
            if self._disk is None:
                raise OSError(errno.ENODEV, "there is no disk to mount from here")
            with ExitStack() as stack:
                parts: list[int] = []
                for place in places:
                    self._parts += 1
                    parts.append(_open_part(self._disk, self._parts, place))
                    stack.callback(os.close, parts[-1])
                await self._children.mount([target for target, _, _ in places], parts)
        except BadRequestError as exc:
            stream.reset(str(exc))
        except OSError as exc:
            await records.send_json({"failed": failure_fields(exc)}, end=True)
        else:
            await records.send_json({"mounted": len(places)}, end=True)


def _parse_places(value: object) -> list[tuple[str, int, int]]:
    places: list[tuple[str, int, int]] = []
    for place in cast("list[object]", value) if isinstance(value, list) else [value]:
        match place:
            case {"target": str(target), "offset": int(offset), "size": int(size)} if offset >= 0 and size > 0:
                places.append((target, offset, size))
            case _:
                raise BadRequestError(f"not a place on a disk: {place!r:.80}")
    return places


def _open_part(disk: str, number: int, place: tuple[str, int, int]) -> int:
    """Make a partition and return a descriptor of its device."""
    _, offset, size = place
    partition = ctypes.create_string_buffer(_PARTITION.pack(offset, size, number, b"", b""))
    descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        request = struct.pack("iiiP", _ADD_PARTITION, 0, len(partition), ctypes.addressof(partition))
        fcntl.ioctl(descriptor, _BLKPG, request)
    finally:
        os.close(descriptor)
    return os.open(f"{disk}{number}", os.O_RDONLY | os.O_CLOEXEC)
