"""What the library tells of its work: spans, numbers, and ids for the log. Where nobody looks, that costs one check.

Two may look: OpenTelemetry, if the program has set it up (`_otel`), and a `Recording` of ours. Neither is ever told of code,
output, names or other data of a user or a guest: only of ids, images, languages, sizes and outcomes.
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Generator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, cast, final

import attrs
import trio

if TYPE_CHECKING:
    # Generic in the stubs of the standard library only.
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter

#: What an attribute of a span or of a number may be.
Value = str | int | float | bool
#: Ends a span, told the kind of error that it ended with, if it did.
End = Callable[[str | None], object]


class Sink(Protocol):
    """Somebody who looks at spans. Nothing that it does may fail."""

    def begin(self, name: str, attributes: dict[str, Value]) -> End:
        """Begin a span, inside of which those are that the current context begins until it ends; *attributes* may become more."""
        ...

    def add(self, name: str, attributes: dict[str, Value], began: float, ended: float) -> None:
        """Add a span that is over: it *began* and *ended* so many seconds ago."""
        ...


class Span:
    """A piece of work, for a ``with`` block. This one is for where nobody looks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def set(self, **attributes: Value) -> None:
        """Say more of it."""


#: A span that nobody sees.
UNSEEN: Final = Span()


@final
class _SeenSpan(Span):
    def __init__(self, sinks: list[Sink], name: str, attributes: dict[str, Value]) -> None:
        self._sinks = sinks
        self._name = name
        self._attributes = attributes
        self._ends: list[End] = []

    def __enter__(self) -> Self:
        self._ends = [sink.begin(self._name, self._attributes) for sink in self._sinks]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = outcome_of(exc)
        self._attributes.setdefault("outcome", outcome)
        error = type(exc).__name__ if outcome == "error" else None
        for end in reversed(self._ends):
            end(error)

    def set(self, **attributes: Value) -> None:
        self._attributes |= attributes


def outcome_of(exc: BaseException | None) -> str:
    """Say how a block ended that *exc* came out of."""
    if exc is None:
        return "ok"
    return "cancelled" if _is_cancellation(exc) else "error"


def _is_cancellation(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return all(map(_is_cancellation, cast("BaseExceptionGroup[BaseException]", exc).exceptions))
    return isinstance(exc, (trio.Cancelled, GeneratorExit))


def span(name: str, **attributes: Value) -> Span:
    """Return the span of a piece of work, for one ``with`` block of one task.

    Its end tells the ``outcome``: "ok", "cancelled" or "error", unless it has been set.
    """
    sinks = _sinks()
    return _SeenSpan(sinks, name, attributes) if sinks else UNSEEN


def add_span(name: str, began: float, ended: float = 0.0, **attributes: Value) -> None:
    """Add a span that is over, inside the current one: it *began* and *ended* so many seconds ago."""
    for sink in _sinks():
        sink.add(name, attributes, began, ended)


def measure(name: str, value: float = 1, **attributes: Value) -> None:
    """Add *value* to a number of `_otel.INSTRUMENTS`."""
    if "opentelemetry.metrics" in sys.modules:
        from ._otel import measure as tell

        tell(name, value, attributes)


def is_observed() -> bool:
    """Tell whether anybody looks; the one check of what must be fast."""
    if _recording.get() is not None:
        return True
    # Whoever has set OpenTelemetry up has imported it; others may have as well.
    if "opentelemetry.trace" in sys.modules or "opentelemetry.metrics" in sys.modules:
        from ._otel import is_set_up

        return is_set_up()
    return False


def _sinks() -> list[Sink]:
    recording = _recording.get()
    sinks: list[Sink] = [] if recording is None else [recording]
    if "opentelemetry.trace" in sys.modules:
        from ._otel import tracing

        if (otel := tracing()) is not None:
            sinks.append(otel)
    return sinks


# --- A recording, for `trio-sandbox run --trace` ---


@attrs.define
class Recorded:
    """A span of a recording."""

    name: str
    attributes: dict[str, Value]
    depth: int
    """How many others it is in."""
    began: float
    """Seconds since the recording began."""
    ended: float | None = None
    """The same; None: it is not over."""


@final
class Recording:
    """The spans of a block and of the tasks that were started in it."""

    def __init__(self) -> None:
        self._spans: list[Recorded] = []
        self._began = trio.current_time()

    def spans(self) -> list[Recorded]:
        """Return them as they are now, in the order of their beginnings; none comes before one that it is in."""
        return sorted(self._spans, key=lambda each: each.began)

    def begin(self, name: str, attributes: dict[str, Value]) -> End:
        outer, now = _current.get(), self._now()
        recorded = Recorded(name, attributes, 0 if outer is None else outer.depth + 1, now)
        self._spans.append(recorded)
        _current.set(recorded)

        def end(_error: str | None) -> None:
            recorded.ended = self._now()
            _current.set(outer)

        return end

    def add(self, name: str, attributes: dict[str, Value], began: float, ended: float) -> None:
        outer, now = _current.get(), self._now()
        depth, earliest = (0, 0.0) if outer is None else (outer.depth + 1, outer.began)
        self._spans.append(Recorded(name, attributes, depth, max(now - began, earliest), now - ended))

    def _now(self) -> float:
        return trio.current_time() - self._began


_recording: Final[ContextVar[Recording | None]] = ContextVar("trio_sandbox._recording", default=None)
#: The innermost span of it that the current task is in.
_current: Final[ContextVar[Recorded | None]] = ContextVar("trio_sandbox._current", default=None)


@contextmanager
def record() -> Generator[Recording]:
    """Record the spans of the block, which is in a Trio task."""
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


# --- The log ---

#: The sandbox, and the run of it, that the current task serves, if it is one of ours.
_served: Final[ContextVar[tuple[str | None, str | None]]] = ContextVar("trio_sandbox._served", default=(None, None))


def new_id() -> str:
    """Return an id for a sandbox."""
    return secrets.token_hex(6)


@contextmanager
def serving(sandbox_id: str | None, run_id: str | None = None) -> Generator[None]:
    """Have what is logged in the block, and in tasks that are started in it, say that it is about this sandbox, or run."""
    token = _served.set((sandbox_id, run_id))
    try:
        yield
    finally:
        _served.reset(token)


@final
class PartLogger(Adapter):
    """The logger of one part of the library. Its records say what they are about: `sandbox_id` and `run_id`, or None."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        sandbox_id, run_id = _served.get()
        return msg, {**kwargs, "extra": {"sandbox_id": sandbox_id, "run_id": run_id}}


def part_logger(part: str) -> PartLogger:
    """Return the logger of *part*, ``trio_sandbox.PART``."""
    return PartLogger(logging.getLogger(f"trio_sandbox.{part}"))
