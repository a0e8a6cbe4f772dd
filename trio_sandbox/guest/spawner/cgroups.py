"""Control groups for users' processes: one holds a process and all that it ever starts (cgroup v2, see cgroups(7))."""

from __future__ import annotations

import os

from .pressure import Pressure

#: Empty groups that are kept for the next processes: to make one takes a tenth of a process's start.
_SPARE_GROUPS = 8


class Group:
    """One control group, empty or in use. Made by `Groups`."""

    __slots__ = ("_directory", "_members", "events", "name")

    def __init__(self, directory: int, name: str) -> None:
        os.mkdir(name, dir_fd=directory)
        self._directory = directory
        self.name: str = name
        self._members = os.open(f"{name}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        self.events: int = os.open(f"{name}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        """A descriptor on which poll(2) reports a change of `is_populated` since it was asked for, as POLLPRI."""

    def open_usage(self) -> int:
        """Open a file that tells the processor time of all that were ever in it, in its first line."""
        return os.open(f"{self.name}/cpu.stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)

    def join(self) -> None:
        """Put the calling process in."""
        os.write(self._members, b"0")

    def kill(self) -> None:
        """Send SIGKILL to all that are in it, and to what they are forking."""
        descriptor = os.open(f"{self.name}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)

    def threads(self) -> list[int]:
        """Return the ids of the threads in it that have not ended."""
        descriptor = os.open(f"{self.name}/cgroup.threads", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        with open(descriptor, "rb", buffering=0) as file:
            return [int(line) for line in file.readall().split()]

    def is_populated(self) -> bool:
        """Whether any process is in it."""
        return b"populated 1" in os.pread(self.events, 256, 0)

    def remove(self) -> None:
        """Close and remove it; it must be empty."""
        os.close(self._members)
        os.close(self.events)
        os.rmdir(self.name, dir_fd=self._directory)


class Groups:
    """The groups below one directory.

    Args:
      path: A directory of a cgroup v2 hierarchy that is ours alone. It need not stay in reach.

    """

    def __init__(self, path: str) -> None:
        self._directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._spare: list[Group] = []
        self._made = 0

    def take(self, *, new: bool = False) -> Group:
        """Return an empty group; if *new*, one that nobody was ever in."""
        if self._spare and not new:
            return self._spare.pop()
        self._made += 1
        return Group(self._directory, f"p{self._made}")

    def give_back(self, group: Group) -> None:
        """Take back a group that is empty again."""
        if len(self._spare) < _SPARE_GROUPS:
            self._spare.append(group)
        else:
            group.remove()

    def watch_pressure(self, proc: int) -> Pressure:
        """Watch how long the processes in all of them wait for memory; see `Pressure`."""
        return Pressure(self._directory, proc)
