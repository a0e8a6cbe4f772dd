"""What a sandbox's user asks of its guest about files."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import PurePosixPath

from ..client import check_user
from ..constants import DEFAULT_MAX_DOWNLOAD_BYTES
from ._files import read_environment
from ._path import AnyGuestPath, GuestPath, check_guest_path, check_slot
from ._slot import Slot
from ._transfer import TransferStatistics, download, upload
from ._watch import FileChanges, watch


class FileRequests:
    """The requests of a `Sandbox` that file helpers in the guest answer."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def path(self, *parts: AnyGuestPath, user: str | int | None = None) -> GuestPath:
        """Return a path in the guest, on which files are worked with like with `trio.Path`.

            await sandbox.path("/home/user/data.json").write_text("{}")

        Args:
          parts: Joined as by `pathlib.PurePosixPath`; a relative path starts at the user's home.
          user: Whose rights it has: a user's name or id in the guest; None for the unprivileged user 1000.

        """
        check_user(user)
        return GuestPath(self._slot, user, PurePosixPath()).joinpath(*parts)

    async def environment(self, user: str | int | None = None) -> dict[str, str]:
        """Return the environment variables that processes of a user get unless `run_process` is told otherwise.

            env = {**await sandbox.environment(), "DEBUG": "1"}
            await sandbox.run_process(["make"], env=env)

        Args:
          user: A user's name or id in the guest; None for the unprivileged user 1000.

        Raises:
          OSError: if there is no such user.
          Exception: besides, what methods of `GuestPath` raise.

        """
        check_user(user)
        return {**await read_environment(self._slot, user), **self._slot.environment()}

    async def upload(
        self,
        local: str | PathLike[str],
        remote: AnyGuestPath,
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
    ) -> TransferStatistics:
        """Copy a file or a whole tree of the host's into the guest.

        What is copied are content, permission bits, symbolic links as they are, and empty directories; owner is
        *user*. Holes of sparse files stay holes. It appears at *remote* as a whole or not at all: whatever fails, and when
        cancelled, nothing is left. A file that is there keeps its owner, group and mode when a file comes in its place, and
        must be one that *user* can write; see `GuestPath.write_bytes`. A link is replaced. A directory must be empty:
        trees are not merged.

        Args:
          local: A file or directory of the host's; a link here is followed, and none below.
          remote: What to call it in the guest. Its directory must be there.
          user: Who does that in the guest; None for the unprivileged user 1000, or the user of a `GuestPath`.
          progress: Called after each piece, in this task; must not block. What it raises stops the upload.

        Returns:
          What went over.

        Raises:
          OSError: of the host or the guest; `filename` tells. EOPNOTSUPP for a device, a socket or a named pipe.
          Exception: besides, what methods of `GuestPath` raise.

        """
        path, user = remote_path(self._slot, remote, user)
        return await upload(self._slot, user, local, path, progress)

    async def download(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
        max_bytes: int = DEFAULT_MAX_DOWNLOAD_BYTES,
        umask: int | None = None,
    ) -> TransferStatistics:
        """Copy a file or a whole tree of the guest's to the host.

        What is copied are content, permission bits but for those of *umask*, symbolic links as they are, and empty
        directories. Holes of sparse files stay holes. It appears at *local* as a whole or not at all, under the same rules as for `upload`.

        Whatever the guest answers, nothing but *local* is written. What it contains is the guest's choice
        all the same: a symbolic link in it may lead anywhere on the host for whoever follows it.

        Args:
          remote: A file or directory of the guest's; a link here is followed, and none below.
          local: What to call it on the host. Its directory must be there, and trusted.
          user: Who reads it in the guest; None for the unprivileged user 1000, or the user of a `GuestPath`.
          progress: Called after each piece, in this task; must not block. What it raises stops the download.
          max_bytes: What may be written to the host's disk, with 4096 bytes for each file, link, directory and hole.
            A hole takes no more than that, whatever its length; no file may be longer than 16 TiB.
          umask: Permission bits that nothing gets, from 0 to 0o777. None: those of this process's umask, and those for
            group and others to write. 0 keeps all that the guest says.

        Returns:
          What went over.

        Raises:
          OSError: of the guest or the host; `filename` tells. EFBIG for more than *max_bytes*.
          Exception: besides, what methods of `GuestPath` raise.

        """
        path, user = remote_path(self._slot, remote, user)
        return await download(self._slot, user, path, local, progress, max_bytes, umask)

    @asynccontextmanager
    async def watch(self, path: AnyGuestPath, *, user: str | int | None = None) -> AsyncGenerator[FileChanges]:
        """Watch a file or directory of the guest's for a block.

            async with sandbox.watch("/home/user") as changes:
                async for change in changes:
                    print(change.kind, change.path)

        Changes from the moment that the block starts are reported. Of a directory, that is what happens to it and to
        what is directly in it, not below.

        Args:
          path: What to watch; a link is followed.
          user: Whose rights it takes; None for the unprivileged user 1000, or the user of a `GuestPath`.

        Raises:
          OSError: as inotify_add_watch(2) in the guest.
          Exception: besides, what methods of `GuestPath` raise.

        """
        remote, user = remote_path(self._slot, path, user)
        async with watch(self._slot, GuestPath(self._slot, user, PurePosixPath(remote))) as changes:
            yield changes


def remote_path(slot: Slot, path: AnyGuestPath, user: str | int | None) -> tuple[str, str | int | None]:
    """Return a path in the guest as text, and whose rights it has."""
    check_user(user)
    check_guest_path(path)
    if isinstance(path, GuestPath):
        check_slot(path, slot)
        return str(path), path.user if user is None else user
    return str(PurePosixPath(path)), user
