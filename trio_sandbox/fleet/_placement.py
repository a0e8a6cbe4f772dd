"""Which node gets a sandbox, and who waits: first come, first served. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Literal, final

import attrs

from .. import constants
from .._config import SandboxConfig
from .._errors import CapacityError


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


def demand_of(config: SandboxConfig) -> Demand:
    """Return what a sandbox of *config* takes."""
    return Demand(config.memory_mib + constants.VM_OVERHEAD_MIB, config.vcpus)


@final
@attrs.define(eq=False)
class Claim:
    """What somebody waits for, and gets or does not."""

    demand: Demand
    template: Hashable = None
    """What it starts from: a node that has opened one from that has the saved state of a machine."""
    prefer: frozenset[str] = frozenset()
    """The nodes that come first, if they have room."""
    refuse: frozenset[str] = frozenset()
    """The nodes that won't do."""
    node: str | None = None
    """The node that it was given."""
    error: CapacityError | None = None
    """Why it will never be given one."""


@final
@attrs.frozen
class Wants:
    """What a fleet has, and what it would have if there were more nodes."""

    taken: dict[str, int]
    """Sandboxes that each node has, by its name."""
    waiting: int
    """Sandboxes that wait for room on whatever node."""


@final
@attrs.define(eq=False)
class _Node:
    capacity: Demand
    taken: Demand = attrs.field(factory=lambda: Demand(0, 0, 0))
    open: bool = True
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

    """

    def __init__(self, policy: Literal["spread", "pack"]) -> None:
        self._policy = policy
        self._nodes: dict[str, _Node] = {}
        self._waiting: deque[Claim] = deque()

    @property
    def waiting(self) -> tuple[Claim, ...]:
        """The claims that wait, in their order."""
        return tuple(self._waiting)

    def wants(self) -> Wants:
        """Return what there is, and what is waited for."""
        return Wants({name: node.taken.slots for name, node in self._nodes.items()}, len(self._waiting))

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
        while self._waiting:
            claim = self._waiting[0]
            if (error := self._never(claim)) is not None:
                claim.error = error
            else:
                name = self._choose(claim)
                if name is None:
                    break
                claim.node = name
                node = self._nodes[name]
                node.taken += claim.demand
                if claim.template is not None:
                    node.templates.add(claim.template)
            self._waiting.popleft()
            decided.append(claim)
        # What never fits need not wait for its turn to be told.
        for claim in [each for each in self._waiting if self._never(each) is not None]:
            claim.error = self._never(claim)
            self._waiting.remove(claim)
            decided.append(claim)
        return decided

    def _candidates(self, claim: Claim) -> Iterable[tuple[str, _Node]]:
        return [(name, node) for name, node in self._nodes.items() if node.open and name not in claim.refuse]

    def _choose(self, claim: Claim) -> str | None:
        fitting = [(name, node) for name, node in self._candidates(claim) if node.has_room(claim.demand)]
        if not fitting:
            return None

        def order(item: tuple[str, _Node]) -> tuple[bool, int, int]:
            name, node = item
            boots = claim.template not in node.templates
            # Whoever spreads wants to have the template everywhere in the end.
            first, second = (-node.left, boots) if self._policy == "spread" else (boots, node.left)
            return name not in claim.prefer, first, second

        return min(fitting, key=order)[0]

    def _never(self, claim: Claim) -> CapacityError | None:
        candidates = self._candidates(claim)
        if any(claim.demand.fits(node.capacity) for _, node in candidates):
            return None
        wanted = f"a sandbox that takes {claim.demand.memory_mib} MiB, with QEMU's own memory, and {claim.demand.vcpus} vCPUs"
        if not candidates:
            where = "to open it" if not claim.prefer else "that has what was saved, or could have it"
            return CapacityError(
                f"{wanted} can't be opened: no node is there {where} (nodes that are drained open none). Nothing was started; add a node, and try again"
            )
        nodes = ", ".join(
            f"{name} has {node.capacity.memory_mib} MiB, {node.capacity.vcpus} vCPUs and room for {node.capacity.slots} sandboxes"
            for name, node in candidates
        )
        return CapacityError(
            f"{wanted} never fits on a node of this fleet: {nodes}. Nothing was started; ask for less, or add a larger node"
        )
