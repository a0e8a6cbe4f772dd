"""Entries that come from another store, of which nothing is believed: each file is compared with its digest before it has a name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, final

import attrs
import trio

from .._errors import ImageCorruptError
from ..qemu import HEAD_BYTES, Qcow2FormatError, check_strangers_header
from ._manifest import Manifest, StoredFile
from ._recipe import BuildContext, StandsAlone
from ._stored import IMAGE_NAME

#: Bytes that are copied between two looks whether to go on.
PIECE: Final = 2**20

#: Returns the next bytes of a file, b"" at its end.
Receive = Callable[[], Awaitable[bytes]]


def receive_from(file: BinaryIO) -> Receive:
    """Return what reads a file from where it is."""
    return partial(trio.to_thread.run_sync, partial(file.read, PIECE))


def create(path: Path) -> BinaryIO:
    """Make a new file."""
    return open(path, "x+b")


async def copy_file(
    receive: Receive,
    target: BinaryIO,
    wanted: StoredFile,
    complaint: str,
    report: Callable[[float], object] | None = None,
) -> None:
    """Write a file to *target*; what comes behind its end is not looked at.

    Args:
      receive: Where it comes from.
      target: Open for writing.
      wanted: What it is to be.
      complaint: What to say if it is not.
      report: Told how much of it is there, from 0 to 1.

    Raises:
      ImageCorruptError: if it is something else; what was written is of no use.
      Exception: what *receive* raises.

    """
    digest, left = hashlib.sha256(), wanted.size
    while left and (piece := (await receive())[:left]):
        left -= len(piece)
        digest.update(piece)
        if piece.count(0) == len(piece) and target.seekable():
            target.seek(len(piece), os.SEEK_CUR)  # it stays a hole
        else:
            await trio.to_thread.run_sync(target.write, piece)
        if report is not None:
            report(1 - left / wanted.size)
    target.truncate(target.tell())
    if left or digest.hexdigest() != wanted.sha256:
        raise ImageCorruptError(f"{complaint}: its digest is another")
    await trio.lowlevel.checkpoint()


def not_as_built(manifest: Manifest) -> str:
    """Say that a file of an entry is not what was built."""
    return f"the disk of {manifest.name} is not what was built"


@final
@attrs.frozen
class ImportedEntry(StandsAlone):
    """A recipe that takes an entry from elsewhere.

    Args:
      manifest: What the entry is to be.
      open_file: Returns where the file of a name comes from, from its beginning on.
      stage: What is said to be done.
      times: When files were written to last, in nanoseconds, by their names: a saved sandbox tells by that what it stands on.

    """

    manifest: Manifest
    open_file: Callable[[str], Receive] = attrs.field(eq=False)
    stage: str = "importing"
    times: Mapping[str, int] = attrs.field(factory=dict[str, int], eq=False)

    @property
    def name(self) -> str:
        """The entry's."""
        return self.manifest.name

    @property
    def files(self) -> tuple[str, ...]:
        """Those that the manifest says."""
        return tuple(self.manifest.files)

    def digest(self) -> str:
        """Return that of the recipe that it was built by."""
        return self.manifest.digest

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Copy the files, and look at a disk of QEMU's before anybody opens it."""
        whole = sum(file.size for file in self.manifest.files.values())
        context.report(self.stage, None)
        done = 0
        for name, file in self.manifest.files.items():

            def report(fraction: float, size: int = file.size, before: int = done) -> None:
                context.report(self.stage, (before + fraction * size) / whole)

            with await trio.to_thread.run_sync(create, context.output / name) as output:
                await copy_file(self.open_file(name), output, file, not_as_built(self.manifest), report)
                if name == IMAGE_NAME:
                    self._check_disk(output)
            if (time := self.times.get(name)) is not None:
                os.utime(context.output / name, ns=(time, time))
            done += file.size
        return self.manifest.details  # noqa: ASYNC910 - there is a file

    def _check_disk(self, file: BinaryIO) -> None:
        file.seek(0)
        info = check_strangers_header(file.read(HEAD_BYTES), self.manifest.files[IMAGE_NAME].size)
        wanted = self.manifest.details["virtual_size"]
        if info.virtual_size != wanted:
            raise Qcow2FormatError(f"it is a disk of {info.virtual_size} bytes, and not of {wanted}")
