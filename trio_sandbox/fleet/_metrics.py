"""Numbers for Ray's own metrics, which whoever watches a Ray cluster reads: with Prometheus, at each node's metrics port."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar, final

from ..host import HostStatistics
from ._members import FleetStatistics

Numbers = TypeVar("Numbers")

#: What a node tells: a name, what it is, and the number.
OF_A_NODE: Final[Mapping[str, tuple[str, Callable[[HostStatistics], int]]]] = {
    "node_sandboxes_open": ("Sandboxes that are open on the node, for one program", lambda host: host.sandboxes_open),
    "node_sandboxes_opened": (
        "Sandboxes opened on the node so far, for one program",
        lambda host: host.sandboxes_opened,
    ),
    "node_memory_reserved_mib": (
        "Memory that sandboxes of one program have",
        lambda host: host.admission.memory_mib_reserved,
    ),
    "node_memory_budget_mib": ("Memory that they may have", lambda host: host.admission.memory_mib_budget),
    "node_vcpus_reserved": (
        "Virtual CPUs that sandboxes of one program have",
        lambda host: host.admission.vcpus_reserved,
    ),
    "node_vcpus_budget": ("Virtual CPUs that they may have", lambda host: host.admission.vcpu_budget),
    "node_tasks_waiting": (
        "Sandboxes that wait on the node for its memory or vCPUs",
        lambda host: host.admission.tasks_waiting,
    ),
}
#: What a program tells of its fleet.
OF_A_FLEET: Final[Mapping[str, tuple[str, Callable[[FleetStatistics], int]]]] = {
    "fleet_sandboxes_open": ("Sandboxes that the program has open", lambda fleet: fleet.sandboxes_open),
    "fleet_sandboxes_opened": ("Sandboxes that the program has opened so far", lambda fleet: fleet.sandboxes_opened),
    "fleet_tasks_waiting": ("Sandboxes that wait for room on any node", lambda fleet: fleet.tasks_waiting),
    "fleet_nodes": ("Nodes that the program has", lambda fleet: sum(not node.lost for node in fleet.nodes)),
    "fleet_nodes_lost": ("Nodes that it has lost so far", lambda fleet: sum(node.lost for node in fleet.nodes)),
}


@final
class Gauges(Generic[Numbers]):
    """Gauges of Ray's, which are told when they have changed.

    Args:
      table: `OF_A_NODE` or `OF_A_FLEET`.
      **tags: What tells these from those of others.

    """

    def __init__(self, table: Mapping[str, tuple[str, Callable[[Numbers], int]]], **tags: str) -> None:
        gauge: Any = importlib.import_module("ray.util.metrics").Gauge
        self._gauges: list[tuple[Any, Callable[[Numbers], int]]] = []
        self._told: dict[int, int] = {}
        for name, (description, read) in table.items():
            made = gauge(f"trio_sandbox_{name}", description=description, tag_keys=tuple(tags))
            made.set_default_tags(tags)
            self._gauges.append((made, read))

    def tell(self, numbers: Numbers) -> None:
        """Tell what has changed."""
        for index, (gauge, read) in enumerate(self._gauges):
            value = read(numbers)
            if self._told.get(index) != value:
                self._told[index] = value
                gauge.set(value)
