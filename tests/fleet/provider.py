"""What gives Ray's autoscaler new nodes: processes of this machine. Ray's autoscaler imports it."""

from __future__ import annotations

import importlib
import secrets
from typing import Any

Provider: Any = importlib.import_module("ray.autoscaler._private.fake_multi_node.node_provider").FakeMultiNodeProvider


class OnThisMachine(Provider):  # type: ignore[misc]
    """Ray's own for tests, but that its nodes have ids as others do, and find out by themselves how much memory they have."""

    def _next_hex_node_id(self) -> str:
        return secrets.token_hex(28)

    def create_node_with_resources_and_labels(
        self, node_config: object, tags: object, count: int, resources: dict[str, float], labels: object
    ) -> None:
        found = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(  # pyright: ignore[reportUnknownMemberType]
            node_config, tags, count, found, labels
        )
