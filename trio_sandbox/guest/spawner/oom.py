"""Which processes the kernel has killed for want of memory. Linux only, stdlib only.

A count of such kills does not tell whose they were: a process whose child the kernel has killed may kill itself in the next
instant. The kernel's log names the victim, and does so before the victim can end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # wanted by nothing else that is imported before the fork
    from collections.abc import Iterable

#: What the kernel says of a kill: one of these, and then this. Source: mm/oom_kill.c, `oom_kill_process` and `__oom_kill_process`.
_SUBJECTS = (b"Memory cgroup out of memory", b"Out of memory", b"Out of memory (oom_kill_allocating_task)")
_VERB = b": Killed process "
#: No record of /dev/kmsg is longer: its ABI document.
_LONGEST_RECORD = 8192
#: Records that are read at most each time. The log holds fewer, but root may write to it meanwhile.
_MOST_RECORDS = 4096


class OomKills:
    """The kernel's log from now on, and the process ids that it uses.

    Made where /proc and /dev are those of the first PID namespace, and used by a process that has gone on to another one.

    Raises:
      OSError: The log can't be read here.

    """

    __slots__ = ("_log", "_proc")

    def __init__(self) -> None:
        self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._log, 0, os.SEEK_END)
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def find(self, pids: Iterable[int]) -> set[int]:
        """Return which of *pids* the kernel has killed since this was last called. All of them are children that we have not reaped."""
        victims = self._read_victims()
        return {pid for pid in pids if self._outer(pid) in victims} if victims else set()

    def _read_victims(self) -> set[int]:
        victims: set[int] = set()
        for _ in range(_MOST_RECORDS):
            try:
                record = os.read(self._log, _LONGEST_RECORD)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # what was next has been overwritten
            victim = find_victim(record)
            if victim is not None:
                victims.add(victim)
        return victims

    def _outer(self, pid: int) -> int:
        """Return the id that the kernel's log has for our child *pid*; 0, which is nobody's, if it can't be had."""
        try:
            child = os.pidfd_open(pid)
        except OSError:
            return 0  # no descriptor is left
        try:
            # A /proc tells ids as they are in its own namespace.
            descriptor = os.open(f"self/fdinfo/{child}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
            with open(descriptor, "rb", buffering=0) as file:
                return int(file.readall().partition(b"\nPid:")[2].split(None, 1)[0])
        except OSError:
            return 0  # as above
        finally:
            os.close(child)


def find_victim(record: bytes) -> int | None:
    """Return the id of the process that was killed for want of memory, as *record* of /dev/kmsg says; None if it is about something else.

    Other records have names in them that code has chosen: of a process at the beginning, and of a file further on. But between the two there
    is more than nothing.
    """
    prefix, _, text = record.partition(b";")
    # What programs write is the kernel's in nothing but its place: it never has the kernel's facility, which is 0.
    if int(prefix.split(b",", 1)[0]) >> 3:
        return None
    subject, _, rest = text.partition(_VERB)
    victim = rest.split(b" ", 1)[0]
    return int(victim) if subject in _SUBJECTS and victim.isdigit() else None
