"""TCP connections into the guest: a real agent in this process, whose loopback interface is ours, or a scripted one."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import attrs
import h11
import httpcore
import pytest
import trio
import trio.testing
import trio_websocket

from tests._httpcore import SandboxBackend
from tests._leaks import nothing_left
from trio_sandbox import GuestProtocolError, OutcomeUnknownError, Sandbox, SandboxClosedError
from trio_sandbox.guest.agent import carried, tunnels
from trio_sandbox.sandbox import _tunnels
from trio_sandbox.wire import RecordStream

from ._guest import FakeMachine, open_fake_sandbox
from ._sandbox import open_local_sandbox


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


@attrs.define(eq=False)
class Server:
    """A server "in the guest", for the test to accept each connection by hand."""

    listener: trio.SocketListener

    @property
    def port(self) -> int:
        port: int = self.listener.socket.getsockname()[1]
        return port

    async def connect(self, sandbox: Sandbox) -> tuple[trio.abc.HalfCloseableStream, trio.SocketStream]:
        stream = await sandbox.open_tcp_stream(self.port)
        return stream, await self.listener.accept()


@asynccontextmanager
async def open_server(host: str = "127.0.0.1", *, port: int = 0, backlog: int = 100) -> AsyncGenerator[Server]:
    (listener,) = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    async with listener:
        yield Server(listener)


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    async with open_server() as server:
        yield server


def reset(stream: trio.SocketStream) -> None:
    """Close a connection as a program does that crashes with data unread."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([data async for data in stream])


async def no_streams(machine: FakeMachine) -> None:
    """Wait until both sides are done with every stream; the test's own limit ends this."""
    while machine.guest.statistics().open_streams:
        await machine.guest.ping()  # what needs no hurry travels with what does


# --- open_tcp_stream ---


async def test_it_is_a_stream_by_trios_own_measure(sandbox: Sandbox, server: Server) -> None:
    await trio.testing.check_half_closeable_stream(partial(server.connect, sandbox), None)


async def test_each_direction_ends_by_itself(sandbox: Sandbox, server: Server) -> None:
    ours, theirs = await server.connect(sandbox)
    async with ours, theirs:
        await ours.send_all(b"question")
        await ours.send_eof()
        assert await read_all(theirs) == b"question"
        await theirs.send_all(b"answer")
        await theirs.send_eof()
        assert await read_all(ours) == b"answer"


async def test_much_data_both_ways_at_once(sandbox: Sandbox, server: Server) -> None:
    ours, theirs = await server.connect(sandbox)
    data = os.urandom(3_000_000)

    async def send(stream: trio.abc.HalfCloseableStream) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(send, ours)
        nursery.start_soon(send, theirs)
        assert await read_all(ours) == data
        assert await read_all(theirs) == data


async def test_nobody_listens(sandbox: Sandbox) -> None:
    port = unused_port()
    with pytest.raises(ConnectionRefusedError, match=str(port)) as raised:
        await sandbox.open_tcp_stream(port)
    assert raised.value.errno == errno.ECONNREFUSED


async def test_a_server_that_listens_at_ipv6_only(sandbox: Sandbox) -> None:
    async with open_server("::1") as server:
        ours, theirs = await server.connect(sandbox)
        async with ours, theirs:
            await theirs.send_all(b"six")
            assert await ours.receive_some() == b"six"


@pytest.mark.parametrize(
    ("port", "error"), [(0, ValueError), (65536, ValueError), (-1, ValueError), ("80", TypeError), (True, TypeError)]
)
async def test_what_is_no_port(sandbox: Sandbox, port: int, error: type[Exception]) -> None:
    for refuse in (sandbox.open_tcp_stream, sandbox.wait_port, sandbox.forward_port):
        with pytest.raises(error, match="port"):
            await refuse(port)


async def test_the_guest_checks_ports_as_well() -> None:
    async with open_local_sandbox() as (_, machine):
        for port in (0, 65536, "80", None):
            async with machine.guest.open_stream({"service": "tcp", "port": port}) as stream:
                with pytest.raises(trio.BrokenResourceError, match="a port is a number"):
                    await stream.receive_some()


async def test_a_stalled_reader_makes_its_server_wait_and_nobody_else(server: Server) -> None:
    async with open_local_sandbox() as (sandbox, machine):
        stalled, flooding = await server.connect(sandbox)
        async with stalled, flooding:
            with trio.CancelScope() as flood:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(flooding.send_all, bytes(50_000_000))
                    for _ in range(20):
                        ours, theirs = await server.connect(sandbox)
                        async with ours, theirs:
                            await ours.send_all(b"ping")
                            assert await theirs.receive_some() == b"ping"
                            await theirs.send_all(b"pong")
                            assert await ours.receive_some() == b"pong"
                    flood.cancel()
        assert machine.guest.statistics().bytes_received < 2_000_000


async def test_a_server_that_does_not_read_makes_its_client_wait(sandbox: Sandbox, server: Server) -> None:
    ours, theirs = await server.connect(sandbox)
    data = os.urandom(20_000_000)
    async with ours, theirs, trio.open_nursery() as nursery:
        sent = trio.Event()

        async def send() -> None:
            await ours.send_all(data)
            sent.set()
            await ours.send_eof()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not sent.is_set()
        assert await read_all(theirs) == data


async def test_a_connection_that_the_server_resets(sandbox: Sandbox, server: Server) -> None:
    ours, theirs = await server.connect(sandbox)
    async with ours:
        reset(theirs)
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            await ours.receive_some()


async def test_what_a_server_said_before_it_left_is_read_though_it_takes_no_more(
    sandbox: Sandbox, server: Server
) -> None:
    ours, theirs = await server.connect(sandbox)
    async with ours:
        await theirs.send_all(b"x" * 100_000)
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await ours.send_all(bytes(100_000))
        # The end had come as well, so nothing of it is missing.
        assert await read_all(ours) == b"x" * 100_000


async def test_a_part_is_not_taken_for_the_whole(sandbox: Sandbox, server: Server) -> None:
    ours, theirs = await server.connect(sandbox)
    async with theirs:
        with trio.move_on_after(0.05):
            await ours.send_all(bytes(50_000_000))
        await ours.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(theirs)


async def test_closing_delivers_what_was_sent_and_then_ends_the_connection(sandbox: Sandbox, server: Server) -> None:
    ours, theirs = await server.connect(sandbox)
    async with theirs:
        await ours.send_all(b"x" * 100_000)
        await ours.aclose()
        assert await read_all(theirs) == b"x" * 100_000
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await theirs.send_all(bytes(100_000))


async def test_a_closed_stream_does_not_wait_for_ever_for_a_server_to_read(
    sandbox: Sandbox, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_connect = tunnels._connect

    async def connect(port: int) -> trio.socket.SocketType:
        sock = await real_connect(port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(tunnels, "_connect", connect)
    monkeypatch.setattr(carried, "_LINGER", 0.05)
    server.listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ours, theirs = await server.connect(sandbox)
    async with theirs:
        await ours.send_all(
            bytes(200_000)
        )  # more than the kernel keeps for this server, less than the channel's credit
        await ours.aclose()  # which cuts nothing off
        await trio.testing.wait_all_tasks_blocked(0.1)
        with pytest.raises(trio.BrokenResourceError):
            await read_all(theirs)


async def test_many_at_once(sandbox: Sandbox, server: Server) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data[::-1])

    async def ask(number: int) -> None:
        async with await sandbox.open_tcp_stream(server.port) as stream:
            await stream.send_all(b"%06d" % number)
            answer = b""
            while len(answer) < 6:
                answer += await stream.receive_some()
            assert answer == (b"%06d" % number)[::-1]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [server.listener])
        async with trio.open_nursery() as clients:
            for number in range(200):
                clients.start_soon(ask, number)
        nursery.cancel_scope.cancel()


@pytest.fixture
def many_descriptors() -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
async def test_more_streams_than_there_may_be(sandbox: Sandbox) -> None:
    async with open_server(backlog=2000) as server:
        streams: list[trio.abc.HalfCloseableStream] = []
        with pytest.raises(OSError, match="close some") as raised:
            while True:
                streams.append(await sandbox.open_tcp_stream(server.port))
        assert raised.value.errno == errno.EMFILE
        assert len(streams) > 100
        for stream in streams:
            await stream.aclose()


async def test_streams_of_a_sandbox_that_ends(server: Server) -> None:
    async with open_local_sandbox() as (sandbox, machine):
        ours, theirs = await server.connect(sandbox)
        machine.retire("the test says so")
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()
        async with theirs:
            with pytest.raises(trio.BrokenResourceError):
                await read_all(theirs)
        with pytest.raises(SandboxClosedError):
            await sandbox.open_tcp_stream(server.port)
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()


# --- What users put on top ---


async def serve_http(stream: trio.SocketStream) -> None:
    """Answer requests with their own body."""
    connection = h11.Connection(h11.SERVER)
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some())
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            response = h11.Response(status_code=200, headers=[("Content-Length", str(len(body)))])
            for part in (response, h11.Data(body), h11.EndOfMessage()):
                await stream.send_all(connection.send(part) or b"")
            connection.start_next_cycle()
            body = b""
        elif isinstance(event, h11.ConnectionClosed):
            return


async def test_http(sandbox: Sandbox, server: Server) -> None:
    body = os.urandom(1_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve_http, [server.listener])
        async with httpcore.AsyncConnectionPool(network_backend=SandboxBackend(sandbox)) as pool:
            for _ in range(3):  # the second takes the first one's connection
                response = await pool.request("POST", f"http://localhost:{server.port}/", content=body)
                assert (response.status, response.content) == (200, body)
            assert len(pool.connections) == 1
        nursery.cancel_scope.cancel()


async def test_a_websocket(sandbox: Sandbox) -> None:
    async def echo(request: trio_websocket.WebSocketRequest) -> None:
        connection = await request.accept()
        while True:
            try:
                await connection.send_message(await connection.get_message())
            except trio_websocket.ConnectionClosed:
                return

    wrap = cast("Callable[..., Awaitable[trio_websocket.WebSocketConnection]]", trio_websocket.wrap_client_stream)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(trio_websocket.serve_websocket, echo, "127.0.0.1", 0, None))
        stream = await sandbox.open_tcp_stream(server.port)
        client = await wrap(nursery, stream, "localhost", "/")
        await client.send_message("x" * 100_000)
        assert await client.get_message() == "x" * 100_000
        await client.aclose()
        nursery.cancel_scope.cancel()


# --- wait_port ---


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_waiting_for_a_server(sandbox: Sandbox, host: str) -> None:
    port = unused_port()
    waited = trio.Event()

    async def wait() -> None:
        await sandbox.wait_port(port)
        waited.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not waited.is_set()
        async with open_server(host, port=port) as server:
            await waited.wait()
            with trio.move_on_after(0) as nobody:  # it was looked for, not connected to
                await server.listener.accept()
            assert nobody.cancelled_caught


async def test_a_server_elsewhere_is_not_waited_for(sandbox: Sandbox) -> None:
    async with open_server("127.0.0.2") as server:
        with trio.move_on_after(0.1) as patience:
            await sandbox.wait_port(server.port)
        assert patience.cancelled_caught


async def test_a_wait_that_is_given_up_ends_in_the_guest() -> None:
    async with open_local_sandbox() as (sandbox, machine):
        with trio.move_on_after(0.02):
            await sandbox.wait_port(unused_port())
        await no_streams(machine)


# --- forward_port ---


async def test_forwarding(sandbox: Sandbox, server: Server) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(sandbox.forward_port, server.port)
        client = await trio.open_tcp_stream("127.0.0.1", port)
        theirs = await server.listener.accept()
        async with client, theirs:
            await client.send_all(b"question")
            await client.send_eof()
            assert await read_all(theirs) == b"question"
            await theirs.send_all(b"answer" * 100_000)
            await theirs.send_eof()
            assert await read_all(client) == b"answer" * 100_000
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_forwarding_from_a_port_that_is_asked_for(sandbox: Sandbox, server: Server) -> None:
    wanted = unused_port()
    async with trio.open_nursery() as nursery:
        assert await nursery.start(sandbox.forward_port, server.port, wanted) == wanted
        with pytest.raises(OSError, match="in use"):
            await sandbox.forward_port(server.port, wanted)
        nursery.cancel_scope.cancel()


async def test_forwarding_listens_at_the_loopback_interface_only(sandbox: Sandbox, server: Server) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(sandbox.forward_port, server.port)
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()
            if f":{port:04X}" in line.split()[1] and line.split()[3] == "0A"
        ]
        assert listening == [f"0100007F:{port:04X}"]
        nursery.cancel_scope.cancel()


async def test_forwarding_to_nobody_resets_the_client(sandbox: Sandbox) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(sandbox.forward_port, unused_port())
        for _ in range(3):
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                with pytest.raises(trio.BrokenResourceError):
                    await client.receive_some()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("client_breaks", [True, False])
async def test_a_reset_of_one_side_resets_the_other(sandbox: Sandbox, server: Server, client_breaks: bool) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(sandbox.forward_port, server.port)
        client = await trio.open_tcp_stream("127.0.0.1", port)
        theirs = await server.listener.accept()
        await client.send_all(b"x")
        assert await theirs.receive_some() == b"x"
        broken, other = (client, theirs) if client_breaks else (theirs, client)
        reset(broken)
        async with other:
            with pytest.raises(trio.BrokenResourceError):
                await other.receive_some()
        nursery.cancel_scope.cancel()


async def test_forwarding_that_is_cancelled_resets_its_connections(sandbox: Sandbox, server: Server) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(sandbox.forward_port, server.port)
        client = await trio.open_tcp_stream("127.0.0.1", port)
        theirs = await server.listener.accept()
        await client.send_all(b"x")
        assert await theirs.receive_some() == b"x"
        nursery.cancel_scope.cancel()
    for stream in (client, theirs):
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()


async def test_forwarding_takes_no_more_than_it_may(
    sandbox: Sandbox, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tunnels, "FORWARD_LIMIT", 2)
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(sandbox.forward_port, server.port)
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        servers = [await server.listener.accept() for _ in range(2)]
        with trio.move_on_after(0.05) as patience:
            await server.listener.accept()
        assert patience.cancelled_caught
        # Both, since nobody says which of the two streams at the server's end is which client's.
        for stream in clients[:2] + servers:
            await stream.aclose()
        servers.append(await server.listener.accept())
        for stream in clients + servers:
            await stream.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("retired", [True, False])
async def test_forwarding_ends_with_its_sandbox(server: Server, retired: bool) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(SandboxClosedError, match=f"port {server.port}")):
        async with trio.open_nursery() as nursery:
            async with open_local_sandbox() as (sandbox, machine):
                await nursery.start(sandbox.forward_port, server.port)
                if retired:
                    machine.retire("the test says so")
                    await trio.sleep_forever()
            await trio.sleep_forever()


async def test_forwarding_leaves_nothing(server: Server) -> None:
    async with open_local_sandbox() as (sandbox, _):

        async def forward() -> None:
            async with trio.open_nursery() as nursery:
                port: int = await nursery.start(sandbox.forward_port, server.port)
                async with await trio.open_tcp_stream("127.0.0.1", port):
                    async with await server.listener.accept():
                        nursery.cancel_scope.cancel()

        with nothing_left():
            await forward()
            await trio.testing.wait_all_tasks_blocked(0.02)


# --- A guest that breaks the protocol ---


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "without an answer"),
        (b"\x00", "without an answer"),
        (b"\xff\xff", "not an error number"),
    ],
)
@pytest.mark.parametrize("call", [Sandbox.open_tcp_stream, Sandbox.wait_port])
async def test_garbage_for_an_answer(
    answer: bytes, message: str, call: Callable[[Sandbox, int], Awaitable[object]]
) -> None:
    async def serve(records: RecordStream) -> None:
        await records.stream.send_all(answer, end=True)
        await trio.sleep_forever()

    async with open_fake_sandbox({"tcp": serve}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError, match=message):
            await call(sandbox, 80)
        assert machine.failure is not None


async def test_a_wait_can_not_fail() -> None:
    async def serve(records: RecordStream) -> None:
        await records.stream.send_all(struct.pack(">H", errno.ECONNREFUSED), end=True)

    async with open_fake_sandbox({"tcp": serve}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError, match="a wait"):
            await sandbox.wait_port(80)
        assert machine.failure is not None


async def test_an_answer_in_pieces_with_data_at_its_heels() -> None:
    async def serve(records: RecordStream) -> None:
        for piece in (b"\x00", b"\x00first", b"second"):
            await records.stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        await records.stream.send_eof()

    async with open_fake_sandbox({"tcp": serve}) as (sandbox, _):
        async with await sandbox.open_tcp_stream(80) as stream:
            assert await read_all(stream) == b"firstsecond"


async def test_a_guest_that_gives_a_connection_up() -> None:
    async def serve(records: RecordStream) -> None:
        records.stream.reset("no such service")

    async with open_fake_sandbox({"tcp": serve}) as (sandbox, machine):
        with pytest.raises(OutcomeUnknownError, match="no such service"):
            await sandbox.open_tcp_stream(80)
        assert machine.failure is None


async def test_a_machine_that_ends_meanwhile() -> None:
    machines: list[FakeMachine] = []

    async def serve(records: RecordStream) -> None:
        machines[0].retire("the test says so")
        await trio.sleep_forever()

    async with open_fake_sandbox({"tcp": serve}) as (sandbox, machine):
        machines.append(machine)
        with pytest.raises(OutcomeUnknownError, match="port 80"):
            await sandbox.open_tcp_stream(80)
