"""A fleet on Ray of a node that has room, and one with a small disk of its own: ``python -m tests.fleet.full_disk SCENARIO``.

It needs a mount namespace of its own to begin with: ``unshare --mount``, as root or with ``--user --map-root-user``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Literal, Unpack

import attrs
import pytest
import trio

from tests._leaks import HANG_LIMIT, wait_until
from trio_sandbox import CapacityError, ImageBuildError, MountError, SandboxError
from trio_sandbox._config import SandboxFields
from trio_sandbox.fleet import FleetHost, open_ray_host
from trio_sandbox.image import default_cache_directory

from ._cluster import CONFIG, FLEET, add_node, cluster_with

ROOT = Path(__file__).parents[2]
#: Sandboxes that each node has room for.
SLOTS = 2


def size(path: Path) -> int:
    """Return the size of a file, which may be removed just now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@attrs.define(eq=False)
class Nodes:
    """The two nodes, and the disk of the one."""

    roomy: str
    small: str
    disk: Path

    def fill(self, *, but_mib: int = 0) -> Path:
        """Write to the disk until it is full but for so much; return what was written."""
        file = self.disk / "full"
        with file.open("xb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(2**20))
            filler.truncate(filler.tell() - but_mib * 2**20)
        return file

    def files(self, below: str = "") -> list[str]:
        """Return the names of files that are there, empty ones aside."""
        return [name for place, _, names in os.walk(self.disk / below) for name in names if size(Path(place, name))]

    def images(self) -> list[str]:
        """Return the names of files of images, whole or not, in its cache."""
        return self.files("trio-sandbox/store") + self.files("trio-sandbox/staging")

    async def failure(self, host: FleetHost, **fields: Unpack[SandboxFields]) -> Exception:
        """Open sandboxes until one comes to the small node, which does not open it; return why."""
        async with contextlib.AsyncExitStack() as stack:
            with pytest.raises((ImageBuildError, CapacityError, MountError)) as info:
                for _ in range(SLOTS + 1):
                    sandbox = await stack.enter_async_context(host.open_sandbox(**fields))
                    assert sandbox.node == self.roomy
        return self.told(info.value)

    def told(self, failure: SandboxError) -> SandboxError:
        """Check that a failure says where it was, and return it."""
        print(f"{type(failure).__name__}: {failure}; {getattr(failure, '__notes__', '')}")
        assert self.small in f"{failure} {getattr(failure, '__notes__', '')}"
        assert failure.retry_safe
        return failure

    async def use_both(self, host: FleetHost) -> None:
        """Have a sandbox on each."""
        async with contextlib.AsyncExitStack() as stack:
            nodes = {(await stack.enter_async_context(host.open_sandbox())).node for _ in range(SLOTS + 1)}
        assert nodes == {self.roomy, self.small}


async def where(host: FleetHost) -> str | None:
    """Open a sandbox, and return its node."""
    async with host.open_sandbox() as sandbox:
        assert (await sandbox.run("print('here')")).stdout == "here\n"
        return sandbox.node


# --- Scenarios ---


async def no_room_for_an_image(nodes: Nodes, host: FleetHost) -> None:
    """It is not fetched, nor built; when there is room, it is fetched. The disk is full from the beginning."""
    with pytest.raises(ImageBuildError, match="MiB free") as info:
        await host.prepare()
    nodes.told(info.value)
    assert "MiB free" in str(await nodes.failure(host))
    assert [await where(host) for _ in range(3)] == [nodes.roomy] * 3, "the other node goes on"
    assert nodes.images() == []
    (nodes.disk / "full").unlink()
    await nodes.use_both(host)


async def an_image_fills_the_disk(nodes: Nodes, host: FleetHost) -> None:
    """Another program has taken the room meanwhile. When it is there again, so is the node; then it is full of other things."""

    async def fill_soon() -> None:
        await wait_until(lambda: nodes.files("trio-sandbox/staging") != [])
        nodes.fill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill_soon)
        with pytest.raises(ImageBuildError, match="is full") as info:
            await host.prepare()
    nodes.told(info.value)
    assert nodes.files("trio-sandbox/staging") == []
    assert "MiB free" in str(await nodes.failure(host))
    (nodes.disk / "full").unlink()
    await host.prepare()
    await nodes.use_both(host)
    # In a file system of memory even to read what a template's RAM has nothing of takes some.
    nodes.fill(but_mib=100)
    async with host.open_sandbox() as first, host.open_sandbox() as second:
        small, other = (first, second) if first.node == nodes.small else (second, first)
        assert (small.node, other.node) == (nodes.small, nodes.roomy)
        with pytest.raises(OSError, match="no room for 256 MiB of RAM") as failed:
            await small.save("fleet-full-disk")
        assert failed.value.__notes__ == [f"on node {nodes.small}"]
        for sandbox in (small, other):
            assert (await sandbox.run("print('here')")).stdout == "here\n"
    assert nodes.files("trio-sandbox/saved") == []


async def no_room_for_a_template(nodes: Nodes, host: FleetHost) -> None:
    """Sandboxes boot."""
    await use_two(nodes, host)
    assert nodes.files() == []


async def a_template_fills_the_disk(nodes: Nodes, host: FleetHost) -> None:
    """The machine that it is made of dies of that, and sandboxes boot."""

    async def fill_soon() -> None:
        await wait_until(lambda: nodes.files() != [])
        nodes.fill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill_soon)
        await use_two(nodes, host)
    assert nodes.files() == ["full"]


async def use_two(nodes: Nodes, host: FleetHost) -> None:
    """Have a sandbox on each node at a time."""
    async with host.open_sandbox() as first, host.open_sandbox() as second:
        assert {first.node, second.node} == {nodes.small, nodes.roomy}
        for sandbox in (first, second):
            assert (await sandbox.run("print('here')")).stdout == "here\n"


async def no_room_for_a_sandbox(nodes: Nodes, host: FleetHost) -> None:
    """Those that are open go on."""
    async with host.open_sandbox() as first, host.open_sandbox() as second:
        filler = nodes.fill()
        assert isinstance(await nodes.failure(host), CapacityError)
        assert isinstance(await nodes.failure(host, mounts={"/data": ROOT / "newsfragments"}), MountError)
        assert await where(host) == nodes.roomy, "the other node goes on"
        for sandbox in (first, second):
            assert (await sandbox.run("print('here')")).stdout == "here\n"
        filler.unlink()
    await nodes.use_both(host)


@attrs.define
class Scenario:
    """What is tried, and what the small disk is for."""

    play: Callable[[Nodes, FleetHost], Awaitable[None]]
    disk: Literal["cache", "templates", "runtime"]
    mib: int
    full: bool = False


SCENARIOS = {
    "no_room_for_an_image": Scenario(no_room_for_an_image, "cache", 2048, full=True),
    "an_image_fills_the_disk": Scenario(an_image_fills_the_disk, "cache", 2048),
    "no_room_for_a_template": Scenario(no_room_for_a_template, "templates", 64),
    "a_template_fills_the_disk": Scenario(a_template_fills_the_disk, "templates", 400),
    "no_room_for_a_sandbox": Scenario(no_room_for_a_sandbox, "runtime", 1024),
}


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


@contextlib.contextmanager
def small_disk(scenario: Scenario) -> Generator[tuple[Path, dict[str, str]]]:
    """Mount the small disk for a block; yield where, and the environment of a node that has it."""
    size = f"size={scenario.mib}m"
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        directory = Path(name)
        mount("-t", "tmpfs", "-o", f"mode=1777,{size}", "tmpfs", directory)
        try:
            match scenario.disk:
                case "cache":
                    yield directory, {"XDG_CACHE_HOME": name}
                case "templates":
                    cache = directory / "trio-sandbox"
                    cache.mkdir()
                    mount("--bind", default_cache_directory(), cache)
                    mount("-t", "tmpfs", "-o", f"mode=700,{size}", "tmpfs", cache / "templates")
                    yield cache / "templates", {"XDG_CACHE_HOME": name}
                case "runtime":
                    yield directory, {"TMPDIR": name}
        finally:
            subprocess.run(["umount", "--recursive", directory], check=True)


async def main(name: str) -> None:
    scenario = SCENARIOS[name]
    with small_disk(scenario) as (disk, environment), cluster_with({}) as cluster:
        nodes = Nodes(add_node(cluster, SLOTS), add_node(cluster, SLOTS, **environment), disk)
        if scenario.full:
            nodes.fill()
        with trio.fail_after(2 * HANG_LIMIT):
            async with open_ray_host(cluster.address, CONFIG, FLEET) as host:
                await scenario.play(nodes, host)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
