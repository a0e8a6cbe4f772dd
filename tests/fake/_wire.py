"""Two channels that talk to each other in one process, and a peer that a test plays itself."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import attrs
import trio
import trio.testing

from trio_sandbox.wire import Channel, ChannelStream, PortStream, Role, open_channel
from trio_sandbox.wire._framing import HEADER, HEADER_SIZE, INITIAL_CREDIT, Kind, frame

HELLO = frame(Kind.HELLO, 0, b'{"version":1}')


@attrs.define(eq=False)
class Pair:
    """The host's channel, the guest's, and the streams that the guest accepted."""

    host: Channel
    guest: Channel
    accepted: trio.MemoryReceiveChannel[ChannelStream]

    async def open_stream(self) -> tuple[ChannelStream, ChannelStream]:
        stream = self.host.open_stream({})
        return stream, await self.accepted.receive()

    async def open_clogged(self) -> tuple[ChannelStream, ChannelStream]:
        """Open a stream on which neither side can send until the other receives."""
        pair = await self.open_stream()
        for stream in pair:
            await stream.send_all(bytes(INITIAL_CREDIT))
        return pair


def port_pair() -> tuple[PortStream, PortStream]:
    ours, theirs = socket.socketpair()
    return PortStream(ours.detach()), PortStream(theirs.detach())


#: What `open_pair` connects its channels by; a test may replace it.
make_transports: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = trio.testing.memory_stream_pair


@asynccontextmanager
async def open_pair(
    transports: tuple[trio.abc.Stream, trio.abc.Stream] | None = None,
) -> AsyncGenerator[Pair]:
    host_end, guest_end = transports or make_transports()
    send, accepted = trio.open_memory_channel[ChannelStream](math.inf)

    async def accept(stream: ChannelStream, header: dict[str, object]) -> None:
        send.send_nowait(stream)
        await trio.sleep_forever()

    guests: list[Channel] = []
    opened, done = trio.Event(), trio.Event()

    async def run_guest() -> None:
        async with open_channel(guest_end, role=Role.GUEST, hello={"side": "guest"}, handler=accept) as guest:
            guests.append(guest)
            opened.set()
            await done.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_guest)
        async with open_channel(host_end, role=Role.HOST, hello={"side": "host"}) as host:
            await opened.wait()
            yield Pair(host, guests[0], accepted)
        done.set()


class RawPeer:
    """The other end of a channel's connection, for saying what no channel of ours would."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self._buffer = bytearray()

    async def say(self, *frames: bytes) -> None:
        await self.transport.send_all(b"".join(frames))

    async def next_frame(self) -> tuple[Kind, int, bytes] | None:
        """Return the next frame, or None at the end of the connection."""
        while True:
            if len(self._buffer) >= HEADER_SIZE:
                length, kind, stream_id = HEADER.unpack_from(self._buffer)
                end = HEADER_SIZE + length
                if len(self._buffer) >= end:
                    payload = bytes(self._buffer[HEADER_SIZE:end])
                    del self._buffer[:end]
                    return Kind(kind), stream_id, payload
            data = await self.transport.receive_some()
            if not data:
                return None
            self._buffer += data
