"""A node in a process of its own, without virtual machines: ``python -m tests.fleet.far_node ADDRESS LEASE``.

It prints where it is, serves one user until that is lost, and prints how many sandboxes it has then.
"""

from __future__ import annotations

import base64
import pickle
import sys
from functools import partial

import trio

from tests.fake._fleet import LocalHost
from trio_sandbox.fleet._node import serve_node
from trio_sandbox.fleet._stock import Stock


async def main(address: str, lease: float) -> None:
    host = LocalHost()
    async with trio.open_nursery() as nursery:
        where, _ = await nursery.start(
            partial(
                serve_node,
                host,
                Stock(host.cache, host.images, host.directory),
                host.notes,
                "far",
                address=address,
                lease=lease,
                patience=60,
            )
        )
        print(base64.b64encode(pickle.dumps(where)).decode(), flush=True)
    print(f"left {host.open}", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], float(sys.argv[2]))
