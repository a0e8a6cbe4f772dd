"""Who waits for room is shown to Ray, whose autoscaler then adds nodes.

Ray does not know of sandboxes: it takes the resource `trio_sandbox` of each node for unused. So each sandbox that waits is a placement group that
may be on none of the nodes that are there, for none of them has room for it: it is pending until a further node comes. The groups end
with the fleet, and with the program, however that ends.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, final

from ._placement import Demand

#: The custom resource of Ray's that says how many sandboxes a node may have.
SLOTS: Final = "trio_sandbox"
#: Sandboxes that Ray is told of at a time as waiting: more nodes for more of them come when these are there.
MOST_WAITING: Final = 64


@final
class Demands:
    """What Ray was told. For any thread: Ray's calls block, for as long as its head is silent.

    Args:
      ray: The module.

    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._telling = threading.Lock()
        self._told: dict[tuple[str, int], list[Any]] = {}  # groups, by the nodes that are not for them and their MiB

    def tell(self, nodes: Iterable[str], waiting: Sequence[Demand]) -> None:
        """Have Ray know what is waited for, and that it is not to be had of *nodes*."""
        others = ",".join(sorted(nodes))  # Ray takes a space for a part of the value
        with self._telling:
            self._tell(others, waiting)

    def _tell(self, others: str, waiting: Sequence[Demand]) -> None:
        wanted = Counter((others, demand.memory_mib) for demand in waiting[:MOST_WAITING])
        for key in [*self._told]:
            groups = self._told[key]
            while len(groups) > wanted[key]:
                self._ray.util.remove_placement_group(groups[-1])
                groups.pop()
            if not groups:
                del self._told[key]
        for key, count in wanted.items():
            groups = self._told.setdefault(key, [])
            while len(groups) < count:
                groups.append(self._ask(*key))

    def _ask(self, others: str, memory_mib: int) -> Any:
        # vCPUs are given out several times over, which Ray does not do with its CPUs.
        bundle = {SLOTS: 1, "memory": memory_mib * 2**20}
        where = {"bundle_label_selector": [{"ray.io/node-id": f"!in({others})"}]} if others else {}
        return self._ray.util.placement_group([bundle], **where)
