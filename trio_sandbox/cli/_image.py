"""``trio-sandbox image``: build, list and remove what the cache holds."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from .._config import HostConfig
from .._errors import SandboxError, UnknownImageError
from .._oci_reference import is_oci
from ..host import open_host
from ..image import (
    LOCKED,
    ImageStore,
    default_cache_directory,
    ensure_bootable,
    export_image,
    image_for_program,
    import_images,
)
from ..machines import Dependents
from ..qemu import open_runtime
from ._progress import open_progress
from ._report import complain_about


def image(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    cache = options.cache_dir or default_cache_directory()
    store, dependents = ImageStore(cache), Dependents(cache)
    actions: dict[str, Callable[[], None]] = {
        "build": lambda: trio.run(build, store, options.names, options.packages, options.cache_dir, options.quiet),
        "inspect": lambda: print(description(store, dependents, options.name)),
        "export": lambda: trio.run(write, store, options.name, options.file),
        "import": lambda: trio.run(read, store, options.file, options.quiet),
        "list": lambda: print(listing(store, as_json=options.json)),
        "rm": lambda: trio.run(remove, store, options.names),
        "prune": lambda: trio.run(prune, store, dependents, options.to),
    }
    status = 0
    try:
        actions[options.action]()
    except* BrokenPipeError:
        raise
    except* (SandboxError, OSError, ValueError, ModuleNotFoundError) as group:
        complain_about(group)
        status = 1
    return status


async def build(
    store: ImageStore, names: Sequence[str], packages: Sequence[str], cache_dir: Path | None, quiet: bool
) -> None:
    """Build *names* and the system disk, as far as they are missing, and say where they are.

    With *packages*, and for images that are packages on another one, that takes virtual machines, and so a whole host.
    """
    if packages or any(name in LOCKED for name in names):
        with open_progress(quiet=quiet) as show:
            async with open_host(HostConfig(cache_dir=cache_dir, progress=show)) as host:
                for name in names:
                    image = image_for_program(name, packages)
                    await host.prepare(image)
                    print(f"{name}: {image!s} is there")
        return
    # The runtime's reaper ends the builders, should this process be killed.
    async with open_runtime(None) as runtime:
        for name in names:
            with open_progress(quiet=quiet) as show:
                built, _ = await ensure_bootable(store, name, progress=show, environment=runtime.environment)
            print(f"{name}: {built.path}, {mebibytes(built.size_bytes)}")


def description(store: ImageStore, dependents: Dependents, name: str) -> str:
    """Give all that is known of one image as JSON: of each layer, the lowest first, with what stands on it.

    Raises:
      UnknownImageError: if there is none of that name.
    """
    everything = store.list()
    stored = {entry.name: entry for entry in reversed(everything)}  # the newest of a name
    name = next((entry.name for entry in everything if is_oci(name) and entry.step == name), name)
    if name not in stored:
        raise UnknownImageError(f"the store has no image {name!r}; it has: {', '.join(sorted(stored)) or 'nothing'}")
    layers: list[dict[str, object]] = []
    while name in stored:
        entry = stored[name]
        above = sorted(each.name for each in everything if each.below == name)
        name = entry.below
        layers.append(
            {
                "name": entry.name,
                "digest": entry.digest,
                "path": os.fspath(entry.path),
                "created": entry.created,
                "size_bytes": entry.size_bytes,
                "current": entry.current,
                "used": entry.used,
                "layers_on_it": above,
                "templates_on_it": dependents.templates_on(entry.path),
                "saved_on_it": dependents.saved_on(entry.path),
                **entry.details,
            }
        )
    return json.dumps(layers[::-1], indent=2)


def listing(store: ImageStore, *, as_json: bool) -> str:
    """Give what is in the store as a table, or as JSON."""
    stored = store.list()
    rows = [
        {
            "name": entry.name,
            "digest": entry.digest,
            "size_bytes": entry.size_bytes,
            "current": entry.current,
            "used": entry.used,
            "below": entry.below or None,
            "step": entry.step or None,
        }
        for entry in stored
    ]
    if as_json:
        return json.dumps(rows, indent=2)
    if not stored:
        return "no images; `trio-sandbox image build` builds one"
    width = max(len(entry.name) for entry in stored)
    return "\n".join(
        f"{entry.name:{width}}  {entry.digest[:16]}  {mebibytes(entry.size_bytes):>10}"
        + ("" if entry.current else "  superseded")
        + (f"  on {entry.below}: {entry.step}" if entry.below else f"  {entry.step}" if entry.step else "")
        for entry in stored
    )


async def remove(store: ImageStore, names: Sequence[str]) -> None:  # noqa: ASYNC910 (there is a name at least)
    """Remove *names*, and say how much came free."""
    for name in names:
        print(f"{name}: {mebibytes(await store.remove(name))} freed")


async def write(store: ImageStore, name: str, file: Path) -> None:
    """Write an image with all that it stands on to *file*, and say how large that is."""
    size = await export_image(store, name, file)
    print(f"{name}: {file}, {mebibytes(size)}")


async def read(store: ImageStore, file: Path, quiet: bool) -> None:
    """Take what is in *file* into the store, and say what that is."""
    async with open_runtime(None) as runtime:
        with open_progress(quiet=quiet) as show:
            names = await import_images(store, file, progress=show, environment=runtime.environment)
    print("\n".join(f"{name}: imported" for name in names))


async def prune(store: ImageStore, dependents: Dependents, to_mib: int | None) -> None:
    """Remove what nothing can use any more, then what was used longest ago, and say how much came free."""
    freed = await store.prune(is_needed=lambda entry: bool(dependents.saved_on(entry)))
    if to_mib is not None:
        freed += await store.evict(to_mib * 2**20, is_needed=dependents.any_on)
    print(f"{mebibytes(freed)} freed")
    if to_mib is not None and (left := sum(entry.size_bytes for entry in store.list())) > to_mib * 2**20:
        print(
            f"{mebibytes(left)} are left: images that come with trio-sandbox, and what open sandboxes, templates or saved sandboxes stand on; "
            "`trio-sandbox template rm` and `image rm` remove those"
        )


def mebibytes(size: int) -> str:
    """Write a size as a person reads it."""
    return f"{size / 2**20:.0f} MiB"
