"""The directory of a store: what is in it, who stands on whom, and how something leaves it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, final

import trio

from .._errors import ImageBuildError, ImageError
from .._private import check_trusted, make_private_directory
from ..qemu import is_marked, is_own_directory, mark
from ._build import find_leftovers, remove_leftovers
from ._choices import CHOICE_NAME, choices_of
from ._entry import ENTRY_NAME, below_of, disk_usage, is_disk, name_of, try_to_read
from ._lock import open_lock, try_lock, try_lock_directory
from ._manifest import MANIFEST_NAME
from ._stored import IMAGE_NAME
from .oci import NOTE_NAME, read_note

#: Seconds after which a file that is half-written is nobody's any more; it has some kilobytes.
_WRITTEN_SECONDS: Final = 3600.0


@final
class Shelf:
    """The directory of a store, which any number of processes may share. Making the object touches nothing.

    Args:
      directory: Which, absolute.

    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """The whole cache, in which templates and saved sandboxes are, too."""
        self.store = directory / "store"
        """For the entries."""
        self.staging = directory / "staging"
        """For what is being made, and for what is being removed."""
        self.pylocks = directory / "pylocks"
        """For locks that were made of requirements."""
        self.containers = directory / "containers"
        """For notes on which container image a name stood for when it was fetched."""

    def lock(self, name: str) -> Path:
        """Return the file whose lock whoever makes something called *name* has."""
        return self.directory / "locks" / name

    def entries(self) -> Generator[Path]:
        """Give what the store holds, damaged or not, but nothing that somebody else has put there."""
        for path in sorted((self.directory / "store").glob("*-*")):
            manifest = is_own_directory(path) and (path / MANIFEST_NAME).is_file()
            if ENTRY_NAME.fullmatch(path.name) and (manifest or is_marked(path)):
                yield path

    def standing_on(self, found: Iterable[Path]) -> tuple[Path, ...]:
        """Return the layers that stand on *found*, directly or not: the highest first."""
        found = set(found)
        contents = {manifest.files[IMAGE_NAME].sha256 for manifest in map(try_to_read, found) if is_disk(manifest)}
        above = tuple(
            entry
            for entry in self.entries()
            if entry not in found and below_of(try_to_read(entry)).get("content") in contents
        )
        return (*self.standing_on(above), *above) if above else ()

    def make_directories(self) -> None:
        """Make what is missing of it.

        Raises:
          ImageBuildError: if that can't be, or if it can't be written.

        """
        try:
            # Users that may only read it may share a store. What a build is making is nobody else's to see.
            make_private_directory(self.store, 0o755)
            make_private_directory(self.directory / "locks")
            make_private_directory(self.staging)
            for directory in (self.directory / "store", self.directory / "locks", self.staging):
                if not os.access(directory, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(directory))
        except OSError as exc:
            raise ImageBuildError(
                f"the cache directory {self.directory} can't be written ({exc.strerror}: {exc.filename});"
                f" choose another with HostConfig.cache_dir, --cache-dir or XDG_CACHE_HOME"
            ) from exc

    def check_trusted(self) -> None:
        """Refuse a directory in which somebody else can have put something.

        Raises:
          ImageError: which says what and why.

        """
        top = self.directory
        try:
            ours = "store", "locks", "staging", "templates", "saved", "pylocks", "containers"
            check_trusted(top, *(top / name for name in ours))
        except OSError as exc:
            raise ImageError(
                f"the cache directory {top} can't be used: {exc.filename} is {exc.strerror}."
                f" HostConfig.cache_dir, --cache-dir or XDG_CACHE_HOME choose another"
            ) from exc

    async def remove(self, entry: Path) -> int:
        """Remove an entry, whoever stands on it, once nobody makes it; return the bytes that came free."""
        self.check_trusted()
        self.make_directories()
        async with open_lock(self.lock(name_of(entry)), on_wait=lambda: None):
            return await self._take_away(entry)

    async def remove_unused(self, entry: Path, is_needed: Callable[[Path], bool]) -> int:
        """Remove an entry unless somebody stands on it, or makes it; return the bytes that came free."""
        self.check_trusted()
        self.make_directories()
        with try_lock(self.lock(name_of(entry))) as nobody_makes_it, suppress(FileNotFoundError):
            # Looked at only with the lock: whoever had it may have made what stands on this.
            with try_lock_directory(entry) as nobody_holds_it:
                if nobody_makes_it and nobody_holds_it and not self.standing_on([entry]) and not is_needed(entry):
                    return await self._take_away(entry)
        return 0  # noqa: ASYNC910 - nothing was waited for

    async def _take_away(self, entry: Path) -> int:
        """Remove an entry; the caller holds the lock of its name."""
        name = name_of(entry)
        freed = disk_usage(entry)
        mark(entry)  # those of earlier versions have only their manifest
        # Gone at once for everybody else, however long the files take.
        os.rename(entry, self.staging / f"{name}.removed-{os.urandom(8).hex()}")
        await remove_leftovers(self.staging, name, {})
        return freed

    async def clear(self, entries: Sequence[Path], is_needed: Callable[[Path], bool], wanted: float) -> int:
        """Remove those of *entries* that nobody stands on, in that order, until *wanted* bytes came free; return how many did."""
        freed = 0
        while entries:
            left: list[Path] = []
            for entry in entries:
                if freed < wanted:
                    freed += await self.remove_unused(entry, is_needed)
                if entry.exists():
                    left.append(entry)
            if left == entries:
                break
            entries = left  # what is gone may have been all that stood on one of them
        return freed  # noqa: ASYNC910 - there may be nothing to remove

    async def remove_leftovers(self, environment: Mapping[str, str]) -> int:
        """Remove what killed builds left; return the bytes that came free.

        A build that is going on in another process is left alone.

        Args:
          environment: What children need in theirs, for whoever owns them.

        Raises:
          OSError: if something can't be removed.

        """
        await trio.lowlevel.checkpoint()
        freed = 0
        for name in sorted({leftover.name.partition(".")[0] for leftover in find_leftovers(self.staging)}):
            with try_lock(self.lock(name)) as held:
                if held:
                    freed += sum(disk_usage(leftover) for leftover in find_leftovers(self.staging, name))
                    await remove_leftovers(self.staging, name, environment)
        return freed

    def remove_notes(self) -> int:
        """Remove the choices that no layer was made by, and what names stood for whose container images are gone."""
        manifests = [try_to_read(entry) for entry in self.entries()]
        used = {name for manifest in manifests for name in choices_of(manifest)}
        stored = {str(manifest.details.get("container")) for manifest in manifests}
        freed = 0
        for file in (*self.pylocks.glob("*-*"), *self.containers.glob("*container-*")):
            if CHOICE_NAME.fullmatch(file.name):
                is_needed = file.name in used
            elif NOTE_NAME.fullmatch(file.name):
                is_needed = read_note(file).manifest in stored
            else:
                is_needed = _age(file) < _WRITTEN_SECONDS  # somebody may be about to give it its name
            with suppress(FileNotFoundError):  # another process is doing the same
                if not is_needed:
                    freed += disk_usage(file)
                    file.unlink()
        return freed


def _age(path: Path) -> float:
    """Return the seconds since a file was written; 0 if it is gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
