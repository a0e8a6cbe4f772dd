"""The agent: serves a host over a guest channel. Under process 1 of a virtual machine, or in tests in any process."""

from __future__ import annotations

import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import trio

from ...wire import ChannelStream, Role, open_channel
from . import tunnels
from .children import Children
from .clock import ClockService
from .code import CodeService
from .disk import DiskService
from .files import FileService
from .host_mounts import MountService
from .languages import StartedInterpreter
from .network.service import NetworkService
from .pipes import ParkedPipes
from .processes import ProcessService
from .snapshot import IdleService, Machine, SnapshotService

#: The library's version. The host sends its agent along, so that both are always of one version.
AGENT_VERSION: Final = "0.1.0"


def _hello() -> dict[str, object]:
    return {
        "agent": AGENT_VERSION,
        "python": platform.python_version(),
        "kernel": os.uname().release,
    }


async def serve(
    stream: trio.abc.Stream,
    children: Children,
    *,
    prestarted: StartedInterpreter | None = None,
    on_hello: Callable[[Mapping[str, object]], None] | None = None,
    machine: Machine | None = None,
    mounts_disk: str | None = None,
    disk: DiskService | None = None,
    user: int | None = None,
    own_clock: bool = False,
    network: NetworkService | None = None,
) -> None:
    """Serve the host at the other end of *stream* until it is gone; then everything that it started is killed.

    When a host has saved the state of *machine*, whoever goes on from there is served as another host.

    Args:
      stream: The connection, closed in any case.
      children: The spawner's side of things, owned from now on.
      prestarted: An interpreter that *children* adopted.
      on_hello: Called with what a host introduces itself with, before any request is served.
      machine: What there is to be saved; None: nothing.
      mounts_disk: The device with what the host has mounted here; None: there is none.
      disk: What limits the users' disk; None: nothing does.
      user: Number of the user that code runs as; None: ours.
      own_clock: Whether the host may set the clock.
      network: What connects users' programs to the outside, by the host; None: nothing does.

    Raises:
      SpawnerGoneError: if the spawner ended first.
      wire.ChannelError: if no host says hello as one should.

    """
    pipes = ParkedPipes()
    code = CodeService(children, pipes, user)
    files = FileService(children)

    async def wake(stream: ChannelStream, header: dict[str, object]) -> None:
        """Take the time from a host that hands a machine over which has been idle."""
        if on_hello is not None:
            on_hello(header)
        await stream.send_all(b"awake", end=True)

    services: dict[object, Callable[[ChannelStream, dict[str, object]], Awaitable[None] | None]] = {
        "pipe": pipes.serve,
        "process": ProcessService(children, pipes).serve,
        "code": code.begin,
        "file": files.serve,
        "tcp": tunnels.serve,
        "mounts": MountService(children, mounts_disk).serve,
        "wake": wake,
        "clock": ClockService(settable=own_clock).serve,
        "idle": IdleService(
            machine, children.count, lambda: code.count_idle() + files.count_idle(), code.has_only_python
        ).serve,
    }
    if network is not None:
        services["network"] = network.serve
    if disk is not None:
        services["disk"] = disk.serve

    def prepare() -> None:
        if network is not None:
            network.prepare()

    snapshots = SnapshotService(machine, code.count_idle, code.abandon_runs, prepare)
    hello = _hello()
    greeted = trio.Event()

    def handle(stream: ChannelStream, header: dict[str, object]) -> Awaitable[None] | None:
        if not greeted.is_set():
            return handle_greeted(stream, header)
        name = header.get("service")
        service = snapshots.serve if name == "snapshot" else services.get(name)
        if service is None:
            stream.reset(f"no such service: {name!r:.80}")
            return None
        return service(stream, header)

    async def handle_greeted(stream: ChannelStream, header: dict[str, object]) -> None:
        await greeted.wait()
        if (serving := handle(stream, header)) is not None:
            await serving

    async with trio.open_nursery() as nursery:
        nursery.start_soon(children.serve)
        nursery.start_soon(files.run)
        await nursery.start(code.run, prestarted)
        while True:
            async with open_channel(stream, role=Role.GUEST, hello=hello, handler=handle) as channel:
                if on_hello is not None:
                    on_hello(channel.peer_hello)
                await children.identify(channel.peer_hello)
                if network is not None:
                    await network.adopt(channel.peer_hello)
                if snapshots.over.is_set() and machine is not None:
                    machine.thaw()
                    code.renew(channel.peer_hello)
                    snapshots = SnapshotService(machine, code.count_idle, code.abandon_runs, prepare)
                greeted.set()
                ends = [channel.wait_closed, snapshots.over.wait]
                # It does not return. Cancelled, it breaks off all connections, before anybody goes on in another machine.
                await _first_of(*ends, *([] if network is None else [partial(network.run, channel)]))
            if machine is None or not snapshots.over.is_set():
                break
            greeted = trio.Event()
            stream = await machine.wait_for_host(snapshots.marker)
        nursery.cancel_scope.cancel(reason="the host is gone")


async def _first_of(*functions: Callable[[], Awaitable[object]]) -> None:
    """Wait until the first of *functions* returns, and cancel the others."""

    async def wait(function: Callable[[], Awaitable[object]]) -> None:
        await function()
        nursery.cancel_scope.cancel(reason="another has returned")

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(wait, function)
