"""`PortStream`: Trio's conformance suite, and what the channel needs of it besides."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from trio_sandbox.wire import PeerGoneError, PortStream, Role, WireError, open_channel

from ._wire import open_pair, port_pair


async def make_ports() -> tuple[PortStream, PortStream]:
    await trio.lowlevel.checkpoint()
    return port_pair()


async def make_clogged_ports() -> tuple[PortStream, PortStream]:
    await trio.lowlevel.checkpoint()
    ports = port_pair()
    for port in ports:
        while port.send_nowait(bytes(65536)) == 65536:
            pass
        while port.send_nowait(b"x"):
            pass
    return ports


async def test_conformance() -> None:
    await trio.testing.check_two_way_stream(make_ports, make_clogged_ports)


async def test_send_nowait_takes_what_there_is_room_for() -> None:
    ours, theirs = port_pair()
    async with ours, theirs:
        assert ours.send_nowait(b"") == 0
        assert ours.send_nowait(memoryview(b"abc")) == 3
        sent = ours.send_nowait(bytes(2**22))
        assert 0 < sent < 2**22
        assert ours.send_nowait(b"full") == 0
        received = 0
        while received < sent + 3:
            received += len(await theirs.receive_some())
        assert received == sent + 3


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 5000, 65536, 131072])
async def test_all_that_is_there_is_received_at_once_or_as_much_as_is_asked_for(size: int) -> None:
    data = bytes(range(251)) * 300
    ours, theirs = port_pair()
    async with ours, theirs:
        assert ours.send_nowait(data[:4096]) == 4096
        assert bytes(await theirs.receive_view()) == data[:4096]
        assert ours.send_nowait(data) == len(data)
        received = await theirs.receive_some(size)
        assert data.startswith(received)
        assert len(received) == min(size - size % 4096 or size, len(data))
        while len(received) < len(data):
            received += await theirs.receive_some(size)
        assert received == data


async def test_a_peer_that_is_gone() -> None:
    ours, theirs = port_pair()
    async with ours:
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError) as caught:
            ours.send_nowait(b"x")
        assert isinstance(caught.value.__cause__, BrokenPipeError)
        assert await ours.receive_some() == b""


async def test_closing_closes_the_descriptor_once() -> None:
    ours, theirs = port_pair()
    fd = ours.fileno()
    ours.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert ours.fileno() == -1
    ours.close()
    theirs.close()
    for attempt in (ours.receive_some, ours.wait_send_all_might_not_block, lambda: ours.send_all(b"x")):
        with pytest.raises(trio.ClosedResourceError):
            await attempt()
    with pytest.raises(trio.ClosedResourceError):
        ours.send_nowait(b"x")


async def test_a_channel_writes_at_once_and_from_the_senders_task() -> None:
    """The frames are on the wire when `send_all` returns, before any other task has run."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        theirs.send(b'\0\0\0\x0d\1\0\0\0\0{"version":1}')
        async with open_channel(PortStream(ours.detach()), role=Role.HOST, hello={}) as channel:
            theirs.recv(65536)
            stream = channel.open_stream({})
            with pytest.raises(BlockingIOError):
                theirs.recv(65536)
            stream.close()
            assert theirs.recv(65536) == (b"\0\0\0\2\2\0\0\0\1{}" + b"\0\0\0\0\4\0\0\0\1" + b"\0\0\0\6\5\0\0\0\1closed")


async def test_a_sender_that_finds_the_peer_gone_fails_the_channel() -> None:
    ours, theirs = port_pair()
    async with open_pair((ours, theirs)) as pair:
        stream, _ = await pair.open_stream()
        theirs.close()
        # The reader has not seen it yet: it is this very call that does.
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.send_all(b"x")
        assert isinstance(caught.value.__cause__, PeerGoneError)
        assert pair.host.failure is caught.value.__cause__


async def test_a_port_that_is_full_is_written_to_when_it_is_not() -> None:
    ours, theirs = port_pair()
    total = 0
    async with open_pair((ours, theirs)) as pair, trio.open_nursery() as nursery:
        for _ in range(8):
            stream, other = await pair.open_stream()

            async def receive(other: trio.abc.ReceiveStream = other) -> None:
                nonlocal total
                async for data in other:
                    total += len(data)

            nursery.start_soon(receive)
            nursery.start_soon(stream.send_and_close, bytes(10**6))
    assert total == 8 * 10**6


@pytest.mark.parametrize(
    "pieces", [[b"old", b"abcdefgh", b"new"], [b"oldabcdefghnew"], [bytes([b]) for b in b"oldabcabcdefghnew"]]
)
async def test_skipping_past_a_marker(pieces: list[bytes]) -> None:
    ours, theirs = port_pair()
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(ours.skip_past, b"abcdefgh")
        for piece in pieces:
            await trio.testing.wait_all_tasks_blocked()
            await theirs.send_all(piece)
    received = b""
    ours, theirs = port_pair()
    async with ours, theirs:
        for piece in pieces:
            await theirs.send_all(piece)
        await ours.skip_past(b"abcdefgh")
        while len(received) < 3:
            received += await ours.receive_some(2)
    assert received == b"new"


async def test_a_marker_that_never_comes() -> None:
    ours, theirs = port_pair()
    async with ours, theirs, trio.open_nursery() as nursery:
        with pytest.raises(WireError, match="no marker in the first"):
            nursery.start_soon(theirs.send_all, bytes(2**21))
            await ours.skip_past(b"abcdefgh")
        nursery.cancel_scope.cancel()
    ours, theirs = port_pair()
    async with ours:
        async with theirs:
            await theirs.send_all(b"abcdefg")
        with pytest.raises(PeerGoneError):
            await ours.skip_past(b"abcdefgh")


async def test_what_is_there_is_received_together_and_in_order() -> None:
    # More than one page: the read of a port is spread over buffers of that size.
    ours, theirs = socket.socketpair()
    data = os.urandom(4096 * 5 + 7)
    with theirs:
        async with PortStream(ours.detach()) as port:
            theirs.sendall(data)
            assert await port.receive_some() == data
            theirs.sendall(data)
            assert await port.receive_some(4096 * 3) == data[: 4096 * 3]
            assert await port.receive_some() == data[4096 * 3 :]
            theirs.sendall(data)
            theirs.close()
            assert await port.receive_some(2**40) == data
            assert await port.receive_some() == b""


async def test_calling_until_somebody_answers() -> None:
    """The first marker is somebody else's prey, and the answer comes late, so that there are some too many."""
    ours, theirs = port_pair()
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(ours.call, b"abcdefgh")
        assert await theirs.receive_some() == b"abcdefgh"
        await theirs.skip_past(b"abcdefgh")
        await trio.sleep(0.6)
        await theirs.send_all(b"stale abcdefgh")


@pytest.mark.parametrize(
    "pieces", [[b"abcdefgh" * 3 + b"abcnew"], [b"abcdefghabc", b"defghabcdef", b"ghabc", b"new"]], ids=["one", "four"]
)
async def test_repetitions_of_a_marker_are_dropped(pieces: list[bytes]) -> None:
    ours, theirs = port_pair()
    received = b""

    async def receive() -> None:
        nonlocal received
        await ours.skip_past(b"abcdefgh")
        while len(received) < 6:
            received += await ours.receive_some()

    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for piece in pieces:
            await trio.testing.wait_all_tasks_blocked()
            await theirs.send_all(piece)
    assert received == b"abcnew"
