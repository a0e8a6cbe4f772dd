"""Files that others can't have touched: how ours are made, and what is refused.

What the cache holds is executed by virtual machines that users trust, and replaced under its own name. So it is used only where
nobody but this user, or root, can have written it; what is made there is made for this user alone, whatever the umask says.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_trusted(*paths: Path) -> None:
    """Refuse files and directories that somebody else owns, or can write to. Whoever opens what can't be looked at says so.

    Raises:
      PermissionError: at the first that is not this user's or root's, or that its group or others may write to.

    """
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            raise PermissionError(
                errno.EPERM,
                f"not trusted, since it belongs to the user {status.st_uid}, who could have put anything there;"
                f" it must belong to the user {os.geteuid()} or to root",
                os.fspath(path),
            )
        if status.st_mode & _OTHERS_WRITE:
            raise PermissionError(
                errno.EPERM,
                "not trusted, since other users may write to it; if nobody did, `chmod go-w` makes it usable",
                os.fspath(path),
            )


def make_private_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory, unless it is there, and those above it that are missing, which are this user's alone.

    Args:
      path: Which.
      mode: Its permissions, less the umask.

    Raises:
      OSError: if it can't be made.

    """
    if not path.parent.exists():
        make_private_directory(path.parent)
    try:
        make_new_directory(path, mode)
    except FileExistsError:
        if not path.is_dir():
            raise


def make_new_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory that does not exist; *mode* less the umask, which does not keep us ourselves out.

    Raises:
      OSError: if it exists, or can't be made.

    """
    path.mkdir(mode=mode)
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IRWXU)


def write_new_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that does not exist, and bring it to the disk. A link of its name is not followed.

    Args:
      path: Which.
      text: All of its content.
      mode: Its permissions, whatever the umask says.

    Raises:
      OSError: if it exists, or can't be written.

    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchmod(fd, mode)
        os.fsync(fd)
