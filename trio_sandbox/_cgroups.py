"""Which control groups we are in, in both versions of the kernel's; cgroups(7)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")


def own_groups(controller: str, root: Path = ROOT) -> Iterator[tuple[Path, int]]:
    """Give the directories of our control group and of all above it that we see, each with its hierarchy's version.

    Args:
      controller: Which hierarchy is meant in version 1, which has several.
      root: For tests: where ``/proc`` is, and what the paths in it start at.

    """
    for line in (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines():
        _, names, path = line.split(":", 2)
        # Version 2 is the line without names; a machine may have both, each with controllers of its own.
        version = 2 if names == "" else 1
        if version == 1 and controller not in names.split(","):
            continue
        mount = _mount(root, version, controller)
        if mount is None:
            continue
        top, shown = mount
        directory = top
        if path == shown or path.startswith(shown.rstrip("/") + "/"):
            directory = top / path[len(shown) :].strip("/")
        # In a container the path may be the host's, while we see our own part only: then that is all of ours.
        if ".." in directory.parts or not directory.is_dir():
            directory = top
        yield directory, version
        while directory != top:
            directory = directory.parent
            yield directory, version


def _mount(root: Path, version: int, controller: str) -> tuple[Path, str] | None:
    """Return where a hierarchy is mounted, and which of its directories that shows; proc_pid_mountinfo(5)."""
    for line in (root / "proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        shown, point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if (version == 2 and kind == "cgroup2") or (
            version == 1 and kind == "cgroup" and controller in options.split(",")
        ):
            return root / point.lstrip("/"), shown
    return None
