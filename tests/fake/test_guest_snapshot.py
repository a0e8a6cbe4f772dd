"""The agent's part of a snapshot: one conversation ends, and the next begins where a marker says so."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio

from trio_sandbox.guest import agent
from trio_sandbox.guest.children import Children
from trio_sandbox.guest.local import start_local_spawner
from trio_sandbox.guest.snapshot import Machine
from trio_sandbox.wire import PortStream, Role, StreamResetError, open_channel

from ._agent import Host

MARKER = bytes(range(16))


@asynccontextmanager
async def open_machine() -> AsyncGenerator[socket.socket]:
    """Run an agent on one end of a socket pair, as on a port, and yield the other."""
    spawner, process = start_local_spawner()
    host, port = socket.socketpair()
    try:
        with spawner, host, port:
            machine = Machine(port.fileno(), None)
            async with trio.open_nursery() as nursery:
                children = Children(spawner)

                async def serve() -> None:
                    await agent.serve(machine.open_port(), children, machine=machine)

                nursery.start_soon(serve)  # noqa: ASYNC113 - what is sent before it runs waits in the socket
                yield host
                nursery.cancel_scope.cancel()
    finally:
        process.wait()


@asynccontextmanager
async def open_conversation(sock: socket.socket, marker: bytes | None = None) -> AsyncGenerator[Host]:
    stream = PortStream(os.dup(sock.fileno()))
    if marker is not None:
        await stream.call(marker)
    async with open_channel(stream, role=Role.HOST, hello={"entropy": "00" * 32}) as channel:
        yield Host(channel)


async def ask_for_snapshot(host: Host, marker: str) -> bytes:
    answer = b""
    async with host.channel.open_stream({"service": "snapshot", "marker": marker}) as stream:
        while data := await stream.receive_some():
            answer += data
    return answer


async def test_a_new_conversation_with_the_old_interpreter_that_draws_new_numbers() -> None:
    async with open_machine() as sock:
        async with open_conversation(sock) as host:
            await host.run("import random, tempfile, uuid, ssl\nx = 1; random.seed(1); state = random.getstate()")
            assert (await host.run("print(random.getstate() == state)")).stdout == "True\n"
            assert await ask_for_snapshot(host, MARKER.hex()) == b"frozen"
        for count in (1, 2):
            # What the host says before the marker is left from the old conversation, and not heard.
            sock.send(b"\xff" * 1000)
            async with open_conversation(sock, MARKER * count) as host:
                ran = await host.run("print(x, random.getstate() == state); state = random.getstate()")
                assert (ran.stdout, ran.restarted) == ("1 False\n", False)
                assert await ask_for_snapshot(host, (MARKER * (count + 1)).hex()) == b"frozen"


async def test_whatever_the_old_conversation_had_is_over() -> None:
    async with open_machine() as sock:
        async with (
            open_conversation(sock) as host,
            host.open_run("import time; print('runs', flush=True); time.sleep(1000)") as run,
        ):
            await run.until(b"runs")
            assert await ask_for_snapshot(host, MARKER.hex()) == b"frozen"
        async with open_conversation(sock, MARKER) as host:
            ran = await host.run("print(1)")
            assert (ran.stdout, ran.restarted) == ("1\n", True)


@pytest.mark.parametrize("marker", ["", "zz", "00" * 15])
async def test_markers_that_are_none(marker: str) -> None:
    async with open_machine() as sock, open_conversation(sock) as host:
        with pytest.raises(StreamResetError, match="at least 16 bytes"):
            await ask_for_snapshot(host, marker)
        assert (await host.run("print(1)")).stdout == "1\n"
