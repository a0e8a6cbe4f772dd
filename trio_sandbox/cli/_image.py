"""``trio-sandbox image``: build, list and remove what the cache holds."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from .._config import HostConfig
from .._errors import SandboxError, UnknownImageError
from ..host import open_host
from ..image import (
    LOCKED,
    ImageStore,
    default_cache_directory,
    ensure_bootable,
    export_image,
    image_for_program,
    import_images,
    references_of,
)
from ..machines import Dependents
from ..qemu import open_runtime
from ._json import open_rows, print_facts
from ._progress import open_progress
from ._report import complain_about
from ._signals import end_on_signal


def image(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    return trio.run(end_on_signal, partial(act, options), "cleaning up")


async def act(options: argparse.Namespace) -> int:
    """Do what the command line says, and say what was done; 0, or 1 if it failed."""
    cache = options.cache_dir or default_cache_directory()
    store, dependents = ImageStore(cache), Dependents(cache)
    as_json: bool = options.json
    status = 0
    try:
        match options.action:
            case "build":
                await build(store, options.names, options.packages, options.cache_dir, options.quiet, as_json)
            case "inspect":
                print(description(store, dependents, options.name))
            case "export":
                await write(store, options.name, options.file, as_json)
            case "import":
                await read(store, options.file, options.quiet, as_json)
            case "list":
                print(listing(store, as_json=as_json))
            case "rm":
                await remove(store, options.names, as_json)
            case _:
                await prune(store, dependents, options.to, as_json)
    except* BrokenPipeError:
        raise
    except* (SandboxError, OSError, ValueError, ModuleNotFoundError) as group:
        complain_about(group)
        status = 1
    return status  # noqa: ASYNC910 - what only looks into the store has nothing to wait for


async def build(
    store: ImageStore, names: Sequence[str], packages: Sequence[str], cache_dir: Path | None, quiet: bool, as_json: bool
) -> None:
    """Build *names* and the system disk, as far as they are missing, and say where they are.

    With *packages*, and for images that are packages on another one, that takes virtual machines, and so a whole host.
    """
    with open_rows(as_json) as add:
        if packages or any(name in LOCKED for name in names):
            with open_progress(quiet=quiet) as show:
                async with open_host(HostConfig(cache_dir=cache_dir, progress=show)) as host:
                    for name in names:
                        image = image_for_program(name, packages)
                        await host.prepare(image)
                        add(f"{name}: {image!s} is there", name=name, image=str(image), path=None, size_bytes=None)
            return
        async with open_runtime(None) as runtime:
            for name in names:
                with open_progress(quiet=quiet) as show:
                    built, _ = await ensure_bootable(store, name, progress=show, environment=runtime.environment)
                path, size = os.fspath(built.path), built.size_bytes
                add(f"{name}: {path}, {mebibytes(size)}", name=name, image=built.name, path=path, size_bytes=size)


def description(store: ImageStore, dependents: Dependents, name: str) -> str:
    """Give all that is known of one image as JSON: of each layer, the lowest first, with what stands on it.

    Raises:
      UnknownImageError: if there is none of that name.
    """
    everything = store.list()
    stored = {entry.name: entry for entry in reversed(everything)}  # the newest of a name
    stands_for = store.find_container(name)
    name = next((entry.name for entry in everything if stands_for(entry.details)), name)
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


async def remove(store: ImageStore, names: Sequence[str], as_json: bool = False) -> None:  # noqa: ASYNC910 (there is a name at least)
    """Remove *names*, and say how much came free."""
    with open_rows(as_json) as add:
        for name in names:
            freed = await store.remove(name)
            add(f"{name}: {mebibytes(freed)} freed", name=name, freed_bytes=freed)


async def write(store: ImageStore, name: str, file: Path, as_json: bool = False) -> None:
    """Write an image with all that it stands on to *file*, and say how large that is."""
    size = await export_image(store, name, file)
    print_facts(as_json, f"{name}: {file}, {mebibytes(size)}", name=name, file=os.fspath(file), size_bytes=size)


async def read(store: ImageStore, file: Path, quiet: bool, as_json: bool = False) -> None:
    """Take what is in *file* into the store, and say what that is."""
    async with open_runtime(None) as runtime:
        with open_progress(quiet=quiet) as show:
            names = await import_images(store, file, progress=show, environment=runtime.environment)
    stored = {entry.name: [entry.details] for entry in store.list()}
    with open_rows(as_json) as add:
        for name in names:
            known = [each for details in stored.get(name, ()) for each in references_of(store, details)]
            add(f"{name}: imported" + (f", as {', '.join(known)}" if known else ""), name=name)


async def prune(store: ImageStore, dependents: Dependents, to_mib: int | None, as_json: bool = False) -> None:
    """Remove what nothing can use any more, then what was used longest ago, and say how much came free."""
    freed = await store.prune(is_needed=lambda entry: bool(dependents.saved_on(entry)))
    if to_mib is not None:
        freed += await store.evict(to_mib * 2**20, is_needed=dependents.any_on)
    left = sum(entry.size_bytes for entry in store.list())
    report = f"{mebibytes(freed)} freed"
    if to_mib is not None and left > to_mib * 2**20:
        report += (
            f"\n{mebibytes(left)} are left: images that come with trio-sandbox, and what open sandboxes, templates or saved sandboxes stand on; "
            "`trio-sandbox template rm` and `image rm` remove those"
        )
    print_facts(as_json, report, freed_bytes=freed, left_bytes=left)


def mebibytes(size: int) -> str:
    """Write a size as a person reads it."""
    return f"{size / 2**20:.0f} MiB"
