"""Files of a real guest: who may do what there, that nothing is confused on the way, and that memory stays flat."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio

from trio_sandbox import GuestPath, OutputChunk, Sandbox, open_sandbox

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_sandbox() as sandbox:
        yield sandbox


async def shell(sandbox: Sandbox, line: str, user: str | None = None) -> str:
    completed = await sandbox.run_process(line, shell=True, capture_stdout=True, user=user)
    return completed.stdout.decode()


async def test_files_of_a_guest(sandbox: Sandbox, tmp_path: Path) -> None:
    await acts_as_its_user(sandbox)
    await follows_no_link_further_than_its_user(sandbox)
    await uploads_over_files_as_their_user_may(sandbox, tmp_path)
    await carries_trees(sandbox, tmp_path)
    await carries_much_and_holds_up_nobody(sandbox, tmp_path)
    await brings_back_only_what_was_written_to(sandbox, tmp_path)
    await survives_want_of_memory_and_disk(sandbox, tmp_path)


async def acts_as_its_user(sandbox: Sandbox) -> None:
    path = sandbox.path("a.txt")
    assert await path.resolve() == sandbox.path("/home/user/a.txt")
    await path.write_text("hello")
    assert (await path.stat()).st_uid == 1000
    assert await shell(sandbox, "cat a.txt; id -u") == "hello1000\n"
    await shell(sandbox, "echo secret > /root/secret; chmod 600 /root/secret", user="root")
    for attempt in (
        sandbox.path("/root/secret").read_text,
        sandbox.path("/etc/new").touch,
        sandbox.path("/etc/passwd").unlink,
    ):
        with pytest.raises(PermissionError) as caught:
            await attempt()
        assert caught.value.filename
    assert await sandbox.path("/root/secret", user="root").read_text() == "secret\n"
    await sandbox.path("/etc/new", user="root").write_text("x")
    assert (await sandbox.path("/etc/new").stat()).st_uid == 0
    with pytest.raises(FileNotFoundError) as caught_user:
        await sandbox.path("x", user="nobody-of-that-name").stat()
    assert caught_user.value.filename == "nobody-of-that-name"
    # The agent's own files are nowhere to be seen, and nor is the helper, for its user.
    assert not await sandbox.path("/agent", user="root").exists()
    script = "for p in /proc/[0-9]*; do grep -q python $p/comm && echo $p; done; true"
    assert set((await shell(sandbox, script)).split()) < set((await shell(sandbox, script, user="root")).split())


async def brings_back_only_what_was_written_to(sandbox: Sandbox, tmp_path: Path) -> None:
    (project := tmp_path / "project").mkdir()
    (project / "large").write_bytes(os.urandom(2**22))
    (project / "small").write_text("one two three\n")
    await sandbox.push(project, "project")

    def known() -> set[str]:
        (base,) = sandbox._bases.values()  # pyright: ignore[reportPrivateUsage]
        return set(base.states)

    assert known() == {"large", "small"}
    # The same time and length as before, by programs that keep both.
    await shell(sandbox, "cd project; sed s/two/TWO/ small > new; touch -r small new; cp -p new small; rm new")
    assert [str(change) for change in await sandbox.pull("project", project)] == ["changed small"]
    assert (project / "small").read_text() == "one TWO three\n"
    code = "import mmap; f = open('project/large', 'r+b'); m = mmap.mmap(f.fileno(), 0); m[:3] = b'new'"
    await sandbox.run(code, check=True)
    assert [str(change) for change in await sandbox.pull("project", project)] == ["changed large"]
    await sandbox.run("import time; time.sleep(1.1)", check=True)  # what was under way is complete
    assert await sandbox.pull("project", project) == ()
    assert known() == {"large", "small"}
    await sandbox.run("m[-3:] = b'end'", check=True)
    assert [str(change) for change in await sandbox.pull("project", project)] == ["changed large"]
    assert (project / "large").read_bytes().endswith(b"end")
    await sandbox.run("m.close(); f.close()", check=True)


async def follows_no_link_further_than_its_user(sandbox: Sandbox) -> None:
    await shell(sandbox, "ln -s /root/secret link; ln -s /root dir; echo mine > /tmp/mine; ln -s /tmp/mine good")
    for name in ("link", "dir/secret"):
        with pytest.raises(PermissionError):
            await sandbox.path(name).read_bytes()
        with pytest.raises(PermissionError):
            await sandbox.path(name).write_bytes(b"overwritten")
    assert await sandbox.path("good").read_text() == "mine\n"
    assert await sandbox.path("/root/secret", user="root").read_text() == "secret\n"


async def uploads_over_files_as_their_user_may(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    await shell(sandbox, "echo mine > locked; chmod 400 locked")
    with pytest.raises(PermissionError):
        await sandbox.upload(tmp_path / "new", "locked")
    await shell(sandbox, "echo old > /etc/mine; chown 1000 /etc/mine", user="root")
    await sandbox.upload(tmp_path / "new", "/etc/mine")
    assert (
        await shell(sandbox, "cat locked /etc/mine; ls -d /etc/.trio* /var/tmp/.trio* 2>&1 | wc -l") == "mine\nnew2\n"
    )
    with pytest.raises(PermissionError):
        await sandbox.upload(tmp_path / "new", "/etc/passwd")


async def carries_trees(sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    for number in range(200):
        directory = source / f"d{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file {number}").write_bytes(os.urandom(number * 50))
    (source / "empty").mkdir(mode=0o555)
    (source / "link").symlink_to("/etc/passwd")
    (source / "d1" / "program").write_text("#!/bin/sh\necho ran")
    (source / "d1" / "program").chmod(0o755)
    async with sandbox.watch(".") as changes:
        await sandbox.upload(source, "tree")
        seen = [await changes.receive() for _ in range(3)]
    assert seen[0].kind == "created"
    assert await shell(sandbox, "tree/d1/program; ls -ld tree/empty | cut -c1-10; readlink tree/link") == (
        "ran\ndr-xr-xr-x\n/etc/passwd\n"
    )
    await sandbox.download("tree", tmp_path / "back")
    await trio.run_process(["diff", "-r", "--no-dereference", str(source), str(tmp_path / "back")])
    assert os.readlink(tmp_path / "back" / "link") == "/etc/passwd"
    listed = {str(path) async for path in aiter_of(sandbox.path("tree"))}
    assert listed == {f"tree/{path.relative_to(source)}" for path in source.rglob("*")}


async def aiter_of(path: GuestPath) -> AsyncGenerator[GuestPath]:
    for found in await path.rglob("*"):
        yield found


async def carries_much_and_holds_up_nobody(sandbox: Sandbox, tmp_path: Path) -> None:
    size = 64 * 2**20
    (tmp_path / "large").write_bytes(os.urandom(size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await sandbox.upload(tmp_path / "large", "large")
    async with await sandbox.path("large").open("rb") as stalled:
        await stalled.read(1)
        async with sandbox.stream("import os\nwhile True: os.write(1, b'x' * 65536)") as events:
            # A run that floods, and a file that nobody reads on, with a transfer beside them.
            await events.__anext__()
            await sandbox.download("large", tmp_path / "large back")
            assert isinstance(await events.__anext__(), OutputChunk)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < size / 1024 / 2
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("large", "large back")}
    assert digests == {(await shell(sandbox, "sha256sum large")).split()[0]}


async def survives_want_of_memory_and_disk(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        await sandbox.path("/run/x", user="root").write_bytes(bytes(200 * 2**20))
    assert caught.value.filename == "/run/x"
    assert await sandbox.path("/run", user="root").is_dir()
    assert [str(path) for path in await sandbox.path("/run", user="root").glob(".trio-sandbox-*")] == []
    # The disk, too, of which 20 MB are left.
    filler = "fallocate -l $(( $(df --output=avail -B1 / | tail -1) - 20000000 )) /filler"
    await shell(sandbox, filler, user="root")
    with pytest.raises(OSError, match="No space left") as caught:
        await sandbox.upload(tmp_path / "large", "too large")
    assert caught.value.filename == "too large"
    assert (await shell(sandbox, "ls -A | grep -e too -e .trio-sandbox || true")) == ""
    await shell(sandbox, "rm /filler", user="root")
    await sandbox.upload(tmp_path / "large", "too large")
    assert (await shell(sandbox, "cmp large 'too large'")) == ""
    assert (await sandbox.run("print('on')")).stdout == "on\n"
