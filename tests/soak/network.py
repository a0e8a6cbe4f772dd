"""The part `network`: lookups and connections, carried, refused, given up and broken off from either end, by the hundred.

Each operation is one connection. Descriptors, tasks, memory and the sandbox's own numbers are compared before and after.
"""

from __future__ import annotations

import random
import socket
import struct
import time

import trio

from trio_sandbox import HostConfig, Network, NetworkRule, Sandbox, SandboxConfig, open_host

from ._gauges import compare, measure
from ._report import Budget, Report
from ._watch import bounded

#: Seconds for a batch, on the slowest machine.
_PATIENCE = 300.0
#: Connections of one batch, and by how many threads.
_BATCH, _THREADS = 96, 8

#: What a program in the guest does with each connection, and what it must come to.
_CLIENT = f"""
import collections, random, socket, struct, sys, threading
drawn, came_to, lock = random.Random(SEED), collections.Counter(), threading.Lock()
def one(kind):
    host, port = {{"refused name": ("other.test", 80), "refused port": ("echo.test", 81)}}.get(kind, ("echo.test", 80))
    try:
        with socket.create_connection((host, port), timeout=120) as sock:
            if kind == "is reset here":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return sock.sendall(bytes(5000))
            if kind == "is reset there":
                sock.sendall(b"!")
                return sock.recv(1) and None
            if kind == "is left":
                return sock.sendall(b"x")
            data = bytes(range(256)) * 40
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b"")) == data
    except socket.gaierror:
        return "no such name"
    except OSError as exc:
        return type(exc).__name__
kinds = [drawn.choice({{}}) for _ in range({_BATCH})]
def work(mine):
    for kind in mine:
        result = one(kind)
        with lock:
            came_to[kind, str(result)] += 1
threads = [threading.Thread(target=work, args=(kinds[number::{_THREADS}],)) for number in range({_THREADS})]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sorted(came_to.items()))
"""
_EXPECTED = {
    "carried": {"True"},
    "refused name": {"no such name"},
    "refused port": {"OSError"},
    "is reset here": {"None"},
    "is reset there": {"ConnectionResetError", "None"},
    "is left": {"None"},
}


async def _serve(stream: trio.SocketStream) -> None:
    try:
        while data := await stream.receive_some():
            if data[:1] == b"!":
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stream.socket.close()
                return
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError:
        return


async def soak(budget: Budget, report: Report) -> None:
    """Soak connections."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, _serve, [listener])
        rule = NetworkRule("echo.test", to=listener.socket.getsockname()[:2])
        async with open_host(HostConfig()) as host:
            config = SandboxConfig(network=Network.allow(rule))
            async with host.open_sandbox(config=config) as sandbox:
                await _soak_one(sandbox, budget, report)
        nursery.cancel_scope.cancel(reason="it is over")


async def _soak_one(sandbox: Sandbox, budget: Budget, report: Report) -> None:
    drawn = random.Random(budget.seed)
    first: dict[str, float] | None = None
    while budget.is_left(report.operations.total()) and not report.is_hopeless:
        if first is None and report.operations:
            first = await measure(sandbox)
        start = time.monotonic()

        async def batch() -> None:
            code = _CLIENT.replace("SEED", str(drawn.randrange(2**32))).replace("({})", f"({list(_EXPECTED)})")
            result = await sandbox.run(code)
            if result.exit_code:
                report.fail(f"a batch ended with {result.exit_code}: {result.stderr[-1000:]}")
                return
            for (kind, came_to), count in eval(result.stdout):
                report.operations[kind] += count
                if came_to not in _EXPECTED[kind]:
                    report.fail(f"{count} connections of the kind {kind!r} came to {came_to}")

        try:
            await bounded("a batch of connections", batch, _PATIENCE, by_deadline=False)
            with trio.fail_after(60):
                while sandbox.network_statistics().open_connections:
                    await trio.sleep(0.05)
        except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
            report.fail(f"{type(exc).__name__}: {exc}\n    The console's end: {sandbox.console()[-1000:]!r}")
            return
        report.slowest = max(report.slowest, round(time.monotonic() - start, 1))
    if first is not None:
        compare(report, first, await measure(sandbox))
