"""What `pull` copies: files that were written to, whatever time they show, and no others."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import attrs
import pytest

from tests._leaks import wait_until
from trio_sandbox import Sandbox
from trio_sandbox.guest import changes
from trio_sandbox.guest.trees import HEADER
from trio_sandbox.sandbox import _changes
from trio_sandbox.sandbox._changes import ChangesWriter

from ._guest import FakeMachine
from ._sandbox import open_local_sandbox


@attrs.frozen
class Work:
    """A directory here and in the guest, and what came of it."""

    sandbox: Sandbox
    machine: FakeMachine
    here: Path
    there: Path
    came: list[str]

    async def pull(self, **options: object) -> list[str]:
        """Pull; return the names of the files that came as they are."""
        await settled(self.there)
        self.came.clear()
        await self.sandbox.pull(os.fspath(self.there), self.here, **options)  # type: ignore[arg-type]
        return sorted(self.came)


async def settled(directory: Path) -> None:
    """Wait until the kernel's clock has gone on since the last change."""
    newest = max((path.lstat().st_ctime_ns for path in directory.rglob("*")), default=0)
    await wait_until(lambda: time.clock_gettime_ns(5) > newest)


def same_file_system_tells(path: Path) -> bool:
    return os.major(path.stat().st_dev) != 0


@pytest.fixture
async def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Work]:
    monkeypatch.setattr(_changes, "_UNDER_WAY", 0)  # nothing is, when a test pulls
    came: list[str] = []
    note = ChangesWriter._note  # pyright: ignore[reportPrivateUsage]

    def spy(self: ChangesWriter, tag: bytes, payload: bytes) -> None:
        note(self, tag, payload)
        if tag == b"f":
            came.append(self._last)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(ChangesWriter, "_note", spy)
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("a", "b", "sub/c", "sub/d", ".git/config"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(f"{name:20}")
    async with open_local_sandbox() as (sandbox, machine):
        await sandbox.push(here, os.fspath(there))
        yield Work(sandbox, machine, here, there, came)


async def test_only_what_was_written_to_comes(work: Work) -> None:
    if not same_file_system_tells(work.there):
        pytest.skip("the temporary directory is on a file system that tells no states")
    assert await work.pull() == []
    (work.there / "a").write_text("changed")
    assert await work.pull(dry_run=True) == ["a"]
    assert "changed" in await work.sandbox.diff(os.fspath(work.there), work.here)
    assert await work.pull() == ["a"]
    assert await work.pull() == []
    (work.there / "new").write_text("new")
    (work.there / "sub" / "c").unlink()
    assert await work.pull() == ["new"]
    assert not (work.here / "sub" / "c").exists()
    assert (work.here / "new").read_text() == "new"
    # What was changed on both sides comes until it is settled.
    (work.there / "b").write_text("there")
    (work.here / "b").write_text("here")
    assert await work.pull(on_conflict="skip") == ["b"]
    assert await work.pull(on_conflict="skip") == ["b"]
    assert await work.pull(on_conflict="overwrite") == ["b"]
    assert await work.pull() == []
    # What was left out is not known.
    assert await work.pull(exclude=()) == [".git/config"]


async def test_what_is_known_counts_as_well(work: Work) -> None:
    large = work.there / "large"
    large.write_bytes(b"x" * 100_000)
    await work.pull()
    (work.there / "small").write_text("x")
    with pytest.raises(OSError, match="allowed"):
        await work.pull(max_bytes=90_000)
    assert not (work.here / "small").exists()
    await work.pull(max_bytes=200_000)


async def test_another_machine_knows_nothing(work: Work) -> None:
    """One that goes on from a saved state may have programs that write to what was written out since."""
    await work.pull()
    (base,) = work.sandbox._bases.values()  # pyright: ignore[reportPrivateUsage]
    assert not base.known(FakeMachine(work.machine.guest, lambda: None))
    assert base.known(work.machine) or not same_file_system_tells(work.there)


def copy_with_its_times(file: Path) -> None:
    other = file.with_name("other")
    other.write_text(f"{'by cp':20}")
    shutil.copystat(file, other)
    subprocess.run(["cp", "-p", other, file], check=True)
    other.unlink()


def unpack_with_its_times(file: Path) -> None:
    times = file.stat()
    file.write_text(f"{'by tar':20}")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    subprocess.run(["tar", "cf", "archive", file.name], cwd=file.parent, check=True)
    file.write_text("")
    subprocess.run(["tar", "xf", "archive"], cwd=file.parent, check=True)
    (file.parent / "archive").unlink()


def rename_one_of_the_same_size(file: Path) -> None:
    other = file.with_name("other")
    other.write_text(f"{'renamed':20}")
    shutil.copystat(file, other)
    other.rename(file)


def write_to_another_name(file: Path) -> None:
    other = file.with_name("other")
    os.link(file, other)
    times = file.stat()
    other.write_text(f"{'by another name':20}")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.unlink()


def exchange_directories(file: Path) -> None:
    copy = file.parent.with_name("copy")
    shutil.copytree(file.parent, copy)  # with all times
    (copy / file.name).write_text(f"{'in another directory':20}")
    shutil.copystat(file, copy / file.name)
    shutil.rmtree(file.parent)
    copy.rename(file.parent)


def make_executable(file: Path) -> None:
    file.chmod(0o755)


def replace_by_a_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("d")


CHANGES: list[Callable[[Path], None]] = [
    copy_with_its_times,
    unpack_with_its_times,
    rename_one_of_the_same_size,
    write_to_another_name,
    exchange_directories,
    make_executable,
    replace_by_a_link,
]


@pytest.mark.parametrize("known", ["pushed", "pulled"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_no_change_is_missed(work: Work, change: Callable[[Path], None], known: str) -> None:
    if known == "pulled":
        (work.there / "sub" / "c").write_text(f"{'once':20}")
        await work.pull()
    change(work.there / "sub" / "c")
    assert [each.path for each in await work.sandbox.pull(os.fspath(work.there), work.here)] == ["sub/c"]
    here, there = work.here / "sub" / "c", work.there / "sub" / "c"
    assert here.read_bytes() == there.read_bytes()
    assert os.access(here, os.X_OK) == os.access(there, os.X_OK)
    assert here.is_symlink() == there.is_symlink()


async def test_what_is_written_to_a_mapped_file_is_not_missed(work: Work) -> None:
    file = work.there / "a"
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        for number in range(4):
            mapped[:8] = b"number %d" % number
            assert [each.path for each in await work.sandbox.pull(os.fspath(work.there), work.here)] == ["a"], number
            assert (work.here / "a").read_bytes() == file.read_bytes()
            await settled(work.there)
            # Now its state is known, while it is mapped and can be written to.
            await work.pull()


async def test_what_may_change_unnoticed_has_no_state(work: Work) -> None:
    file = work.there / "a"
    file.write_text("new")
    await settled(work.there)

    def has_states(patience: int, *, written_out: bool) -> bool:
        reader = changes.ChangesReader(os.fspath(work.there), {}, (), patience, lambda _: written_out)
        return changes.STATE in tags(b"".join(reader.batches()))

    assert not has_states(10**12, written_out=True)  # the kernel notes the time before it makes a change
    assert not has_states(0, written_out=False)
    assert has_states(0, written_out=True) == same_file_system_tells(work.there)


def tags(data: bytes) -> set[bytes]:
    found: set[bytes] = set()
    position = 0
    while position < len(data):
        tag, length = HEADER.unpack_from(data, position)
        found.add(tag)
        position += HEADER.size + length
    return found
