"""A fleet whose nodes come when they are needed, from Ray's autoscaler: ``nox -s fleet``."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox.fleet import FleetConfig, open_ray_host
from trio_sandbox.fleet._ray import import_ray

from ._cluster import CONFIG, cluster_with, demands, hold_sandbox

ROOT = Path(__file__).parents[2]
#: What Ray's provider for tests calls the head.
HEAD = "f" * 51 + "00000"
#: Seconds that a node may have nothing to do, for Ray, before it is removed.
IDLE = 6
#: Nodes that there may be, each for one sandbox.
MOST = 2


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Any]:
    """Give a cluster of a head, whose autoscaler may add `MOST` nodes."""
    for name, value in {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PYTHONPATH": os.fspath(ROOT),
    }.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    config: dict[str, object] = {
        "cluster_name": "fleet",
        "max_workers": MOST,
        "idle_timeout_minutes": IDLE / 60,
        "provider": {
            "type": "external",
            "module": "tests.fleet.provider.OnThisMachine",
            "gcs_address": f"{import_ray().util.get_node_ip_address()}:{port}",
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "trio_sandbox": 1, "memory": 4 * 2**30, "object_store_memory": 150 * 2**20},
                "node_config": {},
                "max_workers": MOST,
            },
        },
        "head_node_type": "ray.head.default",
        # Nothing is installed, and nothing is copied.
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(config))
    head = {
        "gcs_server_port": port,
        "autoscaling_config": os.fspath(file),
        "env_vars": {
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_NODE_TYPE_NAME": "ray.head.default",
        },
    }
    with cluster_with(head) as cluster:
        (autoscaler,) = cluster.head_node.all_processes["monitor"]
        try:
            yield cluster
        finally:
            # Nodes that it has added outlive it.
            for pid in descendants(autoscaler.process.pid):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Give the children of a process, and theirs, and so on; parents first."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [each for child in children for each in (child, *descendants(child))]


async def test_nodes_come_when_they_are_needed(cluster: Any) -> None:
    fleet = FleetConfig(autoscaling=True, start_timeout=120)
    async with open_ray_host(cluster.address, CONFIG, fleet) as host:
        assert host.statistics().nodes == (), "the head has no sandboxes"
        began = trio.current_time()
        async with host.open_sandbox() as first:
            print(f"the first sandbox was open after {trio.current_time() - began:.1f} s, with its node")
            assert (await first.run("print(6 * 7)")).stdout == "42\n"
            async with host.open_sandbox() as second:
                assert {node.name for node in host.statistics().nodes} == {first.node, second.node}
                assert demands(cluster) == []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(hold_sandbox, host)
                    await wait_until(lambda: len(demands(cluster)) == 1)
                    await trio.sleep(2 * IDLE)
                    assert host.statistics().tasks_waiting == 1, "there are no more nodes to be had"
                    nursery.cancel_scope.cancel()
                for sandbox in (first, second):
                    assert (await sandbox.run("print('here')")).stdout == "here\n", "a node with a sandbox is not idle"
            await trio.sleep(2 * IDLE)
            assert [node.lost for node in host.statistics().nodes] == [False, False], "nor is one without, for now"
