"""Ends what keeps the users' memory from being of use, where the kernel would let it go on for minutes.

The kernel kills for want of memory only when it finds no page to take back. What grows by little always leaves it some: those
of the programs that run, which are read from the disk again and taken back again. So we kill what the kernel would have
killed, as soon as processes do little but wait for such pages; see "Pressure Stall Information" in the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import os
import signal

#: Tell us when any process has waited for memory for this many microseconds of this many, and no more often than that.
_TRIGGER = b"some 500000 1000000\0"
#: Where programs thrash, less than this part of the users' memory is left for files, and less than it is free. With more for files,
#: what waits is what reads much; with more that is free, the balloon has taken the machine's, and the host is to give it back.
_SHARE = 16
#: Where there are more threads, as after a fork bomb, we don't look for one to kill: listing processes that all fight for memory may
#: take so long that a request to end them would wait for it, and each has little. The kernel goes on by itself.
_MOST_THREADS = 128


class Pressure:
    """How long users' processes wait for memory.

    Args:
      directory: Descriptor of the control group that all of them share.
      proc: Descriptor of their /proc, where we are process 1.

    Raises:
      OSError: The kernel does not tell, or the group has no memory of its own.

    """

    __slots__ = ("_directory", "_limit", "_proc", "descriptor")

    def __init__(self, directory: int, proc: int) -> None:
        self._directory = directory
        self._proc = proc
        limit = _read("memory.max", directory).strip()
        self._limit = 0 if limit == b"max" else int(limit)
        self.descriptor: int = os.open("memory.pressure", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        """On this, poll(2) reports as POLLPRI that they wait for most of the time."""
        os.write(self.descriptor, _TRIGGER)

    def relieve(self) -> int:
        """Kill the process that the kernel would kill, and return its id.

        0 if there is memory left that it can take back, or there are too many to choose from.
        """
        statistics = dict(line.split() for line in _read("memory.stat", self._directory).splitlines())
        files = int(statistics[b"active_file"]) + int(statistics[b"inactive_file"])
        free = self._limit - int(_read("memory.current", self._directory))
        if max(free, files) >= self._limit // _SHARE or int(_read("pids.current", self._directory)) > _MOST_THREADS:
            return 0
        victim = max(self._scores(), default=(0, 0))[1]
        if victim:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        return victim

    def _scores(self) -> list[tuple[int, int]]:
        """Return how much the kernel would like to kill each process, and its id."""
        scores: list[tuple[int, int]] = []
        listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            names = os.listdir(listing)
        finally:
            os.close(listing)
        for name in names:
            if name.isdigit() and name != "1":
                with contextlib.suppress(OSError):  # it has ended
                    scores.append((int(_read(f"{name}/oom_score", self._proc)), int(name)))
        return scores


def _read(path: str, directory: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    with open(descriptor, "rb", buffering=0) as file:
        return file.readall()
