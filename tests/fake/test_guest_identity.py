"""The users' files that say who a machine is."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trio_sandbox.guest.agent.children import Children
from trio_sandbox.guest.messages import send_message
from trio_sandbox.guest.spawner.mounts import IDENTITY_FILES, open_identity_files, replace_link


async def test_they_say_who_the_machine_is_now_however_long_what_was_in_them() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = [os.memfd_create(name) for name in ("resolv.conf", "machine-id", "hostname", "hosts")]
    os.write(files[0], b"nameserver 192.0.2.1\n")
    os.write(files[3], b"::1 localhost\n")
    with theirs:
        children = Children(ours)
        send_message(theirs, ("ready",), files)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(children.serve)
            for hostname, machine_id in (("sandbox-1", "a" * 32), ("sandbox-2", "b" * 32), ("box", "c" * 32)):
                await children.identify({"hostname": hostname, "machine_id": machine_id})
                await children.set_resolver("198.18.0.2")
                assert os.pread(files[0], 1 << 10, 0) == b"nameserver 198.18.0.2\n"
                await children.set_resolver(None)
                expected = [
                    "nameserver 192.0.2.1\n",
                    f"{machine_id}\n",
                    f"{hostname}\n",
                    f"::1 localhost\n127.0.0.1 {hostname}\n",
                ]
                assert [os.pread(file, 1 << 10, 0).decode() for file in files] == expected
                os.pwrite(files[2], b"what a user has written there\n", 0)
            nursery.cancel_scope.cancel()
    for file in files:
        os.close(file)


@pytest.mark.parametrize(
    ("target", "content"),
    [
        ("../run/systemd/resolve/stub-resolv.conf", b""),
        ("elsewhere", b"nameserver 192.0.2.1\n"),
        ("resolv.conf", b""),
        ("/", b""),
    ],
)
def test_a_link_gives_way_to_a_file_that_says_the_same(tmp_path: Path, target: str, content: bytes) -> None:
    path, elsewhere = tmp_path / "resolv.conf", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"nameserver 192.0.2.1\n")
    path.symlink_to(target)
    replace_link(str(path))
    assert not path.is_symlink()
    assert path.read_bytes() == content
    assert elsewhere.read_bytes() == b"nameserver 192.0.2.1\n"


def test_what_is_no_link_stays(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    replace_link(str(path))
    assert not path.exists()
    path.write_bytes(b"x")
    replace_link(str(path))
    assert path.read_bytes() == b"x"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as which a guest's files are opened")


def remove_directory(path: Path) -> None:
    path.parent.rmdir()


def leave_out(path: Path) -> None:
    del path


def make_dangling(path: Path) -> None:
    path.symlink_to("../run/systemd/resolve/stub-resolv.conf")


def make_ordinary(path: Path) -> None:
    path.write_text("nameserver 192.0.2.1\n")


def make_read_only(path: Path) -> None:
    make_ordinary(path)
    path.chmod(0o444)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(remove_directory, id="no directory"),
        pytest.param(leave_out, id="missing"),
        pytest.param(make_dangling, id="dangling"),
        pytest.param(make_ordinary, id="ordinary"),
        pytest.param(make_read_only, id="read-only", marks=needs_root),
    ],
)
async def test_programs_find_the_resolver_whatever_the_image_has(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "etc/resolv.conf"
    path.parent.mkdir()
    make(path)
    before = path.read_text() if path.exists() else ""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = open_identity_files(str(path.parent))
    assert len(files) == len(IDENTITY_FILES)
    with theirs:
        children = Children(ours)
        send_message(theirs, ("ready",), files)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(children.serve)
            await children.set_resolver("198.18.0.2")
            assert path.read_text() == "nameserver 198.18.0.2\n"
            await children.set_resolver(None)
            assert path.read_text() == before
            nursery.cancel_scope.cancel()
    for file in files:
        os.close(file)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_can_be_no_resolvers_file_stays_out_of_the_way(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "resolv.conf")
    for file in open_identity_files(str(tmp_path)):
        os.pwrite(file, b"x", 0)
        os.close(file)
