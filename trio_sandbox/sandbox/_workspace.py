"""Directories that go into the guest and come back: what was changed there is brought here, and nothing else is touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, final

import attrs
import trio

from .._errors import WorkspaceConflictError
from .._private import make_private_directory
from .._workspace_change import WorkspaceChange
from ..guest.trees import open_directory, remove
from ._host_tree import Applier, Found, open_below, opened, scan
from ._plan import Entry, Tree, conflicts, plan
from ._slot import Slot
from ._transfer import ProgressCallback, TransferStatistics, download, upload
from ._unified import LONGEST_FILE, DiffWriter, Version

OnConflict = Literal["raise", "skip", "overwrite"]
#: How the copy of the guest's directory is called in ours.
_COPY = "copy"
#: What the owner may read; everything of the guest's is read by us alone.
_PRIVATE_UMASK = 0o077

T = TypeVar("T")


@final
@attrs.frozen(kw_only=True)
class Comparison:
    """What is compared with what."""

    slot: Slot
    user: str | int | None
    remote: str
    """The directory in the guest."""
    local: Path
    """That on the host, absolute."""
    base: Tree
    """What both were."""
    excluded: frozenset[str]
    max_bytes: int
    staging: Path
    """Where the copy of the guest's directory is made."""


async def push(
    slot: Slot, user: str | int | None, local: Path, remote: str, progress: ProgressCallback | None
) -> tuple[TransferStatistics, Tree]:
    """Upload a directory; return what it was before it was read, too."""
    found = await _in_thread(partial(_scan_host, local))
    return await upload(slot, user, local, remote, progress), found.tree


async def pull(
    comparison: Comparison, *, dry_run: bool, on_conflict: OnConflict
) -> tuple[Sequence[WorkspaceChange], Tree]:
    """What `Sandbox.pull` does; return the changes and what both are from now on."""

    def work(copy: int, guest: Tree) -> tuple[Sequence[WorkspaceChange], Tree]:
        with opened(comparison.local) as host:
            here = scan(host)
            changes = _plan(comparison, guest, here, overwrite=on_conflict == "overwrite")
            if dry_run:
                return changes, comparison.base
            if on_conflict == "raise" and (refused := conflicts(changes)):
                raise _conflict(comparison, changes, refused)
            changes = Applier(host, here, copy, guest).apply(changes)
            return changes, _new_base(comparison, guest, changes)

    changes, base = await _compare(comparison, work)
    if on_conflict == "raise" and not dry_run and (refused := conflicts(changes)):  # that came up while it was done
        raise _conflict(comparison, changes, refused)
    return changes, base


async def diff(comparison: Comparison) -> str:
    """What `Sandbox.diff` does."""

    def work(copy: int, guest: Tree) -> str:
        with opened(comparison.local) as host:
            here = scan(host)
            writer = DiffWriter()
            pieces: list[str] = []
            for change in _plan(comparison, guest, here, overwrite=False):
                before = _version(host, change.path, here.tree.get(change.path))
                after = _version(copy, change.path, guest.get(change.path))
                if before is not None or after is not None:
                    pieces.append(writer.diff(change.path, before, after))
            return "".join(pieces)

    return await _compare(comparison, work)


def _plan(comparison: Comparison, guest: Tree, here: Found, *, overwrite: bool) -> list[WorkspaceChange]:
    return plan(comparison.base, guest, here.tree, excluded=comparison.excluded, overwrite=overwrite)


def _new_base(comparison: Comparison, guest: Tree, changes: Collection[WorkspaceChange]) -> Tree:
    """Return what both sides have in common now: what the guest has, but for what was not brought here."""
    kept = {change.path for change in conflicts(changes)}
    base = dict(comparison.base)
    for path in {*base, *guest} - kept:
        if comparison.excluded.isdisjoint(path.split("/")):
            if path in guest:
                base[path] = guest[path]
            else:
                del base[path]
    return base


def _conflict(
    comparison: Comparison, changes: Sequence[WorkspaceChange], refused: Sequence[WorkspaceChange]
) -> WorkspaceConflictError:
    return WorkspaceConflictError(comparison.remote, os.fspath(comparison.local), changes, refused)


async def _compare(comparison: Comparison, work: Callable[[int, Tree], T]) -> T:
    """Get a copy of the guest's directory, and do something with that and what is in it."""
    top = comparison.staging / f"pull-{os.urandom(8).hex()}"
    await _in_thread(partial(make_private_directory, top))
    try:
        await download(
            comparison.slot,
            comparison.user,
            comparison.remote,
            top / _COPY,
            None,
            comparison.max_bytes,
            _PRIVATE_UMASK,
        )
        return await _in_thread(partial(_look_at, top / _COPY, comparison, work))
    finally:
        with trio.CancelScope(shield=True):
            # Bounded by what was downloaded: removing that is all it does.
            await _in_thread(partial(_remove, top))


def _look_at(copy: Path, comparison: Comparison, work: Callable[[int, Tree], T]) -> T:
    try:
        descriptor = open_directory(os.fspath(copy))
    except NotADirectoryError as exc:
        raise NotADirectoryError(exc.errno, exc.strerror, comparison.remote) from None
    try:
        os.fchmod(descriptor, stat.S_IRWXU)
        return work(descriptor, scan(descriptor, max_bytes=comparison.max_bytes, ours=True).tree)
    finally:
        os.close(descriptor)


def _scan_host(local: Path) -> Found:
    with opened(local) as descriptor:
        return scan(descriptor)


def _version(directory: int, path: str, entry: Entry | None) -> Version | None:
    """Return what a diff has to show of a path; None for what it shows nothing of."""
    if entry is None or entry.kind in ("directory", "other"):
        return None
    if entry.kind == "link":
        return Version("120000", os.fsencode(entry.content))
    with open(open_below(directory, path), "rb", buffering=0) as file:
        content = file.read(LONGEST_FILE + 1)
    return Version("100755" if entry.executable else "100644", content if len(content) <= LONGEST_FILE else None)


def _remove(directory: Path) -> None:
    parent = open_directory(os.fspath(directory.parent))
    try:
        remove(parent, directory.name)
    finally:
        os.close(parent)


async def _in_thread(work: Callable[[], T]) -> T:
    # A limiter of its own: a slow disk must not hold up what others do in threads.
    return await trio.to_thread.run_sync(work, limiter=trio.CapacityLimiter(1))
