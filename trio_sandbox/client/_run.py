"""One run of code in a sandbox's interpreter, from the request to the result."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal, final

import attrs
import trio

from .._display import Display
from .._errors import (
    DeadlinePassedError,
    GuestProtocolError,
    OutcomeUnknownError,
    OutputLimitError,
    RunRefusedError,
    SandboxError,
    directory_refused,
)
from .._nurseries import open_services
from .._quote import quote_guest
from .._results import RunResult
from ..constants import MAXIMUM_DISPLAYS
from ..image import images_with
from ..wire import DISPLAY, JSON, STDERR, STDOUT, RecordStream, encode_json
from ._deadline import TravellingDeadline, let_deadline_pass
from ._failures import STREAM_GONE, Machine, guest_failures, open_stream
from ._functions import HostFunctions
from ._messages import Failed, Finished, Shown, input_bytes, parse_message
from ._output import Outcome, RunTrace
from ._process import GuestInput

#: Bytes of a request that fit into a stream's header beside its own fields; the wire's limit is 4096.
_HEADER_ROOM = 4000


@final
@attrs.frozen
class OutputChunk:
    """Some bytes that a run printed."""

    stream: Literal["stdout", "stderr"]
    """Which of its streams it printed them to."""
    data: bytes
    """The bytes; a chunk may end in the middle of a line or of a character."""


@final
class Gathered:
    """All that a run prints and shows, for who wants it with the result."""

    def __init__(self) -> None:
        self.stdout: bytearray = bytearray()
        self.stderr: bytearray = bytearray()
        self.displays: list[Display] = []


@final
class RunEvents:
    """The events of a run in order of arrival: `OutputChunk` and `Display`, and one `RunResult` as the last.

    An async iterator. You need not close it: its block does.
    """

    stdin: GuestInput | None = None
    """The stream that the code reads as its standard input, with ``stdin=True``; close it, and the code reads the end of the file."""

    def __init__(
        self, vm: Machine, records: RecordStream, trace: RunTrace, display_limit: int, memory_mib: int
    ) -> None:
        self._vm = vm
        self._records = records
        self._trace = trace
        self._display_limit = display_limit
        self._memory_mib = memory_mib
        self._gathered: Gathered | None = None
        self._ended: tuple[Finished, float] | None = None  # how and when, where a last word of ours comes before that
        self._display: tuple[Shown, bytearray] | None = None  # some of whose bytes are still to come
        self._sent_at = trace.sent_at = trio.current_time()
        self._over = False

    def __aiter__(self) -> RunEvents:
        return self

    async def __anext__(self) -> OutputChunk | Display | RunResult:
        """Wait for the next event. Cancelled: nothing is lost. The run stops when the block exits."""
        if self._over:
            raise StopAsyncIteration
        try:
            return await self._next()
        except DeadlinePassedError as exc:
            self._trace.add_note(exc)
            await let_deadline_pass()  # noqa: ASYNC120 - to be cancelled is better than this error
            raise
        except (OutcomeUnknownError, GuestProtocolError) as exc:
            self._trace.add_note(exc)
            raise

    async def _next(self) -> OutputChunk | Display | RunResult:
        if self._ended is not None:
            await trio.lowlevel.checkpoint()
            self._over = True
            return self._make_result(*self._ended)
        try:
            async with guest_failures(self._vm, "a run"):
                event = None
                while event is None:
                    event = self._event(await self._records.receive(at_once=self._gathered is not None))
        except SandboxError as exc:
            self._over = not isinstance(exc, OutputLimitError)
            if self._over:
                self._trace.end(_outcome(exc))
            raise
        self._over = isinstance(event, RunResult)
        return event

    def _event(self, record: tuple[bytes, bytes] | None) -> OutputChunk | Display | RunResult | None:
        if record is None:
            raise GuestProtocolError("the guest ended a run without saying how")
        tag, payload = record
        if self._display is not None:
            return self._rest_of_display(*self._display, tag, payload)
        if tag == STDOUT:
            self._trace.note_output()
            self._trace.stdout.add(payload)
            return OutputChunk("stdout", payload)
        if tag == STDERR:
            self._trace.note_output()
            self._trace.stderr.add(payload)
            return OutputChunk("stderr", payload)
        if tag != JSON:
            raise GuestProtocolError(f"the guest sent a record of the unknown kind {tag!r} during a run")
        message = parse_message(payload)
        if isinstance(message, Shown):
            return self._start_of_display(message)
        if isinstance(message, Failed):
            raise self._refusal(message)
        if not isinstance(message, Finished):
            raise GuestProtocolError(f"the guest answered a run with {message!r}")
        self._trace.exit_code = message.exit_code
        if message.expired:
            raise DeadlinePassedError(
                "the guest stopped the run by itself, at the deadline it knew: the event loop was blocked. "
                "Let it turn (an await is enough) between moving a deadline and long work without any await"
            )
        return self._end(message)

    def _end(self, message: Finished) -> OutputChunk | RunResult:
        """Return the result, or the last word of a run that was killed for want of memory, which the result follows."""
        self._trace.end("ended")
        now = trio.current_time()
        if not message.oom:
            return self._make_result(message, now)
        self._ended = message, now
        word = out_of_memory_line("code", self._memory_mib)
        self._trace.stderr.add(word)
        return OutputChunk("stderr", word)

    def _make_result(self, message: Finished, ended_at: float) -> RunResult:
        output = self._gathered or self._trace
        return RunResult(
            exit_code=message.exit_code,
            stdout_bytes=bytes(output.stdout),
            stderr_bytes=bytes(output.stderr),
            value=message.value,
            displays=() if self._gathered is None else tuple(self._gathered.displays),
            duration=ended_at - self._sent_at,
            timings=self._trace.timings(self._sent_at, ended_at),
            restarted=message.restarted,
            state_kept=message.state_kept,
            accelerator=self._vm.accelerator.name,
            oom=message.oom,
            cpu_seconds=message.used.microseconds / 1e6,
            peak_memory_bytes=message.used.peak_kib * 1024 or None,
            disk_written_bytes=None if message.used.blocks_written < 0 else message.used.blocks_written * 512,
            streamed=self._gathered is None,
        )

    def _refusal(self, failed: Failed) -> RunRefusedError:
        reason = failed.reason
        if failed.errno and failed.filename and failed.filename.startswith("/"):
            return directory_refused(failed.errno, os.strerror(failed.errno), failed.filename)
        if failed.errno == errno.ENOENT and failed.filename:
            names = ", ".join(images_with(self._trace.language)) or "none"
            reason += f": {quote_guest(failed.filename)}. Images that have it: {names}"
        elif failed.filename:
            reason += f": {failed.filename!r}"
        return RunRefusedError(reason, errno=failed.errno)

    def _start_of_display(self, shown: Shown) -> Display | None:
        self._trace.note_output()
        if shown.size > self._display_limit:
            # The guest knows the limit, and sends nothing of it.
            raise OutputLimitError(
                f"the run showed {shown.mime} of {shown.size} bytes, of which {self._display_limit} are allowed, "
                "and was stopped; raise SandboxConfig.max_output_bytes, or write to a file"
            )
        if shown.size:
            self._display = shown, bytearray()
            return None
        return Display(shown.mime, b"", shown.item)

    def _rest_of_display(self, shown: Shown, data: bytearray, tag: bytes, payload: bytes) -> Display | None:
        if tag != DISPLAY:
            raise GuestProtocolError(f"the guest sent a record of the kind {tag!r} in the middle of a display")
        if not payload or len(data) + len(payload) > shown.size:
            raise GuestProtocolError(f"the guest sent other than the {shown.size} bytes of a display")
        data += payload
        if len(data) < shown.size:
            return None
        self._display = None
        return Display(shown.mime, bytes(data), shown.item)

    async def _send_request(self, request: dict[str, object]) -> None:
        """Hand the run to the guest. Cancelled: the guest may have it; closing the records ends it there."""
        try:
            async with guest_failures(self._vm, "a run"):
                await self._records.send_json(request)
        except BaseException:
            self._over = True  # a record cut short leaves nothing to talk on
            self._trace.end("stopped")
            raise

    async def _stop(self, grace: float, patience: float) -> None:
        """End the run if it goes on: INT, then KILL, then the whole VM.

        Takes at most *grace* + *patience* seconds, whatever the guest does and whoever is cancelled.
        """
        if self._over:
            return  # noqa: ASYNC910 - its end was waited for
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            for request, bound in (("interrupt", grace), ("kill", patience)):
                if self._over:
                    return
                self._trace.end("stopped")
                with trio.move_on_after(bound), contextlib.suppress(SandboxError):  # noqa: ASYNC912 - the loop waits
                    # A run that is over takes nothing any more; that it is over can be read.
                    with contextlib.suppress(*STREAM_GONE):
                        await self._records.send_json({request: True})
                    # What it prints and shows from now on is nobody's. A guest that fails us now is retired, and the
                    # next call says so: here the block's own exception is what its user must see.
                    while not self._over:
                        with contextlib.suppress(OutputLimitError):
                            await self._next()
            if not self._over:
                self._vm.retire("a run in it did not end when it was killed")


def _outcome(error: SandboxError) -> Outcome:
    """Say what became of a run that ended in an error."""
    if isinstance(error, DeadlinePassedError):
        return "stopped"
    return "refused" if isinstance(error, RunRefusedError) else "broken"


def out_of_memory_line(what: str, memory_mib: int) -> bytes:
    """Return the last line of the standard error of what was killed for want of memory."""
    return (
        f"trio-sandbox: the {what} was killed because the sandbox is out of memory (memory_mib={memory_mib})\n".encode()
    )


Input = bytes | bytearray | memoryview | bool


def takes_input(stdin: Input) -> bool:
    """Whether a run with that *stdin* reads anything but end of file; `TypeError` for what can't be read."""
    if isinstance(stdin, bool):
        return stdin
    return input_bytes(stdin).nbytes > 0


@asynccontextmanager
async def open_run(
    vm: Machine,
    request: dict[str, object],
    trace: RunTrace,
    *,
    stdin: Input = b"",
    functions: HostFunctions | None = None,
    display_limit: int,
    memory_mib: int,
    grace: float,
    patience: float,
) -> AsyncGenerator[RunEvents]:
    """Start a run and yield its events; leaving the block early stops the run and keeps the VM.

    Args:
      vm: Where to run it.
      request: What `code_request` made.
      trace: Where the run notes what becomes of it.
      stdin: What the code reads, or True for what is sent to `RunEvents.stdin`.
      functions: What it may call; its calls are cancelled before the run is stopped.
      display_limit: Bytes that one display may have.
      memory_mib: The machine's memory, for a run that is killed for want of it.
      grace: Seconds between INT and KILL.
      patience: Seconds that the guest has to acknowledge the KILL.

    """
    request = {**request, "display_limit": display_limit}
    async with contextlib.AsyncExitStack() as stack:
        pipe = None
        if takes_input(stdin):
            pipe = open_stream(vm, {"service": "pipe"}, "the run")
            stack.callback(pipe.close)
            request["stdin"] = pipe.id
        serving: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if functions is not None:
            calls = open_stream(vm, {"service": "pipe"}, "the run")
            stack.callback(calls.close)
            request["functions"] = {"stream": calls.id, "names": functions.names}
            serving = functions.served(calls)
        deadline = TravellingDeadline()
        request |= deadline.fields(grace)
        # What fits travels in the stream's own frame: a turn of the guest's scheduler less for short code.
        fits = len(encode_json(request)) <= _HEADER_ROOM
        header = {"service": "code", "request": request} if fits else {"service": "code"}
        records = RecordStream(open_stream(vm, header, "the run", flush=fits), joined=STDOUT + STDERR)
        stack.callback(records.stream.close)
        trace.outcome = "running"
        events = RunEvents(vm, records, trace, display_limit, memory_mib)
        try:
            if not fits:
                await events._send_request(request)  # pyright: ignore[reportPrivateUsage]
            if pipe is not None and isinstance(stdin, bool):
                events.stdin = GuestInput(pipe)
            elif pipe is not None:
                services = await stack.enter_async_context(open_services("Sandbox.stream()"))
                await services.start(_feed, GuestInput(pipe), stdin)
            # Only one task may send on the records at a time: the deadline's is gone when `stop` sends.
            async with serving, deadline.followed("Sandbox.stream()", records.send_json):
                yield events
        finally:
            # From the moment that the guest may have the request: without being told to stop it would kill the interpreter.
            await events._stop(grace, patience)  # noqa: ASYNC102 - it shields itself, and is bounded # pyright: ignore[reportPrivateUsage]


async def _feed(  # noqa: ASYNC910 - sending is a checkpoint
    stdin: GuestInput, data: bytes | bytearray | memoryview, *, task_status: trio.TaskStatus[None]
) -> None:
    task_status.started()
    # Code that does not want its input is nobody's error, and a machine that is gone shows elsewhere.
    with contextlib.suppress(*STREAM_GONE):
        await stdin.send_all(data)
        await stdin.aclose()


async def collect(events: RunEvents, limit: int) -> RunResult:
    """Gather what a run prints and shows, at most *limit* bytes of each stream and of all displays.

    Raises:
      OutputLimitError: if there is more; leaving the run's block stops it.

    """
    gathered = events._gathered = Gathered()  # pyright: ignore[reportPrivateUsage]
    shown = 0
    try:
        async for event in events:
            if isinstance(event, RunResult):
                return event
            if isinstance(event, OutputChunk):
                buffer = gathered.stdout if event.stream == "stdout" else gathered.stderr
                buffer += event.data
                if len(buffer) > limit and events._ended is None:  # the last word is ours # pyright: ignore[reportPrivateUsage]
                    del buffer[limit:]
                    raise _too_much(f"printed more than {limit} bytes to {event.stream}")
            else:
                shown += len(event.data)
                if shown > limit:
                    raise _too_much(f"showed more than {limit} bytes")
                if len(gathered.displays) == MAXIMUM_DISPLAYS:
                    raise _too_much(f"showed more than {MAXIMUM_DISPLAYS} objects or forms of them")
                gathered.displays.append(event)
    except OutputLimitError as exc:
        events._trace.add_note(exc)  # pyright: ignore[reportPrivateUsage]
        exc.stdout_bytes, exc.stderr_bytes = bytes(gathered.stdout), bytes(gathered.stderr)
        exc.displays = tuple(gathered.displays)
        raise
    raise AssertionError("a run's last event is its result")


def _too_much(what: str) -> OutputLimitError:
    return OutputLimitError(
        f"the run {what} and was stopped; raise SandboxConfig.max_output_bytes, write to a file, or use Sandbox.stream()"
    )
