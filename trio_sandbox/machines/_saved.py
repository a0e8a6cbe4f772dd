"""Sandboxes that a user has saved: what there is, and how to be rid of it, without a host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

import attrs

from .._checks import to_path
from .._errors import TemplateError, UnknownTemplateError
from ..image import default_cache_directory
from ._named import NamedTemplateStore


@final
@attrs.frozen(kw_only=True)
class SavedSandbox:
    """A sandbox that `Sandbox.save` has saved, for ``open_sandbox(template=name)`` to restore."""

    name: str
    """What it was saved as."""
    image: str = ""
    """The name of its image, as ``trio-sandbox image list`` shows it. The image is kept for as long as this sandbox is."""
    memory_mib: int = 0
    """Its RAM, in MiB."""
    vcpus: int = 0
    """Its virtual CPUs."""
    created: float = 0.0
    """When it was saved, in Unix seconds."""
    size_bytes: int = 0
    """What it takes on the disk, in bytes. Files that it shares with others count in full."""
    problem: str = ""
    """Why it can't be used, as far as that is known: it is damaged, or another version of the library saved it. Then only its name is known. "" if nothing is wrong."""


def saved_sandboxes(cache_dir: str | os.PathLike[str] | None = None) -> tuple[SavedSandbox, ...]:
    """Return all sandboxes that were saved, by name.

    It reads some small files, and needs no host.

    Args:
      cache_dir: `HostConfig.cache_dir`.

    Raises:
      OSError: if the directory can't be read.

    """
    store = _store(cache_dir)
    return tuple(saved for name in store.names() if (saved := _describe(store, name)) is not None)


def remove_saved_sandbox(name: str, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove a sandbox that was saved; return the bytes that came free. It can't be made again.

    Sandboxes restored from it are not disturbed. It takes as long as the disk does.

    Args:
      name: Which.
      cache_dir: `HostConfig.cache_dir`.

    Raises:
      TypeError, ValueError: for what can't be a name.
      UnknownTemplateError: if there is none of that name; the message lists those that exist.
      OSError: if it can't be removed.

    """
    return _store(cache_dir).remove(name)


def _store(cache_dir: str | os.PathLike[str] | None) -> NamedTemplateStore:
    return NamedTemplateStore(default_cache_directory() if cache_dir is None else Path(to_path(cache_dir, "cache_dir")))


def _describe(store: NamedTemplateStore, name: str) -> SavedSandbox | None:
    """Return what is known of one; None if somebody has just removed it."""
    try:
        found = store.find(name)
    except UnknownTemplateError:
        return None
    except TemplateError as exc:
        return SavedSandbox(name=name, problem=str(exc))
    return SavedSandbox(
        name=name,
        image=found.image,
        memory_mib=found.memory_mib,
        vcpus=found.vcpus,
        created=found.created,
        size_bytes=found.size_bytes,
    )
