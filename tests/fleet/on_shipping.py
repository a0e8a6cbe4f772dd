"""Images and saved sandboxes that go from node to node of a Ray cluster, each with a cache of its own: ``nox -s fleet``."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests._leaks import wait_until
from tests.fake._fleet import Wire
from trio_sandbox import HostConfig, Image, Sandbox
from trio_sandbox.fleet import FleetConfig, FleetHost, open_ray_host
from trio_sandbox.image import ImageStore, default_cache_directory

CONFIG = HostConfig(memory_budget_mib=1500, vcpu_budget=4)
FLEET = FleetConfig(start_timeout=120)
IMAGE = Image("python").script("echo made > /etc/made")
#: What the image and the system disk take, at least.
LEAST = 50 * 2**20


@attrs.define
class Nodes:
    """A Ray cluster on this machine, each of whose nodes has a cache of its own."""

    cluster: Any
    directory: Path
    names: dict[str, str] = attrs.field(factory=dict[str, str])
    """What the fleet calls a node ends with, by what it is called here."""

    def add(self, name: str, *, slots: int = 2) -> None:
        """Have one more node."""
        node = self.cluster.add_node(
            num_cpus=1, resources={"trio_sandbox": slots}, env_vars={"XDG_CACHE_HOME": str(self.directory / name)}
        )
        self.names[name] = node.node_id[:8]

    def cache(self, name: str) -> Path:
        """Return the cache of a node."""
        return self.directory / name / "trio-sandbox"

    def fill(self, name: str) -> None:
        """Have a node's cache begin with this machine's images of Python, so that it need not build them."""
        store = self.cache(name) / "store"
        store.mkdir(parents=True)
        for stored in ImageStore(default_cache_directory()).list():
            if stored.current and stored.name in ("python", "system", "system-base"):
                subprocess.run(["cp", "-a", "--reflink=auto", stored.path, store], check=True)

    def name_of(self, sandbox: Sandbox) -> str:
        """Return what the node of a sandbox is called here."""
        (name,) = [name for name, end in self.names.items() if str(sandbox.node).endswith(end)]
        return name

    def digests(self, name: str) -> dict[str, str]:
        """Return what is in a node's store, by its path there; what is only about the files themselves left out."""
        store = self.cache(name) / "store"
        return {
            str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(store.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "verified.json", ".trio-sandbox")
        }


@pytest.fixture
def nodes(tmp_path: Path) -> Generator[Nodes]:
    cluster = importlib.import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        nodes = Nodes(cluster, tmp_path)
        nodes.fill("one")
        nodes.add("one")
        yield nodes
    finally:
        cluster.shutdown()


async def wait_joined(host: FleetHost, count: int) -> None:
    await wait_until(lambda: sum(not node.lost for node in host.statistics().nodes) == count)


# --- The way between the nodes ---


@attrs.define(eq=False)
class Road(Wire):
    """What is between a node and those that fetch from it. It counts, cuts and changes what large connections carry."""

    faults: list[str] = attrs.field(factory=list[str])
    """What happens to the next connections, one after the other, when they have carried `LEAST`."""
    hurt: set[int] = attrs.field(factory=set[int])
    """Connections to which something has happened."""
    carried: list[int] = attrs.field(factory=list[int])
    """Bytes that came of the node, over each connection."""

    async def pass_on(self, number: int, to: int) -> None:
        if to == 1:
            await super().pass_on(number, to)
            return
        self.carried += [0] * (number + 1 - len(self.carried))
        sink, source = self.ends[number]
        try:
            async for data in source:
                self.carried[number] += len(data)
                if self.carried[number] > LEAST and self.faults and number not in self.hurt:
                    self.hurt.add(number)
                    match self.faults.pop(0):
                        case "cut":
                            await self.cut(number)
                            return
                        case _:
                            data = data[:-1] + bytes([data[-1] ^ 1])
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    @property
    def loans(self) -> int:
        """How many connections carried much: those over which something was fetched."""
        return sum(size > LEAST for size in self.carried)


@asynccontextmanager
async def road_to(host: FleetHost, name: str) -> AsyncGenerator[Road]:
    """Have all that connects to a node, from now on, go over a road. Nothing of it is a process of the node's: it is the network."""
    (member,) = [
        member
        for node, member in host._members._members.items()  # pyright: ignore[reportPrivateUsage]
        if node.endswith(name)
    ]
    client = member.client
    road = Road(client.address.port, client.address.host)
    async with trio.open_nursery() as nursery:
        await nursery.start(road.serve)
        before, client.address = client.address, attrs.evolve(client.address, host="127.0.0.1", port=road.port)
        try:
            yield road
        finally:
            client.address = before
            nursery.cancel_scope.cancel()


async def test_an_image_is_made_on_one_node_and_fetched_once_by_one_that_joins_later(nodes: Nodes) -> None:
    async with open_ray_host(nodes.cluster.address, CONFIG, FLEET) as host:
        await host.prepare(IMAGE)
        made = nodes.digests("one")
        nodes.add("two")
        await wait_joined(host, 2)
        assert not (nodes.cache("two") / "store").exists(), "nothing is sent before it is needed"
        async with road_to(host, nodes.names["one"]) as road, trio.open_nursery() as nursery:
            opened: list[str] = []

            async def use() -> None:
                async with host.open_sandbox(IMAGE, memory_mib=160) as sandbox:
                    assert (await sandbox.run("print(open('/etc/made').read())")).stdout == "made\n\n"
                    opened.append(nodes.name_of(sandbox))
                    await trio.sleep_forever()

            for _ in range(4):
                nursery.start_soon(use)
            await wait_until(lambda: len(opened) == 4)
            assert sorted(opened) == ["one", "one", "two", "two"]
            assert road.loans == 1
            nursery.cancel_scope.cancel()
        assert nodes.digests("two").items() <= made.items()
        layers = [path for path in nodes.digests("two") if path.startswith("python+")]
        assert len(layers) == 1
        assert not list((nodes.cache("two") / "staging").iterdir())


async def test_what_is_cut_goes_on_and_what_is_changed_is_fetched_anew(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.add("two")
    async with open_ray_host(nodes.cluster.address, CONFIG, FLEET) as host:
        await wait_joined(host, 2)
        async with road_to(host, nodes.names["one"]) as road:
            road.faults = ["cut", "change", "cut"]
            await host.prepare("python")
            assert road.faults == []
            assert road.loans == 4, "one after the other"
            fetched = nodes.digests("two")
            assert fetched.items() <= nodes.digests("one").items()
            size = sum((nodes.cache("two") / "store" / path).stat().st_size for path in fetched)
            assert sum(road.carried) < 1.1 * size + 2**20, "it goes on where it was"
        assert "could not fetch" not in caplog.text
        async with host.open_sandbox(memory_mib=160) as first, host.open_sandbox(memory_mib=160) as second:
            assert {nodes.name_of(first), nodes.name_of(second)} == {"one", "two"}
            for sandbox in (first, second):
                assert (await sandbox.run("print(6 * 7)")).stdout == "42\n"


async def test_a_saved_sandbox_goes_on_elsewhere(nodes: Nodes) -> None:
    async with open_ray_host(nodes.cluster.address, CONFIG, FLEET) as host:
        async with host.open_sandbox(memory_mib=160) as sandbox:
            await sandbox.run("x = 6")
            await sandbox.path("note").write_text("kept")
            await sandbox.save("mine")
        nodes.add("two")
        await wait_joined(host, 2)
        async with road_to(host, nodes.names["one"]) as road, trio.open_nursery() as nursery:
            opened: list[str] = []

            async def use() -> None:
                async with host.open_sandbox(template="mine") as sandbox:
                    assert (await sandbox.run("print(x * 7)")).stdout == "42\n"
                    assert await sandbox.path("note").read_text() == "kept"
                    opened.append(nodes.name_of(sandbox))
                    await trio.sleep_forever()

            for _ in range(4):  # each node has room for two
                nursery.start_soon(use)
            await wait_until(lambda: len(opened) == 4)
            assert sorted(opened) == ["one", "one", "two", "two"]
            assert road.loans == 1
            nursery.cancel_scope.cancel()
        found = await host.saved_sandboxes()
        assert [[each.name for each in saved] for saved in found.values()] == [["mine"], ["mine"]]
        assert await host.remove_saved_sandbox("mine") > 0
