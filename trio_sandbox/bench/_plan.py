"""Which measures to take, taking them, and the report of it."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable
from functools import partial
from typing import cast

import attrs
import trio
from attrs import validators as v

from .. import __version__
from .._config import HostConfig, Progress, SandboxConfig
from .._errors import SandboxError
from ..host import open_host
from ..qemu import Accelerator
from ._figures import Figure, Skipped, table
from ._lab import DoesNotFitError, Lab, OpenHost
from ._machine import Load, LoadWatch, Machine, accelerator_meaning
from ._measures import MEASURES, Measure

#: Raised when a field of `Report.as_json` changes its meaning or goes; not when one is added.
SCHEMA = 1


def _counts(_: object, attribute: attrs.Attribute[tuple[int, ...]], value: tuple[int, ...]) -> None:
    if not value or min(value) < 1:
        raise ValueError(f"`{attribute.name}` must be numbers of sandboxes, each at least 1, not {value!r}")


def _measures(_: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    unknown = [name for name in value if name not in MEASURES]
    if unknown or not value:
        raise ValueError(
            f"`{attribute.name}` must be some of {', '.join(MEASURES)}; not {', '.join(unknown) or 'nothing'}"
        )


@attrs.frozen(kw_only=True)
class Plan:
    """What to measure."""

    measures: tuple[str, ...] = attrs.field(default=tuple(MEASURES), validator=_measures)
    """Keys of `MEASURES`; they are taken in the order of these."""
    counts: tuple[int, ...] = attrs.field(default=(1,), validator=_counts)
    """How many at once."""
    quick: bool = attrs.field(default=False, validator=v.instance_of(bool))
    """Take few samples."""
    image: str = "python"
    sandbox: SandboxConfig = attrs.field(factory=SandboxConfig)
    host: HostConfig = HostConfig()  # noqa: RUF009 (a frozen value)


@attrs.frozen(kw_only=True)
class Report:
    """What was measured, and on what."""

    plan: Plan
    machine: Machine
    accelerator: Accelerator
    load: Load
    figures: tuple[Figure | Skipped, ...]

    @property
    def failed(self) -> bool:
        """Whether something could not be measured because it went wrong."""
        return any(isinstance(figure, Skipped) and figure.failed for figure in self.figures)

    def as_json(self) -> str:
        """Write it for programs: docs/reference/bench.md says what the fields mean."""
        accelerator, sandbox = self.accelerator, self.plan.sandbox
        value = {
            "schema": SCHEMA,
            "trio_sandbox": __version__,
            "machine": attrs.asdict(self.machine),
            "accelerator": {
                "name": accelerator.name,
                "hardware": accelerator.hardware,
                "meaning": accelerator_meaning(accelerator),
                "qemu": _version(accelerator),
            },
            "load": {**attrs.asdict(self.load), "quiet": self.load.quiet},
            "sandbox": {"image": self.plan.image, "memory_mib": sandbox.memory_mib, "vcpus": sandbox.vcpus},
            "quick": self.plan.quick,
            "figures": [_row(figure) for figure in self.figures],
        }
        return json.dumps(value, indent=2)

    def as_text(self) -> str:
        """Write it for people."""
        sandbox = self.plan.sandbox
        facts = [
            f"trio-sandbox {__version__}; image {self.plan.image}, {sandbox.memory_mib} MiB, {sandbox.vcpus} vCPU each",
            str(self.machine),
            f"QEMU {_version(self.accelerator)}; {accelerator_meaning(self.accelerator)}",
            str(self.load),
        ]
        notes = [
            f"{figure.measure}, n = {figure.n}: {figure.reason}."
            for figure in self.figures
            if isinstance(figure, Skipped)
        ]
        notes.append(
            "n: so many at once, asked for at the same moment; each of them is a sample, and its time is that from this "
            "moment. With n = 1 they come one after another. Limits: what trio-sandbox holds itself to under TCG on two quiet cores."
        )
        columns = max(60, shutil.get_terminal_size((100, 24)).columns)
        lines = [line for note in notes for line in textwrap.wrap(note, columns)]
        return "\n".join([*facts, "", table(self.figures), "", *lines])


def _version(accelerator: Accelerator) -> str:
    return ".".join(map(str, accelerator.qemu.version))


def _row(figure: Figure | Skipped) -> dict[str, object]:
    common: dict[str, object] = {"measure": figure.measure, "what": figure.name, "n": figure.n}
    if isinstance(figure, Skipped):
        return {**common, "skipped": figure.reason, "failed": figure.failed}
    return {
        **common,
        "unit": figure.unit,
        "median": figure.value,
        "p95": figure.p95,
        "samples": figure.samples,
        "at_most": figure.at_most,
        "within_limits": figure.within_limits,
    }


async def measure(plan: Plan, *, progress: Callable[[Progress], object], open_host: OpenHost = open_host) -> Report:
    """Take the measures of *plan*, one after the other.

    What fails, or does not fit, is in the report, and the others are taken all the same.
    Cancelled, it leaves nothing but the template and images that sandboxes like these have in the cache.

    Args:
      plan: What to measure.
      progress: Called at every step; must not block.
      open_host: Opens the hosts that are measured.

    Raises:
      SandboxError, OSError: if no host can be opened here, or its image not be prepared.

    """
    host_config = attrs.evolve(plan.host, progress=progress)
    async with open_host(host_config) as host:
        await host.prepare(plan.image)
        accelerator = host.accelerator
    figures: list[Figure | Skipped] = []
    watch = LoadWatch()
    for key, wanted in MEASURES.items():
        for n in wanted.counts(plan.counts, quick=plan.quick) if key in plan.measures else ():

            def tick(fraction: float, stage: str = f"{key}, n = {n}") -> None:
                progress(Progress(stage, "measuring", fraction))

            tick(0)
            lab = Lab(image=plan.image, sandbox=plan.sandbox, host=host_config, open_host=open_host, tick=tick)
            figures.append(await _take(lab, key, wanted, n, quick=plan.quick))
            tick(1)
    return Report(
        plan=plan,
        machine=Machine.here(),
        accelerator=accelerator,
        load=watch.stop(),
        figures=tuple(figures),
    )


async def _take(lab: Lab, key: str, wanted: Measure, n: int, *, quick: bool) -> Figure | Skipped:
    skipped = partial(Skipped, name=wanted.title, measure=key, n=n)
    reason: str
    failed = True
    try:
        samples = await wanted.take(lab, n, wanted.rounds(n, quick=quick))
        return Figure.of(wanted.title, samples, wanted.unit, at_most=wanted.limit(n), measure=key, n=n)
    except* DoesNotFitError as group:
        reason, failed = str(_first(group)), False
    except* (SandboxError, OSError, trio.TooSlowError) as group:
        first = _first(group)
        reason = f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]:.200}"
    return skipped(reason=reason, failed=failed)  # noqa: ASYNC910 (it waited for its failure)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(cast("BaseExceptionGroup[BaseException]", first)) if isinstance(first, BaseExceptionGroup) else first
