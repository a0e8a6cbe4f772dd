"""A directory that goes into the guest and comes back: with a real agent, and with hosts and guests that change things meanwhile."""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left, open_fds, wait_until
from trio_sandbox import Sandbox, WorkspaceChange, WorkspaceConflictError
from trio_sandbox.guest.agent import files
from trio_sandbox.sandbox._host_tree import Applier, opened, scan
from trio_sandbox.sandbox._plan import plan

from ._sandbox import open_local_sandbox


@attrs.frozen
class Project:
    """A directory here, and what became of it in the guest, which is a directory of ours as well."""

    sandbox: Sandbox
    here: Path
    there: Path
    staging: Path

    async def pull(self, *, on_conflict: str = "raise", **options: object) -> dict[str, str]:
        changes = await self.sandbox.pull(os.fspath(self.there), self.here, on_conflict=on_conflict, **options)  # type: ignore[arg-type]
        return said(changes)

    async def diff(self) -> str:
        return await self.sandbox.diff(os.fspath(self.there), self.here)


def said(changes: tuple[WorkspaceChange, ...] | list[WorkspaceChange]) -> dict[str, str]:
    return {each.path: each.kind + (f" ! {each.conflict}" if each.conflict else "") for each in changes}


def contents(directory: Path) -> dict[str, str]:
    """Give all that is in a directory: what files hold, where links lead."""
    return {
        path.relative_to(directory).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else ""
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
async def project(tmp_path: Path) -> AsyncGenerator[Project]:
    here, there, staging = tmp_path / "project", tmp_path / "guest", tmp_path / "staging"
    for path, text in {
        "src/main.py": "print(1)\n",
        "src/lib/a.py": "a = 1\n",
        "old": "old\n",
        "kept": "kept\n",
    }.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(text)
    (here / "link").symlink_to("src/main.py")
    (here / "out").symlink_to("/etc/hostname")
    (here / "src" / "main.py").chmod(0o640)
    there.mkdir()
    staging.mkdir()
    async with open_local_sandbox() as (sandbox, _):
        sandbox._staging = staging  # pyright: ignore[reportPrivateUsage]
        await sandbox.push(here, os.fspath(there / "work"))
        yield Project(sandbox, here, there / "work", staging)
        assert list(staging.iterdir()) == []


async def test_what_was_changed_in_the_guest_comes_back(project: Project) -> None:
    assert contents(project.there) == contents(project.here)
    assert await project.pull() == {}
    assert await project.diff() == ""
    (project.there / "src" / "main.py").write_text("print(2)\n")
    (project.there / "old").unlink()
    (project.there / "new" / "deep").mkdir(parents=True)
    (project.there / "new" / "deep" / "run").write_text("#!/bin/sh\n")
    (project.there / "new" / "deep" / "run").chmod(0o755)
    (project.there / "new" / "link").symlink_to("../kept")
    (project.there / "src" / "lib" / "a.py").chmod(0o755)
    before = contents(project.here)
    wanted = {
        "new": "added",
        "new/deep": "added",
        "new/deep/run": "added",
        "new/link": "added",
        "old": "removed",
        "src/lib/a.py": "changed",
        "src/main.py": "changed",
    }
    assert await project.pull(dry_run=True) == wanted
    difference = await project.diff()
    assert contents(project.here) == before
    # git makes of it what we do.
    copy = project.staging.parent / "copy"
    shutil.copytree(project.here, copy, symlinks=True)
    await trio.run_process(["git", "apply", "-"], stdin=difference.encode(), cwd=copy)
    with nothing_left():
        assert await project.pull() == wanted
    assert contents(project.here) == contents(project.there) == contents(copy)
    assert stat.S_IMODE((project.here / "src" / "main.py").stat().st_mode) == 0o640
    assert os.access(project.here / "new" / "deep" / "run", os.X_OK)
    assert os.access(project.here / "src" / "lib" / "a.py", os.X_OK)
    assert await project.pull() == {}


async def test_work_goes_on_on_both_sides(project: Project) -> None:
    (project.there / "src" / "main.py").write_text("print(2)\n")
    (project.here / "kept").write_text("changed here\n")
    (project.here / "mine").write_text("only here\n")
    assert await project.pull() == {"src/main.py": "changed"}
    (project.here / "src" / "main.py").write_text("print(3)\n")  # after it came back
    (project.there / "old").write_text("new\n")
    assert await project.pull() == {"old": "changed"}
    assert (project.here / "src" / "main.py").read_text() == "print(3)\n"
    (project.there / "src" / "main.py").write_text("print(4)\n")
    assert await project.pull(on_conflict="skip") == {"src/main.py": "changed ! was changed here, too"}
    assert await project.pull(on_conflict="overwrite") == {"src/main.py": "changed"}
    assert (project.here / "src" / "main.py").read_text() == "print(4)\n"
    assert (project.here / "mine").read_text() == "only here\n"


async def test_a_conflict_is_told_and_nothing_is_done(project: Project) -> None:
    (project.there / "src" / "main.py").write_text("print(2)\n")
    (project.there / "old").unlink()
    (project.there / "evil\x1b[2J\n").symlink_to("/etc")
    (project.here / "old").write_text("changed here\n")
    before = contents(project.here)
    with pytest.raises(WorkspaceConflictError) as caught:
        await project.pull()
    assert contents(project.here) == before
    assert said(caught.value.changes) == {
        "evil\x1b[2J\n": "added ! is a link that leads out of the directory",
        "old": "removed ! was changed here, too",
        "src/main.py": "changed",
    }
    assert caught.value.retry_safe
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert r"added evil\x1b[2J\n: is a link" in str(caught.value)
    await project.pull(on_conflict="skip")
    assert contents(project.here) == {**before, "src/main.py": "print(2)\n"}


async def test_what_was_never_pushed_is_compared_as_it_is(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept\n")
    (other / "old").write_text("another\n")
    (other / "mine").write_text("only here\n")
    changes = said(await project.sandbox.pull(os.fspath(project.there), other, on_conflict="skip"))
    assert changes["old"] == "changed ! is here, too, and another one"
    assert changes["out"] == "added ! is a link that leads out of the directory"
    assert "kept" not in changes
    assert "mine" not in changes
    assert (other / "src" / "main.py").read_text() == "print(1)\n"
    assert (other / "mine").read_text() == "only here\n"


async def test_no_link_is_followed_on_the_host(project: Project, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "main.py").write_text("precious")
    (project.there / "src" / "main.py").write_text("print(2)\n")
    (project.there / "link").unlink()
    (project.there / "link").write_text("a file now")
    shutil.rmtree(project.here / "src")
    (project.here / "src").symlink_to(outside)
    target = contents(outside)
    changes = await project.pull(on_conflict="overwrite")
    assert changes == {"link": "changed", "src/main.py": "added ! would be in a directory that is none here"}
    assert contents(outside) == target
    assert (project.here / "link").read_text() == "a file now"
    assert not (project.here / "link").is_symlink()


@contextmanager
def compared(project: Project) -> Generator[Callable[[], dict[str, str]]]:
    """Yield what brings back what the guest has by then, from a plan that was made before the block."""
    with opened(project.here) as host, opened(project.there) as copy:
        here, guest = scan(host), scan(copy, ours=True).tree
        changes = plan({}, guest, here.tree, overwrite=True)
        yield lambda: said(Applier(host, here, copy, guest).apply(changes))


def replace(path: Path, by: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if by == "file":
        path.write_text("changed here")
    elif by == "directory":
        path.mkdir()
        (path / "mine").write_text("mine")
    elif by == "link":
        path.symlink_to("/tmp")


@pytest.mark.parametrize("by", ["file", "directory", "link", "nothing"])
@pytest.mark.parametrize("where", ["old", "src", "src/lib", "fresh", "gone", "swapped"])
async def test_what_changes_on_the_host_meanwhile_is_not_lost(project: Project, where: str, by: str) -> None:
    for path in ("old", "fresh", "src/lib/a.py", "src/new"):
        (project.there / path).write_text("from the guest")
    (project.here / "gone").mkdir()
    (project.there / "gone").write_text("a file")
    (project.here / "swapped").write_text("a file")
    (project.there / "swapped").mkdir()
    (project.there / "swapped" / "in").write_text("from the guest")
    with compared(project) as bring_back:
        replace(project.here / where, by)
        changed = contents(project.here)
        done = bring_back()
    after = contents(project.here)
    for path, text in changed.items():
        if path == where or path.startswith(f"{where}/"):
            assert after.get(path) == text, (path, done)
    if where != "fresh" or by != "nothing":
        assert any("meanwhile" in change for change in done.values()), done
    assert not any(name.startswith(".trio-sandbox-") for name in os.listdir(project.here))


async def test_the_guest_decides_nothing_but_contents(project: Project) -> None:
    (project.there / "hole").touch()
    os.truncate(project.there / "hole", 2**40)
    with pytest.raises(OSError, match="holes included") as caught:
        await project.pull()
    assert caught.value.errno == errno.EFBIG
    (project.there / "hole").write_text("x")
    os.truncate(project.there / "hole", 2**24)
    (project.there / "closed").mkdir()
    (project.there / "closed" / "file").write_text("x")
    (project.there / "closed").chmod(0o500)
    (project.there / ".git" / "hooks").mkdir(parents=True)
    (project.there / ".git" / "hooks" / "pre-commit").write_text("rm -rf ~")
    (project.there / "setuid").write_text("x")
    (project.there / "setuid").chmod(0o6777)
    assert set(await project.pull()) == {"hole", "closed", "closed/file", "setuid"}
    assert (project.here / "hole").stat().st_blocks * 512 < 2**20
    assert stat.S_IMODE((project.here / "setuid").stat().st_mode) & 0o6022 == 0
    assert not (project.here / ".git").exists()
    assert set(await project.pull(exclude=())) == {".git", ".git/hooks", ".git/hooks/pre-commit"}
    (project.there / "closed").chmod(0o700)


async def test_limits_and_wrong_use(project: Project, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="allowed by `max_bytes`") as caught:
        await project.pull(max_bytes=5000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, os.fspath(project.there))
    for max_bytes in (math.nan, 1e9, True, "1", None):
        with pytest.raises(TypeError, match="`max_bytes` must be a whole number"):
            await project.pull(max_bytes=max_bytes)
    wrong: list[dict[str, Any]] = [
        {"on_conflict": "ask"},
        {"exclude": ["a/b"]},
        {"exclude": [""]},
        {"max_bytes": -1},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match="must"):
            await project.pull(**options)
    with pytest.raises(TypeError, match="exclude"):
        await project.pull(exclude=".git")
    with pytest.raises(TypeError):
        await project.sandbox.pull(project.there, project.here)  # type: ignore[arg-type]
    for local in (tmp_path / "missing", project.here / "kept"):
        with pytest.raises(OSError):  # noqa: PT011 - both
            await project.sandbox.pull(os.fspath(project.there), local)
        with pytest.raises(OSError):  # noqa: PT011 - both
            await project.sandbox.push(local, os.fspath(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(NotADirectoryError):
        await project.sandbox.pull(os.fspath(project.there / "kept"), project.here)
    with pytest.raises(FileNotFoundError):
        await project.sandbox.pull(os.fspath(project.there / "missing"), project.here)
    with pytest.raises(FileNotFoundError, match="nowhere"):  # before the guest is asked for anything
        await project.sandbox.pull(os.fspath(project.there / "missing"), tmp_path / "nowhere")


async def test_what_can_not_come_is_named_with_the_way_out(project: Project) -> None:
    os.mkfifo(project.there / "pipe")
    with pytest.raises(OSError, match="remove it, or name it in `exclude`") as caught:
        await project.pull()
    assert (caught.value.errno, caught.value.filename) == (errno.EOPNOTSUPP, os.fspath(project.there / "pipe"))
    assert await project.pull(exclude=["pipe"]) == {}


async def test_a_cancelled_pull_has_done_all_or_nothing(project: Project) -> None:
    (project.there / "src" / "main.py").write_text("print(2)\n")
    (project.there / "old").unlink()
    before = contents(project.here)

    async with AsyncExitStack() as sessions:
        # As many helpers as the guest's side keeps: while one is busy with what was cancelled, another is started.
        for _ in range(files._IDLE_LIMIT):  # pyright: ignore[reportPrivateUsage]
            await sessions.enter_async_context(project.sandbox.watch(os.fspath(project.there)))
    descriptors = len(open_fds())

    async def check() -> None:
        # Those of the guest's side, which is in this process, too, go when its tasks have their turn.
        await wait_until(lambda: len(open_fds()) <= descriptors)
        assert contents(project.here) in (before, contents(project.there))
        assert list(project.staging.iterdir()) == []

    assert await cancel_at_every_step(project.pull, check=check) > 5
    await project.pull()
    assert contents(project.here) == contents(project.there)
