"""A control group for each QEMU, where there is a place for one: what it may have of memory, and its share of the processors.

The place is a directory of a cgroup v2 hierarchy that is ours to make groups in. The kernel lets no group have both processes and
controllers for those below it, but for the topmost; so in a place that was delegated there must be no process (EBUSY, and for the
processors alone, where the kernel would make it a domain of threads, EOPNOTSUPP below it). And who is not root may move a process only
between groups below one whose ``cgroup.procs`` that user may write to, so the program must be in a group beside ours. We never move the
user's program, and never make groups outside of its own, whose limits hold for its machines as well, unless we are told where.

Source: the kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, final

import trio

from .. import constants
from .._cgroups import ROOT, own_groups
from .._errors import SandboxError
from .._observe import part_logger
from ._process import InheritedFds, describe_exit, minimal_environment, run_owned
from ._runtime import Runtime

_log = part_logger("confinement")

_CONTROLLERS: Final = ("cpu", "memory")
#: The weight of all machines of a host together; that of a group is 100 unless told otherwise.
_WEIGHT: Final = 50
#: What QEMU may have besides the guest's RAM, in MiB, before it is ended: with what it has only for moments.
_MARGIN_MIB: Final = 2 * constants.VM_OVERHEAD_MIB
#: Replaces itself by what comes behind, inside the group: so no process is ever elsewhere.
_ENTER: Final = 'echo 0 > "$1" && shift && exec "$@"'


@final
class ControlGroups:
    """A host's control group, which has one in it for each machine. Made by `open_control_groups`.

    Args:
      directory: Its directory; it exists.
      controllers: What is counted in it.

    """

    def __init__(self, directory: Path, controllers: frozenset[str]) -> None:
        self.directory = directory
        self._controllers = controllers

    @contextmanager
    def enter(self, memory_mib: int) -> Generator[list[str]]:
        """Make a group for a machine, and yield the command to put before that of its QEMU.

        After the block, by whose end the process is gone, so is the group.

        Raises:
          SandboxError: if there can be no group.

        """
        group = self.directory / secrets.token_hex(6)
        try:
            group.mkdir()
            if "memory" in self._controllers:
                limit = f"{(memory_mib + _MARGIN_MIB) * 2**20}"
                _write(group / "memory.max", limit)
                with suppress(FileNotFoundError):  # a kernel without swap, or that does not count it
                    _write(group / "memory.swap.max", limit)
        except OSError as exc:
            _remove(group)
            raise SandboxError(
                f"there is no control group for another virtual machine: {exc.strerror}: {exc.filename}; "
                'trying again is safe, HostConfig(cgroup="off") does without'
            ) from exc
        try:
            yield ["/bin/sh", "-c", _ENTER, "sh", str(group / "cgroup.procs")]
        finally:
            _remove(group)


@asynccontextmanager
async def open_control_groups(
    choice: Literal["auto", "off"] | Path, runtime: Runtime, *, root: Path = ROOT
) -> AsyncGenerator[ControlGroups | None]:
    """Make a host's control group and yield it; None if there is none. After the block it is gone.

    Args:
      choice: `HostConfig.cgroup`.
      runtime: Whose reaper removes it if we are killed.
      root: For tests; see `own_groups`.

    Raises:
      SandboxError: if *choice* is a directory, and no group can be made in it.

    """
    # What is switched on in a place that can be used stays on: another host may have groups there, too.
    with ExitStack() as undoing, ExitStack() as stack:
        made: ControlGroups | None = None
        try:
            if choice != "off":
                place = _own_group(root) if choice == "auto" else choice
                counted = _counted(place) if choice == "auto" else _have_counted(place, undoing)
                made = _make(place, runtime.directory.name, counted)
                runtime.guard(made.directory)
                stack.callback(runtime.release, made.directory)
                stack.callback(_remove, made.directory)
                await _prove(made, runtime.environment)
                undoing.pop_all()
            else:
                await trio.lowlevel.checkpoint()
        except (OSError, SandboxError) as exc:
            stack.close()
            undoing.close()
            made = None
            reason = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)
            if choice != "auto":
                raise SandboxError(
                    f"no control group can be made in {choice} (`HostConfig.cgroup`): {reason}. It must be a directory of a cgroup v2 "
                    "hierarchy that this user may write to, without processes of its own and with the controllers cpu or memory; "
                    'cgroup="off" uses none'
                ) from exc
            _log.info("virtual machines are in this program's own control group: %s", reason)
        yield made


async def _prove(groups: ControlGroups, environment: Mapping[str, str]) -> None:
    """Have a program enter a group, which the kernel may refuse though all files can be written."""
    with groups.enter(0) as enter, InheritedFds() as inherited:
        process = await run_owned(
            [*enter, "/bin/true"], environment={**minimal_environment(), **environment}, inherited=inherited
        )
    if process.returncode != 0:
        said = " ".join(process.output().split()) or describe_exit(process.returncode or 0)
        raise OSError(f"a program can't enter a group there: {said}")


def _own_group(root: Path) -> Path:
    for directory, version in own_groups("memory", root):
        if version == 2:
            return directory
    raise OSError("there is no cgroup v2 hierarchy")


def _counted(place: Path, file: str = "cgroup.subtree_control") -> frozenset[str]:
    """Return what of ours is counted for the groups in *place*."""
    return frozenset((place / file).read_text("ascii").split()).intersection(_CONTROLLERS)


def _have_counted(place: Path, undoing: ExitStack) -> frozenset[str]:
    """Have all that can be counted for the groups in *place*, and return it; *undoing* has it as it was."""
    counted = _counted(place)
    missing = _counted(place, "cgroup.controllers") - counted
    if missing:
        _switch(place, "+", missing)
        undoing.callback(_switch_off, place, missing)
    return counted | missing


def _make(place: Path, name: str, counted: frozenset[str]) -> ControlGroups:
    """Make a group in *place*, whose own groups are counted as it is."""
    if not counted:
        raise OSError(f"neither memory nor processors are counted for groups in {place}")
    directory = place / name
    directory.mkdir()
    try:
        if "cpu" in counted:
            _write(directory / "cpu.weight", f"{_WEIGHT}")
        _switch(directory, "+", counted)
    except BaseException:
        _remove(directory)
        raise
    return ControlGroups(directory, counted)


def _switch(directory: Path, sign: Literal["+", "-"], controllers: frozenset[str]) -> None:
    """Have the groups in *directory* counted ("+"), or no more ("-")."""
    _write(directory / "cgroup.subtree_control", " ".join(f"{sign}{each}" for each in sorted(controllers)))


def _switch_off(directory: Path, controllers: frozenset[str]) -> None:
    with suppress(OSError):  # groups of somebody else's are counted by them
        _switch(directory, "-", controllers)


def _write(path: Path, text: str) -> None:
    # The kernel's files are there; in a directory of another kind none must be made.
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as exc:
        exc.filename = os.fspath(path)
        raise
    finally:
        os.close(fd)


def _remove(directory: Path) -> None:
    with suppress(FileNotFoundError):
        try:
            directory.rmdir()  # what the kernel has in it does not count
        except OSError as exc:
            _log.warning("a control group is left: %s: %s", directory, exc.strerror)
