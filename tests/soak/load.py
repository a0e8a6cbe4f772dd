"""The part `load`: 10,000 runs, 500 sandboxes, 200 forks, 2,000 overlays and 200 hosts; memory, descriptors, files and time stay flat.

Each section takes a fair share of the time, and ends sooner if it has done all of its own; ``--scale`` multiplies these numbers. Some
forty times on the way all gauges are looked at. What counts is the rise of a line through the second half of the values,
as `_MAY_CLIMB` allows, and the quickest of the last operations against the quickest of the first, as `_report.SLOWER` does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from tests._processes import descendants, is_program
from trio_sandbox import Host, Sandbox, open_host
from trio_sandbox.qemu import open_overlay_pool, open_storage_daemon
from trio_sandbox.qemu._chain import MOST_LAYERS

from ._gauges import FILES_MAY_GROW, measure_here, measure_machine, resident_mib
from ._report import Budget, Latencies, Report, Series
from ._world import World, open_world, wait_for_none

#: How often the gauges are looked at in each section.
_LOOKS = 40
#: By how much each gauge may climb over the second half of a section, and its unit. Descriptors and tasks are whole numbers that
#: must stay the same; what is measured in MiB moves by what allocators keep and what the guest touches for the first time.
_MAY_CLIMB: dict[str, tuple[float, str]] = {
    "tasks": (0.5, ""),
    "descriptors": (0.5, ""),
    "memory": (6, "MiB"),
    "files": (0.5, ""),
    "the storage daemon's descriptors": (0.5, ""),
    "the storage daemon's memory": (6, "MiB"),
    "QEMU's descriptors": (0.5, ""),
    "QEMU's memory": (24, "MiB"),
    "files open in the guest": (FILES_MAY_GROW, ""),
    "memory of the guest's agent": (4, "MiB"),
}
#: A fork leaves a layer of its original's disk, until there are so many that they are merged.
_FORKS_MAY_CLIMB = {"files": (MOST_LAYERS, ""), "QEMU's descriptors": (2 * MOST_LAYERS, "")}
#: Seconds after which nothing may be left of a section.
_CLEAN_BOUND = 10.0
#: After so many forks of one sandbox, one of a new sandbox.
_BESIDE = 8
#: How many sandboxes are opened together, and after how many that are opened alone.
_TOGETHER, _ALONE = 5, 15


async def soak(budget: Budget, report: Report) -> None:
    """Soak sheer numbers."""
    async with open_world() as world:
        counts = [max(1, round(count * budget.scale)) for _, count, _ in _SECTIONS]
        for (name, _, section), share in zip(_SECTIONS, budget.shares(counts), strict=True):
            try:
                await section(Meter(name, share, report, world.runtime), world)
            except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
                report.fail(f"{name}: {type(exc).__name__}: {exc}")
            for what in await wait_for_none(world.left, _CLEAN_BOUND):
                report.fail(f"{name}: left: {what}")


@attrs.define
class Meter:
    """Counts and measures what one section does."""

    name: str
    budget: Budget
    report: Report
    directory: Path
    """Where all files of hosts are."""
    done: int = 0
    _looks: int = 0
    _latencies: Latencies = attrs.field(factory=Latencies)

    def is_left(self) -> bool:
        """Whether there is something left to do."""
        return self.budget.is_left(self.done)

    @contextmanager
    def measured(self) -> Generator[None]:
        """Count the block as an operation, with its latency."""
        with self._latencies.measured():
            yield
        self.count()
        self.report.latencies[self.name] = self._latencies
        self.report.slowest = max(self.report.slowest, round(self._latencies.samples[-1] / 1000, 2))

    @contextmanager
    def measured_beside(self) -> Generator[None]:
        """Measure the block, which does the same with something new."""
        with (beside := Latencies()).measured():
            yield
        self._latencies.beside += beside.samples

    def count(self) -> None:
        """Count an operation whose latency is not comparable."""
        self.done += 1
        self.report.operations[self.name] += 1

    def check(self, right: bool, what: str) -> None:
        """Have it told if something is wrong."""
        if not right:
            self.report.fail(f"{self.name}: #{self.done}: {what}")

    async def look(self, sandbox: Sandbox | None = None) -> None:
        """Look at the gauges, if it is time to; nothing must be under way."""
        used = self.done / self.budget.count if self.budget.count else 0.0
        if self.budget.minutes:
            used = max(used, (time.monotonic() - self.budget.started) / 60 / self.budget.minutes)
        if used * _LOOKS < self._looks:
            return
        self._looks += 1
        numbers = measure_here()
        numbers["files"] = sum(len(files) for _, _, files in os.walk(self.directory))
        if sandbox is not None:
            numbers |= await measure_machine(sandbox)
        for process in descendants(os.getpid()):
            if is_program(process, "qemu-storage-daemon"):
                numbers["the storage daemon's descriptors"] = len(os.listdir(f"/proc/{process.pid}/fd"))
                numbers["the storage daemon's memory"] = resident_mib(process.pid)
        for gauge, number in numbers.items():
            may_climb, unit = {**_MAY_CLIMB, **(_FORKS_MAY_CLIMB if self.name == "forks" else {})}[gauge]
            self.report.series.setdefault(f"{self.name}: {gauge}", Series(may_climb, unit)).values.append(number)


async def _runs(meter: Meter, world: World) -> None:
    async with open_host(world.config()) as host, host.open_sandbox() as sandbox:
        while meter.is_left():
            with meter.measured():
                result = await sandbox.run(f"x = {meter.done}; print(x)")
            meter.check(result.stdout == f"{meter.done - 1}\n", f"it came to {result!r} {result.stdout!r}")
            await meter.look(sandbox)


async def _sandboxes(meter: Meter, world: World) -> None:
    async with open_host(world.config()) as host:
        while meter.is_left():
            for _ in range(_ALONE):
                with meter.measured():
                    await _open_one(host, meter)
                await meter.look()
                if not meter.is_left():
                    return
            async with trio.open_nursery() as nursery:
                for _ in range(_TOGETHER):
                    nursery.start_soon(_open_one, host, meter)
                    meter.count()


async def _open_one(host: Host, meter: Meter) -> None:
    result = await host.run("print(6 * 7)")
    meter.check(result.stdout == "42\n", f"it came to {result!r}")


async def _forks(meter: Meter, world: World) -> None:
    async def fork(sandbox: Sandbox, expected: str) -> None:
        async with sandbox.fork(1) as (child,):
            result = await child.run("print(x)")
        meter.check(result.stdout == expected, f"it came to {result!r} {result.stdout!r}")

    async with open_host(world.config()) as host, host.open_sandbox() as sandbox:
        await sandbox.run("x = 0")
        while meter.is_left():
            with meter.measured():
                await fork(sandbox, f"{meter.done}\n")
            await sandbox.run("x += 1; open('/home/user/f', 'w').write('x' * 100_000)")
            await meter.look(sandbox)
            if meter.done % _BESIDE == 1:
                async with host.open_sandbox() as new:
                    await new.run("x = 'new'")
                    with meter.measured_beside():
                        await fork(new, "new\n")


async def _overlays(meter: Meter, world: World) -> None:
    base = world.runtime / "base.qcow2"
    await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "8G"])
    try:
        async with open_storage_daemon(directory=world.runtime) as daemon, open_overlay_pool(daemon) as pool:
            while meter.is_left():
                for _ in range(9):
                    target = world.runtime / f"pool-{meter.done}"
                    with meter.measured():
                        await pool.acquire(base, target)
                    target.unlink()
                target = world.runtime / f"daemon-{meter.done}"
                await daemon.create_overlay(base, target)
                meter.count()
                target.unlink()
                await meter.look()
    finally:
        base.unlink()


async def _hosts(meter: Meter, world: World) -> None:
    while meter.is_left():
        with meter.measured():
            async with open_host(world.config()):
                pass
        if meter.done % 5 == 0:
            async with open_host(world.config()) as host:
                await _open_one(host, meter)
            meter.count()
        await meter.look()


#: What is done how often at a scale of 1.
_SECTIONS: tuple[tuple[str, int, Callable[[Meter, World], Awaitable[None]]], ...] = (
    ("runs", 10_000, _runs),
    ("sandboxes", 500, _sandboxes),
    ("forks", 200, _forks),
    ("overlays", 2_000, _overlays),
    ("hosts", 200, _hosts),
)
