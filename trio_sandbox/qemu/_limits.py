"""What one QEMU may take of the host, whatever its guest does, and how it stands behind everybody else."""

from __future__ import annotations

import resource
from typing import Final, final

import attrs

from .._observe import part_logger
from ._machine import MachineConfig
from ._process import require_program
from ._qcow2 import Qcow2FormatError, read_qcow2_info

_log = part_logger("confinement")

#: How much the kernel prefers everybody else's threads, our event loop's first of all. A busy guest has a third of its weight.
_NICE: Final = 5
#: When the kernel runs out of memory it ends a virtual machine, and not the program that has opened it.
_OOM_SCORE: Final = 500
#: Files and sockets of one QEMU: a few dozen, more with many layers under its disk.
_DESCRIPTORS: Final = 1024
#: Threads of QEMU besides virtual processors: its main loop, and as many as 64 for the disks.
_THREADS: Final = 160
#: How much longer than what the guest's files may take is an overlay at most: clusters are larger than the guest's blocks, and a removed file
#: leaves some that are in use in part. So many times, and so many bytes besides, for inodes and directories that are everywhere.
_DISK_SLACK: Final = 2
_DISK_MARGIN: Final = 256 * 2**20
#: What a file has besides what the guest has written: qcow2's own tables, the devices' state.
_MARGIN: Final = 64 * 2**20


@final
@attrs.frozen(kw_only=True)
class Limits:
    """Limits of one QEMU process. Those that every process has to have are no fields."""

    file_bytes: int = _MARGIN
    """The length of a file that it writes, in bytes."""
    threads: int = _THREADS
    """Threads and processes of its user, where that is its own."""

    @classmethod
    def of_machine(cls, *, disk_bytes: int, memory_bytes: int, vcpus: int) -> Limits:
        """Return the limits of a machine with a disk of that size, of which it may write every byte."""
        # The RAM may be saved together with the devices' state, and each page of it has a header.
        return cls(file_bytes=disk_bytes + disk_bytes // 16 + 2 * memory_bytes + _MARGIN, threads=_THREADS + vcpus)

    def argv(self, *, own_user: bool) -> list[str]:
        """Return the command to put before another, which then has these limits.

        Args:
          own_user: Whether the user that it will run as is nobody else's, so that threads can be counted.

        """
        limits = [
            "--core=0",
            f"--nofile={_at_most(resource.RLIMIT_NOFILE, _DESCRIPTORS)}",
            f"--fsize={_at_most(resource.RLIMIT_FSIZE, self.file_bytes)}",
        ]
        if own_user:
            limits.append(f"--nproc={_at_most(resource.RLIMIT_NPROC, self.threads)}")
        return [require_program("nice"), f"-n{_NICE}", require_program("prlimit"), *limits, "--"]


def limits_of(config: MachineConfig) -> Limits:
    """Return the limits of the machine of that configuration."""
    try:
        disk_bytes = read_qcow2_info(config.overlay).virtual_size
    except Qcow2FormatError:
        disk_bytes = 0  # QEMU says what is wrong with it
    if config.disk_bytes is not None:
        disk_bytes = min(disk_bytes, _DISK_SLACK * config.disk_bytes + _DISK_MARGIN)
    return Limits.of_machine(disk_bytes=disk_bytes, memory_bytes=config.memory_mib * 2**20, vcpus=config.vcpus)


def _at_most(kind: int, wanted: int) -> int:
    """Return *wanted*, or the lower limit that we have ourselves, which nobody may raise."""
    _, hard = resource.getrlimit(kind)
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def prefer_as_victim(pid: int) -> None:
    """Have the kernel end this process before others when memory runs out. No error if it is gone, or if that is not allowed."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"%d" % _OOM_SCORE)
    except OSError as exc:
        _log.info("when memory runs out the kernel may end this program before a virtual machine: %s", exc)
