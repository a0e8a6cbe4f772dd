"""Container images as entries of the store: checked, merged, and written to a disk for our guests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, final

import attrs
import trio
import trio.from_thread

from ..._errors import OciError
from .._mmdebstrap import run_tool
from .._recipe import BuildContext, StandsAlone, digest_of
from .._stored import IMAGE_NAME, ImageSettings
from ._contents import Contents
from ._ext4 import UNIT, write_file_system
from ._manifest import ContainerImage, read_container_image
from ._merge import MergeError, Merger
from ._tar import TarEntry, TarError, read_entries
from ._tree import TreeError
from ._unpack import MOST_BYTES, open_archive, unpack_layer

#: Raise it when what is made of the same layers becomes another disk.
_VERSION: Final = 1
#: What programs see as the size of the disk: as much as in our own images, or this many times what the layers have.
_LEAST_SIZE: Final = 8 * 2**30
_SPARE: Final = 2
#: What that can come to.
LARGEST_DISK: Final = _SPARE * MOST_BYTES + UNIT
#: Before the digits of its digest, in the name of a stored container image.
_NAME: Final = "oci+"
_NAME_DIGITS: Final = 12
_UNPACKING, _WRITING, _CONVERTING = 0.1, 0.6, 0.8


def container_digest(manifest: str) -> str:
    """Return the digest of the recipe for the container image whose manifest has that digest."""
    return digest_of("oci", _VERSION, manifest)


def container_name(digest: str) -> str:
    """Return the name of the container image whose recipe has that digest."""
    return f"{_NAME}{digest[:_NAME_DIGITS]}"


@final
@attrs.frozen(kw_only=True)
class OciRecipe(StandsAlone):
    """How to make the disk of a container image: a recipe for the store."""

    manifest: str
    """The digest of the image's manifest, which decides all."""
    reference: str = attrs.field(eq=False)
    """By what name it was asked for."""
    directory: Path | None = attrs.field(default=None, eq=False)
    """Where its files are; None: it is there, or can't be made."""

    @property
    def name(self) -> str:
        """What it can be called: each image has a name, and a lock, of its own."""
        return container_name(self.digest())

    @property
    def files(self) -> tuple[str, ...]:
        """The one disk."""
        return (IMAGE_NAME,)

    def digest(self) -> str:
        """Return the digest of the recipe."""
        return container_digest(self.manifest)

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the disk."""
        assert self.directory is not None
        image = await trio.to_thread.run_sync(read_container_image, self.directory)
        if image.digest != self.manifest:
            raise OciError(f"the manifest of the container image {self.reference} changed while it was read")
        archives: list[Path] = []
        room = MOST_BYTES
        for number, layer in enumerate(image.layers):
            fraction = _UNPACKING + (_WRITING - _UNPACKING) * number / len(image.layers)
            context.report(f"checking layer {number + 1} of {len(image.layers)}", fraction)
            archive = context.staging / f"layer{number}"
            archives.append(await unpack_layer(layer, self.directory, archive, room, context.environment))
            room -= archives[-1].stat().st_size
        context.report("merging the layers", _WRITING)
        raw, output = context.staging / "image.raw", context.output / IMAGE_NAME
        settings, languages, size = await trio.to_thread.run_sync(_write_disk, image, archives, raw)
        context.report("converting to qcow2", _CONVERTING)
        await run_tool(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", os.fspath(raw), os.fspath(output)],
            environment=context.environment,
        )
        return {
            "step": self.reference,
            "container": self.manifest,
            "settings": settings.to_value(),
            "languages": list(languages),
            "virtual_size": size,
        }


def _write_disk(image: ContainerImage, archives: list[Path], raw: Path) -> tuple[ImageSettings, tuple[str, ...], int]:
    """Merge layers into a file system; return how it is used, its languages, and its size."""
    with ExitStack() as stack:
        sources = [stack.enter_context(open_archive(archive)) for archive in archives]
        merger = Merger()
        try:
            for source in sources:
                merger.add_layer(_watched(source))
            contents = Contents(merger.tree, sources, image.configuration)
            settings = contents.complete()
            languages = contents.find_languages()
            unpacked = sum(len(source) for source in sources)
            size = max(_LEAST_SIZE, -(-_SPARE * unpacked // UNIT) * UNIT)
            with raw.open("xb", buffering=0) as file:
                write_file_system(
                    file.fileno(),
                    size,
                    merger.tree.root,
                    sources,
                    uuid=bytes.fromhex(image.digest)[:16],
                    check_cancelled=trio.from_thread.check_cancelled,
                )
        except (MergeError, TarError, TreeError) as exc:
            raise OciError(f"the container image can't be unpacked: {exc}") from exc
        return settings, languages, size


def _watched(source: bytes | memoryview) -> Iterator[TarEntry]:
    for number, entry in enumerate(read_entries(source)):
        if not number % 1000:
            trio.from_thread.check_cancelled()
        yield entry
