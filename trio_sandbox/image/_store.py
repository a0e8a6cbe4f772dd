"""The content-addressed store of images and system disks."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import final

import trio

from .._config import Progress
from .._errors import ImageCorruptError, ImageError, ImageMissingError, SandboxError, UnknownImageError
from .._nurseries import hide_nursery
from .._observe import part_logger
from .._oci_reference import is_oci
from ._build import BuildRequest, build_entry, open_staging
from ._entry import (
    below_of,
    disk_usage,
    entry_name,
    is_container,
    layered,
    matches,
    name_of,
    reading,
    standing,
    try_to_read,
    verify,
)
from ._layer import LAYER_MARK, LayerRecipe
from ._leases import Leases, last_used, mark_used
from ._lock import open_lock
from ._locked import LOCKED
from ._manifest import MANIFEST_NAME, Manifest, read_manifest
from ._recipe import Recipe
from ._recipes import IMAGES
from ._shelf import Shelf
from ._stored import BuiltImage, StoredImage, SystemDisk, default_cache_directory
from ._system import DISK_NAME, INITRD_NAME, KERNEL_ARGS, KERNEL_NAME, SystemRecipe
from .oci import OciRecipe, manifest_of

_log = part_logger("image")


def _ignore_progress(progress: Progress) -> None:
    """Take no notice."""


def _nobody_needs(_: Path) -> bool:
    """Tell that nothing beyond the store needs an entry."""
    return False


@final
class ImageStore:
    """A directory of images, each built once, by one process, and then only read.

    Any number of processes may share one. Making the object touches nothing.

    Args:
      cache_dir: The directory; made when something is built.
      recipes: What can be built, by name; None: the images that come with the library.
      system: How the system disk is built.
    """

    def __init__(
        self, cache_dir: Path, *, recipes: Mapping[str, Recipe] | None = None, system: Recipe | None = None
    ) -> None:
        self._shelf = Shelf(cache_dir.absolute())
        self._recipes: Mapping[str, Recipe] = IMAGES if recipes is None else recipes
        self._system: Recipe = SystemRecipe() if system is None else system
        self._leases = Leases()

    def __repr__(self) -> str:
        return f"<trio_sandbox ImageStore in {str(self._shelf.directory)!r}>"

    def known_names(self) -> tuple[str, ...]:
        """Return the names of the images that can be built, sorted."""
        return tuple(sorted(self._recipes))

    def check_name(self, name: str) -> None:
        """Refuse what nothing can be built by.

        Raises:
          UnknownImageError: if no recipe has that name; the message lists those that exist.

        """
        if name not in self._recipes and not (LAYER_MARK in name and self._find(name)):
            known = sorted({*self._recipes, *LOCKED} - {name})
            raise UnknownImageError(f"there is no image {name!r}; there are: {', '.join(known)}")

    async def ensure(
        self,
        name: str,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore_progress,
        environment: Mapping[str, str] | None = None,
    ) -> BuiltImage:
        """Return the image *name*, intact, building it first if it is missing.

        Another process that is building it is waited for. Cancelled, it ends what it started, and
        leaves the store as it was.

        Args:
          name: One of `known_names`, or that of a layer that is there, which is never built anew.
          build: Whether to build it if it is missing.
          progress: Told what is going on; must not block.
          environment: Goes into the environment of every child process.

        Raises:
          UnknownImageError: if no recipe has that name; the message lists those that exist.
          ImageMissingError: if it is missing, and *build* is False.
          ImageBuildError: if building failed; nothing of it is left.
          ImageCorruptError: if the stored files are not what was built; says how to get rid of them.
          MissingProgramError: if building needs a program that is not installed.
        """
        self.check_name(name)
        if name not in self._recipes:
            return await self._open_layer(name)
        recipe = self._recipes[name]
        entry, manifest = await self._ensure(recipe, f"image {name}", build, progress, environment or {})
        return standing(entry, manifest, recipe.languages)

    async def ensure_container(
        self,
        recipe: OciRecipe,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore_progress,
        environment: Mapping[str, str] | None = None,
    ) -> BuiltImage:
        """Return the container image of *recipe*, intact. Arguments, errors and cancellation are those of `ensure`."""
        stage = f"image {recipe.reference}"
        return standing(*await self._ensure(recipe, stage, build, progress, environment or {}))

    def digest_of(self, name: str) -> str:
        """Return the digest of the recipe that the image *name* is built by; "" if there is none. May read files."""
        recipe = self._recipes.get(name)
        return "" if recipe is None else recipe.digest()

    async def add(
        self, recipe: Recipe, *, progress: Callable[[Progress], object], environment: Mapping[str, str]
    ) -> None:
        """Have in the store what *recipe* makes, intact. Arguments, errors and cancellation are those of `ensure`."""
        await self._ensure(recipe, f"image {recipe.name}", True, progress, environment)

    async def ensure_layer(
        self,
        recipe: LayerRecipe,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore_progress,
        environment: Mapping[str, str] | None = None,
    ) -> BuiltImage:
        """Return the image that *recipe*'s layer makes of the one below it, which is intact.

        Arguments, errors and cancellation are those of `ensure`; but a damaged layer is made anew.
        """
        stage = f"image {recipe.image.name}, {recipe.step}"
        with self.hold(recipe.image.entries) as held:
            if not held:
                raise ImageMissingError(
                    f"a layer below the {stage} was removed just now, to make room in the cache; try again, which builds it"
                )
            try:
                entry, manifest = await self._ensure(recipe, stage, build, progress, environment or {})
            except ImageCorruptError as exc:
                if not build:
                    raise
                _log.warning("a layer is made anew: %s", exc)
                await self._shelf.remove(self._entry(recipe))
                entry, manifest = await self._ensure(recipe, stage, build, progress, environment or {})
        return layered(recipe.image, entry, manifest)

    async def _open_layer(self, name: str) -> BuiltImage:
        """Return the image of a layer, or a container image, that is there, by its name."""
        (entry, *_) = self._find(name)
        manifest = await trio.to_thread.run_sync(verify, entry, limiter=reading())
        if is_container(manifest):
            return standing(entry, manifest)
        below = below_of(manifest)
        with suppress(ImageError):
            image = await self.ensure(below["name"], build=False)
            if image.content == below["content"]:
                return layered(image, entry, manifest)
        raise ImageMissingError(
            f"the layer {name!r} depends on a build of {below['name']!r} that is not there any more; "
            "make it anew from its Image"
        )

    def _find(self, name: str) -> tuple[Path, ...]:
        """Return the entries of that name."""
        return tuple(entry for entry in self._shelf.entries() if name_of(entry) == name)

    @property
    def directory(self) -> Path:
        """The whole cache."""
        return self._shelf.directory

    @property
    def system(self) -> Recipe:
        """How the system disk is built."""
        return self._system

    def make_directories(self) -> None:
        """Make what is missing of it; see `Shelf.make_directories`."""
        self._shelf.make_directories()

    @property
    def pylocks(self) -> Path:
        """The directory of locks that were made of requirements."""
        return self._shelf.pylocks

    @property
    def containers(self) -> Path:
        """The directory of notes on which container image a name stood for when it was fetched."""
        return self._shelf.containers

    @asynccontextmanager
    async def open_workspace(self, name: str, on_wait: Callable[[], object]) -> AsyncGenerator[Path]:
        """Yield a new directory to make something called *name* in, while nobody else does; it is removed afterwards.

        Raises:
          ImageBuildError: in place of an `OSError`, the block's included.

        """
        self._shelf.check_trusted()
        self._shelf.make_directories()
        async with (
            open_lock(self._shelf.lock(name), on_wait=on_wait),
            open_staging(self._shelf.staging, name, {}) as directory,
        ):
            yield directory

    async def ensure_system(
        self,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore_progress,
        environment: Mapping[str, str] | None = None,
    ) -> SystemDisk:
        """Return the system disk, intact, building it first if it is missing.

        Arguments, errors and cancellation are those of `ensure`.
        """
        entry, manifest = await self._ensure(self._system, "system disk", build, progress, environment or {})
        return SystemDisk(
            digest=manifest.digest,
            kernel=entry / KERNEL_NAME,
            initrd=entry / INITRD_NAME,
            disk=entry / DISK_NAME,
            kernel_args=KERNEL_ARGS,
        )

    async def ensure_bootable(
        self,
        name: str,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore_progress,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[BuiltImage, SystemDisk]:
        """Do `ensure` and `ensure_system` at the same time, which a first build takes less long by.

        Arguments, errors and cancellation are those of `ensure`.
        """
        if not build or name not in self._recipes:  # with nothing to gain, the first error is the only one
            image = await self.ensure(name, build=build, progress=progress, environment=environment)
            return image, await self.ensure_system(build=build, progress=progress, environment=environment)
        system: SystemDisk | None = None

        async def ensure_system() -> None:
            nonlocal system
            system = await self.ensure_system(build=build, progress=progress, environment=environment)

        with hide_nursery("ensure_bootable()"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ensure_system)
                image = await self.ensure(name, build=build, progress=progress, environment=environment)
        assert system is not None
        return image, system

    def list(self) -> list[StoredImage]:
        """Return everything that the store holds, by name, the newest of a name first.

        What is damaged too badly to be read is left out; `prune` removes it.
        """
        current = self._current()
        stored: list[StoredImage] = []
        for entry in self._shelf.entries():
            try:
                manifest = read_manifest(entry)
            except ImageError:
                continue
            stored.append(
                StoredImage(
                    name=manifest.name,
                    digest=manifest.digest,
                    path=entry,
                    created=manifest.created,
                    size_bytes=disk_usage(entry),
                    current=entry in current,
                    used=last_used(entry),
                    below=below_of(manifest)["name"],
                    step=str(manifest.details.get("step", "")),
                    details=manifest.details,
                )
            )
        return sorted(stored, key=lambda image: (image.name, -image.created))

    async def remove(self, name_or_digest: str) -> int:
        """Remove whatever has that name, or a digest that begins so, and the layers on it; return the bytes that came free.

        Running VMs keep what they have open; a VM that is about to boot fails with a clear error.

        Raises:
          UnknownImageError: if there is nothing of that name or digest; the message lists what there is.
          OSError: if it can't be removed.
        """
        await trio.lowlevel.checkpoint()
        stands_for = self.find_container(name_or_digest)
        found = [
            entry
            for entry in self._shelf.entries()
            if matches(entry, name_or_digest) or stands_for(try_to_read(entry).details)
        ]
        if not found:
            stored = ", ".join(sorted({entry.name for entry in self._shelf.entries()})) or "nothing"
            raise UnknownImageError(f"the store has no image {name_or_digest!r}; it has: {stored}")
        return sum([await self._shelf.remove(entry) for entry in (*self._shelf.standing_on(found), *found)])

    def find_container(self, name: str) -> Callable[[Mapping[str, object]], bool]:
        """Return what tells by a manifest's details whether *name*, of a container image, stands for that entry."""
        manifest = manifest_of(self.containers, name)

        def stands_for(details: Mapping[str, object]) -> bool:
            if manifest and details.get("container") == manifest:
                return True
            return is_oci(name) and details.get("step") == name  # where nobody knows any more what it stands for

        return stands_for

    def _current(self) -> set[Path]:
        """Return the entries that are of use: those of recipes, and the layers that stand on them."""
        current = {self._entry(recipe) for recipe in self._all_recipes()}
        current.update(entry for entry in self._shelf.entries() if is_container(try_to_read(entry)))
        return current.union(self._shelf.standing_on(current))

    def hold(self, entries: Iterable[Path]) -> AbstractContextManager[bool]:
        """Keep entries from being evicted for a block; see `Leases.try_hold`."""
        return self._leases.try_hold(entries)

    async def evict(self, budget: int, *, is_needed: Callable[[Path], bool] = _nobody_needs) -> int:
        """Remove what was used longest ago, until all that the store holds takes no more than *budget* bytes; return those that came free.

        Never removed are the images and the system disk that this version of the library builds, and what somebody stands on: a layer, an
        open sandbox in any process, or who *is_needed* knows of. So it may not get that far.

        Args:
          budget: In bytes.
          is_needed: Tells whether something beyond the store needs the entry in that directory, or what stands on that.

        Raises:
          OSError: if something can't be removed.

        """
        await trio.lowlevel.checkpoint()
        kept = {self._entry(recipe) for recipe in self._all_recipes()}
        sizes = {entry: disk_usage(entry) for entry in sorted(self._shelf.entries(), key=last_used)}
        excess = sum(sizes.values()) - budget
        return await self._shelf.clear([entry for entry in sizes if entry not in kept], is_needed, excess)

    async def prune(self, *, is_needed: Callable[[Path], bool] = _nobody_needs) -> int:
        """Remove what this version of the library has no use for, and what killed builds left.

        A build that is going on in another process is left alone, and so is what an open sandbox stands on. Returns the bytes that came free.

        Args:
          is_needed: As that of `evict`.

        Raises:
          OSError: if something can't be removed.
        """
        await trio.lowlevel.checkpoint()
        current = self._current()
        unused = [
            entry for entry in self._shelf.entries() if entry not in current or not (entry / MANIFEST_NAME).is_file()
        ]
        freed = await self._shelf.clear(unused, is_needed, math.inf)
        return freed + self._shelf.remove_notes() + await self._shelf.remove_leftovers({})

    async def remove_leftovers(self, environment: Mapping[str, str]) -> int:
        """Remove what killed builds left; see `Shelf.remove_leftovers`."""
        return await self._shelf.remove_leftovers(environment)

    def check_trusted(self) -> None:
        """Refuse a directory in which somebody else can have put something; see `Shelf.check_trusted`."""
        self._shelf.check_trusted()

    async def _ensure(
        self,
        recipe: Recipe,
        stage: str,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> tuple[Path, Manifest]:
        self._shelf.check_trusted()
        digest = await trio.to_thread.run_sync(recipe.digest)
        entry = self._entry(recipe, digest)
        if not entry.exists():
            if not build:
                raise ImageMissingError(
                    f"the {stage} is not in {self._shelf.directory}, and building it was refused;"
                    f" `trio-sandbox image build` builds it"
                )
            base = None
            if recipe.base is not None:
                base, _ = await self._ensure(recipe.base, stage, build, progress, environment)
            await self._build(recipe, digest, base, stage, progress, environment)
        manifest = await trio.to_thread.run_sync(verify, entry, limiter=reading())
        mark_used(entry)
        return entry, manifest

    async def _build(
        self,
        recipe: Recipe,
        digest: str,
        base: Path | None,
        stage: str,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> None:
        def report(message: str, fraction: float | None) -> None:
            progress(Progress(stage, message, fraction))

        def on_wait() -> None:
            report("another process is building it", None)

        request = BuildRequest(
            recipe=recipe,
            digest=digest,
            base=base,
            staging=self._shelf.staging,
            entry=self._entry(recipe, digest),
            environment=environment,
        )
        self._shelf.make_directories()
        async with open_lock(self._shelf.lock(recipe.name), on_wait=on_wait):
            if not request.entry.exists():
                await build_entry(request, report)

    def _all_recipes(self) -> Generator[Recipe]:
        for recipe in (*self._recipes.values(), self._system):
            each: Recipe | None = recipe
            while each is not None:
                yield each
                each = each.base

    def _entry(self, recipe: Recipe, digest: str | None = None) -> Path:
        return self._shelf.store / entry_name(recipe.name, recipe.digest() if digest is None else digest)


def own_caches() -> list[Path]:
    """Return the user's own cache directory, if there is one that nobody else can have put anything in."""
    try:
        ImageStore(own := default_cache_directory()).check_trusted()
    except SandboxError:
        return []
    return [own]
