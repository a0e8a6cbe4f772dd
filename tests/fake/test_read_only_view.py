"""Files that their owner can't write to, by the way that they were opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests._leaks import nothing_left
from trio_sandbox import SandboxError
from trio_sandbox.qemu import prove_confinement
from trio_sandbox.qemu._read_only_view import ReadOnlyView, find_mounts, open_read_only_view

MOUNTS = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 253:0 / / rw,relatime shared:1 - ext4 /dev/root rw
28 27 253:1 / /home rw,nosuid,nodev,noexec,idmapped shared:2 - ext4 /dev/home rw
29 28 0:40 / /home/me/.cache/a\040b/saved ro - ext4 /dev/other rw
30 28 0:41 / /home/me/.cache/abc rw,noatime - ext4 /dev/other rw
31 27 0:42 / /tmp rw - tmpfs none rw
32 31 0:43 / /tmp rw,nosuid - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("directory", "mounts"),
    [
        ("/var/tmp/x", {"/": "bind,relatime"}),
        ("/home/me/.cache/a b", {"/home": "bind,nosuid,nodev,noexec", "/home/me/.cache/a b/saved": "bind"}),
        ("/home/me/.cache/a b/saved/x", {"/home/me/.cache/a b/saved": "bind"}),
        ("/tmp", {"/tmp": "bind,nosuid"}),
        ("/tmp/new/deep", {"/tmp": "bind,nosuid"}),
    ],
)
def test_mounts_of_a_directory(directory: str, mounts: dict[str, str]) -> None:
    assert find_mounts(MOUNTS, [Path(directory)]) == {Path(place): options for place, options in mounts.items()}


def test_mounts_of_directories_together_and_of_what_is_nowhere() -> None:
    found = find_mounts(MOUNTS, map(Path, ("/tmp/a", "/var", "/tmp/b")))
    assert list(map(os.fspath, found)) == ["/tmp", "/"]
    with pytest.raises(SandboxError, match="does not say where /var/tmp is mounted"):
        find_mounts(b"28 27 253:1 / /home rw - ext4 /dev/home rw", [Path("/var/tmp")])


def test_without_a_namespace_files_are_opened_for_reading(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    fd = ReadOnlyView().open(tmp_path / "file")
    try:
        assert not os.get_inheritable(fd)
        assert os.read(fd, 2) == b"x"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"y")
    finally:
        os.close(fd)


def reopen(fd: int) -> None:
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))


#: What the file's owner could do to what it has open for reading.
ATTACKS: dict[str, Callable[[int], object]] = {
    "open it for writing": reopen,
    "change its mode": lambda fd: os.fchmod(fd, 0o666),
    "change its times": os.utime,
    "shorten it": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 0),
}


async def test_in_one_their_owner_can_not_write_to_them(tmp_path: Path) -> None:
    if not (await prove_confinement({})).may_be_jailed:
        pytest.skip("this host allows no namespaces")
    (directory := tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to(directory)
    with nothing_left(tmp_path):
        async with open_read_only_view([tmp_path / "link", tmp_path / "later" / "deep"], {}) as view:
            for directory in (tmp_path / "link", tmp_path / "later" / "deep"):
                directory.mkdir(parents=True, exist_ok=True)
                (directory / "file").write_bytes(b"x")
                fd = view.open(directory / "file")
                try:
                    for attack in ATTACKS.values():
                        with pytest.raises(OSError, match="Read-only file system") as caught:
                            attack(fd)
                        assert caught.value.errno == errno.EROFS
                    assert os.read(fd, 2) == b"x"
                finally:
                    os.close(fd)
                (directory / "file").write_bytes(b"y")  # everybody else can
                (directory / "file").unlink()
            with pytest.raises(FileNotFoundError):
                view.open(directory / "file")
            fd = view.open(Path("/bin/sh"))
            os.close(fd)
        (tmp_path / "later" / "deep").rmdir()
        (tmp_path / "later").rmdir()


async def test_what_can_not_be_made_read_only_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (await prove_confinement({})).may_be_jailed:
        pytest.skip("this host allows no namespaces")
    with nothing_left(tmp_path):
        monkeypatch.setattr("trio_sandbox.qemu._read_only_view._MAKE", "echo there is no room; exit 1")
        with pytest.raises(SandboxError, match="no mount namespace can be made: there is no room"):
            async with open_read_only_view([tmp_path], {}):
                pytest.fail("was made")
        monkeypatch.setattr("trio_sandbox.qemu._read_only_view._MAKE", "echo the namespace is ready; exec sleep 60")
        with pytest.raises(SandboxError, match="can't be made read-only"):
            async with open_read_only_view([tmp_path], {}):
                pytest.fail("was made")
