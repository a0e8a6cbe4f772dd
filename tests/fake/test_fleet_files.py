"""Files of the user's machine, for sandboxes and images of a fleet: they are read here, and go to the node that needs them."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import Image, ImageBuildError, MountError, OutcomeUnknownError, Sandbox, SandboxConfig

from ._fleet import LocalHost, open_fake_fleet, open_fleet_of
from .test_fleet_images import StoreHost, builds, make_host


def listing(directory: Path) -> dict[str, object]:
    """Give what is in a directory: modes and contents."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            mode = stat.S_IMODE(status.st_mode)
            found[name] = (mode, path.read_bytes()) if path.is_file() else mode
    return found


@attrs.define(eq=False)
class MountingHost(LocalHost):
    """Looks at what it is to mount."""

    mounted: list[dict[str, dict[str, object]]] = attrs.field(factory=list[dict[str, dict[str, object]]])

    @asynccontextmanager
    async def open_sandbox(
        self, image: str | Image, config: SandboxConfig | None = None, *, template: str | None = None
    ) -> AsyncGenerator[Sandbox]:
        assert config is not None
        self.mounted.append({target: listing(source) for target, source in config.mounts.items()})
        async with LocalHost.open_sandbox(self, image, config, template=template) as sandbox:
            yield sandbox


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "inner" / "empty").mkdir(parents=True)
    (source / "inner" / "program").write_text("#!/bin/sh\n")
    (source / "inner" / "program").chmod(0o755)
    (source / "link").symlink_to("inner/program")
    (source / "large").write_bytes(bytes(range(256)) * 4096)
    with (source / "sparse").open("wb") as file:
        file.seek(2**30)
        file.write(b"end")
    (source / "sparse").unlink()
    (source / "inner" / "empty").chmod(0o500)
    return source


async def test_a_directory_is_mounted_as_it_is_here(tmp_path: Path, source: Path) -> None:
    host = MountingHost(directory=tmp_path / "trees")
    async with open_fake_fleet("one", one=host) as fleet:
        async with fleet.host.open_sandbox(mounts={"/data": source, "/more": source / "inner"}) as sandbox:
            assert sandbox.config.mounts == {"/data": source, "/more": source / "inner"}
            assert host.mounted == [{"/data": listing(source), "/more": listing(source / "inner")}]
            assert os.listdir(host.directory) == [], "it was copied to the disk of the machine"
            link = fleet.members.clients[0]._link  # pyright: ignore[reportPrivateUsage]
            assert link is not None
            assert link.statistics().open_streams == 2, "what watches the node, and what keeps the sandbox"
        async with fleet.host.open_sandbox():
            assert host.mounted[1] == {}


async def test_what_can_not_be_read_starts_nothing(tmp_path: Path, source: Path) -> None:
    host = MountingHost(directory=tmp_path / "trees")
    async with open_fake_fleet("one", one=host) as fleet:
        for place, match in ((tmp_path / "missing", "missing can't be mounted"), (source / "large", "Not a directory")):
            with pytest.raises(MountError, match=match):
                async with fleet.host.open_sandbox(mounts={"/data": place}):
                    pass
        os.mkfifo(source / "inner" / "pipe")
        with pytest.raises(MountError, match=r"source can't be mounted: .*/inner/pipe: neither a file"):
            async with fleet.host.open_sandbox(mounts={"/data": source}):
                pass
        assert host.mounted == []
        assert not host.directory.exists() or os.listdir(host.directory) == []
        assert (await fleet.host.run("print(1)")).stdout == "1\n", "its share was given back"


async def test_a_node_that_can_not_write_says_so(tmp_path: Path, source: Path) -> None:
    host = MountingHost(directory=tmp_path / "missing" / "trees")
    async with open_fake_fleet("one", one=host) as fleet:
        with pytest.raises(MountError, match="can't be copied to node one: No such file"):
            async with fleet.host.open_sandbox(mounts={"/data": source}):
                pass
        with pytest.raises(ImageBuildError, match="can't be copied to node one: No such file"):
            await fleet.host.prepare(Image("python").files({"/opt/tool": source}))
        assert host.mounted == []


async def test_a_node_that_is_lost_while_files_go_there(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = MountingHost(directory=tmp_path / "trees")
    async with open_fake_fleet("one", one=host) as fleet:

        def cut(*args: object) -> None:
            trio.from_thread.run(fleet.nodes["one"].wire.cut)

        monkeypatch.setattr("trio_sandbox.fleet._trees._Tree.write", cut)
        with pytest.raises(OutcomeUnknownError, match="node one was lost during copying"):
            async with fleet.host.open_sandbox(mounts={"/data": source}):
                pass
        await fleet.nodes["one"].node.left.wait()
        assert not host.directory.exists()


async def test_cancelled_on_the_way_nothing_stays_on_the_node(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = MountingHost(directory=tmp_path / "trees", gate=trio.Event())
    async with open_fake_fleet("one", one=host) as fleet:
        async with trio.open_nursery() as nursery:

            async def use() -> None:
                async with fleet.host.open_sandbox(mounts={"/data": source}):
                    pytest.fail("it waits for ever")

            nursery.start_soon(use)
            await wait_until(lambda: host.waiting == 1)
            assert len(os.listdir(host.directory)) == 1
            nursery.cancel_scope.cancel()
        await wait_until(lambda: os.listdir(host.directory) == [])


# --- Files of images ---


def image_of(source: Path) -> Image:
    return Image("python").files({"/opt/tool": source, "/etc/tool.conf": source / "large"}).script("use it")


def make_stores(tmp_path: Path, *names: str) -> dict[str, StoreHost]:
    hosts = {name: make_host(tmp_path / name) for name in names}
    for name, host in hosts.items():
        host.directory = tmp_path / f"{name}-trees"
    return hosts


async def test_an_image_with_files_is_built_once_from_what_is_here(tmp_path: Path, source: Path) -> None:
    hosts = make_stores(tmp_path, "one", "two")
    image = image_of(source)
    async with open_fleet_of(hosts) as fleet:
        async with fleet.host.open_sandbox(image) as first, fleet.host.open_sandbox(image) as second:
            assert {first.node, second.node} == {"one", "two"}
            assert first.image == image
        assert builds(hosts) == 2
        (seen, _) = next(host.site.seen for host in hosts.values() if host.site.seen)
        assert seen["/run/image-step/0/inner/program"] == "#!/bin/sh\n"
        assert hosts["one"].entries() == hosts["two"].entries()
        assert sum(host.directory.exists() for host in hosts.values()) == 1, "only who builds it has them"
        assert [os.listdir(host.directory) for host in hosts.values() if host.directory.exists()] == [[]]
        (source / "inner" / "program").write_text("#!/bin/true\n")
        await fleet.host.prepare(image)
        assert builds(hosts) == 4, "other content is another layer"
        assert hosts["one"].entries() == hosts["two"].entries()


async def test_files_that_change_meanwhile_are_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = make_stores(tmp_path, "one")

    async def digest(path: str) -> str:
        await trio.lowlevel.checkpoint()
        return f"another of {path}"

    async with open_fleet_of(hosts) as fleet:
        with monkeypatch.context() as patch:
            stock = fleet.nodes["one"].node._stock  # pyright: ignore[reportPrivateUsage]
            patch.setitem(stock._operations, "digest", digest)  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(
                ImageBuildError, match="changed while it was copied to node one; it is safe to try again"
            ):
                await fleet.host.prepare(image_of(source))
        assert builds(hosts) == 0
        await fleet.host.prepare(image_of(source))
        assert builds(hosts) == 2


async def test_an_image_with_files_that_was_evicted_everywhere_is_built_again(tmp_path: Path, source: Path) -> None:
    hosts = make_stores(tmp_path, "one", "two")
    image = image_of(source)
    async with open_fleet_of(hosts) as fleet:
        async with fleet.host.open_sandbox(image) as sandbox:
            builder = hosts[str(sandbox.node)]
        for entry in builder.site.store.list():
            if entry.below == "python":
                await builder.site.store.remove(entry.digest)  # and what stands on it
        await fleet.host.prepare(image)
        assert builds(hosts) >= 4
        other = next(host for host in hosts.values() if host is not builder)
        assert [entry for entry in other.entries() if "+" in entry] != []


async def test_files_that_can_not_be_read(tmp_path: Path, source: Path) -> None:
    hosts = make_stores(tmp_path, "one")
    async with open_fleet_of(hosts) as fleet:
        with pytest.raises(ImageBuildError, match="missing can't be read for an image"):
            await fleet.host.prepare(Image("python").files({"/opt/tool": tmp_path / "missing"}))
        assert hosts["one"].prepared == []
