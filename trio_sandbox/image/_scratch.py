"""Where the file tree of a build is made: a directory that was looked at before anything is downloaded."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from .._errors import ImageBuildError

#: Bytes that the largest of our trees takes, with the packages that it is made of.
_ROOM: Final = 2**30


def choose_directory(staging: Path, *, root: bool, device_nodes: bool) -> Path:
    """Return the directory in which to make the tree.

    Args:
      staging: The build's own, in the cache.
      root: Whether we are root. An ordinary user's build is done by the root of a user namespace, who is nobody in particular
        outside: he may not walk through private directories, as homes are.
      device_nodes: Whether programs in the tree use device nodes that are in it.

    Raises:
      ImageBuildError: if none will do; the message says why not, of each.

    """
    tried = [staging] if root else []
    tried += [
        Path(path) for path in dict.fromkeys((os.environ.get("TMPDIR", ""), "/var/tmp", "/tmp")) if os.path.isabs(path)
    ]
    problems = {directory: find_problem(directory, root=root, device_nodes=device_nodes) for directory in tried}
    usable = [directory for directory, problem in problems.items() if not problem]
    for directory in usable:
        if _room(directory) >= _ROOM:
            return directory
    if usable:
        return max(usable, key=_room)  # its being full is said where it happens: it may do
    listed = "; ".join(f"{directory} {problem}" for directory, problem in problems.items())
    raise ImageBuildError(
        f"there is no directory to make an image's files in: {listed}. Set TMPDIR to one on a disk, which everybody may "
        "enter, and where programs may run"
    )


def find_problem(directory: Path, *, root: bool, device_nodes: bool) -> str:
    """Say why a tree can't be made in *directory*, "" if it can; arguments as `choose_directory`."""
    if not directory.is_dir():
        return "is no directory"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "can't be written"
    flags = os.statvfs(directory).f_flag
    if flags & os.ST_NOEXEC:
        return "is mounted noexec"
    if device_nodes and flags & os.ST_NODEV:
        return "is mounted nodev"
    if not root:
        real = directory.resolve()
        for path in (real, *real.parents):
            mode = path.stat().st_mode
            if not mode & stat.S_IXOTH:
                return f"is closed to others: {path} has mode {stat.S_IMODE(mode):04o}"
    return ""


def _room(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
