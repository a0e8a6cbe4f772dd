"""One builder at a time for each name in a store, between processes and tasks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

#: Seconds between two tries. `flock` can only be waited for in a thread, and a thread that is stuck
#: in it can't be cancelled. Builds take tens of seconds.
_POLL_SECONDS = 0.2


@asynccontextmanager
async def open_lock(path: Path, *, on_wait: Callable[[], object]) -> AsyncGenerator[None]:
    """Hold the lock file *path* for the block, waiting until nobody else does.

    The kernel drops the lock with the process, however that ends, so no lock is ever stale. The
    file stays: if it were removed, two processes could lock two files of the same name.

    Cancelled while waiting: the lock is not held.

    Args:
      path: The file; made if it is missing.
      on_wait: Called once, if somebody else holds the lock.

    Raises:
      OSError: if the file can't be made or locked.
    """
    waiting = False
    while True:
        with try_lock(path) as held:
            if held:
                yield
                return
        if not waiting:
            waiting = True
            on_wait()
        await trio.sleep(_POLL_SECONDS)


@contextmanager
def try_lock(path: Path) -> Generator[bool]:
    """Hold the lock file *path* for the block if nobody else does; yields whether it is so.

    Raises:
      OSError: if the file can't be made or locked.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with _try_flock(fd) as held:
        if os.fstat(fd).st_mode & 0o600 != 0o600:
            os.fchmod(fd, 0o600)  # it is new, and the umask would keep us out the next time
        yield held


@contextmanager
def try_lock_directory(path: Path) -> Generator[bool]:
    """Hold the lock of the directory *path* itself for the block if nobody else does; yields whether it is so.

    Raises:
      OSError: if there is no such directory, or it can't be locked.
    """
    with _try_flock(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as held:
        yield held


@contextmanager
def _try_flock(fd: int) -> Generator[bool]:
    # Nothing that we start may inherit it: the lock would live on with the child.
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        else:
            held = True
        yield held
    finally:
        os.close(fd)
