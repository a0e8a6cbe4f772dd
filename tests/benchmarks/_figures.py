"""What a benchmark hands to the runner, and how it takes its samples.

A benchmark is a module `bench_*.py` beside this one with

    async def measure() -> list[Figure]: ...

It warms up by itself, takes enough samples, and measures a named reference in the same run
wherever a figure is a ratio: machines differ, and so does one machine from minute to minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterable

import attrs


@attrs.frozen(kw_only=True)
class Figure:
    """One measured number, with the limit it has to keep."""

    name: str
    """What was measured, in words; the reference of a ratio is named here."""
    value: float
    """The median, in *unit*."""
    unit: str
    """For instance ``"ms"``, ``"MB/s"`` (10**6 bytes) or ``"x"`` for a ratio."""
    samples: int = attrs.field(validator=attrs.validators.ge(1))
    """How many samples the median is of."""
    p95: float | None = None
    """The 95th percentile, in *unit*."""
    at_most: float | None = None
    """The value must not be above this."""
    at_least: float | None = None
    """The value must not be below this."""

    @classmethod
    def of(
        cls,
        name: str,
        samples: Iterable[float],
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Figure:
        """Make the figure of a series of samples, each in *unit*."""
        ordered = sorted(samples)
        if not ordered:
            raise ValueError(f"{name}: no samples")
        p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
        return cls(
            name=name,
            value=statistics.median(ordered),
            unit=unit,
            samples=len(ordered),
            p95=p95,
            at_most=at_most,
            at_least=at_least,
        )

    @property
    def within_limits(self) -> bool | None:
        """Whether the value keeps its limits; None where it has none."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


async def durations(operation: Callable[[], Awaitable[object]], *, runs: int, warm_up: int = 1) -> list[float]:
    """Run *operation* again and again, and give the wall-clock milliseconds of each run.

    The first *warm_up* runs are not counted.
    """
    for _ in range(warm_up):
        await operation()
    samples: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        await operation()
        samples.append((time.perf_counter() - start) * 1000)
    return samples
