"""What can be asked of an open sandbox, each with what may be there after it was cancelled, wherever that was.

`Stage` is where they take place, and checks after each that the sandbox has what it had, and that nothing is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import trio

from trio_sandbox import GuestProcess

from ._stage import Leaves, Listing, Stage


def _nothing(made: Listing, kept: Listing) -> bool:
    return not made


@attrs.frozen
class Operation:
    """Something that can be done on a stage, and cancelled."""

    do: Callable[[Stage], Awaitable[object]]
    leaves: Leaves = _nothing
    """Whether what it made in the guest may be there after it was cancelled anywhere."""
    leaves_here: Leaves = _nothing
    """The same, on the host."""

    async def check(self, stage: Stage) -> None:
        """Assert that it left nothing else, and changed nothing else."""
        await stage.check(self.leaves, self.leaves_here)


def _tree_or_nothing(made: Listing, kept: Listing) -> bool:
    """Whether the tree came whole or not at all."""
    whole = {name.replace("kept", "tree", 1): what for name, what in kept.items() if name != "kept/file"}
    return made in ({}, whole)


def _one_of(*allowed: dict[str, str]) -> Leaves:
    """Make a check that names and modes are one of those allowed."""

    def check(made: Listing, kept: Listing) -> bool:
        return {name: mode for name, (mode, _) in made.items()} in allowed

    return check


# --- Processes ---


async def _process(stage: Stage) -> None:
    completed = await stage.sandbox.run_process(["cat"], stdin=b"q" * 100_000, capture_stdout=True)
    assert completed.stdout == b"q" * 100_000


async def _signalled(stage: Stage) -> None:
    command = ["sh", "-c", "read line; echo $line; sleep 1000 & sleep 1000"]
    async with stage.sandbox.open_process(command, stdin=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"hello\n")
        assert await _receive(process) == b"hello\n"
        process.terminate()
        await process.wait()


async def _endless(stage: Stage) -> None:
    async with stage.sandbox.open_process(["cat", "/dev/zero"]) as process:
        assert set(await _receive(process)) == {0}


async def _receive(process: GuestProcess) -> bytes:
    assert process.stdout is not None
    return await process.stdout.receive_some()


async def _process_in_nursery(stage: Stage) -> None:
    async with trio.open_nursery() as nursery:
        process: GuestProcess = await nursery.start(stage.sandbox.run_process, ["sleep", "1000"])
        process.kill()
        await process.wait()
        nursery.cancel_scope.cancel(reason="its status is an error, which nobody wants here")


async def _terminal(stage: Stage) -> None:
    async with stage.sandbox.open_process(["sh", "-c", "read line; exit 3"], pty=True) as process:
        assert process.stdio is not None
        await process.stdio.send_all(b"hello\n")
        process.resize(30, 90)
        assert await process.wait() == 3


# --- Files ---


async def _read(stage: Stage) -> None:
    assert len(await stage.sandbox.path(stage.there, "kept/sub/large").read_bytes()) == 300_000


async def _write(stage: Stage) -> None:
    await stage.sandbox.path(stage.there, "new/file").write_bytes(bytes(300_000))


async def _edit(stage: Stage) -> None:
    async with await stage.sandbox.path(stage.there, "new/file").open("w+b") as file:
        await file.write(b"hello")
        await file.seek(1)
        assert await file.read() == b"ello"
        await file.truncate(0)


async def _look_around(stage: Stage) -> None:
    kept = stage.sandbox.path(stage.there, "kept")
    assert len(list(await kept.iterdir())) == 4
    assert len(list(await kept.glob("**/file?"))) == 6
    assert (await kept.stat()).st_mode & 0o777 == 0o755
    assert await (kept / "link").readlink() == (kept / "sub/file1").relative_to(kept)


async def _rearrange(stage: Stage) -> None:
    new = stage.sandbox.path(stage.there, "new")
    await (new / "one").mkdir(mode=0o700)
    await (new / "one").rename(str(new / "two"))
    await (new / "two").chmod(0o711)
    await (new / "link").symlink_to("two")
    await (new / "link").unlink()
    await (new / "two").rmdir()


async def _watch(stage: Stage) -> None:
    async with stage.sandbox.watch(f"{stage.there}/new") as changes:
        await stage.sandbox.path(stage.there, "new/file").touch()
        assert (await changes.receive()).path.name == "file"


async def _upload(stage: Stage) -> None:
    await stage.sandbox.upload(stage.tree, f"{stage.there}/new/tree", progress=lambda _: None)


async def _push(stage: Stage) -> None:
    await stage.sandbox.push(stage.tree, f"{stage.there}/new/tree")


async def _compare(stage: Stage) -> None:
    changes = await stage.sandbox.pull(f"{stage.there}/kept", stage.tree.parent, dry_run=True)
    assert "sub/large" in [change.path for change in changes]


async def _upload_file(stage: Stage) -> None:
    await stage.sandbox.upload(stage.tree / "sub/large", f"{stage.there}/new/file")


async def _download(stage: Stage) -> None:
    await stage.sandbox.download(f"{stage.there}/kept/sub", stage.here / "new/sub")


async def _download_file(stage: Stage) -> None:
    await stage.sandbox.download(f"{stage.there}/kept/sub/large", stage.here / "new/file")


def _sub_or_nothing(made: Listing, kept: Listing) -> bool:
    return made in ({}, {name.removeprefix("kept/"): what for name, what in kept.items() if "kept/sub" in name})


# --- Tunnels ---


async def _connection(stage: Stage) -> None:
    await stage.sandbox.wait_port(stage.port)
    async with await stage.sandbox.open_tcp_stream(stage.port) as stream:
        await stream.send_all(b"ping")
        assert await stream.receive_some() == b"ping"
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def _forwarding(stage: Stage) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(stage.sandbox.forward_port, stage.port)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"ping")
            assert await stream.receive_some() == b"ping"
        nursery.cancel_scope.cancel(reason="it is over")


#: All that an agent is enough for, but runs: test_run_cancellation.py has those, and test_functions.py those with functions.
OPERATIONS = {
    "process": Operation(_process),
    "process and a signal": Operation(_signalled),
    "process without end": Operation(_endless),
    "process in a nursery": Operation(_process_in_nursery),
    "terminal": Operation(_terminal),
    "read a file": Operation(_read),
    "write a file": Operation(_write, _one_of({}, {"file": "-rw-r--r--"})),
    "edit a file": Operation(_edit, _one_of({}, {"file": "-rw-r--r--"})),
    "look at directories": Operation(_look_around),
    "change directories": Operation(
        _rearrange,
        _one_of(
            {},
            {"one": "drwx------"},
            {"two": "drwx------"},
            {"two": "drwx--x--x"},
            {"two": "drwx--x--x", "link": "lrwxrwxrwx"},
        ),
    ),
    "watch a directory": Operation(_watch, _one_of({}, {"file": "-rw-r--r--"})),
    "upload a tree": Operation(_upload, _tree_or_nothing),
    "upload a file": Operation(_upload_file, _one_of({}, {"file": "-rw-r--r--"})),
    "push a tree": Operation(_push, _tree_or_nothing),
    "compare a tree": Operation(_compare),
    "download a tree": Operation(_download, leaves_here=_sub_or_nothing),
    "download a file": Operation(_download_file, leaves_here=_one_of({}, {"file": "-rw-r--r--"})),
    "connection": Operation(_connection),
    "forwarding": Operation(_forwarding),
}
