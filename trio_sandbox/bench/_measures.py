"""The measures, one obvious place for each number."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import attrs
import trio

from ..host import Host
from ..image import ImageStore, default_cache_directory
from ..qemu import open_overlay_pool, open_runtime, open_storage_daemon
from ..sandbox import Sandbox
from ._figures import durations
from ._lab import Lab, answer

#: Seconds after its first answer that a guest has to come to rest.
_REST = 1.0
#: Seconds that the warm pool has for being filled, and between two looks whether it is.
_FILLED, _LOOK = 600.0, 0.05


@attrs.frozen(kw_only=True)
class Measure:
    """One kind of figure."""

    title: str
    unit: str
    take: Callable[[Lab, int, int], Awaitable[list[float]]]
    """Called with a lab, how many at once, and how many rounds of that; returns the samples."""
    samples: int
    """How many to take, at least; at *n* at once, that many in all."""
    quick_samples: int
    """The same when it has to be quick."""
    limits: Mapping[int, float] = attrs.field(factory=dict[int, float])
    """What the median may be at most, for so many at once; 0: for any number."""
    besides: tuple[int, ...] = ()
    """Numbers of sandboxes at once with which it is measured in any case, unless it has to be quick."""

    def limit(self, n: int) -> float | None:
        """Return what the median may be at most, or None."""
        return self.limits.get(n, self.limits.get(0))

    def counts(self, wanted: tuple[int, ...], *, quick: bool) -> list[int]:
        """Return with how many at once to measure it, where *wanted* was asked for."""
        more = () if quick else tuple(count for count in self.besides if count not in wanted)
        return sorted((*wanted, *more)) if more else list(wanted)

    def rounds(self, n: int, *, quick: bool) -> int:
        """Return how often *n* at once make enough samples."""
        samples = self.quick_samples if quick else self.samples
        return -(-samples // n)


async def overlays(lab: Lab, n: int, rounds: int) -> list[float]:
    """Disks for *n* machines, asked for at once: milliseconds until each was there."""
    samples: list[float] = []
    async with open_runtime(lab.host.runtime_dir) as runtime:
        environment = runtime.environment
        store = ImageStore(lab.host.cache_dir or default_cache_directory())
        image = await store.ensure(
            lab.image, build=lab.host.build_images, progress=lab.host.progress, environment=environment
        )
        async with (
            open_storage_daemon(directory=runtime.directory, environment=environment) as daemon,
            open_overlay_pool(daemon) as pool,
        ):
            await pool.acquire(image.path, runtime.directory / "first")  # the prototype

            async def acquire(name: str, start: float) -> None:
                await pool.acquire(image.path, runtime.directory / name)
                samples.append((time.perf_counter() - start) * 1000)

            for round_ in range(rounds):
                start = time.perf_counter()
                async with trio.open_nursery() as nursery:
                    for number in range(n):
                        nursery.start_soon(acquire, f"{round_}-{number}", start)
                lab.tick((round_ + 1) / rounds)
    return samples


async def boots(lab: Lab, n: int, rounds: int) -> list[float]:
    """Machines that boot: seconds until each had answered."""
    async with lab.open(n, attrs.evolve(lab.host, templates=False)) as host:
        return await _starts(lab, host, n, rounds)


async def clones(lab: Lab, n: int, rounds: int) -> list[float]:
    """Machines restored from a template that is there: seconds until each had answered."""
    async with lab.open(n) as host:
        async with lab.open_answering(host, 1):  # makes the template, if need be
            pass
        return await _starts(lab, host, n, rounds)


async def _starts(lab: Lab, host: Host, n: int, rounds: int) -> list[float]:
    samples: list[float] = []
    for round_ in range(rounds):
        async with lab.open_answering(host, n) as sandboxes:
            samples += sandboxes.values()
        lab.tick((round_ + 1) / rounds)
    return samples  # noqa: ASYNC910 (there is a round at least)


async def runs(lab: Lab, n: int, rounds: int) -> list[float]:
    """Runs in sandboxes that are open, in *n* at once: milliseconds of each run."""
    samples: list[float] = []
    async with lab.open(n) as host, lab.open_answering(host, n) as sandboxes:

        async def repeat(sandbox: Sandbox) -> None:  # noqa: ASYNC910 (there is a round at least)
            for _ in range(rounds):
                samples.extend(await durations(lambda: answer(sandbox), runs=1, warm_up=0))
                lab.tick(len(samples) / (n * rounds))

        async with trio.open_nursery() as nursery:
            for sandbox in sandboxes:
                nursery.start_soon(repeat, sandbox)
    return samples


async def memory(lab: Lab, n: int, rounds: int) -> list[float]:
    """Idle sandboxes of a template, *n* alive at once: MiB that each has for itself."""
    samples: list[float] = []
    async with lab.open(n) as host:
        for round_ in range(rounds):
            async with lab.open_answering(host, n) as sandboxes:
                await trio.sleep(_REST)
                samples += [private_mib(sandbox) for sandbox in sandboxes]
            lab.tick((round_ + 1) / rounds)
    return samples


async def idlers(lab: Lab, n: int, rounds: int) -> list[float]:
    """Idle sandboxes of a template, *n* alive at once, that are all asked at the same moment: milliseconds until each had answered."""

    async def rest(_: Sandbox) -> None:
        await trio.sleep(_REST)

    seconds = await _together(lab, n, rounds, rest, answer)
    return [1000 * sample for sample in seconds]


async def reverts(lab: Lab, n: int, rounds: int) -> list[float]:
    """Sandboxes that go back to a checkpoint: seconds until each had answered."""

    async def prepare(sandbox: Sandbox) -> None:  # noqa: ASYNC910 (nobody waits for its checkpoints)
        if not sandbox.statistics().checkpoints:
            await sandbox.checkpoint()

    async def revert(sandbox: Sandbox) -> None:
        await sandbox.revert()
        await answer(sandbox)

    return await _together(lab, n, rounds, prepare, revert)


async def checkpoints(lab: Lab, n: int, rounds: int) -> list[float]:
    """Sandboxes whose state is kept: milliseconds until each was kept."""

    async def checkpoint(sandbox: Sandbox) -> None:
        await sandbox.checkpoint()

    seconds = await _together(lab, n, rounds, answer, checkpoint)
    return [1000 * sample for sample in seconds]


async def resumes(lab: Lab, n: int, rounds: int) -> list[float]:
    """Sandboxes that wake up: seconds until each had answered."""

    async def resume(sandbox: Sandbox) -> None:
        await sandbox.resume()
        await answer(sandbox)

    return await _together(lab, n, rounds, Sandbox.hibernate, resume)


async def _together(
    lab: Lab,
    n: int,
    rounds: int,
    prepare: Callable[[Sandbox], Awaitable[object]],
    operation: Callable[[Sandbox], Awaitable[object]],
) -> list[float]:
    """Do *operation* in *n* sandboxes at once, each round after all have been prepared: seconds until each was done."""
    samples: list[float] = []

    async def timed(sandbox: Sandbox, start: float) -> None:
        await operation(sandbox)
        samples.append(time.perf_counter() - start)

    async with lab.open(n) as host, lab.open_answering(host, n) as sandboxes:
        for round_ in range(rounds):
            async with trio.open_nursery() as nursery:
                for sandbox in sandboxes:
                    nursery.start_soon(prepare, sandbox)
            start = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for sandbox in sandboxes:
                    nursery.start_soon(timed, sandbox, start)
            lab.tick((round_ + 1) / rounds)
    return samples


async def warm(lab: Lab, n: int, rounds: int) -> list[float]:
    """Sandboxes from the warm pool, which has as many ready: seconds until each had answered."""
    samples: list[float] = []
    config = attrs.evolve(lab.host, warm={(lab.image, lab.sandbox): n})
    async with lab.open(n, config) as host:
        for round_ in range(rounds):
            with trio.fail_after(_FILLED):  # noqa: ASYNC912 (the loop waits, or there is nothing to wait for)
                while True:  # the pool tells nobody
                    if host.statistics().warm.ready >= n:
                        break
                    await trio.sleep(_LOOK)
            async with lab.open_answering(host, n) as sandboxes:
                samples += (1000 * seconds for seconds in sandboxes.values())
            lab.tick((round_ + 1) / rounds)
    return samples


async def forks(lab: Lab, n: int, rounds: int) -> list[float]:
    """*n* copies of a running sandbox: seconds until all had answered."""
    return await _fork(lab, n, rounds, lambda _, seconds: seconds)


async def pauses(lab: Lab, n: int, rounds: int) -> list[float]:
    """*n* copies of a running sandbox: milliseconds that its guest stood still for them."""
    return await _fork(lab, n, rounds, lambda parent, _: 1000 * (parent.statistics().last_pause or 0))


async def _fork(lab: Lab, n: int, rounds: int, sample: Callable[[Sandbox, float], float]) -> list[float]:
    samples: list[float] = []
    async with lab.open(n + 1) as host, lab.open_answering(host, 1) as (parent,):
        for round_ in range(rounds):
            start = time.perf_counter()
            async with parent.fork(n) as children:
                async with trio.open_nursery() as nursery:
                    for child in children:
                        nursery.start_soon(answer, child)
                samples.append(sample(parent, time.perf_counter() - start))
            lab.tick((round_ + 1) / rounds)
    return samples


def private_mib(sandbox: Sandbox) -> float:
    """Return the MiB that a sandbox's QEMU has written to and shares with no other process: proc_pid_smaps(5).

    Raises:
      OSError: if we may not look at it.

    """
    lines = Path(f"/proc/{sandbox.statistics().qemu_pid}/smaps_rollup").read_text("ascii").splitlines()[1:]
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["Private_Dirty"].split()[0]) / 1024


#: What there is to measure, in the order in which it is done. The limits are this project's own, for TCG on two quiet cores.
MEASURES: Mapping[str, Measure] = {
    "overlay": Measure(
        title="disk for a machine (overlay from the pool)",
        unit="ms",
        take=overlays,
        samples=100,
        quick_samples=20,
        limits={1: 0.2},
    ),
    "cold": Measure(title="cold boot to first output", unit="s", take=boots, samples=5, quick_samples=1, limits={1: 6}),
    "template": Measure(
        title="start from a template to first output",
        unit="s",
        take=clones,
        samples=20,
        quick_samples=3,
        limits={1: 0.25},
    ),
    "run": Measure(title='run("print(1)") again', unit="ms", take=runs, samples=200, quick_samples=20, limits={1: 4}),
    "memory": Measure(
        title="private memory of an idle clone", unit="MiB", take=memory, samples=3, quick_samples=1, limits={0: 64}
    ),
    "idle": Measure(
        title='run("print(1)") after a second of rest', unit="ms", take=idlers, samples=10, quick_samples=2
    ),
    "warm": Measure(
        title="start from the warm pool to first output",
        unit="ms",
        take=warm,
        samples=20,
        quick_samples=3,
        limits={1: 15},
    ),
    "fork": Measure(
        title="fork(n) until all have answered",
        unit="s",
        take=forks,
        samples=5,
        quick_samples=2,
        limits={4: 1.5},
        besides=(4,),
    ),
    "pause": Measure(
        title="fork(n), pause of the parent",
        unit="ms",
        take=pauses,
        samples=5,
        quick_samples=2,
        limits={0: 100},
        besides=(4,),
    ),
    "checkpoint": Measure(title="checkpoint", unit="ms", take=checkpoints, samples=10, quick_samples=2),
    "revert": Measure(
        title="revert to first output", unit="s", take=reverts, samples=10, quick_samples=2, limits={1: 0.35}
    ),
    "resume": Measure(
        title="resume to first output", unit="s", take=resumes, samples=10, quick_samples=2, limits={1: 0.35}
    ),
}
