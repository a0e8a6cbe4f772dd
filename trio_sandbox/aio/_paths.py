"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, TypeAlias, cast, final, overload

import trio_sandbox

from ..portal import plain, plain_all
from ..sandbox import BinaryMode, ChangeKind, TextMode
from ._door import AioDoor
from ._files import GuestFile, GuestTextFile

#: What may stand for a path in the guest.
AnyGuestPath: TypeAlias = "str | PurePosixPath | GuestPath"


@final
class GuestPath(AioDoor[trio_sandbox.GuestPath]):
    """A path in the guest, like `trio.Path` on the host. Made by `Sandbox.path`.

    See `trio_sandbox.GuestPath`.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return str(self._inner)

    def __eq__(self, other: object) -> bool:
        return bool(self._inner == plain(other))

    def __hash__(self) -> int:
        return hash(self._inner)

    def __lt__(self, other: GuestPath) -> bool:
        return bool(self._inner < plain(other))

    def __truediv__(self, other: AnyGuestPath) -> GuestPath:
        return GuestPath(self._portal, self._inner / plain(other))

    @property
    def user(self) -> str | int | None:
        """Whose rights it has; None for the guest's ordinary user."""
        return self._inner.user

    @property
    def pure(self) -> PurePosixPath:
        """The path as a `pathlib.PurePosixPath`."""
        return self._inner.pure

    @property
    def parts(self) -> tuple[str, ...]:
        """Like `pathlib.PurePath.parts`."""
        return self._inner.parts

    @property
    def name(self) -> str:
        """Like `pathlib.PurePath.name`."""
        return self._inner.name

    @property
    def stem(self) -> str:
        """Like `pathlib.PurePath.stem`."""
        return self._inner.stem

    @property
    def suffix(self) -> str:
        """Like `pathlib.PurePath.suffix`."""
        return self._inner.suffix

    @property
    def suffixes(self) -> list[str]:
        """Like `pathlib.PurePath.suffixes`."""
        return self._inner.suffixes

    @property
    def parent(self) -> GuestPath:
        """Like `pathlib.PurePath.parent`."""
        return GuestPath(self._portal, self._inner.parent)

    @property
    def parents(self) -> tuple[GuestPath, ...]:
        """Like `pathlib.PurePath.parents`."""
        return tuple(GuestPath(self._portal, each) for each in self._inner.parents)

    def joinpath(self, *others: AnyGuestPath) -> GuestPath:
        """Like `pathlib.PurePath.joinpath`."""
        return GuestPath(self._portal, self._inner.joinpath(*plain_all(others)))

    def with_name(self, name: str) -> GuestPath:
        """Like `pathlib.PurePath.with_name`."""
        return GuestPath(self._portal, self._inner.with_name(name))

    def with_stem(self, stem: str) -> GuestPath:
        """Like `pathlib.PurePath.with_stem`."""
        return GuestPath(self._portal, self._inner.with_stem(stem))

    def with_suffix(self, suffix: str) -> GuestPath:
        """Like `pathlib.PurePath.with_suffix`."""
        return GuestPath(self._portal, self._inner.with_suffix(suffix))

    def relative_to(self, other: AnyGuestPath) -> GuestPath:
        """Like `pathlib.PurePath.relative_to`."""
        return GuestPath(self._portal, self._inner.relative_to(plain(other)))

    def is_relative_to(self, other: AnyGuestPath) -> bool:
        """Like `pathlib.PurePath.is_relative_to`."""
        return self._inner.is_relative_to(plain(other))

    def is_absolute(self) -> bool:
        """Like `pathlib.PurePath.is_absolute`."""
        return self._inner.is_absolute()

    def match(self, pattern: str) -> bool:
        """Like `pathlib.PurePath.match`."""
        return self._inner.match(pattern)

    async def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return its status; without *follow_symlinks*, that of a link itself."""
        return await self._call(lambda: self._inner.stat(follow_symlinks=follow_symlinks))

    async def lstat(self) -> os.stat_result:
        """Return its status; of a link, that of the link itself."""
        return await self._call(self._inner.lstat)

    async def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it exists; a broken link does not, unless *follow_symlinks* is False."""
        return await self._call(lambda: self._inner.exists(follow_symlinks=follow_symlinks))

    async def is_file(self) -> bool:
        """Whether it is a regular file, or a link to one."""
        return await self._call(self._inner.is_file)

    async def is_dir(self) -> bool:
        """Whether it is a directory, or a link to one."""
        return await self._call(self._inner.is_dir)

    async def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return await self._call(self._inner.is_symlink)

    async def iterdir(self) -> Iterator[GuestPath]:
        """Return an iterator over the entries of this directory, in no order.

        See `trio_sandbox.GuestPath.iterdir`.
        """
        found = await self._call(self._inner.iterdir)
        return (GuestPath(self._portal, each) for each in found)

    async def glob(self, pattern: str) -> Iterator[GuestPath]:
        """Return an iterator over what *pattern* matches below, in no order.

        See `trio_sandbox.GuestPath.glob`.
        """
        found = await self._call(lambda: self._inner.glob(pattern))
        return (GuestPath(self._portal, each) for each in found)

    async def rglob(self, pattern: str) -> Iterator[GuestPath]:
        """Return an iterator over what *pattern* matches in this directory and all below; see `glob`."""
        found = await self._call(lambda: self._inner.rglob(pattern))
        return (GuestPath(self._portal, each) for each in found)

    async def readlink(self) -> GuestPath:
        """Return where a symbolic link leads."""
        return GuestPath(self._portal, await self._call(self._inner.readlink))

    async def absolute(self) -> GuestPath:
        """Return the absolute path: a relative one starts at the home directory of its user."""
        return GuestPath(self._portal, await self._call(self._inner.absolute))

    async def resolve(self, *, strict: bool = False) -> GuestPath:
        """Return the absolute path without links and ``..``; with *strict* it must exist."""
        return GuestPath(self._portal, await self._call(lambda: self._inner.resolve(strict=strict)))

    async def mkdir(self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory, like `pathlib.Path.mkdir`: *mode* is subject to the guest's umask of 022."""
        await self._call(lambda: self._inner.mkdir(mode, parents=parents, exist_ok=exist_ok))

    async def rmdir(self) -> None:
        """Remove a directory, which must be empty."""
        await self._call(self._inner.rmdir)

    async def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove a file or a link; with *missing_ok* it need not exist."""
        await self._call(lambda: self._inner.unlink(missing_ok=missing_ok))

    async def touch(self, mode: int = 0o666, *, exist_ok: bool = True) -> None:
        """Make an empty file, or set the times of an existing one to now."""
        await self._call(lambda: self._inner.touch(mode, exist_ok=exist_ok))

    async def rename(self, target: AnyGuestPath) -> GuestPath:
        """Rename to *target*, which is replaced if it is a file or an empty directory; return its path."""
        return GuestPath(self._portal, await self._call(lambda: self._inner.rename(plain(target))))

    async def replace(self, target: AnyGuestPath) -> GuestPath:
        """The same as `rename`."""
        return GuestPath(self._portal, await self._call(lambda: self._inner.replace(plain(target))))

    async def chmod(self, mode: int) -> None:
        """Set the mode, following links; *mode* may include the bits for the kind of file that `stat` returns."""
        await self._call(lambda: self._inner.chmod(mode))

    async def symlink_to(self, target: AnyGuestPath) -> None:
        """Make this path a symbolic link to *target*."""
        await self._call(lambda: self._inner.symlink_to(plain(target)))

    async def hardlink_to(self, target: AnyGuestPath) -> None:
        """Make this path another name of the file *target*."""
        await self._call(lambda: self._inner.hardlink_to(plain(target)))

    async def read_bytes(self) -> bytes:
        """Return the content of a regular file.

        See `trio_sandbox.GuestPath.read_bytes`.
        """
        return await self._call(self._inner.read_bytes)

    async def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        r"""Return the content as text; ``\r\n`` and ``\r`` become ``\n``.

        See `trio_sandbox.GuestPath.read_text`.
        """
        return await self._call(lambda: self._inner.read_text(encoding, errors))

    async def write_bytes(self, data: bytes | bytearray | memoryview) -> int:
        """Replace the content by *data*, or make the file; return how many bytes that was.

        See `trio_sandbox.GuestPath.write_bytes`.
        """
        return await self._call(lambda: self._inner.write_bytes(data))

    async def write_text(
        self,
        data: str,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
    ) -> int:
        r"""Replace the content by text, as `write_bytes` does; return how many characters that was.

        See `trio_sandbox.GuestPath.write_text`.
        """
        return await self._call(lambda: self._inner.write_text(data, encoding, errors, newline))

    @overload
    async def open(self, mode: BinaryMode, *, limit: int = 1048576) -> GuestFile: ...
    @overload
    async def open(
        self,
        mode: TextMode = "r",
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
        limit: int = 1048576,
    ) -> GuestTextFile: ...
    async def open(
        self,
        mode: str = "r",
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
        limit: int = 1048576,
    ) -> GuestFile | GuestTextFile:
        r"""Open the file.

        See `trio_sandbox.GuestPath.open`.
        """
        file: object = await self._call(
            lambda: cast("Any", self._inner).open(mode, encoding=encoding, errors=errors, newline=newline, limit=limit)
        )
        if isinstance(file, trio_sandbox.GuestFile):
            return GuestFile(self._portal, file)
        assert isinstance(file, trio_sandbox.GuestTextFile)
        return GuestTextFile(self._portal, file)


@final
class FileChange(AioDoor[trio_sandbox.FileChange]):
    """Something happened to a file or directory."""

    __slots__ = ()

    @property
    def kind(self) -> ChangeKind:
        """What happened: "created"; "modified": its content changed; "written": a program that had it open for writing closed it; "attributes": mode, owner, times or number of names; "deleted"; "moved_from": it was renamed, or moved away from here; "moved_to": it got this name, or was moved to here; "overflow": changes were lost here, because nobody took them in time."""
        return self._inner.kind

    @property
    def path(self) -> GuestPath:
        """What it happened to; for "overflow" what is watched."""
        return GuestPath(self._portal, self._inner.path)

    @property
    def is_dir(self) -> bool:
        """Whether that is a directory."""
        return self._inner.is_dir

    def __eq__(self, other: object) -> bool:
        return bool(self._inner == plain(other))

    def __hash__(self) -> int:
        return hash(self._inner)


@final
class FileChanges(AioDoor[trio_sandbox.FileChanges]):
    """The changes of a watched file or directory, in order. Made by `Sandbox.watch`.

    See `trio_sandbox.FileChanges`.
    """

    __slots__ = ()

    async def __aenter__(self) -> FileChanges:
        return self  # noqa: ASYNC910 - as where it comes from

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def receive(self) -> FileChange:
        """Wait for the next change. Cancelled: nothing is lost.

        See `trio_sandbox.FileChanges.receive`.
        """
        return FileChange(self._portal, await self._call(self._inner.receive))

    def __aiter__(self) -> FileChanges:
        return self

    async def __anext__(self) -> FileChange:
        return FileChange(self._portal, await self._next(self._inner.__anext__))

    def close(self) -> None:
        """Stop watching, at once."""
        self._now(self._inner.close)
