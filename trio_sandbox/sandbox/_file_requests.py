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
        """Return a path in the guest, which works like a `trio.Path`.

            await sandbox.path("/home/user/data.json").write_text("{}")

        Args:
          parts: Joined as by `pathlib.PurePosixPath`; a relative path starts at the user's home.
          user: The user in the guest whose rights it has, a name or an id; None for the unprivileged user 1000.

        """
        check_user(user)
        return GuestPath(self._slot, user, PurePosixPath()).joinpath(*parts)

    async def environment(self, user: str | int | None = None) -> dict[str, str]:
        """Return the environment variables that a user's processes get by default.

            env = {**await sandbox.environment(), "DEBUG": "1"}
            await sandbox.run_process(["make"], env=env)

        Args:
          user: A user's name or id in the guest; None for the unprivileged user 1000.

        Raises:
          OSError: if there is no such user.
          Exception: what methods of `GuestPath` raise.

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
        """Copy a file or a whole tree from the host into the guest.

        Content, permission bits, symbolic links and empty directories are copied; the owner is *user*. Holes of sparse files
        stay holes. The copy appears at *remote* as a whole or not at all: after an error or a cancellation nothing is left.
        An existing file keeps its owner, group and mode, and *user* must be able to write it; see `GuestPath.write_bytes`.
        An existing link is replaced. An existing directory must be empty: trees are not merged.

        Args:
          local: A file or directory on the host. If it is a link, it is followed; links below are not.
          remote: Its new path in the guest. The directory must exist.
          user: The user in the guest who writes it; None for the unprivileged user 1000, or the user of a `GuestPath`.
          progress: Called after each piece, in this task; must not block. What it raises stops the upload.

        Returns:
          How much was copied.

        Raises:
          OSError: of the host or the guest; `filename` tells. EOPNOTSUPP for a device, a socket or a named pipe.
          Exception: what methods of `GuestPath` raise.

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
        """Copy a file or a whole tree from the guest to the host.

        Content, permission bits except those of *umask*, symbolic links and empty directories are copied. Holes of sparse
        files stay holes. The copy appears at *local* as a whole or not at all, under the same rules as for `upload`.

        Whatever the guest answers, only *local* is written. But the guest chooses what it contains: a symbolic link in it
        may lead anywhere on the host if somebody follows it.

        Args:
          remote: A file or directory in the guest. If it is a link, it is followed; links below are not.
          local: Its new path on the host. The directory must exist, and be trusted.
          user: The user in the guest who reads it; None for the unprivileged user 1000, or the user of a `GuestPath`.
          progress: Called after each piece, in this task; must not block. What it raises stops the download.
          max_bytes: What may be written to the host's disk, with 4096 bytes for each file, link, directory and hole.
            A hole takes no more than that, whatever its length; no file may be longer than 16 TiB.
          umask: Permission bits to remove, from 0 to 0o777. None: those of this process's umask, and write permission for
            group and others. 0 keeps all bits.

        Returns:
          How much was copied.

        Raises:
          OSError: of the guest or the host; `filename` tells. EFBIG for more than *max_bytes*.
          Exception: what methods of `GuestPath` raise.

        """
        path, user = remote_path(self._slot, remote, user)
        return await download(self._slot, user, path, local, progress, max_bytes, umask)

    @asynccontextmanager
    async def watch(self, path: AnyGuestPath, *, user: str | int | None = None) -> AsyncGenerator[FileChanges]:
        """Watch a file or directory in the guest, for a block.

            async with sandbox.watch("/home/user") as changes:
                async for change in changes:
                    print(change.kind, change.path)

        You get the changes from the moment that the block starts. For a directory these are changes of itself and of its
        entries, not of what is below.

        Args:
          path: What to watch; a link is followed.
          user: The user in the guest whose rights it needs; None for the unprivileged user 1000, or the user of a `GuestPath`.

        Raises:
          OSError: as inotify_add_watch(2) in the guest.
          Exception: what methods of `GuestPath` raise.

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
