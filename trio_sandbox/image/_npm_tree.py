"""Packages of Node.js, unpacked to where JavaScript in the guest finds them: /node_modules, which is above whatever asks.

An archive is input like any other: what it takes is bounded in bytes, in entries and in depth, its paths stay in the package's directory, and
nothing but directories and files comes out of it, as with npm.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, BinaryIO, Final, cast, final

from .._errors import PackagesError
from ._npm_lock import NpmPackage

#: Where packages are that others ask for by name, relative to /.
NODE_MODULES: Final = "node_modules"
#: Where programs are that were asked for, and the way from there to /.
_PROGRAMS, _UP = "usr/local/bin", "../../.."
#: Bytes and entries of all packages together, and directories one in another in a package.
_MOST_BYTES: Final = 4 * 2**30
_MOST_ENTRIES: Final = 500_000
_DEEPEST: Final = 64
#: Bytes of a name.
_LONGEST: Final = 255
#: Bytes that are read at once: names and attributes of an entry have no more.
_MOST_AT_ONCE: Final = 2**20


def unpack_npm(packages: Iterable[NpmPackage], archives: Mapping[str, Path], wanted: Iterable[str], root: Path) -> None:
    """Unpack packages below the new directory *root*, which is to be / in the guest. Blocks: call it in a thread.

    Args:
      packages: What to unpack; one that is in another's directory comes later.
      archives: By the packages' digests.
      wanted: The names of those whose programs are to be found by name.
      root: Where to.

    Raises:
      PackagesError: if an archive can't be unpacked, or takes too much.
      OSError: if a file can't be written.

    """
    budget = _Budget()
    names = {f"{NODE_MODULES}/{name}" for name in wanted}
    (root / _PROGRAMS).mkdir(parents=True)
    for package in packages:
        target = root / package.place
        try:
            _unpack(archives[package.sha512], target, budget)
        except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, ValueError) as exc:
            raise PackagesError(f"the archive of {package} can't be unpacked: {exc}. Nothing was installed") from exc
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
            raise PackagesError(
                f"the archive of {package} can't be unpacked: it has two things in one place. Nothing was installed"
            ) from exc
        _link_programs(package, root, by_name=package.place in names)
    for directory, below, _ in os.walk(root):
        for name in below:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755)


@final
class _Budget:
    """What is left for all packages together."""

    def __init__(self) -> None:
        self._bytes = _MOST_BYTES
        self._entries = _MOST_ENTRIES

    def take(self, *, size: int = 0, entries: int = 0) -> None:
        """Count something, or refuse it."""
        self._bytes -= size
        self._entries -= entries
        if self._bytes < 0:
            raise ValueError(f"the packages of one step may have {_MOST_BYTES >> 30} GiB together, unpacked")
        if self._entries < 0:
            raise ValueError(f"the packages of one step may have {_MOST_ENTRIES} files and directories together")


@final
class _Unpacked:
    """What an archive is when it is unpacked: each byte is counted, and none of it is read at the archive's own word."""

    def __init__(self, stream: gzip.GzipFile | BinaryIO, budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def tell(self) -> int:
        """Return the position."""
        return self._stream.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go on to a position, which is reading what is before it."""
        assert whence == os.SEEK_SET
        self._budget.take(size=max(0, offset - self._stream.tell()))
        return self._stream.seek(offset)

    def read(self, size: int = -1, /) -> bytes:
        """Read up to *size* bytes."""
        if not 0 <= size <= _MOST_AT_ONCE:
            raise ValueError("it has an entry with too long a name, or too many attributes")
        self._budget.take(size=size)
        return self._stream.read(size)


def _unpack(archive: Path, target: Path, budget: _Budget) -> None:
    target.mkdir(parents=True, exist_ok=True)
    # Compressed or not, as with npm.
    with archive.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file, mode="rb") if packed else file
        with stream:
            # It needs no more of a file than that.
            unpacked = cast("IO[bytes]", _Unpacked(stream, budget))
            with tarfile.open(fileobj=unpacked, mode="r:") as tar:
                for member in tar:
                    budget.take(entries=1)
                    _unpack_member(tar, member, target)


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    # What is on top has any name.
    parts = [part for part in member.name.split("/") if part not in ("", ".")][1:]
    if ".." in member.name.split("/") or "\0" in member.name:
        raise ValueError(f"it has the path {member.name!r:.200}, which leads out of the package")
    if any(len(os.fsencode(part)) > _LONGEST for part in parts):
        raise ValueError(f"it has the name {max(parts, key=len)!r:.60}, of more than {_LONGEST} bytes")
    if len(parts) > _DEEPEST:
        raise ValueError(f"it has more than {_DEEPEST} directories one in another")
    path = target.joinpath(*parts)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    elif member.isreg() and not member.issparse() and parts:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = tar.extractfile(member)
        assert content is not None
        # There are no links to follow: none was made.
        with content, open(path, "wb") as file:
            shutil.copyfileobj(content, file, 64 * 2**10)
        path.chmod(0o755 if member.mode & 0o111 else 0o644)


def _link_programs(package: NpmPackage, root: Path, *, by_name: bool) -> None:
    if package.place.count("node_modules/") > 1:
        return
    programs = root / NODE_MODULES / ".bin"
    for name, path in package.programs:
        relative = os.path.normpath(path)
        program = root / package.place / relative
        if relative.startswith(("/", "..")) or not program.is_file():
            continue
        program.chmod(0o755)
        programs.mkdir(exist_ok=True)
        place = f"{package.place}/{relative}"
        for link, target in [
            (programs / name, os.path.relpath(place, "node_modules/.bin")),
            *([(root / _PROGRAMS / name, f"{_UP}/{place}")] if by_name else []),
        ]:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
