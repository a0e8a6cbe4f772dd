"""What the kernel tells of processes in /proc. Standard library only."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def read_status(process: str) -> list[bytes]:
    """Return what is told of a process or thread after its program's name: state, parent, group, session (proc_pid_stat(5)).

    Args:
      process: Its name below /proc.

    Raises:
      OSError: it has ended, or can't be seen.

    """
    with open(f"/proc/{process}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()  # the name may contain anything


def find_processes() -> Iterator[tuple[int, list[bytes]]]:
    """Yield all processes that can be seen, with what `read_status` returns of them."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                status = read_status(name)
            except OSError:
                continue  # it has ended, or the kernel has no memory for the answer
            yield int(name), status
