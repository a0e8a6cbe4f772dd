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
from ._file_requests import FileRequests, remote_path
from ._path import AnyGuestPath, GuestPath
from ._plan import Tree
from ._slot import Slot
from ._transfer import TransferStatistics
from ._workspace import Comparison, OnConflict, diff, pull, push

#: What is left alone unless asked otherwise: a hook, or a setting, of a repository is a program that git executes.
_LEFT_ALONE: Final = (".git",)
_ON_CONFLICT: Final = ("raise", "skip", "overwrite")


class WorkspaceRequests(FileRequests):
    """The requests of a `Sandbox` about a directory of the host's that is worked on in the guest."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot)
        self._staging: Path | None = None
        """A directory of the host's for what is on its way."""
        self._bases: dict[tuple[str, str], Tree] = {}
        """By directory in the guest and on the host, what both were when they were last the same."""

    async def push(
        self,
        local: str | PathLike[str],
        remote: AnyGuestPath,
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
    ) -> TransferStatistics:
        """Copy a directory of the host's into the guest, as `upload` does, to be worked on there and to be brought back by `pull`.

        What is in it is remembered, so that `pull` and `diff` know what was changed in the guest and what on the host.

        Args:
          local: The directory; a link here is followed, and none below.
          remote: What to call it in the guest. Its directory must be there, and it must not, or be empty.
          user: Who does that in the guest; None for the unprivileged user 1000, or the user of a `GuestPath`.
          progress: As that of `upload`.

        Returns:
          What went over.

        Raises:
          NotADirectoryError: if *local* is no directory; nothing was sent.
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
        """Bring back what was changed in a directory of the guest's since `push`, or since the last `pull`: added, changed, removed.

            await sandbox.push("project", "project")
            await sandbox.run_process(["make", "-C", "project"])
            for change in await sandbox.pull("project", "project"):
                print(change)

        All of the directory is copied out of the guest and compared, and only then changes are made on the host, each file as a whole. Contents count, and
        whether a file is executable. On the host a file keeps its other permissions; new ones are as the umask says. What was not pushed before
        counts as added on both sides: nothing on the host is removed, and a file that differs is a conflict.

        A change is a conflict, too, where the same path was changed on the host meanwhile; where a directory goes that has something in it which is only on
        the host; and for a link that may lead out of the directory, which is never made.

        Whatever the guest answers, nothing but the inside of *local* is written, no link is followed there, and nothing is executed. What the
        files contain is the guest's choice all the same: look at `diff` before you run or build anything of it.

        Cancelled while changes are made: they are made to their end. Failed meanwhile: some of them are, and a second call does the rest.

        Args:
          remote: The directory in the guest.
          local: The directory on the host, which must be there; a link here is followed, and none below.
          user: Who reads it in the guest; None for the unprivileged user 1000, or the user of a `GuestPath`.
          dry_run: Only return what would be done.
          on_conflict: "raise": nothing is done if there is a conflict. "skip": what is none is done. "overwrite": what was changed on both sides is
            taken from the guest; all other conflicts are skipped.
          exclude: Names of files and directories that are left alone wherever they are. A repository is left alone by default, since a hook or a
            setting in it is a program that git executes on the host.
          max_bytes: What the guest's directory may have, holes included, with 4096 bytes for each file, link and directory.

        Returns:
          The changes by path; what has a `WorkspaceChange.conflict` was not done.

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

        Conflicts are in it as if they were none. Of files that are no text in UTF-8, or longer than 1 MiB, and of what comes after 16 MiB of diff,
        there are only the names. Files with more than 1000 lines between their first and their last difference are shown as replaced there.

        Arguments and errors are those of `pull`.
        """
        comparison, _ = await self._comparison(remote, local, user, exclude, max_bytes)
        return await diff(comparison)

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
            if not isinstance(name, str) or not name or "/" in name:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"`exclude` must have names of files without '/', not {name!r:.100}")
        path, user = remote_path(self._slot, remote, user)
        key = await self._key(path, user, here)
        comparison = Comparison(
            slot=self._slot,
            user=user,
            remote=path,
            local=here,
            base=self._bases.get(key, {}),
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
