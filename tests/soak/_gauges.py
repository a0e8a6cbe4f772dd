"""What must not grow: descriptors, tasks and memory, of this process, of the virtual machine's, and within the guest."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import trio

from trio_sandbox import Sandbox
from trio_sandbox.bench import private_mib

from ._report import Gauge, Report
from ._watch import all_tasks

#: What is seen of the agent from among the users' processes: the files that are open in the whole machine, and the memory of
#: all processes without that of the users' own.
_LOOK = """
cut -f 1 /proc/sys/fs/file-nr
total=$(sed -n 's/^AnonPages: *\\([0-9]*\\).*/\\1/p' /proc/meminfo)
users=$(cat /proc/[0-9]*/status 2>/dev/null | sed -n 's/^RssAnon:[^0-9]*\\([0-9]*\\).*/\\1/p' | paste -sd+)
echo $(( (total - (${users:-0})) / 1024 ))
"""
#: The kernel tells how many files are open in steps of 32, for each processor (percpu_counter_batch in lib/percpu_counter.c).
FILES_MAY_GROW = 64
#: By how much each may grow: for what is only counted late, and for memory that is free again and not given back.
_MAY_GROW: dict[str, tuple[float, str]] = {
    "tasks": (0, ""),
    "descriptors": (0, ""),
    "memory": (32, "MiB"),
    "QEMU's descriptors": (40, ""),  # two for each layer of its disk that a fork leaves, until sixteen are merged
    "QEMU's memory": (160, "MiB"),
    "files open in the guest": (FILES_MAY_GROW, ""),
    "memory of the guest's agent": (12, "MiB"),
    "streams of the host": (4, ""),  # what answers that a stream is over waits for something else to be written
    "streams of the guest": (30, ""),
}


async def measure(sandbox: Sandbox) -> dict[str, float]:
    """Give the numbers as they are when everything that was asked for is over."""
    await trio.sleep(0.5)
    return {**measure_here(), **await measure_machine(sandbox)}


def measure_here() -> dict[str, float]:
    """Give the numbers of this process."""
    gc.collect()
    return {
        "tasks": sum(1 for _ in all_tasks()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "memory": resident_mib(os.getpid()),
    }


async def measure_machine(sandbox: Sandbox) -> dict[str, float]:
    """Give the numbers of the sandbox's machine, if it has one."""
    numbers: dict[str, float] = {}
    if Path(f"/proc/{sandbox.statistics().qemu_pid}/comm").read_text().startswith("qemu"):
        numbers["QEMU's descriptors"] = len(os.listdir(f"/proc/{sandbox.statistics().qemu_pid}/fd"))
        numbers["QEMU's memory"] = round(private_mib(sandbox))
        looked = await sandbox.run_process(_LOOK, shell=True, capture_stdout=True, user=0)
        files, agent = looked.stdout.split()
        numbers["files open in the guest"], numbers["memory of the guest's agent"] = int(files), int(agent)
    return numbers


def compare(report: Report, first: dict[str, float], last: dict[str, float]) -> None:
    """Put both into the report."""
    for name, number in first.items():
        may_grow, unit = _MAY_GROW[name]
        report.gauges[name] = Gauge(number, last[name], may_grow, unit)


def resident_mib(pid: int) -> float:
    """Give the MiB of memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
