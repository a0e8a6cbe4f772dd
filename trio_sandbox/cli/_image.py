"""``trio-sandbox image``: build, list and remove what the cache holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from .._errors import SandboxError
from ..image import ImageStore, StoredImage, default_cache_directory
from ..qemu import open_runtime
from ._progress import open_progress
from ._report import complain_about


def image(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    store = ImageStore(options.cache_dir or default_cache_directory())
    actions: dict[str, Callable[[], None]] = {
        "build": lambda: trio.run(build, store, options.names, options.quiet),
        "list": lambda: show(store, as_json=options.json),
        "rm": lambda: trio.run(remove, store, options.names),
        "prune": lambda: trio.run(prune, store),
    }
    failed = False
    try:
        actions[options.action]()
    except* (SandboxError, OSError) as group:
        complain_about(group)
        failed = True
    return int(failed)


async def build(store: ImageStore, names: Sequence[str], quiet: bool) -> None:
    """Build *names* and the system disk, whatever of them is not there yet."""
    # The runtime's reaper ends the builders should we be killed.
    with open_progress(quiet=quiet) as show:
        async with open_runtime(None) as runtime:
            for name in names:
                built = await store.ensure(name, build=True, progress=show, environment=runtime.environment)
            await store.ensure_system(build=True, progress=show, environment=runtime.environment)
