"""The content-addressed store of images and system disks."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import final

import attrs
import trio

from .._config import Progress
from .._errors import ImageBuildError, ImageMissingError, UnknownImageError
from ._debian_image import IMAGE_NAME
from ._lock import open_lock
from ._manifest import MANIFEST_NAME, Manifest, check_files, describe_files, record_verdict
from ._recipe import BuildContext, Recipe
from ._recipes import IMAGES
from ._system import DISK_NAME, INITRD_NAME, KERNEL_ARGS, KERNEL_NAME, SystemRecipe

_DIGEST_CHARACTERS = 16


@attrs.frozen(kw_only=True)
class Image:
    """An image of the store: what a sandbox's own disk is based on."""

    name: str
    digest: str
    path: Path
    """The qcow2 file, absolute."""
    size_bytes: int
    """What it takes on disk."""
    virtual_size: int
    """What it looks like inside, in bytes."""
    manifest: Manifest


@attrs.frozen(kw_only=True)
class SystemDisk:
    """What every VM boots from."""

    digest: str
    kernel: Path
    initrd: Path
    disk: Path
    """A raw disk, to be attached read-only, as the first one."""
    kernel_args: tuple[str, ...]


def _ignore(progress: Progress) -> None:
    """Take no notice."""


@final
class ImageStore:
    """A directory of images, each built once and then only read."""

    def __init__(self, cache_dir: Path, *, recipes: Mapping[str, Recipe] | None = None, system: Recipe | None = None) -> None:
        self._directory = cache_dir.absolute()
        self._recipes: Mapping[str, Recipe] = IMAGES if recipes is None else recipes
        self._system: Recipe = SystemRecipe() if system is None else system
        self._limiter = trio.CapacityLimiter(2)

    def known_names(self) -> tuple[str, ...]:
        """Return the names of the images that can be built, sorted."""
        return tuple(sorted(self._recipes))

    async def ensure(
        self,
        name: str,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore,
        environment: Mapping[str, str] | None = None,
    ) -> Image:
        """Return the image *name*, building it first if it is missing."""
        recipe = self._recipes.get(name)
        if recipe is None:
            raise UnknownImageError(f"there is no image {name!r}; known are: {', '.join(self.known_names())}")
        directory, manifest = await self._ensure(recipe, f"image {name}", build, progress, environment or {})
        path = directory / IMAGE_NAME
        virtual_size = manifest.details.get("virtual_size")
        return Image(
            name=name,
            digest=manifest.digest,
            path=path,
            size_bytes=path.stat().st_blocks * 512,
            virtual_size=virtual_size if isinstance(virtual_size, int) else 0,
            manifest=manifest,
        )

    async def ensure_system(
        self,
        *,
        build: bool = True,
        progress: Callable[[Progress], object] = _ignore,
        environment: Mapping[str, str] | None = None,
    ) -> SystemDisk:
        """Return the system disk, building it first if it is missing."""
        directory, manifest = await self._ensure(self._system, "system disk", build, progress, environment or {})
        return SystemDisk(
            digest=manifest.digest,
            kernel=directory / KERNEL_NAME,
            initrd=directory / INITRD_NAME,
            disk=directory / DISK_NAME,
            kernel_args=KERNEL_ARGS,
        )

    async def _ensure(
        self,
        recipe: Recipe,
        stage: str,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> tuple[Path, Manifest]:
        digest = await trio.to_thread.run_sync(recipe.digest, limiter=self._limiter)
        entry = self._directory / "store" / f"{recipe.name}-{digest[:_DIGEST_CHARACTERS]}"
        if not (entry / MANIFEST_NAME).exists():
            if not build:
                raise ImageMissingError(f"the {stage} has not been built; `trio-sandbox image build {recipe.name}` builds it")
            for directory in ("store", "locks", "staging"):
                (self._directory / directory).mkdir(parents=True, exist_ok=True)
            report = lambda message, fraction=None: progress(Progress(stage, message, fraction))
            async with open_lock(
                self._directory / "locks" / recipe.name,
                on_wait=lambda: report("another process is building it"),
            ):
                if not (entry / MANIFEST_NAME).exists():
                    await self._build(recipe, digest, entry, report, environment)
        manifest = Manifest.from_json((entry / MANIFEST_NAME).read_text())
        await trio.to_thread.run_sync(check_files, entry, manifest, limiter=self._limiter)
        return entry, manifest

    async def _build(
        self,
        recipe: Recipe,
        digest: str,
        entry: Path,
        report: Callable[[str, float | None], object],
        environment: Mapping[str, str],
    ) -> None:
        staging = Path(tempfile.mkdtemp(prefix=f"{recipe.name}-", dir=self._directory / "staging"))
        try:
            context = BuildContext(staging=staging, report=report, environment=environment)
            context.output.mkdir()
            details = await recipe.build(context)
            files = await trio.to_thread.run_sync(describe_files, context.output, recipe.files, limiter=self._limiter)
            manifest = Manifest(name=recipe.name, digest=digest, created=time.time(), files=files, details=details)
            (context.output / MANIFEST_NAME).write_text(manifest.to_json())
            record_verdict(context.output, manifest)
            context.output.rename(entry)
            report("built", 1.0)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
