"""Paths in the guest, with the vocabulary of `trio.Path`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import chain
from operator import index
from pathlib import Path, PurePosixPath
from typing import TypeAlias, final, overload

import trio

from ..constants import MAXIMUM_LINE_BYTES, MAXIMUM_READ_BYTES
from ..guest.trees import CHUNK, HEADER
from ._file import GuestFile
from ._files import CONTENT, END, REPLY, FileSession, call, encode_request, open_session, parse_path
from ._open import BinaryMode, TextMode, open_file
from ._slot import Slot
from ._status import HIGHEST_MODE, parse_stat
from ._text import GuestTextFile, check_newline, decode_text
from ._walk import Walk

#: What a path that leads nowhere fails with, which for `exists` and its like is an answer: as in pathlib.
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


#: What may stand for a path in the guest.
AnyGuestPath: TypeAlias = "str | PurePosixPath | GuestPath"


@final
class GuestPath:
    """A path in the guest, like `trio.Path` on the host. Made by `Sandbox.path`.

    Methods that only compute are sync, like those of `pathlib.PurePosixPath`. Methods that ask the guest are async, and
    raise the `OSError` that they would raise on the host, with errno and filename.

    It has the rights of its user. A relative path starts at that user's home directory.

    It can be an argument of a process, and the directory of a run or a process; there it means `absolute`. It is not
    `os.PathLike`, on purpose: ``open(path)`` would open a file of that name on the *host*.

    All async methods also raise:

    - `SandboxClosedError`: the sandbox is closed or its VM gone; nothing was sent.
    - `OutcomeUnknownError`: the VM, or the helper in it that touches files, ended meanwhile.
    - `GuestProtocolError`: the guest broke the protocol; its VM was ended.

    A cancelled method may have had its effect, unless its own description says more. It has no effect later: it waits until the guest is
    done with it, two seconds at most.
    """

    __slots__ = ("_path", "_slot", "_user")

    def __init__(self, slot: Slot, user: str | int | None, path: PurePosixPath) -> None:
        self._slot = slot
        self._user = user
        self._path = path

    def _like(self, path: PurePosixPath) -> GuestPath:
        return GuestPath(self._slot, self._user, path)

    # --- What needs no guest ---

    def __str__(self) -> str:
        return str(self._path)

    def __repr__(self) -> str:
        user = "" if self._user is None else f", user={self._user!r}"
        return f"<trio_sandbox.GuestPath {str(self._path)!r}{user}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GuestPath):
            return NotImplemented
        return (self._path, self._user) == (other._path, other._user) and self._slot is other._slot

    def __hash__(self) -> int:
        return hash((self._path, self._user))

    def __lt__(self, other: GuestPath) -> bool:
        return self._path < other._path

    def __truediv__(self, other: AnyGuestPath) -> GuestPath:
        return self._like(self._path / _pure(other))

    @property
    def user(self) -> str | int | None:
        """Whose rights it has; None for the guest's ordinary user."""
        return self._user

    @property
    def pure(self) -> PurePosixPath:
        """The path as a `pathlib.PurePosixPath`."""
        return self._path

    @property
    def parts(self) -> tuple[str, ...]:
        """Like `pathlib.PurePath.parts`."""
        return self._path.parts

    @property
    def name(self) -> str:
        """Like `pathlib.PurePath.name`."""
        return self._path.name

    @property
    def stem(self) -> str:
        """Like `pathlib.PurePath.stem`."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """Like `pathlib.PurePath.suffix`."""
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        """Like `pathlib.PurePath.suffixes`."""
        return self._path.suffixes

    @property
    def parent(self) -> GuestPath:
        """Like `pathlib.PurePath.parent`."""
        return self._like(self._path.parent)

    @property
    def parents(self) -> tuple[GuestPath, ...]:
        """Like `pathlib.PurePath.parents`."""
        return tuple(map(self._like, self._path.parents))

    def joinpath(self, *others: AnyGuestPath) -> GuestPath:
        """Like `pathlib.PurePath.joinpath`."""
        return self._like(self._path.joinpath(*map(_pure, others)))

    def with_name(self, name: str) -> GuestPath:
        """Like `pathlib.PurePath.with_name`."""
        return self._like(self._path.with_name(name))

    def with_stem(self, stem: str) -> GuestPath:
        """Like `pathlib.PurePath.with_stem`."""
        return self._like(self._path.with_stem(stem))

    def with_suffix(self, suffix: str) -> GuestPath:
        """Like `pathlib.PurePath.with_suffix`."""
        return self._like(self._path.with_suffix(suffix))

    def relative_to(self, other: AnyGuestPath) -> GuestPath:
        """Like `pathlib.PurePath.relative_to`."""
        return self._like(self._path.relative_to(_pure(other)))

    def is_relative_to(self, other: AnyGuestPath) -> bool:
        """Like `pathlib.PurePath.is_relative_to`."""
        return self._path.is_relative_to(_pure(other))

    def is_absolute(self) -> bool:
        """Like `pathlib.PurePath.is_absolute`."""
        return self._path.is_absolute()

    def match(self, pattern: str) -> bool:
        """Like `pathlib.PurePath.match`."""
        return self._path.match(pattern)

    # --- What is there ---

    async def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return its status; without *follow_symlinks*, that of a link itself."""
        async with self._session("stat") as session:
            await session.send(encode_request("stat", self, int(follow_symlinks)), end=True)
            return parse_stat(await session.reply())

    async def lstat(self) -> os.stat_result:
        """Return its status; of a link, that of the link itself."""
        return await self.stat(follow_symlinks=False)

    async def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it exists; a broken link does not, unless *follow_symlinks* is False."""
        return await self._mode(follow_symlinks=follow_symlinks) is not None

    async def is_file(self) -> bool:
        """Whether it is a regular file, or a link to one."""
        mode = await self._mode()
        return mode is not None and stat.S_ISREG(mode)

    async def is_dir(self) -> bool:
        """Whether it is a directory, or a link to one."""
        mode = await self._mode()
        return mode is not None and stat.S_ISDIR(mode)

    async def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        mode = await self._mode(follow_symlinks=False)
        return mode is not None and stat.S_ISLNK(mode)

    async def _mode(self, *, follow_symlinks: bool = True) -> int | None:
        try:
            return (await self.stat(follow_symlinks=follow_symlinks)).st_mode
        except OSError as exc:
            if exc.errno not in _NOWHERE:
                raise
            return None  # noqa: ASYNC910 - stat() is a checkpoint

    async def iterdir(self) -> Iterator[GuestPath]:
        """Return an iterator over the entries of this directory, in no order: ``for path in await directory.iterdir()``.

        Raises:
          OSError: also with EOVERFLOW if there are too many: some 250,000 names, fewer if they are long.

        """
        async with self._session("list") as session:
            batches = await Walk(session).entries(self._path)
        return map(self.__truediv__, chain.from_iterable(batches))

    async def glob(self, pattern: str) -> Iterator[GuestPath]:
        """Return an iterator over what *pattern* matches below, in no order.

        As in pathlib ``*``, ``?`` and ``[]`` match within one component, names with a leading dot included, and ``**``
        stands for any number of directories. A component that names or matches a link to a directory enters it; ``**`` does
        not. Directories that can't be read are skipped.

        Raises:
          ValueError: if the pattern is empty.
          NotImplementedError: if it is absolute.
          OSError: with EOVERFLOW if there is too much to look at: some 250,000 names and directories; and with
            ENAMETOOLONG for directories that are nested deeper than 128.

        """
        parts = PurePosixPath(pattern).parts
        if not parts:
            raise ValueError(f"a pattern must not be empty: {pattern!r}")
        if PurePosixPath(pattern).is_absolute():
            raise NotImplementedError("a pattern must be relative")
        async with self._session("glob") as session:
            found = await Walk(session).glob(self._path, list(parts))
        return (self._like(PurePosixPath(path)) for path in found)

    async def rglob(self, pattern: str) -> Iterator[GuestPath]:
        """Return an iterator over what *pattern* matches in this directory and all below; see `glob`."""
        return await self.glob(f"**/{pattern}")

    async def readlink(self) -> GuestPath:
        """Return where a symbolic link leads."""
        return self._like(parse_path(await self._call("readlink", self)))

    async def absolute(self) -> GuestPath:
        """Return the absolute path: a relative one starts at the home directory of its user."""
        if self._path.is_absolute():
            await trio.lowlevel.checkpoint()
            return self
        return self._like(parse_path(await self._call("resolve", ".", 0)) / self._path)

    async def resolve(self, *, strict: bool = False) -> GuestPath:
        """Return the absolute path without links and ``..``; with *strict* it must exist."""
        return self._like(parse_path(await self._call("resolve", self, int(strict))))

    # --- Making and removing ---

    async def mkdir(  # noqa: ASYNC910 - the request is a checkpoint
        self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory, like `pathlib.Path.mkdir`: *mode* is subject to the guest's umask of 022."""
        try:
            await self._call("mkdir", self, _mode(mode))
        except FileNotFoundError:
            if not parents or self.parent == self:
                raise
            await self.parent.mkdir(parents=True, exist_ok=True)
            await self.mkdir(mode, exist_ok=exist_ok)
        except OSError:
            # Not FileExistsError alone: whether that or another comes first is for the file system to say.
            if not exist_ok or not await self.is_dir():  # noqa: ASYNC120 - a caller that is cancelled wants no answer
                raise

    async def rmdir(self) -> None:
        """Remove a directory, which must be empty."""
        await self._call("rmdir", self)

    async def unlink(self, *, missing_ok: bool = False) -> None:  # noqa: ASYNC910 - the request is a checkpoint
        """Remove a file or a link; with *missing_ok* it need not exist."""
        try:
            await self._call("unlink", self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    async def touch(self, mode: int = 0o666, *, exist_ok: bool = True) -> None:
        """Make an empty file, or set the times of an existing one to now."""
        await self._call("touch", self, _mode(mode), int(exist_ok))

    async def rename(self, target: AnyGuestPath) -> GuestPath:
        """Rename to *target*, which is replaced if it is a file or an empty directory; return its path."""
        new = self._like(self._here(target))
        await self._call("rename", self, new)
        return new

    async def replace(self, target: AnyGuestPath) -> GuestPath:
        """The same as `rename`."""
        return await self.rename(target)

    async def chmod(self, mode: int) -> None:
        """Set the mode, following links; *mode* may include the bits for the kind of file that `stat` returns."""
        await self._call("chmod", self, _mode(mode))

    async def symlink_to(self, target: AnyGuestPath) -> None:
        """Make this path a symbolic link to *target*."""
        await self._call("symlink", _pure(target), self)

    async def hardlink_to(self, target: AnyGuestPath) -> None:
        """Make this path another name of the file *target*."""
        await self._call("link", self._here(target), self)

    # --- Content ---

    async def read_bytes(self) -> bytes:
        """Return the content of a regular file.

        Raises:
          OSError: also with EFBIG if it is longer than `constants.MAXIMUM_READ_BYTES`, since a guest's file may be endless:
            use `open` or `Sandbox.download`. With EOPNOTSUPP, at once, for a named pipe, a device or a socket, which may never
            have anything to read: use `open`.

        """
        content = bytearray()
        async with self._regular("read_bytes") as session:
            await session.send(encode_request("get", self), end=True)
            while True:
                tag, payload = await session.receive()
                if tag == REPLY:
                    return bytes(content)
                if tag != CONTENT:
                    raise session.violation(f"a record {tag!r} where content was expected")
                content += payload
                if len(content) > MAXIMUM_READ_BYTES:
                    raise OSError(
                        errno.EFBIG,
                        f"longer than {MAXIMUM_READ_BYTES} bytes: use GuestPath.open() or Sandbox.download()",
                        str(self),
                    )

    async def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        r"""Return the content as text; ``\r\n`` and ``\r`` become ``\n``.

        Raises:
          OSError: as `read_bytes`; and with EFBIG if the text takes more memory than that: with characters beyond U+00FF,
            each of its characters takes 2 or 4 bytes.
          UnicodeDecodeError: as `bytes.decode`.

        """
        return await decode_text(await self.read_bytes(), encoding, errors, str(self))

    async def write_bytes(self, data: bytes | bytearray | memoryview) -> int:
        """Replace the content by *data*, or make the file; return how many bytes that was.

        An existing file must be a regular one, and writable. It keeps its owner, group, mode and attributes, whoever writes.
        As a rule a new file is written beside it and replaces it, so the change is atomic. If a new file can't be the same
        (the old one belongs to another user, has several names, a special mode or attributes, is a mount point, or its
        directory is not writable), the content is copied into the existing file after all of it has arrived; readers may see
        a part of it, and a full disk may leave a part of it. A symbolic link stays, and its target is written.

        Cancelled: the file has all of the old content or all of the new; temporary files are removed.

        Raises:
          OSError: also with EOPNOTSUPP, at once, for a named pipe, a device or a socket: use `open`.

        """
        view = memoryview(data).cast("B")
        async with self._regular("write_bytes") as session:
            try:
                await session.send(encode_request("put", self))
                for start in range(0, len(view), CHUNK):
                    chunk = view[start : start + CHUNK]
                    await session.send(b"".join((HEADER.pack(CONTENT, len(chunk)), chunk)))
                await session.send(HEADER.pack(END, 0), end=True)
                await session.reply()
            except BaseException:
                await session.take_back()  # noqa: ASYNC102 - it is shielded and bounded by itself
                raise
        return len(view)

    async def write_text(
        self, data: str, encoding: str = "utf-8", errors: str = "strict", newline: str | None = None
    ) -> int:
        r"""Replace the content by text, as `write_bytes` does; return how many characters that was.

        Args:
          data: The text.
          encoding: How it is encoded.
          errors: What to do with characters that *encoding* lacks, as for `open`.
          newline: What to write for ``\n``; None: just that.

        """
        if not isinstance(data, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"data must be str, not {type(data).__name__}")
        check_newline(newline)
        text = data if newline in (None, "", "\n") else data.replace("\n", newline or "\n")
        await self.write_bytes(text.encode(encoding, errors))
        return len(data)

    @overload
    async def open(self, mode: BinaryMode, *, limit: int = MAXIMUM_LINE_BYTES) -> GuestFile: ...
    @overload
    async def open(
        self,
        mode: TextMode = "r",
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
        limit: int = MAXIMUM_LINE_BYTES,
    ) -> GuestTextFile: ...

    async def open(
        self,
        mode: str = "r",
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
        limit: int = MAXIMUM_LINE_BYTES,
    ) -> GuestFile | GuestTextFile:
        r"""Open the file: ``async with await path.open("rb") as file``.

        Each open file is one process in the guest while it is open. Opening a named pipe waits for its other end, as on the
        host.

        Args:
          mode: One of r, w, a and x, with + for both directions and b for bytes, as for `open`.
          encoding: Of text.
          errors: What to do with what can't be decoded or encoded, as for `open`.
          newline: As for `open`: None reads every kind of line end as ``\n``.
          limit: The longest line, in bytes or in characters of text, at least 1. A longer one raises `OSError` with EFBIG
            from ``async for`` and `GuestFile.readline`: a guest's line may be endless.

        """
        return await open_file(
            self._slot, self._user, str(self), mode, encoding=encoding, errors=errors, newline=newline, limit=limit
        )

    def _here(self, path: AnyGuestPath) -> PurePosixPath:
        if isinstance(path, GuestPath):
            check_slot(path, self._slot)
        return _pure(path)

    def _call(self, operation: str, *fields: object) -> Awaitable[bytes]:
        return call(self._slot, self._user, f"{operation} of {str(self)!r:.200}", operation, *fields)

    @asynccontextmanager
    async def _regular(self, operation: str) -> AsyncGenerator[FileSession]:
        """Open a session for what is done to regular files only."""
        try:
            async with self._session(operation) as session:
                yield session
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            reason = "it is a named pipe, a device or a socket, which may wait for ever; use GuestPath.open()"
            raise OSError(exc.errno, reason, exc.filename) from None

    def _session(self, operation: str) -> AbstractAsyncContextManager[FileSession]:
        return open_session(self._slot, self._user, f"{operation} of {str(self)!r:.200}")


def check_slot(path: GuestPath, slot: Slot) -> None:
    """Refuse a path in another sandbox, where the same name is another file."""
    if path._slot is not slot:  # pyright: ignore[reportPrivateUsage]
        raise ValueError(f"{path!r} is a path in another sandbox; say {str(path)!r} for the same place in this one")


def _pure(path: AnyGuestPath) -> PurePosixPath:
    check_guest_path(path)
    return path.pure if isinstance(path, GuestPath) else PurePosixPath(path)


def check_guest_path(path: AnyGuestPath) -> None:
    """Refuse what is no path in the guest: the rule for every argument that is one. A path of the host's is none."""
    if isinstance(path, (Path, trio.Path)):
        raise TypeError(
            f"{path!r} is a path on the host, but a path in the guest is needed; if it is one, say PurePosixPath({str(path)!r})"
        )
    if not isinstance(path, (str, PurePosixPath, GuestPath)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a path in the guest must be str, PurePosixPath or GuestPath, not {type(path).__name__}")


def _mode(mode: int) -> int:
    number = index(mode)  # TypeError for what is no whole number: the guest would read "600" as if it was decimal
    if not 0 <= number <= HIGHEST_MODE:
        raise ValueError(f"`mode` must be from 0 to {HIGHEST_MODE:#o}, not {number:#o}")
    return number
