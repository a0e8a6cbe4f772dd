"""A sandbox whose guest is a script of the test's: no virtual machine, and no code that is run."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Literal, final

import attrs
import trio
import trio.testing

from .._config import SandboxConfig, Timeouts
from .._display import Display
from .._entries import open_block
from .._errors import VmDiedError
from .._nurseries import hide_nursery, open_services
from ..network import Gateway, HostResolver
from ..qemu import Accelerator, Confinement, QemuBuild
from ..sandbox import Sandbox, SandboxNetwork, Slot
from ..wire import (
    DISPLAY,
    JSON,
    STDERR,
    STDOUT,
    Channel,
    ChannelStream,
    PeerGoneError,
    RecordStream,
    Role,
    StreamHandler,
    open_channel,
)

#: What a record can carry; longer output goes in pieces.
_PIECE = 2**15
_PID = 100
_ACCELERATOR = Accelerator(
    name="tcg",
    hardware=False,
    reason="a scripted sandbox, in which nothing runs",
    qemu=QemuBuild(path="", size=0, modified_ns=0, version=(0, 0)),
    confinement=Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False),
)


@final
@attrs.frozen(kw_only=True)
class Call:
    """What the program under test asks of its sandbox."""

    kind: Literal["run", "process"]
    """Code for the interpreter, or a process."""
    code: str = ""
    """The source text of a run."""
    language: str = ""
    """The language of a run."""
    argv: tuple[str, ...] = ()
    """The program of a process and its arguments."""
    stdin: bytes = b""
    """All of its standard input: the call is answered when that has ended."""
    env: Mapping[str, str] | None = None
    """The environment that was asked for; None if none was."""
    cwd: str | None = None
    """The directory that was asked for; None if none was."""
    functions: Mapping[str, Callable[..., Awaitable[Any]]] = attrs.field(
        factory=dict[str, Callable[..., Awaitable[Any]]], eq=False
    )
    """What a run may call of the program under test: ``await call.functions["search"]("x", limit=3)``, as code in a guest would.
    One call at a time. What the function raises is a `RuntimeError` with what a guest is told of it."""


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


@final
@attrs.frozen(kw_only=True)
class Answer:
    """How a run or a process ends, and what it prints before."""

    stdout: bytes = attrs.field(default=b"", converter=_bytes)
    """What it prints to standard output; text is encoded as UTF-8."""
    stderr: bytes = attrs.field(default=b"", converter=_bytes)
    """What it prints to standard error, likewise."""
    exit_code: int = 0
    """As in `RunResult.exit_code`; of a process as in `GuestProcess.returncode`."""
    value: str | None = None
    """`RunResult.value`; of runs only."""
    displays: tuple[Display, ...] = ()
    """`RunResult.displays`; of runs only."""
    cpu_seconds: float = 0.0
    """`RunResult.cpu_seconds`, or that of `GuestProcess.usage`, to the microsecond."""
    peak_memory_bytes: int = 0
    """The same of memory, to the KiB; 0 is None to a `RunResult`."""
    disk_written_bytes: int = 0
    """The same of what it wrote, to 512 bytes."""
    state_kept: bool = True
    """Whether the interpreter lives on; if not, the next run says that it was restarted."""
    oom: bool = False
    """`RunResult.oom` and `GuestProcess.oom`: it is killed because the guest has no memory left. Say 137 for the
    `exit_code` of a run then, -9 for that of a process, and False for `state_kept`."""


Answerer = Callable[[Call], Awaitable[Answer]]


def _used(answer: Answer) -> list[int]:
    return [round(answer.cpu_seconds * 1e6), answer.peak_memory_bytes // 1024, answer.disk_written_bytes // 512]


@attrs.define(eq=False)
class _Machine:
    """What `Sandbox` needs of a virtual machine."""

    guest: Channel
    hang_up: Callable[[], object]
    failure: Exception | None = None
    closed: bool = False
    pid: int = _PID
    accelerator: Accelerator = _ACCELERATOR
    ended: trio.Event = attrs.field(factory=trio.Event)
    guest_handler: StreamHandler | None = None

    def retire(self, reason: str) -> None:
        self.end(VmDiedError(reason))

    def end(self, failure: Exception) -> None:
        if self.failure is None:
            self.failure = failure
            self.ended.set()
            self.hang_up()

    async def wait_ended(self) -> Exception | None:
        await self.ended.wait()
        return self.failure

    def console(self) -> str:
        return ""

    def qmp_log(self) -> str:
        return ""


class _Guest:
    """The other end of the guest channel: the services of the agent, as far as they can be scripted."""

    def __init__(self, answer: Answerer) -> None:
        self.machine: _Machine | None = None
        self.failure: Exception | None = None
        """What went wrong in the script itself."""
        self._answer = answer
        self._pipes: dict[object, ChannelStream] = {}
        self._restarted = False

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        service = header.get("service")
        if service == "pipe":
            self._pipes[stream.id] = stream
            await trio.sleep_forever()  # the stream is open for as long as its handler runs
        await trio.lowlevel.checkpoint()  # the pipes of a request are opened before it, in tasks of their own
        if service == "code":
            await self._code(RecordStream(stream), header)
        elif service == "process":
            await self._process(RecordStream(stream))
        elif service == "network":
            await stream.send_all(b"\0\0", end=True)  # switched, as far as anybody asks for it
        else:
            stream.reset("a scripted sandbox answers runs and processes only")

    async def _code(self, records: RecordStream, header: dict[str, Any]) -> None:
        request = header.get("request") or await _receive(records)  # a short one comes with the header
        call = Call(
            kind="run",
            code=request["code"],
            language=request["language"],
            functions=self._functions(request.get("functions")),
        )
        answer = await self._ask(records, request, call)
        restarted, self._restarted = self._restarted, not answer.state_kept
        for tag, data in ((STDOUT, answer.stdout), (STDERR, answer.stderr)):
            for piece in _pieces(data):
                await records.send(tag, piece)
        for display in answer.displays:
            shown = {"mime": display.mime, "size": len(display.data), "item": display.item}
            await records.send_json({"display": shown})
            for piece in _pieces(display.data):
                await records.send(DISPLAY, piece)
        end: dict[str, object] = {"exit_code": answer.exit_code, "value": answer.value, "state_kept": answer.state_kept}
        end |= {"restarted": restarted, "oom": answer.oom, "used": _used(answer)}
        await records.send_json({"finished": end}, end=True)

    async def _process(self, records: RecordStream) -> None:
        request = await _receive(records)
        await records.send_json({"started": _PID})
        answer = await self._ask(records, request, Call(kind="process", argv=tuple(request["argv"])))
        stdout = answer.stdout + answer.stderr if request.get("stderr") == "stdout" else answer.stdout
        for name, data in (("stdout", stdout), ("stderr", answer.stderr)):
            if (pipe := self._pipes.get(request.get(name))) is not None:
                with contextlib.suppress(trio.BrokenResourceError):  # nobody reads it any more
                    await pipe.send_all(data)
                    await pipe.send_eof()
        exited = {"status": answer.exit_code, "oom": answer.oom, "used": _used(answer)}
        await records.send_json({"exited": exited}, end=True)

    async def _ask(self, records: RecordStream, request: dict[str, Any], call: Call) -> Answer:
        """Have the test answer, unless the host stops the call first."""
        answers: list[Answer] = []

        async def listen() -> None:
            message = await _receive(records)
            while message and not message.keys() & {"interrupt", "kill", "signal"}:
                message = await _receive(records)
            number = message.get("signal", signal.SIGKILL if "kill" in message else signal.SIGINT)
            code = 128 + number if call.kind == "run" else -number
            answers.append(Answer(exit_code=code, state_kept=number == signal.SIGINT))
            nursery.cancel_scope.cancel(reason="stopped by the host")

        with hide_nursery("open_scripted_sandbox()"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                stdin = await self._input(request)
                call = attrs.evolve(call, stdin=stdin, env=request.get("env"), cwd=request.get("cwd"))
                try:
                    answers.append(await self._answer(call))
                except Exception as exc:  # noqa: BLE001 - it comes out of the sandbox's block
                    if not isinstance(exc, VmDiedError):
                        self.failure = exc
                    assert self.machine is not None
                    self.machine.end(exc)
                    await trio.sleep_forever()  # until the end of the channel is noticed
                nursery.cancel_scope.cancel(reason="answered")
        return answers[0]

    def _functions(self, request: dict[str, Any] | None) -> dict[str, Callable[..., Awaitable[Any]]]:
        if request is None:
            return {}
        calls = _Calls(self._pipes[request["stream"]])
        return {name: partial(calls.call, name) for name in request["names"]}

    async def _input(self, request: dict[str, Any]) -> bytes:
        pipe = self._pipes.get(request.get("stdin"))
        data = b""
        if pipe is not None:
            with contextlib.suppress(trio.BrokenResourceError):
                async for piece in pipe:
                    data += piece
        return data  # noqa: ASYNC910 (a task of the guest's)


@final
class _Calls:
    """Calls of the functions that one run may call, one after the other."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self._turn = trio.Lock()

    async def call(self, name: str, /, *arguments: object, **options: object) -> Any:
        async with self._turn:
            await self._stream.send_all(f"0 {name} {json.dumps([arguments, options])}\n".encode())
            line = b""
            while not line.endswith(b"\n"):
                data = await self._stream.receive_some()
                if not data:
                    raise RuntimeError("the run that it was for is over")
                line += data
        _, kind, text = line.split(b" ", 2)
        if kind == b"e":
            raise RuntimeError(json.loads(text))
        return json.loads(text)


def _pieces(data: bytes) -> list[bytes]:
    return [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]


async def _receive(records: RecordStream) -> dict[str, Any]:
    """Return the host's next message; an empty one if it has gone."""
    record = await records.receive()
    if record is None or record[0] != JSON:
        return {}
    message: dict[str, Any] = json.loads(record[1])
    return message


@open_block
async def open_scripted_sandbox(answer: Answerer, *, config: SandboxConfig | None = None) -> AsyncGenerator[Sandbox]:
    """Open a real `Sandbox` with no virtual machine behind it: *answer* says how each run and each process ends.

    Limits on output, turns of the interpreter, cancellation and errors are those of the real thing, as is everything
    between your program and the guest. It costs a millisecond, and works with `trio.testing.MockClock`. Blocks of
    `Sandbox.network` can be entered, and nothing connects. Files, terminals and tunnels are not scripted: they need a guest.

    Args:
      answer: Called in a task of its own with each `Call`. Cancelling the caller cancels it, as it stops code in a
        guest: with 130 for a run that goes on with its variables. If it raises `VmDiedError`, the virtual machine is
        "gone", and callers get what they get then. Anything else that it raises comes out of the block.
      config: As for `open_sandbox`; its limit on output is kept.

    """
    ours, theirs = trio.testing.memory_stream_pair()
    guest = _Guest(answer)

    async def run_guest(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC910 (the suppressed error is a checkpoint)
        task_status.started()
        with contextlib.suppress(PeerGoneError):  # cancelled before we had said hello
            async with open_channel(theirs, role=Role.GUEST, hello={"version": 1}, handler=guest.serve) as channel:
                await channel.wait_closed()

    def hang_up() -> None:
        theirs.send_stream.close()
        theirs.receive_stream.close()

    try:
        async with open_services("open_scripted_sandbox()") as services:
            await services.start(run_guest)
            async with open_channel(ours, role=Role.HOST, hello={"version": 1}) as channel:
                guest.machine = machine = _Machine(channel, hang_up)
                config, timeouts, slot = config or SandboxConfig(), Timeouts(), Slot(machine)
                gateway = Gateway(config.network, HostResolver(), connect_timeout=timeouts.connect)
                network = SandboxNetwork(slot, gateway, timeouts.kill)
                try:
                    yield Sandbox(slot, "python", config, timeouts, network=network)
                finally:
                    machine.closed = True
                    machine.ended.set()
    finally:
        if guest.failure is not None:
            raise guest.failure  # whatever the program under test made of it
