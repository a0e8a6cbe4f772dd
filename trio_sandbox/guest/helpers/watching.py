"""Changes in a directory, or of a file, as the kernel reports them (inotify). Stdlib only."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Callable, Generator
from io import FileIO

from ..trees import BATCH, record

_EVENT = struct.Struct("iIII")
#: What is watched for, by inotify(7)'s numbers: MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF.
_WATCHED = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
_IN_IGNORED = 0x8000
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def watch(path: str, listener: int, when_watched: Callable[[], None]) -> Generator[bytes]:
    """Yield changes as records "W mask name", until there can be no more of them, or *listener* has something to read.

    Args:
      path: What to watch.
      listener: The descriptor by which the end is told.
      when_watched: Called when nothing is missed any more.

    Raises:
      OSError: as inotify_add_watch(2).

    """
    descriptor = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with FileIO(descriptor) as inotify:
        if _libc.inotify_add_watch(descriptor, os.fsencode(path), ctypes.c_uint32(_WATCHED)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        when_watched()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(listener, select.POLLIN)
        gone = False
        while not gone:
            if listener in dict(poll.poll()):
                return
            data = inotify.read(BATCH) or b""
            records: list[bytes] = []
            position = 0
            while position < len(data):
                _, mask, _, length = _EVENT.unpack_from(data, position)
                position += _EVENT.size
                name = data[position : position + length].rstrip(b"\0")
                position += length
                gone = gone or bool(mask & _IN_IGNORED)
                records.append(record(b"W", b"%d\0%s" % (mask, name)))
            yield b"".join(records)
