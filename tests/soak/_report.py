"""How much is to be done, and what became of it."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs

#: Failures after which a part is given up: the rest would say the same.
FAILURE_LIMIT = 5
#: Operations between two lines about how many there were.
_SAY = 1000
#: By what factor the quickest of the last third of an operation's latencies may be above the quickest of the first third, and
#: milliseconds that do not count. What leaks makes every operation slower than the one before; another program on the machine
#: makes many of them slower, and not all.
SLOWER = 1.5
_MILLISECONDS_SLOWER = 5.0


@attrs.define
class Budget:
    """When a part is to end: after so many operations, or so many minutes, whichever is first."""

    seed: int
    count: int | None
    minutes: float | None
    scale: float = 1.0
    """By what to multiply the numbers of a part that has numbers of its own."""
    started: float = attrs.field(factory=time.monotonic)
    _said: int = 0

    def is_left(self, done: int) -> bool:
        """Whether there is something left after *done* operations; says now and then how many that are."""
        if done >= self._said + _SAY:
            self._said = done
            print(f"{done} operations, {time.monotonic() - self.started:.0f} s", file=sys.stderr, flush=True)
        if self.count is not None and done >= self.count:
            return False
        return self.minutes is None or time.monotonic() - self.started < self.minutes * 60

    def shares(self, counts: Sequence[int | None]) -> Iterator[Budget]:
        """Yield a budget for each of *counts*: a fair share of the time that is left when it is asked for."""
        for number, count in enumerate(counts):
            minutes = None
            if self.minutes is not None:
                left = self.minutes - (time.monotonic() - self.started) / 60
                minutes = max(left, 0) / (len(counts) - number)
            yield Budget(self.seed, count, minutes, self.scale)


@attrs.define
class Gauge:
    """A number that is to be the same before and after."""

    first: float
    last: float
    may_grow: float
    unit: str = ""

    @property
    def is_flat(self) -> bool:
        return self.last <= self.first + self.may_grow


@attrs.define
class Series:
    """A number that is looked at again and again, and is to stay flat.

    What it climbs by is the rise of a line through the second half of its values: caches are full by then. The line's slope is the
    median of the slopes between all pairs of them, which a few values that are far off do not change.
    """

    may_climb: float
    unit: str = ""
    values: list[float] = attrs.field(factory=list[float])

    @property
    def climbs(self) -> float:
        second = self.values[len(self.values) // 2 :]
        pairs = itertools.combinations(enumerate(second), 2)
        slopes = [(later - earlier) / (j - i) for (i, earlier), (j, later) in pairs]
        return statistics.median(slopes) * (len(second) - 1) if slopes else 0.0

    @property
    def is_flat(self) -> bool:
        return self.climbs <= self.may_climb


@attrs.define
class Latencies:
    """How long an operation took, in milliseconds, each time."""

    samples: list[float] = attrs.field(factory=list[float])
    beside: list[float] = attrs.field(factory=list[float])
    """How long it took, meanwhile, of what has not been used before. What makes that slower as well is the machine."""

    @contextmanager
    def measured(self) -> Generator[None]:
        """Measure the block, if it comes to its end."""
        started = time.perf_counter()
        yield
        self.samples.append((time.perf_counter() - started) * 1000)

    @property
    def first(self) -> float:
        """The median of the first tenth."""
        return statistics.median(self.samples[: self._tenth])

    @property
    def last(self) -> float:
        """The median of the last tenth."""
        return statistics.median(self.samples[-self._tenth :])

    @property
    def _tenth(self) -> int:
        return max(len(self.samples) // 10, 1)

    @property
    def is_flat(self) -> bool:
        third = len(self.samples) // 3
        if third == 0:
            return True
        beside = self.beside[-max(len(self.beside) // 3, 1) :]
        unused = max(min(self.samples[:third]), min(beside, default=0.0))
        return min(self.samples[-third:]) <= unused * SLOWER + _MILLISECONDS_SLOWER


@attrs.define
class Report:
    """What became of one part."""

    part: str
    seed: int
    operations: Counter[str] = attrs.field(factory=Counter[str])
    failures: list[str] = attrs.field(factory=list[str])
    gauges: dict[str, Gauge] = attrs.field(factory=dict[str, Gauge])
    series: dict[str, Series] = attrs.field(factory=dict[str, Series])
    latencies: dict[str, Latencies] = attrs.field(factory=dict[str, Latencies])
    notes: list[str] = attrs.field(factory=list[str])
    """What is worth knowing, and no failure."""
    seconds: float = 0
    slowest: float = 0
    """Seconds of the operation that took longest."""

    def fail(self, text: str) -> None:
        self.failures.append(text)

    @property
    def is_hopeless(self) -> bool:
        return len(self.failures) >= FAILURE_LIMIT

    @property
    def holds(self) -> bool:
        measured: list[Gauge | Series | Latencies] = [*self.gauges.values(), *self.series.values()]
        measured += self.latencies.values()
        return bool(self.operations.total()) and not self.failures and all(what.is_flat for what in measured)

    def to_json(self) -> dict[str, Any]:
        gauges = {name: {**attrs.asdict(gauge), "is_flat": gauge.is_flat} for name, gauge in self.gauges.items()}
        series = {
            name: {**attrs.asdict(values), "climbs": values.climbs, "is_flat": values.is_flat}
            for name, values in self.series.items()
        }
        latencies = {
            name: {"samples": len(took.samples), "first": took.first, "last": took.last, "is_flat": took.is_flat}
            for name, took in self.latencies.items()
            if took.samples
        }
        measured = {"gauges": gauges, "series": series, "latencies": latencies}
        return {**attrs.asdict(self), "operations": dict(self.operations), **measured, "holds": self.holds}

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        total = sum(self.operations.values())
        lines = [
            f"{self.part}: {verdict}; seed {self.seed}, {total} operations in {self.seconds:.0f} s, slowest {self.slowest} s"
        ]
        lines += _columns([(f"  {name}", str(count)) for name, count in sorted(self.operations.items())])
        lines += _columns([(f"  {name}", *cells) for name, *cells in self.figures()])
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  FAILURE: {failure}" for failure in self.failures]
        if not total:
            lines.append("  FAILURE: it did nothing in its time")
        return "\n".join(lines)

    def figures(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Yield what was measured: its name, the first value, the last, the unit, and what is wrong with it or "".

        Of a series, and of latencies, that are the medians of the first and the last tenth.
        """
        for name, gauge in self.gauges.items():
            wrong = "" if gauge.is_flat else f"GREW, by more than {gauge.may_grow:g}"
            yield name, f"{gauge.first:g}", f"{gauge.last:g}", gauge.unit, wrong
        for name, series in self.series.items():
            if series.values:
                tenth = max(len(series.values) // 10, 1)
                first, last = statistics.median(series.values[:tenth]), statistics.median(series.values[-tenth:])
                wrong = "" if series.is_flat else f"CLIMBS, by {series.climbs:g}; it may by {series.may_climb:g}"
                yield name, f"{first:g}", f"{last:g}", series.unit, wrong
        for name, took in self.latencies.items():
            if took.samples:
                wrong = "" if took.is_flat else "SLOWER each time"
                yield f"{name}, {len(took.samples)} times", f"{took.first:.3g}", f"{took.last:.3g}", "ms", wrong


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def to_json(reports: list[Report]) -> str:
    return json.dumps([report.to_json() for report in reports], indent=2)


def to_markdown(reports: list[Report]) -> str:
    """Make the tables of a page: what each part did, what was measured before and after it, and meanwhile."""
    parts = [("part", "operations", "seconds", "slowest, s", "failures", "")]
    gauges = [("part", "what", "before", "after", "unit", "")]
    for report in reports:
        total, failures = sum(report.operations.values()), len(report.failures)
        verdict = "holds" if report.holds else "FAILS"
        parts.append((report.part, str(total), f"{report.seconds:.0f}", f"{report.slowest:g}", str(failures), verdict))
        gauges += [(report.part, *cells) for cells in report.figures() if cells[0] in report.gauges]
    sections = [_table(_sections(report)) for report in reports if report.series]
    return "\n\n".join([_table(parts), _table(gauges), *sections])


def _sections(report: Report) -> list[tuple[str, ...]]:
    """Return a table with a column for each section of a part, whose series are named "section: gauge"."""
    figures = {cells[0]: cells[1:] for cells in report.figures()}
    names = [name.partition(": ") for name in report.series]
    sections = list(dict.fromkeys(section for section, _, _ in names))

    def row(heading: str, cell: Callable[[str], str]) -> tuple[str, ...]:
        return (heading, *map(cell, sections))

    def latency(section: str) -> str:
        took = report.latencies.get(section)
        return f"{took.first:.3g} → {took.last:.3g}" if took is not None and took.samples else ""

    def beside(section: str) -> str:
        took = Latencies(report.latencies[section].beside) if section in report.latencies else Latencies()
        return f"{took.first:.3g} → {took.last:.3g}" if took.samples else ""

    def values(section: str, gauge: str) -> str:
        first, last, unit, wrong = figures.get(f"{section}: {gauge}", ("",) * 4)
        return f"{first} → {last} {unit} {wrong}".rstrip() if first else ""

    return [
        row(report.part, str),
        row("operations", lambda section: str(report.operations[section])),
        row("latency, ms", latency),
        *([row("of a new one, ms", beside)] if any(took.beside for took in report.latencies.values()) else []),
        *(row(gauge, partial(values, gauge=gauge)) for gauge in dict.fromkeys(gauge for _, _, gauge in names)),
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    heading, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rest))
