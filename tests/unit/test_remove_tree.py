"""Directories that are removed with all that is in them, whoever had a part in that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests._leaks import open_fds
from trio_sandbox.qemu import make_marked, remove_marked, remove_tree


def make_deep(top: Path, depth: int) -> None:
    """Make directories within each other, with a file in each, deeper than any path is long."""
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.mkdir("directory", dir_fd=here)
        below = os.open("directory", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_however_deep_it_is(tmp_path: Path) -> None:
    directory = tmp_path / "ours"
    make_marked(directory)
    make_deep(directory, 3000)
    before = open_fds()
    remove_marked(directory)
    assert open_fds() == before
    assert os.listdir(tmp_path) == []


def test_whatever_its_modes_are(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("x")
    (top / "a" / "file").write_text("x")
    for path, mode in ((top / "a" / "b", 0), (top / "a", 0o500), (top, 0o300)):
        path.chmod(mode)
    remove_tree(top)
    assert os.listdir(tmp_path) == []


def test_no_link_is_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    top = tmp_path / "top"
    (top / "in").mkdir(parents=True)
    for place in (top, top / "in"):
        (place / "link").symlink_to(kept)
        (place / "dangling").symlink_to("nowhere")
        os.mkfifo(place / "pipe")
    (tmp_path / "link").symlink_to(kept)
    for name in ("link", "none", "kept/file"):
        with pytest.raises(OSError, match=r"."):
            remove_tree(tmp_path / name)
    remove_tree(top)
    assert sorted(os.listdir(tmp_path)) == ["kept", "link"]
    assert (kept / "file").read_text() == "x"


def test_it_may_be_wide(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for number in range(50):
        for name in ("same", f"other{number}"):
            (top / str(number) / name / "more").mkdir(parents=True)
    remove_tree(top)
    assert os.listdir(tmp_path) == []
