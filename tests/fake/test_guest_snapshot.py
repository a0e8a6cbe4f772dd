"""The agent's part of a snapshot: whether it goes on in the machine that it was in, or in one that was made from it.

The agent is a process of its own, as it stops all of its thread. There is one of it, so that it goes on in one way or the other.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox.wire import ChannelStream, PortStream, Role, StreamResetError, open_channel

from ._agent import Host

MARKER, TOKEN = bytes(range(16)), bytes(range(16, 32))

_AGENT = """
import sys, trio
from trio_sandbox.guest.agent import agent
from trio_sandbox.guest.agent.children import Children
from trio_sandbox.guest.agent.local import start_local_spawner
from trio_sandbox.guest.agent.snapshot import Machine

async def main():
    machine = Machine(int(sys.argv[1]), None)
    await agent.serve(machine.open_port(), Children(spawner), machine=machine)

spawner, process = start_local_spawner()
with spawner:
    trio.run(main)
process.wait()
"""


@asynccontextmanager
async def open_machine() -> AsyncGenerator[socket.socket]:
    """Run an agent on one end of a socket pair, as on a port, and yield the other."""
    async with open_process() as (sock, _):
        yield sock


@asynccontextmanager
async def open_process() -> AsyncGenerator[tuple[socket.socket, int]]:
    host, port = socket.socketpair()
    with host:
        with port:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-c", _AGENT, str(port.fileno())], pass_fds=[port.fileno()]
            )
        try:
            yield host, process.pid
        finally:
            process.kill()
            with trio.move_on_after(10, shield=True):
                await process.wait()


@asynccontextmanager
async def open_conversation(sock: socket.socket, marker: bytes | None = None) -> AsyncGenerator[Host]:
    stream = PortStream(os.dup(sock.fileno()))
    if marker is not None:
        await stream.call(marker)
    async with open_channel(stream, role=Role.HOST, hello={"entropy": "00" * 32}) as channel:
        yield Host(channel)


async def read_all(stream: ChannelStream) -> bytes:
    answer = b""
    while data := await stream.receive_some():
        answer += data
    return answer


async def ask_for_snapshot(host: Host, marker: str) -> bytes:
    async with host.channel.open_stream({"service": "snapshot", "marker": marker}) as stream:
        return await read_all(stream)


@asynccontextmanager
async def hold_still(host: Host) -> AsyncGenerator[ChannelStream]:
    """Have the agent ready to be saved for a block."""
    header = {"service": "snapshot", "marker": MARKER.hex(), "token": TOKEN.hex()}
    async with host.channel.open_stream(header) as stream:
        assert await stream.receive_some() == b"frozen"
        yield stream


async def go_on(stream: ChannelStream) -> None:
    await stream.send_all(TOKEN)
    assert await stream.receive_some() == b""


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


_PATIENT = "import time; x = 1; print('runs', flush=True); time.sleep(1000)"
_STUBBORN = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {_PATIENT}"


@pytest.mark.parametrize(("code", "killed"), [(_PATIENT, False), (_STUBBORN, True)], ids=["heeds", "ignores"])
async def test_in_the_copy_a_run_is_interrupted(code: str, killed: bool) -> None:
    async with open_process() as (sock, agent):
        async with (
            open_conversation(sock) as host,
            host.open_run(code) as run,
            host.open_process(["sleep", "1000"]) as process,
        ):
            await run.until(b"runs")
            pid = await process.started()
            async with hold_still(host):
                # A real host is silent from now on. This one gives all its streams up.
                await wait_until(lambda: _is_in_poll(agent))
                os.kill(pid, 0)
        async with open_conversation(sock, MARKER) as host:
            ran = await host.run("print(globals().get('x'))")
            assert (ran.stdout, ran.restarted) == (f"{None if killed else 1}\n", killed)
            status, _ = await host.run_process(["sh", "-c", f"while kill -0 {pid} 2>/dev/null; do sleep 0.01; done"])
            assert status == 0


def _is_in_poll(pid: int) -> bool:
    """Whether it waits in poll(2), which Trio does not use."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("7", "73", "271")


async def test_the_machine_itself_goes_on_as_if_nothing_had_been() -> None:
    lines = "".join(f"{number}\n" for number in range(20_000))
    async with open_machine() as sock, open_conversation(sock) as host:
        await host.run("x = 1")
        async with (
            host.open_run("for number in range(20_000): print(number)") as run,
            host.open_process(["cat"], stdin=True, stdout=True) as cat,
        ):
            await cat.started()
            assert cat.stdin is not None
            assert cat.stdout is not None
            await run.until(b"0\n")
            for number in range(3):
                async with hold_still(host) as stream:
                    # What is said while nobody listens is heard afterwards, and in order.
                    await cat.stdin.send_all(b"%d" % number)
                    await go_on(stream)
                assert await cat.stdout.receive_some() == b"%d" % number
            ran = await run.finish()
            assert (ran.stdout == lines, ran.exit_code) == (True, 0)
        assert (await host.run("print(x)")).stdout == "1\n"


async def test_a_new_request_while_the_machine_holds_still() -> None:
    async with open_machine() as sock, open_conversation(sock) as host:
        async with hold_still(host) as stream, host.open_run("print('late')") as run:
            await go_on(stream)
            assert (await run.finish()).stdout == "late\n"


async def test_two_snapshots_at_once() -> None:
    header = {"service": "snapshot", "marker": MARKER.hex(), "token": TOKEN.hex()}
    async with (
        open_machine() as sock,
        open_conversation(sock) as host,
        host.channel.open_stream(header) as first,
        host.channel.open_stream(header) as second,
    ):
        # Which of them is served first is the scheduler's choice.
        answers: list[str] = []

        async def use(stream: ChannelStream) -> None:
            try:
                answers.append(str(await stream.receive_some()))
                await go_on(stream)
            except StreamResetError as exc:
                answers.append(exc.reason)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, first)
            nursery.start_soon(use, second)
        assert answers == ["b'frozen'", "b'frozen'"], "one after the other"


async def test_a_host_that_thinks_better_of_it() -> None:
    """It sends the token before it is asked, or gives the stream up: nobody is held up for ever."""
    header = {"service": "snapshot", "marker": MARKER.hex(), "token": TOKEN.hex()}
    async with open_machine() as sock, open_conversation(sock) as host:
        async with host.channel.open_stream(header) as stream:
            await stream.send_all(TOKEN)
            assert await read_all(stream) in (b"", b"frozen")
        stream = host.channel.open_stream(header)
        await stream.send_and_close(TOKEN)
        assert (await host.run("print(1)")).stdout == "1\n"
        # The one that was given up may still be writing to the disk, and is waited for.
        async with hold_still(host) as stream:
            await go_on(stream)


async def test_a_host_that_is_gone_while_the_machine_holds_still() -> None:
    async with open_machine() as sock, open_conversation(sock) as host, hold_still(host):
        sock.shutdown(socket.SHUT_RDWR)
        await host.channel.wait_closed()


@pytest.mark.parametrize(
    "header", [{"marker": ""}, {"marker": "zz"}, {"marker": "00" * 15}, {"marker": "00" * 16, "token": ""}]
)
async def test_markers_that_are_none(header: dict[str, str]) -> None:
    async with open_machine() as sock, open_conversation(sock) as host:
        with pytest.raises(StreamResetError, match="at least 16 bytes"):
            async with host.channel.open_stream({"service": "snapshot", **header}) as stream:
                await read_all(stream)
        assert (await host.run("print(1)")).stdout == "1\n"
