"""A real agent in this process, with a real spawner and real interpreters, and the host's side of the channel to it."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import attrs
import pytest
import trio

from tests._leaks import HANG_LIMIT
from trio_sandbox.guest.agent.interpreter import Interpreter
from trio_sandbox.guest.agent.local import open_local_agent
from trio_sandbox.guest.agent.run import Run
from trio_sandbox.wire import DISPLAY, JSON, STDERR, STDOUT, Channel, ChannelStream, RecordStream, Role, open_channel

#: Bytes of one display that the host takes.
DISPLAY_LIMIT = 2**20


@attrs.frozen
class Ran:
    """What a run came to."""

    stdout: str
    stderr: str
    exit_code: int
    restarted: bool
    state_kept: bool
    value: str | None = attrs.field(default=None, eq=False)
    shown: list[tuple[str, bytes, int]] = attrs.field(factory=list[tuple[str, bytes, int]], eq=False)
    """MIME type, bytes, and which object they are of."""


@attrs.define(eq=False)
class OpenRun:
    """A run that is underway."""

    records: RecordStream
    output: dict[bytes, bytearray] = attrs.field(factory=lambda: {STDOUT: bytearray(), STDERR: bytearray()})
    arrivals: list[tuple[bytes, bytes]] = attrs.field(factory=list[tuple[bytes, bytes]])
    shown: list[tuple[str, bytes, int]] = attrs.field(factory=list[tuple[str, bytes, int]])
    refused: list[tuple[str, int]] = attrs.field(factory=list[tuple[str, int]])
    """What was to be shown and is larger than the limit."""
    end: dict[str, Any] | None = None

    async def receive(self) -> bool:
        """Take one record; False after the last."""
        record = await self.records.receive()
        if record is None:
            return False
        assert self.end is None, "nothing may come after the end"
        tag, payload = record
        if tag == JSON:
            message = json.loads(payload)
            if "display" in message:
                await self._receive_display(**message["display"])
            else:
                self.end = message
        else:
            self.output[tag] += payload
            self.arrivals.append(record)
        return True

    async def _receive_display(self, mime: str, size: int, item: int) -> None:
        if size > DISPLAY_LIMIT:
            self.refused.append((mime, size))
            return
        data = b""
        while len(data) < size:
            record = await self.records.receive()
            assert record is not None
            assert record[0] == DISPLAY
            data += record[1]
        assert len(data) == size
        self.shown.append((mime, data, item))
        self.arrivals.append((DISPLAY, data))

    async def until(self, text: bytes) -> None:
        """Wait until the run has printed *text* to stdout."""
        while text not in self.output[STDOUT]:
            assert await self.receive(), f"it ended without {text!r}: {self}"

    async def finish(self) -> Ran:
        """Wait for its end."""
        while await self.receive():
            pass
        assert self.end is not None
        finished = self.end["finished"]
        return Ran(
            self.output[STDOUT].decode("utf-8", "replace"),
            self.output[STDERR].decode("utf-8", "replace"),
            finished["exit_code"],
            finished["restarted"],
            finished["state_kept"],
            finished["value"],
            self.shown,
        )

    async def failure(self) -> dict[str, Any]:
        """Wait for it to be refused."""
        while await self.receive():
            pass
        assert self.end is not None
        failed: dict[str, Any] = self.end["failed"]
        return failed

    async def interrupt(self) -> None:
        # The guest closes the stream of a run that is over.
        with contextlib.suppress(trio.BrokenResourceError):
            await self.records.send_json({"interrupt": True})

    async def kill(self) -> None:
        await self.records.send_json({"kill": True})


@attrs.define(eq=False)
class OpenProcess:
    """A process that was asked for."""

    records: RecordStream
    stdin: ChannelStream | None
    stdout: ChannelStream | None
    stderr: ChannelStream | None

    async def message(self) -> dict[str, Any]:
        """Wait for the next thing that is said of it."""
        message = await self.records.receive_json()
        assert message is not None
        return message

    async def started(self) -> int:
        pid: int = (await self.message())["started"]
        return pid

    async def exited(self) -> int:
        status: int = (await self.message())["exited"]["status"]
        assert await self.records.receive() is None
        return status


@attrs.frozen
class Host:
    """The host's side."""

    channel: Channel

    @asynccontextmanager
    async def open_run(self, code: str, /, **more: object) -> AsyncGenerator[OpenRun]:
        request: dict[str, object] = {
            "language": "python",
            "code": code,
            "stdin": None,
            "env": None,
            "cwd": None,
            "display_limit": DISPLAY_LIMIT,
            **more,
        }
        short = len(code) < 1000
        header = {"service": "code", "request": request} if short else {"service": "code"}
        async with RecordStream(self.channel.open_stream(header)) as records:
            if not short:
                await records.send_json(request)
            yield OpenRun(records)

    async def run(self, code: str, **request: object) -> Ran:
        async with self.open_run(code, **request) as run:
            return await run.finish()

    def open_pipe(self) -> ChannelStream:
        return self.channel.open_stream({"service": "pipe"})

    @asynccontextmanager
    async def open_process(
        self,
        argv: list[str],
        /,
        *,
        stdin: object = False,
        stdout: object = False,
        stderr: object = False,
        **request: object,
    ) -> AsyncGenerator[OpenProcess]:
        with contextlib.ExitStack() as stack:
            streams: list[ChannelStream | None] = []
            ids: dict[str, object] = {}
            for name, wanted in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
                stream = self.open_pipe() if wanted is True else None
                if stream is not None:
                    stack.callback(stream.close)
                streams.append(stream)
                ids[name] = stream.id if stream is not None else None if wanted is False else wanted
            records = RecordStream(self.channel.open_stream({"service": "process"}))
            stack.callback(records.stream.close)
            await records.send_json({"argv": argv, "env": None, "cwd": None, "user": None, **ids, **request})
            yield OpenProcess(records, *streams)

    async def run_process(self, argv: list[str], /, **request: object) -> tuple[int, bytes]:
        """Run a process to its end; return its status and what it printed to stdout and stderr."""
        async with self.open_process(argv, stdout=True, stderr="stdout", **request) as process:
            await process.started()
            output = await read_all(process.stdout)
            return await process.exited(), output


async def send_for_ever(stream: ChannelStream) -> NoReturn:
    while True:
        await stream.send_all(b"x" * 65536)


async def read_all(stream: ChannelStream | None) -> bytes:
    assert stream is not None
    output = bytearray()
    async for data in stream:
        output += data
    return bytes(output)


NO_IMPORTS = "there is no Node.js here that has imports in scripts, 20.12 or later; tests/qemu has one"


def node_can_import() -> bool:
    """Whether code for this machine's own Node.js can import modules; Debian 12's can't."""
    if shutil.which("node") is None:
        return False
    command = ["node", "--print", "'USE_MAIN_CONTEXT_DEFAULT_LOADER' in (vm.constants ?? {})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "true\n"


@asynccontextmanager
async def open_agent(
    *, root: str | None = None, cgroup: str | None = None, user: int | None = None
) -> AsyncGenerator[Host]:
    """Run an agent and connect to it; bounded, for a test that hangs to fail."""
    with trio.fail_after(HANG_LIMIT):
        async with (
            open_local_agent(root=root, cgroup=cgroup, user=user) as stream,
            open_channel(stream, role=Role.HOST, hello={}) as channel,
        ):
            yield Host(channel)


def let_short_runs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every agent wait a moment whenever it has handed code over: short runs are over then, as with one processor."""
    hand_over = Interpreter._hand_over

    def hand_over_and_wait(self: Interpreter, run: Run) -> bool:
        accepted = hand_over(self, run)
        # What it was told before must not count.
        while accepted and select.select([self._control], [], [], 1)[0]:
            if self._control.recv(1, socket.MSG_PEEK) != b"R":
                break
            self._receive()
        return accepted

    monkeypatch.setattr(Interpreter, "_hand_over", hand_over_and_wait)
