"""Directories that go into the guest and come back: what was changed there is brought here, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, final
from weakref import ref

import attrs
import trio

from .._errors import WorkspaceConflictError
from .._private import make_private_directory
from .._workspace_change import WorkspaceChange
from ..client import Machine
from ..guest.trees import open_directory, remove
from ._changes import Base, Changes, take_states
from ._host_tree import Applier, Found, open_below, opened, scan, unchanged
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
    base: Base
    """What both were."""
    excluded: frozenset[str]
    max_bytes: int
    staging: Path
    """Where the copy of the guest's directory is made."""


async def push(
    slot: Slot, user: str | int | None, local: Path, remote: str, progress: ProgressCallback | None
) -> tuple[TransferStatistics, Base]:
    """Upload a directory; return what it was before it was read, too."""
    found = await _in_thread(partial(_scan_host, local))
    base = Base(found.tree)
    states: dict[str, bytes] = {}

    def take(payload: bytes, machine: Machine) -> None:
        nonlocal base
        take_states(payload, states, base.tree)
        base = Base(base.tree, states, ref(machine))

    sent = await upload(slot, user, local, remote, progress, take)
    return sent, await _in_thread(partial(_only_what_was_sent, local, found, base))


async def pull(
    comparison: Comparison, *, dry_run: bool, on_conflict: OnConflict
) -> tuple[Sequence[WorkspaceChange], Base]:
    """What `Sandbox.pull` does; return the changes and what both are from now on."""

    def work(copy: int, guest: Tree) -> tuple[Sequence[WorkspaceChange], Tree]:
        with opened(comparison.local) as host:
            here = scan(host)
            changes = _plan(comparison, guest, here, overwrite=on_conflict == "overwrite")
            if dry_run:
                return changes, comparison.base.tree
            if on_conflict == "raise" and (refused := conflicts(changes)):
                raise _conflict(comparison, changes, refused)
            changes = Applier(host, here, copy, guest).apply(changes)
            return changes, _new_base(comparison, guest, changes)

    (changes, tree), known = await _compare(comparison, work)
    if on_conflict == "raise" and not dry_run and (refused := conflicts(changes)):  # that came up while it was done
        raise _conflict(comparison, changes, refused)
    return changes, known(tree)


async def diff(comparison: Comparison) -> tuple[str, Base]:
    """What `Sandbox.diff` does; return the text and what both were, of which more may be known now."""

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

    text, known = await _compare(comparison, work)
    return text, known(comparison.base.tree)


def _plan(comparison: Comparison, guest: Tree, here: Found, *, overwrite: bool) -> list[WorkspaceChange]:
    return plan(comparison.base.tree, guest, here.tree, excluded=comparison.excluded, overwrite=overwrite)


def _new_base(comparison: Comparison, guest: Tree, changes: Collection[WorkspaceChange]) -> Tree:
    """Return what both sides have in common now: what the guest has, but for what was not brought here."""
    kept = {change.path for change in conflicts(changes)}
    base = dict(comparison.base.tree)
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


async def _compare(comparison: Comparison, work: Callable[[int, Tree], T]) -> tuple[T, Callable[[Tree], Base]]:
    """Get a copy of what changed in the guest's directory, and do something with that and with what is there in all.

    What comes besides gives the base of a new common state.
    """
    changes = Changes(comparison.base, comparison.excluded)
    top = comparison.staging / f"pull-{os.urandom(8).hex()}"
    await _in_thread(partial(make_private_directory, top))
    copy = os.fspath(top / _COPY)
    try:
        await download(
            comparison.slot,
            comparison.user,
            comparison.remote,
            copy,
            None,
            comparison.max_bytes,
            _PRIVATE_UMASK,
            changes,
        )
        guest, result = await _in_thread(partial(_look_at, copy, comparison, changes.same, work))
        return result, lambda tree: changes.now_known(Base(tree), guest)
    except OSError as exc:
        if exc.errno != errno.EFBIG or exc.filename != copy:
            raise
        raise OSError(exc.errno, exc.strerror, comparison.remote) from None  # it is that which is too large
    finally:
        with trio.CancelScope(shield=True):
            # Bounded by what was downloaded: removing that is all it does.
            await _in_thread(partial(_remove, top))


def _look_at(copy: str, comparison: Comparison, same: Tree, work: Callable[[int, Tree], T]) -> tuple[Tree, T]:
    try:
        descriptor = open_directory(copy)
    except NotADirectoryError as exc:
        raise NotADirectoryError(exc.errno, exc.strerror, comparison.remote) from None
    try:
        os.fchmod(descriptor, stat.S_IRWXU)
        size = sum(entry.size for entry in same.values())
        came = scan(descriptor, max_bytes=comparison.max_bytes, size=size, ours=True).tree
        guest = {**came, **same}
        return guest, work(descriptor, guest)
    finally:
        os.close(descriptor)


async def check_directory(local: Path) -> None:
    """Raise `OSError` if *local* is no directory of the host's."""

    def check() -> None:
        with opened(local):
            pass

    await _in_thread(check)


def _scan_host(local: Path) -> Found:
    with opened(local) as descriptor:
        return scan(descriptor)


def _only_what_was_sent(local: Path, found: Found, base: Base) -> Base:
    """Leave out the states of files that were not what was found any more when they were sent."""
    with opened(local) as descriptor:
        same = unchanged(descriptor, found)
    return attrs.evolve(base, states={path: state for path, state in base.states.items() if path in same})


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
