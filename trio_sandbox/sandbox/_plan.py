"""What came of a directory in the guest and on the host, compared with what it was: a plan of changes, and conflicts. No I/O.

A directory is described by a `Tree`: of each path below it, what is there. Three of them are compared: as it was when both were the
same (the base), as it is in the guest, and as it is here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence, Set as AbstractSet
from typing import Literal, final

import attrs

from .._workspace_change import ChangeKind, WorkspaceChange

EntryKind = Literal["file", "directory", "link", "other"]


@final
@attrs.frozen
class Entry:
    """What is at a path."""

    kind: EntryKind
    content: str = ""
    """A file's digest, or a link's target."""
    executable: bool = False
    size: int = attrs.field(default=0, eq=False)
    """A file's bytes, holes included."""


#: By paths relative to the directory, with slashes between their parts; the directory itself is not among them.
Tree = Mapping[str, Entry]


def plan(
    base: Tree, guest: Tree, host: Tree, *, excluded: AbstractSet[str] = frozenset(), overwrite: bool = False
) -> list[WorkspaceChange]:
    """Return what has to be done for the host to have what was changed in the guest, by path.

    Args:
      base: What both were.
      guest: What it is in the guest.
      host: What it is on the host.
      excluded: Names that nothing is done about, nor about what is below.
      overwrite: What was changed here, too, is no conflict.

    """
    changes: dict[str, WorkspaceChange] = {}
    for path in sorted({*base, *guest}):
        was, there, here = base.get(path), guest.get(path), host.get(path)
        if there in (was, here) or not excluded.isdisjoint(path.split("/")):
            continue
        kind: ChangeKind = "added" if here is None else "removed" if there is None else "changed"
        changes[path] = WorkspaceChange(path, kind, _conflict(path, was, there, here, overwrite=overwrite))
    _keep_what_is_only_here(changes, guest, host)
    _need_directories(changes, guest, host)
    return sorted(changes.values(), key=lambda change: change.path)


def _conflict(path: str, was: Entry | None, there: Entry | None, here: Entry | None, *, overwrite: bool) -> str:
    if there is not None and there.kind == "other":
        return "is neither a file nor a directory nor a link"
    if there is not None and there.kind == "link" and not stays_within(path, there.content):
        return "is a link that leads out of the directory"
    if here == was or overwrite:
        return ""
    if here is None:
        return "was removed here"
    return "is here, too, and another one" if was is None else "was changed here, too"


def _keep_what_is_only_here(changes: dict[str, WorkspaceChange], guest: Tree, host: Tree) -> None:
    """A directory can go only if all goes that is in it here."""
    inner: dict[str, list[str]] = {}
    for path in host:
        inner.setdefault(posixpath.dirname(path), []).append(path)
    for path in sorted(changes, reverse=True):  # what is inside comes first
        stays = path in guest and guest[path].kind == "directory"
        if not stays and any(not _goes(changes, child) for child in inner.get(path, ())):
            changes[path] = attrs.evolve(changes[path], conflict="has something in it that is only here")


def _goes(changes: Mapping[str, WorkspaceChange], path: str) -> bool:
    change = changes.get(path)
    return change is not None and change.kind == "removed" and not change.conflict


def _need_directories(changes: dict[str, WorkspaceChange], guest: Tree, host: Tree) -> None:
    """What is added or changed needs a directory to be in."""
    for path in sorted(changes):  # what is outside comes first
        parent = posixpath.dirname(path)
        if changes[path].conflict or changes[path].kind == "removed" or not parent:
            continue
        change = changes.get(parent)
        entry = host.get(parent) if change is None or change.conflict else guest.get(parent)
        if entry is None or entry.kind != "directory":
            changes[path] = attrs.evolve(changes[path], conflict="would be in a directory that is none here")


def stays_within(path: str, target: str) -> bool:
    """Tell whether a link at *path* can't lead out of the directory, whatever other such links there are.

    The parts that go up come first in its target, and are no more than the directories that it is in: behind a name, which may be
    a link itself, nobody knows where ".." leads.
    """
    if target.startswith("/") or not target:
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    return up <= path.count("/") and ".." not in parts[up:]


def conflicts(changes: Iterable[WorkspaceChange]) -> Sequence[WorkspaceChange]:
    """Return those that can't be done."""
    return [change for change in changes if change.conflict]
