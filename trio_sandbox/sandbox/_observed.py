"""What is told of a sandbox and of its runs, for whoever looks at spans, numbers or the log."""

from __future__ import annotations

import contextvars
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal, Self, final

import trio

from .._config import SandboxConfig
from .._image import AnyImage, Image
from .._observe import UNSEEN, Span, Value, add_span, is_observed, measure, new_id, outcome_of, serving, span
from ..client import RunTrace

#: Where a sandbox's machine comes from: a boot, a template, the warm pool, a saved sandbox, a fork of another, a node of a fleet.
StartKind = Literal["boot", "template", "warm", "saved", "fork", "fleet"]


@final
class ObservedSandbox:
    """A sandbox from the call that opens it until its machine is gone, for the ``with`` block that all of it is in.

    Args:
      image: What it is of.
      config: What it has.
      kind: Where its machine comes from, as far as that is known.

    """

    def __init__(self, image: AnyImage, config: SandboxConfig, kind: StartKind) -> None:
        self.id: str = new_id()
        """The sandbox's own name, in logs and spans."""
        self.kind: StartKind = kind
        """May be said later, until `body`."""
        self.context: contextvars.Context = contextvars.copy_context()
        """What spans of the sandbox's own background belong into."""
        name = image.name if isinstance(image, Image) else image
        self._span = span("sandbox", sandbox_id=self.id, image=name, memory_mib=config.memory_mib, vcpus=config.vcpus)
        self._phase = ExitStack()
        self._asked_at = trio.current_time()
        self._started = False
        self._raised: BaseException | None = None  # by the user's block, and not by its start or end

    def __enter__(self) -> Self:
        self._span.__enter__()
        with serving(self.id):
            self.context = contextvars.copy_context()
        self._begin("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None and exc is self._raised:
            self._phase.close()
        else:
            self._phase.__exit__(kind, exc, traceback)
        self._raised = None
        if not self._started:
            measure("starts", kind=self.kind, outcome=outcome_of(exc))
        self._span.set(kind=self.kind)
        self._span.__exit__(kind, exc, traceback)

    def tell_node(self, node: str) -> None:
        """Say which node of a fleet it is on."""
        self._span.set(node=node)

    @contextmanager
    def body(self) -> Generator[None]:
        """Be the user's block. Before it is the start, and after it the end."""
        self._phase.close()
        self._started = True
        measure("starts", kind=self.kind, outcome="ok")
        measure("start.duration", trio.current_time() - self._asked_at, kind=self.kind)
        measure("sandboxes.open")
        try:
            yield
        except BaseException as exc:
            self._raised = exc
            raise
        finally:
            measure("sandboxes.open", -1)
            self._begin("teardown")

    def _begin(self, phase: str) -> None:
        self._phase.enter_context(serving(self.id))
        self._phase.enter_context(span(phase))


@contextmanager
def operation(name: str, sandbox_id: str) -> Generator[None]:
    """Be something that becomes of a whole sandbox."""
    with serving(sandbox_id), span(name, sandbox_id=sandbox_id):
        yield


@final
class _RunSpan(Span):
    def __init__(self, trace: RunTrace, sandbox_id: str, run_id: str, code: str) -> None:
        self._trace = trace
        self._span = span(
            "run", sandbox_id=sandbox_id, run_id=run_id, language=trace.language, code_characters=len(code)
        )

    def __enter__(self) -> Self:
        self._span.__enter__()
        return self

    def set(self, **attributes: Value) -> None:
        self._span.set(**attributes)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        trace, now = self._trace, trio.current_time()
        if trace.sent_at is not None:
            if trace.first_output_at is not None:
                add_span("first_output", now - trace.sent_at, now - trace.first_output_at)
            measure("run.duration", now - trace.sent_at, language=trace.language, outcome=trace.outcome)
        measure("runs", language=trace.language, outcome=trace.outcome)
        self._span.set(outcome=trace.outcome)
        if trace.exit_code is not None:
            self._span.set(exit_code=trace.exit_code)
        self._span.__exit__(kind, exc, traceback)


def run_span(trace: RunTrace, sandbox_id: str, run_id: str, code: str) -> Span:
    """Return the span of a run, for the block that it is in from the call to its end."""
    return _RunSpan(trace, sandbox_id, run_id, code) if is_observed() else UNSEEN
