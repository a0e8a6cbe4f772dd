"""A host whose sandboxes are on many nodes."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Unpack, final

import attrs
import trio

from .._config import HostConfig, SandboxConfig, SandboxFields, sandbox_config
from .._entries import Home, open_block
from .._errors import SandboxClosedError
from .._image import DEFAULT_IMAGE, AnyImage, Image
from .._nurseries import Services, hide_nursery, open_services
from .._results import RunResult
from ..client import Functions
from ..image import check_directory, image_for_script, read_source
from ..machines import ProgressLog, SavedSandbox, check_image, fit
from ..network import Gateway, HostResolver, find_proxy, read_trust
from ..sandbox import ObservedSandbox, Sandbox
from ._client import NodeClient
from ._config import FleetConfig
from ._dial import NodeDialer
from ._lease import Lease
from ._life import RemoteLife
from ._machine import RemoteMachine
from ._members import FleetStatistics, Member, Members, Place
from ._messages import Open, Opened
from ._saved import Located, SavedSandboxes
from ._supply import Supply
from ._travel import check_travels, sandbox_there
from ._trees import deliver_mounts


@final
class FleetHost:
    """Opens sandboxes on the nodes of a fleet. Made by `open_ray_host`."""

    def __init__(self, config: HostConfig, fleet: FleetConfig, members: Members, background: trio.Nursery) -> None:
        self._config = config
        self._fleet = fleet
        self._members = members
        self._background = background
        self._home = Home()
        self._resolver = HostResolver()
        self._proxy = find_proxy(config.proxy)
        self._trust = read_trust(config.ca_certificates)
        self._saved = SavedSandboxes(lambda: members.clients)
        self._supply = Supply(lambda: members.clients)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._members.clients)} nodes"
        return f"<trio_sandbox.fleet.FleetHost: {state}>"

    def statistics(self) -> FleetStatistics:
        """Return numbers about the fleet as it is now."""
        return self._members.statistics()

    async def prepare(self, image: str | Image = DEFAULT_IMAGE) -> None:
        """Make sure that *image* is in the store of every node: it is built on one, and the others fetch it from nodes that have it.

        Arguments and errors are those of `Host.prepare`, where a node raises one. A node that is lost meanwhile is no error.
        """
        self._home.check("FleetHost.prepare()")
        wanted = check_travels(check_image(image))
        self._check_open()
        digests = await self._supply.read(wanted)
        failures: list[Exception] = []

        async def prepare(client: NodeClient) -> None:
            try:
                await self._supply.provide(client, wanted, digests)
            except Exception as exc:  # noqa: BLE001 - the first is raised outside, in no group
                if client.failure is None:
                    failures.append(exc)

        async with trio.open_nursery() as nursery:
            for client in self._members.clients:
                nursery.start_soon(prepare, client)
        if failures:
            raise failures[0]

    @open_block
    async def open_sandbox(
        self,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        *,
        template: str | None = None,
        **fields: Unpack[SandboxFields],
    ) -> AsyncGenerator[Sandbox]:
        """Start a virtual machine on a node and yield it as a `Sandbox`. When the block exits, the VM is destroyed.

        If no node has room for it now, it waits until others are closed or a node joins; tasks are served in the order of their
        calls, and later ones do not get a node that an earlier one waits for. `Sandbox.node` says where it is. Cancelled at any point, on the way in or out, it leaves nothing on the node.

        Its connections to the outside (`SandboxConfig.network`) are made from here, or from its node: see `FleetConfig.connections`. Nothing is tried again: when
        the node is lost, requests raise `SandboxClosedError` or `OutcomeUnknownError` that name it, and other sandboxes go on.

        Args:
          image: What the guest's code sees: the name of an image, or an `Image`.
          config: Memory, vCPUs and limits; the default is `SandboxConfig()`.
          template: The name of a saved sandbox to restore, as for `Host.open_sandbox`. It is restored on a node that has it, or if
            none of these has room, on one that fetches it. If there are several of that name, the newest is meant.
          **fields: Fields of a `SandboxConfig`, in place of *config*.

        Raises:
          TypeError, ValueError: if *template* is not a name, or *image* and *config* do not fit it; nothing was started.
          UnknownTemplateError: if no node has a saved sandbox of that name.
          ValueError: if *image* is an archive of this machine, which a node does not have, or is built with a function of this
            program; nothing was started.
          MountError: if a directory of `SandboxConfig.mounts` can't be read (at once), be copied to the node, or be mounted.
          CapacityError: at once, if it never fits on a node that is there, or with `FleetConfig.autoscaling` on none that may come;
            or what `Host.open_sandbox` raises of it on the node.
          SandboxClosedError: if the fleet's block was left, or the node is lost before it was asked; nothing was started.
          OutcomeUnknownError: if the node is lost while it opens the sandbox, which ends with it.
          Exception: besides, what `Host.open_sandbox` raises on the node.

        """
        self._home.check("the fleet")
        self._check_open()
        wanted = check_travels(check_image(image))
        config = sandbox_config(config, fields)
        located = None
        if template is not None:
            located = await self._saved.find(template)
            wanted, config = fit(located.saved, wanted, config, fields)
        config = config or SandboxConfig()
        for source in config.mounts.values():
            check_directory(source)
        digests = await self._supply.read(wanted)
        gateway = Gateway(
            config.network,
            self._resolver,
            connect_timeout=self._config.timeouts.connect,
            proxy=self._proxy,
            trust=self._trust,
        )
        with ObservedSandbox(wanted, config, "fleet") as observed:
            async with self._placed(wanted, config, digests, located) as (place, name):
                member = place.member
                async with (
                    deliver_mounts(member.client, config.mounts) as (mounts, remove_copies),
                    member.client.hold(
                        Open(name, attrs.evolve(sandbox_there(config), mounts=mounts), template), "opening a sandbox"
                    ) as opened,
                    open_services("open_sandbox()") as services,
                    self._adopt(member, services, opened, wanted, config, gateway, observed) as sandbox,
                ):
                    await remove_copies()  # they are on the disk of the machine
                    with self._members.counted(place):
                        yield sandbox

    @asynccontextmanager
    async def _placed(
        self, image: AnyImage, config: SandboxConfig, digests: tuple[str, ...], located: Located | None
    ) -> AsyncGenerator[tuple[Place, AnyImage]]:
        """Wait for a node with room, and have on it what the sandbox starts from; yield what to call the image there."""
        while True:  # noqa: ASYNC913 - it waits for a node
            async with self._members.placed(image, config, located) as place:
                client = place.member.client
                if located is None:
                    yield place, await self._supply.provide(client, image, digests)
                    return
                # What was saved stands on an image of its own node's.
                if client.name in located.nodes or await self._supply.provide_saved(client, located):
                    yield place, image
                    return
            located = located.without(client.name)

    @asynccontextmanager
    async def _adopt(
        self,
        member: Member,
        services: Services,
        opened: Opened,
        image: AnyImage,
        config: SandboxConfig,
        gateway: Gateway,
        observed: ObservedSandbox,
    ) -> AsyncGenerator[Sandbox]:
        """Yield the sandbox of a machine that a node has opened."""
        client = member.client
        machine = RemoteMachine(client, opened.offer)
        await services.start(machine.serve)

        @asynccontextmanager
        async def open_child(inner: Services, child: Opened, gateway: Gateway) -> AsyncGenerator[Sandbox]:
            with ObservedSandbox(image, config, "fork") as observed:
                async with self._adopt(member, inner, child, image, config, gateway, observed) as sandbox:
                    yield sandbox

        life: RemoteLife[Sandbox] = RemoteLife(
            client,
            opened,
            services,
            machine,
            config=config,
            timeouts=self._config.timeouts,
            gateway=gateway,
            background=self._background,
            open_child=open_child,
            hold_shares=lambda count: self._members.shares(client, config, count),
            saving=lambda name, replace: self._saved.saving(name, on=client.name, replace=replace),
            id=observed.id,
        )
        observed.tell_node(client.name)
        gateway.observe_in(observed.context)
        if self._fleet.connections == "node":
            gateway.dialer = NodeDialer(life.slot)
        try:
            if gateway.network:
                await life.network.switch(machine)
            if config.hibernate_after is not None:
                await services.start(life.serve_idleness, config.hibernate_after)
            timeouts = self._config.timeouts
            with observed.body():
                yield Sandbox(life.slot, image, config, timeouts, life, opened, None, life, node=client.name)
        finally:
            life.close()

    async def run(
        self,
        code: str,
        *,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        functions: Functions | None = None,
        check: bool = False,
        **fields: Unpack[SandboxFields],
    ) -> RunResult:
        """Run *code* in a virtual machine of its own, on a node, that is gone when this returns.

        Arguments, result and errors are those of `open_sandbox` and `Sandbox.run`. Cancelling destroys the virtual machine.
        """
        async with self.open_sandbox(image, config, **fields) as sandbox:
            return await sandbox.run(code, functions=functions, check=check)

    async def run_script(
        self,
        path: str | os.PathLike[str],
        *,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        functions: Functions | None = None,
        check: bool = False,
        **fields: Unpack[SandboxFields],
    ) -> RunResult:
        """Run a Python file of this machine on a node, as `Host.run_script` does. Errors are those of both."""
        self._home.check("FleetHost.run_script()")
        source = await read_source(path)
        wanted = image_for_script(check_image(image), source)
        return await self.run(source, image=wanted, config=config, functions=functions, check=check, **fields)

    async def saved_sandboxes(self) -> dict[str, tuple[SavedSandbox, ...]]:
        """Return the sandboxes that were saved on each node, by the node's name, in the order in which nodes have joined; see `trio_sandbox.saved_sandboxes`.

        Nodes on one disk have the same ones. A node that is lost meanwhile is left out.

        Raises:
          SandboxClosedError: if the fleet's block was left.
          OSError: if a node can't read its cache directory.

        """
        self._home.check("FleetHost.saved_sandboxes()")
        self._check_open()
        return await self._saved.list_all()

    async def remove_saved_sandbox(self, name: str) -> int:
        """Remove what was saved as *name* from every node that has it; return the bytes that came free. It can't be made again.

        Sandboxes restored from it are not disturbed. Cancelled: it is gone from some nodes, or from all.

        Raises:
          TypeError, ValueError: for what can't be a name.
          UnknownTemplateError: if no node has it; the message lists those that exist.
          SandboxClosedError: if the fleet's block was left.
          OSError: if a node can't remove it.

        """
        self._home.check("FleetHost.remove_saved_sandbox()")
        self._check_open()
        return await self._saved.remove(name)

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxClosedError("the fleet's block has exited; open another")

    def _close(self) -> None:
        self._closed = True


@asynccontextmanager
async def open_fleet(config: HostConfig, fleet: FleetConfig) -> AsyncGenerator[tuple[FleetHost, Members]]:
    """Yield a fleet, and its nodes, which are none yet; when the block exits, all of them are let go."""
    async with open_services("a fleet") as services:
        lease = Lease(fleet.lease)
        await services.start(lease.serve)
        members = Members(fleet, services, lease, ProgressLog(config.progress), config)
        with hide_nursery("a fleet"):
            async with trio.open_nursery() as background:
                host = FleetHost(config, fleet, members, background)
                try:
                    yield host, members
                finally:
                    host._close()  # pyright: ignore[reportPrivateUsage]
                    background.cancel_scope.cancel(reason="the fleet's block was left")
