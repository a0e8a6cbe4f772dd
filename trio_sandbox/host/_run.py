"""One run of code in a sandbox's interpreter, from the request to the result."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal, final

import attrs
import trio

from .._errors import GuestProtocolError, OutputLimitError, RunRefusedError, SandboxError
from ..wire import JSON, STDERR, STDOUT, RecordStream
from ._failures import Machine, guest_failures, open_stream
from ._messages import Failed, Finished, parse_message


@final
@attrs.frozen
class OutputChunk:
    """Some bytes that a run printed."""

    stream: Literal["stdout", "stderr"]
    """Which of its streams it printed them to."""
    data: bytes
    """The bytes; a chunk may end in the middle of a line or of a character."""


@final
@attrs.frozen(kw_only=True)
class RunResult:
    """How a run ended and what it printed."""

    exit_code: int
    """0 after success, 1 after an uncaught exception, n after ``sys.exit(n)`` or ``os._exit(n)``, 128 + n after signal n."""
    stdout_bytes: bytes = attrs.field(default=b"", repr=False)
    """What it printed to standard output; empty in the result of `Sandbox.stream`, which handed it out already."""
    stderr_bytes: bytes = attrs.field(default=b"", repr=False)
    """What it printed to standard error, an uncaught exception's traceback included."""
    duration: float
    """Seconds on the host's clock, from sending the request to its end."""
    restarted: bool
    """The interpreter was a new one: an earlier run had ended the one before, with its variables."""
    state_kept: bool
    """The interpreter lives on, with its variables."""
    accelerator: str
    """What ran the guest: "kvm", or "tcg", which QEMU does not count as a security boundary."""

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are no UTF-8 become U+FFFD."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are no UTF-8 become U+FFFD."""
        return self.stderr_bytes.decode("utf-8", "replace")


@final
class RunEvents:
    """The events of a run in order of arrival: `OutputChunk`, and one `RunResult` as the last.

    An asynchronous iterator that needs no closing of its own: its block does that.
    """

    def __init__(self, vm: Machine, records: RecordStream) -> None:
        self._vm = vm
        self._records = records
        self._sent_at = trio.current_time()
        self._over = False

    def __aiter__(self) -> RunEvents:
        return self

    async def __anext__(self) -> OutputChunk | RunResult:
        """Wait for the next event. Cancelled: nothing is lost; leaving the block is what stops the run."""
        if self._over:
            raise StopAsyncIteration
        try:
            async with guest_failures(self._vm, "a run"):
                event = self._event(await self._records.receive())
        except SandboxError:
            self._over = True
            raise
        self._over = isinstance(event, RunResult)
        return event

    def _event(self, record: tuple[bytes, bytes] | None) -> OutputChunk | RunResult:
        if record is None:
            raise GuestProtocolError("the guest ended a run without saying how")
        tag, payload = record
        if tag == STDOUT:
            return OutputChunk("stdout", payload)
        if tag == STDERR:
            return OutputChunk("stderr", payload)
        if tag != JSON:
            raise GuestProtocolError(f"the guest sent a record of the unknown kind {tag!r} during a run")
        message = parse_message(payload)
        if isinstance(message, Failed):
            raise RunRefusedError(message.reason)
        if not isinstance(message, Finished):
            raise GuestProtocolError(f"the guest answered a run with {message!r}")
        return RunResult(
            exit_code=message.exit_code,
            duration=trio.current_time() - self._sent_at,
            restarted=message.restarted,
            state_kept=message.state_kept,
            accelerator=self._vm.accelerator.name,
        )

    async def send_request(self, request: dict[str, object]) -> None:
        """Hand the run to the guest. Cancelled: the guest may have it; closing the records ends it there."""
        try:
            async with guest_failures(self._vm, "a run"):
                await self._records.send_json(request)
        except BaseException:
            self._over = True  # a record cut short leaves nothing to talk on
            raise

    async def stop(self, grace: float, patience: float) -> None:
        """End the run if it goes on: INT, then KILL, then the whole VM.

        Takes at most *grace* + *patience* seconds, whatever the guest does and whoever is cancelled.
        """
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            for request, bound in (("interrupt", grace), ("kill", patience)):
                if self._over:
                    return
                with trio.move_on_after(bound), contextlib.suppress(SandboxError):
                    # A guest that fails us now is retired, and the next call says so. Here the
                    # block's own exception is what its user must see.
                    async with guest_failures(self._vm, "the end of a run"):
                        await self._records.send_json({request: True})
                    async for _ in self:  # what it prints from now on is nobody's
                        pass
            if not self._over:
                self._vm.retire("a run in it did not end when it was killed")


@asynccontextmanager
async def open_run(
    vm: Machine, request: dict[str, object], *, grace: float, patience: float
) -> AsyncGenerator[RunEvents]:
    """Start a run and yield its events; leaving the block early stops the run and keeps the VM."""
    records = RecordStream(open_stream(vm, {"service": "code"}, "the run"))
    events = RunEvents(vm, records)
    try:
        await events.send_request(request)
        try:
            yield events
        finally:
            await events.stop(grace, patience)  # noqa: ASYNC102 - it shields itself, and is bounded
    finally:
        records.stream.close()


async def collect(events: RunEvents, limit: int) -> RunResult:
    """Gather a run's output, at most *limit* bytes of each stream.

    Raises:
      OutputLimitError: if the run prints more; leaving the run's block stops it.

    """
    output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    async for event in events:
        if isinstance(event, RunResult):
            return attrs.evolve(event, stdout_bytes=bytes(output["stdout"]), stderr_bytes=bytes(output["stderr"]))
        buffer = output[event.stream]
        buffer += event.data
        if len(buffer) > limit:
            del buffer[limit:]
            raise OutputLimitError(
                f"the run printed more than {limit} bytes to {event.stream} and was stopped; "
                "raise SandboxConfig.max_output_bytes, write to a file, or use Sandbox.stream()",
                stdout_bytes=bytes(output["stdout"]),
                stderr_bytes=bytes(output["stderr"]),
            )
    raise AssertionError("a run's last event is its result")
