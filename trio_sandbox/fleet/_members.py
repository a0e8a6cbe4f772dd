"""The nodes of a fleet, and who gets which."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import final

import attrs
import trio

from .._config import HostConfig, Progress, SandboxConfig
from .._errors import NodeLostError
from .._image import AnyImage
from .._nurseries import Services
from .._observe import measure, part_logger, span
from ..host import HostStatistics
from ._client import MOST_SANDBOXES, NodeClient
from ._config import FleetConfig
from ._lease import Lease
from ._messages import NodeAddress
from ._placement import Claim, Demand, Placement, demand_of, most_of
from ._saved import Located
from ._travel import sandbox_there

_log = part_logger("fleet")


@final
@attrs.frozen
class NodeStatistics:
    """Numbers about one node of a fleet."""

    name: str
    """Its name."""
    sandboxes_open: int
    """Sandboxes that this program has open there now."""
    draining: bool
    """Whether it opens no more."""
    lost: bool
    """Whether it is gone, and its sandboxes with it."""
    host: HostStatistics | None
    """What the node last reported of its host; a second old at most while the node is not lost."""


@final
@attrs.frozen
class FleetStatistics:
    """Numbers about a fleet."""

    sandboxes_open: int
    """Sandboxes that are open now, copies aside."""
    sandboxes_opened: int
    """Sandboxes that were opened since the fleet was, copies aside."""
    tasks_waiting: int
    """Tasks that wait for room on a node."""
    nodes: tuple[NodeStatistics, ...]
    """The nodes that have joined, in their order; those that are lost included."""


@final
@attrs.define(eq=False)
class Member:
    """One node of a fleet."""

    client: NodeClient
    open: int = 0
    """Sandboxes that are open there."""


@final
@attrs.define(eq=False)
class Place:
    """A sandbox's share of a node."""

    member: Member
    opened: bool = False
    """Whether the sandbox has been opened there."""


@final
class Members:
    """The nodes that have joined, and the sandboxes that are placed on them.

    Args:
      fleet: How the fleet works.
      services: Those of its block.
      lease: Watches the connections.
      progress: Told what the long work of nodes says.
      host: How the host of each node works.

    """

    def __init__(
        self,
        fleet: FleetConfig,
        services: Services,
        lease: Lease,
        progress: Callable[[Progress], object],
        host: HostConfig,
    ) -> None:
        self._progress = progress
        self._fleet = fleet
        self._services = services
        self._lease = lease
        self._overcommit = host.memory_overcommit
        self._members: dict[str, Member] = {}
        self._placement = Placement(fleet.placement, most_of(host) if fleet.autoscaling else None)
        self._waiting: dict[Claim, trio.Event] = {}
        self._open = self._opened = 0

    def statistics(self) -> FleetStatistics:
        """Return numbers about the fleet as it is now."""
        return FleetStatistics(
            self._open,
            self._opened,
            len(self._placement.waiting),
            tuple(
                NodeStatistics(
                    name,
                    member.open,
                    member.client.draining,
                    member.client.failure is not None,
                    member.client.statistics,
                )
                for name, member in self._members.items()
            ),
        )

    def wants(self) -> tuple[Demand, ...]:
        """Return what is waited for that one more node could give, in order."""
        return self._placement.wants()

    def has_joined(self, name: str) -> bool:
        """Tell whether a node has joined; it may be lost since."""
        return name in self._members

    async def join(self, address: NodeAddress, slots: int | None = None) -> None:
        """Have one more node, which is connected to; at most *slots* sandboxes are placed there, and `MOST_SANDBOXES`.

        Raises:
          LinkError, WrongNodeError: if it can't be connected to.

        """
        client = NodeClient(address, lease=self._lease, end_timeout=self._fleet.end_timeout)
        client.on_progress = lambda each: self._progress(attrs.evolve(each, stage=f"node {client.name}: {each.stage}"))
        await self._services.start(client.serve)
        statistics = client.statistics
        assert statistics is not None
        budget = statistics.admission
        self._members[client.name] = Member(client)
        self._placement.add(
            client.name,
            Demand(
                budget.memory_mib_budget,
                budget.vcpu_budget,
                MOST_SANDBOXES if slots is None else min(slots, MOST_SANDBOXES),
            ),
        )
        client.on_news = lambda: self._hear(client)
        self._hear(client)  # it may be lost, or drained, since it was asked
        self._settle()
        _log.info("node %s has joined", client.name)

    def failure(self, name: str) -> NodeLostError | None:
        """Return why a node is lost; None while it is not, or if it has never joined."""
        return None if (member := self._members.get(name)) is None else member.client.failure

    def lose(self, name: str, why: str) -> None:
        """Take a node for lost, as whoever supervises it says. Again, or of none, is no error."""
        if (member := self._members.get(name)) is not None:
            member.client.lose(why)

    def _hear(self, client: NodeClient) -> None:
        if client.failure is not None:
            self._placement.remove(client.name)
        elif client.draining:
            self._placement.close(client.name)
        else:
            return  # its numbers change nothing for those who wait
        self._settle()

    def _settle(self) -> None:
        for claim in self._placement.settle():
            self._waiting[claim].set()

    @asynccontextmanager
    async def placed(
        self, image: AnyImage, config: SandboxConfig, saved: Located | None = None
    ) -> AsyncGenerator[Place]:
        """Wait for a node with room, best one of those that have what was *saved*, first come, first served; hold that for the block.

        A node on which the block fails before the sandbox is `counted` is given to others only if no other node has room.
        """
        template = (image, attrs.evolve(sandbox_there(config), mounts={}))
        claim = Claim(demand_of(config, self._overcommit), demand_of(config).memory_mib, template)
        if saved is not None:
            claim.template, claim.prefer, claim.refuse = saved.saved.marker, saved.nodes, saved.refused
        decided = self._waiting[claim] = trio.Event()
        try:
            with span("admit", memory_mib=claim.demand.memory_mib):
                began = trio.current_time()
                self._placement.submit(claim)
                self._settle()
                if not decided.is_set() and not self._placement.has_place_for(claim):
                    _log.info("a sandbox waits for a node that is larger than those that are there: %s", claim.demand)
                await decided.wait()
                measure("admission.duration", trio.current_time() - began)
            if claim.error is not None:
                raise claim.error
            assert claim.node is not None
            place = Place(self._members[claim.node])
            try:
                yield place
            except Exception:
                if not place.opened:
                    self._placement.judge(claim.node, failing=True)
                raise
        finally:
            self._placement.withdraw(claim)
            del self._waiting[claim]
            self._settle()

    @contextmanager
    def counted(self, place: Place) -> Generator[None]:
        """Count a sandbox as open, for a block."""
        member, place.opened = place.member, True
        self._placement.judge(member.client.name, failing=False)
        member.open += 1
        self._open += 1
        self._opened += 1
        try:
            yield
        finally:
            member.open -= 1
            self._open -= 1

    @property
    def clients(self) -> list[NodeClient]:
        """The nodes that are not lost."""
        return [member.client for member in self._members.values() if member.client.failure is None]

    @asynccontextmanager
    async def shares(self, client: NodeClient, config: SandboxConfig, count: int) -> AsyncGenerator[None]:
        """Note for a block that a node has so many copies of a sandbox more.

        Raises:
          CapacityError: if it may never have so many.

        """
        self._placement.check_copies(client.name, count)
        demand = demand_of(config, self._overcommit) * count
        await trio.lowlevel.checkpoint()
        self._placement.take(client.name, demand)
        try:
            yield
        finally:
            self._placement.give_back(client.name, demand)
            self._settle()
