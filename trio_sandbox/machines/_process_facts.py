"""What the kernel says of other processes. A number alone is not a process: another may have it by now."""

from __future__ import annotations

import os
from typing import Final

import attrs

#: The highest that Linux gives: PID_MAX_LIMIT.
MOST_PID: Final = 2**22
#: Bytes of a command line that are read; nobody looks at more.
_COMMAND_BYTES: Final = 4096
#: Processes between a host and its QEMU; there is one, an ordinary user's unshare(1).
_GENERATIONS: Final = 8


@attrs.frozen
class ProcessStatus:
    """What `/proc` says of a process that has the number now."""

    parent: int
    """Its parent's number."""
    started: int
    """When it was started, in the kernel's clock ticks since the machine was. With the number it is unique."""


def process_status(pid: int) -> ProcessStatus | None:
    """Return what is known of a process; None if there is none of that number, it has ended and is not reaped, or it is hidden from us."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name stands in parentheses and may hold anything, parentheses included.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    # Source: proc_pid_stat(5); these are the fields 3, 4 and 22.
    return None if fields[0] in b"ZX" else ProcessStatus(parent=int(fields[1]), started=int(fields[19]))


def descends(status: ProcessStatus, ancestor: int) -> bool:
    """Tell whether a process is a child of *ancestor*, or of a child of its, and so on."""
    found: ProcessStatus | None = status
    for _ in range(_GENERATIONS):
        if found is None:
            return False
        if found.parent == ancestor:
            return True
        found = process_status(found.parent)
    return False


def command_line(pid: int) -> str:
    """Return the command line of a process, arguments with blanks between them; "" if it can't be known."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            data = file.read(_COMMAND_BYTES)
    except OSError:
        return ""
    return data.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")


def pid_namespace() -> int:
    """Return the number of the namespace that process ids of ours are of: a container has one of its own. 0: the kernel has only one."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except FileNotFoundError:
        return 0


def has_open(pid: int, descriptor: int, file: int) -> bool:
    """Tell whether a process has as its *descriptor* the file that is our descriptor *file*.

    Raises:
      PermissionError: if we may not know.

    """
    try:
        theirs = os.stat(f"/proc/{pid}/fd/{descriptor}")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return os.path.samestat(theirs, os.fstat(file))
