"""A node in a process of its own: ``python -m tests.fleet.far_node ADDRESS LEASE [machines]``; without the last its sandboxes are no virtual machines.

It prints where it is, serves one user until that is lost, and prints how many sandboxes it has then.
"""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import trio

from tests.fake._fleet import LocalHost
from trio_sandbox import HostConfig, open_host
from trio_sandbox.fleet._node import NodeHost, serve_node
from trio_sandbox.fleet._progress import ProgressNotes
from trio_sandbox.fleet._stock import Stock


@asynccontextmanager
async def open_node_host(machines: bool) -> AsyncGenerator[tuple[NodeHost, Stock]]:
    """Yield a host, and what is on its disk."""
    if machines:
        async with open_host(HostConfig(memory_budget_mib=1500, vcpu_budget=4)) as host:
            yield host, Stock.of(host)
    else:
        local = LocalHost()
        yield local, Stock(local.cache, local.images, local.directory, local.check, local.notes)


async def main(address: str, lease: float, machines: bool) -> None:
    async with open_node_host(machines) as (host, stock):
        async with trio.open_nursery() as nursery:
            serve = partial(serve_node, host, stock, ProgressNotes(), "far", address=address, lease=lease, patience=60)
            where, _ = await nursery.start(serve)
            print(base64.b64encode(pickle.dumps(where)).decode(), flush=True)
        print(f"left {host.statistics().sandboxes_open}", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], float(sys.argv[2]), sys.argv[3:] == ["machines"])
