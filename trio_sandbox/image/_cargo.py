"""An image, and what boots it, on its way from one store to another: what it consists of, by digests, and taking it piece by piece.

The same layers as those of an archive, and the same checks. The system disk comes along, so that one store has built all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._config import Progress
from .._errors import ImageBuildError, ImageError, PackagesError
from .._stored_json import parse_json
from ..qemu import Qcow2FormatError
from ._archive import Archive, ArchivedLayer, check_chain, check_references
from ._containers import references_of, take_references
from ._entry import entry_name
from ._exchange import check_fits, check_movable, locks_of, open_regular, take_locks
from ._imported import ImportedEntry, Receive
from ._manifest import Manifest, read_manifest
from ._store import ImageStore
from ._stored import IMAGE_NAME, BuiltImage, SystemDisk

#: Of one file of the system disk.
_LARGEST_FILE: Final = 4 * 2**30
_STAGE: Final = "fetching it from another node"


@final
@attrs.frozen
class Cargo:
    """What an image consists of: values only, to be sent. Made by `describe_cargo`."""

    system: str = attrs.field(repr=False)
    """The manifest of the system disk, as text."""
    layers: tuple[str, ...] = attrs.field(repr=False)
    """Those of the image's layers, the lowest first."""
    locks: tuple[tuple[str, str], ...] = attrs.field(default=(), repr=False)
    """What was chosen for requirements, by name."""
    times: tuple[tuple[tuple[str, int], ...], ...] = attrs.field(default=(), repr=False)
    """When the files of the system disk, and of each layer, were written to last, in nanoseconds."""
    references: tuple[str, ...] = ()
    """Names that a container image is known by."""


def entries_of(image: BuiltImage, system: SystemDisk) -> tuple[Path, ...]:
    """Return the directories of the store that a cargo is made of; the files of each are fetched by its number."""
    return (system.disk.parent, *image.entries)


def describe_cargo(store: ImageStore, image: BuiltImage, system: SystemDisk) -> Cargo:
    """Say what an image consists of; it must be held. Blocks: call it in a thread.

    Raises:
      ImageError: if it was built by a version of the library that did not make layers which can be moved.
      OSError: if it can't be read.

    """
    entries = entries_of(image, system)
    base, *manifests = [read_manifest(entry) for entry in entries]
    for entry, manifest in zip(image.entries, manifests, strict=True):
        with ExitStack() as stack:
            check_movable(manifest, stack.enter_context(open_regular(entry / IMAGE_NAME)))
    texts = [each.to_json() for each in manifests]
    times = [
        tuple((name, (entry / name).stat().st_mtime_ns) for name in manifest.files)
        for entry, manifest in zip(entries, (base, *manifests), strict=True)
    ]
    references = references_of(store, manifests[0].details)
    return Cargo(base.to_json(), tuple(texts), tuple(locks_of(store, manifests)), tuple(times), tuple(references))


async def take_cargo(
    store: ImageStore,
    cargo: Cargo,
    open_file: Callable[[int, str], Receive],
    *,
    progress: Callable[[Progress], object],
    environment: Mapping[str, str],
) -> None:
    """Take an image into a store, but for what is there.

    Each file is compared with its digest before anything has its name in the store. Cancelled or failed, it leaves whole entries only.

    Args:
      store: Where it belongs.
      cargo: What it consists of.
      open_file: Returns where a file comes from: its entry's number, as of `entries_of`, and its name.
      progress: Told what is going on; must not block.
      environment: Goes into the environment of every child process.

    Raises:
      ImageCorruptError: if what came is not what *cargo* says.
      ImageBuildError: if there is no room for it, or the store can't be written.
      ImageError: if it is of another version of the library; or if another build of an image that layers stand on is in the store already.
      Exception: what *open_file*, and what it returns, raises.

    """
    manifests = await trio.to_thread.run_sync(_check, store, cargo)
    _, image, *_ = manifests
    for number, manifest in enumerate(manifests):
        entry = ImportedEntry(manifest, partial(open_file, number), _STAGE, dict(cargo.times[number]))
        try:
            await store.add(entry, progress=progress, environment=environment)
        except Qcow2FormatError as exc:
            raise ImageError(f"the disk of {manifest.name}, from another node, can't be used: {exc}") from exc
    take_locks(store, dict(cargo.locks))
    await take_references(store, image, cargo.references)


def _check(store: ImageStore, cargo: Cargo) -> list[Manifest]:
    """Return the manifests of what can be taken, which there is room for. Blocks; errors are those of `take_cargo`."""
    try:
        system, layers = _parse(cargo.system), [_parse(text) for text in cargo.layers]
        _check_system(store, system)
        check_chain(layers)
        check_references(layers[0], cargo.references)
        check_fits(store, Archive(tuple(ArchivedLayer(each, 0) for each in layers), dict(cargo.locks)))
    except (ValueError, PackagesError) as exc:
        raise ImageError(f"the image of another node can't be used here, and nothing was fetched: {exc}") from exc
    manifests = [system, *layers]
    if len(cargo.times) != len(manifests):
        raise ImageError("the image of another node can't be used here, and nothing was fetched: it is damaged")
    _check_room(store, manifests)
    return manifests


def _parse(text: str) -> Manifest:
    return Manifest.from_value(parse_json(text.encode()))


def _check_system(store: ImageStore, manifest: Manifest) -> None:
    """Make sure that it is what this version of the library boots.

    Raises:
      ValueError: if not.

    """
    recipe = store.system
    if (manifest.name, manifest.digest) != (recipe.name, recipe.digest()):
        raise ValueError("it boots from the system disk of another version of trio-sandbox")
    if set(manifest.files) != set(recipe.files) or any(file.size > _LARGEST_FILE for file in manifest.files.values()):
        raise ValueError("its system disk has other files, or one that is too large")


def _check_room(store: ImageStore, manifests: Sequence[Manifest]) -> None:
    """Say so before anything is fetched if there is no room for it.

    Raises:
      ImageBuildError: which says what is missing.

    """
    store.make_directories()
    there = {entry.path.name for entry in store.list()}
    missing = [each for each in manifests if entry_name(each.name, each.digest) not in there]
    wanted = sum(file.size for manifest in missing for file in manifest.files.values())
    status = os.statvfs(store.directory)
    free = status.f_bavail * status.f_frsize
    if wanted > free:
        raise ImageBuildError(
            f"the disk of {store.directory} has {free >> 20} MiB free, and the image of another node takes {wanted >> 20} MiB; nothing was "
            "fetched. Free some (`trio-sandbox image prune`), or use another cache directory, and try again"
        )
