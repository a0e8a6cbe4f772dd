"""What a process takes of the host, as the kernel counts it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path


def cpu_seconds(pid: int) -> float | None:
    """Return the processor time of all threads of a process, in seconds; None if it is gone. A call takes a microsecond.

    Source: clock_getcpuclockid(3), and the kernel's include/linux/posix-timers_types.h for how it makes a clock of a process id.
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return None


def own_memory(pid: int) -> int:
    """Return the bytes of memory that a process has for itself; 0 if it is gone.

    Not in it are pages of files, which others may share: of a template's RAM those that were not written to.

    Source: proc_pid_status(5).
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    names = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


def allocated_bytes(files: Iterable[Path]) -> int:
    """Return what files take of the disk, in bytes; one that is gone takes nothing."""
    total = 0
    for file in files:
        try:
            total += file.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
