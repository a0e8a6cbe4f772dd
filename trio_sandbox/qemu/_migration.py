"""A machine's state to a file and back: QEMU's migration, as a rule with the RAM left where it is.

The RAM of such a machine is a file (`MachineConfig.memory_file`), so that only the devices' state is
written: some 350 KB. The file that takes it is handed over as a descriptor: QEMU opens nothing. How it is named
depends on QEMU's version: 9.1 deprecated ``fd:`` for files, and 8.2 was the first to have ``file:``.

Source: QEMU's ``docs/devel/migration`` and ``qapi/migration.json``.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Final

import trio

from .._errors import QMPClosedError, QMPCommandError, QMPError
from ._qmp import QMPChannel

#: The descriptor's name inside QEMU, and the first version that wants a descriptor set instead.
_FD_NAME: Final = "state"
_SETS_SINCE: Final = (9, 1)
#: Seconds between two looks whether a migration is over for good.
_LOOK: Final = 0.005
#: Bytes a second: none of ours goes over a network that others want to use.
_NO_LIMIT: Final = 2**40


class MigrationError(Exception):
    """QEMU could not save or load a machine's state; the message is QEMU's."""


async def save_state(qmp: QMPChannel, fd: int) -> None:
    """Stop the machine and write its devices' state to *fd*; it stays stopped.

    Its disks are in order then, and not written to any more: all may be copied. Cancelled, the machine
    is stopped, or not, and what *fd* holds is of no use.

    Args:
      qmp: The machine's, which has its RAM in a file, shared.
      fd: A file open for writing, empty.

    Raises:
      MigrationError: if QEMU says that it failed.
      QMPError: if it can't be talked to.

    """
    await qmp.execute("stop")
    await _migrate(qmp, fd, "migrate", with_memory=False)


async def save_with_memory(qmp: QMPChannel, fd: int) -> None:
    """Write the RAM and the devices' state of a machine that is stopped to *fd*, wherever its RAM is.

    Arguments and errors are those of `save_state`. The machine may go on afterwards.
    """
    await qmp.execute("migrate-set-parameters", {"max-bandwidth": _NO_LIMIT})
    failure = None
    try:
        await _migrate(qmp, fd, "migrate", with_memory=True)
    except MigrationError as exc:
        failure = exc
    await _wait_finalized(qmp)
    if failure is not None:
        raise failure


async def load_state(qmp: QMPChannel, fd: int, *, with_memory: bool = False) -> None:
    """Read the devices' state from *fd*, and the RAM if `save_with_memory` wrote it; let the machine continue from there.

    Args:
      qmp: The machine's, which was started to wait for it.
      fd: A file open for reading, from its beginning.
      with_memory: Whether the RAM is in it.

    Raises:
      MigrationError: if QEMU says that it failed.
      QMPError: if it can't be talked to: some versions of QEMU exit where they can't load a state.

    """
    await _migrate(qmp, fd, "migrate-incoming", with_memory=with_memory)
    # It was stopped when it was saved, so it is still.
    await qmp.execute("cont")


async def _migrate(qmp: QMPChannel, fd: int, command: str, *, with_memory: bool) -> None:
    wanted = {"x-ignore-shared": not with_memory, "events": True}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
    with qmp.subscribe("MIGRATION") as events:
        await _start(qmp, fd, command)
        async for event in events:
            match event.data.get("status"):
                case "completed":
                    return
                case "failed" | "cancelled":
                    raise MigrationError(await _reason(qmp))
                case _:
                    pass
    raise QMPClosedError(f"the connection to QEMU was lost during {command}")


async def _start(qmp: QMPChannel, fd: int, command: str) -> None:
    """Have QEMU begin with *command*, for which it gets a copy of *fd*."""
    by_set, number = qmp.greeting.version >= _SETS_SINCE, 1 << 30 | secrets.randbits(30)
    if by_set:
        await qmp.execute("add-fd", {"fdset-id": number}, fds=[fd])
    else:
        await qmp.execute("getfd", {"fdname": _FD_NAME}, fds=[fd])
    refusal = None
    try:
        await qmp.execute(command, {"uri": f"file:/dev/fdset/{number}" if by_set else f"fd:{_FD_NAME}"})
    except QMPCommandError as exc:
        refusal = exc
    if by_set:
        # It has opened the file by now, or never will.
        await qmp.execute("remove-fd", {"fdset-id": number})
    if refusal is not None:
        raise MigrationError(refusal.desc) from refusal


async def _wait_finalized(qmp: QMPChannel) -> None:
    """Wait for what QEMU does after it has said that a migration is over: until then it refuses to let the machine go on."""
    while True:
        status = await qmp.execute("query-status")
        if status.get("status") != "finish-migrate":
            return
        await trio.sleep(_LOOK)  # no event tells


async def _reason(qmp: QMPChannel) -> str:
    reason = "QEMU did not say why"
    with suppress(QMPError):
        answer = await qmp.execute("query-migrate")
        reason = str(answer.get("error-desc", reason))
    await trio.lowlevel.checkpoint()
    return reason
