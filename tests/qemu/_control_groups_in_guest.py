"""Runs in a guest, as root: `trio_sandbox.qemu._control_group` under a kernel that counts memory and processors. Prints what it saw, as JSON.

The guest has no Trio. What the module uses of it, and of its neighbours, is in the texts of `STUBS`, with asyncio.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STUBS = {
    "trio.py": "import asyncio\nclass lowlevel:\n    async def checkpoint():\n        await asyncio.sleep(0)\n",
    "trio_sandbox/__init__.py": "",
    "trio_sandbox/_errors.py": "class SandboxError(Exception):\n    pass\n",
    "trio_sandbox/_observe.py": "from logging import getLogger as part_logger\n",
    "trio_sandbox/qemu/__init__.py": "",
    "trio_sandbox/qemu/_runtime.py": "Runtime = object\n",
    "trio_sandbox/qemu/_process.py": (
        "import contextlib, os, subprocess\n"
        "InheritedFds = contextlib.nullcontext\n"
        "def describe_exit(status): return f'ended with {status}'\n"
        "def minimal_environment(): return {'PATH': os.environ['PATH']}\n"
        "async def run_owned(argv, *, environment, inherited):\n"
        "    done = subprocess.run(argv, env=environment, capture_output=True, text=True)\n"
        "    done.output = lambda: done.stdout + done.stderr\n"
        "    return done\n"
    ),
}
TOP = Path("/tmp/groups")
SOMEBODY = 1000


class Runtime:
    """What the module uses of a host's runtime."""

    def __init__(self) -> None:
        self.directory = Path("/var/tmp/trio-sandbox-0123456789ab")
        self.environment: dict[str, str] = {}

    def guard(self, path: Path) -> None:
        """See to it that it is removed."""

    def release(self, path: Path) -> None:
        """It need not be removed any more."""


def group(name: str, controllers: str = "", parent: Path = TOP) -> Path:
    """Make a group in whose groups those are counted."""
    path = parent / name
    path.mkdir()
    (path / "cgroup.subtree_control").write_text(controllers)
    return path


def move(process: int, path: Path) -> None:
    """Put a process into a group."""
    (path / "cgroup.procs").write_text(str(process))


@contextmanager
def process_in(path: Path):  # type: ignore[no-untyped-def]
    """Have a process there."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        move(process.pid, path)
        yield
        process.kill()


def read(path: Path) -> str:
    """Return what the kernel says."""
    return path.read_text().strip()


async def refused(module: Any, place: Path) -> dict[str, object]:
    """Tell what becomes of a place that can't be used."""
    try:
        async with module.open_control_groups(place, Runtime()):
            error = None
    except module.SandboxError as exc:
        error = str(exc)
    left = [path.name for path in place.iterdir() if path.name.startswith("trio-sandbox")]
    return {"error": error, "left": left, "switched on": read(place / "cgroup.subtree_control")}


def run(command: list[str], *program: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a machine's."""
    return subprocess.run([*command, *program], capture_output=True, text=True, check=False)


async def used(module: Any, choice: object) -> dict[str, object]:
    """Tell what a place is like that can be used."""
    async with module.open_control_groups(choice, Runtime()) as groups:
        seen = look(groups)
    return {**seen, "left": groups.directory.exists()}


def look(groups: Any) -> dict[str, object]:
    """Tell what groups are like, with a machine in one."""
    place = groups.directory.parent
    with groups.enter(16) as command:
        (machine,) = (path for path in groups.directory.iterdir() if path.is_dir())
        seen: dict[str, object] = {
            "place": str(place),
            "switched on": sorted(read(place / "cgroup.subtree_control").split()),
            "weight": read(groups.directory / "cpu.weight"),
            "limits": [read(machine / f"memory.{name}") for name in ("max", "swap.max")],
        }
        own = run(command, "cat", "/proc/self/cgroup").stdout
        seen["inside"] = own.strip().endswith(f"/{groups.directory.name}/{machine.name}")
        seen["greedy"] = run(command, sys.executable, "-c", f"x = bytearray({100 * 2**20})").returncode
        seen["killed"] = "oom_kill 1" in read(machine / "memory.events")
        seen["modest"] = run(command, sys.executable, "-c", "x = bytearray(2**20)").returncode
    return {**seen, "machine left": machine.exists()}


def as_somebody(work: Callable[[], object], path: Path) -> object:
    """Return what becomes of *work* in a process of an ordinary user's in the group *path*."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            move(os.getpid(), path)
            os.setgroups([])
            os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
            os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
            os.write(theirs, json.dumps(work()).encode())
        except Exception:  # noqa: BLE001
            os.write(theirs, json.dumps(traceback.format_exc()).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as file:
        said: object = json.loads(file.read())
    os.waitpid(child, 0)
    return said


async def main() -> None:
    """See what the kernel makes of it all."""
    TOP.mkdir()
    if ctypes.CDLL(None, use_errno=True).mount(b"cgroup2", os.fsencode(TOP), b"cgroup2", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    from trio_sandbox.qemu import _control_group

    module: Any = _control_group
    module._MARGIN_MIB = 16
    seen: dict[str, object] = {}
    # Root in the topmost group.
    move(os.getpid(), TOP)
    seen["auto"] = await used(module, "auto")
    # A place that was delegated, twice: as it is found at first, and as it is left.
    delegated = group("delegated")
    seen["delegated"] = await used(module, delegated)
    seen["again"] = await used(module, delegated)
    # With a process in it, which the kernel takes for two different faults.
    with process_in(group("busy")):
        seen["busy"] = await refused(module, TOP / "busy")
    group("processors", "+cpu")
    with process_in(group("busy", parent=TOP / "processors")):
        seen["busy processors"] = await refused(module, TOP / "processors/busy")
    group("threads", parent=group("domain", "+cpu"))
    (TOP / "domain/threads/cgroup.type").write_text("threaded")
    seen["threads"] = await refused(module, TOP / "domain/threads")
    seen["uncounted"] = await refused(module, group("below", parent=group("above")))
    # An ordinary user's, delegated as systemd does it: with the program in a group in it, and with one elsewhere.
    service = group("service")
    for path in (service, *(service / f"cgroup.{name}" for name in ("procs", "threads", "subtree_control"))):
        os.chown(path, SOMEBODY, SOMEBODY)
    program, elsewhere = group("program", parent=service), group("elsewhere")
    seen["elsewhere"] = as_somebody(lambda: asyncio.run(refused(module, service)), elsewhere)
    seen["service"] = as_somebody(lambda: asyncio.run(used(module, service)), program)
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
