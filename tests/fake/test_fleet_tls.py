"""TLS between a node and its user: Trio's conformance suite, and what a channel needs of it besides."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from trio_sandbox.fleet._security import client_context, make_identity
from trio_sandbox.fleet._tls import TlsStream
from trio_sandbox.wire import ChannelStream, PeerGoneError, PortStream, Role, open_channel

IDENTITY = make_identity()


async def make_ends() -> tuple[TlsStream, TlsStream]:
    client, server, _ = await make_watched_ends()
    return client, server


async def make_watched_ends() -> tuple[TlsStream, TlsStream, PortStream]:
    """Give both ends, and the port below the client."""
    ours, theirs = socket.socketpair()
    port = PortStream(ours.detach())
    client = TlsStream(port, client_context())
    server = TlsStream(PortStream(theirs.detach()), IDENTITY.context, server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server, port


async def test_conformance() -> None:
    await trio.testing.check_two_way_stream(make_ends, None)


@pytest.mark.parametrize("_", range(10))
async def test_what_is_said_with_the_end_of_the_handshake_is_heard(_: int) -> None:
    """Trio decides by chance who comes first: in half of these both are in one read of the server's."""
    ours, theirs = socket.socketpair()
    client = TlsStream(PortStream(ours.detach()), client_context())
    server = TlsStream(PortStream(theirs.detach()), IDENTITY.context, server_side=True)

    async def speak() -> None:
        await client.do_handshake()
        await client.send_all(b"at once")

    async with client, server, trio.open_nursery() as nursery:
        nursery.start_soon(speak)
        await server.do_handshake()
        assert await server.receive_some() == b"at once"
        assert server.peer_certificate() is None
        assert client.peer_certificate()


@pytest.mark.parametrize("size", [1, 16384, 65536, 10**6 + 1])
async def test_what_is_sent_comes_whole_and_in_order(size: int) -> None:
    data = os.urandom(size)
    client, server = await make_ends()
    async with client, server, trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, data)
        received = b""
        while len(received) < size:
            received += await server.receive_some(100_000)
        assert received == data


async def test_what_a_full_socket_does_not_take_is_sent_next() -> None:
    client, server = await make_ends()
    async with client, server:
        pieces: list[bytes] = []
        while client.send_nowait(piece := os.urandom(50_000)) == len(piece):
            pieces.append(piece)
        assert client.send_nowait(piece) == 0, "nothing is taken, or all of it"
        sent = b"".join([*pieces, piece])
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, piece)
            while len(received) < len(sent):
                received += await server.receive_view()
        assert received == sent
        assert client.send_nowait(b"more") == 4
        assert await server.receive_some() == b"more"


async def test_a_small_reader_gets_what_it_asks_for() -> None:
    client, server = await make_ends()
    async with client, server:
        await client.send_all(b"abcdef")
        assert [await server.receive_some(2) for _ in range(3)] == [b"ab", b"cd", b"ef"]
        with pytest.raises(ValueError, match="at least 1"):
            await server.receive_some(0)


async def test_bytes_that_were_changed_on_the_way_are_not_received() -> None:
    client, server, below = await make_watched_ends()
    async with client, server:
        below.send_nowait(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record, sealed with no key of theirs
        with pytest.raises(trio.BrokenResourceError, match="what came is not what the other side sent") as info:
            await server.receive_some()
        assert isinstance(info.value.__cause__, ssl.SSLError)


async def test_one_that_is_given_up_says_why_to_who_reads_and_who_writes() -> None:
    client, server = await make_ends()
    async with client, server:
        while client.send_nowait(bytes(2**16)):
            pass
        broken: list[str] = []

        async def expect_broken(use: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(trio.BrokenResourceError, match="given up: it was silent") as info:
                await use()
            broken.append(str(info.value.__cause__))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_broken, client.receive_some)
            nursery.start_soon(expect_broken, partial(client.send_all, bytes(2**16)))
            await trio.testing.wait_all_tasks_blocked()
            assert client.is_open
            client.give_up(TimeoutError("it was silent"))
        assert broken == ["it was silent"] * 2
        assert not client.is_open
        while await server.receive_some():
            pass


async def test_who_does_not_speak_tls() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(b"GET / HTTP/1.1\r\n\r\n")
        async with TlsStream(PortStream(ours.detach()), IDENTITY.context, server_side=True) as server:
            with pytest.raises(ssl.SSLError):
                await server.do_handshake()
    ours, theirs = socket.socketpair()
    theirs.close()
    async with TlsStream(PortStream(ours.detach()), client_context()) as client:
        with pytest.raises(trio.BrokenResourceError):
            await client.do_handshake()


async def test_a_channel_over_it() -> None:
    client, server = await make_ends()
    data = os.urandom(3_000_000)

    async def echo(stream: ChannelStream) -> None:
        async for piece in stream:
            await stream.send_all(piece)

    async def serve() -> None:
        async with open_channel(server, role=Role.GUEST, hello={}, handler=lambda stream, _: echo(stream)) as channel:
            assert isinstance(await channel.wait_closed(), PeerGoneError)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_channel(client, role=Role.HOST, hello={}) as channel, trio.open_nursery() as sending:
            stream = channel.open_stream({})
            sending.start_soon(stream.send_all, data)
            received = bytearray()
            while len(received) < len(data):
                received += await stream.receive_some()
            assert received == data
