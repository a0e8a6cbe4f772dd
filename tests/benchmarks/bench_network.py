"""Connections by name, and in the same run the tunnels, which carry the same bytes by the same channel: in turns."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median

import trio

from trio_sandbox import Network, NetworkRule, Sandbox, SandboxConfig, open_host
from trio_sandbox.bench import Figure

from .bench_tunnels import _PORT as PORT, _SERVER as SERVER, _receive as tunnel_out, _send as tunnel_in

_TRANSFERS = 10
_MB = 60
_STARTS = 5
_PIECE = 1 << 17

#: A program in the guest: it measures itself, and prints one number a line.
_DOWNLOAD = f"""
import socket, time
with socket.create_connection(("peer.test", 80)) as sock:
    sock.sendall(b"s" + b"%20d" % {_MB * 10**6})
    buffer, size, start = bytearray({_PIECE}), 0, time.perf_counter()
    while count := sock.recv_into(buffer):
        size += count
    print(size / (time.perf_counter() - start) / 1e6)
"""
_UPLOAD = f"""
import socket, time
with socket.create_connection(("peer.test", 80)) as sock:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the tunnels' server does
    sock.sendall(b"r" + b" " * 20)
    piece, start = bytes({_PIECE}), time.perf_counter()
    for _ in range({_MB} * 10**6 // len(piece)):
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)
    size = int(sock.recv(20))
    print(size / (time.perf_counter() - start) / 1e6)
"""
_SHORT = """
import socket, time
def clock(operation, runs):
    for number in range(runs):
        start = time.perf_counter()
        operation(number)
        print((time.perf_counter() - start) * 1000)
address = socket.gethostbyname("peer.test")
with socket.create_connection(("peer.test", 80)) as sock:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(b"e" + b" " * 20)
    def exchange(_):
        sock.sendall(b"x")
        sock.recv(1)
    clock(exchange, 100)
clock(lambda _: socket.create_connection((address, 80)).close(), 40)
clock(lambda _: socket.getaddrinfo("peer.test", 80), 50)
time.sleep(2)  # the host lets a hundred through at once, and fifty a second
clock(lambda number: socket.getaddrinfo(f"n{number}.wild.test", 80), 40)
"""


async def _serve(stream: trio.SocketStream) -> None:
    """Do what the server of the tunnels' benchmark does."""
    head = bytearray()
    while len(head) < 21:
        data = await stream.receive_some(21 - len(head))
        if not data:
            return
        head += data
    if head.startswith(b"e"):
        async for piece in stream:
            await stream.send_all(piece)
    elif head.startswith(b"s"):
        piece = bytes(_PIECE)
        for _ in range(int(head[1:]) // len(piece)):
            await stream.send_all(piece)
    else:
        size = 0
        async for piece in stream:
            size += len(piece)
        await stream.send_all(b"%d" % size)


async def measure() -> list[Figure]:
    """Measure with one sandbox, and the start with a few."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, _serve, [listener])
        to = listener.socket.getsockname()[:2]
        policy = Network.allow(NetworkRule("peer.test", to=to), NetworkRule("*.wild.test", to=to))
        figures = await _measure(policy)
        nursery.cancel_scope.cancel(reason="it is over")
    return figures


async def _measure(policy: Network) -> list[Figure]:
    online = SandboxConfig(network=policy)
    downloads: list[float] = []
    uploads: list[float] = []
    starts: list[float] = []
    async with open_host() as host:
        async with host.open_sandbox(config=online) as sandbox:
            by = f"under {sandbox.accelerator}"
            await sandbox.run(SERVER)
            await sandbox.wait_port(PORT)
            short = await _numbers(sandbox, _SHORT)
            for number in range(_TRANSFERS):
                swapped = number % 2 == 1
                downloads.append(await _ratio(sandbox, _DOWNLOAD, tunnel_in, swapped=swapped))
                uploads.append(await _ratio(sandbox, _UPLOAD, tunnel_out, swapped=swapped))
        for _ in range(_STARTS):
            times: list[float] = []
            for config in (SandboxConfig(), online):
                start = time.perf_counter()
                async with host.open_sandbox(config=config) as sandbox:
                    # Up to the first output: much of what switching the network on has QEMU translate a first run needs, too.
                    await sandbox.run("print(1)")
                    times.append(time.perf_counter() - start)
            starts.append(times[1] / times[0])
    exchanges, connects, known, new = short[:100], short[100:140], short[140:190], short[190:]
    return [
        Figure.of("download by name, of a tunnel's", [median(downloads)], "x", at_least=0.9),
        Figure.of("upload by name, of a tunnel's", [median(uploads)], "x", at_least=1.0),
        Figure.of(f"round trip of a byte by name, {by}", exchanges, "ms", at_most=3),
        Figure.of(f"connect by name, {by}", connects, "ms", at_most=12),
        Figure.of(f"look up a known name, {by}", known, "ms", at_most=3),
        Figure.of(f"look up a new name, {by}", new, "ms", at_most=8),
        Figure.of("first output with a network, of one without", [median(starts)], "x", at_most=1.5),
    ]


async def _ratio(
    sandbox: Sandbox, by_name: str, tunnel: Callable[[Sandbox, int], Awaitable[float]], *, swapped: bool
) -> float:
    """Measure both one after the other: what else the machine does slows both. The one by name comes second, or first if *swapped*."""
    through = await tunnel(sandbox, _MB) if not swapped else None
    (rate,) = await _numbers(sandbox, by_name)
    return rate / (await tunnel(sandbox, _MB) if through is None else through)


async def _numbers(sandbox: Sandbox, code: str) -> list[float]:
    result = await sandbox.run(code, check=True)
    return [float(line) for line in result.stdout.split()]
