"""Saved sandboxes of a fleet: found on the nodes that have them, and opened there."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from tests._leaks import wait_until
from tests._saved import saved_template
from trio_sandbox import (
    CapacityError,
    SandboxError,
    TemplateExistsError,
    TemplateUnusableError,
    UnknownTemplateError,
)
from trio_sandbox.image import Receive, describe_files
from trio_sandbox.image._imported import receive_from
from trio_sandbox.image._stored import IMAGE_NAME
from trio_sandbox.machines import HostImages, NamedTemplate, NamedTemplateStore, SavedCargo, SavedExchange
from trio_sandbox.qemu import read_qcow2_info

from ._fleet import LocalHost, open_fake_fleet, open_fleet_of
from .test_fleet_images import Movable, StoreHost, System, disk, make_host
from .test_fleet_life import SiteHost

MEMORY_MIB = 300


def save(directory: Path, name: str, *, created: float = 1.0, marker: bytes = b"x" * 16, **fields: object) -> None:
    store = NamedTemplateStore(directory)
    with store.make(name, memory_mib=1) as staged:
        template = saved_template(name, staged.directory, memory_mib=MEMORY_MIB, created=created, marker=marker)
        staged.template = attrs.evolve(template, **fields)  # type: ignore[arg-type]
        for path in template.files:
            path.write_bytes(b"content")


def hosts(tmp_path: Path, *names: str) -> dict[str, LocalHost]:
    return {name: LocalHost(cache=tmp_path / name) for name in names}


async def test_it_is_opened_on_the_node_that_has_it(tmp_path: Path) -> None:
    nodes = hosts(tmp_path, "one", "two")
    save(tmp_path / "two", "mine")
    async with open_fleet_of(nodes) as fleet:
        for _ in range(3):
            async with fleet.host.open_sandbox(template="mine") as sandbox:
                assert sandbox.node == "two"
                assert (sandbox.config.memory_mib, sandbox.config.vcpus) == (MEMORY_MIB, 2)
        assert nodes["two"].templates == ["mine"] * 3
        assert nodes["one"].templates == []


async def test_of_two_the_newest_is_meant(tmp_path: Path) -> None:
    nodes = hosts(tmp_path, "one", "two")
    save(tmp_path / "one", "mine", created=2.0, marker=b"1" * 16)
    save(tmp_path / "two", "mine", created=1.0, marker=b"2" * 16)
    async with open_fleet_of(nodes) as fleet:
        for _ in range(2):
            async with fleet.host.open_sandbox(template="mine") as sandbox:
                assert sandbox.node == "one"


async def test_nodes_that_share_a_disk_all_have_it(tmp_path: Path) -> None:
    save(tmp_path, "mine")
    nodes = {name: LocalHost(cache=tmp_path) for name in ("one", "two")}
    async with open_fleet_of(nodes) as fleet:
        async with (
            fleet.host.open_sandbox(template="mine") as first,
            fleet.host.open_sandbox(template="mine") as second,
        ):
            assert {first.node, second.node} == {"one", "two"}
        assert await fleet.host.remove_saved_sandbox("mine") > 0
        assert os.listdir(tmp_path / "saved") == []


async def test_what_does_not_fit_it_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    save(tmp_path / "one", "mine")
    nodes = hosts(tmp_path, "one")
    async with open_fleet_of(nodes) as fleet:
        for fields, match in (
            ({"memory_mib": 200}, "has memory_mib=300, not memory_mib=200"),
            ({"image": "node"}, "leave `image` out"),
            ({"template": "/"}, "1 to 64 of the characters"),
            ({"warmup": "1"}, "does not run in a saved sandbox"),
        ):
            with pytest.raises(ValueError, match=match):
                async with fleet.host.open_sandbox(**{"template": "mine", **fields}):  # type: ignore[arg-type]
                    pass
        with pytest.raises(
            UnknownTemplateError, match="no node of the fleet has a saved sandbox 'other'; there are: mine"
        ):
            async with fleet.host.open_sandbox(template="other"):
                pass
        assert nodes["one"].templates == []


async def test_one_that_is_damaged_everywhere_says_so(tmp_path: Path) -> None:
    save(tmp_path / "one", "mine")
    (tmp_path / "one" / "saved" / "mine.json").write_text("{")
    async with open_fleet_of(hosts(tmp_path, "one", "two")) as fleet:
        with pytest.raises(TemplateUnusableError, match="is damaged") as info:
            async with fleet.host.open_sandbox(template="mine"):
                pass
        assert info.value.__notes__ == ["on node one"]
        save(tmp_path / "two", "mine")
        async with fleet.host.open_sandbox(template="mine") as sandbox:
            assert sandbox.node == "two"


async def test_one_whose_node_is_lost(tmp_path: Path) -> None:
    save(tmp_path / "two", "mine")
    async with open_fleet_of(hosts(tmp_path, "one", "two")) as fleet:
        await fleet.nodes["two"].wire.cut()
        await fleet.nodes["two"].node.left.wait()
        with pytest.raises((UnknownTemplateError, CapacityError)) as info:
            async with fleet.host.open_sandbox(template="mine"):
                pass
        assert "mine" in str(info.value) or "two" in str(info.value)


async def test_listing_and_removing(tmp_path: Path) -> None:
    save(tmp_path / "one", "mine")
    save(tmp_path / "two", "other")
    async with open_fleet_of(hosts(tmp_path, "one", "two")) as fleet:
        found = await fleet.host.saved_sandboxes()
        assert [(node, [saved.name for saved in each]) for node, each in found.items()] == [
            ("one", ["mine"]),
            ("two", ["other"]),
        ], "in the order in which they have joined"
        assert found["one"][0].memory_mib == MEMORY_MIB
        assert await fleet.host.remove_saved_sandbox("mine") > 0
        with pytest.raises(UnknownTemplateError, match="there are: other"):
            await fleet.host.remove_saved_sandbox("mine")
        assert os.listdir(tmp_path / "one" / "saved") == []


@pytest.mark.parametrize("created", [1.0, 4e9], ids=["earlier", "by a clock that is ahead"])
async def test_a_name_that_is_taken_on_another_node(created: float, tmp_path: Path) -> None:
    save(tmp_path / "two", "mine", created=created)
    one = SiteHost(directory=tmp_path, cache=tmp_path / "0", memory_mib=20_000)
    async with open_fake_fleet("one", "two", one=one, two=LocalHost(cache=tmp_path / "two")) as fleet:
        async with fleet.host.open_sandbox() as sandbox:
            assert sandbox.node == "one"
            with pytest.raises(TemplateExistsError, match="'mine' on node two already"):
                await sandbox.save("mine")
            await sandbox.save("mine", replace=True)
            assert one.sites[0].named.names() == ["mine"]
        found = await fleet.host.saved_sandboxes()
        assert {node: [saved.name for saved in each] for node, each in found.items()} == {"one": ["mine"], "two": []}


async def test_what_is_replaced_and_could_not_be_asked_for_is_no_reason_not_to_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = SiteHost(directory=tmp_path, cache=tmp_path / "0", memory_mib=20_000)

    async def fail(_: str) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(5, "Input/output error")

    async with open_fake_fleet("one", "two", one=one) as fleet:
        fleet.nodes["two"].node._stock._operations["find"] = fail  # pyright: ignore[reportPrivateUsage]
        async with fleet.host.open_sandbox() as sandbox:
            with pytest.raises(OSError, match="Input/output error"):
                await sandbox.save("mine")
            await sandbox.save("mine", replace=True)
            assert one.sites[0].named.names() == ["mine"]
    assert "saved sandboxes 'mine' of other nodes are not removed" in caplog.text


async def test_replacing_on_a_disk_that_nodes_share(tmp_path: Path) -> None:
    one = SiteHost(directory=tmp_path, cache=tmp_path / "0", memory_mib=20_000)
    async with open_fake_fleet("one", "two", one=one, two=LocalHost(cache=tmp_path / "0")) as fleet:
        async with fleet.host.open_sandbox() as sandbox:
            await sandbox.save("mine")
            await sandbox.save("mine", replace=True)
        found = await fleet.host.saved_sandboxes()
        assert [[saved.name for saved in each] for each in found.values()] == [["mine"], ["mine"]]


# --- It is brought to another node ---


def save_whole(host: StoreHost, name: str, **fields: object) -> NamedTemplate:
    """Save what has a disk that QEMU could open, over the image of the host's store."""
    store = NamedTemplateStore(host.cache)
    with store.make(name, memory_mib=1) as staged:
        usual = {"image_digest": Movable().digest(), "memory_mib": MEMORY_MIB}
        staged.template = template = saved_template(name, staged.directory, **{**usual, **fields})
        for path in template.files:
            path.write_bytes(disk(path.name))
    return store.find(name)


def refuse(*_: object) -> None:
    raise TemplateUnusableError("it was saved on another processor")


@pytest.fixture
async def stores(tmp_path: Path) -> dict[str, StoreHost]:
    """Two hosts, of which each has room for one sandbox; the first has an image, and a sandbox that was saved."""
    hosts = {name: make_host(tmp_path / name) for name in ("one", "two")}
    for host in hosts.values():
        host.memory_mib = 500
    await hosts["one"].prepare("python")
    save_whole(hosts["one"], "mine")
    return hosts


async def test_a_node_without_room_is_not_waited_for(stores: dict[str, StoreHost]) -> None:
    one, two = stores.values()
    there = NamedTemplateStore(one.cache).find("mine")
    async with open_fleet_of(stores) as fleet:
        async with (
            fleet.host.open_sandbox(template="mine") as first,
            fleet.host.open_sandbox(template="mine") as second,
        ):
            assert [first.node, second.node] == ["one", "two"]
        here = NamedTemplateStore(two.cache).find("mine")
        assert attrs.evolve(here, directory=there.directory, size_bytes=there.size_bytes) == there
        assert [path.read_bytes() for path in here.files] == [path.read_bytes() for path in there.files]
        assert [stat.S_IMODE(path.stat().st_mode) for path in here.files] == [0o600, 0o600, 0o444]
        assert two.entries() == one.entries(), "what it stands on came along"
        for entry in (one.cache / "store").iterdir():
            for name in (IMAGE_NAME, *System().files):
                if (entry / name).exists():
                    times = [(host.cache / "store" / entry.name / name).stat().st_mtime_ns for host in (one, two)]
                    assert times[0] == times[1], "by which a launcher tells builds apart"
        fleet.nodes["one"].node.draining = True
        await wait_until(lambda: fleet.host.statistics().nodes[0].draining)
        async with fleet.host.open_sandbox(template="mine") as third:
            assert third.node == "two"


async def test_tasks_that_need_it_at_once_have_it_fetched_once(stores: dict[str, StoreHost]) -> None:
    one, two = stores.values()
    one.memory_mib, two.memory_mib = 500, 5000
    checked: list[object] = []
    two.check = lambda *seen: checked.append(seen)
    async with open_fleet_of(stores) as fleet:
        nodes: list[str | None] = []

        async def use() -> None:
            async with fleet.host.open_sandbox(template="mine") as sandbox:
                nodes.append(sandbox.node)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(use)
            await wait_until(lambda: len(nodes) == 4)
            nursery.cancel_scope.cancel()
        assert sorted(map(str, nodes)) == ["one", "two", "two", "two"]
        assert len(checked) == 1


async def test_a_node_that_can_not_go_on_from_it_does_not_get_it(
    stores: dict[str, StoreHost], caplog: pytest.LogCaptureFixture
) -> None:
    _, two = stores.values()
    two.check = refuse
    async with open_fleet_of(stores) as fleet, trio.open_nursery() as nursery:
        left = trio.Event()

        async def use() -> None:
            async with fleet.host.open_sandbox(template="mine") as sandbox:
                assert sandbox.node == "one"
                left.set()

        async with fleet.host.open_sandbox(template="mine"):
            nursery.start_soon(use)
            await wait_until(lambda: "saved on another processor" in caplog.text)
            assert not left.is_set()
        await left.wait()
        assert NamedTemplateStore(two.cache).names() == []


async def test_one_of_that_name_is_never_replaced_by_another_nodes(stores: dict[str, StoreHost]) -> None:
    _, two = stores.values()
    save(two.cache, "mine", marker=b"2" * 16)
    async with open_fleet_of(stores) as fleet:
        async with fleet.host.open_sandbox(template="mine") as sandbox, trio.open_nursery() as nursery:
            assert sandbox.node == "one"
            with trio.move_on_after(0.5):
                async with fleet.host.open_sandbox(template="mine"):
                    pytest.fail("it has no place to be brought to")
            nursery.cancel_scope.cancel()
        assert NamedTemplateStore(two.cache).find("mine").marker == b"2" * 16


# --- What a node believes of another's ---


def exchange(host: StoreHost) -> SavedExchange:
    return SavedExchange(NamedTemplateStore(host.cache), cast("HostImages", host.images), host.check, host.notes)


def rewritten(path: Path, data: bytes) -> Callable[[SavedCargo], SavedCargo]:
    def change(cargo: SavedCargo) -> SavedCargo:
        (cargo.template.directory / path).write_bytes(data)
        return attrs.evolve(cargo, files=tuple(describe_files(cargo.template.directory, dict(cargo.files)).items()))

    return change


LIES: dict[str, Callable[[SavedCargo], SavedCargo]] = {
    "has other files": lambda cargo: attrs.evolve(cargo, files=cargo.files[1:]),
    "damaged: it has": lambda cargo: attrs.evolve(cargo, template=attrs.evolve(cargo.template, layer_count=10**12)),
    "must be 1 to 64": lambda cargo: attrs.evolve(cargo, template=attrs.evolve(cargo.template, name="../mine")),
    "is not what was saved": lambda cargo: attrs.evolve(
        cargo, files=tuple((name, attrs.evolve(file, sha256="0" * 64)) for name, file in cargo.files)
    ),
    "can't be used": rewritten(Path("layer0.qcow2"), b"no disk"),
    "another processor": lambda cargo: attrs.evolve(cargo, template=attrs.evolve(cargo.template, qemu="refused")),
}


@pytest.mark.parametrize("match", LIES)
async def test_what_another_node_can_not_have_saved(stores: dict[str, StoreHost], match: str) -> None:
    one, two = stores.values()
    two.check = lambda *seen: refuse() if seen[-1].qemu == "refused" else None
    lender, taker = exchange(one), exchange(two)
    async with lender.lend("mine", b"x" * 16) as (cargo, directories):

        def open_file(entry: int, name: str) -> Receive:
            return receive_from(io.BytesIO((directories[entry] / name).read_bytes()))

        with pytest.raises((SandboxError, ValueError), match=match):
            await taker.take(LIES[match](cargo), open_file)
        saved = two.cache / "saved"
        assert not saved.exists() or os.listdir(saved) == [], "nothing of it is left"


async def test_a_disk_that_names_a_file_of_this_machine_names_none_when_it_is_taken(
    stores: dict[str, StoreHost],
) -> None:
    one, two = stores.values()
    lender, taker = exchange(one), exchange(two)
    async with lender.lend("mine", b"x" * 16) as (cargo, directories):
        layer = cargo.template.layers[0]
        data = bytearray(layer.read_bytes())
        name = b"/etc/shadow"
        data[0x200 : 0x200 + len(name)] = name
        struct.pack_into(">QI", data, 8, 0x200, len(name))
        cargo = rewritten(Path(layer.name), bytes(data))(cargo)
        assert read_qcow2_info(layer).backing_file == "/etc/shadow"
        await taker.take(cargo, lambda entry, name: receive_from(io.BytesIO((directories[entry] / name).read_bytes())))
    assert read_qcow2_info(NamedTemplateStore(two.cache).find("mine").layers[0]).backing_file is None


async def test_cancelled_it_leaves_nothing_half_made(stores: dict[str, StoreHost]) -> None:
    one, two = stores.values()
    async with exchange(one).lend("mine", b"x" * 16) as (cargo, directories):
        stuck = trio.Event()

        def open_file(entry: int, name: str) -> Receive:
            async def receive() -> bytes:
                if name == "memory":
                    assert len(os.listdir(two.cache / "saved")) == 1, "it is in the middle of it"
                    stuck.set()
                    await trio.sleep_forever()
                return await whole()

            whole = receive_from(io.BytesIO((directories[entry] / name).read_bytes()))
            return receive

        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange(two).take, cargo, open_file)
            await stuck.wait()
            nursery.cancel_scope.cancel()
        assert os.listdir(two.cache / "saved") == []
        await exchange(two).take(
            cargo, lambda entry, name: receive_from(io.BytesIO((directories[entry] / name).read_bytes()))
        )
        assert NamedTemplateStore(two.cache).find("mine").marker == b"x" * 16
        fractions = [each.fraction for each in two.notes.take() if each.stage == "saved mine"]
        assert fractions == [1.0], "the newest of a stage is what its user is told"


async def test_one_that_was_replaced_is_not_lent(stores: dict[str, StoreHost]) -> None:
    lender = exchange(stores["one"])
    with pytest.raises(UnknownTemplateError, match="replaced meanwhile"):
        async with lender.lend("mine", b"y" * 16):
            pass
