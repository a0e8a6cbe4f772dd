"""Requests of the service "file", about the files of a sandbox; see `client/_file_session.py`."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import PurePosixPath

import trio

from .._errors import GuestProtocolError
from ..client import (
    ERROR as ERROR,
    REPLY as REPLY,
    FileSession as FileSession,
    encode_request as encode_request,
    guest_failures,
    parse_error as parse_error,
)
from ._slot import Slot

CONTENT = b"D"
END = b"E"

#: Bytes of a path that links lead to, which may be longer than what the guest's kernel takes.
_PATH_LIMIT = 2**14
#: Variables of a process's environment, which no image of ours has a hundredth of.
_MOST_VARIABLES = 4096


@asynccontextmanager
async def open_session(slot: Slot, user: str | int | None, what: str) -> AsyncGenerator[FileSession]:
    """Open a session for a block.

    Args:
      slot: Where the machine is.
      user: Whose rights it has; None for the guest's ordinary user.
      what: What it is for, in messages.

    Raises:
      SandboxClosedError: if the sandbox is closed or its VM gone; nothing was sent.
      OutcomeUnknownError: if the VM ended meanwhile, or the helper did.
      GuestProtocolError: if the guest broke the protocol; its VM was ended.

    """
    vm = await slot.resolve(what)
    async with guest_failures(vm, what):
        session = FileSession(vm, user, what)
        try:
            try:
                yield session
            except OSError:
                if session.failed:
                    await session.finish()  # noqa: ASYNC120 - a caller that is cancelled wants no answer
                raise
            await session.finish()
        finally:
            session.close()


async def call(slot: Slot, user: str | int | None, what: str, operation: str, *fields: object) -> bytes:
    """Make one request in a session of its own.

    A caller that is cancelled leaves it done or not done, but not under way: another helper, which serves the next request, would
    overtake this one.
    """
    request = encode_request(operation, *fields)
    async with open_session(slot, user, what) as session:
        try:
            await session.send(request, end=True)
            return await session.reply()
        except trio.Cancelled:
            await session.take_back()  # noqa: ASYNC102, ASYNC120 - it is shielded and bounded by itself
            raise


async def read_environment(slot: Slot, user: str | int | None) -> dict[str, str]:
    """What `Sandbox.environment` does."""
    what = "the environment of processes"
    async with open_session(slot, user, what) as session:
        return parse_environment(await session.ask("environment", end=True))


def parse_environment(payload: bytes) -> dict[str, str]:
    """Return the variables that the guest says processes have."""
    fields = payload.split(b"\0") if payload else []
    if len(fields) > _MOST_VARIABLES:
        raise GuestProtocolError(f"the guest sent {len(fields)} variables, of which {_MOST_VARIABLES} are allowed")
    variables: dict[str, str] = {}
    for field in fields:
        name, equals, value = field.partition(b"=")
        if not name or not equals:
            raise GuestProtocolError(f"the guest sent something that is not a variable: {field[:80]!r}")
        variables[os.fsdecode(name)] = os.fsdecode(value)
    return variables


def parse_path(payload: bytes) -> PurePosixPath:
    """Return the path that the guest says something leads to.

    Raises:
      GuestProtocolError: if it is none.
      OSError: ENAMETOOLONG, if it is too long to be looked at; code in the guest can have made it so.

    """
    if not payload or b"\0" in payload:
        raise GuestProtocolError(f"the guest sent something that is not a path: {payload[:80]!r}")
    if len(payload) > _PATH_LIMIT:
        raise OSError(errno.ENAMETOOLONG, f"it leads to a path of {len(payload)} bytes")
    return PurePosixPath(os.fsdecode(payload))
