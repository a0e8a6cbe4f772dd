"""Figures: what was measured, the limit it has to keep, and how they are shown."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

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
    measure: str = ""
    """Which of `MEASURES` it is, if it is one."""
    n: int | None = None
    """How many at once, where that is a question."""

    @classmethod
    def of(
        cls,
        name: str,
        samples: Iterable[float],
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        measure: str = "",
        n: int | None = None,
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
            measure=measure,
            n=n,
        )

    @property
    def within_limits(self) -> bool | None:
        """Whether the value keeps its limits; None where it has none."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    @property
    def limit(self) -> str:
        """The limit as a person would write it: ``<= 4`` or ``>= 20``."""
        bounds = (("<=", self.at_most), (">=", self.at_least))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@attrs.frozen(kw_only=True)
class Skipped:
    """What was to be measured and was not."""

    name: str
    measure: str
    n: int
    reason: str
    """Why, for people."""
    failed: bool
    """It went wrong, as opposed to being too large for this machine."""


def table(figures: Sequence[Figure | Skipped]) -> str:
    """Lay the figures out as a Markdown table, which a terminal shows as well."""
    counted = any(figure.n is not None for figure in figures)
    rows: list[tuple[str, ...]] = [("what", "n", "median", "p95", "unit", "limit", "", "samples")]
    for figure in figures:
        n = "" if figure.n is None else str(figure.n)
        if isinstance(figure, Skipped):
            rows.append((figure.name, n, "failed" if figure.failed else "no room", "", "", "", "", "0"))
            continue
        verdict = {None: "", True: "ok", False: "OVER"}[figure.within_limits]
        rows.append(
            (
                figure.name,
                n,
                _digits(figure.value),
                "" if figure.p95 is None else _digits(figure.p95),
                figure.unit,
                figure.limit,
                verdict,
                str(figure.samples),
            )
        )
    if not counted:
        rows = [(row[0], *row[2:]) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


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
    return samples  # noqa: ASYNC910 (there is a run at least)
