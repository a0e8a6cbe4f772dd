"""Images from one store to another, by way of a file: all layers of one, with what proves that they are what was built."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio

from .._config import Progress
from .._errors import ImageError, ImageMissingError, PackagesError
from .._oci_reference import is_oci, parse_oci
from .._private import make_private_directory, write_new_file
from ..qemu import HEAD_BYTES, Qcow2FormatError, check_strangers_header
from ._archive import Archive, archive_parts, read_archive
from ._choices import choices_of, is_choice
from ._containers import ensure_container, references_of, take_references
from ._entry import entry_name, is_container
from ._imported import ImportedEntry, Receive, copy_file, not_as_built, receive_from
from ._layer import LAYER_MARK, layer_name
from ._manifest import Manifest, read_manifest
from ._new_file import NewFile
from ._store import ImageStore
from ._stored import IMAGE_NAME, BuiltImage


async def export_image(store: ImageStore, name: str, target: Path) -> int:
    """Write an image and all that it stands on to a new file; return the file's size.

    Nobody evicts it meanwhile. Cancelled, failed or killed, it leaves no file.

    Args:
      store: Where the image is.
      name: Its name: that of a layer, or of an image without one, which can be one of a container's.
      target: The file; there must be none of that name.

    Raises:
      UnknownImageError, ImageMissingError, ImageCorruptError: if it is not there, or damaged.
      ImageError: if it was built by a version of the library that did not make layers which can be moved.
      OciError: if it is the name of a container image in a file that is not there.
      OSError: if the file is there, or can't be written.

    """
    image = await _find(store, name)
    with store.hold(image.entries) as held, ExitStack() as stack:
        if not held:
            raise ImageMissingError(f"the image {name!r} was removed just now")
        manifests = [read_manifest(entry) for entry in image.entries]
        disks = [stack.enter_context(open_regular(entry / IMAGE_NAME)) for entry in image.entries]
        for manifest, disk in zip(manifests, disks, strict=True):
            check_movable(manifest, disk)
        locks = dict(locks_of(store, manifests))
        references = await trio.to_thread.run_sync(references_of, store, manifests[0].details)
        with await trio.to_thread.run_sync(NewFile, target) as new:
            for part in archive_parts(manifests, locks, references):
                if isinstance(part, bytes):
                    new.file.write(part)
                else:
                    await copy_file(
                        receive_from(disks[part]),
                        new.file,
                        manifests[part].files[IMAGE_NAME],
                        not_as_built(manifests[part]),
                    )
            await trio.to_thread.run_sync(new.publish)
            return new.file.tell()


async def _find(store: ImageStore, name: str) -> BuiltImage:
    if not is_oci(name):
        return await store.ensure(name, build=False)
    return await ensure_container(store, parse_oci(name), build=False, progress=lambda _: None, environment={})


def check_movable(manifest: Manifest, disk: BinaryIO) -> None:
    try:
        check_strangers_header(disk.read(HEAD_BYTES), os.fstat(disk.fileno()).st_size)
    except Qcow2FormatError as exc:
        raise ImageError(
            f"{manifest.name} can't be moved to another machine: {exc}. An earlier version of trio-sandbox made it; "
            f"`trio-sandbox image rm {manifest.name}` removes it, and the next use builds it again"
        ) from exc
    disk.seek(0)


def locks_of(store: ImageStore, manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    texts: list[tuple[str, str]] = []
    for name in sorted({name for manifest in manifests for name in choices_of(manifest)}):
        with suppress(OSError, ValueError):  # it is missing or damaged, and can be chosen anew
            text = (store.pylocks / name).read_text("utf-8")
            if is_choice(name, text):
                texts.append((name, text))
    return texts


async def import_images(
    store: ImageStore,
    source: Path,
    *,
    progress: Callable[[Progress], object],
    environment: Mapping[str, str],
) -> Sequence[str]:
    """Take all layers of an archive into a store, but for those that are there; return their names, the lowest first.

    Whoever made the archive decides what programs in these images do, as if the images had been built here; and nothing else: each disk is compared with its
    digest, names no other file, and nothing is written but entries of the store. Cancelled or failed, it leaves whole layers only.

    Args:
      store: Where they belong.
      source: The archive, a regular file.
      progress: Told what is going on; must not block.
      environment: Goes into the environment of every child process.

    Raises:
      ImageError: if it is no archive of ours, or one of another version of the library; or if another build of an image that layers stand on is in the
        store already. The store is as it was.
      ImageBuildError: if the store can't be written.
      OSError: if the archive can't be read.

    """
    with await trio.to_thread.run_sync(open_regular, source) as file:
        try:
            archive = await trio.to_thread.run_sync(read_archive, file)
            check_fits(store, archive)
        except (ValueError, PackagesError) as exc:
            raise ImageError(f"{source} can't be imported, and nothing was: {exc}") from exc
        for layer in archive.layers:
            entry = ImportedEntry(layer.manifest, partial(_receive_layer, file, layer.offset))
            try:
                await store.add(entry, progress=progress, environment=environment)
            except Qcow2FormatError as exc:
                raise ImageError(f"{source} can't be imported: the disk of {layer.manifest.name}: {exc}") from exc
    take_locks(store, archive.locks)
    await take_references(store, archive.layers[0].manifest, archive.references)
    return [layer.manifest.name for layer in archive.layers]


def _receive_layer(file: BinaryIO, offset: int, _: str) -> Receive:
    file.seek(offset)
    return receive_from(file)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a named pipe would wait for ever
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return open(fd, "rb")


def check_fits(store: ImageStore, archive: Archive) -> None:
    """Make sure that the image at the bottom is what this version makes, and that no other build of anything is there.

    Raises:
      ValueError, PackagesError: which says what is wrong.

    """
    for name, text in archive.locks.items():
        if not is_choice(name, text):
            raise ValueError(f"the lock {name} is damaged")
    base, *layers = archive.layers
    name = base.manifest.name
    if not is_container(base.manifest) and (LAYER_MARK in name or store.digest_of(name) != base.manifest.digest):
        raise ValueError(f"it stands on {name!r} of another version of trio-sandbox, or of one that has other images")
    for layer in layers:
        if layer.manifest.name != layer_name(name, layer.manifest.digest):
            raise ValueError(f"{layer.manifest.name} is not the name of that layer")
    stored = {entry.path.name: entry for entry in store.list()}
    for layer in archive.layers:
        there = stored.get(entry_name(layer.manifest.name, layer.manifest.digest))
        if there is not None and read_manifest(there.path).files != layer.manifest.files:
            raise ValueError(
                f"the store has another build of {layer.manifest.name}; `trio-sandbox image rm {layer.manifest.name}` removes that, "
                "with what stands on it, or use another cache directory"
            )


def take_locks(store: ImageStore, locks: Mapping[str, str]) -> None:
    """Keep what was chosen where nothing was chosen yet, so that images with these packages are found."""
    for name, text in locks.items():
        path = store.pylocks / name
        make_private_directory(path.parent, 0o755)
        temporary = path.with_name(f"{name}.{secrets.token_hex(8)}")
        write_new_file(temporary, text, 0o644)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
