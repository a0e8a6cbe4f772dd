"""A disk so small that tests can fill it: a tmpfs that nobody but they see, and that is gone with them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

#: Makes a mount namespace, and mounts there. An ordinary user needs a user namespace around it.
_WAYS: Final = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
_MOUNT: Final = 'mount -t tmpfs -o size="$1",mode=0700 tmpfs "$2" && echo mounted && read -r _'


@contextmanager
def small_disk(mount_point: Path, size: int) -> Generator[Path]:
    """Yield a directory on an empty disk of *size* bytes; *mount_point* is an empty directory.

    Raises:
      RuntimeError: if the host allows neither root nor an ordinary user to mount one. A test that needs a full disk
        fails then: where it was not run, nobody knows whether it would pass.

    """
    said: list[str] = []
    for way in _WAYS:
        command = [*way, "sh", "-c", _MOUNT, "sh", str(size), str(mount_point)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                if process.stdout.readline():
                    # It is in the namespace of that process, through which we get at it.
                    yield Path(f"/proc/{process.pid}/root{mount_point}")
                    return
                said.append(f"{' '.join(way)}: {process.stderr.read().strip()}")
            finally:
                process.stdin.close()
    raise RuntimeError(f"no small disk can be mounted for this test, which needs one: {'; '.join(said)}")


@contextmanager
def filled(directory: Path, *, leave: int = 0) -> Generator[None]:
    """Fill the small disk that *directory* is on for the block, but for *leave* bytes."""
    filler = directory / "filler"
    with open(filler, "xb") as file:
        status = os.statvfs(directory)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)
    try:
        yield
    finally:
        filler.unlink()
