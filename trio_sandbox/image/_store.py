"""The content-addressed store of images and system disks."""

from __future__ import annotations

import errno
import os
import pwd
import re
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import final

import attrs
import trio

from .._config import Progress
from .._errors import ImageBuildError, ImageError, ImageMissingError, SandboxError, UnknownImageError
from .._nurseries import hide_nursery
from .._private import check_trusted, make_private_directory
from ..qemu import is_marked, is_own_directory, mark
from ._build import BuildRequest, build_entry, find_leftovers, remove_leftovers
from ._debian_image import IMAGE_NAME
from ._lock import open_lock, try_lock
from ._manifest import MANIFEST_NAME, Manifest, check_files, read_manifest
from ._recipe import Recipe
from ._recipes import IMAGES
from ._system import DISK_NAME, INITRD_NAME, KERNEL_ARGS, KERNEL_NAME, SystemRecipe

#: How much of a digest is in the name of a directory, and the least that says which one is meant.
_DIGEST_CHARACTERS, _SHORTEST_DIGEST = 16, 6
_ENTRY_NAME = re.compile(rf".+-[0-9a-f]{{{_DIGEST_CHARACTERS}}}")


@attrs.frozen(kw_only=True)
class Image:
    """An image of the store: what a sandbox's own disk is based on."""

    name: str
    digest: str
    """Digest of the recipe that it was built by."""
    path: Path
    """The qcow2 file, absolute. It must not be written to."""
    size_bytes: int
    """What it takes on the host's disk."""
    virtual_size: int
    """What programs inside see as the size of the disk, in bytes."""
    manifest: Manifest
    languages: tuple[str, ...] = ("python",)
    """Languages that it has an interpreter of, the main one first."""


@attrs.frozen(kw_only=True)
class SystemDisk:
    """What every VM boots from."""

    digest: str
    """Digest of the recipe, the agent's sources included."""
    kernel: Path
    initrd: Path
    disk: Path
    """A raw disk, to be attached read-only, before the image's."""
    kernel_args: tuple[str, ...]
    """The kernel's command line."""


def are_there(image: Image, system: SystemDisk) -> bool:
    """Tell whether the files are still where they were found: somebody may have removed the image since, or all of the cache."""
    return all(path.exists() for path in (image.path, system.kernel, system.initrd, system.disk))


@attrs.frozen(kw_only=True)
class StoredImage:
    """One thing that the store holds."""

    name: str
    digest: str
    path: Path
    """Its directory."""
    created: float
    """When it was built, in Unix seconds."""
    size_bytes: int
    """What it takes on the host's disk."""
    current: bool
    """Whether this version of the library would use it."""


def default_cache_directory() -> Path:
    """Return the directory of images unless one was configured: ``trio-sandbox`` in the user's cache (XDG).

    Raises:
      SandboxError: if neither the environment nor the password database says where that is.

    """
    # The XDG specification has relative paths ignored.
    for name, below in (("XDG_CACHE_HOME", ""), ("HOME", ".cache")):
        if os.path.isabs(base := os.environ.get(name, "")):
            return Path(base, below, "trio-sandbox")
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise SandboxError(
            "there is no cache directory: neither XDG_CACHE_HOME nor HOME is set to an absolute path, and the password "
            f"database has no user {os.getuid()}. Set one of them, HostConfig.cache_dir or --cache-dir"
        ) from None
    return Path(home, ".cache", "trio-sandbox")


def _ignore_progress(progress: Progress) -> None:
    """Take no notice."""


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
        self._directory = cache_dir.absolute()
        self._recipes: Mapping[str, Recipe] = IMAGES if recipes is None else recipes
        self._system: Recipe = SystemRecipe() if system is None else system

    def __repr__(self) -> str:
        return f"<trio_sandbox ImageStore in {str(self._directory)!r}>"

    def known_names(self) -> tuple[str, ...]:
        """Return the names of the images that can be built, sorted."""
        return tuple(sorted(self._recipes))

    def check_name(self, name: str) -> None:
        """Refuse what nothing can be built by.

        Raises:
          UnknownImageError: if no recipe has that name; the message lists those that exist.

        """
        if name not in self._recipes:
            raise UnknownImageError(f"there is no image {name!r}; there are: {', '.join(self.known_names())}")

    async def ensure(
        self,
        name: str,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore_progress,
        environment: Mapping[str, str] | None = None,
    ) -> Image:
        """Return the image *name*, intact, building it first if it is missing.

        Another process that is building it is waited for. Cancelled, it ends what it started, and
        leaves the store as it was.

        Args:
          name: One of `known_names`.
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
        recipe = self._recipes[name]
        entry, manifest = await self._ensure(recipe, f"image {name}", build, progress, environment or {})
        path = entry / IMAGE_NAME
        virtual_size = manifest.details.get("virtual_size")
        return Image(
            name=name,
            digest=manifest.digest,
            path=path,
            size_bytes=_disk_usage(path),
            virtual_size=virtual_size if isinstance(virtual_size, int) else 0,
            manifest=manifest,
            languages=recipe.languages,
        )

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
    ) -> tuple[Image, SystemDisk]:
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
        current = {self._entry(recipe) for recipe in self._all_recipes()}
        stored: list[StoredImage] = []
        for entry in self._entries():
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
                    size_bytes=_disk_usage(entry),
                    current=entry in current,
                )
            )
        return sorted(stored, key=lambda image: (image.name, -image.created))

    async def remove(self, name_or_digest: str) -> int:
        """Remove whatever has that name, or a digest that begins so; return the bytes that came free.

        Running VMs keep what they have open; a VM that is about to boot fails with a clear error.

        Raises:
          UnknownImageError: if there is nothing of that name or digest; the message lists what there is.
          OSError: if it can't be removed.
        """
        await trio.lowlevel.checkpoint()
        found = [entry for entry in self._entries() if _matches(entry, name_or_digest)]
        if not found:
            stored = ", ".join(sorted({entry.name for entry in self._entries()})) or "nothing"
            raise UnknownImageError(f"the store has no image {name_or_digest!r}; it has: {stored}")
        return sum([await self._remove(entry) for entry in found])

    async def prune(self) -> int:
        """Remove what this version of the library has no use for, and what killed builds left.

        A build that is going on in another process is left alone. Returns the bytes that came free.

        Raises:
          OSError: if something can't be removed.
        """
        await trio.lowlevel.checkpoint()
        current = {self._entry(recipe) for recipe in self._all_recipes()}
        freed = 0
        for entry in self._entries():
            if entry not in current or not (entry / MANIFEST_NAME).is_file():
                freed += await self._remove(entry)
        return freed + await self.remove_leftovers({})

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
        for name in sorted({leftover.name.partition(".")[0] for leftover in find_leftovers(self._staging)}):
            with try_lock(self._lock(name)) as held:
                if held:
                    freed += sum(_disk_usage(leftover) for leftover in find_leftovers(self._staging, name))
                    await remove_leftovers(self._staging, name, environment)
        return freed

    async def _ensure(
        self,
        recipe: Recipe,
        stage: str,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> tuple[Path, Manifest]:
        self.check_trusted()
        digest = await trio.to_thread.run_sync(recipe.digest)
        entry = self._entry(recipe, digest)
        if not entry.exists():
            if not build:
                raise ImageMissingError(
                    f"the {stage} is not in {self._directory}, and building it was refused;"
                    f" `trio-sandbox image build` builds it"
                )
            base = None
            if recipe.base is not None:
                base, _ = await self._ensure(recipe.base, stage, build, progress, environment)
            await self._build(recipe, digest, base, stage, progress, environment)
        manifest = await trio.to_thread.run_sync(_verify, entry, limiter=_reading())
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
            staging=self._staging,
            entry=self._entry(recipe, digest),
            environment=environment,
        )
        self._make_directories()
        async with open_lock(self._lock(recipe.name), on_wait=on_wait):
            if not request.entry.exists():
                await build_entry(request, report)

    async def _remove(self, entry: Path) -> int:
        self.check_trusted()
        self._make_directories()
        name = entry.name.rpartition("-")[0]
        async with open_lock(self._lock(name), on_wait=lambda: None):
            freed = _disk_usage(entry)
            mark(entry)  # those of earlier versions have only their manifest
            # Gone at once for everybody else, however long the files take.
            os.rename(entry, self._staging / f"{name}.removed-{os.urandom(8).hex()}")
            await remove_leftovers(self._staging, name, {})
        return freed

    def _make_directories(self) -> None:
        try:
            # Users that may only read it may share a store. What a build is making is nobody else's to see.
            make_private_directory(self._directory / "store", 0o755)
            make_private_directory(self._directory / "locks")
            make_private_directory(self._staging)
            for directory in (self._directory / "store", self._directory / "locks", self._staging):
                if not os.access(directory, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(directory))
        except OSError as exc:
            raise ImageBuildError(
                f"the cache directory {self._directory} can't be written ({exc.strerror}: {exc.filename});"
                f" choose another with HostConfig.cache_dir, --cache-dir or XDG_CACHE_HOME"
            ) from exc

    def check_trusted(self) -> None:
        """Refuse a directory in which somebody else can have put something.

        Raises:
          ImageError: which says what and why.

        """
        top = self._directory
        try:
            check_trusted(top, *(top / name for name in ("store", "locks", "staging", "templates", "saved")))
        except OSError as exc:
            raise ImageError(
                f"the cache directory {top} can't be used: {exc.filename} is {exc.strerror}."
                f" HostConfig.cache_dir, --cache-dir or XDG_CACHE_HOME choose another"
            ) from exc

    def _all_recipes(self) -> Generator[Recipe]:
        for recipe in (*self._recipes.values(), self._system):
            each: Recipe | None = recipe
            while each is not None:
                yield each
                each = each.base

    def _entries(self) -> Generator[Path]:
        """Give what the store holds, damaged or not, but nothing that somebody else has put there."""
        for path in sorted((self._directory / "store").glob("*-*")):
            manifest = is_own_directory(path) and (path / MANIFEST_NAME).is_file()
            if _ENTRY_NAME.fullmatch(path.name) and (manifest or is_marked(path)):
                yield path

    def _entry(self, recipe: Recipe, digest: str | None = None) -> Path:
        digest = recipe.digest() if digest is None else digest
        return self._directory / "store" / f"{recipe.name}-{digest[:_DIGEST_CHARACTERS]}"

    def _lock(self, name: str) -> Path:
        return self._directory / "locks" / name

    @property
    def _staging(self) -> Path:
        return self._directory / "staging"


#: Hashing a whole image takes a while; it must not keep others from the threads that start processes.
_reading_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trio_sandbox.image.reading")


def _reading() -> trio.CapacityLimiter:
    try:
        return _reading_limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(2)
        _reading_limiter.set(limiter)
        return limiter


def _verify(entry: Path) -> Manifest:
    manifest = read_manifest(entry)
    check_files(entry, manifest)
    return manifest


def _matches(entry: Path, name_or_digest: str) -> bool:
    name, _, digest = entry.name.rpartition("-")
    if name_or_digest == name:
        return True
    return len(name_or_digest) >= _SHORTEST_DIGEST and digest.startswith(name_or_digest[:_DIGEST_CHARACTERS])


def _disk_usage(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(_disk_usage(child) for child in path.iterdir())
    return path.lstat().st_blocks * 512
