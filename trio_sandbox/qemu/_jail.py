"""A root directory with nothing in it but QEMU, for all virtual machines of a host.

It is made once, in a mount namespace of its own, which a descriptor of this process keeps there. Each QEMU enters it before
it becomes another user, and so finds no file of the host's, no socket and no device to talk to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._errors import SandboxError
from .._nurseries import open_services
from ._process import InheritedFds, OwnedProcess, minimal_environment, require_program, run_owned

#: Where programs and libraries are. Some of them may be links to others.
_PROGRAMS: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
#: Other files that are shown if they are there: without the first, looking for libraries takes longer.
_FILES: Final = ("/etc/ld.so.cache", "/dev/null", "/dev/kvm")
#: Seconds for making it: a few dozen milliseconds.
_PATIENCE: Final = 30.0
#: What a script says that `make_namespace` runs.
READY: Final = "the namespace is ready"
_EXCERPT: Final = 300

#: $1 is an empty directory; then come links, as target and name, an empty word, directories, an empty word, and files.
#: Only where QEMU's user can't be told apart from ours all processes stay visible: a user namespace may not hide them.
_MAKE: Final = f"""
set -e
umask 022
cd "$1"; shift
mount -t tmpfs -o size=64k,mode=755,nosuid,nodev none .
cd "$PWD"
mkdir dev etc proc
while [ -n "$1" ]; do ln -s "$1" ".$2"; shift 2; done
shift
while [ -n "$1" ]; do
    mkdir -p ".$1"; mount -o bind,ro,nosuid,nodev "$1" ".$1"; shift
done
shift
for file; do
    : > ".$file"
    if [ -c "$file" ]; then mount --bind "$file" ".$file"; else mount -o bind,ro,nosuid,nodev "$file" ".$file"; fi
done
mount -t proc -o hidepid=2,nosuid,nodev,noexec none proc 2> /dev/null || mount --rbind /proc proc
mount -o remount,bind,ro,nosuid,nodev .
pivot_root . .
umount -l .
echo {READY}
exec sleep 60
"""


@final
@attrs.frozen
class Jail:
    """A jail that QEMUs can enter, for as long as its block lasts; made by `open_jail` only."""

    mount_fd: int
    """A descriptor of this process's, of the mount namespace."""
    user_fd: int | None
    """The same of the user namespace that it belongs to, where we are an ordinary user."""

    def argv(self) -> list[str]:
        """Return the command that enters it, to put before another."""
        # By our own descriptors, so that QEMU inherits none of them.
        ours = f"/proc/{os.getpid()}/fd"
        command = [require_program("nsenter"), f"--mount={ours}/{self.mount_fd}"]
        if self.user_fd is not None:
            command += [f"--user={ours}/{self.user_fd}", "--preserve-credentials"]
        return [*command, "--"]


@asynccontextmanager
async def open_jail(
    program: str, *, directory: Path, own_user_namespace: bool, environment: Mapping[str, str]
) -> AsyncGenerator[Jail]:
    """Make a jail for a block.

    Cancelled at any point, it leaves no process and no file. QEMUs that are in it keep it.

    Args:
      program: QEMU's path, which is to be found in it, too.
      directory: An empty directory, in which it is put together, out of sight of everybody else.
      own_user_namespace: Whether that takes a user namespace: we are an ordinary user.
      environment: `Runtime.environment`.

    Raises:
      SandboxError: if it can't be made here; the message says why.
      MissingProgramError: if util-linux is not installed.

    """
    links, directories, files = _contents(program)
    command = [
        require_program("unshare"),
        *(("--user", "--map-root-user") if own_user_namespace else ()),
        "--mount",
        "--",
    ]
    arguments = [os.fspath(directory), *links, "", *directories, "", *files]
    wanted = ("ns/mnt", "ns/user") if own_user_namespace else ("ns/mnt",)
    async with make_namespace([*command, "/bin/sh", "-c", _MAKE, "sh", *arguments], wanted, environment) as opened:
        yield Jail(opened[0], opened[1] if own_user_namespace else None)


@asynccontextmanager
async def make_namespace(
    argv: list[str], wanted: Iterable[str], environment: Mapping[str, str]
) -> AsyncGenerator[list[int]]:
    """Have a command make a mount namespace, and yield descriptors of what is to be had by it.

    Args:
      argv: The command, which says `READY` when it is made, and then sleeps. It is ended at once.
      wanted: What is opened, as names in ``/proc/PID``. The namespace stays for as long as it is among that, and open.
      environment: `Runtime.environment`.

    Raises:
      SandboxError: if it can't be made; the message says why.

    """
    opened: list[int] = []
    process: OwnedProcess | None = None
    try:
        with trio.move_on_after(_PATIENCE):
            async with open_services("make_namespace()") as services:
                ready = trio.Event()
                process = started = await services.start(_hold, argv, environment, ready)
                await ready.wait()
                if started.returncode is None:
                    flags = os.O_RDONLY | os.O_CLOEXEC
                    opened.extend(os.open(f"/proc/{started.pid}/{name}", flags) for name in wanted)
        if not opened:
            raise SandboxError(
                f"no mount namespace can be made: {' '.join(process.output().split())[:_EXCERPT] if process is not None else ''}"
            )
        yield opened
    finally:
        for fd in opened:
            os.close(fd)


async def _hold(
    argv: list[str], environment: Mapping[str, str], ready: trio.Event, *, task_status: trio.TaskStatus[OwnedProcess]
) -> None:
    """Run what makes a jail, and then sleeps; say when it is made, or can't be."""
    said = ""

    def listen(data: bytes) -> None:
        nonlocal said
        said = (said + data.decode(errors="replace"))[-len(READY) - 2 :]
        if READY in said:
            ready.set()

    try:
        await run_owned(
            argv,
            environment={**minimal_environment(), **environment},
            inherited=InheritedFds(),
            on_output=listen,
            task_status=task_status,
        )
    finally:
        ready.set()


def _contents(program: str) -> tuple[list[str], list[str], list[str]]:
    """Return what is in a jail: links as pairs of target and name, directories, and files."""
    links, directories = list[str](), list[str]()
    for path in _PROGRAMS:
        if os.path.islink(path):
            links += [os.readlink(path), path]
        elif os.path.isdir(path):
            directories.append(path)
    real = os.path.realpath(program)
    if not any(Path(real).is_relative_to(directory) for directory in directories):
        directories.append(os.path.dirname(os.path.dirname(real)))
    return links, directories, [path for path in _FILES if _exists(path)]


def _exists(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISCHR(mode)
