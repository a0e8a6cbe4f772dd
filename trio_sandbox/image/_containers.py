"""From the name of an image to its disk: one of ours by its recipe, one of a container's by what its name stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from .._config import Progress
from .._errors import ImageMissingError, OciError
from .._nurseries import hide_nursery
from .._oci_reference import OciReference, is_oci, parse_oci
from ._archive import MOST_REFERENCES
from ._manifest import Manifest
from ._store import ImageStore
from ._stored import BuiltImage, SystemDisk
from .oci import Note, OciRecipe, fetch, note_path, read_container_image, read_note, state_of, write_note


async def ensure_bootable(
    store: ImageStore,
    name: str,
    *,
    build: bool = True,
    progress: Callable[[Progress], object],
    environment: Mapping[str, str],
) -> tuple[BuiltImage, SystemDisk]:
    """Return an image and the system disk, intact, each built first if it is missing.

    Args:
      store: Where they are.
      name: One of `ImageStore.known_names`, of a layer that is there, or of a container image.
      build: Whether to build what is missing.
      progress: Told what is going on; must not block.
      environment: Goes into the environment of every child process.

    Raises:
      ImageError, MissingProgramError: all that `ImageStore.ensure` raises.
      OciError: if a container image can't be fetched, or is none for our guests.

    """
    if not is_oci(name):
        return await store.ensure_bootable(name, build=build, progress=progress, environment=environment)
    system: SystemDisk | None = None

    async def ensure_system() -> None:
        nonlocal system
        system = await store.ensure_system(build=build, progress=progress, environment=environment)

    with hide_nursery("ensure_bootable()"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ensure_system)
            image = await ensure_container(
                store, parse_oci(name), build=build, progress=progress, environment=environment
            )
    assert system is not None
    return image, system


async def ensure_container(
    store: ImageStore,
    reference: OciReference,
    *,
    build: bool,
    progress: Callable[[Progress], object],
    environment: Mapping[str, str],
) -> BuiltImage:
    """Return a container image, intact: the one that its name stood for when it was fetched, if that is there.

    Files that have changed since are looked at again. Another process that fetches it is waited for. Cancelled, it ends what it started, and
    leaves the store as it was. Arguments and errors are those of `ensure_bootable`.
    """
    store.check_trusted()
    path = note_path(store.containers, reference)
    state = await trio.to_thread.run_sync(_find_state, reference, path)

    async def find() -> BuiltImage | None:
        note = await trio.to_thread.run_sync(read_note, path)
        if note.state != state or not note.manifest:
            return None
        recipe = OciRecipe(manifest=note.manifest, reference=str(reference))
        with suppress(ImageMissingError):
            return await store.ensure_container(recipe, build=False)
        return None

    def report(message: str, fraction: float | None) -> None:
        progress(Progress(f"image {reference}", message, fraction))

    if (found := await find()) is not None:
        return found
    if not build:
        raise ImageMissingError(
            f"the container image {reference} was not fetched yet, and building was refused;"
            f" `trio-sandbox image build {reference}` does it"
        )
    async with store.open_workspace(path.name, lambda: report("another process is fetching it", None)) as directory:
        if (found := await find()) is not None:
            return found
        blobs = directory / "image"
        await fetch(reference, blobs, directory / "temporary", environment, report)
        image = await trio.to_thread.run_sync(read_container_image, blobs)
        recipe = OciRecipe(manifest=image.digest, reference=str(reference), directory=blobs)
        built = await store.ensure_container(recipe, progress=progress, environment=environment)
        await trio.to_thread.run_sync(write_note, path, Note(str(reference), state, image.digest))
    return built


def _find_state(reference: OciReference, path: Path) -> str:
    """Return what tells whether the files that *reference* names are as they were.

    Where there are none, that is nothing if an import has said what the name stands for. `OciError` else.
    """
    try:
        return state_of(reference)
    except OciError:
        note = read_note(path)
        if note.manifest and not note.state:
            return ""
        raise


def references_of(store: ImageStore, details: Mapping[str, object]) -> list[str]:
    """Return the names that a container image is known by whose manifest has these *details*; none of any other image."""
    notes = map(read_note, store.containers.glob("container-*"))
    return sorted(note.reference for note in notes if note.manifest == details.get("container"))[:MOST_REFERENCES]


async def take_references(store: ImageStore, base: Manifest, references: Sequence[str]) -> None:
    """Have names stand for a container image that came from another store, but for those that stand for one which is there."""
    await trio.lowlevel.checkpoint()
    for each in references:
        reference = parse_oci(each)
        path = note_path(store.containers, reference)
        note = Note(each, "", str(base.details["container"]))
        async with store.open_workspace(path.name, lambda: None):
            earlier = read_note(path).manifest
            is_stored = any(entry.details.get("container") == earlier for entry in store.list())
            # One of a file that is gone says nothing by itself any more.
            is_gone = earlier == note.manifest and reference.path is not None and not reference.path.exists()
            if is_gone or not is_stored:
                await trio.to_thread.run_sync(write_note, path, note)
