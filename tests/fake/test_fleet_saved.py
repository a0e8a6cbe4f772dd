"""Saved sandboxes of a fleet: found on the nodes that have them, and opened there."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest

from trio_sandbox import (
    CapacityError,
    TemplateExistsError,
    TemplateUnusableError,
    UnknownTemplateError,
)
from trio_sandbox.machines import NamedTemplate, NamedTemplateStore

from ._fleet import LocalHost, open_fake_fleet, open_fleet_of
from .test_fleet_life import SiteHost

MEMORY_MIB = 300


def save(directory: Path, name: str, *, created: float = 1.0, marker: bytes = b"x" * 16, **fields: object) -> None:
    store = NamedTemplateStore(directory)
    with store.make(name, memory_mib=1) as staged:
        template = NamedTemplate(
            name=name,
            directory=staged.directory,
            image="python",
            image_digest="d",
            memory_mib=MEMORY_MIB,
            vcpus=2,
            machine="m",
            qemu="QEMU",
            marker=marker,
            with_memory=False,
            balloon=False,
            mounted=False,
            layer_count=1,
            created=created,
        )
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
        assert {node: [saved.name for saved in each] for node, each in found.items()} == {
            "one": ["mine"],
            "two": ["other"],
        }
        assert found["one"][0].memory_mib == MEMORY_MIB
        assert await fleet.host.remove_saved_sandbox("mine") > 0
        with pytest.raises(UnknownTemplateError, match="there are: other"):
            await fleet.host.remove_saved_sandbox("mine")
        assert os.listdir(tmp_path / "one" / "saved") == []


async def test_a_name_that_is_taken_on_another_node(tmp_path: Path) -> None:
    save(tmp_path / "two", "mine", created=1.0)
    one = SiteHost(directory=tmp_path, cache=tmp_path / "0", memory_mib=20_000)
    async with open_fake_fleet("one", "two", one=one, two=LocalHost(cache=tmp_path / "two")) as fleet:
        async with fleet.host.open_sandbox() as sandbox:
            assert sandbox.node == "one"
            with pytest.raises(TemplateExistsError, match="'mine' on node two already"):
                await sandbox.save("mine")
            await sandbox.save("mine", replace=True)
            assert one.sites[0].named.names() == ["mine"]
        found = await fleet.host.saved_sandboxes()
        assert [[saved.name for saved in each] for each in found.values()] == [["mine"], ["mine"]]
