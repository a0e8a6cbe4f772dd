"""Which node gets a sandbox, and who waits: first come, first served. No I/O."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Literal, final

import attrs

from .._config import HostConfig, SandboxConfig
from .._errors import CapacityError
from ..machines import charge_mib


@final
@attrs.frozen
class Demand:
    """What a sandbox takes of a node."""

    memory_mib: int
    vcpus: int
    slots: int = 1

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.memory_mib + other.memory_mib, self.vcpus + other.vcpus, self.slots + other.slots)

    def __mul__(self, count: int) -> Demand:
        return Demand(self.memory_mib * count, self.vcpus * count, self.slots * count)

    def fits(self, capacity: Demand) -> bool:
        return self.memory_mib <= capacity.memory_mib and self.vcpus <= capacity.vcpus and self.slots <= capacity.slots


def demand_of(config: SandboxConfig, overcommit: float = 1.0) -> Demand:
    """Return what a sandbox of *config* counts with on a node whose host has that `HostConfig.memory_overcommit`."""
    return Demand(charge_mib(config.memory_mib, overcommit), config.vcpus)


def most_of(config: HostConfig) -> Demand:
    """Return the most that a host of *config* gives out, however large its machine is."""
    return Demand(config.memory_budget_mib or sys.maxsize, config.vcpu_budget or sys.maxsize, sys.maxsize)


@final
@attrs.define(eq=False)
class Claim:
    """What somebody waits for, and gets or does not."""

    demand: Demand
    whole_mib: int = 0
    """What it may use of memory, where it counts with less: a node that never has that never opens it."""
    template: Hashable = None
    """What it starts from: a node that has opened one from that has the saved state of a machine."""
    prefer: frozenset[str] = frozenset()
    """The nodes that come first, if they have room: they have what was saved, and others fetch it from them."""
    refuse: frozenset[str] = frozenset()
    """The nodes that won't do."""
    node: str | None = None
    """The node that it was given."""
    error: CapacityError | None = None
    """Why it will never be given one."""

    @property
    def alone(self) -> Demand:
        """What it takes of a node that has nothing else."""
        return attrs.evolve(self.demand, memory_mib=max(self.demand.memory_mib, self.whole_mib))


@final
@attrs.define(eq=False)
class _Node:
    capacity: Demand
    taken: Demand = attrs.field(factory=lambda: Demand(0, 0, 0))
    open: bool = True
    failing: bool = False
    templates: set[Hashable] = attrs.field(factory=set[Hashable])

    def has_room(self, demand: Demand) -> bool:
        return (self.taken + demand).fits(self.capacity)

    @property
    def left(self) -> int:
        return self.capacity.memory_mib - self.taken.memory_mib


@final
class Placement:
    """Gives claims to nodes, in the order in which they came: a large one is not overtaken by small ones for ever.

    Args:
      policy: See `FleetConfig.placement`.
      largest: What a node may have that is not there yet: claims wait for such a one. None: none is to come.

    """

    def __init__(self, policy: Literal["spread", "pack"], largest: Demand | None = None) -> None:
        self._policy = policy
        self._largest = largest
        self._nodes: dict[str, _Node] = {}
        self._waiting: deque[Claim] = deque()

    @property
    def waiting(self) -> tuple[Claim, ...]:
        """The claims that wait, in their order."""
        return tuple(self._waiting)

    def wants(self) -> tuple[Demand, ...]:
        """Return what is waited for, in order."""
        return tuple(claim.demand for claim in self._waiting)

    def add(self, name: str, capacity: Demand) -> None:
        """Have one more node."""
        self._nodes[name] = _Node(capacity)

    def close(self, name: str) -> None:
        """Give nothing to a node any more; what it has stays. Again, or of none, is no error."""
        if name in self._nodes:
            self._nodes[name].open = False

    def remove(self, name: str) -> None:
        """Forget a node, and all that it has. Again is no error."""
        self._nodes.pop(name, None)

    def judge(self, name: str, *, failing: bool) -> None:
        """Note how the last start on a node went: one that fails has all of its room left, and would be given everything."""
        if name in self._nodes:
            self._nodes[name].failing = failing

    def submit(self, claim: Claim) -> None:
        """Have a claim wait; `settle` decides."""
        self._waiting.append(claim)

    def withdraw(self, claim: Claim) -> None:
        """Take a claim back, whatever became of it. Again is no error."""
        if claim in self._waiting:
            self._waiting.remove(claim)
        if claim.node is not None:
            self.give_back(claim.node, claim.demand)
            claim.node = None

    def check_copies(self, name: str, count: int) -> None:
        """Refuse so many copies of a sandbox of a node, if there may never be so many beside it.

        Raises:
          CapacityError: if so.

        """
        if (node := self._nodes.get(name)) is not None and count >= node.capacity.slots:
            raise CapacityError(
                f"{count} copies never fit on node {name} beside their original: it may have {node.capacity.slots} sandboxes, as Ray's "
                "resource `trio_sandbox` says. Nothing was done; ask for fewer"
            )

    def take(self, name: str, demand: Demand) -> None:
        """Note what a node has been given without being asked here: copies of what it has."""
        if (node := self._nodes.get(name)) is not None:
            node.taken += demand

    def give_back(self, name: str, demand: Demand) -> None:
        """Note that a node has so much more again."""
        if (node := self._nodes.get(name)) is not None:
            node.taken += demand * -1

    def settle(self) -> list[Claim]:
        """Decide what can be decided, and return the claims that it is decided of, in their order."""
        decided: list[Claim] = []
        waiting, self._waiting = self._waiting, deque()
        held: set[str] = set()  # nodes that are kept for those who wait already, as they will have room for them
        everywhere = sum(node.open for node in self._nodes.values())
        for claim in waiting:
            name = self._choose(claim, held) if len(held) < everywhere else None
            if name is not None:
                self._give(claim, name)
                decided.append(claim)
            elif self.has_place_for(claim) or self._may_come(claim):
                self._waiting.append(claim)
                if len(held) < everywhere:
                    held.update(self._able(claim))
            else:
                claim.error = self._refusal(claim)
                decided.append(claim)
        return decided

    def has_place_for(self, claim: Claim) -> bool:
        """Tell whether a node that is there will do for a claim, now or when others have given back what they have."""
        return next(self._able(claim), None) is not None

    def _able(self, claim: Claim) -> Iterator[str]:
        return (name for name in self._candidates(claim) if claim.alone.fits(self._nodes[name].capacity))

    def _candidates(self, claim: Claim) -> Iterator[str]:
        return (name for name, node in self._nodes.items() if node.open and name not in claim.refuse)

    def _choose(self, claim: Claim, held: set[str]) -> str | None:
        def order(name: str) -> tuple[bool, bool, int, int]:
            node = self._nodes[name]
            boots = claim.template not in node.templates
            # Whoever spreads wants to have the template everywhere in the end.
            first, second = (-node.left, boots) if self._policy == "spread" else (boots, node.left)
            return node.failing, name not in claim.prefer, first, second

        free = (name for name in self._able(claim) if name not in held and self._nodes[name].has_room(claim.demand))
        return min(free, key=order, default=None)

    def _give(self, claim: Claim, name: str) -> None:
        node = self._nodes[name]
        claim.node = name
        node.taken += claim.demand
        if claim.template is not None:
            node.templates.add(claim.template)

    def _may_come(self, claim: Claim) -> bool:
        has_source = not claim.prefer or any(name in self._nodes for name in claim.prefer)
        return self._largest is not None and has_source and claim.alone.fits(self._largest)

    def _refusal(self, claim: Claim) -> CapacityError:
        """Return the error for what fits on no node."""
        candidates = list(self._candidates(claim))
        wanted = (
            f"a sandbox that takes {claim.alone.memory_mib} MiB, with QEMU's own memory, and {claim.demand.vcpus} vCPUs"
        )
        if self._largest is not None and not claim.alone.fits(self._largest):
            return CapacityError(
                f"{wanted} never fits on a node of this fleet, however large that is: {_limits(claim.alone, self._largest)}. "
                "Nothing was started; ask for less, or raise that"
            )
        if not candidates:
            where = "to open it" if not claim.prefer else "that has what was saved, or could have it"
            return CapacityError(
                f"{wanted} can't be opened: no node is there {where} (nodes that are drained open none). Nothing was started; add a node, and try again, "
                "or have Ray's autoscaler add it: FleetConfig(autoscaling=True)"
            )
        nodes = ", ".join(
            f"{name} has {node.capacity.memory_mib} MiB, {node.capacity.vcpus} vCPUs and room for {node.capacity.slots} sandboxes"
            for name, node in ((name, self._nodes[name]) for name in candidates)
        )
        return CapacityError(
            f"{wanted} never fits on a node of this fleet: {nodes}. Nothing was started; ask for less, or add a larger node"
        )


def _limits(demand: Demand, most: Demand) -> str:
    """Say what a host's configuration allows, where that is less than *demand*."""
    both = (
        ("memory_budget_mib", demand.memory_mib, most.memory_mib, "MiB"),
        ("vcpu_budget", demand.vcpus, most.vcpus, "vCPUs"),
    )
    return " and ".join(
        f"`HostConfig.{field}` is {limit} {unit}" for field, wanted, limit, unit in both if wanted > limit
    )
