"""Who waits for room is shown to Ray, whose autoscaler then adds nodes.

Ray does not know of sandboxes: it takes our processes for idle, and the resource `trio_sandbox` for unused. So while somebody waits, and only
then, what is taken is booked with Ray, and what is wanted besides is asked for: placement groups, one for each node and one for each sandbox
that waits. They end with the program, however it ends.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Final, final

from ._placement import Wants

_log = logging.getLogger("trio_sandbox.fleet")

#: The custom resource of Ray's that says how many sandboxes a node may have.
SLOTS: Final = "trio_sandbox"
#: Sandboxes that Ray is told of at a time as waiting: more nodes for more of them come when these are there.
MOST_WAITING: Final = 64


@final
class Demands:
    """What Ray was told. For one thread at a time: Ray's calls block.

    Args:
      ray: The module.

    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._told: dict[tuple[str, int], list[Any]] = {}  # groups, by the node that they are for and their slots

    def tell(self, wants: Wants) -> None:
        """Have Ray know what is taken, and what is waited for, if anything is."""
        wanted: Counter[tuple[str, int]] = Counter()
        if wants.waiting:
            wanted = Counter({(node, slots): 1 for node, slots in wants.taken.items() if slots})
            wanted["", 1] = min(wants.waiting, MOST_WAITING)
        for key in [*self._told]:
            groups = self._told[key]
            while len(groups) > wanted[key]:
                self._ray.util.remove_placement_group(groups.pop())
            if not groups:
                del self._told[key]
        for key, count in wanted.items():
            groups = self._told.setdefault(key, [])
            while len(groups) < count:
                groups.append(self._ask(*key))

    def _ask(self, node: str, slots: int) -> Any:
        where = {"bundle_label_selector": [{"ray.io/node-id": node}]} if node else {}
        return self._ray.util.placement_group([{SLOTS: slots}], **where)
