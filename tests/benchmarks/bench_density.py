"""150 sandboxes on one machine, all of them idle: what opening them takes, what they cost, and how soon one of them answers.

It takes some minutes, and some GiB of memory. So it runs only by name: ``python -m tests.benchmarks density``.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from trio_sandbox import Host, HostConfig, Sandbox
from trio_sandbox.bench import Figure, Lab, durations, private_mib

from ._unmeasured import UnmeasuredError

_SANDBOXES = 150
#: Tasks that open them. All in the same moment would share two processors, and each start would take as long as all of them.
_OPENERS = 10
#: Seconds for what was begun to end before idleness is measured, and for measuring it.
_REST = 5.0
_IDLE = 20.0
_RUNS = 30
#: MiB that they take together, some more than was measured.
_NEEDED = 9000


async def measure() -> list[Figure]:
    """Measure once: opening them all is the longest part."""
    if _available() < _NEEDED:
        raise UnmeasuredError(f"it takes {_NEEDED} MiB of memory, and {_available():.0f} MiB are left")
    lab = Lab(host=HostConfig(memory_overcommit=4, vcpu_budget=2 * _SANDBOXES))
    async with lab.open(_SANDBOXES) as host:
        async with lab.open_answering(host, 1) as one:
            (first,) = one
            alone = await _latencies(first)
        before, start = _available(), time.perf_counter()
        async with _open_all(host) as sandboxes:
            seconds = time.perf_counter() - start
            await trio.sleep(_REST)
            private = [private_mib(each) for each in sandboxes]
            proportional = [_proportional_mib(each) for each in sandboxes]
            taken = (before - _available()) / _SANDBOXES
            guests, ours = await _idle_shares(sandboxes)
            among = await _latencies(sandboxes[0])
            begun = time.perf_counter()
            answers = [await _answer(each) for each in sandboxes]
            asked = time.perf_counter() - begun
            numbers = host.statistics().admission
            assert numbers.memory is not None
            left = time.perf_counter()
        teardown = time.perf_counter() - left
        by = f"under {host.accelerator.name}"
    n = f"{_SANDBOXES} sandboxes"
    return [
        Figure.of(f"{n} opened by {_OPENERS} tasks, until all have answered, {by}", [seconds], "s"),
        Figure.of(f"{n}: private memory of each", private, "MiB", at_most=64),
        Figure.of(f"{n}: proportional set size of each QEMU", proportional, "MiB"),
        Figure.of(f"{n}: what the machine has less, for each", [taken], "MiB", at_most=96),
        Figure.of(f"{n}: what each counts with in the budget", [numbers.memory_mib_reserved / _SANDBOXES], "MiB"),
        Figure.of(f"{n}, idle: processor time of all their QEMUs", [guests * 100], "% of a core"),
        Figure.of(f"{n}, idle: processor time of the program", [ours * 100], "% of a core"),
        Figure.of("run in an open sandbox, alone", alone, "ms"),
        Figure.of(f"run in one of {n}, others idle", among, "ms"),
        Figure.of(f"{n}: that answered when asked one after the other", [sum(answers)], "", at_least=_SANDBOXES),
        Figure.of(f"{n}: asking them", [asked], "s"),
        Figure.of(f"{n}: that the guard put to sleep meanwhile", [numbers.memory.put_to_sleep], ""),
        Figure.of(f"{n}: closing all at the same moment", [teardown], "s"),
    ]


@asynccontextmanager
async def _open_all(host: Host) -> AsyncGenerator[list[Sandbox]]:
    """Yield sandboxes that have answered, all still open."""
    found: list[Sandbox] = []
    release = trio.Event()
    openers = trio.CapacityLimiter(_OPENERS)

    async def hold() -> None:
        async with AsyncExitStack() as stack:
            async with openers:
                sandbox = await stack.enter_async_context(host.open_sandbox())
                await _answer(sandbox)
            found.append(sandbox)
            if len(found) == _SANDBOXES:
                all_there.set()
            await release.wait()

    all_there = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(_SANDBOXES):
            nursery.start_soon(hold)
        await all_there.wait()
        yield found
        release.set()


async def _answer(sandbox: Sandbox) -> bool:
    return (await sandbox.run("print(6 * 7)")).stdout == "42\n"


async def _latencies(sandbox: Sandbox) -> list[float]:
    async def run() -> None:
        await _answer(sandbox)

    return await durations(run, runs=_RUNS, warm_up=3)


async def _idle_shares(sandboxes: Iterable[Sandbox]) -> tuple[float, float]:
    """Return the processor time that all QEMUs, and this process, take for each second of idleness."""

    def spent() -> tuple[float, float, float]:
        return time.perf_counter(), sum(each.usage().cpu_seconds for each in sandboxes), time.process_time()

    start = spent()
    await trio.sleep(_IDLE)
    seconds, guests, ours = (after - before for after, before in zip(spent(), start, strict=True))
    return guests / seconds, ours / seconds


def _proportional_mib(sandbox: Sandbox) -> float:
    """Return what a sandbox's QEMU has, with its part of what it shares."""
    pid = sandbox.statistics().qemu_pid
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss") / 1024


def _available() -> float:
    return _kib(Path("/proc/meminfo"), "MemAvailable") / 1024


def _kib(path: Path, name: str) -> int:
    found = re.search(rf"^{name}: +([0-9]+) kB", path.read_text("ascii"), re.MULTILINE)
    assert found is not None, f"no {name} in {path}"
    return int(found[1])
