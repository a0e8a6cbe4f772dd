"""``trio-sandbox image``: build, list and remove what the cache holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import trio

from .._errors import SandboxError
from ..image import ImageStore, default_cache_directory
from ..qemu import open_runtime
from ._progress import open_progress
from ._report import complain_about


def image(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    store = ImageStore(options.cache_dir or default_cache_directory())
    actions: dict[str, Callable[[], None]] = {
        "build": lambda: trio.run(build, store, options.names, options.quiet),
        "list": lambda: print(listing(store, as_json=options.json)),
        "rm": lambda: trio.run(remove, store, options.names),
        "prune": lambda: trio.run(prune, store),
    }
    status = 0
    try:
        actions[options.action]()
    except* BrokenPipeError:
        raise
    except* (SandboxError, OSError) as group:
        complain_about(group)
        status = 1
    return status


async def build(store: ImageStore, names: Sequence[str], quiet: bool) -> None:
    """Build *names* and the system disk, as far as they are missing, and say where they are."""
    # The runtime's reaper ends the builders, should this process be killed.
    async with open_runtime(None) as runtime:
        for name in names:
            with open_progress(quiet=quiet) as show:
                built, _ = await store.ensure_bootable(name, progress=show, environment=runtime.environment)
            print(f"{name}: {built.path}, {mebibytes(built.size_bytes)}")


def listing(store: ImageStore, *, as_json: bool) -> str:
    """Give what is in the store as a table, or as JSON."""
    stored = store.list()
    rows = [
        {"name": entry.name, "digest": entry.digest, "size_bytes": entry.size_bytes, "current": entry.current}
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
        for entry in stored
    )


async def remove(store: ImageStore, names: Sequence[str]) -> None:  # noqa: ASYNC910 (there is a name at least)
    """Remove *names*, and say how much came free."""
    for name in names:
        print(f"{name}: {mebibytes(await store.remove(name))} freed")


async def prune(store: ImageStore) -> None:
    """Remove what nothing can use any more, and say how much came free."""
    freed = await store.prune()
    print(f"{mebibytes(freed)} freed")


def mebibytes(size: int) -> str:
    """Write a size as a person reads it."""
    return f"{size / 2**20:.0f} MiB"
