"""Building one entry of a store: all of it, or nothing."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from .._errors import ImageBuildError
from .._private import write_new_file
from ..qemu import MARKER, is_marked, make_marked, mark
from ._manifest import LONGEST_MANIFEST, MANIFEST_NAME, Manifest, describe_files, record_verdict
from ._mmdebstrap import remove_staging
from ._recipe import BuildContext, Recipe

#: Hundreds of megabytes in small files, on a slow disk. What is left then, the next build removes.
_REMOVAL_SECONDS = 120.0
#: What is in the directory for all builds' directories. Whatever else is there is somebody's own.
_LEFTOVER_NAME = re.compile(r"(?P<name>[^.]+)\.(build|removed)-[0-9a-f]{16}")


@attrs.frozen(kw_only=True)
class BuildRequest:
    """What to build, and where to put it."""

    recipe: Recipe
    digest: str
    base: Path | None
    """The entry of the recipe's base."""
    staging: Path
    """The directory for all builds' directories."""
    entry: Path
    """What the finished directory is renamed to."""
    environment: Mapping[str, str]


async def build_entry(request: BuildRequest, report: Callable[[str, float | None], object]) -> None:
    """Build; the caller holds the lock of the recipe's name.

    Leftovers of builds that were killed are removed first: whose lock we hold is not running.
    Cancelled, or killed at any point, it leaves no entry, and at most such leftovers.

    Raises:
      ImageBuildError: if it can't be built.
      MissingProgramError: if a program is not installed.
    """
    async with open_staging(request.staging, request.recipe.name, request.environment) as directory:
        await _build_in(directory, request, report)


@asynccontextmanager
async def open_staging(staging: Path, name: str, environment: Mapping[str, str]) -> AsyncGenerator[Path]:
    """Yield a new directory to make something called *name* in, and remove it afterwards; the caller holds the lock of that name.

    Raises:
      ImageBuildError: if it can't be made, or in place of an `OSError` of the block.

    """
    try:
        await remove_leftovers(staging, name, environment)
        directory = staging / f"{name}.build-{os.urandom(8).hex()}"
        make_marked(directory)
        try:
            yield directory
        finally:
            with trio.move_on_after(_REMOVAL_SECONDS, shield=True):
                await remove_staging(directory, environment)
    except RecursionError as exc:  # a package, say, or what the user has copied
        raise ImageBuildError(
            f"building {name} failed: something in it has too many directories within each other"
        ) from exc
    except OSError as exc:
        where = exc.filename or staging
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ImageBuildError(f"the disk of {staging} is full; free some, or use another cache directory") from exc
        raise ImageBuildError(f"building {name} failed: {where}: {exc.strerror or exc}") from exc


async def remove_leftovers(staging: Path, name: str, environment: Mapping[str, str]) -> None:
    """Remove what builds of *name* left that did not come to their end; the caller holds the lock."""
    await trio.lowlevel.checkpoint()
    for leftover in find_leftovers(staging, name):
        await remove_staging(leftover, environment)


def find_leftovers(staging: Path, name: str | None = None) -> list[Path]:
    """Return the directories of ours for builds and removals of *name*, or of any name: leftovers, if its lock is ours."""
    found = [(path, _LEFTOVER_NAME.fullmatch(path.name)) for path in sorted(staging.glob("*.*"))]
    return [path for path, match in found if match and name in (None, match["name"]) and is_marked(path)]


async def _build_in(directory: Path, request: BuildRequest, report: Callable[[str, float | None], object]) -> None:
    recipe = request.recipe
    context = BuildContext(staging=directory, base=request.base, report=report, environment=request.environment)
    context.output.mkdir(mode=0o755)
    mark(context.output)
    details = await recipe.build(context)
    await trio.to_thread.run_sync(_finish, context.output, request, details)
    report("built", 1.0)


def _finish(output: Path, request: BuildRequest, details: Mapping[str, object]) -> None:
    """Write the manifest, put everything on the disk, and give it its name: in this order."""
    recipe = request.recipe
    unexpected = {path.name for path in output.iterdir()} ^ {*recipe.files, MARKER}
    if unexpected:
        raise ImageBuildError(
            f"the build of {recipe.name} did not make what it should: {', '.join(sorted(unexpected))}"
        )
    for name in recipe.files:
        # QEMU reads them as another user.
        (output / name).chmod(0o644)
    files = describe_files(output, recipe.files)
    manifest = Manifest(name=recipe.name, digest=request.digest, created=time.time(), files=files, details=details)
    text = manifest.to_json()
    if len(text) > LONGEST_MANIFEST:
        raise ImageBuildError(f"{recipe.name} says more of itself than is ever read: {len(text)} bytes")
    write_new_file(output / MANIFEST_NAME, text, 0o644)
    record_verdict(output, manifest)
    for path in output.iterdir():
        _sync(path)
    _sync(output)
    output.rename(request.entry)
    _sync(request.entry.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
