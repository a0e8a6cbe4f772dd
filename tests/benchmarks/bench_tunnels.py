"""Tunnels and processes of a sandbox, and in the same run what bounds them: the guest's own loopback, its own fork and exec."""

from __future__ import annotations

import time

import trio

from trio_sandbox import Sandbox, open_sandbox
from trio_sandbox.bench import Figure, durations

_PORT = 8000
_ROUND_TRIPS = 300
_TRANSFERS = 5
_PROCESSES = 100
_STREAMS = 8
_PIECE = 1 << 17
#: MB (10**6 bytes) of one transfer, all of its streams together.
_MB = 50

#: Does with each connection what its first byte says, in C as far as Python can.
_SERVER = f"""
import os, socket, threading, time

def serve(connection):
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        match connection.recv(1):
            case b"e":
                while data := connection.recv(65536):
                    connection.sendall(data)
            case b"s":
                size = int(connection.recv(20))
                piece = bytes({_PIECE})
                for _ in range(size // len(piece)):
                    connection.sendall(piece)
            case b"r":
                size, buffer = 0, bytearray({_PIECE})
                while count := connection.recv_into(buffer):
                    size += count
                connection.sendall(b"%d" % size)

def accept():
    while True:
        threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

listener = socket.create_server(("127.0.0.1", {_PORT}))
threading.Thread(target=accept, daemon=True).start()
"""

_LOOPBACK = f"""
ours = socket.create_connection(("127.0.0.1", {_PORT}))
ours.sendall(b"r")
start = time.perf_counter()
piece = bytes({_PIECE})
for _ in range({_MB} * 10**6 // len(piece)):
    ours.sendall(piece)
ours.shutdown(socket.SHUT_WR)
size = int(ours.recv(20))
print(size / (time.perf_counter() - start) / 1e6)
"""

_SPAWN = """
import os, time
start = time.perf_counter()
os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
print((time.perf_counter() - start) * 1000)
"""


async def measure() -> list[Figure]:
    """Measure with one sandbox."""
    async with open_sandbox("python") as sandbox:
        by = f"under {sandbox.accelerator}"
        await sandbox.run(_SERVER)
        await sandbox.wait_port(_PORT)
        async with await sandbox.open_tcp_stream(_PORT) as stream:
            await stream.send_all(b"e")

            async def exchange() -> None:
                await stream.send_all(b"x")
                await stream.receive_some()

            round_trips = await durations(exchange, runs=_ROUND_TRIPS, warm_up=20)
        connects = await durations(lambda: _connect(sandbox), runs=50, warm_up=5)
        into: list[float] = []
        out: list[float] = []
        loopback: list[float] = []
        shares: list[float] = []
        for _ in range(_TRANSFERS):
            out.append(await _receive(sandbox, _MB))
            into.append(await _send(sandbox, _MB))
            loopback.append(float((await sandbox.run(_LOOPBACK)).stdout))
            shares.append(await _smallest_share(sandbox))
        processes: list[float] = []
        spawns: list[float] = []
        for _ in range(_PROCESSES):  # in turns: what else the machine does slows both
            processes += await durations(lambda: sandbox.run_process(["/bin/true"]), runs=1, warm_up=0)
            spawns.append(float((await sandbox.run(_SPAWN)).stdout))
    return [
        Figure.of(f"tunnel, round trip of a byte, {by}", round_trips, "ms", at_most=3),
        Figure.of(f"tunnel, connect and close, {by}", connects, "ms"),
        Figure.of(f"tunnel, guest to host, {by}", out, "MB/s", at_least=20),
        Figure.of(f"tunnel, host to guest, {by}", into, "MB/s", at_least=20),
        Figure.of(f"loopback inside the guest, for comparison, {by}", loopback, "MB/s"),
        Figure.of(f"tunnels, smallest share of {_STREAMS} at once, of a fair one", shares, "x", at_least=0.5),
        Figure.of(f"run_process(['/bin/true']), {by}", processes, "ms", at_most=40),
        Figure.of(f"the guest's own posix_spawn of it, for comparison, {by}", spawns, "ms"),
    ]


async def _connect(sandbox: Sandbox) -> None:
    async with await sandbox.open_tcp_stream(_PORT):
        pass


async def _receive(sandbox: Sandbox, megabytes: int) -> float:
    async with await sandbox.open_tcp_stream(_PORT) as stream:
        start = time.perf_counter()
        await stream.send_all(b"s")
        await stream.send_all(b"%d" % (megabytes * 10**6))
        size = 0
        async for data in stream:
            size += len(data)
        return size / (time.perf_counter() - start) / 1e6


async def _send(sandbox: Sandbox, megabytes: int) -> float:
    piece = bytes(_PIECE)
    async with await sandbox.open_tcp_stream(_PORT) as stream:
        await stream.send_all(b"r")
        start = time.perf_counter()
        for _ in range(megabytes * 10**6 // len(piece)):
            await stream.send_all(piece)
        await stream.send_eof()
        size = int(b"".join([data async for data in stream]))
        return size / (time.perf_counter() - start) / 1e6


async def _smallest_share(sandbox: Sandbox) -> float:
    """Receive on several streams for a while; return the least that one got, in parts of a fair share."""
    sizes = [0] * _STREAMS

    async def receive(number: int) -> None:
        async with await sandbox.open_tcp_stream(_PORT) as stream:
            await stream.send_all(b"s")
            await stream.send_all(b"%d" % 10**12)
            async for data in stream:
                sizes[number] += len(data)

    with trio.move_on_after(2):
        async with trio.open_nursery() as nursery:
            for number in range(_STREAMS):
                nursery.start_soon(receive, number)
    return min(sizes) * _STREAMS / sum(sizes)
