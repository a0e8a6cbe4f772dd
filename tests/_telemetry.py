"""What the library tells OpenTelemetry, in memory."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

PREFIX = "trio_sandbox."
#: Where OpenTelemetry keeps what a program has set.
_TRACERS, _METERS = "opentelemetry.trace._TRACER_PROVIDER", "opentelemetry.metrics._internal._METER_PROVIDER"


class Telemetry:
    """The program's tracers and meters for one test."""

    def __init__(self, *processors: SpanProcessor) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        for processor in (SimpleSpanProcessor(self._exporter), *processors):
            self.tracers.add_span_processor(processor)
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """Give the spans of ours that have ended, in the order of their beginnings."""
        ours = [each for each in self._exporter.get_finished_spans() if each.name.startswith(PREFIX)]
        wanted = ours if name is None else [each for each in ours if each.name == PREFIX + name]
        return sorted(wanted, key=lambda each: each.start_time or 0)

    def span(self, name: str) -> ReadableSpan:
        """Give the only span of a name."""
        (found,) = self.spans(name)
        return found

    def path(self, span: ReadableSpan) -> list[str]:
        """Give the names of those that a span is in, the outermost first, and its own."""
        names: list[str] = []
        each: ReadableSpan | None = span
        while each is not None:
            names.insert(0, each.name.removeprefix(PREFIX))
            each = self._outer(each)
        return names

    def within(self, span: ReadableSpan) -> list[ReadableSpan]:
        """Give all of a span's trace that is ours; each must be in its own time within what it is in."""
        found = [each for each in self.spans() if identify(each)[0] == identify(span)[0]]
        for each in found:
            if (outer := self._outer(each)) is not None:
                times = [outer.start_time, each.start_time, each.end_time, outer.end_time]
                assert times == sorted(time or 0 for time in times), f"{each.name} is not within {outer.name}"
        return found

    def _outer(self, span: ReadableSpan) -> ReadableSpan | None:
        by_id = {identify(each)[1]: each for each in self._exporter.get_finished_spans()}
        return None if span.parent is None else by_id[span.parent.span_id]

    def numbers(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Give the attributes and the data of each series of a number."""
        data: MetricsData | None = self._reader.get_metrics_data()
        if data is None:
            return []
        return [
            (attributes_of(point), point)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == PREFIX + name
            for point in metric.data.data_points
        ]

    def total(self, name: str, **attributes: object) -> float:
        """Give the sum of a counter, or how many values a histogram has, of series with these attributes."""
        return sum(
            float(point.count if hasattr(point, "count") else point.value)
            for found, point in self.numbers(name)
            if attributes.items() <= found.items()
        )


def identify(span: ReadableSpan) -> tuple[int, int]:
    """Give the ids of a span's trace and of itself."""
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def attributes_of(thing: Any) -> dict[str, Any]:
    """Give the attributes of a span or of a number, without our prefix."""
    attributes: Mapping[str, Any] = thing.attributes or {}
    return {name.removeprefix(PREFIX): value for name, value in attributes.items()}


@contextmanager
def of_its_own() -> Generator[None]:
    """Let the block set OpenTelemetry up, which is possible once in a process, and undo that."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (_TRACERS, _METERS):
            patch.setattr(name, None)
            patch.setattr(f"{name}_SET_ONCE", Once())
        yield


@contextmanager
def telemetry(*processors: SpanProcessor) -> Generator[Telemetry]:
    """Set OpenTelemetry up for a block, as a program does once."""
    made = Telemetry(*processors)
    with pytest.MonkeyPatch.context() as patch:
        # There is no public way to do that twice in a process.
        patch.setattr(_TRACERS, made.tracers)
        patch.setattr(_METERS, made.meters)
        try:
            yield made
        finally:
            made.tracers.shutdown()
            made.meters.shutdown()
