"""Images of a fleet: built on one node, and fetched from there by each other one, over real TCP and TLS, into stores of their own."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio

from tests._leaks import wait_until
from tests._parsers import STRANGERS_DISK
from trio_sandbox import HostConfig, Image, ImageBuildError, ImageCorruptError, ImageError, Network, SandboxConfig
from trio_sandbox.image import (
    BuildContext,
    ImageStore,
    LayerJob,
    _imported as imported_module,
    digest_of_tree,
)
from trio_sandbox.image._cargo import Cargo, describe_cargo, take_cargo
from trio_sandbox.image._imported import receive_from
from trio_sandbox.image._stored import IMAGE_NAME
from trio_sandbox.image._system import DISK_NAME, INITRD_NAME, KERNEL_NAME
from trio_sandbox.machines import Dependents, HostImages
from trio_sandbox.machines._admission import Admission
from trio_sandbox.network import Gateway, HostResolver

from ._fleet import Fleet, LocalHost, Wire, open_fleet_of, start_node
from .test_image_exchange import VIRTUAL_SIZE
from .test_image_layers import PYTHON, Base, Site
from .test_image_store import TinyRecipe

IMAGE = Image("python").script("one").script("two")
#: Bytes that a connection carries before it is cut.
MOST = 2**18


def disk(text: str) -> bytes:
    """Make a disk with a header that may come from anywhere, larger than what a connection carries."""
    return STRANGERS_DISK.ljust(2**16, b"\0") + text.encode() + bytes(range(256)) * 2048


@attrs.define
class Movable(Base):
    """A base with a disk of QEMU's."""

    text: str = "base"

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        await trio.lowlevel.checkpoint()
        (context.output / IMAGE_NAME).write_bytes(disk(self.text))
        return {"virtual_size": VIRTUAL_SIZE, "packages": PYTHON}


async def fill(job: LayerJob) -> None:
    await trio.lowlevel.checkpoint()
    brought = "" if job.work.tree is None else digest_of_tree(job.work.tree)
    job.overlay.write_bytes(disk(f"{job.work.script} {brought}"))


@attrs.define
class System(TinyRecipe):
    """What stands in for the system disk."""

    name: str = "system"

    @property
    def files(self) -> tuple[str, ...]:
        return (KERNEL_NAME, INITRD_NAME, DISK_NAME)

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        await trio.lowlevel.checkpoint()
        for name in self.files:
            (context.output / name).write_text(name)
        return {}


@attrs.define(eq=False)
class StoreHost(LocalHost):
    """A host with a store of its own, whose machines that make layers are fakes."""

    site: Site = attrs.field(kw_only=True)

    async def prepare(self, image: str | Image) -> None:
        async with cast("HostImages", self.images).hold(image):
            self.prepared.append(image)

    def entries(self) -> list[str]:
        """What is whole in the store, or half-made anywhere in the cache."""
        store, staging = self.cache / "store", self.cache / "staging"
        return [
            *(sorted(os.listdir(store)) if store.exists() else ()),
            *(os.listdir(staging) if staging.exists() else ()),
        ]


@attrs.define
class Builder:
    """What stands in for machines that make layers."""

    site: Site
    config: SandboxConfig = attrs.field(factory=SandboxConfig)

    async def build(self, job: LayerJob, gateway: object, report: Any) -> None:
        await self.site.run(job, report)


def make_host(directory: Path, base: TinyRecipe | None = None, system: TinyRecipe | None = None) -> StoreHost:
    store = ImageStore(directory, recipes={"python": base or Movable()}, system=system or System())
    site = Site(store, after=fill)
    images = HostImages(
        store,
        cast("Any", Builder(site)),
        Admission(HostConfig(memory_budget_mib=10_000, vcpu_budget=4)),
        lambda _: Gateway(Network.none(), HostResolver(), connect_timeout=1),
        build=True,
        progress=site.progress.append,
        environment={},
        dependents=Dependents(directory),
        budget_mib=None,
    )
    return StoreHost(cache=directory, images=images, site=site)


@asynccontextmanager
async def open_stores(tmp_path: Path, *names: str) -> AsyncGenerator[tuple[Fleet, dict[str, StoreHost]]]:
    hosts = {name: make_host(tmp_path / name) for name in names}
    async with open_fleet_of(hosts) as fleet:
        yield fleet, hosts


def builds(hosts: dict[str, StoreHost]) -> int:
    return sum(len(host.site.jobs) for host in hosts.values())


async def test_it_is_built_once_and_every_other_node_fetches_it(tmp_path: Path) -> None:
    async with open_stores(tmp_path, "one", "two", "three") as (fleet, hosts):
        await fleet.host.prepare(IMAGE)
        assert builds(hosts) == 2, "one for each layer"
        one, *others = hosts.values()
        assert len(one.entries()) == 4
        for other in others:
            assert other.entries() == one.entries()
            for entry in (one.cache / "store").iterdir():
                for file in entry.iterdir():
                    if file.name not in ("manifest.json", "verified.json"):
                        assert (other.cache / "store" / entry.name / file.name).read_bytes() == file.read_bytes()
        connections = [len(node.wire.ends) for node in fleet.nodes.values()]
        for _ in range(4):
            async with fleet.host.open_sandbox(IMAGE):
                pass
        await fleet.host.prepare(IMAGE)
        assert builds(hosts) == 2
        assert sum(len(node.wire.ends) for node in fleet.nodes.values()) == sum(connections) + 4, "one for each sandbox"


async def test_what_is_on_a_node_already_is_neither_built_nor_fetched(tmp_path: Path) -> None:
    two = make_host(tmp_path / "two")
    await two.prepare(IMAGE)
    two.site.jobs.clear()
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        await fleet.host.prepare(IMAGE)
        assert builds(hosts) == 0, "the first has it from the second"
        assert hosts["one"].entries() == hosts["two"].entries()


async def test_tasks_that_need_it_at_once_have_it_built_once(tmp_path: Path) -> None:
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        gate = trio.Event()

        async def wait(job: LayerJob) -> None:
            await gate.wait()

        for host in hosts.values():
            host.site.before = wait
        nodes: set[str | None] = set()

        async def use() -> None:
            async with fleet.host.open_sandbox(IMAGE) as sandbox:
                nodes.add(sandbox.node)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(use)
            await wait_until(lambda: builds(hosts) == 1)
            gate.set()
            await wait_until(lambda: fleet.host.statistics().sandboxes_open == 4)
            nursery.cancel_scope.cancel()
        assert nodes == {"one", "two"}
        assert builds(hosts) == 2


async def test_a_node_that_joins_later_fetches_it_when_it_needs_it(tmp_path: Path) -> None:
    async with open_stores(tmp_path, "one") as (fleet, hosts), trio.open_nursery() as nursery:
        await fleet.host.prepare(IMAGE)
        later = make_host(tmp_path / "later")
        fake = await start_node(nursery, "later", later)
        await fleet.members.join(fake.address)
        assert later.entries() == []
        async with fleet.host.open_sandbox(IMAGE) as first, fleet.host.open_sandbox(IMAGE) as second:
            assert {first.node, second.node} == {"one", "later"}
        assert later.entries() == hosts["one"].entries()
        assert later.site.jobs == []
        nursery.cancel_scope.cancel()


async def test_a_connection_that_breaks_off_is_made_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each layer has twice as much as a connection carries before it is cut."""
    passed: list[int] = []

    async def pass_on(self: Wire, number: int, to: int) -> None:
        sink, source = self.ends[number][to], self.ends[number][1 - to]
        own = len(passed)
        passed.append(0)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                passed[own] += len(data)
                if passed[own] > MOST and sum(each > MOST for each in passed) <= 3:
                    await self.cut(number)
                    return
                await sink.send_all(data)
            await sink.send_eof()

    monkeypatch.setattr(Wire, "pass_on", pass_on)
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        with caplog.at_level(logging.INFO, "trio_sandbox.fleet"):
            await fleet.host.prepare(IMAGE)
        assert hosts["two"].entries() == hosts["one"].entries()
        assert builds(hosts) == 2
        assert caplog.text.count("goes on over a new connection") == 3
        whole = sum(file.stat().st_size for file in (hosts["one"].cache / "store").rglob("*") if file.is_file())
        assert sum(passed) < 1.5 * whole, "nothing is sent from its beginning again"


async def test_a_node_that_is_lost_while_others_fetch_from_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        async with fleet.host.open_sandbox(IMAGE) as sandbox:
            source = str(sandbox.node)
        (target,) = {"one", "two"} - {source}
        lent = trio.Event()

        async def take(cargo: Cargo, open_file: object) -> None:
            await fleet.nodes[source].wire.cut()
            await fleet.nodes[source].node.left.wait()
            lent.set()
            await original(cargo, cast("Any", open_file))

        images = cast("HostImages", hosts[target].images)
        original = images.take
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "take", take)
            patch.setattr("trio_sandbox.fleet._shipping._PAUSE", 0.0)
            await fleet.host.prepare(IMAGE)
        assert lent.is_set()
        assert len(hosts[target].site.jobs) == 2, "so it was built"
        assert "could not fetch image" in caplog.text


async def test_a_damaged_file_is_noticed_and_never_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        async with fleet.host.open_sandbox(IMAGE) as sandbox:
            source = hosts[str(sandbox.node)]
        (target,) = [host for host in hosts.values() if host is not source]
        (entry,) = [
            path for path in (source.cache / "store").iterdir() if "two" in (path / "manifest.json").read_text()
        ]
        good = (entry / IMAGE_NAME).read_bytes()
        with (entry / IMAGE_NAME).open("r+b") as file:
            file.seek(2**17)
            file.write(b"damaged")
        await fleet.host.prepare(IMAGE)
        assert "is not what was built: its digest is another" in caplog.text
        assert (target.cache / "store" / entry.name / IMAGE_NAME).read_bytes() == good, "it was built there"
        assert len(target.site.jobs) == 1, "the layer below was whole"
        assert os.listdir(target.cache / "staging") == []


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_node_without_room_says_so_and_has_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        async with fleet.host.open_sandbox(IMAGE) as sandbox:
            source = str(sandbox.node)
        (target,) = {"one", "two"} - {source}
        before = hosts[target].entries()
        if when == "before":
            real = os.statvfs

            def statvfs(path: Any) -> Any:
                found = real(path)
                values = list(found)
                values[4] = 10  # blocks that are free
                return os.statvfs_result(values)

            monkeypatch.setattr(os, "statvfs", statvfs)
        else:

            def create(path: Path) -> Any:
                if IMAGE_NAME in path.name:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
                return path.open("x+b")

            monkeypatch.setattr(imported_module, "create", create)
        with pytest.raises(ImageBuildError, match="0 MiB free" if when == "before" else "is full") as info:
            await fleet.host.prepare(IMAGE)
        assert info.value.retry_safe
        assert info.value.__notes__ == [f"on node {target}"]
        assert builds(hosts) == 2, "and it was not built either"
        assert [entry for entry in hosts[target].entries() if "system" not in entry] == before
        monkeypatch.undo()
        await fleet.host.prepare(IMAGE)
        assert hosts[target].entries() == hosts[source].entries()


async def test_a_node_with_another_build_of_the_base_builds_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        await make_host(tmp_path / name, Movable(text=name)).site.store.ensure("python")
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        await fleet.host.prepare(IMAGE)
        assert [len(host.site.jobs) for host in hosts.values()] == [2, 2]
        assert "another build of python" in caplog.text


async def test_cancelled_it_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        async with fleet.host.open_sandbox(IMAGE) as sandbox:
            source = str(sandbox.node)
        (target,) = {"one", "two"} - {source}
        stuck = trio.Event()

        async def copy_file(*args: object) -> None:
            stuck.set()
            await trio.sleep_forever()

        with monkeypatch.context() as patch:
            patch.setattr(imported_module, "copy_file", copy_file)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fleet.host.prepare, IMAGE)
                await stuck.wait()
                nursery.cancel_scope.cancel()
            await wait_until(lambda: hosts[target].entries() == [])
        await fleet.host.prepare(IMAGE)
        assert hosts[target].entries() == hosts[source].entries()


# --- What a node believes of another ---


async def loaded(tmp_path: Path) -> tuple[StoreHost, Cargo, tuple[Path, ...]]:
    host = make_host(tmp_path / "here")
    await host.prepare(IMAGE)
    async with cast("HostImages", host.images).lend(IMAGE) as (cargo, directories):
        return host, cargo, directories


async def take(host: StoreHost, cargo: Cargo, directories: tuple[Path, ...]) -> None:
    def open_file(entry: int, name: str) -> Any:
        return receive_from(io.BytesIO((directories[entry] / name).read_bytes()))

    await take_cargo(host.site.store, cargo, open_file, progress=host.site.progress.append, environment={})


async def test_a_cargo_is_what_the_image_consists_of(tmp_path: Path) -> None:
    _, cargo, directories = await loaded(tmp_path)
    there = make_host(tmp_path / "there")
    await take(there, cargo, directories)
    await there.prepare(IMAGE)
    assert there.site.jobs == []
    fractions = [each.fraction for each in there.site.progress if each.message == "fetching it from another node"]
    assert 1.0 in fractions
    again = describe_cargo(there.site.store, *await cast("HostImages", there.images).ensure(IMAGE))
    assert [files_of(text) for text in again.layers] == [files_of(text) for text in cargo.layers]


def files_of(manifest: str) -> object:
    value = json.loads(manifest)
    return value["name"], value["digest"], value["files"]


CHANGES: dict[str, Callable[[Cargo], Cargo]] = {
    "can't be used here": lambda cargo: attrs.evolve(cargo, system="{"),
    "system disk": lambda cargo: attrs.evolve(cargo, system=cargo.system.replace('"system.img"', '"other.img"')),
    "does not stand on": lambda cargo: attrs.evolve(cargo, layers=cargo.layers[:1] + cargo.layers[2:]),
    "no layers": lambda cargo: attrs.evolve(cargo, layers=()),
    "name": lambda cargo: attrs.evolve(cargo, layers=(cargo.layers[0].replace("python", "../python"),)),
    "damaged": lambda cargo: attrs.evolve(cargo, locks=(("../lock", "text"),)),
}


@pytest.mark.parametrize("match", CHANGES)
async def test_one_that_says_something_else_is_refused(tmp_path: Path, match: str) -> None:
    _, cargo, directories = await loaded(tmp_path)
    there = make_host(tmp_path / "there")
    with pytest.raises(ImageError, match=match):
        await take(there, CHANGES[match](cargo), directories)
    assert there.entries() == []


async def test_one_of_another_version_is_refused(tmp_path: Path) -> None:
    _, cargo, directories = await loaded(tmp_path)
    for there in (
        make_host(tmp_path / "there", system=System(contents="2")),
        make_host(tmp_path / "there", base=Movable(contents="2")),
    ):
        with pytest.raises(ImageError, match="of another version of trio-sandbox"):
            await take(there, cargo, directories)
        assert there.entries() == []


async def test_a_file_that_ends_early_is_no_file(tmp_path: Path) -> None:
    _, cargo, directories = await loaded(tmp_path)
    there = make_host(tmp_path / "there")
    top = directories[-1] / IMAGE_NAME
    with top.open("r+b") as file:
        file.truncate(2**17)
    with pytest.raises(ImageCorruptError):
        await take(there, cargo, directories)
    assert len(there.entries()) == 3, "whole entries only"
