"""Where an operation on a sandbox takes place that may be cancelled anywhere, and what must be there afterwards."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, cast

import attrs
import trio

from trio_sandbox import Host, Sandbox
from trio_sandbox.qemu import Vm

from ._leaks import open_fds
from .soak._watch import all_tasks

#: Path below the directory -> mode, and what the file holds, in short.
Listing: TypeAlias = "dict[str, list[str]]"
#: Whether what was made, given what is kept, may be there.
Leaves: TypeAlias = "Callable[[Listing, Listing], bool]"

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
            content = ""
            try:
                mode = stat.filemode(os.lstat(path).st_mode)
                if mode[0] == "-":
                    with open(path, "rb") as file:
                        content = hashlib.sha256(file.read()).hexdigest()[:16]
                elif mode[0] == "l":
                    content = os.readlink(path)
            except FileNotFoundError:
                continue  # it is being removed
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

    # In a virtual machine the spawner is hidden, and what can be seen is the user's own.
    waiting = read(str(os.getppid()), f"task/{os.getppid()}/children").split()
    waiting = waiting or [name for name in os.listdir("/proc") if name.isdigit()]
    found: dict[str, str] = {str(os.getpid()): ""}
    while waiting:
        process = waiting.pop()
        waiting += read(process, f"task/{process}/children").split()
        found.setdefault(process, read(process, "cmdline"))
    # What was forked of the spawner and executes nothing is a file helper.
    return sorted(command.replace("\0", " ") for command in found.values() if command and "\0-I\0-S\0" not in command)


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
    sandboxes: int = 0
    reserved: int = 0
    """MiB of the host's share of memory."""
    files: Counter[str] = attrs.field(factory=Counter[str])
    """Those of the host that belong to no machine that is there."""

    def minus(self, before: Leftover) -> dict[str, object]:
        """Tell what there is more than *before*."""
        numbers = {name: getattr(self, name) - getattr(before, name) for name in attrs.fields_dict(Leftover)}
        return {name: more for name, more in numbers.items() if (more if isinstance(more, Counter) else more > 0)}


@attrs.define(eq=False)
class Stage:
    """A sandbox with something in it, and a directory on each side. Made by `prepare`."""

    sandbox: Sandbox
    here: Path
    there: str
    host: Host | None = None
    """If that is a real one; otherwise there is no virtual machine."""
    port: int = 0
    """Of a server in the guest, if there is one."""
    kept: Listing = attrs.field(factory=dict[str, list[str]])
    neighbours: tuple[Sandbox, ...] = ()
    """Others of the host that are open all the time."""
    before: Leftover | None = None
    reverts: int = 0

    @property
    def tree(self) -> Path:
        """A tree on the host."""
        return self.here / "tree"

    async def check(self, leaves: Leaves, leaves_here: Leaves) -> None:
        """Assert that all is as it was before an operation, or as after it, and tidy up.

        The interpreter has its variable, the files are what they were, of what was made there is what may be, and no task, stream,
        descriptor or process has been left.
        """
        await self._go_back_to_one_machine()
        result = await self.sandbox.run(f"print(json.dumps([x, listing({self.there!r}), processes()])); tidy()")
        assert result.exit_code == 0, result.stderr
        value, found, running = json.loads(result.stdout)
        assert value == 12345
        assert {name: what for name, what in found.items() if not name.startswith("new")} == self.kept
        made = {name.removeprefix("new/"): what for name, what in found.items() if name.startswith("new/")}
        assert leaves(made, self.kept), made
        received = listing(str(self.here / "new"))
        self._tidy_here()
        assert leaves_here(received, self.kept), received
        assert self.before is not None
        left = self._now(running).minus(self.before)
        for _ in range(_LOOKS):
            if not left:
                return
            await trio.sleep(_PAUSE)  # the guest may need its time
            left = (await self.count()).minus(self.before)
        raise AssertionError(f"left behind: {left}")

    async def _go_back_to_one_machine(self) -> None:
        """Wake the sandbox up; one that was reverted has its first machine still, for its share of the host, until it sleeps."""
        if self.host is None:
            return
        statistics = self.sandbox.statistics()
        assert statistics.checkpoints == 0
        if statistics.reverts > self.reverts:
            self.reverts = statistics.reverts
            await self.sandbox.hibernate()
        await self.sandbox.resume()

    async def begin(self) -> None:
        """Remember what is there before anything is cancelled; the operations were done once, so that caches are full."""
        await self.tidy()
        await self.fill_helpers()
        self.before = await self.count()

    async def tidy(self) -> None:
        """Remove what an operation has made."""
        await self._go_back_to_one_machine()
        await self.sandbox.run("tidy()")
        self._tidy_here()

    def _tidy_here(self) -> None:
        shutil.rmtree(self.here / "new")
        (self.here / "new").mkdir()

    async def count(self) -> Leftover:
        """Count what is there."""
        return self._now(json.loads((await self.sandbox.run("print(json.dumps(processes()))")).stdout))

    def _now(self, running: list[str]) -> Leftover:
        streams = self.sandbox._slot.machine.guest.statistics().open_streams  # pyright: ignore[reportPrivateUsage]
        now = Leftover(sum(1 for _ in all_tasks()), len(open_fds()), streams, Counter(running))
        if self.host is None:
            return now
        statistics = self.host.statistics()
        return attrs.evolve(
            now,
            sandboxes=statistics.sandboxes_open,
            reserved=statistics.admission.memory_mib_reserved,
            files=Counter(self._files_of_nobody(self.host)),
        )

    def _files_of_nobody(self, host: Host) -> list[str]:
        directory = host._runtime.directory  # pyright: ignore[reportPrivateUsage]
        used: set[Path | None] = set()
        for sandbox in (self.sandbox, *self.neighbours):
            config = cast("Vm", sandbox._slot.machine).config  # pyright: ignore[reportPrivateUsage]
            used |= {config.overlay, *config.layers, config.mounts, config.memory_file}
        used |= {path.parent for path in used if path is not None}
        names = (path for path in directory.rglob("*") if path not in used)
        return [
            path.name for path in names if not path.relative_to(directory).parts[0].startswith(("pool-", "storage-"))
        ]

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


async def prepare(sandbox: Sandbox, here: Path, there: str, *, host: Host | None = None, serves: bool = True) -> Stage:
    """Give a stage: *here* and *there* are empty directories of its own; *serves*: with a server."""
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
    stage = Stage(sandbox, here, there, host)
    if serves:
        stage.port = int((await sandbox.run(_SERVER)).stdout)
    found = json.loads((await sandbox.run(f"print(json.dumps(listing({there!r})))")).stdout)
    stage.kept = {name: what for name, what in found.items() if not name.startswith("new")}
    return stage
