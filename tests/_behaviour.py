"""What a sandbox does, whatever is behind it: classes of tests for those with a VM, on a node, and with a script for a guest.

Who uses them gives fixtures: `sandbox`, whose guest runs Python, and `place`, a directory of the guest's where files may be made.
"""

from __future__ import annotations

import io
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import trio

from trio_sandbox import Sandbox, SandboxClosedError, SandboxHibernatedError, WorkspaceConflictError
from trio_sandbox.testing import Answer, Call


async def run_python(call: Call) -> Answer:
    """Be a guest that runs Python, with the test's own; good for a few lines."""
    await trio.lowlevel.checkpoint()
    if "sleep" in call.code:
        await trio.sleep_forever()
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            exec(call.code, {"files": call.files}, call.state)
        except Exception:  # noqa: BLE001 - whatever the test's code raises
            return Answer(stdout=out.getvalue(), stderr=traceback.format_exc(), exit_code=1)
    return Answer(stdout=out.getvalue())


class Files:
    """Of the double, of an agent in this process, of a node, and of a VM."""

    async def test_contents(self, sandbox: Sandbox, place: str) -> None:
        file = sandbox.path(place, "a")
        assert not await file.exists()
        assert await file.write_bytes(b"x" * 100_000) == 100_000
        assert await file.read_bytes() == b"x" * 100_000
        assert await file.write_text("hello\n") == 6
        assert (await file.stat()).st_size == 6
        assert await file.is_file()
        assert not await file.is_dir()
        async with await file.open("a") as text:
            await text.write("world\n")
        async with await file.open("rb+") as data:
            assert await data.seek(-6, 2) == 6
            assert await data.read(5) == b"world"
            await data.seek(0)
            await data.write(b"HELLO")
            await data.truncate(9)
        assert await file.read_text() == "HELLO\nwor"
        async with await file.open("w") as text:
            await text.write("new")
        assert await file.read_text() == "new"
        async with await sandbox.path(place, "hole").open("xb") as data:
            await data.seek(3)
            await data.write(b"x")
        assert await sandbox.path(place, "hole").read_bytes() == b"\0\0\0x"

    async def test_names(self, sandbox: Sandbox, place: str) -> None:
        top = sandbox.path(place, "top")
        await (top / "b" / "c").mkdir(parents=True)
        await (top / "a").touch()
        await (top / "b" / "a.txt").write_text("1")
        assert sorted(path.name for path in await top.iterdir()) == ["a", "b"]
        assert [path.name for path in await top.glob("**/*.txt")] == ["a.txt"]
        moved = await (top / "b").rename(top / "d")
        assert sorted(path.name for path in await moved.iterdir()) == ["a.txt", "c"]
        await (moved / "a.txt").replace(top / "a")
        assert await (top / "a").read_text() == "1"
        await (top / "a").chmod(0o600)
        assert (await (top / "a").stat()).st_mode & 0o777 == 0o600
        await (moved / "c").rmdir()
        await moved.rmdir()
        await (top / "a").unlink()
        assert [*await top.iterdir()] == []

    async def test_links(self, sandbox: Sandbox, place: str) -> None:
        target, link = sandbox.path(place, "target"), sandbox.path(place, "link")
        await target.mkdir()
        await link.symlink_to("target")
        await (link / "a").write_text("through")
        assert await (target / "a").read_text() == "through"
        assert str(await link.readlink()) == "target"
        assert await link.is_symlink()
        assert await link.is_dir()
        assert str(await (link / "a").resolve()) == str(await (target / "a").resolve())
        await sandbox.path(place, "hard").hardlink_to(target / "a")
        assert (await (target / "a").stat()).st_nlink == 2
        await link.unlink()
        assert await target.exists()
        loop = sandbox.path(place, "loop")
        await loop.symlink_to("loop")
        with pytest.raises(OSError, match="symbolic links"):
            await loop.read_bytes()

    async def test_errors(self, sandbox: Sandbox, place: str) -> None:
        directory, file = sandbox.path(place, "directory"), sandbox.path(place, "file")
        await directory.mkdir()
        await file.write_text("x")
        await (directory / "inside").write_text("x")
        for wrong, error in (
            (sandbox.path(place, "none").read_bytes, FileNotFoundError),
            (sandbox.path(place, "none", "deeper").touch, FileNotFoundError),
            (sandbox.path(place, "none").rmdir, FileNotFoundError),
            (directory.read_bytes, IsADirectoryError),
            (directory.mkdir, FileExistsError),
            ((file / "below").read_bytes, NotADirectoryError),
            (file.rmdir, NotADirectoryError),
            (directory.rmdir, OSError),
            (file.readlink, OSError),
        ):
            with pytest.raises(error) as info:
                await wrong()
            assert info.value.errno
        with pytest.raises(FileExistsError):
            await file.open("x")
        with pytest.raises(IsADirectoryError):
            await directory.write_bytes(b"x")
        assert await file.read_text() == "x"

    async def test_trees(self, sandbox: Sandbox, place: str, tmp_path: Path) -> None:
        here = tmp_path / "here"
        (here / "deep").mkdir(parents=True)
        (here / "deep" / "large").write_bytes(b"x" * 300_000)
        (here / "script").write_text("x")
        (here / "script").chmod(0o755)
        (here / "link").symlink_to("script")
        sent = await sandbox.upload(here, f"{place}/there")
        assert (sent.files, sent.size) == (3, 300_001)
        assert (await sandbox.path(place, "there", "script").stat()).st_mode & 0o111
        await sandbox.path(place, "there", "added").write_text("new")
        received = await sandbox.download(f"{place}/there", tmp_path / "back")
        assert (received.files, received.size) == (4, 300_004)
        assert (tmp_path / "back" / "deep" / "large").read_bytes() == b"x" * 300_000
        assert (tmp_path / "back" / "link").readlink() == Path("script")
        with pytest.raises(OSError, match="not empty"):
            await sandbox.upload(here, f"{place}/there")
        with pytest.raises(FileNotFoundError):
            await sandbox.download(f"{place}/none", tmp_path / "none")
        assert not (tmp_path / "none").exists()

    async def test_a_workspace_comes_back(self, sandbox: Sandbox, place: str, tmp_path: Path) -> None:
        here = tmp_path / "here"
        here.mkdir()
        (here / "a").write_text("1\n")
        await sandbox.upload(here, f"{place}/there")
        await sandbox.path(place, "there", "a").write_text("2\n")
        await sandbox.path(place, "there", "b").write_text("b\n")
        assert "-1\n+2\n" in await sandbox.diff(f"{place}/there", here)
        (here / "a").write_text("changed here, too\n")
        with pytest.raises(WorkspaceConflictError):
            await sandbox.pull(f"{place}/there", here)


class Life:
    """Of the double and of a VM."""

    async def test_going_back(self, sandbox: Sandbox, place: str) -> None:
        await sandbox.run("x = 1")
        await sandbox.path(place, "a").write_text("1")
        checkpoint = await sandbox.checkpoint()
        for _ in range(2):
            await sandbox.run("x = 2")
            await sandbox.path(place, "a").unlink()
            await sandbox.revert(checkpoint)
            assert (await sandbox.run("print(x)")).stdout == "1\n"
            assert await sandbox.path(place, "a").read_text() == "1"
        assert (sandbox.statistics().checkpoints, sandbox.statistics().reverts) == (1, 2)
        checkpoint.discard()
        with pytest.raises(ValueError, match="discarded"):
            await sandbox.revert(checkpoint)
        with pytest.raises(ValueError, match="nothing to revert to"):
            await sandbox.revert()

    async def test_a_transaction_that_fails_is_undone(self, sandbox: Sandbox, place: str) -> None:
        await sandbox.run("x = 1")
        with pytest.raises(ZeroDivisionError):
            async with sandbox.transaction():
                await sandbox.run("x = 2")
                await sandbox.path(place, "a").write_text("2")
                raise ZeroDivisionError
        async with sandbox.transaction():
            assert (await sandbox.run("print(x)")).stdout == "1\n"
            await sandbox.run("x = 3")
        assert not await sandbox.path(place, "a").exists()
        assert (await sandbox.run("print(x)")).stdout == "3\n"

    async def test_copies(self, sandbox: Sandbox, place: str) -> None:
        await sandbox.run("x = 1")
        await sandbox.path(place, "a").write_text("1")
        async with sandbox.fork(2) as (left, right):
            await left.run("x = 2")
            await left.path(place, "a").write_text("2")
            async with left.fork(1) as (grandchild,):
                assert (await grandchild.run("print(x)")).stdout == "2\n"
            assert (await right.run("print(x)")).stdout == "1\n"
            assert await right.path(place, "a").read_text() == "1"
        assert (await sandbox.run("print(x)")).stdout == "1\n"
        with pytest.raises(SandboxClosedError):
            await left.run("x")
        with pytest.raises(ValueError, match="at least 1"):
            async with sandbox.fork(0):
                pytest.fail("it was copied")

    async def test_sleep(self, sandbox: Sandbox, place: str) -> None:
        await sandbox.run("x = 1")
        await sandbox.path(place, "a").write_text("1")
        await sandbox.hibernate()
        await sandbox.hibernate()
        numbers = sandbox.statistics()
        assert (numbers.hibernated, numbers.hibernations, numbers.qemu_pid) == (True, 1, None)
        assert repr(sandbox).endswith("hibernated>")
        assert sandbox.failure is None
        with pytest.raises(SandboxHibernatedError):
            await sandbox.run("x")
        with pytest.raises(SandboxHibernatedError):
            await sandbox.path(place, "a").read_text()
        await sandbox.resume()
        assert (await sandbox.run("print(x)")).stdout == "1\n"
        assert await sandbox.path(place, "a").read_text() == "1"
        checkpoint = await sandbox.checkpoint()
        await sandbox.run("x = 2")
        await sandbox.hibernate()
        await sandbox.revert(checkpoint)  # which wakes it up
        assert (await sandbox.run("print(x)")).stdout == "1\n"

    async def test_what_is_under_way_keeps_it_awake(self, sandbox: Sandbox) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sandbox.run, "import time; time.sleep(1000)")
            with trio.fail_after(60):
                while not sandbox.statistics().runs:
                    await trio.lowlevel.checkpoint()
            with pytest.raises(trio.BusyResourceError):
                await sandbox.hibernate()
            nursery.cancel_scope.cancel()
        await sandbox.hibernate()
        await sandbox.resume()

    async def test_a_machine_that_is_gone(self, sandbox: Sandbox) -> None:
        await sandbox.run("x = 1")
        checkpoint = await sandbox.checkpoint()
        sandbox._slot.machine.retire("the test says so")
        assert "the test says so" in str(sandbox.failure)
        with pytest.raises(SandboxClosedError):
            await sandbox.run("x")
        await sandbox.revert(checkpoint)
        assert sandbox.failure is None
        assert (await sandbox.run("print(x)")).stdout == "1\n"

    async def test_errors_are_results(self, sandbox: Sandbox) -> None:
        await sandbox.run("x = 1")
        failed = await sandbox.run("print('before'); 1 / 0")
        assert (failed.exit_code, failed.stdout) == (1, "before\n")
        assert "ZeroDivisionError" in failed.stderr
        assert (await sandbox.run("print(x)")).stdout == "1\n"
