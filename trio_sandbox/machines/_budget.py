"""What this machine, and our control group in it, leave for sandboxes: read when a host is opened."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final, final

import attrs

from .. import constants
from .._cgroups import ROOT, own_groups
from ._memory import Room, Stalls

_MIB: Final = 2**20


@final
@attrs.frozen
class Limit:
    """The most of something, and where that comes from."""

    amount: int
    reason: str


def memory_limit(root: Path = ROOT) -> Limit:
    """Return what sandboxes may take, in MiB: the least that the machine and our control groups have left. *root* is for tests."""
    found = min(memory_rooms(root), key=lambda room: room.left)
    usable = int(found.left * constants.MEMORY_BUDGET_SHARE) // _MIB
    return Limit(
        usable,
        f"{constants.MEMORY_BUDGET_SHARE:.0%} of what there was when the host was opened: of {found.total // _MIB} MiB {found.where} "
        f"{found.left // _MIB} MiB were left",
    )


def charge_mib(memory_mib: int, overcommit: float) -> int:
    """Return what a sandbox with so much RAM counts with in a memory budget; see `HostConfig.memory_overcommit`."""
    return math.ceil((memory_mib + constants.VM_OVERHEAD_MIB) / overcommit)


def memory_rooms(root: Path = ROOT) -> list[Room]:
    """Return what the machine, and each of our control groups that has a limit, have left of their memory.

    Page cache counts as left, since the kernel gives it up for what asks. A group without a limit shares the room of the next one above it, so its
    stalls are that one's. Blocks the Trio thread for some 0.2 ms. *root* is for tests.

    Raises:
      OSError: if the kernel's files can't be read.

    Source: proc_meminfo(5); the kernel's admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and accounting/psi.rst.

    """
    available, total = _meminfo(root)
    rooms: list[Room] = []
    stalls: Stalls | None = None
    for directory, version in own_groups("memory", root):
        if version == 2:
            stalls = _worse(stalls, _read_stalls(directory / "memory.pressure"))
        limit = _cgroup_memory(directory, version)
        # Where nothing is set, version 1 gives a number close to 2**63.
        if limit is not None and limit < total:
            left = max(0, limit - _cgroup_memory_used(directory, version))
            where = f"allowed by /{directory.relative_to(root)}"
            rooms.append(Room(where, left, limit, stalls if version == 2 else None))
    return [
        Room("in the machine", available, total, _worse(stalls, _read_stalls(root / "proc/pressure/memory"))),
        *rooms,
    ]


def _read_stalls(path: Path) -> Stalls | None:
    """Return what a file of pressure stall information says; None if the kernel does not count (built without it, or ``psi=0``)."""
    try:
        text = path.read_text("ascii")
    except OSError:
        return None
    shares: dict[str, float] = {}
    for line in text.splitlines():
        kind, average = line.split()[:2]
        shares[kind] = float(average.removeprefix("avg10=")) / 100
    return Stalls(shares["some"], shares["full"])


def _worse(one: Stalls | None, other: Stalls | None) -> Stalls | None:
    if one is None or other is None:
        return one or other
    return Stalls(max(one.some, other.some), max(one.full, other.full))


def cpu_limit(root: Path = ROOT) -> Limit:
    """Return how many virtual CPUs there may be: a multiple of the processors that we may use.

    A virtual CPU is a thread, and one that has nothing to do costs next to nothing. *root* is for tests.

    Source: sched_getaffinity(2); the kernel's admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.

    """
    cores = float(len(os.sched_getaffinity(0)))
    for directory, version in own_groups("cpu", root):
        cores = min(cores, _cgroup_cores(directory, version))
    amount = max(1, math.floor(cores * constants.VCPUS_PER_CORE))
    return Limit(amount, f"{constants.VCPUS_PER_CORE} for each of the {cores:g} processors that this process may use")


def disk_shortage(directory: Path) -> str | None:
    """Say that the file system of *directory* has less left than the reserve; None if it has enough, or is gone.

    Blocks the Trio thread for a statvfs(), some microseconds.
    """
    try:
        disk = os.statvfs(directory)
    except FileNotFoundError:
        return None  # whoever wants to write there says so
    left, reserve = _left_and_reserve(disk)
    if left >= reserve:
        return None
    return f"the disk of {directory} has {left // _MIB} MiB left, and {reserve // _MIB} MiB are kept for the sandboxes that are open"


def disk_room(directory: Path) -> int:
    """Return what the file system of *directory* has left beside the reserve, in MiB. Blocks as `disk_shortage`."""
    left, reserve = _left_and_reserve(os.statvfs(directory))
    return max(0, left - reserve) // _MIB


def _left_and_reserve(disk: os.statvfs_result) -> tuple[int, int]:
    size = disk.f_blocks * disk.f_frsize
    reserve = min(constants.DISK_RESERVE_MIB * _MIB, int(size * constants.DISK_RESERVE_SHARE))
    return disk.f_bavail * disk.f_frsize, reserve


def _meminfo(root: Path) -> tuple[int, int]:
    """Return what is available and what there is, in bytes."""
    values: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return values["MemAvailable"], values["MemTotal"]


def _read(path: Path) -> str | None:
    """Return a control file's text; None where there is no such limit: at the root, or without the controller."""
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        return None


def _cgroup_memory(directory: Path, version: int) -> int | None:
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [int(text) for name in names if (text := _read(directory / name)) not in (None, "max")]
    return min(limits, default=None)


def _cgroup_memory_used(directory: Path, version: int) -> int:
    """Return the bytes in use that the kernel can't just give up."""
    used = int(_read(directory / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0)
    cache = ("active_file", "inactive_file") if version == 2 else ("total_active_file", "total_inactive_file")
    for line in (_read(directory / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in cache:
            used -= int(value)
    return max(0, used)


def _cgroup_cores(directory: Path, version: int) -> float:
    if version == 2:
        quota, _, period = (_read(directory / "cpu.max") or "max 100000").partition(" ")
    else:
        quota = _read(directory / "cpu.cfs_quota_us") or "-1"
        period = _read(directory / "cpu.cfs_period_us") or "100000"
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
