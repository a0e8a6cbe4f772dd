"""The guest channel over a socket pair, both sides in one process, against bare Trio streams on another.

What it costs inside a guest is measured with the virtual machine; this tells what the protocol adds.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from trio_sandbox.bench import Figure
from trio_sandbox.wire import JSON, STDERR, STDOUT, Channel, ChannelStream, PortStream, RecordStream, Role, open_channel

#: Alternating rounds, so that a machine that gets slower for a while does so for all.
_ROUNDS = 5
_RUNS = 300
_TOTAL = 64 * 10**6
_PIECE = bytes(60 * 1024)


def _socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    return (
        trio.SocketStream(trio.socket.from_stdlib_socket(ours)),
        trio.SocketStream(trio.socket.from_stdlib_socket(theirs)),
    )


async def _serve(stream: ChannelStream, header: dict[str, object]) -> None:
    """Do what a guest's agent does, without doing anything."""
    records = RecordStream(stream)
    if header["service"] == "run":
        await records.receive_json()
        await records.send_and_close([(STDOUT, b"1\n"), (STDERR, b""), (JSON, b'{"finished":{"exit_code":0}}')])
    elif header["service"] == "records":
        for _ in range(_TOTAL // len(_PIECE)):
            await records.send(STDOUT, _PIECE)
    else:
        for _ in range(_TOTAL // len(_PIECE)):
            await stream.send_all(_PIECE)


@asynccontextmanager
async def _open_pair() -> AsyncGenerator[Channel]:
    host_end, guest_end = socket.socketpair()

    async def guest() -> None:
        async with open_channel(PortStream(guest_end.detach()), role=Role.GUEST, hello={}, handler=_serve) as channel:
            await channel.wait_closed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        async with open_channel(PortStream(host_end.detach()), role=Role.HOST, hello={}) as channel:
            yield channel


async def _run(channel: Channel) -> None:
    async with RecordStream(channel.open_stream({"service": "run"})) as records:
        await records.send_json({"language": "python", "code": "print(1)"})
        while await records.receive() is not None:
            pass


async def _receive_records(channel: Channel) -> None:
    async with RecordStream(channel.open_stream({"service": "records"})) as records:
        while await records.receive() is not None:
            pass


async def _receive_bytes(channel: Channel) -> None:
    async with channel.open_stream({"service": "bytes"}) as stream:
        while await stream.receive_some():
            pass


async def _bare_bytes() -> None:
    ours, theirs = _socket_pair()

    async def send() -> None:
        async with theirs:
            for _ in range(_TOTAL // len(_PIECE)):
                await theirs.send_all(_PIECE)

    async with ours, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while await ours.receive_some():
            pass


async def _milliseconds(operation: Callable[[], Awaitable[object]], runs: int) -> list[float]:
    samples: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        await operation()
        samples.append((time.perf_counter() - start) * 1000)
    return samples


async def measure() -> list[Figure]:
    """Measure round trips of the shape of a run, and throughput out of the guest."""
    runs: list[float] = []
    bare_trips: list[float] = []
    speeds: dict[str, list[float]] = {"records": [], "bytes": [], "bare": []}
    async with _open_pair() as channel:
        await _milliseconds(lambda: _run(channel), 50)
        for _ in range(_ROUNDS):
            runs += await _milliseconds(lambda: _run(channel), _RUNS)
            bare_trips += await _bare_round_trips(_RUNS)
            for name, operation in (
                ("records", lambda: _receive_records(channel)),
                ("bytes", lambda: _receive_bytes(channel)),
                ("bare", _bare_bytes),
            ):
                speeds[name] += [_TOTAL / 1000 / ms for ms in await _milliseconds(operation, 1)]
    median = {name: statistics.median(samples) for name, samples in speeds.items()}
    return [
        Figure.of("channel: a run (stream, record there, three records and END back)", runs, "ms"),
        Figure.of("bare Trio socket: round trip of the same bytes", bare_trips, "ms"),
        Figure.of("channel: bytes out of the guest", speeds["bytes"], "MB/s", at_least=20),
        Figure.of("channel: records out of the guest", speeds["records"], "MB/s", at_least=20),
        Figure(
            name="channel: records out of the guest, of a bare Trio socket's speed",
            value=median["records"] / median["bare"],
            unit="x",
            samples=_ROUNDS,
        ),
    ]


async def _bare_round_trips(runs: int) -> list[float]:
    ours, theirs = _socket_pair()
    request, answer = bytes(90), bytes(90)

    async def echo() -> None:
        while await theirs.receive_some():
            await theirs.send_all(answer)

    async def trip() -> None:
        await ours.send_all(request)
        await ours.receive_some()

    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        samples = await _milliseconds(trip, runs)
        nursery.cancel_scope.cancel()
    return samples
