"""Which directories are ours: those with our mark. Nothing else is ever removed, whatever its name.

A name proves nothing: users give names like ours to directories of theirs, beside ours and inside of ours. So
each directory that may one day have to be removed by somebody else than its maker gets a mark, a file of a fixed
name, before anything else is put into it. The mark is removed last, so that what is left of a removal is still ours.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .._private import make_new_directory
from ._reaper_main import MARKER as MARKER, remove_marked as remove_marked, remove_tree as remove_tree

_TEXT = b"trio-sandbox made this directory, and may remove it with all that is in it.\n"


def make_marked(directory: Path) -> None:
    """Make a new private directory of ours.

    Raises:
      OSError: if it exists, or can't be made.

    """
    make_new_directory(directory)
    mark(directory)


def mark(directory: Path) -> None:
    """Mark a directory that we made as ours; again is no error.

    Raises:
      OSError: if the mark can't be written.

    """
    try:
        fd = os.open(directory / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.write(fd, _TEXT)
    finally:
        os.close(fd)


def is_own_directory(directory: Path) -> bool:
    """Tell whether it is a directory, no link to one, and this user's."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def is_marked(directory: Path) -> bool:
    """Tell whether a directory is one of ours, made by this user."""
    try:
        status = (directory / MARKER).lstat()
    except OSError:
        return False
    return is_own_directory(directory) and stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
