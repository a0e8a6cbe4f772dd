"""Many sandboxes at once: a fleet of some nodes against one local host with the budget of all of them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import trio

from tests.fleet._cluster import FLEET
from trio_sandbox import Host, HostConfig, SandboxConfig, constants, open_host
from trio_sandbox.bench import Figure
from trio_sandbox.fleet import FleetHost, open_ray_host

#: Nodes of the fleets, in the order in which they are measured.
NODES = (2, 4)
#: Sandboxes that one program opens.
CROWD = 32
#: Sandboxes that there is room for while runs take turns; more of them are asked for at once.
_ROOM = 8
_RUNS = 24
_ROUNDS = 5
#: What a sandbox takes.
_MEMORY_MIB = SandboxConfig().memory_mib + constants.VM_OVERHEAD_MIB

AnyHost = Host | FleetHost


async def measure_runs(address: str, nodes: int) -> list[Figure]:
    """Measure runs in sandboxes of their own, for which a fleet on the Ray cluster at *address* has so many *nodes*."""
    samples = await _in_turns(address, nodes, _ROOM, _runs_per_second)
    what = f"{_RUNS} runs in sandboxes of their own, {_ROOM} at once"
    return against_local(what, f"fleet of {nodes} nodes", samples, "1/s", at_least=0.95)


async def measure_opening(address: str, nodes: int) -> list[Figure]:
    """Measure one program that opens many sandboxes on such a fleet."""
    samples = await _in_turns(address, nodes, CROWD, _seconds_to_open)
    return against_local(f"{CROWD} sandboxes opened at once", f"fleet of {nodes} nodes", samples, "s", at_most=1.1)


def against_local(
    what: str,
    fleet: str,
    samples: list[list[float]],
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> list[Figure]:
    """Give figures of samples, the local host's first, and of the ratio of each pair of them, for which the limits are.

    Both of a pair were taken one right after the other: what slows the machine slows both.
    """
    local, ours = samples
    ratios = [each / reference for each, reference in zip(ours, local, strict=True)]
    return [
        Figure.of(f"{what}, local", local, unit),
        Figure.of(f"{what}, {fleet}", ours, unit),
        Figure.of(f"{what}: {fleet} against local", ratios, "x", at_least=at_least, at_most=at_most),
    ]


async def _in_turns(
    address: str, nodes: int, room: int, measure: Callable[[AnyHost], Awaitable[float]]
) -> list[list[float]]:
    """Give what is measured with a local host and with a fleet, which have *room* for as many sandboxes: one sample of each a round.

    Whoever is first in one round is second in the next: what changes from one turn to the next on this machine hits both.
    """
    samples: list[list[float]] = [[], []]
    async with open_host(_config(room)) as local, open_ray_host(address, _config(room // nodes), FLEET) as fleet:
        hosts: list[tuple[AnyHost, list[float]]] = [(local, samples[0]), (fleet, samples[1])]
        for host, _ in hosts:
            async with trio.open_nursery() as nursery:
                for _ in range(nodes):  # the first on each node finds out what is there
                    nursery.start_soon(host.run, "print(1)")
        for _ in range(_ROUNDS):
            for host, known in hosts:
                known.append(await measure(host))
            hosts.reverse()
    return samples


def _config(room: int) -> HostConfig:
    """Return the configuration of a host that has room for so many sandboxes of one vCPU."""
    return HostConfig(memory_budget_mib=room * _MEMORY_MIB, vcpu_budget=room)


async def _runs_per_second(host: AnyHost) -> float:
    """Run something in sandboxes of their own, all asked for at the same moment."""

    async def run() -> None:
        assert (await host.run("print(1)")).stdout == "1\n"

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(_RUNS):
            nursery.start_soon(run)
    return _RUNS / (time.perf_counter() - start)


async def _seconds_to_open(host: AnyHost) -> float:
    """Open `CROWD` sandboxes at once, and have each print something: seconds until all are open and have done so."""
    release = trio.Event()

    async def hold(*, task_status: trio.TaskStatus[None]) -> None:
        async with host.open_sandbox() as sandbox:
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            task_status.started()
            await release.wait()

    async with trio.open_nursery() as holders:
        start = time.perf_counter()
        async with trio.open_nursery() as openers:
            for _ in range(CROWD):
                openers.start_soon(holders.start, hold)
        seconds = time.perf_counter() - start
        assert host.statistics().sandboxes_open == CROWD
        release.set()
    return seconds
