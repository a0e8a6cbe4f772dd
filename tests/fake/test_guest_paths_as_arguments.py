"""Paths in the guest as arguments of runs, processes and transfers; and what processes get by default."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import trio

from trio_sandbox import GuestProtocolError, OutputChunk, RunRefusedError, Sandbox
from trio_sandbox.wire import RecordStream

from ._guest import open_fake_sandbox
from ._sandbox import open_local_sandbox


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


async def stream(sandbox: Sandbox, cwd: Any) -> str:
    async with sandbox.stream("import os; print(os.getcwd())", cwd=cwd) as events:
        return b"".join([event.data async for event in events if isinstance(event, OutputChunk)]).decode().strip()


async def run(sandbox: Sandbox, cwd: Any) -> str:
    return (await sandbox.run("import os; print(os.getcwd())", cwd=cwd)).stdout.strip()


async def run_process(sandbox: Sandbox, cwd: Any) -> str:
    return (await sandbox.run_process(["pwd"], capture_stdout=True, cwd=cwd)).stdout.decode().strip()


async def open_process(sandbox: Sandbox, cwd: Any) -> str:
    async with sandbox.open_process(["pwd"], cwd=cwd) as process:
        assert process.stdout is not None
        return b"".join([data async for data in process.stdout]).decode().strip()


CALLS = [run, stream, run_process, open_process]
Call = Callable[[Sandbox, Any], Awaitable[str]]


@pytest.mark.parametrize("call", CALLS)
async def test_a_directory_is_any_path_in_the_guest(sandbox: Sandbox, tmp_path: Path, call: Call) -> None:
    here = str(await trio.Path(tmp_path).resolve())
    for cwd in (here, PurePosixPath(here), sandbox.path(here)):
        assert await call(sandbox, cwd) == here
    # The local agent's user has no home: helpers are where this process is.
    relative = "../" * os.getcwd().count("/") + here
    assert await call(sandbox, sandbox.path(relative)) == here


@pytest.mark.parametrize("call", CALLS)
async def test_a_directory_that_can_not_be_is_refused_the_same_way(
    sandbox: Sandbox, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "file").write_text("")
    for name, error in (("nothing", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(error) as caught:
            await call(sandbox, sandbox.path(str(tmp_path), name))
        assert (caught.value.filename, caught.value.errno is None) == (str(tmp_path / name), False)
        assert isinstance(caught.value, RunRefusedError) == (call in (run, stream))
    for host in (tmp_path, trio.Path(tmp_path)):
        with pytest.raises(TypeError, match="is a path on the host"):
            await call(sandbox, host)
    with pytest.raises(ValueError, match=r"not 'work'; Sandbox.path\('work'\) starts at the user's home"):
        await call(sandbox, "work")
    async with open_local_sandbox() as (other, _):
        with pytest.raises(ValueError, match="is a path in another sandbox"):
            await call(sandbox, other.path(str(tmp_path)))


async def test_every_language_names_the_directory(sandbox: Sandbox) -> None:
    for language in ("python", "shell"):
        with pytest.raises(FileNotFoundError, match="'/none'") as caught:
            await sandbox.run("1", language=language, cwd="/none")
        assert isinstance(caught.value, RunRefusedError)
        assert caught.value.retry_safe
        assert caught.value.errno == errno.ENOENT


async def test_arguments_are_paths_in_the_guest(sandbox: Sandbox, tmp_path: Path) -> None:
    here = sandbox.path(str(tmp_path))
    done = await sandbox.run_process(["echo", here / "a", PurePosixPath("b"), "c"], capture_stdout=True)
    assert done.stdout.decode() == f"{tmp_path}/a b c\n"
    assert done.args == ["echo", f"{tmp_path}/a", "b", "c"]
    done = await sandbox.run_process(["echo", sandbox.path("x")], cwd="/", capture_stdout=True)
    assert done.stdout.decode() == f"{os.getcwd()}/x\n"
    assert str(await sandbox.path("x").absolute()) == f"{os.getcwd()}/x"
    assert await here.absolute() == here
    async with open_local_sandbox() as (other, _):
        with pytest.raises(ValueError, match="is a path in another sandbox"):
            await sandbox.run_process(["cat", other.path("/x")])


HostPaths: dict[str, Callable[[Sandbox, Any], Awaitable[object]]] = {
    "argument": lambda sandbox, path: sandbox.run_process(["cat", path]),
    "upload": lambda sandbox, path: sandbox.upload("/dev/null", path),
    "download": lambda sandbox, path: sandbox.download(path, "/nowhere"),
    "watch": lambda sandbox, path: sandbox.watch(path).__aenter__(),
    "rename": lambda sandbox, path: sandbox.path("/x").rename(path),
    "hardlink_to": lambda sandbox, path: sandbox.path("/x").hardlink_to(path),
    "symlink_to": lambda sandbox, path: sandbox.path("/x").symlink_to(path),
}


@pytest.mark.parametrize("name", HostPaths)
@pytest.mark.parametrize("kind", [Path, trio.Path], ids=["pathlib", "trio"])
async def test_a_path_of_the_host_is_none_in_the_guest(sandbox: Sandbox, name: str, kind: type) -> None:
    with pytest.raises(TypeError, match=r"Path\('/x'\) is a path on the host"):
        await HostPaths[name](sandbox, kind("/x"))
    for make in (sandbox.path, sandbox.path("/").joinpath, sandbox.path("/").__truediv__):
        with pytest.raises(TypeError, match="is a path on the host"):
            make(kind("/x"))


# --- The environment ---


async def test_the_environment_is_what_processes_get(sandbox: Sandbox) -> None:
    given = await sandbox.environment()
    done = await sandbox.run_process(["env", "-0"], capture_stdout=True)
    assert dict(line.split("=", 1) for line in os.fsdecode(done.stdout).split("\0") if line) == given
    done = await sandbox.run_process(["sh", "-c", "echo $A $HOME"], env={**given, "A": "1"}, capture_stdout=True)
    assert done.stdout.decode() == f"1 {given['HOME']}\n"


@pytest.mark.parametrize("payload", [b"A", b"=x", b"A=1\0\0B=2"])
async def test_what_is_no_environment(payload: bytes) -> None:
    async def guest(records: RecordStream) -> None:
        await records.receive()
        await records.send(b"R", payload, end=True)

    async with open_fake_sandbox({"file": guest}) as (sandbox, _):
        with pytest.raises(GuestProtocolError, match="not a variable"):
            await sandbox.environment()
        with pytest.raises(ValueError, match="`user` must be"):
            await sandbox.environment(user=-1)
