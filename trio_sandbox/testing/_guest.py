"""The other end of the guest channel: the services of the agent, as far as they can be scripted."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, final

import attrs
import trio

from .._errors import VmDiedError
from .._nurseries import hide_nursery
from ..wire import DISPLAY, JSON, STDERR, STDOUT, Channel, ChannelStream, RecordStream
from ._calls import Answer, Answerer, Call
from ._files import FileSession
from ._tree import ScriptedFiles

#: What a record can carry; longer output goes in pieces.
_PIECE: Final = 2**15
_PID: Final = 100
#: Bytes of the answer to a wish for a connection; see `network.Gateway`.
_CONNECT_ANSWER: Final = 2


@final
class ScriptedGuest:
    """A guest whose runs and processes end as *answer* says.

    Args:
      answer: Called with each `Call`.
      failures: Where exceptions go that are wrong in the script itself.
      before: Called with what is about to be done to a file; may raise.
      state: What it remembers.
      files: What is on its disk.

    """

    def __init__(
        self,
        answer: Answerer,
        failures: list[Exception],
        before: Callable[[str], object],
        state: dict[str, Any],
        files: ScriptedFiles,
    ) -> None:
        self.channel: Channel | None = None
        """The channel to the host, once there is one."""
        self.end: Callable[[Exception], object] = failures.append
        """Ends the machine that it is in."""
        self._answer = answer
        self._failures = failures
        self._before = before
        self._state = state
        self._files = files
        self._pipes: dict[object, ChannelStream] = {}
        self._restarted = False

    def copy(self) -> ScriptedGuest:
        """Return another that remembers the same."""
        state, files = copy.deepcopy((self._state, self._files))
        guest = ScriptedGuest(self._answer, self._failures, self._before, state, files)
        guest._restarted = self._restarted
        return guest

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
        elif service == "file":
            await self._file(stream)
        elif service == "network":
            await stream.send_all(b"\0\0", end=True)  # switched, as far as anybody asks for it
        else:
            stream.reset("a scripted sandbox has runs, processes and files only")

    async def _file(self, stream: ChannelStream) -> None:  # noqa: ASYNC910 (a task of the guest's)
        try:
            with contextlib.suppress(trio.BrokenResourceError):  # the host gave it up
                await FileSession(RecordStream(stream), self._files, self._before).serve()
                await stream.send_eof()
        except Exception as exc:  # noqa: BLE001 - as of runs
            self._fail(exc)

    async def _connect(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        """What `Call.connect` does."""
        await trio.lowlevel.checkpoint()
        assert self.channel is not None
        stream = self.channel.open_stream({"service": "connect", "host": host, "port": port})
        answer = b""
        try:
            while len(answer) < _CONNECT_ANSWER and (data := await stream.receive_some(_CONNECT_ANSWER - len(answer))):
                answer += data
        except trio.BrokenResourceError:
            answer = b""  # there is no network
        except BaseException:
            stream.close()
            raise
        number = int.from_bytes(answer, "big") if len(answer) == _CONNECT_ANSWER else errno.ENETUNREACH
        if number:
            stream.close()
            raise OSError(number, f"{os.strerror(number)}: {host}:{port}")
        return stream

    def _fail(self, error: Exception) -> None:
        """End the machine because of what the script has raised; unless it says that the VM died, that comes out of the sandbox's block."""
        if not isinstance(error, VmDiedError):
            self._failures.append(error)
        self.end(error)

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
                call = attrs.evolve(
                    call,
                    stdin=stdin,
                    env=request.get("env"),
                    cwd=request.get("cwd"),
                    connect=self._connect,
                    state=self._state,
                    files=self._files,
                )
                try:
                    answers.append(_check_answer(call, await self._answer(call)))
                except Exception as exc:  # noqa: BLE001 - it comes out of the sandbox's block
                    self._fail(exc)
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


def _check_answer(call: Call, answer: Answer) -> Answer:
    if not isinstance(answer, Answer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"the script must return an Answer for {call.kind} {call.code or call.argv!r:.100}, not {answer!r:.100}"
        )
    if call.kind == "run" and answer.exit_code < 0:
        raise ValueError(
            f"the `exit_code` of a run must be from 0 to 255, not {answer.exit_code}: after signal n it is 128 + n"
        )
    return answer


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


def _used(answer: Answer) -> list[int]:
    return [round(answer.cpu_seconds * 1e6), answer.peak_memory_bytes // 1024, answer.disk_written_bytes // 512]


def _pieces(data: bytes) -> list[bytes]:
    return [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]


async def _receive(records: RecordStream) -> dict[str, Any]:
    """Return the host's next message; an empty one if it has gone."""
    record = await records.receive()
    if record is None or record[0] != JSON:
        return {}
    message: dict[str, Any] = json.loads(record[1])
    return message
