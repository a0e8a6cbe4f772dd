"""The part `network`: connections, carried, refused, given up and broken off from either end, one by one and in bursts.

Each operation is one connection, but for the blocks with a policy of their own, which are cancelled in the middle. Descriptors,
tasks, streams, memory and the sandbox's own numbers are compared before and after. The agent takes 256 connections and 64 lookups
at a time: if it forgot one in forty, all would stand still after ten thousand.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from ast import literal_eval

import trio

from trio_sandbox import Network, NetworkRule, Sandbox, SandboxConfig, open_host

from ._gauges import compare, measure
from ._report import Budget, Report
from ._watch import bounded

#: Seconds for a batch, on the slowest machine.
_PATIENCE = 300.0
#: Connections of one batch, and by how many threads: one after the other, some at a time, and all at once.
_BATCH, _THREADS = 96, (1, 8, 48)
#: Of this many batches there is a block with a policy of its own after one, which is cancelled within so many seconds.
_BLOCK_EVERY, _LATEST_CANCELLATION = 4, 0.5

#: What a program in the guest does with each connection, and what it must come to.
_CLIENT = """
import collections, random, socket, struct, threading
drawn, came_to, lock = random.Random({seed}), collections.Counter(), threading.Lock()
places = {{"refused name": ("other.test", 80), "refused port": ("echo.test", 81), "nobody there": ("closed.test", 80)}}
def rest(sock):
    return b"".join(iter(lambda: sock.recv(65536), b""))
def one(kind, number):
    where = places.get(kind, ("echo.test", 80))
    try:
        if kind == "new name":
            return socket.gethostbyname(f"n{{number}}.echo.test").startswith("198.1")
        if kind == "given up":
            with socket.socket() as sock:
                address = socket.gethostbyname(where[0])
                sock.setblocking(False)
                sock.connect_ex((address, 80))
            return None
        with socket.create_connection(where, timeout=120) as sock:
            if kind == "reset here":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return sock.sendall(bytes(5000))
            if kind == "reset there":
                sock.sendall(b"!")
                return sock.recv(1) and None
            if kind == "left":
                return sock.sendall(b"x")
            if kind == "exchange":
                sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                return rest(sock).endswith(b"hello")
            if kind == "ended there first":
                sock.sendall(b"$")
                ended = rest(sock) == b"$"
                sock.sendall(bytes(3000))
                return ended
            data = bytes(range(256)) * 40
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return rest(sock) == data
    except socket.gaierror:
        return "no such name"
    except OSError as exc:
        return type(exc).__name__
kinds = [(drawn.choice({kinds}), drawn.randrange(1000)) for _ in range({count})]
def work(mine):
    for kind, number in mine:
        result = one(kind, number)
        with lock:
            came_to[kind, str(result)] += 1
threads = [threading.Thread(target=work, args=(kinds[number::{threads}],)) for number in range({threads})]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sorted(came_to.items()))
"""
_EXPECTED = {
    "exchange": {"True"},
    "half-closed": {"True"},
    "ended there first": {"True"},
    "refused name": {"no such name"},
    "refused port": {"OSError"},
    "nobody there": {"ConnectionRefusedError"},
    "new name": {"True"},
    "given up": {"None"},
    "reset here": {"None"},
    "reset there": {"ConnectionResetError", "None"},
    "left": {"None"},
}


async def _serve(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some():
            match data[:1]:
                case b"!":
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    stream.socket.close()
                    return
                case b"G":
                    await stream.send_all(b"HTTP/1.0 200 OK\r\n\r\nhello")
                    return
                case b"$":
                    await stream.send_all(b"$")
                    await stream.send_eof()
                    async for _ in stream:
                        pass
                    return
                case _:
                    await stream.send_all(data)
        await stream.send_eof()


async def soak(budget: Budget, report: Report) -> None:
    """Soak connections."""
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, _serve, [listener])
            served = listener.socket.getsockname()[:2]
            network = Network.allow(
                NetworkRule("echo.test", to=served),
                NetworkRule("*.echo.test", to=served),
                NetworkRule("closed.test", to=nobody.getsockname()),
            )
            async with open_host() as host, host.open_sandbox(config=SandboxConfig(network=network)) as sandbox:
                await _soak_one(sandbox, network, budget, report)
            nursery.cancel_scope.cancel(reason="it is over")


async def _soak_one(sandbox: Sandbox, network: Network, budget: Budget, report: Report) -> None:
    drawn = random.Random(budget.seed)
    first: dict[str, float] | None = None
    batches = 0
    while budget.is_left(report.operations.total()) and not report.is_hopeless:
        if first is None and report.operations:
            first = await measure(sandbox) | _count_streams(sandbox)
        start = time.monotonic()
        code = _CLIENT.format(
            seed=drawn.randrange(2**32), kinds=list(_EXPECTED), count=_BATCH, threads=drawn.choice(_THREADS)
        )

        async def batch(code: str = code) -> None:
            result = await sandbox.run(code)
            if result.exit_code:
                report.fail(f"a batch ended with {result.exit_code}: {result.stderr[-1000:]}")
                return
            for (kind, came_to), count in literal_eval(result.stdout):
                report.operations[kind] += count
                if came_to not in _EXPECTED[kind]:
                    report.fail(f"{count} connections of the kind {kind!r} came to {came_to}")

        async def cancelled_block(code: str = code, seconds: float = drawn.random() * _LATEST_CANCELLATION) -> None:
            with trio.move_on_after(seconds):
                async with sandbox.network(network):
                    await sandbox.run(code)
            report.operations["cancelled block"] += 1

        batches += 1
        try:
            await bounded("a batch of connections", batch, _PATIENCE, by_deadline=False)
            if batches % _BLOCK_EVERY == 0:
                await bounded("a block that is cancelled", cancelled_block, _PATIENCE, by_deadline=False)
            with trio.fail_after(60):
                while sandbox.network_statistics().open_connections:
                    await trio.sleep(0.05)
        except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
            report.fail(f"{type(exc).__name__}: {exc}\n    The console's end: {sandbox.console()[-1000:]!r}")
            return
        report.slowest = max(report.slowest, round(time.monotonic() - start, 1))
    if first is not None:
        compare(report, first, await measure(sandbox) | _count_streams(sandbox))


def _count_streams(sandbox: Sandbox) -> dict[str, float]:
    """Count the streams of the sandbox's channel: those that its host opened, and its agent. Of some the last word is yet to come."""
    channel = sandbox._slot.machine.guest  # pyright: ignore[reportPrivateUsage]
    numbers = channel.statistics()
    return {
        "streams of the host": numbers.open_streams - numbers.peer_streams,
        "streams of the guest": numbers.peer_streams,
    }
