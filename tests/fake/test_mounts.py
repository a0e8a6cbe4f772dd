"""The disk of the mounts, made by the real programs; and the conversation with a guest that is to mount it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import GuestProtocolError, MountError
from trio_sandbox.constants import MOUNTS_DISK_BYTES
from trio_sandbox.image import Place, check_directory, open_mounts_disk
from trio_sandbox.machines._mounts import mount
from trio_sandbox.wire import RecordStream

from ._agent import open_agent
from ._guest import FakeMachine, open_fake_sandbox, receive_json

NOT_FOR_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host's."""
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "a file").write_bytes(b"content")
    (source / "sub" / "program").write_text("#!/bin/sh\n")
    (source / "sub" / "program").chmod(0o750)
    (source / "sub" / "twin").hardlink_to(source / "sub" / "program")
    (source / "link").symlink_to("/etc/passwd")
    with (source / "sparse").open("wb") as file:
        file.truncate(200 * 2**20)
    os.mkfifo(source / "fifo")
    return source


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """An empty directory."""
    disks = tmp_path / "disks"
    disks.mkdir()
    return disks


class Maker:
    """Makes disks, and keeps what it was told of progress."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "1.mounts"
        self.reports: list[tuple[str, float | None]] = []

    def open(self, mounts: Mapping[str, Path]) -> AbstractAsyncContextManager[list[Place]]:
        def report(message: str, fraction: float | None) -> None:
            self.reports.append((message, fraction))

        return open_mounts_disk(mounts, self.path, environment={}, report=report)


def debugfs(disk: Path, place: Place, command: str) -> str:
    return run("debugfs", "-R", command, f"{disk}?offset={place.offset}")


def check(disk: Path, place: Place) -> None:
    run("e2fsck", "-fn", f"{disk}?offset={place.offset}")


def run(*argv: str) -> str:
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    return subprocess.run(argv, check=True, capture_output=True, text=True, env=environment).stdout


async def test_a_disk_of_two_directories(source: Path, disks: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3000):  # more than one block of a directory, and of inodes
        (other / f"a name that takes some room {number}").symlink_to("x")
    maker = Maker(disks)
    async with maker.open({"/data": source, "/other": other}) as places:
        assert [place.target for place in places] == ["/data", "/other"]
        assert maker.path.stat().st_size == MOUNTS_DISK_BYTES
        assert maker.path.stat().st_blocks * 512 < 8 * 2**20, "holes stay holes"
        listing = debugfs(maker.path, places[0], "ls -l /") + debugfs(maker.path, places[0], "ls -l /sub")
        entries = re.findall(r"^ *\d+ +(\d+) \(\d\) +(\d+) +(\d+) +(\d+) \S+ \S+ (.+?) *$", listing, re.MULTILINE)
        assert {(mode, size, name) for mode, _, _, size, name in entries if not name.startswith(".")} == {
            ("100644", "7", "a file"),
            ("10644", "0", "fifo"),
            ("120777", "11", "link"),
            ("100644", "209715200", "sparse"),
            ("40755", "4096", "sub"),
            ("40755", "4096", "empty"),
            ("100750", "10", "program"),
            ("100750", "10", "twin"),
        }
        assert {(uid, gid) for _, uid, gid, _, _ in entries} == {("1000", "1000")}
        assert debugfs(maker.path, places[0], 'cat "/a file"') == "content"
        assert len(re.findall(" 1000 +1000 ", debugfs(maker.path, places[1], "ls -l /"))) == 3002
        for place in places:
            check(maker.path, place)
    assert os.listdir(disks) == []
    assert ("copying 3000 files from " + str(other), 0.0) in maker.reports


async def test_a_disk_that_begins_with_another(source: Path, disks: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    (other / "new").write_bytes(b"new content")
    maker = Maker(disks)

    def report(_message: str, _fraction: float | None) -> None:
        pass

    async with maker.open({"/data": source}) as old:
        used = old[-1].offset + old[-1].size
        path = disks / "2.mounts"
        async with open_mounts_disk(
            {"/new": other}, path, environment={}, report=report, before=(maker.path, used)
        ) as new:
            assert [(place.target, place.offset) for place in new] == [("/new", used)]
            assert path.stat().st_size == MOUNTS_DISK_BYTES
            assert path.stat().st_blocks * 512 < 8 * 2**20, "holes stay holes"
            assert debugfs(path, new[0], "cat /new") == "new content"
            assert debugfs(path, old[0], 'cat "/a file"') == "content"
            for place in (*old, *new):
                check(path, place)
        full = (maker.path, MOUNTS_DISK_BYTES - 2**20)
        with pytest.raises(MountError, match="is too large to be mounted"):
            async with open_mounts_disk({"/new": other}, path, environment={}, report=report, before=full):
                pytest.fail("it has room")
    assert os.listdir(disks) == []


async def test_cancelled_anywhere_it_leaves_nothing(source: Path, disks: Path) -> None:
    maker = Maker(disks)

    async def make() -> None:
        async with maker.open({"/data": source}):
            await trio.lowlevel.checkpoint()

    await make()
    with nothing_left(disks):
        steps = await cancel_at_every_step(make, check=lambda: pytest.fail("left") if os.listdir(disks) else None)
    assert steps > 4


async def test_directories_that_are_none(tmp_path: Path, disks: Path) -> None:
    (tmp_path / "file").touch()
    for name, why in (("missing", "No such file"), ("file", "Not a directory")):
        with pytest.raises(MountError, match=f"{name} can't be mounted: {why}"):
            check_directory(tmp_path / name)
        with pytest.raises(MountError, match=f"{name} can't be mounted: {why}"):
            async with Maker(disks).open({"/data": tmp_path / name}):
                pytest.fail("it has been made")
    assert os.listdir(disks) == []


@NOT_FOR_ROOT
@pytest.mark.parametrize("name", ["a file", "sub"])
async def test_what_can_not_be_read_is_named(source: Path, disks: Path, name: str) -> None:
    (source / name).chmod(0)
    try:
        with pytest.raises(MountError, match=f"source can't be mounted: .*{name}: Permission denied; nothing"):
            async with Maker(disks).open({"/data": source}):
                pytest.fail("it has been made")
    finally:
        (source / name).chmod(0o755)


async def test_more_than_there_is_room_for(source: Path, disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 1000, 0, 10, 1000, 0, 0, 0, 255))
    with (source / "large").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 20 * 2**20)

    def statvfs(path: object) -> os.statvfs_result:
        return full

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", statvfs)
        with pytest.raises(MountError, match=r"take 20 MiB, and .*disks has only 0 MiB free; .*HostConfig.runtime_dir"):
            async with Maker(disks).open({"/data": source}):
                pytest.fail("it has been made")
    monkeypatch.setattr("trio_sandbox.image._mounts_disk.MOUNTS_DISK_BYTES", 10 * 2**20)
    with pytest.raises(MountError, match=r"source is too large to be mounted: .* may take 0 GiB"):
        async with Maker(disks).open({"/data": source}):
            pytest.fail("it has been made")
    assert os.listdir(disks) == []


async def test_holes_are_not_counted(disks: Path, tmp_path: Path) -> None:
    source = tmp_path / "holes"
    source.mkdir()
    with (source / "far").open("wb") as file:  # longer than all mounts may be
        file.seek(100 * 2**30)
        file.write(b"end")
    with (source / "many").open("wb") as file:
        for number in range(1000):
            file.seek(number * 2**20)
            file.write(b"x")
    maker = Maker(disks)
    async with maker.open({"/data": source}) as (place,):
        assert place.size < 64 * 2**20
        assert maker.path.stat().st_blocks * 512 < 16 * 2**20
        listing = debugfs(maker.path, place, "ls -l /")
        assert re.search(rf" {100 * 2**30 + 3} .* far$", listing, re.MULTILINE)
        assert re.search(rf" {999 * 2**20 + 1} .* many$", listing, re.MULTILINE)
        check(maker.path, place)
        run("debugfs", "-R", f"dump /many {tmp_path}/back", f"{maker.path}?offset={place.offset}")
    assert (tmp_path / "back").read_bytes() == (source / "many").read_bytes()


@pytest.mark.parametrize("content", [None, [], ["#1", "directory/file"]], ids=["none", "empty", "full"])
async def test_lost_and_found_is_what_it_is_on_the_host(disks: Path, tmp_path: Path, content: list[str] | None) -> None:
    source = tmp_path / "root of a file system"
    source.mkdir()
    if content is not None:
        (source / "lost+found" / "directory").mkdir(parents=True)
        (source / "lost+found").chmod(0o701)
        for name in content:
            (source / "lost+found" / name).write_text(name)
        if not content:
            (source / "lost+found" / "directory").rmdir()
    maker = Maker(disks)
    async with maker.open({"/data": source}) as (place,):
        names = re.findall(
            r"(\d+) \(\d\) +(\d+) +(\d+) .* (\S+) *$", debugfs(maker.path, place, "ls -l /"), re.MULTILINE
        )
        found = [entry for entry in names if entry[3] not in (".", "..")]
        assert found == ([] if content is None else [("40701", "1000", "1000", "lost+found")])
        for name in content or ():
            assert debugfs(maker.path, place, f"cat lost+found/{name}") == name
        check(maker.path, place)


@pytest.mark.parametrize("kind", ["file", "link"])
async def test_lost_and_found_that_is_no_directory(disks: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "lost+found").touch()  # which is nothing special there
    async with Maker(disks).open({"/data": source}) as (place,):
        check(disks / "1.mounts", place)
    if kind == "file":
        (source / "lost+found").touch()
    else:
        (source / "lost+found").symlink_to("sub")
    with pytest.raises(MountError, match=r"lost\+found: it is not a directory.*rename it; nothing was started"):
        async with Maker(disks).open({"/data": source}):
            pytest.fail("it has been made")
    assert os.listdir(disks) == []


@pytest.mark.parametrize("length", [255, 510, 1020, 2039, 2040, 2041])
async def test_paths_of_any_length(disks: Path, tmp_path: Path, length: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    parts = ["d" * 99] * (length // 100)
    parts.append("f" * (length - sum(len(part) + 1 for part in parts) - 1))
    if not parts[-1]:  # a name needs a byte beside its slash
        parts[-2:] = ["d" * 49, "f" * (length - sum(len(part) + 1 for part in parts[:-2]) - 51)]
    path = "/".join(parts)
    assert len(f"/{path}") == length
    file = source / path
    file.parent.mkdir(parents=True)
    file.write_text("deep")
    if length == 2040:
        with pytest.raises(MountError, match="exactly 2040 bytes, which e2fsprogs can't copy; rename it") as caught:
            async with Maker(disks).open({"/data": source}):
                pytest.fail("it has been made")
        assert str(file) in str(caught.value)
        return
    async with Maker(disks).open({"/data": source}) as (place,):
        assert debugfs(disks / "1.mounts", place, f"cat /{path}") == "deep"


async def test_a_copy_that_fails(disks: Path, tmp_path: Path) -> None:
    """Whatever the reason: here the tree grows behind our back."""
    source = tmp_path / "source"
    source.mkdir()

    def grow(message: str, fraction: float | None) -> None:
        if message.startswith("copying"):
            (source / "more").write_bytes(bytes(range(1, 256)) * 2**17)

    with pytest.raises(
        MountError, match=r"(?s)source could not be copied for being mounted; nothing was started: .*mke2fs"
    ):
        async with open_mounts_disk({"/data": source}, disks / "1.mounts", environment={}, report=grow):
            pytest.fail("it has been made")
    assert os.listdir(disks) == []


# --- The guest ---

PLACES = [Place("/data", 0, 2**20), Place("/more", 2**20, 2**20)]


async def mount_in(answer: dict[str, object] | None) -> list[object]:
    """Have a guest mount `PLACES` that answers this, None: nothing; return what it was asked for."""
    asked: list[object] = []

    async def serve(records: RecordStream) -> None:
        asked.append(await receive_json(records))
        if answer is None:
            await trio.sleep_forever()
        await records.send_json(answer, end=True)

    failure = None
    async with open_fake_sandbox({"mounts": serve}) as (_, machine):
        try:
            await mount(machine, PLACES, patience=10)
        except (MountError, GuestProtocolError) as exc:
            failure = exc
    if failure is not None:
        raise failure
    return asked


async def test_a_guest_that_mounts() -> None:
    places = [{"target": place.target, "offset": place.offset, "size": place.size} for place in PLACES]
    assert await mount_in({"mounted": 2}) == [{"mounts": places}]


async def test_a_guest_that_can_not(autojump_clock: trio.testing.MockClock) -> None:
    failed = {"errno": 20, "strerror": "Not a directory", "filename": "/data"}
    with pytest.raises(MountError, match="the guest can't mount /data: Not a directory"):
        await mount_in({"failed": failed})
    with pytest.raises(MountError, match="did not mount what it should within 10 s"):
        await mount_in(None)
    wrong: tuple[dict[str, object], ...] = ({"mounted": 1}, {"mounted": True}, {"started": 1})
    for answer in wrong:
        with pytest.raises(GuestProtocolError):
            await mount_in(answer)


async def test_an_agent_without_such_a_disk() -> None:
    async with open_agent() as host:
        machine = FakeMachine(host.channel, lambda: None)
        with pytest.raises(MountError, match="can't mount what it should: No such device"):
            await mount(machine, PLACES, patience=10)
