"""What a sandbox's user asks about directories that go into the guest and come back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Final

from .._checks import to_path
from .._workspace_change import WorkspaceChange
from ..constants import DEFAULT_MAX_PULL_BYTES
from ._changes import Base
from ._file_requests import FileRequests, remote_path
from ._path import AnyGuestPath, GuestPath
from ._slot import Slot
from ._transfer import TransferStatistics, check_max_bytes
from ._workspace import Comparison, OnConflict, check_directory, diff, pull, push

#: What is left alone unless asked otherwise: a hook, or a setting, of a repository is a program that git executes.
_LEFT_ALONE: Final = (".git",)
_ON_CONFLICT: Final = ("raise", "skip", "overwrite")


class WorkspaceRequests(FileRequests):
    """The requests of a `Sandbox` about a directory of the host's that is worked on in the guest."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot)
        self._staging: Path | None = None
        """A directory of the host's for what is on its way."""
        self._bases: dict[tuple[str, str], Base] = {}
        """By directory in the guest and on the host, what both were when they were last the same."""

    async def push(
        self,
        local: str | PathLike[str],
        remote: AnyGuestPath,
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
    ) -> TransferStatistics:
        """Copy a directory into the guest, as `upload` does, for work there that `pull` brings back.

        Its content is remembered, so that `pull` and `diff` know what changed in the guest and what on the host.

        Args:
          local: The directory. If it is a link, it is followed; links below are not.
          remote: Its new path in the guest. The directory above must exist; it must not exist itself, or must be empty.
          user: Who does that in the guest; None for the unprivileged user 1000, or the user of a `GuestPath`.
          progress: As that of `upload`.

        Returns:
          How much was copied.

        Raises:
          NotADirectoryError: if *local* is not a directory; nothing was sent.
          OSError: besides, as `upload`.
          Exception: besides, what methods of `GuestPath` raise.

        """
        here = _absolute(local)
        path, user = remote_path(self._slot, remote, user)
        key = await self._key(path, user, here)
        sent, self._bases[key] = await push(self._slot, user, here, path, progress)
        return sent

    async def pull(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        *,
        user: str | int | None = None,
        dry_run: bool = False,
        on_conflict: OnConflict = "raise",
        exclude: Iterable[str] = _LEFT_ALONE,
        max_bytes: int = DEFAULT_MAX_PULL_BYTES,
    ) -> tuple[WorkspaceChange, ...]:
        """Bring back the changes of a directory in the guest since `push` or the last `pull`: files added, changed, removed.

            await sandbox.push("project", "project")
            await sandbox.run_process(["make", "-C", "project"])
            for change in await sandbox.pull("project", "project"):
                print(change)

        Files that were written to in the guest since then are copied out and compared, whatever time they show. Only then are
        changes made on the host, each file as a whole. Contents are compared, and whether a file is executable. Existing files
        keep their other permissions; new ones follow the umask. What was not pushed counts as added on both sides: nothing on
        the host is removed, and a file that differs is a conflict.

        It is also a conflict if the same path changed on the host meanwhile, if a directory was removed that has something
        in it only on the host, and if a link may lead out of the directory; such a link is never made.

        Whatever the guest answers, only the inside of *local* is written, no link is followed there, and nothing is
        executed. But the guest chooses what the files contain: look at `diff` before you run or build anything.

        Cancelled while changes are made: all of them are made. Failed meanwhile: some are made, and a second call does the rest.

        Args:
          remote: The directory in the guest.
          local: The directory on the host, which must exist. If it is a link, it is followed; links below are not.
          user: Who reads it in the guest; None for the unprivileged user 1000, or the user of a `GuestPath`.
          dry_run: Change nothing; return the changes.
          on_conflict: "raise": change nothing if there is a conflict. "skip": make the other changes. "overwrite": if both
            sides changed, take the guest's version; skip all other conflicts.
          exclude: Names of files and directories to leave alone, wherever they are; they are not copied. By default
            repositories are left alone, since hooks and settings in them are programs that git runs on the host.
          max_bytes: What the guest's directory may have, holes included, with 4096 bytes for each file, link and directory;
            what is excluded does not count.

        Returns:
          The changes by path. One with a `WorkspaceChange.conflict` was not made.

        Raises:
          WorkspaceConflictError: if there are conflicts, and *on_conflict* is "raise".
          TypeError, ValueError: if an argument can't be what it is.
          OSError: of the guest or the host; `filename` tells. EFBIG for more than *max_bytes*.
          Exception: besides, what methods of `GuestPath` raise.

        """
        if on_conflict not in _ON_CONFLICT:
            raise ValueError(f"`on_conflict` must be 'raise', 'skip' or 'overwrite', not {on_conflict!r:.100}")
        comparison, key = await self._comparison(remote, local, user, exclude, max_bytes)
        changes, self._bases[key] = await pull(comparison, dry_run=dry_run, on_conflict=on_conflict)
        return tuple(changes)

    async def diff(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        *,
        user: str | int | None = None,
        exclude: Iterable[str] = _LEFT_ALONE,
        max_bytes: int = DEFAULT_MAX_PULL_BYTES,
    ) -> str:
        """Return what `pull` would change on the host as a unified diff, which ``git apply`` and ``patch -p1`` take; "" if that is nothing.

        It shows conflicts like other changes. Files that are not UTF-8 text or are longer than 1 MiB, and all files after 16 MiB of diff, are in it
        by name only. Files with more than 1000 lines between their first and their last difference are shown as replaced there.

        Arguments and errors are those of `pull`.
        """
        comparison, key = await self._comparison(remote, local, user, exclude, max_bytes)
        text, self._bases[key] = await diff(comparison)
        return text

    async def _comparison(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        user: str | int | None,
        exclude: Iterable[str],
        max_bytes: int,
    ) -> tuple[Comparison, tuple[str, str]]:
        here = _absolute(local)
        if isinstance(exclude, str):
            raise TypeError(f"`exclude` must be names, such as ['.git'], not {exclude!r:.100}")
        excluded = frozenset(exclude)
        for name in excluded:
            if not isinstance(name, str) or not name or "/" in name or "\0" in name:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"`exclude` must have names of files without '/' and NUL, not {name!r:.100}")
        check_max_bytes(max_bytes)
        path, user = remote_path(self._slot, remote, user)
        await check_directory(here)  # now, and not when all has come
        key = await self._key(path, user, here)
        comparison = Comparison(
            slot=self._slot,
            user=user,
            remote=path,
            local=here,
            base=self._bases.get(key, Base()),
            excluded=excluded,
            max_bytes=max_bytes,
            staging=self._staging or Path(tempfile.gettempdir()),
        )
        return comparison, key

    async def _key(self, path: str, user: str | int | None, local: Path) -> tuple[str, str]:
        """Tell the two directories from others, whatever they are called."""
        there = GuestPath(self._slot, user, PurePosixPath(path))
        return str(await there.absolute()), _resolved(local)


def _absolute(local: str | PathLike[str]) -> Path:
    return Path(os.path.abspath(to_path(local, "local")))


def _resolved(path: Path) -> str:
    return os.path.realpath(path)
