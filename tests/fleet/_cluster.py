"""Clusters of Ray's whose nodes are all on this machine."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import trio

from trio_sandbox import HostConfig
from trio_sandbox.fleet import FleetConfig, FleetHost

#: What each node's host may take, so that a few of them fit on a small machine.
CONFIG = HostConfig(memory_budget_mib=1500, vcpu_budget=4)
FLEET = FleetConfig(start_timeout=120)


@contextmanager
def cluster_of(nodes: int, *, slots: int = 3, **settings: object) -> Generator[Any]:
    """Yield a cluster whose head has no sandboxes, and each of *nodes* others at most *slots*; *settings* are of Ray's own system."""
    with cluster_with({"_system_config": settings}) as cluster:
        for _ in range(nodes):
            add_node(cluster, slots)
        cluster.wait_for_nodes()
        yield cluster


def add_node(cluster: Any, slots: int, **environment: str) -> str:
    """Add a node with room for *slots* sandboxes, which has more in its environment; return its name in a fleet."""
    node = cluster.add_node(num_cpus=1, resources={"trio_sandbox": slots}, env_vars=environment or None)
    return f"{socket.gethostname()}-{node.node_id[:8]}"


@contextmanager
def cluster_with(head: Mapping[str, object]) -> Generator[Any]:
    """Yield a cluster with a head only, for which *head* says more."""
    cluster = importlib.import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **head}
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def demands(cluster: Any) -> list[dict[str, float]]:
    """Return what Ray says to its autoscaler, and by ``ray status``, that placement groups wait for."""
    status = importlib.import_module("ray.autoscaler.v2.sdk").get_cluster_status(cluster.address)
    groups = status.resource_demands.placement_group_demand
    return [each.bundle for group in groups for each in group.bundles_by_count for _ in range(each.count)]


async def hold_sandbox(host: FleetHost) -> None:
    """Have a sandbox until cancelled."""
    async with host.open_sandbox():
        await trio.sleep_forever()
