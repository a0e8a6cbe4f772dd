"""Processes in the guest, with the vocabulary of `trio.run_process` and `trio.Process`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal, final

import attrs
import trio

from .._errors import DeadlinePassedError, GuestProtocolError, OutcomeUnknownError, SandboxError
from .._nurseries import open_services
from .._refused import refuse
from .._results import ProcessUsage
from ..wire import JSON, ChannelStream, RecordStream
from ._deadline import TravellingDeadline, let_deadline_pass
from ._failures import STREAM_GONE, Machine, guest_failures, open_stream
from ._messages import Exited, Failed, Message, Started, parse_message
from ._terminal import GuestTerminal, Terminal, check_size

Stderr = Literal["pipe", "stdout", "discard"]

#: Signals that may wait for the guest to take them. Nobody has a reason to queue more.
SIGNAL_BACKLOG = 64


@final
class GuestInput(trio.abc.SendStream):
    """The standard input of a process in the guest. When you close it, the process reads end of file."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*; a process that does not read makes this wait. Cancelled: some of it may have been sent.

        Raises:
          trio.BrokenResourceError: if the process closed its standard input or has ended.
          trio.ClosedResourceError: if this end was closed.

        """
        if self._closed:
            raise trio.ClosedResourceError("this standard input was closed")
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` might not block."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close it. The process reads what was sent, then end of file."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            await self._stream.send_eof()
        except STREAM_GONE:
            # The process need not have waited for the end of its input.
            await trio.lowlevel.checkpoint()


@final
class GuestOutput(trio.abc.ReceiveStream):
    """The output of a process in the guest. If you don't read it, the process waits."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for some output; ``b""`` at its end. Cancelled: nothing is lost.

        Raises:
          trio.BrokenResourceError: if the virtual machine ended.
          trio.ClosedResourceError: if this end was closed.

        """
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Stop reading; if the process prints more, it gets a broken pipe."""
        await self._stream.aclose()


@final
class GuestProcess:
    """A process in the guest, like `trio.Process` on the host. Made by `Sandbox.open_process`."""

    def __init__(
        self,
        vm: Machine,
        args: list[str],
        pid: int,
        stdin: GuestInput | None,
        stdout: GuestOutput | None,
        stderr: GuestOutput | None,
        stdio: GuestTerminal | None,
    ) -> None:
        self.args = args
        """The argv it was started with."""
        self.pid = pid
        """Its process id, as processes in the guest see it."""
        self.stdin = stdin
        """What it reads on its standard input; None if it was opened with ``stdin=False`` or with a terminal."""
        self.stdout = stdout
        """What it prints to standard output; None if it was opened with ``stdout=False`` or with a terminal."""
        self.stderr = stderr
        """What it prints to standard error; None unless it was opened with ``stderr="pipe"``, or with a terminal."""
        self.stdio = stdio
        """The terminal of a process that was opened with one; the other three are None then."""
        self._resize: dict[str, object] | None = None  # that is still to be sent
        self._vm = vm
        self._expired = False
        self._oom = False
        self._usage: ProcessUsage | None = None
        self._returncode: int | None = None
        self._failure: SandboxError | None = None
        self._ended = trio.Event()
        self._send_request, self._requests = trio.open_memory_channel[dict[str, object]](SIGNAL_BACKLOG)

    def __repr__(self) -> str:
        state = f"running with PID {self.pid}" if self._returncode is None else f"exited with status {self._returncode}"
        if self._oom:
            state += " (out of memory)"
        return f"<trio_sandbox.GuestProcess {self.args!r}: {state}>"

    @property
    def returncode(self) -> int | None:
        """None while it runs; then its exit status, or ``-n`` if signal *n* ended it."""
        return self._returncode

    @property
    def oom(self) -> bool:
        """Whether the process was killed because the guest had no memory left; False while it runs."""
        return self._oom

    @property
    def usage(self) -> ProcessUsage | None:
        """What the process has used; None while it runs, and if its end is not known."""
        return self._usage

    @refuse("timeout")
    async def wait(self) -> int:
        """Wait until the process ends, then return `returncode`. Cancelled: the process keeps running.

        Its output may still be on the way: read `stdout` and `stderr` to their ends for all of it.

        Raises:
          DeadlinePassedError: if the guest killed it at the deadline of its block, and you have another.
          OutcomeUnknownError: if the virtual machine ended first.
          GuestProtocolError: if the guest broke the protocol.

        """
        await self._ended.wait()
        if self._expired:
            await let_deadline_pass()
            raise DeadlinePassedError(
                f"the guest killed the process {self.args[0]!r} by itself, at the deadline it knew: the event loop was "
                "blocked. Let it turn (an await is enough) between moving a deadline and long work without any await"
            )
        if self._returncode is None:
            assert self._failure is not None
            raise self._failure
        return self._returncode

    def send_signal(self, sig: signal.Signals | int) -> None:
        """Send signal *sig* to the process; nothing happens if it has ended. Does not wait for the guest.

        Raises:
          ValueError: if *sig* is not the number of a signal.
          trio.BusyResourceError: if the guest has not taken the last 64 signals yet.

        """
        self._request({"signal": int(signal.Signals(sig))})

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, to the process and to every descendant of it."""
        self._request({"kill": True})

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the process's terminal; its foreground processes get SIGWINCH. Does not wait for the guest.

        If the guest has not taken several sizes yet, the last one counts.

        Raises:
          TypeError, ValueError: if these are not numbers from 1 to 65535, or the process has no terminal.
          trio.BusyResourceError: if the guest has not taken the last 64 signals yet.

        """
        check_size(rows, "rows")
        check_size(columns, "columns")
        if self.stdio is None:
            raise ValueError("this process has no terminal; open it with pty=True")
        if self._resize is None:
            resize: dict[str, object] = {"resize": [rows, columns]}
            self._request(resize)
            self._resize = resize
        else:
            self._resize["resize"] = [rows, columns]

    def _request(self, request: dict[str, object]) -> None:
        if self._ended.is_set():
            return
        try:
            self._send_request.send_nowait(request)
        except trio.WouldBlock:
            raise trio.BusyResourceError(f"the guest has not taken the last {SIGNAL_BACKLOG} signals yet") from None
        except trio.BrokenResourceError:
            pass  # the process's end is on its way to us

    async def _serve(  # noqa: ASYNC910 - a nursery is one checkpoint at least
        self, records: RecordStream, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Read the process's end, and send requests until then."""
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_requests, records)
                async with guest_failures(self._vm, f"the process {self.args[0]!r}"):
                    message = await receive_message(records)
                    if not isinstance(message, Exited):
                        raise GuestProtocolError(f"the guest said {message!r} of a running process")
                self._returncode, self._expired, self._oom = message.status, message.expired, message.oom
                self._usage = ProcessUsage(
                    cpu_seconds=message.used.microseconds / 1e6,
                    peak_memory_bytes=message.used.peak_kib * 1024,
                    disk_written_bytes=max(0, message.used.blocks_written) * 512,
                )
                nursery.cancel_scope.cancel(reason="the process is over")
        except* SandboxError as group:
            # One failure, one route: whoever waits gets it, the nursery does not.
            (self._failure,) = [exc for exc in group.exceptions if isinstance(exc, SandboxError)][:1]
        finally:
            if self._returncode is None and self._failure is None:
                self._failure = OutcomeUnknownError(f"the block of {self.args[0]!r} was left before its end was known")
            self._ended.set()
            self._requests.close()

    async def _serve_requests(self, records: RecordStream) -> None:
        try:
            async for request in self._requests:
                if request is self._resize:
                    self._resize = None
                await records.send_json(request)
        except STREAM_GONE:  # the reader of `records` says why
            await trio.lowlevel.checkpoint()

    async def _leave(self, records: RecordStream, patience: float) -> None:  # noqa: ASYNC910 - sending is a checkpoint
        """Let go on what the process has left behind. It is over, and it was opened with *leaves*."""
        # Not cancellable: who is cancelled wants it all to end, and nobody could say whether it does.
        with trio.move_on_after(patience, shield=True), contextlib.suppress(*STREAM_GONE):
            await records.send_json({"leave": True}, end=True)

    async def _end(self, patience: float) -> None:
        """Make sure that it is over; a guest that does not acknowledge the kill loses its VM."""
        if self._ended.is_set():
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        with trio.move_on_after(patience, shield=True):
            with contextlib.suppress(trio.BrokenResourceError):  # its end is on its way to us
                await self._send_request.send({"kill": True})
            await self._ended.wait()
        if not self._ended.is_set():
            _retire(self._vm, self.args[0])


async def _take_back(  # noqa: ASYNC910 - sending is a checkpoint
    vm: Machine, records: RecordStream, program: str, patience: float
) -> None:
    """Make sure that a process whose start was cancelled is over, started or not; as `GuestProcess._end`."""
    with trio.move_on_after(patience, shield=True) as waiting, contextlib.suppress(*STREAM_GONE):
        await records.send_json({"kill": True})
        while await records.stream.receive_some():
            pass
    if waiting.cancelled_caught:
        _retire(vm, program)


def _retire(vm: Machine, program: str) -> None:
    vm.retire(f"the process {program!r} in it did not end when it was killed")


async def receive_message(records: RecordStream) -> Message:
    """Wait for the next message of a process's control stream."""
    record = await records.receive()
    if record is None:
        raise GuestProtocolError("the guest ended a process's control stream without saying how the process ended")
    tag, payload = record
    if tag != JSON:
        raise GuestProtocolError(f"the guest sent a record of the unknown kind {tag!r} on a control stream")
    return parse_message(payload)


@asynccontextmanager
async def open_process(
    vm: Machine,
    request: dict[str, object],
    *,
    stdin: bool,
    stdout: bool,
    stderr: Stderr,
    terminal: Terminal | None,
    patience: float,
    leaves: bool,
) -> AsyncGenerator[GuestProcess]:
    """Start a process and yield it; leaving the block ends it and all its descendants.

    With *leaves*, what it started and left behind goes on, if it is over and no exception comes out of the block.
    Its output ends a moment after it does, then, whoever else holds that.
    """
    argv = request["argv"]
    assert isinstance(argv, list)
    args = [str(argument) for argument in argv]  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    what = f"the process {args[0]!r}"
    async with contextlib.AsyncExitStack() as stack:

        def open_pipe() -> ChannelStream:
            stream = open_stream(vm, {"service": "pipe"}, what)
            stack.callback(stream.close)
            return stream

        piped = terminal is None
        pipes = {
            "stdin": open_pipe() if piped and stdin else None,
            "stdout": open_pipe() if piped and stdout else None,
            "stderr": open_pipe() if piped and stderr == "pipe" else None,
        }
        ids: dict[str, object] = {name: stream.id for name, stream in pipes.items() if stream is not None}
        if piped and stderr == "stdout":
            ids["stderr"] = "stdout"
        stdio = None
        if terminal is not None:
            stdio = open_pipe()
            ids["terminal"] = {"stdio": stdio.id, **attrs.asdict(terminal)}
        records = RecordStream(open_stream(vm, {"service": "process"}, what))
        stack.callback(records.stream.close)  # the guest kills whatever is left of the process when it sees this
        sent = False
        try:
            async with guest_failures(vm, f"the start of {args[0]!r}"):
                deadline = TravellingDeadline()
                more: dict[str, object] = {"leaves": True} if leaves else {}
                await records.send_json({**request, **ids, **more, **deadline.fields()})
                sent = True
                message = await receive_message(records)
                if isinstance(message, Failed):
                    raise OSError(message.errno, message.reason, message.filename)
                if not isinstance(message, Started):
                    raise GuestProtocolError(f"the guest answered the start of a process with {message!r}")
            process = GuestProcess(
                vm,
                args,
                message.pid,
                None if pipes["stdin"] is None else GuestInput(pipes["stdin"]),
                None if pipes["stdout"] is None else GuestOutput(pipes["stdout"]),
                None if pipes["stderr"] is None else GuestOutput(pipes["stderr"]),
                None if stdio is None else GuestTerminal(stdio),
            )
            services = await stack.enter_async_context(open_services("Sandbox.open_process()"))
            await services.start(process._serve, records)  # pyright: ignore[reportPrivateUsage]
        except (OSError, SandboxError):
            raise  # it is known what became of it
        except BaseException:  # cancelled, which may be a group
            if sent:  # or it could still begin, and do something
                await _take_back(vm, records, args[0], patience)  # noqa: ASYNC102, ASYNC120 - shielded and bounded by itself
            raise
        try:
            async with deadline.followed("Sandbox.open_process()", process._send_request.send):  # pyright: ignore[reportPrivateUsage]
                yield process
            if leaves and process.returncode is not None:
                await process._leave(records, patience)  # pyright: ignore[reportPrivateUsage]
        finally:
            # It shields itself, and takes no longer than *patience*.
            await process._end(patience)  # noqa: ASYNC102 # pyright: ignore[reportPrivateUsage]
