"""What can be asked of an open sandbox, each with what may be there after it was cancelled, wherever that was.

`Stage` is where they take place. It checks after each that the sandbox has what it had, that what was made is all there or
not there, and that nothing is left that nobody asked for: see `Stage.check`.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import attrs
import trio

from trio_sandbox import GuestProcess, Sandbox

from ._leaks import open_fds
from .soak._watch import all_tasks

#: Path below the directory -> mode, and what the file holds, in short.
Listing: TypeAlias = "dict[str, list[str]]"

#: Processes of file helpers that a guest keeps for later; so many sessions at once, and they are all there.
_HELPERS = 4
#: Looks until what is not gone is left for good, and seconds between two.
_LOOKS, _PAUSE = 200, 0.05


def listing(directory: str) -> Listing:
    """Give all that is in a directory; this runs in the guest, too."""
    import hashlib
    import os
    import stat

    found: Listing = {}
    for root, directories, files in os.walk(directory):
        for name in directories + files:
            path = os.path.join(root, name)
            mode = stat.filemode(os.lstat(path).st_mode)
            content = ""
            if mode[0] == "-":
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()[:16]
            elif mode[0] == "l":
                content = os.readlink(path)
            found[os.path.relpath(path, directory)] = [mode, content]
    return found


def processes() -> list[str]:
    """Give the command lines of what runs beside the interpreter, file helpers left out; this runs in the guest."""
    import os

    def read(pid: str, name: str) -> str:
        try:
            with open(f"/proc/{pid}/{name}") as file:
                return file.read()
        except OSError:
            return ""

    spawner = str(os.getppid())
    found: list[str] = []
    waiting = [spawner]
    while waiting:
        parent = waiting.pop()
        children = read(parent, f"task/{parent}/children").split()
        waiting += children
        for child in children:
            command = read(child, "cmdline")
            if child != str(os.getpid()) and command not in ("", read(spawner, "cmdline")):
                found.append(command.replace("\0", " ").strip())
    return sorted(found)


#: A server in a thread of the interpreter's, which sends back what it gets; prints its port.
_SERVER = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0), backlog=64)
def echo(connection):
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
def serve():
    while True:
        threading.Thread(target=echo, args=[server.accept()[0]], daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
print(server.getsockname()[1])
"""


@attrs.frozen
class Leftover:
    """What nobody wants to have more of afterwards."""

    tasks: int
    descriptors: int
    streams: int
    processes: Counter[str]
    """By command line, in the guest."""

    def minus(self, before: Leftover) -> dict[str, object]:
        """Tell what there is more than *before*."""
        numbers = {name: getattr(self, name) - getattr(before, name) for name in attrs.fields_dict(Leftover)}
        return {name: more for name, more in numbers.items() if (more if name == "processes" else more > 0)}


@attrs.define(eq=False)
class Stage:
    """A sandbox with something in it, and a directory on each side. Made by `prepare`."""

    sandbox: Sandbox
    here: Path
    there: str
    port: int = 0
    kept: Listing = attrs.field(factory=dict[str, list[str]])
    before: Leftover | None = None

    @property
    def tree(self) -> Path:
        """A tree on the host."""
        return self.here / "tree"

    async def check(self, operation: Operation) -> None:
        """Assert that all is as it was before *operation*, or as after it, and tidy up.

        The interpreter has its variable and its thread, the files are what they were, what was made is whole, and no task, stream,
        descriptor or process has been left.
        """
        result = await self.sandbox.run(f"print(json.dumps([x, listing({self.there!r}), processes()])); tidy()")
        assert result.exit_code == 0, result.stderr
        value, found, running = json.loads(result.stdout)
        assert value == 12345
        assert {name: what for name, what in found.items() if not name.startswith("new")} == self.kept
        made = {name.removeprefix("new/"): what for name, what in found.items() if name.startswith("new/")}
        assert operation.leaves(made, self.kept), made
        received = listing(str(self.here / "new"))
        shutil.rmtree(self.here / "new")
        (self.here / "new").mkdir()
        assert operation.leaves_here(received, self.kept), received
        assert self.before is not None
        left = self._now(running).minus(self.before)
        for _ in range(_LOOKS):
            if not left:
                return
            await trio.sleep(_PAUSE)  # the guest may need its time
            left = (await self.count()).minus(self.before)
        raise AssertionError(f"left behind: {left}")

    async def count(self) -> Leftover:
        """Count what is there."""
        return self._now(json.loads((await self.sandbox.run("print(json.dumps(processes()))")).stdout))

    def _now(self, running: list[str]) -> Leftover:
        streams = self.sandbox._slot.machine.guest.statistics().open_streams  # pyright: ignore[reportPrivateUsage]
        return Leftover(sum(1 for _ in all_tasks()), len(open_fds()), streams, Counter(running))

    async def fill_helpers(self) -> None:
        """Have as many file helpers as are ever kept."""

        async def hold(holding: trio.Event, go: trio.Event) -> None:
            async with await self.sandbox.path(self.there, "kept", "file").open("rb"):
                holding.set()
                await go.wait()

        events = [trio.Event() for _ in range(_HELPERS)]
        go = trio.Event()
        async with trio.open_nursery() as nursery:
            for event in events:
                nursery.start_soon(hold, event, go)
            for event in events:
                await event.wait()
            go.set()


async def prepare(sandbox: Sandbox, here: Path, there: str) -> Stage:
    """Give a stage: *here* and *there* are empty directories of its own."""
    (here / "tree/sub/empty").mkdir(parents=True)
    (here / "tree/sub/large").write_bytes(os.urandom(300_000))
    for number in range(6):
        (here / f"tree/sub/file{number}").write_bytes(os.urandom(500 * number))
    (here / "tree/program").write_text("#!/bin/sh\n")
    (here / "tree/program").chmod(0o755)
    (here / "tree/link").symlink_to("sub/file1")
    (here / "new").mkdir()
    await sandbox.upload(here / "tree", f"{there}/kept")
    await sandbox.path(there, "kept", "file").write_bytes(b"kept")
    sources = "".join(inspect.getsource(function) for function in (listing, processes))
    setup = f"""
from __future__ import annotations
import json, os, shutil
{sources}
def tidy():
    shutil.rmtree({there!r} + "/new")
    os.mkdir({there!r} + "/new")
os.mkdir({there!r} + "/new")
x = 12345
"""
    result = await sandbox.run(setup)
    assert result.exit_code == 0, result.stderr
    stage = Stage(sandbox, here, there, port=int((await sandbox.run(_SERVER)).stdout))
    found = json.loads((await sandbox.run(f"print(json.dumps(listing({there!r})))")).stdout)
    stage.kept = {name: what for name, what in found.items() if not name.startswith("new")}
    await stage.fill_helpers()
    return stage


def _nothing(made: Listing, kept: Listing) -> bool:
    return not made


@attrs.frozen
class Operation:
    """Something that can be done on a stage, and cancelled."""

    do: Callable[[Stage], Awaitable[object]]
    leaves: Callable[[Listing, Listing], bool] = _nothing
    """Whether what it made in the guest, given what is kept there, may be there after it was cancelled anywhere."""
    leaves_here: Callable[[Listing, Listing], bool] = _nothing
    """The same, on the host."""


def _tree_or_nothing(made: Listing, kept: Listing) -> bool:
    """Whether the tree came whole or not at all."""
    whole = {name.replace("kept", "tree", 1): what for name, what in kept.items() if name != "kept/file"}
    return made in ({}, whole)


def _one_of(*allowed: dict[str, str]) -> Callable[[Listing, Listing], bool]:
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
    "download a tree": Operation(_download, leaves_here=_sub_or_nothing),
    "download a file": Operation(_download_file, leaves_here=_one_of({}, {"file": "-rw-r--r--"})),
    "connection": Operation(_connection),
    "forwarding": Operation(_forwarding),
}
