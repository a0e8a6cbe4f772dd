"""Files for QEMU to read, opened where nobody can write to them.

What a process has open it can open anew by its ``/proc/self/fd``: for writing, if its user may write to the file, or owns it and changes its mode first.
Root's QEMU runs as a user who may do neither. An ordinary user's QEMU has that user's own id, and could so write to images, layers and templates that
it was given for reading. So it gets them open in a mount namespace in which their file systems are read-only: that goes with the descriptor, and binds the
files' owner, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final

from .._errors import SandboxError
from ._jail import READY, make_namespace
from ._process import require_program

#: $@ are mount points, each with the options that it has: an ordinary user may add one, and take none away.
_MAKE: Final = f"""
set -e
while [ -n "$1" ]; do mount -o "remount,$2,ro" "$1"; shift 2; done
echo {READY}
exec sleep 60
"""
_OPTIONS: Final = {"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "nosymfollow"}


@final
class ReadOnlyView:
    """Opens files for reading. Without a namespace as everybody does.

    Args:
      root: A descriptor of the root directory of a namespace in which nobody can write to them.

    """

    def __init__(self, root: int | None = None) -> None:
        self._root = root

    def open(self, path: Path) -> int:
        """Return a descriptor of *path*, which no child process inherits unless told to. Raises `OSError`."""
        if self._root is None:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Links may be absolute, and would lead out of the namespace.
        return os.open(os.path.realpath(path)[1:], os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root)


@asynccontextmanager
async def open_read_only_view(
    directories: Iterable[Path], environment: Mapping[str, str]
) -> AsyncGenerator[ReadOnlyView]:
    """Make a view for a block, as an ordinary user, in which *directories* are read-only, whether they exist yet or not.

    What is opened in it stays read-only after the block.

    Raises:
      SandboxError: if it can't be made here; the message says why.
      MissingProgramError: if util-linux is not installed.

    """
    real = _resolve(directories)
    command = [require_program("unshare"), "--user", "--map-root-user", "--mount", "--", "/bin/sh", "-c", _MAKE, "sh"]
    for place, options in find_mounts(_read_mounts(), real).items():
        command += [os.fspath(place), options]
    async with make_namespace(command, ("ns/mnt", "root"), environment) as (_, root):
        for directory in real:
            _check(root, directory)
        yield ReadOnlyView(root)


def _resolve(directories: Iterable[Path]) -> list[Path]:
    real = [(directory, Path(os.path.realpath(directory))) for directory in directories]
    for directory, path in real:
        # By /proc/PID/root, as an example: no mount of ours is there.
        if directory.exists() and not (path.exists() and path.samefile(directory)):
            raise SandboxError(f"{directory} leads out of this mount namespace, so it can't be made read-only")
    return [path for _, path in real]


def _read_mounts() -> bytes:
    return Path("/proc/self/mountinfo").read_bytes()


def _check(root: int, directory: Path) -> None:
    """Make sure that *directory*, or what there is of it, is read-only below *root*."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    fd = os.open(os.fspath(there)[1:] or ".", os.O_PATH | os.O_CLOEXEC, dir_fd=root)
    try:
        if not os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            raise SandboxError(f"{directory} can't be made read-only")
    finally:
        os.close(fd)


def find_mounts(mountinfo: bytes, directories: Iterable[Path]) -> dict[Path, str]:
    """Return the mount points of *directories*, and those below them, with the options that each has.

    Args:
      mountinfo: What ``/proc/self/mountinfo`` says; see proc_pid_mountinfo(5).
      directories: Real paths.

    Raises:
      SandboxError: if one is in none of the mounts.

    """
    mounts = dict[Path, str]()
    for line in mountinfo.splitlines():
        _, _, _, _, place, options, *_ = line.split(b" ")
        place = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), place)
        kept = [option for option in os.fsdecode(options).split(",") if option in _OPTIONS]
        mounts[Path(os.fsdecode(place))] = ",".join(["bind", *kept])
    found = dict[Path, str]()
    for directory in directories:
        above = next((path for path in (directory, *directory.parents) if path in mounts), None)
        if above is None:
            raise SandboxError(f"the kernel does not say where {directory} is mounted")
        found[above] = mounts[above]
        found |= {place: options for place, options in mounts.items() if place.is_relative_to(directory)}
    return found
