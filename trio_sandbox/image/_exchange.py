"""Images from one store to another, by way of a file: all layers of one, with what proves that they are what was built."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Final, final

import attrs
import trio

from .._config import Progress
from .._errors import ImageCorruptError, ImageError, ImageMissingError, PackagesError
from .._oci_reference import is_oci
from .._private import make_private_directory, write_new_file
from ..constants import IMAGE_DISK_MIB
from ..qemu import HEAD_BYTES, Qcow2FormatError, check_strangers_header
from ._archive import Archive, ArchivedLayer, archive_parts, read_archive
from ._choices import choices_of, is_choice
from ._entry import entry_name, is_container
from ._layer import LAYER_MARK, layer_name
from ._manifest import Manifest, read_manifest
from ._recipe import BuildContext
from ._store import ImageStore
from ._stored import IMAGE_NAME

#: Bytes that are copied between two looks whether to go on.
_PIECE: Final = 2**20


async def export_image(store: ImageStore, name: str, target: Path) -> int:
    """Write an image and all that it stands on to a new file; return the file's size.

    Nobody evicts it meanwhile. Cancelled or failed, it leaves no file.

    Args:
      store: Where the image is.
      name: Its name: that of a layer, or of an image without one.
      target: The file; there must be none of that name.

    Raises:
      UnknownImageError, ImageMissingError, ImageCorruptError: if it is not there, or damaged.
      ImageError: if it was built by a version of the library that did not make layers which can be moved.
      OSError: if the file is there, or can't be written.

    """
    if is_oci(name):
        raise _unmoved(name)
    image = await store.ensure(name, build=False)
    await trio.to_thread.run_sync(_check_new, target)
    with store.hold(image.entries) as held, ExitStack() as stack:
        if not held:
            raise ImageMissingError(f"the image {name!r} was removed just now")
        manifests = [read_manifest(entry) for entry in image.entries]
        disks = [stack.enter_context(_open(entry / IMAGE_NAME)) for entry in image.entries]
        if is_container(manifests[0]):
            raise _unmoved(name)
        for manifest, disk in zip(manifests, disks, strict=True):
            _check_movable(manifest, disk)
        locks = dict(_locks_of(store, manifests))
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}")
        with await trio.to_thread.run_sync(_create, temporary) as file:
            try:
                for part in archive_parts(manifests, locks):
                    if isinstance(part, bytes):
                        file.write(part)
                    else:
                        await _copy(disks[part], file, manifests[part])
                await trio.to_thread.run_sync(_publish, file, temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            return file.tell()


def _unmoved(name: str) -> ImageError:
    return ImageError(
        f"{name} is a container image, or stands on one, and can't be exported: skopeo copies those to archives, which can be used elsewhere"
    )


def _check_movable(manifest: Manifest, disk: BinaryIO) -> None:
    try:
        check_strangers_header(disk.read(HEAD_BYTES), os.fstat(disk.fileno()).st_size)
    except Qcow2FormatError as exc:
        raise ImageError(
            f"{manifest.name} can't be moved to another machine: {exc}. An earlier version of trio-sandbox made it; "
            f"`trio-sandbox image rm {manifest.name}` removes it, and the next use builds it again"
        ) from exc
    disk.seek(0)


def _locks_of(store: ImageStore, manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    texts: list[tuple[str, str]] = []
    for name in sorted({name for manifest in manifests for name in choices_of(manifest)}):
        with suppress(OSError, ValueError):  # it is missing or damaged, and can be chosen anew
            text = (store.pylocks / name).read_text("utf-8")
            if is_choice(name, text):
                texts.append((name, text))
    return texts


async def _copy(  # noqa: ASYNC910 - no disk is empty
    source: BinaryIO, target: BinaryIO, manifest: Manifest
) -> None:
    """Copy the disk of a layer, from where *source* is.

    Raises:
      ImageCorruptError: if it is not what the manifest says.

    """
    wanted = manifest.files[IMAGE_NAME]
    digest, left = hashlib.sha256(), wanted.size
    while left and (piece := await trio.to_thread.run_sync(source.read, min(left, _PIECE))):
        left -= len(piece)
        digest.update(piece)
        if piece.count(0) == len(piece) and target.seekable():
            target.seek(len(piece), os.SEEK_CUR)  # it stays a hole
        else:
            await trio.to_thread.run_sync(target.write, piece)
    target.truncate(target.tell())
    if left or digest.hexdigest() != wanted.sha256:
        raise ImageCorruptError(f"the disk of {manifest.name} is not what was built: its digest is another")


def _publish(file: BinaryIO, temporary: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    os.link(temporary, target)  # which replaces nothing
    temporary.unlink()


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
    with await trio.to_thread.run_sync(_open, source) as file:
        try:
            archive = await trio.to_thread.run_sync(read_archive, file)
            _check_fits(store, archive)
        except (ValueError, PackagesError) as exc:
            raise ImageError(f"{source} can't be imported, and nothing was: {exc}") from exc
        for layer in archive.layers:
            try:
                await store.add(ImportedLayer(layer, file), progress=progress, environment=environment)
            except Qcow2FormatError as exc:
                raise ImageError(f"{source} can't be imported: the disk of {layer.manifest.name}: {exc}") from exc
    _take_locks(store, archive)
    return [layer.manifest.name for layer in archive.layers]


def _open(path: Path) -> BinaryIO:
    """Open a regular file for reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a named pipe would wait for ever
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return open(fd, "rb")


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))


def _create(path: Path) -> BinaryIO:
    return open(path, "x+b")


def _check_fits(store: ImageStore, archive: Archive) -> None:
    """Make sure that the image at the bottom is what this version builds, and that no other build of anything is there.

    Raises:
      ValueError, PackagesError: which says what is wrong.

    """
    for name, text in archive.locks.items():
        if not is_choice(name, text):
            raise ValueError(f"the lock {name} is damaged")
    base, *layers = archive.layers
    name = base.manifest.name
    if LAYER_MARK in name or store.digest_of(name) != base.manifest.digest:
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


def _take_locks(store: ImageStore, archive: Archive) -> None:
    """Keep what was chosen where nothing was chosen yet, so that images with these packages are found."""
    for name, text in archive.locks.items():
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


@final
@attrs.frozen
class ImportedLayer:
    """A recipe that takes a layer from an archive."""

    layer: ArchivedLayer
    file: BinaryIO = attrs.field(eq=False)

    @property
    def name(self) -> str:
        """The layer's."""
        return self.layer.manifest.name

    @property
    def files(self) -> tuple[str, ...]:
        """The one disk."""
        return (IMAGE_NAME,)

    @property
    def base(self) -> None:
        """Nothing: what it stands on came before."""
        return

    @property
    def languages(self) -> tuple[str, ...]:
        """Nobody asks."""
        return ()

    def digest(self) -> str:
        """Return that of the recipe that it was built by."""
        return self.layer.manifest.digest

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Copy the disk, and look at it before anybody opens it."""
        context.report("importing", None)
        self.file.seek(self.layer.offset)
        with await trio.to_thread.run_sync(_create, context.output / IMAGE_NAME) as output:
            await _copy(self.file, output, self.layer.manifest)
            output.seek(0)
            info = check_strangers_header(output.read(HEAD_BYTES), self.layer.size)
        wanted = self.layer.manifest.details["virtual_size"]
        if info.virtual_size != wanted or info.virtual_size > IMAGE_DISK_MIB * 2**20:
            raise Qcow2FormatError(f"it is a disk of {info.virtual_size} bytes, and not of {wanted}, or too large")
        return self.layer.manifest.details
