"""How much is to be done, and what became of it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

import attrs

#: Failures after which a part is given up: the rest would say the same.
FAILURE_LIMIT = 5
#: Operations between two lines about how many there were.
_SAY = 1000


@attrs.define
class Budget:
    """When a part is to end: after so many operations, or so many minutes, whichever is first."""

    seed: int
    count: int | None
    minutes: float | None
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


@attrs.define
class Gauge:
    """A number that is to stay flat."""

    first: float
    last: float
    may_grow: float
    unit: str = ""

    @property
    def is_flat(self) -> bool:
        return self.last <= self.first + self.may_grow


@attrs.define
class Report:
    """What became of one part."""

    part: str
    seed: int
    operations: Counter[str] = attrs.field(factory=Counter[str])
    failures: list[str] = attrs.field(factory=list[str])
    gauges: dict[str, Gauge] = attrs.field(factory=dict[str, Gauge])
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
        return not self.failures and all(gauge.is_flat for gauge in self.gauges.values())

    def to_json(self) -> dict[str, Any]:
        gauges = {name: {**attrs.asdict(gauge), "is_flat": gauge.is_flat} for name, gauge in self.gauges.items()}
        return {**attrs.asdict(self), "operations": dict(self.operations), "gauges": gauges, "holds": self.holds}

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        total = sum(self.operations.values())
        lines = [
            f"{self.part}: {verdict}; seed {self.seed}, {total} operations in {self.seconds:.0f} s, slowest {self.slowest} s"
        ]
        lines += _columns([(f"  {name}", str(count)) for name, count in sorted(self.operations.items())])
        lines += _columns(
            [
                (
                    f"  {name}",
                    f"{gauge.first:g}",
                    "->",
                    f"{gauge.last:g}",
                    gauge.unit,
                    "" if gauge.is_flat else f"GREW, by more than {gauge.may_grow:g}",
                )
                for name, gauge in self.gauges.items()
            ]
        )
        lines += [f"  FAILURE: {failure}" for failure in self.failures]
        return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def to_json(reports: list[Report]) -> str:
    return json.dumps([report.to_json() for report in reports], indent=2)
