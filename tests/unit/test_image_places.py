"""Where images are built, and by what rights: what is said before anything is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from trio_sandbox import ImageBuildError
from trio_sandbox.image import _scratch
from trio_sandbox.image._mmdebstrap import _explain  # pyright: ignore[reportPrivateUsage]
from trio_sandbox.image._rights import explain_refusal, missing_capabilities
from trio_sandbox.image._scratch import choose_directory, find_problem


def mounted(monkeypatch: pytest.MonkeyPatch, flags: int = 0, *, room: int = 2**40) -> None:
    def statvfs(_: object) -> SimpleNamespace:
        return SimpleNamespace(f_flag=flags, f_bavail=room, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_directories_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problem(tmp_path, root=True, device_nodes=True) == ""
    assert find_problem(tmp_path / "none", root=True, device_nodes=False) == "is no directory"
    (tmp_path / "private" / "inside").mkdir(parents=True)
    (tmp_path / "private").chmod(0o700)
    assert find_problem(tmp_path / "private" / "inside", root=True, device_nodes=False) == ""
    problem = find_problem(tmp_path / "private" / "inside", root=False, device_nodes=False)
    assert problem.startswith("is closed to others: ")
    mounted(monkeypatch, os.ST_NOEXEC)
    assert find_problem(tmp_path, root=True, device_nodes=False) == "is mounted noexec"
    mounted(monkeypatch, os.ST_NODEV)
    assert find_problem(tmp_path, root=True, device_nodes=True) == "is mounted nodev"
    assert find_problem(tmp_path, root=True, device_nodes=False) == ""

    def access(_: object, __: int) -> bool:
        return False

    monkeypatch.setattr(os, "access", access)
    assert find_problem(tmp_path, root=True, device_nodes=False) == "can't be written"


def test_the_first_directory_that_will_do_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {tmp_path: "is mounted noexec"}

    def find(directory: Path, **_: bool) -> str:
        return problems.get(directory, "")

    monkeypatch.setattr(_scratch, "find_problem", find)
    monkeypatch.setenv("TMPDIR", "/of/the/user")
    mounted(monkeypatch)
    staging = Path("/cache/staging")
    assert choose_directory(staging, root=True, device_nodes=False) == staging
    assert choose_directory(staging, root=False, device_nodes=False) == Path("/of/the/user")
    problems |= {staging: "is mounted noexec", Path("/of/the/user"): "is closed to others"}
    for root in (True, False):
        assert choose_directory(staging, root=root, device_nodes=False) == Path("/var/tmp")
    problems[Path("/var/tmp")] = "is no directory"
    assert choose_directory(staging, root=False, device_nodes=False) == Path("/tmp")
    monkeypatch.setenv("TMPDIR", "relative")
    problems[Path("/tmp")] = "can't be written"
    with pytest.raises(ImageBuildError, match="Set TMPDIR to one on a disk") as caught:
        choose_directory(staging, root=False, device_nodes=False)
    assert "/var/tmp is no directory; /tmp can't be written" in str(caught.value)


def test_where_there_is_no_room_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"/cache": 2**20, "/var/tmp": 2**40, "/tmp": 2**30}

    def no_problem(*_: object, **__: object) -> str:
        return ""

    def room(directory: Path) -> int:
        return free[os.fspath(directory)]

    monkeypatch.setattr(_scratch, "find_problem", no_problem)
    monkeypatch.setattr(_scratch, "_room", room)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert choose_directory(Path("/cache"), root=True, device_nodes=False) == Path("/var/tmp")
    free |= {"/var/tmp": 2**19, "/tmp": 2**19}
    assert choose_directory(Path("/cache"), root=True, device_nodes=False) == Path("/cache")


@pytest.mark.parametrize(
    ("output", "why", "way_out"),
    [
        (
            "E: unshare() failed: No space left on device",
            "user.max_user_namespaces",
            "sysctl user.max_user_namespaces=",
        ),
        ("E: unshare() failed: Operation not permitted", "no user namespaces", "kernel.unprivileged_userns_clone=1"),
        ("newuidmap: write to uid_map failed: Operation not permitted", "no user namespaces", "apparmor"),
        ("E: invalid mmdebstrap user in /etc/subuid", "no range of user ids", "usermod --add-subuids"),
        ("something else", "something else", "user_namespaces"),
        ("", "said nothing", "user_namespaces"),
    ],
)
def test_why_an_ordinary_user_can_not_build(output: str, why: str, way_out: str) -> None:
    said = explain_refusal(output)
    assert why in said
    assert way_out in said
    assert "disk" not in said


def test_no_space_is_a_full_disk_only_where_a_disk_is_meant() -> None:
    assert "the disk is full" in _explain("mke2fs", "writing: No space left on device")
    assert "the disk is full" not in _explain("mmdebstrap", "E: unshare() failed: No space left on device")


def test_what_root_lacks() -> None:
    docker = "Name:\tpython\nCapPrm:\t0000000000000000\nCapEff:\t00000000a80425fb\n"
    assert missing_capabilities(docker) == []
    assert missing_capabilities("CapEff:\t0000000000000000\n") == [
        *("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID", "SYS_CHROOT")
    ]
