"""A machine whose memory is what a test says, in files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_sandbox.machines import _measured
from trio_sandbox.machines._budget import memory_rooms

TOTAL_MIB = 20_000
#: What is kept free of that.
RESERVE_MIB = 2000


class MadeUpMemory:
    """The memory that hosts with `HostConfig.memory_overcommit` see.

    Args:
      root: Where the files are.
      monkeypatch: Has them read.

    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        for name, text in {"proc/self/cgroup": "0::/", "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 x rw"}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")
        (root / "proc/pressure").mkdir()
        self.set(TOTAL_MIB)
        monkeypatch.setattr(_measured, "memory_rooms", lambda: memory_rooms(root))

    def set(self, left_mib: int, *, some: float = 0.0, full: float = 0.0) -> None:
        """Have so much left from now on, and programs wait for so much of the time."""
        text = f"MemTotal: {TOTAL_MIB * 1024} kB\nMemAvailable: {left_mib * 1024} kB\n"
        (self.root / "proc/meminfo").write_text(text)
        lines = [
            f"{kind} avg10={share * 100:.2f} avg60=0.00 avg300=0.00 total=0\n"
            for kind, share in (("some", some), ("full", full))
        ]
        (self.root / "proc/pressure/memory").write_text("".join(lines))

    def forget_stalls(self) -> None:
        """Have a kernel that does not count them."""
        (self.root / "proc/pressure/memory").unlink()
