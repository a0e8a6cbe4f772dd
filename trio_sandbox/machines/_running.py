"""The sandboxes of this user that run on this machine, whatever process has opened them; and ending one.

Each host says in its file what it has; see `_roster`. That is a claim. The kernel confirms it: the host holds the file's lock, so it lives; the process
that the record calls its owner has the file open, so it is the owner; the process that it calls the QEMU was started at the time that the
record says, and descends from the owner. What is not confirmed is never sent a signal.
"""

from __future__ import annotations

import os
import select
import signal
from functools import partial
from pathlib import Path
from typing import Final, Literal

import attrs

from .._errors import SandboxError
from ._held_files import default_directory, is_held, read_held_files, read_whole
from ._process_facts import command_line, descends, has_open, pid_namespace, process_status
from ._roster import MOST, PREFIX, SIZE, SandboxRecord, decode, is_identifier

#: Milliseconds for the kernel to take away a QEMU that was killed.
_PATIENCE_MS: Final = 10_000
#: Virtual machines of one sandbox that are ended, where it gets another meanwhile.
_MACHINES: Final = 10


@attrs.frozen(kw_only=True)
class RunningSandbox:
    """A sandbox that some process of this user has open."""

    id: str
    """`Sandbox.id`: 12 hexadecimal digits."""
    image: str
    state: Literal["running", "hibernated", "ended"]
    """"hibernated": it has no virtual machine now. "ended": its virtual machine is gone, and its block was not left yet."""
    opened: float
    """In Unix seconds."""
    memory_mib: int
    vcpus: int
    accelerator: str
    qemu_pid: int | None
    """The process of its virtual machine; None if there is none, or it can't be seen from here."""
    owner_pid: int | None
    """The process that has it open; None if that can't be seen from here, being in another container."""
    owner_command: str
    """The owner's command line, or its beginning; "" if it can't be known."""


@attrs.frozen
class _Found:
    sandbox: RunningSandbox
    record: SandboxRecord
    objection: str
    """Why its virtual machine can't be ended from here; "" if it can."""


def running_sandboxes(directory: Path | None = None) -> tuple[list[RunningSandbox], list[str]]:
    """Return the sandboxes of this user on this machine, the oldest first, and what is wrong with files that should say such.

    Args:
      directory: Where hosts have their files; None: where all hosts of this user have theirs.

    Raises:
      SandboxError: if that directory is somebody else's.

    """
    found, problems = _read(directory)
    return sorted((each.sandbox for each in found), key=lambda each: (each.opened, each.id)), problems


def kill_sandbox(name: str, directory: Path | None = None) -> bool:
    """End the virtual machine of a sandbox, and wait until it is gone.

    What its owner has under way there raises `OutcomeUnknownError`, because of a `VmDiedError`, and later requests `SandboxClosedError`.

    Args:
      name: What `RunningSandbox.id` says.
      directory: As for `running_sandboxes`.

    Returns:
      False if it was gone already.

    Raises:
      SandboxError: if there is no such sandbox, it hibernates, it can't be ended from here, or it does not end. The message says why. To
        try again is safe.

    """
    seen: set[tuple[int, int]] = set()
    killed = False
    for _ in range(_MACHINES):
        found = _find(name, directory)
        if found is None:
            if killed:
                return True
            raise SandboxError(
                f"no sandbox {name!r} of this user runs on this machine; `trio-sandbox ps` lists those that do"
            )
        record = found.record
        if found.objection:
            raise SandboxError(f"the sandbox {name} was not ended: {found.objection}")
        if (record.pid, record.started) in seen:
            return killed
        # It may be reverted meanwhile, and has another virtual machine then.
        seen.add((record.pid, record.started))
        killed = _kill(record) or killed
    raise SandboxError(f"the sandbox {name} gets new virtual machines as fast as they are ended; try again")


def _find(name: str, directory: Path | None) -> _Found | None:
    if not is_identifier(name):
        return None
    found = [each for each in _read(directory)[0] if each.sandbox.id == name]
    if len(found) > 1:
        raise SandboxError(f"{len(found)} sandboxes say that they are {name!r}, and none was ended")
    return found[0] if found else None


def _read(directory: Path | None) -> tuple[list[_Found], list[str]]:
    directory = default_directory() if directory is None else directory
    found: list[_Found] = []
    problems: list[str] = []
    namespace = pid_namespace()

    def read(name: str, fd: int) -> None:
        size = os.fstat(fd).st_size
        wrong = [ValueError("it is damaged: it has a part of a record")] if size % SIZE else []
        for place in range(min(size // SIZE, MOST)):
            try:
                if (record := read_whole(partial(_read_record, fd, place))) is not None:
                    found.append(_confirm(record, fd, namespace))
            except ValueError as exc:
                wrong.append(exc)
        if wrong and is_held(fd):  # else its host has just ended
            problems.append(f"{directory / name}: {len(wrong)} of its records can't be used; the first: {wrong[0]}")

    try:
        read_held_files(directory, PREFIX, read)
    except OSError as exc:
        raise SandboxError(f"this user's sandboxes can't be known: {directory}: {exc.strerror}") from exc
    return found, problems


def _read_record(fd: int, place: int) -> SandboxRecord | None:
    data = os.pread(fd, SIZE, place * SIZE)
    return decode(data) if data.strip(b"\0") else None


def _confirm(record: SandboxRecord, file: int, namespace: int) -> _Found:
    """Return what is true of what a record says.

    Raises:
      ValueError: if its owner is not what it says.

    """
    objection = ""
    state: Literal["running", "hibernated", "ended"] = "running"
    seen = record.namespace == namespace
    if not seen:
        objection = "it is in another container, whose processes can't be seen from here; do it there"
    else:
        try:
            if not has_open(record.owner, record.descriptor, file):
                raise ValueError(f"the process {record.owner}, which it calls its owner, does not have it open")
        except PermissionError:
            objection = f"the kernel does not let this user look at its owner, the process {record.owner}"
        status = process_status(record.pid) if record.pid else None
        if status is None or status.started != record.started or not descends(status, record.owner):
            state = "ended"
    if record.pid == 0:
        state = "hibernated"
        objection = (
            objection or f"it hibernates, and has no virtual machine now; its owner is the process {record.owner}"
        )
    return _Found(
        RunningSandbox(
            id=record.id,
            image=record.image,
            state=state,
            opened=record.opened,
            memory_mib=record.memory_mib,
            vcpus=record.vcpus,
            accelerator=record.accelerator,
            qemu_pid=record.pid if seen and state == "running" else None,
            owner_pid=record.owner if seen else None,
            owner_command=command_line(record.owner) if seen else "",
        ),
        record,
        objection,
    )


def _kill(record: SandboxRecord) -> bool:
    """End a QEMU, and wait until it is gone; False if it was gone already."""
    try:
        process = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return False
    try:
        status = process_status(record.pid)
        if status is None or status.started != record.started or not descends(status, record.owner):
            return False
        # What was read is true of this process, if it still lives: until then nobody else gets its number.
        if _is_ended(process, 0):
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
        if not _is_ended(process, _PATIENCE_MS):
            raise SandboxError(
                f"the sandbox {record.id}: its QEMU, the process {record.pid}, was killed and is still there; the kernel has it"
            )
    except ProcessLookupError:
        return False
    except PermissionError as exc:
        raise SandboxError(
            f"the sandbox {record.id} was not ended: its QEMU, the process {record.pid}, is another user's"
        ) from exc
    finally:
        os.close(process)
    return True


def _is_ended(process: int, wait_ms: int) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(wait_ms))
