"""Sandboxes on the nodes of a Ray cluster."""

from __future__ import annotations

import trio

from trio_sandbox.fleet import FleetHost, open_ray_host


async def answer(host: FleetHost, number: int) -> None:
    async with host.open_sandbox("python") as sandbox:
        result = await sandbox.run(f"print({number} ** 2)")
        print(f"{sandbox.node}: {result.stdout}", end="")


async def main() -> None:
    async with open_ray_host() as host, trio.open_nursery() as nursery:  # "auto": the cluster of this machine
        for number in range(4):
            nursery.start_soon(answer, host, number)


if __name__ == "__main__":
    trio.run(main)
