"""Nodes in this process, over real TCP and TLS, whose sandboxes have agents in this process as guests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio

from tests._leaks import HANG_LIMIT
from trio_sandbox import HostConfig, HostStatistics, Image, ImageError, Sandbox, SandboxConfig
from trio_sandbox.fleet import FleetConfig, FleetHost
from trio_sandbox.fleet._host import open_fleet
from trio_sandbox.fleet._members import Members
from trio_sandbox.fleet._messages import NodeAddress
from trio_sandbox.fleet._node import Node, serve_node
from trio_sandbox.fleet._progress import ProgressNotes
from trio_sandbox.fleet._shipping import NodeImages
from trio_sandbox.fleet._stock import Stock
from trio_sandbox.image import BuiltImage, Cargo, Receive, SystemDisk
from trio_sandbox.machines import AdmissionStatistics, WarmStatistics

from ._guest import FakeMachine
from ._sandbox import open_local_sandbox


@attrs.define(eq=False)
class FakeImages:
    """Images of a node, which are there once they are prepared; nobody can have them."""

    there: list[object] = attrs.field(factory=list[object])

    async def has(self, image: str | Image) -> bool:
        await trio.lowlevel.checkpoint()
        return image in ("python", "node", *self.there)

    def name_of(self, image: str | Image) -> str:
        return str(image)

    @asynccontextmanager
    async def hold(self, image: str | Image, saved: object = None) -> AsyncGenerator[tuple[BuiltImage, SystemDisk]]:
        await trio.lowlevel.checkpoint()
        raise ImageError(f"{image} is no image")
        yield

    @asynccontextmanager
    async def lend(self, image: str | Image) -> AsyncGenerator[tuple[Cargo, tuple[Path, ...]]]:
        await trio.lowlevel.checkpoint()
        raise ImageError(f"{image} stays where it is")
        yield

    async def take(self, cargo: Cargo, open_file: Callable[[int, str], Receive]) -> None:
        pytest.fail("nobody has lent anything")


@attrs.define(eq=False)
class LocalHost:
    """What a node needs of a host; its sandboxes are real, and confined to nothing."""

    memory_mib: int = 10_000
    machines: list[FakeMachine] = attrs.field(factory=list[FakeMachine])
    """The machines of the sandboxes that were opened, whether they are there still or not."""
    open: int = 0
    prepared: list[object] = attrs.field(factory=list[object])
    failure: Exception | None = None
    """What the next opening raises."""
    waiting: int = 0
    gate: trio.Event | None = None
    """What the next opening waits for."""
    cache: Path = Path("/nonexistent/cache")
    """Where saved sandboxes are."""
    images: NodeImages = attrs.field(factory=FakeImages)
    """The images of its disk."""
    check: Callable[..., object] = lambda *_: None
    """Refuses saved sandboxes that a machine could not go on from."""
    directory: Path = Path("/nonexistent/trees")
    """Where its user's files are."""
    notes: ProgressNotes = attrs.field(factory=ProgressNotes)
    """What its long work says."""
    templates: list[str | None] = attrs.field(factory=list[str | None])
    """What was opened, a template or none."""

    @asynccontextmanager
    async def open_sandbox(
        self, image: str | Image, config: SandboxConfig | None = None, *, template: str | None = None
    ) -> AsyncGenerator[Sandbox]:
        if self.gate is not None:
            self.waiting += 1
            try:
                await self.gate.wait()
            finally:
                self.waiting -= 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.templates.append(template)
        async with open_local_sandbox(config) as (sandbox, machine):
            self.machines.append(machine)
            self.open += 1
            try:
                yield sandbox
            finally:
                self.open -= 1

    async def prepare(self, image: str | Image) -> None:
        await trio.lowlevel.checkpoint()
        self.prepared.append(image)
        if isinstance(self.images, FakeImages):
            self.images.there.append(image)

    def statistics(self) -> HostStatistics:
        admission = AdmissionStatistics(
            memory_mib_reserved=0,
            memory_mib_budget=self.memory_mib,
            vcpus_reserved=0,
            vcpu_budget=8,
            tasks_waiting=0,
        )
        return HostStatistics(self.open, len(self.machines), admission, WarmStatistics())


@attrs.define(eq=False)
class Wire:
    """What is between a node and its user: it passes bytes on, until it is told to do worse."""

    to: int
    """The port that it leads to."""
    host: str = "127.0.0.1"
    """Where that is."""
    port: int = 0
    ends: list[list[trio.SocketStream]] = attrs.field(factory=list[list[trio.SocketStream]])
    """The two ends of each connection, the user's and the node's, in the order in which they came."""
    delay: float = 0
    """Seconds that each piece is under way, one after the other."""
    spoiled: set[tuple[int, int]] = attrs.field(factory=set[tuple[int, int]])
    """Connections of which a bit of the next piece changes on its way to the user, 0, or to the node, 1."""
    pieces: int = 0
    """Pieces that were passed on."""
    deaf: bool = False
    """Whether new connections lead nowhere."""
    ignored: int = 0
    """How many did."""
    flowing: trio.Event = attrs.field(factory=trio.Event)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        self.go_on()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self.carry, [listener])

    async def carry(self, user: trio.SocketStream) -> None:
        if self.deaf:
            self.ignored += 1
            await trio.sleep_forever()
        try:
            node = await trio.open_tcp_stream(self.host, self.to)
        except OSError:  # the node has ended
            await trio.aclose_forcefully(user)
            return
        number = len(self.ends)
        self.ends.append([user, node])
        async with user, node, trio.open_nursery() as nursery:
            nursery.start_soon(self.pass_on, number, 1)
            await self.pass_on(number, 0)
            nursery.cancel_scope.cancel()

    async def pass_on(self, number: int, to: int) -> None:
        sink, source = self.ends[number][to], self.ends[number][1 - to]
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await self.flowing.wait()
                await trio.sleep(self.delay)
                if (number, to) in self.spoiled:
                    self.spoiled.remove((number, to))
                    data = data[:-1] + bytes([data[-1] ^ 1])
                await sink.send_all(data)
                self.pieces += 1
            await self.flowing.wait()
            await sink.send_eof()

    def stall(self) -> None:
        """Pass nothing on, not even an end, until `go_on`."""
        self.flowing = trio.Event()

    def go_on(self) -> None:
        """Pass on what has come, and what comes."""
        self.flowing.set()

    async def cut(self, connection: int | None = None) -> None:
        """Have both sides see the end of a connection, or of all."""
        for ends in self.ends if connection is None else [self.ends[connection]]:
            for end in ends:
                await trio.aclose_forcefully(end)


@attrs.define(eq=False)
class FakeNode:
    """A node that runs in this process."""

    host: LocalHost
    address: NodeAddress
    node: Node
    wire: Wire
    """The way to it."""


@attrs.define(eq=False)
class Fleet:
    """A fleet, and the nodes that it has."""

    host: FleetHost
    members: Members
    nodes: dict[str, FakeNode] = attrs.field(factory=dict[str, FakeNode])


@asynccontextmanager
async def open_fake_fleet(
    *names: str,
    fleet: FleetConfig | None = None,
    slots: int | None = None,
    host_config: HostConfig | None = None,
    **hosts: LocalHost,
) -> AsyncGenerator[Fleet]:
    """Yield a fleet of the nodes of those names; bounded, for a test that hangs to fail."""
    with trio.fail_after(HANG_LIMIT):
        async with trio.open_nursery() as nursery:
            config = fleet or FleetConfig(end_timeout=10)
            async with open_fleet(host_config or HostConfig(), config) as (host, members):
                opened = Fleet(host, members)
                for name in names:
                    fake = await start_node(nursery, name, hosts.get(name) or LocalHost())
                    opened.nodes[name] = fake
                    await members.join(fake.address, slots)
                yield opened
            # Without its user each node ends by itself; a wire does not.
            for fake in opened.nodes.values():
                await fake.node.left.wait()
            nursery.cancel_scope.cancel()


def open_fleet_of(hosts: Mapping[str, LocalHost]) -> AbstractAsyncContextManager[Fleet]:
    """Do `open_fake_fleet` with a node for each host."""
    return open_fake_fleet(*hosts, **cast("dict[str, Any]", hosts))


async def start_node(nursery: trio.Nursery, name: str, host: LocalHost, *, lease: float = 4) -> FakeNode:
    """Start a node, which ends with its user."""
    address, node = await nursery.start(
        partial(
            serve_node,
            host,
            Stock(host.cache, host.images, host.directory, host.check, host.notes),
            host.notes,
            name,
            lease=lease,
            patience=HANG_LIMIT,
        )
    )
    wire = Wire(address.port)
    await nursery.start(wire.serve)
    return FakeNode(host, attrs.evolve(address, port=wire.port), node, wire)
