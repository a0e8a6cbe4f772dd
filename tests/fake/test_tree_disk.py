"""The disk of what a step of an image brings: all of it is there, root's, and nothing waits for the host's disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests._leaks import cancel_at_every_step
from trio_sandbox import ImageBuildError
from trio_sandbox.constants import MOUNTS_DISK_BYTES
from trio_sandbox.image import open_empty_mounts_disk, write_tree_disk
from trio_sandbox.image.oci import UNIT

from .test_oci_images import check, debugfs


def make_tree(tree: Path) -> None:
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub").chmod(0o750)
    (tree / "sub" / "run").write_text("echo\n")
    (tree / "sub" / "run").chmod(0o755)
    os.utime(tree / "sub" / "run", ns=(0, 1_600_000_000_500_000_000))
    (tree / "nothing").touch()
    (tree / "large").write_bytes(bytes(range(256)) * 20_000)
    (tree / "link").symlink_to("sub/run")
    (tree / "long").symlink_to("y" * 300)


async def test_all_of_a_tree_is_on_its_disk(tmp_path: Path) -> None:
    tree, disk = tmp_path / "tree", tmp_path / "disk"
    make_tree(tree)
    with open_empty_mounts_disk(disk):
        size = await trio.to_thread.run_sync(write_tree_disk, tree, disk)
        assert size % UNIT == 0
        assert disk.stat().st_size == MOUNTS_DISK_BYTES  # as the machine has found it
        check(disk)
        status = debugfs(disk, "stat /sub/run", "stat /sub", "stat /nothing", "stat /large")
        assert status.count("User:     0   Group:     0") == 4
        assert [mode for mode in ("0755", "0750") if f"Mode:  {mode}" in status] == ["0755", "0750"]
        assert "mtime: 0x5f5e1000:77359400" in status
        assert 'Fast link dest: "sub/run"' in debugfs(disk, "stat /link")
        copy = tmp_path / "copy"
        debugfs(disk, f"dump /large {copy}")
        assert copy.read_bytes() == (tree / "large").read_bytes()
        assert "echo" in debugfs(disk, "cat /sub/run")
        assert "y" * 300 in debugfs(disk, "cat /long")
    assert not disk.exists()


async def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tree, disk = tmp_path / "tree", tmp_path / "disk"
    tree.mkdir()
    with (tree / "hole").open("wb") as file:
        file.truncate(MOUNTS_DISK_BYTES)
    with open_empty_mounts_disk(disk), pytest.raises(ImageBuildError, match="may take 64 GiB"):
        await trio.to_thread.run_sync(write_tree_disk, tree, disk)


async def test_writing_can_be_cancelled(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_tree(tree)
    disk = tmp_path / "disk"

    async def write() -> None:
        with open_empty_mounts_disk(disk):
            await trio.to_thread.run_sync(write_tree_disk, tree, disk)

    assert await cancel_at_every_step(write, check=lambda: None) >= 1
    assert not disk.exists()
