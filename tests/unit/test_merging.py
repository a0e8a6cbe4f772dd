"""Copies that the guest's file helper makes for steps of an image: what is merged, what makes room, what stays as it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trio_sandbox.guest.helpers.merging import append, merge
from trio_sandbox.qemu import remove_tree


def modes(directory: Path) -> dict[str, str]:
    """Return the modes of all that is below a directory, by path."""
    return {
        path.relative_to(directory).as_posix(): stat.filemode(path.lstat().st_mode)
        for path in sorted(directory.rglob("*"))
    }


def make_tree(path: Path) -> Path:
    (path / "sub" / "empty").mkdir(parents=True)
    (path / "sub" / "run").write_text("run")
    (path / "sub" / "run").chmod(0o750)
    os.link(path / "sub" / "run", path / "again")
    (path / "link").symlink_to("sub/run")
    (path / "nowhere").symlink_to("/nowhere")
    (path / "sub").chmod(0o711)
    os.utime(path / "sub", ns=(1, 1_000_000_007))
    os.utime(path / "sub" / "run", ns=(1, 2_000_000_007))
    os.utime(path / "link", ns=(1, 3_000_000_007), follow_symlinks=False)
    return path


def test_a_tree_is_copied_as_it_is(tmp_path: Path) -> None:
    source, target = make_tree(tmp_path / "source"), tmp_path / "a" / "b" / "it's"
    merge(str(source), str(target), str(tmp_path))
    assert modes(target) == modes(source)
    for name in (".", "sub", "sub/run", "link"):
        assert (target / name).lstat().st_mtime_ns == (source / name).lstat().st_mtime_ns
    assert (target / "sub" / "run").read_text() == "run"
    assert (target / "nowhere").readlink() == Path("/nowhere")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755


def test_what_is_a_directory_on_both_sides_is_merged_and_stays_as_it_is(tmp_path: Path) -> None:
    source, target = make_tree(tmp_path / "source"), tmp_path / "target"
    (target / "real").mkdir(parents=True)
    (target / "real").chmod(0o1777)
    (target / "sub").symlink_to("real")
    (target / "real" / "kept").write_text("kept")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("elsewhere")
    # What is there and no directory makes room: nothing is written through a link, or to the other names of a file.
    (target / "again").symlink_to(elsewhere)
    (target / "link").mkdir()
    (target / "link").rmdir()
    os.link(elsewhere, target / "real" / "run")
    merge(str(source), str(target), str(tmp_path))
    assert stat.S_IMODE((target / "real").stat().st_mode) == 0o1777
    assert sorted(os.listdir(target / "real")) == ["empty", "kept", "run"]
    assert (target / "sub").is_symlink()
    assert (target / "again").read_text() == (target / "real" / "run").read_text() == "run"
    assert elsewhere.read_text() == "elsewhere"
    merge(str(source), str(target), str(tmp_path))  # again is no error


@pytest.mark.parametrize(
    ("source", "target"), [("directory", "file"), ("file", "directory"), ("directory", "dangling")]
)
def test_a_file_and_a_directory_are_not_merged(tmp_path: Path, source: str, target: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = modes(tmp_path)
    with pytest.raises(OSError, match=r"directory") as caught:
        merge(str(tmp_path / source), str(tmp_path / target), str(tmp_path))
    assert caught.value.filename == str(tmp_path / target)
    assert modes(tmp_path) == before


@pytest.mark.parametrize("way", ["file/x", "file/x/y", "dangling/x"])
def test_what_is_on_the_way_is_a_directory(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError) as caught:
        merge(str(tmp_path / "file"), str(tmp_path / way), str(tmp_path))
    assert caught.value.filename in (
        str(tmp_path / way),
        str(tmp_path / way.partition("/")[0]),
        str(tmp_path / "file" / "x"),
    )


def test_a_deep_tree(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    here = os.open(source, os.O_RDONLY)
    try:
        for _ in range(1500):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        merge(str(source), str(target), str(tmp_path))
        assert os.path.isdir(target / Path(*["d"] * 1500))
    finally:
        os.close(here)
        for path in (source, target):
            remove_tree(path)  # which pytest could not


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "copy").write_bytes(b"other")
    merge(str(tmp_path / "file"), str(tmp_path / "copy"), str(tmp_path))
    assert (tmp_path / "copy").read_bytes() == b""


def test_holes_stay_holes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(2**24)
        file.write(b"x" * 5000)
        file.truncate(2**26)
    merge(str(tmp_path / "sparse"), str(tmp_path / "copy"), str(tmp_path))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 2**20


def test_what_would_be_lost_with_the_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cross-device"):
        merge(str(tmp_path / "file"), str(tmp_path / "copy"), "/proc")
    assert not (tmp_path / "copy").exists()


def test_lines_are_added_on_lines_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "environment"
    append(str(path), "A=1\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.write_text("KEPT=1")
    path.chmod(0o600)
    for _ in range(2):
        append(str(path), "A=it's $HOME\n")
    assert path.read_text() == "KEPT=1\nA=it's $HOME\nA=it's $HOME\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    (tmp_path / "link").symlink_to(path)
    append(str(tmp_path / "link"), "B=\n")
    assert path.read_text().endswith("\nB=\n")
    with pytest.raises(OSError, match="too large"):
        append(str(path), "x" * 2**20)
    assert path.stat().st_size < 100


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_lines_are_added_to_files_only(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match=r"."):
        append(str(tmp_path / kind), "A=1\n")
