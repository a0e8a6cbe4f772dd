"""Saved sandboxes on their way from one host to another: what one consists of, by digests, and taking it piece by piece.

What it stands on comes along. Of what comes nothing is believed: each file is compared with its digest before the sandbox has its name.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol, final

import attrs
import trio

from .._config import Progress
from .._errors import TemplateError, TemplateExistsError, TemplateUnusableError, UnknownTemplateError
from .._image import AnyImage
from ..image import BuiltImage, Cargo, Receive, StoredFile, SystemDisk, copy_file, describe_files, reading
from ..qemu import FROZEN_MODE, HEAD_BYTES, Qcow2FormatError, check_strangers_header, forget_backing_file
from ._named import NamedTemplate, NamedTemplateStore, StagedTemplate
from ._templates import sync_files

_STAGE: Final = "fetching it from another node"
#: Of all but the RAM's file, which QEMU's user opens by its name.
_MODE: Final = 0o600


class Images(Protocol):
    """What saved sandboxes stand on; `HostImages` is one."""

    async def has(self, image: AnyImage) -> bool:
        """Tell whether an image is there and intact."""
        ...

    def hold(
        self, image: AnyImage, saved: NamedTemplate | None = None
    ) -> AbstractAsyncContextManager[tuple[BuiltImage, SystemDisk]]:
        """Keep an image for a block."""
        ...

    def lend(self, image: AnyImage) -> AbstractAsyncContextManager[tuple[Cargo, tuple[Path, ...]]]:
        """Yield what an image consists of, and the directories of that by their numbers."""
        ...

    async def take(self, cargo: Cargo, open_file: Callable[[int, str], Receive]) -> None:
        """Take what an image consists of."""
        ...


@final
@attrs.frozen
class SavedCargo:
    """What a saved sandbox consists of: values only, to be sent. Made by `SavedExchange.lend`."""

    template: NamedTemplate
    """What it is. Its directory is the other host's."""
    files: tuple[tuple[str, StoredFile], ...]
    """Its files, by name."""
    image: Cargo
    """What it stands on."""


@final
class SavedExchange:
    """Lends and takes the saved sandboxes of one host.

    Args:
      named: Where they are.
      images: The images of the same cache.
      check: Raises `TemplateUnusableError` if no machine of the host could go on from one; see `Launcher.check_saved`.
      progress: Told what is going on; must not block.

    """

    def __init__(
        self,
        named: NamedTemplateStore,
        images: Images,
        check: Callable[[BuiltImage, SystemDisk, NamedTemplate], object],
        progress: Callable[[Progress], object],
    ) -> None:
        self._named = named
        self._images = images
        self._check = check
        self._progress = progress

    @asynccontextmanager
    async def lend(self, name: str, marker: bytes) -> AsyncGenerator[tuple[SavedCargo, tuple[Path, ...]]]:
        """Yield what the saved sandbox of a name consists of, and the directories of that by their numbers; its own is the last.

        Raises:
          UnknownTemplateError: if it is not there, or another has its name by now.
          TemplateUnusableError: if it is damaged.
          ImageError: if what it stands on can't be moved.
          OSError: if it can't be read.

        """
        saved = await trio.to_thread.run_sync(self._named.find, name)
        if saved.marker != marker:
            raise UnknownTemplateError(f"the saved sandbox {name!r} was replaced meanwhile")
        async with self._images.lend(saved.image) as (image, directories):
            names = [path.name for path in saved.files]
            files = await trio.to_thread.run_sync(describe_files, saved.directory, names, limiter=reading())
            yield SavedCargo(saved, tuple(files.items()), image), (*directories, saved.directory)

    async def take(self, cargo: SavedCargo, open_file: Callable[[int, str], Receive]) -> None:
        """Take a saved sandbox, and what it stands on, but for what is there. Cancelled or failed, it leaves whole images only.

        Args:
          cargo: What it consists of.
          open_file: Returns where a file comes from: the number of its directory, as of `lend`, and its name.

        Raises:
          TemplateUnusableError: if no machine here could go on from it. Nothing of it was fetched, but maybe the image.
          TemplateExistsError: if there is another of that name.
          TemplateError: if it is damaged, or nothing can be saved here.
          ImageCorruptError: if what came is not what *cargo* says.
          ImageError: besides, as `take_cargo`.
          OSError: if there is no room for it.
          Exception: what *open_file*, and what it returns, raises.

        """
        template = cargo.template
        wanted = dict(cargo.files)
        if template.layer_count > len(wanted) or set(wanted) != {path.name for path in template.files}:
            raise TemplateError(f"the saved sandbox {template.name!r} of another node is damaged: it has other files")
        if await self._is_there(template):
            return
        if not await self._images.has(template.image):
            await self._images.take(cargo.image, open_file)
        async with self._images.hold(template.image, template) as disks:
            await trio.to_thread.run_sync(self._check, *disks, template)
            taken: TemplateExistsError | None = None
            room = sum(file.size for file in wanted.values()) // 2**20
            try:
                with self._named.make(template.name, memory_mib=room) as staged:
                    await self._fill(staged, cargo, open_file)
            except TemplateExistsError as exc:
                taken = exc
            if taken is not None and not await self._is_there(template):  # or another program has fetched it meanwhile
                raise taken

    async def _fill(self, staged: StagedTemplate, cargo: SavedCargo, open_file: Callable[[int, str], Receive]) -> None:
        """Have what is being made consist of what comes."""
        here, wanted = attrs.evolve(cargo.template, directory=staged.directory), dict(cargo.files)
        whole, done = sum(file.size for file in wanted.values()), 0
        for path in here.files:
            size = wanted[path.name].size

            def report(fraction: float, size: int = size, before: int = done) -> None:
                self._progress(Progress(f"saved {here.name}", _STAGE, (before + fraction * size) / whole))

            receive = open_file(len(cargo.image.layers) + 1, path.name)
            await _take_file(receive, path, wanted[path.name], here, report)
            done += size
        await trio.to_thread.run_sync(sync_files, here.files)
        staged.template = here

    async def _is_there(self, template: NamedTemplate) -> bool:
        try:
            found = await trio.to_thread.run_sync(self._named.find, template.name)
        except (UnknownTemplateError, TemplateUnusableError):
            return False  # noqa: ASYNC910 - it was looked for in a thread
        return found.marker == template.marker


async def _take_file(
    receive: Receive, path: Path, wanted: StoredFile, template: NamedTemplate, report: Callable[[float], object]
) -> None:
    complaint = f"{path.name} of the saved sandbox {template.name!r} is not what was saved"
    with await trio.to_thread.run_sync(_create, path, FROZEN_MODE if path == template.memory else _MODE) as file:
        await copy_file(receive, file, wanted, complaint, report)
    if path in template.layers:
        await trio.to_thread.run_sync(_check_layer, path, template.name)


def _create(path: Path, mode: int) -> BinaryIO:
    file = path.open("x+b")
    os.fchmod(file.fileno(), mode)
    return file


def _check_layer(path: Path, name: str) -> None:
    """Have a disk name no other file, and refuse one that QEMU should not open."""
    try:
        forget_backing_file(path)
        with open(path, "rb") as file:
            check_strangers_header(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size)
    except Qcow2FormatError as exc:
        raise TemplateError(f"a disk of the saved sandbox {name!r}, from another node, can't be used: {exc}") from exc
