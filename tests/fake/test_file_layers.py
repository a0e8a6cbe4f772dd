"""Files, variables and Debian packages as steps of images: what is copied, what is refused, what is left of what went wrong."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import trio

from trio_sandbox import Image, ImageBuildError
from trio_sandbox.image import LayerJob
from trio_sandbox.qemu import remove_tree

from .test_image_layers import make_site


async def test_files_are_copied_as_they_are(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    (tool / "sub").mkdir(parents=True)
    (tool / "sub" / "run").write_text("x")
    (tool / "link").symlink_to("sub/run")
    (tmp_path / "single.sh").write_text("echo")
    image = Image("python").files({"/opt/it's": tool, "/usr/local/bin/single": tmp_path / "single.sh"})
    site = make_site(tmp_path)
    first = await site.ensure(image)
    assert set(site.seen[0]) == {
        "/run/image-step/0/sub/run",
        "/run/image-step/0/link",
        "/run/image-step/1",
    }
    assert await site.ensure(image) == first
    # What decides is what is in them.
    (tool / "sub" / "run").touch()
    assert await site.ensure(image) == first
    for change in (
        lambda: (tool / "sub" / "run").write_text("y"),
        lambda: (tool / "sub" / "run").chmod(0o755),
        (tool / "more").mkdir,
        lambda: (tool / "link").rename(tool / "link2"),
    ):
        change()
        assert (await site.ensure(image)).digest != first.digest
    assert len(site.jobs) == 5


async def test_files_that_can_not_be_copied(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    with pytest.raises(ImageBuildError, match="none can't be read for an image: No such file"):
        await site.ensure(Image("python").files({"/opt/none": tmp_path / "none"}))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageBuildError, match="fifo is neither a file, a directory nor a symbolic link"):
        await site.ensure(Image("python").files({"/opt/fifo": tmp_path / "fifo"}))
    assert site.jobs == []


async def test_a_directory_that_has_the_cache_in_it_is_refused(tmp_path: Path) -> None:
    """The copy would be in what is copied, and have no end."""
    site = make_site(tmp_path)
    await site.store.ensure("python")
    (tmp_path / "link").symlink_to(tmp_path)
    for source in (tmp_path, tmp_path / "cache", tmp_path / "link"):
        with pytest.raises(ImageBuildError, match="has the cache directory in it, where images are made"):
            await site.ensure(Image("python").files({"/opt/all": source}))
    assert site.jobs == []
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_files_of_any_kind_and_depth_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    deep = os.open(source, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=deep))
    os.close(deep)
    (source / "closed").mkdir()
    (source / "closed" / "file").write_text("x")
    (source / "closed" / "file").chmod(0o400)
    (source / "closed").chmod(0o500)
    (source / "directory").symlink_to("closed")
    os.utime(source / "closed", ns=(1, 1_000_000_007))
    modes: list[int] = []
    times: list[int] = []

    async def look(job: LayerJob) -> None:
        await trio.lowlevel.checkpoint()
        assert job.work.tree is not None
        copy = job.work.tree / "0"
        modes.extend((copy / name).lstat().st_mode & 0o777 for name in ("closed", "closed/file"))
        times.append((copy / "closed").stat().st_mtime_ns)
        assert (copy / "directory").is_symlink()
        assert (copy / Path(*["d"] * 600) / "bottom").exists()

    site = make_site(tmp_path)
    site.before = look
    try:
        await site.ensure(Image("python").files({"/opt/all": source}))
    finally:
        remove_tree(source)  # which pytest could not
    assert (modes, times) == ([0o500, 0o400], [1_000_000_007])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_disk_that_is_full_while_files_are_copied(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    for name in range(100):
        (tmp_path / "source" / f"file{name}").write_text("x")
    site = make_site(tmp_path)
    await site.store.ensure("python")

    def fail(_: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), os.fspath(target))

    monkeypatch.setattr(shutil, "copy2", fail)
    with pytest.raises(ImageBuildError, match=r"^the disk of .*staging is full; free some, or use another") as caught:
        await site.ensure(Image("python").files({"/opt/all": tmp_path / "source"}))
    assert len(str(caught.value)) < 300
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_apt_says_what_it_needs(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    await site.ensure(Image("python").apt("hello"))
    script = site.jobs[0].work.script.replace("apt-get", "no-such-program")
    done = await trio.run_process(["/bin/sh", "-e", "-c", script], capture_stderr=True, check=False)
    assert done.returncode == 127
    assert done.stderr.startswith(b"the image has no no-such-program, which .apt() needs: take an image of Debian")


async def test_prune_leaves_alone_what_is_being_written(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    await site.store.ensure("python")
    long_ago = time.time() - 7200
    kept: list[Path] = []
    for directory, name in (
        (site.store.pylocks, f"pylock-{'a' * 32}"),
        (site.store.containers, f"container-{'b' * 32}"),
    ):
        directory.mkdir()
        (directory / name).write_text("of nothing that is there")
        for half in (f"{name}.0123456789abcdef", f"new-{name}.0123456789abcdef"):
            (directory / f"{half}").write_text("half")
            kept.append(directory / half)
            (directory / f"{half}0").write_text("half")
            os.utime(directory / f"{half}0", (long_ago, long_ago))
    await site.store.prune()
    left = {*site.store.pylocks.iterdir(), *site.store.containers.iterdir()}
    assert left >= {path for path in kept if not path.name.startswith("new-pylock")}
    assert not any(path.name.endswith("f0") for path in left if not path.name.startswith("new-pylock"))
    assert not any(path.name in (f"pylock-{'a' * 32}", f"container-{'b' * 32}") for path in left)


async def test_files_and_variables_need_no_program_of_the_image(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    (tmp_path / "tool").write_text("x")
    image = Image("python").env({"A": "it's $HOME", "B": ""}).files({"/opt/it's": tmp_path / "tool"})
    await site.ensure(image)
    variables, files = (job.work for job in site.jobs)
    assert (variables.script, variables.program, variables.tree) == ("", (), None)
    assert variables.file_requests == (("append", "/etc/environment", "A=it's $HOME\nB=\n"),)
    assert (files.script, files.program) == ("", ())
    assert files.file_requests == (("merge", "/run/image-step/0", "/opt/it's"),)
