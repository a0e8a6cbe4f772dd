"""What figures were measured on, and what else went on there meanwhile."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import attrs
import trio

from ..qemu import Accelerator

#: With more than this share of all processors taken by other programs, a machine is not quiet.
QUIET_SHARE = 0.1
#: Steps of the loop that tells how fast the processor is, and how often it is run for the best of them.
_STEPS, _TRIES = 200_000, 5


@attrs.frozen(kw_only=True)
class Machine:
    """What figures depend on, without the name of the machine."""

    cpu: str
    """The processor's model, as the kernel has it."""
    cpus: int
    """Processors that this process may use."""
    memory_mib: int
    kernel: str
    python: str
    trio: str

    @classmethod
    def here(cls) -> Machine:
        """Describe the machine that we are on."""
        return cls(
            cpu=_field("/proc/cpuinfo", "model name", "unknown"),
            cpus=len(os.sched_getaffinity(0)),
            memory_mib=int(_field("/proc/meminfo", "MemTotal", "0 kB").split()[0]) // 1024,
            kernel=platform.release(),
            python=platform.python_version(),
            trio=trio.__version__,
        )

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cpus} CPUs, {self.memory_mib} MiB; Linux {self.kernel}, "
            f"Python {self.python}, trio {self.trio}"
        )


def _field(file: str, name: str, otherwise: str) -> str:
    for line in Path(file).read_text("utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return otherwise


def accelerator_meaning(accelerator: Accelerator) -> str:
    """Say what ran the guests, and what that means for speed and safety."""
    kind = "hardware" if accelerator.hardware else "software emulation: slow, and no security boundary"
    return f"{accelerator.name} ({kind}); {accelerator.reason}"


@attrs.frozen(kw_only=True)
class Load:
    """How busy the machine was, apart from what was measured."""

    before: tuple[float, float, float]
    """The load averages of 1, 5 and 15 minutes when it began; those of a busy machine need minutes to fall."""
    after: tuple[float, float, float]
    others_share: float
    """What other programs took of all processors meanwhile, from 0 to 1; the kernel's own work is in it."""
    loop_ms: tuple[float, float]
    """What a loop in Python took at the beginning, and at the end: virtual processors get slower and faster by themselves."""

    @property
    def quiet(self) -> bool:
        """Whether the figures can be compared with those of other days."""
        return self.others_share < QUIET_SHARE

    def __str__(self) -> str:
        return (
            f"{'quiet' if self.quiet else 'NOT QUIET'}: other programs took {self.others_share:.0%} of the processors; "
            f"load average {self.before[0]:.2f} before, {self.after[0]:.2f} after; "
            f"a loop of {_STEPS} steps in Python took {self.loop_ms[0]:.1f} ms before, {self.loop_ms[1]:.1f} after"
        )


class LoadWatch:
    """Counts from its making what processors do for whom."""

    def __init__(self) -> None:
        self._before = os.getloadavg()
        self._loop_ms = loop_ms()
        self._start = time.monotonic()
        self._busy, self._ours = _busy_seconds(), _our_seconds()

    def stop(self) -> Load:
        """Say how it was. Of our children, those count that have ended by now."""
        total = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        others = (_busy_seconds() - self._busy) - (_our_seconds() - self._ours)
        # Times are of different clocks, with 10 ms between two ticks of one of them.
        share = min(1.0, max(0.0, others / total)) if total > 0 else 0.0
        return Load(before=self._before, after=os.getloadavg(), others_share=share, loop_ms=(self._loop_ms, loop_ms()))


def loop_ms() -> float:
    """Return the milliseconds that a fixed piece of work takes here, in whatever Python this is; the best of a few tries."""
    tries: list[float] = []
    for _ in range(_TRIES):
        start, total = time.perf_counter(), 0
        for number in range(_STEPS):
            total += number * number & 7
        tries.append((time.perf_counter() - start) * 1000)
    return min(tries)


def _busy_seconds() -> float:
    """Return the processors' time that was not idle since the boot: proc_stat(5)."""
    fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _our_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
