"""Spans and numbers for OpenTelemetry, where the program has set it up; imported only there.

Whatever happens in there, an exporter that fails for instance, is logged and disturbs nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, final

import attrs
from opentelemetry import context, metrics, trace
from opentelemetry.util.types import AttributeValue

from ._metadata import version

_log = logging.getLogger("trio_sandbox.telemetry")

#: In front of the names of spans, numbers and attributes.
_PREFIX: Final = "trio_sandbox."
#: Seconds between two lines in the log that say that OpenTelemetry fails.
_QUIET: Final = 60.0
#: Bounds of the histograms, in seconds: from a run of some milliseconds to the build of an image.
_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@attrs.frozen
class Instrument:
    """A number that is told."""

    kind: Literal["counter", "up_down_counter", "histogram"]
    unit: str
    description: str


INSTRUMENTS: Final[Mapping[str, Instrument]] = {
    "starts": Instrument("counter", "{start}", "Sandboxes that were started, or failed to"),
    "start.duration": Instrument("histogram", "s", "From the call until a sandbox can be used"),
    "admission.duration": Instrument("histogram", "s", "How long a sandbox waited for its share of the host"),
    "memory.sleeps": Instrument("counter", "{sandbox}", "Idle sandboxes that were put to sleep for want of memory"),
    "sandboxes.open": Instrument("up_down_counter", "{sandbox}", "Sandboxes that are open"),
    "runs": Instrument("counter", "{run}", "Runs that have ended"),
    "run.duration": Instrument("histogram", "s", "From sending the code until its end"),
    "network.decisions": Instrument("counter", "{decision}", "Outcomes of the guests' lookups and connections"),
}


@final
class _Failures:
    """Keeps the failures of OpenTelemetry from ours, and tells of them now and then."""

    def __init__(self) -> None:
        self._told = float("-inf")

    @contextmanager
    def kept(self) -> Generator[None]:
        try:
            yield
        except Exception:  # noqa: BLE001 - it is not ours, and logged
            if (now := time.monotonic()) - self._told >= _QUIET:
                self._told = now
                _log.exception("OpenTelemetry failed, and spans and metrics may be lost; the sandboxes continue")


_failures: Final = _Failures()


def _named(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    return {f"{_PREFIX}{name}": value for name, value in attributes.items()}


@final
class Tracing:
    """What takes spans for one provider of tracers."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("trio_sandbox", version())

    def begin(self, name: str, attributes: Mapping[str, AttributeValue]) -> Callable[[str | None], None]:
        with _failures.kept():
            span = self._tracer.start_span(f"{_PREFIX}{name}", attributes=_named(attributes))
            token = context.attach(trace.set_span_in_context(span))

            def end(error: str | None) -> None:
                context.detach(token)
                with _failures.kept():
                    span.set_attributes(_named(attributes))
                    if error is not None:
                        # Not the exception itself: its message may quote what the guest printed.
                        span.set_attribute("error.type", error)
                        span.set_status(trace.StatusCode.ERROR, error)
                    span.end()

            return end
        return _end_nothing

    def add(self, name: str, attributes: Mapping[str, AttributeValue], began: float, ended: float) -> None:
        now = time.time()
        with _failures.kept():
            span = self._tracer.start_span(
                f"{_PREFIX}{name}", attributes=_named(attributes), start_time=int((now - began) * 1e9)
            )
            span.end(end_time=int((now - ended) * 1e9))


def _end_nothing(_error: str | None) -> None:
    """End a span that could not begin."""


_tracing: Tracing | None = None


def tracing() -> Tracing | None:
    """Return what takes spans; None if the program has not set OpenTelemetry up."""
    global _tracing
    with _failures.kept():
        provider = trace.get_tracer_provider()
        if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
            return None
        if _tracing is None or _tracing.provider is not provider:
            _tracing = Tracing(provider)
        return _tracing
    return None


@final
class _Meters:
    """The instruments of one provider of meters."""

    def __init__(self, provider: metrics.MeterProvider) -> None:
        self.provider = provider
        meter = provider.get_meter("trio_sandbox", version())
        self.counters: dict[str, metrics.Counter | metrics.UpDownCounter] = {}
        self.histograms: dict[str, metrics.Histogram] = {}
        for name, wanted in INSTRUMENTS.items():
            full, unit, text = f"{_PREFIX}{name}", wanted.unit, wanted.description
            if wanted.kind == "counter":
                self.counters[name] = meter.create_counter(full, unit, text)
            elif wanted.kind == "up_down_counter":
                self.counters[name] = meter.create_up_down_counter(full, unit, text)
            else:
                self.histograms[name] = meter.create_histogram(
                    full, unit, text, explicit_bucket_boundaries_advisory=_BOUNDS
                )


_meters: _Meters | None = None

#: What stands in for a provider of meters where the program has set none; the first has no public name.
_NO_METERS: Final = ("_ProxyMeterProvider", "NoOpMeterProvider")


def is_set_up() -> bool:
    """Tell whether the program has set OpenTelemetry up, for spans or for numbers."""
    if tracing() is not None:
        return True
    with _failures.kept():
        return type(metrics.get_meter_provider()).__name__ not in _NO_METERS
    return False


def measure(name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
    """Add *value* to a number, if the program has set OpenTelemetry up."""
    global _meters
    kind = INSTRUMENTS[name].kind
    with _failures.kept():
        provider = metrics.get_meter_provider()
        if _meters is None or _meters.provider is not provider:
            _meters = _Meters(provider)
        if kind == "histogram":
            _meters.histograms[name].record(value, _named(attributes))
        else:
            _meters.counters[name].add(value, _named(attributes))
