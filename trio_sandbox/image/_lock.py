"""One builder at a time for each entry of a store, between processes and tasks."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

#: Seconds between two tries. `flock` can't be waited for without a thread, and a thread that is
#: stuck in it can't be cancelled. Builds take tens of seconds.
_POLL_SECONDS = 0.2


@asynccontextmanager
async def open_lock(path: Path, *, on_wait: Callable[[], object]) -> AsyncGenerator[None]:
    """Hold the lock file *path* exclusively for the block.

    The kernel drops the lock with the process, however that ends, so a lock is never stale. The
    file itself stays: removing it would let two processes lock two files of the same name.

    Cancelled while waiting: the lock is not held.

    Args:
      path: The file; made if it is missing.
      on_wait: Called once, if somebody else holds the lock.

    Raises:
      OSError: if the file can't be made or locked.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        waiting = False
        while not _try_lock(fd):
            if not waiting:
                waiting = True
                on_wait()
            await trio.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True
