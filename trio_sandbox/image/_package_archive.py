"""Packages as archives (tar): a guest unpacks them in half the time that copying their files out of a file system takes it."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

#: What it takes a guest to make a file at all, in bytes that it could write meanwhile.
_BYTES_PER_FILE: Final = 2**16


def pack(tree: Path, site: Path, archives: Sequence[Path], owner: tuple[int, int]) -> None:
    """Pack *tree*, which is to be / in the guest, into new *archives*, which take equally long to unpack. Blocks: call it in a thread.

    They can be unpacked at the same time. Directories on the way to packages are in none of them: they stay whose they are.

    Args:
      tree: The packages, as `arrange` has put them.
      site: Where in it the modules are.
      archives: The files to make.
      owner: Numbers of the guest's user and group that all of it belongs to.

    Raises:
      OSError: if something can't be read or written.

    """
    entries = list(_find(os.fspath(tree), os.fspath(site)))
    share = sum(weight for _, weight in entries) / len(archives)
    entries.reverse()
    done = 0.0
    for number, archive in enumerate(archives, 1):
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            while entries and (done < number * share or number == len(archives)):
                path, weight = entries.pop()
                _add(tar, path, os.path.relpath(path, tree), owner)
                done += weight


def _find(tree: str, site: str) -> Iterator[tuple[str, int]]:
    """Give what is to be packed, directories before what is in them, and how much work each is."""
    below = f"{site}{os.sep}"
    for directory, names, files in os.walk(tree):
        names.sort()
        inside = f"{directory}{os.sep}".startswith(below)
        for name in sorted((*names, *files)):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if inside or not stat.S_ISDIR(status.st_mode):
                yield path, status.st_size + _BYTES_PER_FILE


def _add(tar: tarfile.TarFile, path: str, name: str, owner: tuple[int, int]) -> None:
    member = tar.gettarinfo(path, name)
    member.uid, member.gid = owner
    member.uname = member.gname = ""
    # Byte code has whole seconds, too; parts of one would take a header more for each file.
    member.mtime = int(member.mtime)
    if member.isreg():
        with open(path, "rb") as file:
            tar.addfile(member, file)
    else:
        tar.addfile(member)
