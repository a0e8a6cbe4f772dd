"""Sandboxes of a fleet against those of a local host, in turns: what the longer wire costs. Needs the extra ``ray``.

The fleet's nodes are processes of Ray's on this machine. So both share its processors, and the figures are what the wire costs, not what a
network does. One sandbox at a time comes first, then many at once: see `_crowd`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from tests.fleet._cluster import FLEET, add_node, cluster_of
from trio_sandbox import Host, HostConfig, Sandbox, open_host
from trio_sandbox.bench import Figure
from trio_sandbox.fleet import FleetHost, open_ray_host

from ._crowd import CROWD, NODES, against_local, measure_opening, measure_runs

_STARTS = 9
_ROUNDS = 5
#: Of a round.
_RUNS = 60
_TRIPS = 100
_SIZE = 64 * 2**20
_PORT = 8000

_ECHO = f"""
import socket, threading

def serve():
    connection = listener.accept()[0]
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(65536):
            connection.sendall(data)

listener = socket.create_server(("127.0.0.1", {_PORT}))
threading.Thread(target=serve, daemon=True).start()
"""


async def measure() -> list[Figure]:
    """Measure with one node, and then with more."""
    # Niceness is for those who share a node with Ray's own work, and only root can undo it.
    with cluster_of(1, slots=CROWD, worker_niceness=0) as cluster:
        figures = await _measure_one(cluster.address)
        for nodes in NODES:
            while len(cluster.worker_nodes) < nodes:
                add_node(cluster, CROWD)
            cluster.wait_for_nodes()
            figures += await measure_runs(cluster.address, nodes)
        figures += await measure_opening(cluster.address, NODES[-1])
    return figures


async def _measure_one(address: str) -> list[Figure]:
    """Measure with two hosts that are open already, one sandbox at a time."""
    config = HostConfig(memory_budget_mib=2000, vcpu_budget=4)
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as name:
        async with open_host(config) as local, open_ray_host(address, config, FLEET) as fleet:
            hosts: list[Host | FleetHost] = [local, fleet]
            starts = await _in_turns([partial(_start, host) for host in hosts], _STARTS, warm_up=1)
            async with AsyncExitStack() as stack:
                sandboxes = [await stack.enter_async_context(host.open_sandbox()) for host in hosts]
                by = f"under {sandboxes[0].accelerator}"
                return [
                    *_slower("template to first output", starts, at_most=30),
                    *await _measure(sandboxes, Path(name), by),
                ]


async def _measure(sandboxes: list[Sandbox], directory: Path, by: str) -> list[Figure]:
    large = directory / "large"
    await trio.Path(large).write_bytes(os.urandom(_SIZE))
    runs: list[list[float]] = [[], []]
    up: list[list[float]] = [[], []]
    down: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        for samples, more in (
            (runs, await _in_turns([partial(box.run, "print(1)") for box in sandboxes], _RUNS, warm_up=5)),
            (up, await _in_turns([partial(box.upload, large, "large") for box in sandboxes], 1)),
            (
                down,
                await _in_turns([partial(box.download, "large", directory / "back") for box in sandboxes], 1),
            ),
        ):
            for known, new in zip(samples, more, strict=True):
                known += new
    trips = [await _trips(sandbox) for sandbox in sandboxes]
    return [
        *_slower('run("print(1)") again', runs, at_most=1),
        *_slower("tunnel, round trip of a byte", trips, at_most=1),
        *against_local("upload of 64 MiB", "fleet", _speeds(up), "MB/s", at_least=0.7),
        *against_local("download of 64 MiB", "fleet", _speeds(down), "MB/s", at_least=0.7),
    ]


def _speeds(milliseconds: list[list[float]]) -> list[list[float]]:
    return [[_SIZE / 1e3 / each for each in samples] for samples in milliseconds]


def _slower(what: str, samples: list[list[float]], *, at_most: float) -> list[Figure]:
    """Give figures of milliseconds, the local host's first, and by how much the fleet is slower."""
    local, fleet = samples
    difference = statistics.median(fleet) - statistics.median(local)
    return [
        Figure.of(f"{what}, local", local, "ms"),
        Figure.of(f"{what}, fleet", fleet, "ms"),
        Figure(name=f"{what}: slower by", value=difference, unit="ms", samples=len(fleet), at_most=at_most),
    ]


async def _in_turns(
    operations: list[Callable[[], Awaitable[object]]], rounds: int, *, warm_up: int = 0
) -> list[list[float]]:
    """Give the milliseconds of each operation, taken in turns: what slows the machine slows all of them."""
    samples: list[list[float]] = [[] for _ in operations]
    for number in range(warm_up + rounds):
        for known, operation in zip(samples, operations, strict=True):
            start = time.perf_counter()
            await operation()
            if number >= warm_up:
                known.append((time.perf_counter() - start) * 1000)
    return samples


async def _start(host: Host | FleetHost) -> None:
    async with host.open_sandbox() as sandbox:
        await sandbox.run("print(1)")


async def _trips(sandbox: Sandbox) -> list[float]:
    await sandbox.run(_ECHO)
    async with await sandbox.open_tcp_stream(_PORT) as stream:

        async def trip() -> None:
            await stream.send_all(b"x")
            await stream.receive_some()

        (samples,) = await _in_turns([trip], _TRIPS, warm_up=20)
        return samples
